"""A request between its arrival and its last byte, and the replies it turns into."""

import json
import time
from dataclasses import dataclass, field

from handler.engine import Progress
from handler.request import Request, RequestError

JSON = "application/json"
EVENTS = "text/event-stream"
RANDOM_WEIGHTS = "random weights: the text means nothing"


@dataclass(frozen=True)
class Reply:
    """What goes to the client in one tick.

    `stream_end` is TorchServe's code: None for a whole reply, False for a piece of a stream, True
    for its last piece.
    """

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stream_end: bool | None = None

    @property
    def last(self) -> bool:
        return self.stream_end is not False


def error_reply(error: RequestError, retry_after: int) -> Reply:
    """The whole reply for a refused request. `retry_after` in seconds goes with "later" codes."""
    headers = {"content-type": JSON}
    if error.code in (429, 503):
        headers["retry-after"] = str(retry_after)
    return Reply(_json(error.body()), error.code, headers)


@dataclass
class _Completion:
    """One instance on its way. `new` is the text not yet sent, `text` all of it."""

    prompt_tokens: int
    text: str
    new: str
    completion_tokens: int = 0
    finish_reason: str | None = None
    queue_seconds: float = 0.0
    first_token: float | None = None
    finished: float | None = None
    reported: bool = False


class LiveRequest:
    """Collects the engine's progress on the instances of one request."""

    def __init__(self, request: Request, *, random_weights: bool) -> None:
        self.request = request
        self.random_weights = random_weights
        self.arrived = time.monotonic()
        self.completions: list[_Completion] = []
        self._started = False

    def add(self, prompt_tokens: int, shown_prompt: str) -> None:
        """The next instance was submitted; its reply begins with `shown_prompt`."""
        self.completions.append(_Completion(prompt_tokens, shown_prompt, shown_prompt))

    def update(self, index: int, progress: Progress) -> None:
        """Take in what the engine has to say about one instance."""
        completion = self.completions[index]
        now = time.monotonic()
        if completion.first_token is None:
            completion.first_token = now
            completion.queue_seconds = progress.queue_seconds
        completion.completion_tokens = progress.completion_tokens
        completion.text += progress.text
        completion.new += progress.text
        if progress.finish_reason:
            completion.finish_reason, completion.finished = progress.finish_reason, now

    @property
    def unfinished(self) -> int:
        return sum(c.finish_reason is None for c in self.completions)

    def take_reply(self) -> Reply | None:
        """What can be sent now, if anything. Call once a tick."""
        if any(c.finish_reason == "error" for c in self.completions):
            return self._failure()
        if self.request.stream:
            return self._events()
        return self._whole() if not self.unfinished else None

    def _whole(self) -> Reply:
        body: dict = {"predictions": [c.text for c in self.completions]}
        headers = {
            "content-type": JSON,
            "x-prompt-tokens": ",".join(str(c.prompt_tokens) for c in self.completions),
            "x-completion-tokens": ",".join(str(c.completion_tokens) for c in self.completions),
            "x-finish-reason": ",".join(str(c.finish_reason) for c in self.completions),
        }
        if self.random_weights:
            body["warning"] = RANDOM_WEIGHTS
        return Reply(_json(body), headers=headers)

    def _events(self) -> Reply | None:
        events = []
        for index, c in enumerate(self.completions):
            if c.first_token is None or c.reported or not (c.new or c.finish_reason):
                continue
            event: dict = {"index": index, "text": c.new}
            c.new = ""
            if c.finish_reason:
                c.reported = True
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
        end = all(c.reported for c in self.completions)
        # A stream that starts and ends in one tick is a whole reply: TorchServe sends the status
        # and headers of a stream only with a piece that is not the last one.
        last = (True if self._started else None) if end else False
        self._started = True
        body = b"".join(b"data: " + _json(event) + b"\n\n" for event in events)
        return Reply(body, headers={"content-type": EVENTS}, stream_end=last)

    def _failure(self) -> Reply:
        # Not the exception's own words, which may tell about the machine; the log has them.
        error = RequestError(500, "generation failed; the server's log says why")
        if not self._started:
            return error_reply(error, retry_after=0)
        return Reply(
            b"data: " + _json(error.body()) + b"\n\n",
            headers={"content-type": EVENTS},
            stream_end=True,
        )


def _json(value: dict) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
