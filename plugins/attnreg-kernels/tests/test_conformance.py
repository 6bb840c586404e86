"""A Hub kernel in the manner of flash-attn keeps the contract for what is declared, and refuses the rest."""

from dataclasses import replace
from pathlib import Path

import attnreg_kernels

import attnreg
from attnreg.testing import BackendContract

KERNEL = Path(__file__).parent / "flash_on_cpu"
SUPPORTS = replace(attnreg_kernels.CAPABILITIES["flash_attn_2"], devices=frozenset({"cpu"}))
IN_ROWS = replace(SUPPORTS, structures=frozenset({"causal", "bidirectional", "sliding_window"}), packing=False)


class TestFlashOnTheCpu(BackendContract):
    """Every law, on the reference that `kernels` loads from this disk."""

    backend = attnreg_kernels.local(
        "flash_on_cpu",
        KERNEL,
        function="flash_attn_func",
        varlen="flash_attn_varlen_func",
        convention="flash_attn_2",
        supports=SUPPORTS,
        registry=attnreg.Registry(),
    )


class TestRowsOnTheCpu(BackendContract):
    """Every law, on a function without a companion for sequences."""

    backend = attnreg_kernels.local(
        "rows_on_cpu",
        KERNEL,
        function="flash_attn_func",
        convention="flash_attn_3",
        supports=IN_ROWS,
        registry=attnreg.Registry(),
    )
    quick = True
