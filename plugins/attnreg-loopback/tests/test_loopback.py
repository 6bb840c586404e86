"""The example plugin keeps the contract for what it declares, and refuses the rest."""

import pytest
import torch
from attnreg_loopback import SUPPORTS, attention

import attnreg
from attnreg import reference
from attnreg.masks import MaskFunction, bidirectional, causal, eager_mask


def backend() -> attnreg.Backend:
    """Build the record as the plugin does, without installing it."""
    return attnreg.Backend(name="loopback", attention=attention, mask=eager_mask, supports=SUPPORTS)


def test_code_fits_on_a_page() -> None:
    """The plugin is at most 25 lines of code, docstrings and blank lines aside."""
    import ast
    import inspect

    import attnreg_loopback

    tree = ast.parse(inspect.getsource(attnreg_loopback))
    docstrings = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = inspect.getsource(attnreg_loopback).splitlines()
    code = [line for number, line in enumerate(lines, 1) if line.strip() and number not in docstrings]
    assert len(code) <= 25


@pytest.mark.parametrize("predicate", [causal(), bidirectional()], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("padding", ["none", "left", "right", "a whole row"])
def test_matches_the_oracle(predicate: MaskFunction, padding: str) -> None:
    """Causal or not, padded on either side or altogether: the result is the oracle's."""
    query, key, value = torch.randn(3, 2, 4, 9, 16, generator=torch.Generator().manual_seed(0))
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, {"none": slice(0), "left": slice(4), "right": slice(5, None), "a whole row": slice(None)}[padding]] = False
    mask = eager_mask(2, 9, 9, mask_function=predicate, attention_mask=real)
    output, weights = backend().call(None, query, key, value, mask)
    expected = reference.attention(query, key, value, predicate, real).output
    assert weights is None
    torch.testing.assert_close(output.double(), expected, rtol=0, atol=1e-5)


def test_refuses_what_it_does_not_declare() -> None:
    """A softcap is refused before any compute, with the reason."""
    query = torch.randn(1, 2, 3, 8)
    with pytest.raises(attnreg.UnsupportedError, match="softcap: wants softcap; supported: not declared"):
        backend().call(None, query, query, query, eager_mask(1, 3, 3), softcap=30.0)
