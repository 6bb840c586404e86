"""The functional call: attention for any model, on any backend, in one line.

`attention` chooses the backend, has its formatter make of the mask what that backend reads, and calls it. Flags are
preferred to masks: where causality and a window can travel as keywords, no mask is built.
"""

from attnreg.functional.calling import attend, attention
from attnreg.functional.choice import Needs, candidates, standing
from attnreg.functional.masking import Asked

__all__ = ["Asked", "Needs", "attend", "attention", "candidates", "standing"]
