"""Attention over a cache in pages: the cache itself, and `paged|X` for every backend X."""

from __future__ import annotations

from attnreg.paged.attending import attend_packed, attend_pages
from attnreg.paged.batch import PagedBatch
from attnreg.paged.cache import PagedKVCache
from attnreg.paged.decoding import DecodeBatch
from attnreg.paged.errors import (
    CacheAllocationError,
    CacheFullError,
    CorruptCacheError,
    StaleBatchError,
    UnknownSequenceError,
)
from attnreg.paged.masking import PagedMask, paged_mask, stand_in
from attnreg.paged.pages import Cache, Pages
from attnreg.paged.storage import LayerSpec, bytes_wanted
from attnreg.paged.usage import CacheUsage, GroupUsage

__all__ = [
    "Cache",
    "CacheAllocationError",
    "CacheFullError",
    "CacheUsage",
    "CorruptCacheError",
    "DecodeBatch",
    "GroupUsage",
    "LayerSpec",
    "PagedBatch",
    "PagedKVCache",
    "PagedMask",
    "Pages",
    "StaleBatchError",
    "UnknownSequenceError",
    "attend_packed",
    "attend_pages",
    "bytes_wanted",
    "paged_mask",
    "stand_in",
]
