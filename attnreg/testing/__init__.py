"""The conformance kit: whether a backend does what it declares, and refuses the rest.

`class TestMine(BackendContract): name = "mine"` is the whole test file of a plugin; `verify("mine")` and
`attnreg verify mine` ask the same laws and return a capability card. The laws are driven by the capabilities both ways:
what is declared must match the float64 oracle, and what is not must be refused before anything is computed.

It needs hypothesis, and pytest for `BackendContract`: `pip install 'attnreg[testing]'`.
"""

from attnreg.testing.card import Card, Row
from attnreg.testing.contract import BackendContract
from attnreg.testing.engine import UnusableError, verify
from attnreg.testing.law import Law
from attnreg.testing.laws import LAWS

__all__ = ["LAWS", "BackendContract", "Card", "Law", "Row", "UnusableError", "verify"]
