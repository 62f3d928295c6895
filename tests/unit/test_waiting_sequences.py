"""Which of the waiting sequences is next."""

import math

from handler.engine.sequence import Sequence
from handler.engine.text import TextStream
from handler.engine.waiting import SHARE, Waiting


def sequence(key: str, prompt_tokens: int, new: int = 10) -> Sequence:
    stream = TextStream(lambda _: "", [], ())
    return Sequence(key, [0] * prompt_tokens, prompt_tokens, new, stream, stream=False)


def queue(*prompts: int) -> Waiting:
    """Sequences with the names a, b, ... and prompts of these lengths, in order of arrival."""
    waiting = Waiting()
    for name, prompt_tokens in zip("abcdefgh", prompts, strict=False):
        waiting.add(sequence(name, prompt_tokens))
    return waiting


def order(waiting: Waiting, room: float = math.inf) -> str:
    taken = ""
    while found := waiting.take(room, idle=False):
        taken += found.key
    return taken


def test_shortest_and_oldest_take_turns():
    assert order(queue(1800, 1900, 2, 1700, 30)) == "caebd"


def test_equal_prompts_keep_their_order():
    assert order(queue(5, 5, 5, 5)) == "abcd"


def test_long_prompt_is_next_but_one_in_a_flood_of_short_ones():
    waiting = queue(1900)
    taken = []
    for i in range(4):
        waiting.add(sequence(f"short {i}", 2))
        taken.append(waiting.take(math.inf, idle=False).key)
    assert taken == ["short 0", "a", "short 1", "short 2"]


def test_sequence_takes_at_most_a_quarter_of_the_room():
    waiting = queue(1990)
    assert waiting.take(2000 * SHARE - 1, idle=False) is None
    assert waiting.take(2000 * SHARE, idle=False).key == "a"
    assert len(waiting) == 0 and waiting.take(math.inf, idle=True) is None


def test_idle_engine_takes_any_sequence():
    assert queue(1990).take(100, idle=True).key == "a"


def test_only_much_smaller_sequences_pass_one_that_lacks_room():
    waiting = queue(1990, 600, 490, 2)
    assert order(waiting, room=2000 * SHARE - 1) == "dc"
    assert order(waiting, room=2000 * SHARE) == "ba"


def test_limited_length_takes_the_shortest_and_leaves_the_turns():
    waiting = queue(1900, 300, 40, 20)
    assert waiting.take(math.inf, idle=False, longest=475).key == "d"
    assert waiting.take(math.inf, idle=False, longest=10) is None
    assert order(waiting) == "cab"


def test_removed_sequence_is_not_taken():
    waiting = queue(1, 2, 3)
    assert waiting.prompt_tokens == 6
    assert waiting.remove("b").key == "b" and waiting.remove("b") is None
    assert waiting.prompt_tokens == 4 and order(waiting) == "ac"


def test_flood_of_small_sequences_does_not_starve_one_that_lacks_room():
    """It would need more than the cache has for its quarter, and the engine is never idle."""
    cache, waiting, ends, taken = 6500, Waiting(), {}, []
    for step in range(5000):
        while len(waiting) < 20:
            waiting.add(sequence(f"{step}, {len(waiting)}", 20, new=150))
        if step == 50:
            waiting.add(sequence("big", 1500, new=256))
        ends = {key: end for key, end in ends.items() if end > step}
        if found := waiting.take(cache - 170 * len(ends), idle=not ends):
            taken.append(found.key)
            if found.key == "big":
                break
            ends[found.key] = step + 150
    assert taken[-1] == "big" and len(taken) < 150
    assert waiting.take(cache - 1756, idle=False), "then others pass again"
