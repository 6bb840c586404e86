"""Which full blocks hold which tokens, after which others: a tree, so that equal prefixes are found and shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence


class PrefixNode:
    """One full block of tokens behind all those of its ancestors.

    Nodes are found by the tokens themselves: what shares a hash alone is told apart, as in every dict.

    Attributes:
        blocks: for each group of layers the block that holds these tokens; 0 where none does any more.
        pins: sequences whose last full block this is. They go on from here, so that it must stay.
    """

    __slots__ = ("blocks", "children", "parent", "pins", "tokens")

    def __init__(self, groups: int, parent: PrefixNode | None = None, tokens: tuple[Hashable, ...] = ()) -> None:
        self.parent = parent
        self.tokens = tokens
        self.children: dict[tuple[Hashable, ...], PrefixNode] = {}
        self.blocks = [0] * groups
        self.pins = 0

    def child(self, tokens: tuple[Hashable, ...]) -> PrefixNode:
        """Find the node of *tokens* behind this one, or make it."""
        found = self.children.get(tokens)
        if found is None:
            found = self.children[tokens] = PrefixNode(len(self.blocks), self, tokens)
        return found

    def path(self, tokens: Sequence[Hashable], block_size: int, most: int) -> list[PrefixNode]:
        """Follow *tokens* for at most *most* full blocks, as far as there are nodes."""
        node, found = self, []
        for number in range(most):
            following = node.children.get(tuple(tokens[number * block_size : (number + 1) * block_size]))
            if following is None:
                break
            found.append(following)
            node = following
        return found

    def forget(self, group: int) -> None:
        """The group's block holds other tokens from now on."""
        self.blocks[group] = 0
        self.prune()

    def unpin(self) -> None:
        """One sequence fewer goes on from here."""
        self.pins -= 1
        self.prune()

    def prune(self) -> None:
        """Take away this node, and those above it, as far as nobody has any use for them."""
        node = self
        while node.parent is not None and not (node.children or node.pins or any(node.blocks)):
            del node.parent.children[node.tokens]
            node = node.parent

    def below(self) -> Iterator[PrefixNode]:
        """Yield this node and all under it."""
        waiting: list[PrefixNode] = [self]
        while waiting:
            node = waiting.pop()
            yield node
            waiting.extend(node.children.values())
