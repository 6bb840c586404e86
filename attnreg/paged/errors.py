"""What a paged cache refuses: each error says what was asked, what there is, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attnreg.errors import AttnregError

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

GIB = 2**30


def layers_with(window: int | None) -> str:
    """Name a group of layers by their window."""
    return "the layers without a window" if window is None else f"the layers with a window of {window}"


class CacheFullError(AttnregError):
    """Too few blocks are free, or there at all, for what was to be reserved; the cache is as it was.

    Attributes:
        fits: whether there would be blocks enough if all other sequences were released.
    """

    sequence: Hashable
    tokens: int
    sliding_window: int | None
    wanted: int
    free: int
    num_blocks: int
    fits: bool

    def __init__(
        self,
        sequence: Hashable,
        tokens: int,
        sliding_window: int | None,
        wanted: int,
        free: int,
        num_blocks: int,
        *,
        fits: bool,
    ) -> None:
        what = f"{tokens} more tokens of {sequence!r} want {wanted} blocks for {layers_with(sliding_window)}"
        super().__init__(
            f"the cache is full: {what}, and {free} of {num_blocks} are free. Nothing has changed. Release a "
            "sequence (it can be added again later, with all of its tokens), reserve fewer tokens, or build the cache "
            "with a larger num_blocks."
            if fits
            else f"the cache is too small: {what}, which together with those it has is more than the {num_blocks} "
            "there are. Nothing has changed, and releasing others is of no use. Reserve fewer tokens at a time (the "
            "cache's `longest` says how many a sequence can ever have), or build the cache with a larger num_blocks.",
            sequence=sequence,
            tokens=tokens,
            sliding_window=sliding_window,
            wanted=wanted,
            free=free,
            num_blocks=num_blocks,
            fits=fits,
        )


class CacheAllocationError(AttnregError):
    """The device has no room for the blocks; `__cause__` is torch's own error."""

    wanted: int

    def __init__(self, wanted: int, device: object, num_blocks: Iterable[int], block_size: int) -> None:
        blocks = " + ".join(map(str, num_blocks))
        super().__init__(
            f"a cache of {blocks} blocks of {block_size} tokens wants {wanted} bytes ({wanted / GIB:.2f} GiB) on "
            f"{device}, which has no room for them. Ask for fewer blocks (attnreg.paged.bytes_wanted says "
            "what a cache takes), or for a smaller dtype.",
            wanted=wanted,
            device=str(device),
        )


class UnknownSequenceError(AttnregError, KeyError):
    """The cache has no sequence of that name."""

    sequence: Hashable

    def __init__(self, sequence: Hashable, there: Iterable[Hashable]) -> None:
        names, shown = [repr(name) for name in there], 8
        rest = f", … ({len(names)} in all)" if len(names) > shown else ""
        super().__init__(
            f"the cache has no sequence {sequence!r} (it has: {', '.join(names[:shown]) or 'none'}{rest}). "
            "Add it first; one that was released is added again with all of its tokens.",
            sequence=sequence,
        )


class StaleBatchError(AttnregError):
    """A batch is used after its sequences have changed: its slots may be somebody else's by now."""

    sequences: list[Hashable]

    def __init__(self, sequences: Iterable[Hashable]) -> None:
        names = list(sequences)
        super().__init__(
            f"the batch is out of date: {', '.join(map(repr, names))} changed since it was built (committed, released, "
            "or given blocks of its own after a fork). Build a new one, or load it anew if it is for decoding; a batch "
            "is committed once.",
            sequences=names,
        )


class CorruptCacheError(AttnregError):
    """The cache's books do not agree: a bug of attnreg, or blocks that somebody changed from outside."""

    problems: list[str]

    def __init__(self, problems: Iterable[str]) -> None:
        found = list(problems)
        super().__init__(
            "\n".join(["the paged cache contradicts itself (please report this):", *(f"  {one}" for one in found)]),
            problems=found,
        )
