"""A CPU reference of SageAttention 1.0.6's public functions, for tests; it holds no kernel, and is never shipped.

It has the package's signatures, assertions and conventions, what is unkind about them included: keys are written to,
unknown keywords are swallowed, and empty places of a block are taken for keys. That inputs are on a GPU is not asked.
"""

from sageattention.core import sageattn, sageattn_varlen

__all__ = ["sageattn", "sageattn_varlen"]
