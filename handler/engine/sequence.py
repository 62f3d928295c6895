"""One sequence on its way through an engine: what it has produced, and when it ends."""

import time
from collections.abc import Hashable, Set
from dataclasses import dataclass, field

from handler.engine import FinishReason, Progress, PromptError, Sampling
from handler.engine.folder import ModelFolder
from handler.engine.text import TextStream


@dataclass
class Sequence:
    """`ids` holds prompt and completion; `pending` is text that was not handed out yet."""

    key: Hashable
    ids: list[int]
    prompt_tokens: int
    max_new_tokens: int
    text: TextStream
    stream: bool
    ends: Set[int] = frozenset()
    pending: str = ""
    finish_reason: FinishReason | None = None
    shown: bool = False
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0

    @property
    def completion_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def urgent(self) -> bool:
        """Whether somebody has been waiting for what there is now."""
        return bool(self.finish_reason or (self.stream and self.pending and not self.shown))

    def start(self) -> None:
        """The first forward pass begins: waiting is over."""
        self.started = time.monotonic()

    def append(self, token: int) -> None:
        """Take in the next token; it may be the last one, by itself or by a stop string."""
        self.ids.append(token)
        if token in self.ends:
            self.end("stop")
            return
        self.pending += self.text.push(token)
        if self.text.stopped:
            self.end("stop")
        elif self.completion_tokens >= self.max_new_tokens:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        """No more tokens will come."""
        self.finish_reason = reason
        self.pending += self.text.finish()

    def progress(self) -> Progress:
        """Hand out what is new."""
        text, self.pending = self.pending, ""
        self.shown = self.shown or bool(text)
        waited = (self.started or time.monotonic()) - self.submitted
        return Progress(self.key, text, self.completion_tokens, self.finish_reason, waited)


def new_sequence(
    key: Hashable,
    prompt: str,
    sampling: Sampling,
    *,
    stream: bool,
    folder: ModelFolder,
    max_context: int,
    ends: Set[int] = frozenset(),
) -> Sequence:
    """Tokenize a prompt and see that it fits. `ends` are the token ids that end a completion.

    Raises:
        PromptError: it is empty, or leaves no room in the context.
    """
    ids = folder.encode(prompt)
    if not ids:
        raise PromptError("is empty: give at least one token of text")
    if len(ids) >= max_context:
        raise PromptError(
            f"has {len(ids)} tokens; at most {max_context - 1} fit into the context of "
            f"{max_context} with room for one new token"
        )
    return Sequence(
        key=key,
        ids=ids,
        prompt_tokens=len(ids),
        max_new_tokens=min(sampling.max_new_tokens, max_context - len(ids)),
        # Text nobody sees before the end is decoded at the end, in one go.
        text=TextStream(folder.decode, ids, sampling.stop, at_once=not stream),
        stream=stream,
        ends=frozenset() if sampling.ignore_eos else ends,
    )
