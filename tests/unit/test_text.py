"""Text from a stream of tokens: the pieces add up to the whole."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.weights.random_weights import byte_tokenizer
from handler.engine.text import TextStream

TOKENIZER = byte_tokenizer(["### End"])


def decode(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def run(text: str, stop=(), prompt: str = "prompt ", **options) -> tuple[list[str], bool]:
    stream = TextStream(decode, TOKENIZER(prompt)["input_ids"], stop, **options)
    pieces = []
    for token in TOKENIZER(text)["input_ids"]:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.stopped


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_pieces_join_to_the_text(text, prompt):
    """With one byte a token, every character beyond ASCII is cut into pieces."""
    pieces, _ = run(text, prompt=prompt)
    assert "".join(pieces) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), stop=st.lists(st.text("ab", min_size=1), max_size=2))
def test_at_once_is_the_same_text(text, stop):
    pieces, stopped = run(text, stop, at_once=True)
    expected, expected_stopped = run(text, stop)
    assert ("".join(pieces), stopped) == ("".join(expected), expected_stopped)
    assert stop or not any(pieces[:-1]), "each token was decoded, though nobody reads the pieces"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stop=st.text(alphabet="ab\n", min_size=1, max_size=4),
)
def test_stop_string_cuts_exactly(text, stop):
    pieces, stopped = run(text, [stop])
    assert "".join(pieces) == text.split(stop)[0]
    assert stopped == (stop in text)


def test_holds_back_the_beginning_of_a_stop_string():
    pieces, stopped = run("tortilla ###", ["### End"])
    assert not stopped
    assert "".join(pieces[:-1]) == "tortilla " and pieces[-1] == "###"


def test_first_of_several_stop_strings_counts():
    assert "".join(run("one two three", ["three", "two"])[0]) == "one "


def test_incomplete_character_is_returned_at_the_end():
    stream = TextStream(decode, [], [])
    half = TOKENIZER("é")["input_ids"][:1]
    assert stream.push(half[0]) == ""
    assert stream.finish() == "\ufffd"


def test_leaves_out_special_tokens():
    assert "".join(run("a### End")[0]) == "a"


@pytest.mark.parametrize("stop", [[], [""], ["xyz"]])
def test_without_a_matching_stop_string(stop):
    assert run("abc", stop) == (["a", "b", "c", ""], False)
