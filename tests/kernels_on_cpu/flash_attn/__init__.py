"""A reference on the CPU for flash-attn 2.8: its public signatures, and its conventions. For tests; no kernel."""

__version__ = "2.8.3"
