"""Text from a stream of tokens: the pieces add up to the whole."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from handler.engine.text import Decoder, TextStream, clean_up
from tests.vocabularies import ASCII, KINDS

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


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return KINDS[request.param]()


CLEANS = pytest.mark.parametrize("cleans", [False, True], ids=["as it is", "cleaned up"])
VALID = [
    "Line one\n🎉 party\n\n東京",
    "a\n\n🎉🎉",
    "x\té🙂 y",
    "👩\u200d👩\u200d👧 e\u0301 \ufffd\ufffd x",
    "It ' s 12 o'clock , don 't . do n't 've  . stop !",
    "  two  spaces </s> <|im_end|>",
    "ก็ได้ค่ะ ขอบคุณ",
]
PROMPTS = ["Hello", "ends in bytes: 🎉", "ends in a line\n", " ", "don't . ", "<s>", ""]


def streamed(decoder, prompt: list[int], ids: list[int], stop=(), **options) -> tuple[str, bool]:
    stream, text = TextStream(decoder, prompt, stop, **options), ""
    for token in ids:
        text += stream.push(token)
        if stream.stopped:
            break
    return text + stream.finish(), stream.stopped


def whole(decoder: Decoder, prompt: list[int], ids: list[int]) -> str:
    """Decode at once what follows the prompt; its last bytes do not count, as in `TextStream`."""
    while prompt and decoder.may_change(prompt[-1]):
        prompt = prompt[:-1]
    raw = decoder.raw(prompt + ids)[len(decoder.raw(prompt)) :]
    return clean_up(raw) if decoder.cleans_up else raw


@CLEANS
@pytest.mark.parametrize(("text", "prompt"), zip(VALID, PROMPTS, strict=True))
def test_stream_cut_after_any_token_is_the_whole(tokenizer, text, prompt, cleans):
    """Also in the middle of a character, which byte fallback reads as several tokens."""
    decoder = Decoder(tokenizer, clean_up=cleans)
    before = tokenizer.encode(prompt).ids
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    for n in range(len(ids) + 1):
        expected = whole(decoder, before, ids[:n])
        assert streamed(decoder, before, ids[:n])[0] == expected
        assert streamed(decoder, before, ids[:n], at_once=True)[0] == expected


@CLEANS
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_stream_of_random_tokens_is_the_whole(tokenizer, cleans, data):
    """Bytes in any order, special tokens between them, and tokens that the vocabulary lacks."""
    decoder = Decoder(tokenizer, clean_up=cleans)
    size = tokenizer.get_vocab_size()
    token = st.one_of(st.integers(0, size + 20), st.integers(0, min(270, size)))
    ids = data.draw(st.lists(token, max_size=40))
    prompt = data.draw(st.lists(token, max_size=10))
    expected = whole(decoder, prompt, ids)
    assert streamed(decoder, prompt, ids)[0] == expected
    assert streamed(decoder, prompt, ids, at_once=True)[0] == expected


@CLEANS
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_stop_string_cuts_the_whole_with_every_tokenizer(tokenizer, cleans, data):
    decoder = Decoder(tokenizer, clean_up=cleans)
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=30))
    prompt = tokenizer.encode("Hello").ids
    text = whole(decoder, prompt, ids)
    at = data.draw(st.integers(0, len(text)))
    stops = [text[at : at + 2] or "x", data.draw(st.sampled_from(["\n", "\ufffd", ".", "ab"]))]
    for options in ({}, {"at_once": True}):
        result, stopped = streamed(decoder, prompt, ids, stops, **options)
        ends = [text.find(stop) for stop in stops if stop in text]
        assert stopped == bool(ends)
        assert result == text[: min(ends, default=len(text))]


@pytest.mark.parametrize("special", [1, 7, 30])
def test_first_token_after_special_tokens_keeps_its_space(tokenizer, special):
    """As after a long turn marker: some tokenizers drop the space of whatever comes first."""
    decoder = Decoder(tokenizer)
    prompt = [*tokenizer.encode("Once").ids, *[tokenizer.token_to_id("<|im_end|>")] * special]
    ids = tokenizer.encode("Once upon a time", add_special_tokens=False).ids
    assert streamed(decoder, prompt, ids)[0] == whole(decoder, prompt, ids)


@pytest.mark.parametrize("stop", [["\n"], ["e\n"], ["🎉"], ["\n🎉"], ["東"]])
def test_stop_string_of_bytes_beside_an_emoji(tokenizer, stop):
    decoder, prompt = Decoder(tokenizer), tokenizer.encode("Hello").ids
    ids = tokenizer.encode("Line one\n🎉 and 東京 too", add_special_tokens=False).ids
    text = whole(decoder, prompt, ids)
    result, stopped = streamed(decoder, prompt, ids, stop)
    assert (result, stopped) == (text.split(stop[0])[0], stop[0] in text)


def test_complete_characters_are_streamed_before_the_end(tokenizer):
    """Text is held back for one token, not until the completion ends."""
    decoder = Decoder(tokenizer)
    ids = tokenizer.encode("the quick\nbrown fox 🎉 jumps over", add_special_tokens=False).ids
    stream = TextStream(decoder, tokenizer.encode("Hello").ids, [])
    pieces = [stream.push(token) for token in ids]
    assert len("".join(pieces)) >= len("".join([*pieces, stream.finish()])) - 8


@settings(max_examples=200, deadline=None)
@given(text=st.text(alphabet=" '.n?tmsvrea!,\n", max_size=40), data=st.data())
def test_cleaned_pieces_join_to_the_cleaned_text(text, data):
    class Characters(Decoder):
        """A tokenizer whose tokens are characters."""

        def __init__(self) -> None:
            self.cleans_up, self._bytes = True, set()

        def raw(self, token_ids: list[int]) -> str:
            return "".join(map(chr, token_ids))

    ids = [ord(character) for character in text]
    assert streamed(Characters(), [97], ids)[0] == clean_up(text)


@pytest.mark.slow
@pytest.mark.parametrize("text", [*VALID, "".join(ASCII), " ".join(ASCII), "a ' s ' ' t n ' t"])
def test_clean_up_is_that_of_transformers(text):
    from transformers import PreTrainedTokenizerFast

    tokenizer = KINDS["byte-level"]()
    reference = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert clean_up(text) == reference.clean_up_tokenization(text)
