"""For those who adapt a foreign kernel: what all adapters need, so that each is only what is special about its kernel.

- `graph_op` makes one operator of a kernel that torch.compile and torch.export cannot look into.
- `flash` prepares calls of kernels in the manner of flash-attn, and finishes what they return.
- The rest checks and completes a call as the built-in backends do.

Where the kernel is from, and whether it can be used here, is said by `attnreg.Kernel`.
"""

from attnreg.builtin.inputs import (
    Sizes,
    causality,
    check_cap,
    check_inputs,
    check_sinks,
    check_window,
    nothing,
    refuse_vmap,
    scaled,
)
from attnreg.builtin.sinks import damped, without_gradient
from attnreg.compat import alibi, flash, pages
from attnreg.compat.graph import graph_op, rerun
from attnreg.masks.extent import readable, tracing

__all__ = [
    "Sizes",
    "alibi",
    "causality",
    "check_cap",
    "check_inputs",
    "check_sinks",
    "check_window",
    "damped",
    "flash",
    "graph_op",
    "nothing",
    "pages",
    "readable",
    "refuse_vmap",
    "rerun",
    "scaled",
    "tracing",
    "without_gradient",
]
