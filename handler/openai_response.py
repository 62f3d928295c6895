"""The responses of OpenAI's API: chat completions, completions, and their streams.

Source: https://platform.openai.com/docs/api-reference, as the types of its Python client have it.
"""

import secrets
import time
from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from handler.engine import TokenLogprob
from handler.errors import RequestError, google_error, openai_error
from handler.shapes import Completion
from handler.tool_calls import new_call_id

DONE = "[DONE]"
"""The data of the last event of a stream."""

_FINISH_REASONS = {"timeout": "length"}
"""OpenAI has no reason for a deadline. The header `x-finish-reason` has ours."""


@dataclass
class OpenAIShape:
    """What both routes share.

    Args:
        model: the model's name in the responses.
        n: completions of each prompt.
        include_usage: whether a stream ends with the token counts.
        predict: the request came to Vertex AI's route, so errors are those of Google's APIs.
        wrapped: write `{"predictions": {...}}` around a whole response.
    """

    model: str
    n: int = 1
    include_usage: bool = False
    predict: bool = False
    wrapped: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    prefix = ""
    whole_object = ""
    event_object = ""

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Write a whole completion."""
        raise NotImplementedError

    def pieces(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        """Write what is new of a completion."""
        raise NotImplementedError

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Write the response to a request that is not streamed."""
        choices = [self.choice(i, c) for i, c in enumerate(completions)]
        body = self._head(self.whole_object) | {"choices": choices}
        body |= {"usage": self._usage(completions)}
        return {"predictions": body} if self.wrapped else body

    def events(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        """Write what is new of one completion, as chunks with one choice."""
        usage = {"usage": None} if self.include_usage else {}
        head = self._head(self.event_object)
        return [head | {"choices": [p]} | usage for p in self.pieces(index, completion)]

    def last_events(self, completions: Sequence[Completion]) -> list[dict[str, Any] | str]:
        """Write the token counts, if the client asked for them, and the end of the stream."""
        usage = {"choices": [], "usage": self._usage(completions)}
        events: list[dict[str, Any] | str] = []
        if self.include_usage:
            events.append(self._head(self.event_object) | usage)
        return [*events, DONE]

    def error(self, error: RequestError) -> dict[str, Any]:
        """Write an error; through `predict`, as all errors there."""
        return google_error(error) if self.predict else openai_error(error)

    def _head(self, name: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.model,
        }

    def _usage(self, completions: Sequence[Completion]) -> dict[str, int]:
        """Count tokens. A prompt with several completions counts once."""
        prompt = sum(c.prompt_tokens for c in completions[:: self.n])
        generated = sum(c.completion_tokens for c in completions)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
        }


class ChatShape(OpenAIShape):
    """`chat.completion` and its chunks."""

    prefix, whole_object, event_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Write a whole completion."""
        return {
            "index": index,
            "message": self._message(completion),
            "logprobs": _chat_logprobs(completion.logprobs),
            "finish_reason": _finish_reason(completion),
        }

    def _message(self, completion: Completion) -> dict[str, Any]:
        message = {"role": "assistant", "content": completion.text, "refusal": None}
        if not completion.calls:
            return message
        content = completion.text or None
        return message | {"content": content, "tool_calls": _tool_calls(completion)}

    def pieces(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        """Write what is new of a completion. Its first piece names the role.

        Calls are known only at the end, so each is a whole piece. The finish reason comes after
        them: OpenAI's client takes a call for complete at the next piece.
        """
        empty = None if completion.calls else ""
        delta: dict[str, Any] = {} if completion.begun else {"role": "assistant", "content": empty}
        if completion.unsent:
            delta["content"] = completion.unsent
        deltas = [delta] if delta or completion.unsent_logprobs else []
        deltas += [
            {"tool_calls": [{"index": i} | call]} for i, call in enumerate(_tool_calls(completion))
        ]
        if completion.calls or not deltas:
            deltas.append({})
        pieces: list[dict[str, Any]] = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in deltas
        ]
        pieces[0]["logprobs"] = _chat_logprobs(_unsent(completion))
        pieces[-1]["finish_reason"] = _finish_reason(completion)
        return pieces


@dataclass
class CompletionsShape(OpenAIShape):
    """`text_completion`, streamed or not.

    Args:
        top: whether the client asked for other tokens beside the chosen ones.
    """

    top: bool = False

    prefix, whole_object, event_object = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, completion: Completion) -> dict[str, Any]:
        """Write a whole completion."""
        return self._choice(index, completion, completion.text, completion.logprobs)

    def pieces(self, index: int, completion: Completion) -> list[dict[str, Any]]:
        """Write what is new of a completion."""
        return [self._choice(index, completion, completion.unsent, _unsent(completion))]

    def _choice(
        self, index: int, completion: Completion, text: str, tokens: Sequence[TokenLogprob]
    ) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(completion, tokens),
            "finish_reason": _finish_reason(completion),
        }

    def _logprobs(
        self, completion: Completion, tokens: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        if not tokens:
            return None
        # A character may be spread over several tokens. Each of them begins where it does.
        read = getincrementaldecoder("utf-8")("replace").decode
        before = completion.logprobs[: len(completion.logprobs) - len(tokens)]
        offset, offsets = len(read(b"".join(t.bytes or b"" for t in before))), []
        for token in tokens:
            offsets.append(offset)
            offset += len(read(token.bytes or b""))
        tops = [{t.text: t.logprob for t in token.top} for token in tokens]
        return {
            "tokens": [t.text for t in tokens],
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": tops if self.top else None,
            "text_offset": offsets,
        }


def _unsent(completion: Completion) -> list[TokenLogprob]:
    return completion.logprobs[len(completion.logprobs) - completion.unsent_logprobs :]


def _tool_calls(completion: Completion) -> list[dict[str, Any]]:
    return [
        {"id": new_call_id(), "type": "function", "function": call._asdict()}
        for call in completion.calls
    ]


def _finish_reason(completion: Completion) -> str | None:
    reason = completion.finish_reason
    if reason == "stop" and completion.calls:
        return "tool_calls"
    return reason and _FINISH_REASONS.get(reason, reason)


def _chat_logprobs(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    if not tokens:
        return None
    content = [_logprob(t) | {"top_logprobs": [_logprob(other) for other in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def _logprob(token: TokenLogprob) -> dict[str, Any]:
    """Write a token. Its bytes joined with those of the others are the completion's text."""
    known = None if token.bytes is None else [*token.bytes]
    return {"token": token.text, "logprob": token.logprob, "bytes": known}
