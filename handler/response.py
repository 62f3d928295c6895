"""An active request, from its arrival to its last byte, and the responses it turns into."""

import json
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from handler.engine import Progress, SequenceKey
from handler.errors import RequestError
from handler.request import Request
from handler.shapes import RANDOM_WEIGHTS, Completion
from handler.tool_calls import Reader

JSON = "application/json"
EVENTS = "text/event-stream"


class Delivery(Enum):
    """How TorchServe sends a response. The values are its codes for a stopping criterion."""

    WHOLE = None
    STREAM_PIECE = False
    STREAM_END = True


@dataclass(frozen=True)
class Response:
    """What goes to one client in one tick."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delivery: Delivery = Delivery.WHOLE

    @property
    def last(self) -> bool:
        """Whether the request is answered with this."""
        return self.delivery is not Delivery.STREAM_PIECE

    def stopping_criterion(self, _: object) -> bool | None:
        """Return TorchServe's code for the delivery; TorchServe calls this with the output."""
        return self.delivery.value


PROBE = b'{"probe": true}'
"""The body of a request that asks whether ticks happen (`deploy/torchserve/watch.py` sends it). It
needs no place in the engine, so a full or draining server answers it too."""

PROBE_RESPONSE = Response(b'{"status": "ok"}', headers={"content-type": JSON})


def json_response(body: dict[str, Any]) -> Response:
    """Respond with JSON."""
    return Response(_encode(body), headers={"content-type": JSON})


def error_response(code: int, body: dict[str, Any], retry_after: int = 0) -> Response:
    """Respond with an error. 429 and 503 say to retry after `retry_after` seconds."""
    headers = {"content-type": JSON}
    if code in (429, 503):
        headers["retry-after"] = str(retry_after)
    return Response(_encode(body), code, headers)


class ActiveRequest:
    """Collects the engine's progress on the completions of one request."""

    def __init__(self, request: Request, *, random_weights: bool = False) -> None:
        self.request = request
        self.shape = request.shape
        self._warning = {"x-warning": RANDOM_WEIGHTS} if random_weights else {}
        self.arrived_at = time.monotonic()
        self.completions: dict[SequenceKey, Completion] = {}
        """One for each instance, in the order of the request."""
        self._stream_started = False

    def add(
        self, key: SequenceKey, prompt_tokens: int, echo: str, reader: Reader | None = None
    ) -> None:
        """Expect the completion of the next instance; its text begins with `echo`."""
        completion = Completion(prompt_tokens, text=echo, unsent=echo)
        completion.reader = reader or completion.reader
        self.completions[key] = completion

    def update(self, progress: Progress) -> None:
        """Record what the engine reports on one of the completions."""
        completion = self.completions[progress.key]
        if completion.first_token_at is None and progress.completion_tokens:
            completion.first_token_at = progress.first_token_at or time.monotonic()
            completion.queue_seconds = progress.queue_seconds
        completion.completion_tokens = progress.completion_tokens
        text = completion.reader.push(progress.text, progress.token_ids)
        if progress.finish_reason:
            rest, completion.calls = completion.reader.finish()
            text += rest
        completion.text += text
        completion.unsent += text
        completion.logprobs += progress.logprobs
        completion.unsent_logprobs += len(progress.logprobs)
        if progress.finish_reason:
            completion.finish_reason = progress.finish_reason
            completion.finished_at = time.monotonic()

    @property
    def deadline(self) -> float:
        """When the request must end with the text so far."""
        return self.arrived_at + self.request.seconds

    @property
    def unfinished(self) -> list[SequenceKey]:
        """The instances that the engine still has to complete."""
        return [key for key, c in self.completions.items() if c.finish_reason is None]

    def take_response(self) -> Response | None:
        """Return what can be sent now, if anything. Call once a tick."""
        if any(c.finish_reason == "error" for c in self.completions.values()):
            return self._failure("generation failed; the server's log says why", 500)
        if all(c.finish_reason == "timeout" for c in self.completions.values()) and not any(
            c.completion_tokens for c in self.completions.values()
        ):
            return self._failure(
                f"no token was generated within {self.request.seconds:g} seconds; retry later", 504
            )
        if self.request.stream:
            return self._events()
        return self._whole() if not self.unfinished else None

    def _whole(self) -> Response:
        completions = list(self.completions.values())
        headers = {
            "content-type": JSON,
            "x-prompt-tokens": ",".join(str(c.prompt_tokens) for c in completions),
            "x-completion-tokens": ",".join(str(c.completion_tokens) for c in completions),
            "x-finish-reason": ",".join(str(c.finish_reason) for c in completions),
        }
        return Response(_encode(self.shape.whole(completions)), headers=headers | self._warning)

    def _events(self) -> Response | None:
        completions = list(self.completions.values())
        events: list[dict[str, Any] | str] = []
        for index, c in enumerate(completions):
            generated = c.first_token_at is not None or c.finish_reason
            if not generated or c.end_sent or not (c.unsent or c.finish_reason):
                continue
            events += self.shape.events(index, c)
            c.unsent, c.unsent_logprobs, c.begun = "", 0, True
            c.end_sent = c.finish_reason is not None
        if not events:
            return None
        if not all(c.end_sent for c in completions):
            delivery = Delivery.STREAM_PIECE
        else:
            events += self.shape.last_events(completions)
            # TorchServe sends the status and the headers of a stream only with a piece that is
            # not the last one, so a stream of a single piece is sent as a whole.
            delivery = Delivery.STREAM_END if self._stream_started else Delivery.WHOLE
        self._stream_started = True
        body = b"".join(_event(event) for event in events)
        headers = {"content-type": EVENTS} | self._warning
        return Response(body, headers=headers, delivery=delivery)

    def _failure(self, message: str, code: int) -> Response:
        # The log has the exception. Its text may describe the machine, so clients do not get it.
        body = self.shape.error(RequestError(code, message))
        if not self._stream_started:
            return error_response(code, body)
        headers = {"content-type": EVENTS}
        return Response(_event(body), headers=headers, delivery=Delivery.STREAM_END)


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _event(value: dict[str, Any] | str) -> bytes:
    """One server-sent event.

    Clients that split text into lines by Unicode's rules, as Python's `splitlines` does, would
    split an event at these characters, so they are escaped.
    """
    data = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    for separator in "\u0085\u2028\u2029":
        data = data.replace(separator, f"\\u{ord(separator):04x}")
    return f"data: {data}\n\n".encode()
