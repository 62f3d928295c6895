"""Text from a stream of tokens: the pieces add up to the whole."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handler.engine.text import TextStream

END = "### End"
"""A special token of both vocabularies."""


class Codec(NamedTuple):
    """Text to token ids, one for each byte, and back without special tokens."""

    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]


def bytes_codec() -> Codec:
    """Bytes are token ids, and 256 is `END`."""

    def encode(text: str) -> list[int]:
        first, *others = text.split(END)
        ids = list(first.encode())
        for part in others:
            ids += [256, *part.encode()]
        return ids

    def decode(ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    return Codec(encode, decode)


def tokenizer_codec() -> Codec:
    """The same with a tokenizer of transformers."""
    from deploy.weights.random_weights import byte_tokenizer

    tokenizer = byte_tokenizer([END])

    def decode(ids: list[int]) -> str:
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return Codec(lambda text: tokenizer(text)["input_ids"], decode)


@pytest.fixture(
    scope="module",
    params=[bytes_codec, pytest.param(tokenizer_codec, marks=pytest.mark.slow)],
    ids=["bytes", "tokenizer"],
)
def codec(request: pytest.FixtureRequest) -> Codec:
    return request.param()


def run(
    codec: Codec, text: str, stop=(), prompt: str = "prompt ", **options
) -> tuple[list[str], bool]:
    """Push a text token by token; return the pieces, and whether a stop string ended it."""
    stream = TextStream(codec.decode, codec.encode(prompt), stop, **options)
    pieces = []
    for token in codec.encode(text):
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.finish()], stream.stopped


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40), prompt=st.text(max_size=10))
def test_pieces_join_to_the_text(codec, text, prompt):
    """With one byte a token, every character beyond ASCII is cut into pieces."""
    pieces, _ = run(codec, text, prompt=prompt)
    assert "".join(pieces) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40), stop=st.lists(st.text("ab", min_size=1), max_size=2))
def test_decoding_at_once_gives_the_same_text(codec, text, stop):
    pieces, stopped = run(codec, text, stop, at_once=True)
    expected, expected_stopped = run(codec, text, stop)
    assert ("".join(pieces), stopped) == ("".join(expected), expected_stopped)
    assert stop or not any(pieces[:-1]), "each token was decoded, though nobody reads the pieces"


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab\n", max_size=30),
    stop=st.text(alphabet="ab\n", min_size=1, max_size=4),
)
def test_stop_string_cuts_exactly(codec, text, stop):
    pieces, stopped = run(codec, text, [stop])
    assert "".join(pieces) == text.split(stop)[0]
    assert stopped == (stop in text)


def test_holds_back_the_beginning_of_a_stop_string(codec):
    pieces, stopped = run(codec, "tortilla ###", ["### End"])
    assert not stopped
    assert "".join(pieces[:-1]) == "tortilla " and pieces[-1] == "###"


def test_first_of_several_stop_strings_counts(codec):
    assert "".join(run(codec, "one two three", ["three", "two"])[0]) == "one "


def test_incomplete_character_is_returned_at_the_end(codec):
    stream = TextStream(codec.decode, [], [])
    half = codec.encode("é")[:1]
    assert stream.push(half[0]) == ""
    assert stream.finish() == "\ufffd"


def test_leaves_out_special_tokens(codec):
    assert "".join(run(codec, "a### End")[0]) == "a"


@pytest.mark.parametrize("stop", [[], [""], ["xyz"]])
def test_without_a_matching_stop_string(codec, stop):
    assert run(codec, "abc", stop) == (["a", "b", "c", ""], False)
