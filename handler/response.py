"""An active request, from its arrival to its last byte, and the responses it turns into."""

import json
import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from handler.engine import FinishReason, Progress, SequenceKey
from handler.errors import RequestError
from handler.request import Request

JSON = "application/json"
EVENTS = "text/event-stream"
RANDOM_WEIGHTS = "random weights: the text means nothing"


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


def error_response(error: RequestError, retry_after: int) -> Response:
    """Respond to a rejected request. 429 and 503 say to retry after `retry_after` seconds."""
    headers = {"content-type": JSON}
    if error.code in (429, 503):
        headers["retry-after"] = str(retry_after)
    return Response(_encode(error.body()), error.code, headers)


@dataclass
class Completion:
    """What is known of one instance's completion. `text` is all of it, `unsent` its last part."""

    prompt_tokens: int
    text: str
    unsent: str
    completion_tokens: int = 0
    finish_reason: FinishReason | None = None
    queue_seconds: float = 0.0
    first_token_at: float | None = None
    finished_at: float | None = None
    end_sent: bool = False


class ActiveRequest:
    """Collects the engine's progress on the instances of one request."""

    def __init__(self, request: Request, *, random_weights: bool) -> None:
        self.request = request
        self.random_weights = random_weights
        self.arrived_at = time.monotonic()
        self.completions: dict[SequenceKey, Completion] = {}
        """One for each instance, in the order of the request."""
        self._stream_started = False

    def add(self, key: SequenceKey, prompt_tokens: int, echo: str) -> None:
        """Expect the completion of the next instance; its text begins with `echo`."""
        self.completions[key] = Completion(prompt_tokens, text=echo, unsent=echo)

    def update(self, progress: Progress) -> None:
        """Record what the engine reports on one of the completions."""
        completion = self.completions[progress.key]
        if completion.first_token_at is None and progress.completion_tokens:
            completion.first_token_at = progress.first_token_at or time.monotonic()
            completion.queue_seconds = progress.queue_seconds
        completion.completion_tokens = progress.completion_tokens
        completion.text += progress.text
        completion.unsent += progress.text
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
        completions = self.completions.values()
        body: dict[str, Any] = {"predictions": [c.text for c in completions]}
        headers = {
            "content-type": JSON,
            "x-prompt-tokens": ",".join(str(c.prompt_tokens) for c in completions),
            "x-completion-tokens": ",".join(str(c.completion_tokens) for c in completions),
            "x-finish-reason": ",".join(str(c.finish_reason) for c in completions),
        }
        if self.random_weights:
            body["warning"] = RANDOM_WEIGHTS
        return Response(_encode(body), headers=headers)

    def _events(self) -> Response | None:
        events = []
        for key, c in self.completions.items():
            begun = c.first_token_at is not None or c.finish_reason
            if not begun or c.end_sent or not (c.unsent or c.finish_reason):
                continue
            event: dict[str, Any] = {"index": key.instance_index, "text": c.unsent}
            c.unsent = ""
            if c.finish_reason:
                c.end_sent = True
                event |= {
                    "finish_reason": c.finish_reason,
                    "prompt_tokens": c.prompt_tokens,
                    "completion_tokens": c.completion_tokens,
                }
                if self.random_weights:
                    event["warning"] = RANDOM_WEIGHTS
            events.append(event)
        if not events:
            return None
        if not all(c.end_sent for c in self.completions.values()):
            delivery = Delivery.STREAM_PIECE
        elif self._stream_started:
            delivery = Delivery.STREAM_END
        else:
            # TorchServe sends the status and the headers of a stream only with a piece that is
            # not the last one, so a stream of a single piece is sent as a whole.
            delivery = Delivery.WHOLE
        self._stream_started = True
        body = b"".join(_event(event) for event in events)
        return Response(body, headers={"content-type": EVENTS}, delivery=delivery)

    def _failure(self, message: str, code: int) -> Response:
        # The log has the exception. Its text may describe the machine, so clients do not get it.
        error = RequestError(code, message)
        if not self._stream_started:
            return error_response(error, retry_after=0)
        headers = {"content-type": EVENTS}
        return Response(_event(error.body()), headers=headers, delivery=Delivery.STREAM_END)


def _encode(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def _event(value: dict[str, Any]) -> bytes:
    """One server-sent event.

    Clients that split text into lines by Unicode's rules, as Python's `splitlines` does, would
    split an event at these characters, so they are escaped.
    """
    data = json.dumps(value, ensure_ascii=False)
    for separator in "\u0085\u2028\u2029":
        data = data.replace(separator, f"\\u{ord(separator):04x}")
    return f"data: {data}\n\n".encode()
