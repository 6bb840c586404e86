"""A reference of xFormers 0.0.35 on the CPU, for tests: its functions and conventions in plain torch.

It is no kernel, and never ships. What it reproduces is said where it is reproduced.
"""

__version__ = "0.0.35"
