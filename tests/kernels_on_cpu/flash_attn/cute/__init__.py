"""A reference on the CPU for flash-attn-4 4.0.0b36: its public signatures, and its conventions. For tests; no kernel."""

from flash_attn.cute.interface import flash_attn_func, flash_attn_varlen_func

__version__ = "0.0.0"  # as the package itself says, whatever its version

__all__ = ["flash_attn_func", "flash_attn_varlen_func"]
