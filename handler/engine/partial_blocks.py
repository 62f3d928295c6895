"""Which prompts must not be prefilled at the same time with OpenVINO GenAI's prefix cache.

GenAI 2026.4.1 also reuses the last block of a text, which is only partly filled. Every prompt that
continues that text gets the same block, and writes its own tokens into the rest of it. If two such
prompts are in their prefill, one reads the keys and values of the other. A sequence takes the block
over, or gets a copy of it, in the step of its second token. Then the next prompt is safe.
"""

from collections.abc import Iterable, Sequence

Tokens = Sequence[int]


class PartialBlocks:
    """The texts whose last block in the prefix cache may be partly filled.

    Args:
        block: tokens in a block.
        most: texts to remember. The oldest are forgotten first, as their blocks are.
    """

    def __init__(self, block: int, most: int) -> None:
        self._block = block
        self._most = most
        self._ends: dict[int, None] = {}
        """Of texts, a hash, oldest first."""

    def add(self, tokens: Tokens) -> None:
        """Remember that the cache may end with these tokens in the middle of a block."""
        *inside, last = self._hashes(tokens, self._start(len(tokens) - 1), len(tokens))
        for end in inside:  # a prompt that ends in such a block uses it, so it stays for longer
            if end in self._ends:
                self._touch(end)
        if len(tokens) % self._block:
            self._touch(last)
        while len(self._ends) > self._most:
            del self._ends[next(iter(self._ends))]

    def clash(self, one: Tokens, two: Tokens, running: Iterable[Tokens]) -> bool:
        """Return whether two prompts may get the same partly filled block.

        Args:
            one: a prompt's tokens.
            two: those of another.
            running: the texts of sequences that generate.
        """
        shared = self._shared(one, two)
        start = self._start(shared)
        if shared in (start, len(one), len(two)):
            return False  # what they write into a common block is the same
        return any(end in self._ends for end in self._hashes(one, start, shared)) or any(
            start < len(text) <= shared and one[: len(text)] == text for text in running
        )

    def _touch(self, end: int) -> None:
        self._ends.pop(end, None)
        self._ends[end] = None

    def _start(self, position: int) -> int:
        """Return where the block of a position begins."""
        return position // self._block * self._block

    def _hashes(self, tokens: Tokens, start: int, end: int) -> Iterable[int]:
        """Yield a hash of every beginning that is longer than `start`, up to `end` tokens."""
        before = hash(tuple(tokens[:start]))
        for length in range(start + 1, end + 1):
            yield hash((before, *tokens[start:length]))

    def _shared(self, one: Tokens, two: Tokens) -> int:
        """Return how many tokens both begin with."""
        shared, most = 0, min(len(one), len(two))
        while shared < most and one[shared : shared + 32] == two[shared : shared + 32]:
            shared += 32
        while shared < most and one[shared] == two[shared]:
            shared += 1
        return min(shared, most)
