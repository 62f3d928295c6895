"""One sequence in an engine: what it has generated so far, and when it ends."""

import time
from collections.abc import Hashable, Set
from dataclasses import dataclass, field

from handler.engine import FinishReason, Progress, PromptError, Sampling, TokenLogprob
from handler.engine.folder import ModelFolder
from handler.engine.text import TextStream


@dataclass
class Sequence:
    """`token_ids` are of prompt and completion; `pending` is text that was not reported yet."""

    key: Hashable
    token_ids: list[int]
    prompt_tokens: int
    max_new_tokens: int
    text_stream: TextStream
    stream: bool
    end_tokens: Set[int] = frozenset()
    pending: str = ""
    finish_reason: FinishReason | None = None
    reported: bool = False
    reported_tokens: int = 0
    submitted_at: float = field(default_factory=time.monotonic)
    started_at: float = 0.0
    first_token_at: float | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    """Of generated tokens that were not reported yet."""

    @property
    def completion_tokens(self) -> int:
        """The number of tokens generated so far."""
        return len(self.token_ids) - self.prompt_tokens

    @property
    def room(self) -> int:
        """The tokens that it may come to hold in the engine's cache."""
        return self.prompt_tokens + self.max_new_tokens

    @property
    def urgent(self) -> bool:
        """Whether it has ended, or has the first text of a stream: `advance` should return."""
        return bool(self.finish_reason or (self.stream and self.pending and not self.reported))

    def start(self) -> None:
        """Note that the first forward pass begins."""
        self.started_at = self.started_at or time.monotonic()

    def append(self, token: int, *, last: bool = False) -> None:
        """Add the next token, which may end the sequence; the `last` one completes it."""
        if self.first_token_at is None:
            self.first_token_at = time.monotonic()
        self.token_ids.append(token)
        if token in self.end_tokens:
            self.end("stop")
            return
        self.pending += self.text_stream.push(token)
        if self.text_stream.stopped or last:
            self.end("stop")
        elif self.completion_tokens >= self.max_new_tokens:
            self.end("length")

    def end(self, reason: FinishReason) -> None:
        """End the sequence; no more tokens follow. The first end counts.

        The text that was held back may complete a stop string. Then that is why it ended.
        """
        if self.finish_reason:
            return
        self.pending += self.text_stream.finish()
        found = reason != "error" and self.text_stream.stopped
        self.finish_reason = "stop" if found else reason

    def progress(self) -> Progress:
        """Report what is new."""
        text, self.pending = self.pending, ""
        self.reported = self.reported or bool(text)
        tokens = self.token_ids[self.prompt_tokens + self.reported_tokens :]
        self.reported_tokens += len(tokens)
        logprobs, self.logprobs = self.logprobs, []
        return Progress(
            self.key,
            text,
            self.completion_tokens,
            self.finish_reason,
            queue_seconds=(self.started_at or time.monotonic()) - self.submitted_at,
            token_ids=tokens,
            logprobs=logprobs,
            first_token_at=self.first_token_at,
        )


def new_sequence(
    key: Hashable,
    prompt: str,
    sampling: Sampling,
    *,
    stream: bool,
    folder: ModelFolder,
    max_context: int,
    vocabulary: int | None,
    end_tokens: Set[int] = frozenset(),
) -> Sequence:
    """Tokenize a prompt and check that the model can read it.

    Args:
        key: of the sequence, as in `Engine.submit`.
        prompt: its text.
        sampling: the request's parameters.
        stream: whether text is reported as soon as it is certain.
        folder: the model's.
        max_context: the most tokens of prompt and completion.
        vocabulary: the number of ids that the model has an embedding for, if known.
        end_tokens: the ids that end a completion.

    Raises:
        PromptError: it is empty, leaves no room in the context, or has a token without embedding.
    """
    token_ids = folder.encode(prompt)
    if not token_ids:
        raise PromptError("is empty: give at least one token of text")
    if vocabulary and (highest := max(token_ids)) >= vocabulary:
        raise PromptError(
            f"has the token {folder.token(highest)!r} with the id {highest}, but this model's ids "
            f"end at {vocabulary - 1}; leave the token out"
        )
    if len(token_ids) >= max_context:
        raise PromptError(
            f"has {len(token_ids)} tokens; at most {max_context - 1} fit into the context of "
            f"{max_context} with room for one new token"
        )
    return Sequence(
        key=key,
        token_ids=token_ids,
        prompt_tokens=len(token_ids),
        max_new_tokens=min(sampling.max_new_tokens, max_context - len(token_ids)),
        # Text that is not streamed is decoded once, at the end.
        text_stream=TextStream(folder.decode, token_ids, sampling.stop, at_once=not stream),
        stream=stream,
        end_tokens=frozenset() if sampling.ignore_eos else end_tokens,
    )
