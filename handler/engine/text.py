"""Turn token ids into text, token by token: what a stream may show, and where it must end."""

from collections.abc import Callable, Sequence

_CONTEXT = 6
"""Prompt tokens decoded along with the first new ones: some tokenizers drop a leading space from
whatever comes first, so the completion's first token must not come first."""


class TextStream:
    """Turns the token ids of one completion into text, incrementally.

    A token may end in the middle of a UTF-8 character, and a stop string may be spread over
    several tokens, so text is held back until it is certain. The joined pieces equal what
    decoding everything at once would give, cut before the first stop string.

    Args:
        decode: token ids -> text, special tokens left out.
        prompt_ids: the prompt's token ids.
        stop: strings that end the completion; they are not part of it.
        at_once: return text only at `finish`, if there are no stop strings. Saves two short
            decodings a token.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        prompt_ids: Sequence[int],
        stop: Sequence[str],
        *,
        at_once: bool = False,
    ) -> None:
        self._decode = decode
        self._ids = list(prompt_ids[-_CONTEXT:])
        self._prefix, self._read = 0, len(self._ids)
        self._stop = [s for s in stop if s]
        self._held = ""
        self._at_once = at_once and not self._stop
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now certain, which is often empty."""
        self._ids.append(token_id)
        if self._at_once:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        # U+FFFD at the end is most likely a character whose remaining bytes are still to come.
        if after.endswith("\ufffd") or len(after) <= len(before):
            return ""
        self._prefix, self._read = self._read, len(self._ids)
        return self._release(after[len(before) :])

    def finish(self) -> str:
        """Return the text that is still held back. Call once, after the last token."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._prefix : self._read])
        after = self._decode(self._ids[self._prefix :])
        text = self._release(after[len(before) :])
        return text if self.stopped else text + self._held

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`."""
    for n in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-n:]):
            return n
    return 0
