"""The sequences of an engine that wait for their prefill, and the rule for who is next.

With first come, first served, a prompt of two words waits until every long prompt that came before
it is prefilled: ten minutes behind 64 prompts of 1,850 words on two cores. Here two choices take
turns: the shortest prompt, then the oldest. So a short prompt waits for one other prefill at most,
and every second choice serves the oldest, so no prompt waits indefinitely. An engine that can
interrupt a long prefill lets a prompt of a quarter of its length go first.

The second rule is about room, the tokens that the engine's cache can hold. A sequence needs room
for its prompt and its longest completion. It is admitted only if it needs at most a quarter of the
room that is left. So some room is always left for a smaller one, whatever runs. While the oldest
sequence lacks room, only those pass it that need at most a quarter of its room. When they have
taken four times its room, no more pass, and it is admitted as soon as it fits. Else a flood of
short prompts would keep it waiting until its deadline.
"""

import math
from collections.abc import Callable, Hashable

from handler.engine.sequence import Sequence

SHARE = 4
"""A sequence takes at most one part in four of the room that is left, and passes another only if
it is at most one part in four of its size."""


class Waiting:
    """Waiting sequences, oldest first."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []
        self._shortest_next = True
        self._passed = 0
        """Room of the sequences that passed the oldest while it lacked room."""

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all waiting prompts."""
        return sum(sequence.prompt_tokens for sequence in self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait."""
        self._sequences.append(sequence)

    def remove(self, key: Hashable) -> Sequence | None:
        """Take one sequence out; None if the key is unknown."""
        for i, sequence in enumerate(self._sequences):
            if sequence.key == key:
                if i == 0:
                    self._passed = 0
                return self._sequences.pop(i)
        return None

    def clear(self) -> list[Sequence]:
        """Take all sequences out."""
        sequences, self._sequences, self._passed = self._sequences, [], 0
        return sequences

    def take(
        self,
        room: float,
        *,
        idle: bool,
        longest: float = math.inf,
        ready: Callable[[Sequence], bool] = lambda _: True,
    ) -> Sequence | None:
        """Take out the sequence that is next; None if none fits, or if the next is not ready.

        Args:
            room: tokens that the cache can still hold.
            idle: nothing runs, so the oldest may take all the room that it needs.
            longest: take no longer prompt than this. If the engine has a reason to limit the
                length, the next is the shortest, and the turns do not change.
            ready: says whether a sequence may start now. If not, it stays the next one.
        """
        if not self._sequences:
            return None
        oldest = self._sequences[0]
        lacks_room = oldest.room * SHARE > room
        overdue = lacks_room and self._passed >= oldest.room * SHARE
        admitted = idle or (overdue and oldest.room <= room)
        if lacks_room and admitted and oldest.prompt_tokens <= longest:
            return self.remove(oldest.key) if ready(oldest) else None
        if overdue:
            return None
        allowed = min(room, oldest.room) if lacks_room else room
        fitting = [
            s for s in self._sequences if s.room * SHARE <= allowed and s.prompt_tokens <= longest
        ]
        if not fitting:
            return None
        limited = longest < math.inf
        if limited or self._shortest_next:
            chosen = min(fitting, key=lambda s: s.prompt_tokens)
        else:
            chosen = fitting[0]
        if not ready(chosen):
            return None
        if not limited:
            self._shortest_next = not self._shortest_next
        if lacks_room:
            self._passed += chosen.room
        return self.remove(chosen.key)
