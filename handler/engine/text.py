"""Turn token ids into text, token by token: what a stream may show, and where it must end."""

import re
from collections.abc import Callable, Sequence

from tokenizers import Tokenizer

_CONTEXT = 6
"""Prompt tokens decoded along with the first new ones: some tokenizers drop a leading space from
whatever comes first, so the completion's first token must not come first."""


class Decoder:
    """Turns token ids into text as transformers does, without special tokens.

    Args:
        tokenizer: the model's.
        clean_up: remove spaces before punctuation and in contractions, as older tokenizers of
            words need it: `clean_up_tokenization_spaces` in tokenizer_config.json.
    """

    def __init__(self, tokenizer: Tokenizer, *, clean_up: bool = False) -> None:
        self._tokenizer = tokenizer
        self.cleans_up = clean_up
        self._bytes = _byte_tokens(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token for token, added_token in added.items() if added_token.special}

    def __call__(self, token_ids: list[int]) -> str:
        """Return the text of a whole sequence."""
        text = self.raw(token_ids)
        return clean_up(text) if self.cleans_up else text

    def raw(self, token_ids: list[int]) -> str:
        """Return text before it is cleaned up."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def leaves_out(self, token_id: int) -> bool:
        """Return whether a token is special, so that it has no text."""
        return token_id in self._special

    def may_change(self, token_id: int) -> bool:
        """Return whether the tokens after this one can still change the text before them.

        With byte fallback, a tokenizer decodes a run of bytes as a whole: one wrong byte turns all
        of them into U+FFFD, even complete characters. Tokens without text do not end the run.
        """
        return bool(self._bytes) and (
            token_id in self._bytes
            or token_id in self._special
            or self._tokenizer.id_to_token(token_id) is None
        )


class TextStream:
    """Turns the token ids of one completion into text, incrementally.

    A token may end in the middle of a UTF-8 character, and a stop string may be spread over
    several tokens, so text is held back until it is certain. The joined pieces equal what
    decoding everything at once would give, cut before the first stop string.

    Args:
        decode: token ids -> text, without special tokens. A `Decoder` also says which text later
            tokens can change.
        prompt_ids: the prompt's token ids.
        stop: strings that end the completion; they are not part of it.
        at_once: return text only at `finish`, if there are no stop strings.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        *,
        at_once: bool = False,
    ) -> None:
        known = isinstance(decode, Decoder)
        self._decode = decode.raw if isinstance(decode, Decoder) else decode
        self._may_change = decode.may_change if isinstance(decode, Decoder) else lambda _: False
        self._cleans_up = isinstance(decode, Decoder) and decode.cleans_up
        context = list(prompt_ids)
        while known and context and self._may_change(context[-1]):
            context.pop()  # a completion does not change the prompt's last characters
        n = _CONTEXT
        while n < len(context) and not self._decode(context[-n:]):  # special tokens have no text
            n *= 2
        self._ids = context[-n:]
        self._prefix, self._read = 0, len(self._ids)
        self._stop = [s for s in stop if s]
        self._raw = ""
        self._held = ""
        self._text: list[str] | None = [] if at_once and not self._stop else None
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now certain, which is often empty."""
        self._ids.append(token_id)
        if self._may_change(token_id):
            return ""
        new = self._new()
        # U+FFFD at the end is most likely a character whose remaining bytes are still to come.
        if new.endswith("\ufffd") or not new:
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        text = self._release(self._clean(new))
        if self._text is None:
            return text
        self._text.append(text)
        return ""

    def finish(self) -> str:
        """Return the text that is still held back. Call once, after the last token."""
        if self.stopped:
            return ""
        text = self._release(self._clean(self._new(), last=True))
        return "".join(self._text or []) + text + ("" if self.stopped else self._held)

    def _new(self) -> str:
        """Return the text of the tokens after those already read."""
        before = self._decode(self._ids[self._prefix : self._read])
        return self._decode(self._ids[self._prefix :])[len(before) :]

    def _clean(self, new: str, *, last: bool = False) -> str:
        """Clean up text, except for an end that depends on what follows."""
        if not self._cleans_up:
            return new
        text = self._raw + new
        unsettled = None if last else _UNSETTLED.search(text)
        end = unsettled.start() if unsettled else len(text)
        self._raw = text[end:]
        return clean_up(text[:end])

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


_CLEANED = {text: text[1:] for text in (" .", " ?", " !", " ,")}
_CLEANED |= {" ' ": "'"} | {text: text[1:] for text in (" n't", " 'm", " 's", " 've", " 're")}

_UNSETTLED = re.compile(r" [ 'n]*[vr]?\Z")
"""An end of a text that could be the beginning of a key of `_CLEANED`."""


def clean_up(text: str) -> str:
    """Remove spaces as transformers does with `clean_up_tokenization_spaces`, in its order."""
    for written, cleaned in _CLEANED.items():
        text = text.replace(written, cleaned)
    return text


def _byte_tokens(tokenizer: Tokenizer) -> set[int]:
    """Return the tokens that are bytes, such as `<0x0A>`; none without byte fallback."""
    if tokenizer.decoder is None or b"ByteFallback" not in tokenizer.decoder.__getstate__():
        return set()
    names = [f"<0x{byte:02{case}}>" for byte in range(256) for case in "xX"]
    return {token for name in names if (token := tokenizer.token_to_id(name)) is not None}


def overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
