"""Attention over a cache in pages: the cache itself, and `paged|X` for every backend X."""

from __future__ import annotations

from attnreg.paged.attending import attend_packed, attend_pages
from attnreg.paged.masking import PagedMask, paged_mask, stand_in
from attnreg.paged.pages import Cache, Pages

__all__ = ["Cache", "PagedMask", "Pages", "attend_packed", "attend_pages", "paged_mask", "stand_in"]
