"""Whether a model over pages computes what it computes on its own: tried on a few tokens before anything is served."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from attnreg.errors import AttnregError
from attnreg.paged.cache import PagedKVCache
from attnreg.serving.errors import UnservableModelError
from attnreg.serving.probe import first_line

if TYPE_CHECKING:
    from collections.abc import Hashable

    from attnreg.backend import Backend
    from attnreg.serving.probe import Anatomy
    from attnreg.serving.steps import Forward

LENGTH: Final = 12
"""Tokens that are tried."""
_PIECES: Final[tuple[dict[Hashable, int], ...]] = ({"a": 5}, {"b": 1, "a": 6}, {"a": 1, "b": 11})
"""Two sequences in one row, each in pieces: a chunk of several tokens behind others, and a single one."""
_TOLERANCE: Final = {torch.float64: 1e-5, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}
"""How far logits may be off, over their own size: root mean squares."""
_LOSSY: Final = 0.4


def trial(vocabulary: int, device: torch.device) -> torch.Tensor:
    """Return tokens to try a model on, int64 `(1, LENGTH)`."""
    return (torch.arange(LENGTH, device=device)[None] * 7919 + 11) % vocabulary


@torch.inference_mode()
def prove(forward: Forward, backend: Backend, anatomy: Anatomy, block_size: int, expected: torch.Tensor) -> None:
    """Compare logits over pages with those of the model on its own.

    Args:
        forward: the model over pages.
        backend: that it is on.
        anatomy: of the model.
        block_size: of the cache.
        expected: `(LENGTH, vocabulary)`, of `trial`.

    Raises:
        UnservableModelError: they differ by more than the dtype explains, or the backend refuses.
    """
    name = type(forward.model).__name__
    blocks = 2 * (LENGTH // block_size + 1)
    cache = PagedKVCache(
        anatomy.layers, num_blocks=blocks, block_size=block_size, dtype=anatomy.dtype, device=anatomy.device
    )
    row = trial(expected.shape[-1], expected.device)
    remedy = "Use model.generate(), or another backend than"
    try:
        found = _in_pieces(forward, cache, row)
    except AttnregError as error:
        problem = f"{backend.name} refuses a call of it ({first_line(error)})"
        raise UnservableModelError(name, problem, f"{remedy} {backend.name}.") from error
    off = max(_off(each, expected) for each in found)
    tolerance = max(_TOLERANCE.get(anatomy.dtype, 0.1), _LOSSY if backend.supports.lossy else 0.0)
    if not off <= tolerance:
        problem = (
            f"its logits over pages are off by {off:.1e} of their size ({tolerance:.0e} is what its dtype explains)"
        )
        raise UnservableModelError(name, problem, f"{remedy} {backend.name}.")


def _in_pieces(forward: Forward, cache: PagedKVCache, row: torch.Tensor) -> list[torch.Tensor]:
    found: dict[Hashable, list[torch.Tensor]] = {"a": [], "b": []}
    done = dict.fromkeys(found, 0)
    for name in found:
        cache.add(name)
    for piece in _PIECES:
        for name, tokens in piece.items():
            cache.reserve(name, tokens)
        batch = cache.batch(piece)
        packed = torch.cat([row[:, done[name] : done[name] + tokens] for name, tokens in piece.items()], 1)
        made = torch.split(forward(packed, batch, None), list(piece.values()))
        cache.commit(batch)
        for (name, tokens), logits in zip(piece.items(), made, strict=True):
            found[name].append(logits)
            done[name] += tokens
    return [torch.cat(parts) for parts in found.values()]


def _off(found: torch.Tensor, expected: torch.Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))
