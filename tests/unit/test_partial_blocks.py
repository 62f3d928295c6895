"""Which prompts the openvino engine prefills one after the other, for GenAI's prefix cache."""

import pytest

from handler.engine.partial_blocks import PartialBlocks

A, B = 1000, 2000


def tokens(length: int, *end: int) -> list[int]:
    return [*range(length), *end]


def clash(ends: list[list[int]], one: list[int], two: list[int], running=()) -> bool:
    blocks = PartialBlocks(32, most=100)
    for end in ends:
        blocks.add(end)
    assert blocks.clash(one, two, running) == blocks.clash(two, one, running)
    return blocks.clash(one, two, running)


@pytest.mark.parametrize("length", [1, 31, 33, 63, 65, 95])
def test_prompts_that_continue_a_text_differently_clash(length: int):
    assert clash([tokens(length)], tokens(length, A), tokens(length, B))


@pytest.mark.parametrize("length", [32, 64])
def test_text_that_fills_its_last_block_is_shared_safely(length: int):
    assert not clash([tokens(length)], tokens(length, A), tokens(length, B))


def test_prompts_that_differ_later_in_the_block_clash_too():
    assert clash([tokens(40)], tokens(50, A), tokens(50, B))


def test_prompts_that_differ_in_another_block_do_not_clash():
    assert not clash([tokens(40)], tokens(70, A), tokens(70, B))
    assert not clash([tokens(40)], tokens(64, A), tokens(64, B))
    assert not clash([tokens(40)], tokens(38, A), tokens(38, B))


def test_prompts_without_a_text_that_ended_there_do_not_clash():
    assert not clash([], tokens(40, A), tokens(40, B))
    assert not clash([tokens(39, 7)], tokens(40, A), tokens(40, B))


def test_equal_prompts_and_a_prompt_that_begins_another_do_not_clash():
    assert not clash([tokens(40)], tokens(40, A), tokens(40, A))
    assert not clash([tokens(40)], tokens(45), tokens(45, A))


def test_text_that_is_being_generated_counts():
    assert clash([], tokens(40, A), tokens(40, B), [tokens(40)])
    assert clash([], tokens(45, A), tokens(45, B), [tokens(40)])
    assert not clash([], tokens(40, A), tokens(40, B), [tokens(41), tokens(32), tokens(39, A)])


def test_oldest_texts_are_forgotten_and_a_text_in_use_is_not():
    blocks = PartialBlocks(32, most=3)
    for end in (tokens(2), tokens(40), [A], tokens(3)):
        blocks.add(end)  # the last one is in the block of the first
    assert blocks.clash([A, 1], [A, 2], ())
    assert blocks.clash(tokens(2, A), tokens(2, B), ())
    assert not blocks.clash(tokens(40, A), tokens(40, B), ())
