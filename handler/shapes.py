"""Completions as JSON: here in Vertex AI's shape, in `openai_response.py` in OpenAI's.

A shape only builds JSON. When something is sent, and how, is in `response.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from handler.engine import FinishReason, TokenLogprob
from handler.errors import RequestError, google_error
from handler.tool_calls import Reader, ToolCall

RANDOM_WEIGHTS = "random weights: the text means nothing"


@dataclass
class Completion:
    """What is known of one completion. `text` is all of it, `unsent` its last part.

    `reader` separates the text from `calls`, which are known when the completion has ended.
    `logprobs` are of all its tokens, if the request asked for them; the last `unsent_logprobs` of
    them were not sent yet.
    """

    prompt_tokens: int
    text: str
    unsent: str
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    queue_seconds: float = 0.0
    first_token_at: float | None = None
    finished_at: float | None = None
    begun: bool = False
    """Whether a part of it was sent."""
    end_sent: bool = False
    logprobs: list[TokenLogprob] = field(default_factory=list)
    unsent_logprobs: int = 0
    reader: Reader = field(default_factory=Reader)
    calls: list[ToolCall] = field(default_factory=list)


class Shape(Protocol):
    """Writes the responses to one request as its client expects them."""

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Write the response to a request that is not streamed."""
        ...

    def events(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        """Write what is new of one completion."""
        ...

    def last_events(self, completions: Sequence[Completion]) -> list[dict[str, Any] | str]:
        """Write what follows the last completion's end; a text is sent unchanged."""
        ...

    def error(self, error: RequestError) -> dict[str, Any]:
        """Write an error."""
        ...


@dataclass(frozen=True)
class VertexShape:
    """Vertex AI's `{"predictions": [...]}`, and events of our own."""

    random_weights: bool

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Write the response to a request that is not streamed."""
        warning = {"warning": RANDOM_WEIGHTS} if self.random_weights else {}
        return {"predictions": [c.text for c in completions]} | warning

    def events(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        """Write what is new of one completion."""
        event: dict[str, Any] = {"index": index, "text": completion.unsent}
        if completion.finish_reason:
            event |= {
                "finish_reason": completion.finish_reason,
                "prompt_tokens": completion.prompt_tokens,
                "completion_tokens": completion.completion_tokens,
            }
            if self.random_weights:
                event["warning"] = RANDOM_WEIGHTS
        return [event]

    def last_events(self, _: Sequence[Completion]) -> list[dict[str, Any] | str]:
        """Write nothing: the last event of each completion has its end."""
        return []

    def error(self, error: RequestError) -> dict[str, Any]:
        """Write an error as Google's APIs do."""
        return google_error(error)
