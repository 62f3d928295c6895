"""Ask a server, as the notebooks, the tests and `make quickstart` do. Plain HTTP."""

import json
from collections.abc import Iterable, Iterator

import httpx

from deploy.common.paths import UserError


def predict(url: str, body: dict, timeout: float = 600.0) -> dict:
    """POST a request in Vertex AI's shape and return the JSON reply.

    Raises:
        UserError: the server answered with an error; the message is its own.
    """
    reply = httpx.post(url, json=body, timeout=timeout)
    if reply.status_code != 200:
        raise UserError(f"{reply.status_code} from {url}: {reply.text.strip()}")
    return reply.json()


def stream(url: str, body: dict, timeout: float = 600.0) -> Iterator[dict]:
    """POST the request with `stream` on and yield the server-sent events as they arrive.

    Raises:
        UserError: the server answered with an error, at once or in mid-stream.
    """
    parameters = body.get("parameters", {}) | {"stream": True}
    with httpx.stream(
        "POST", url, json=body | {"parameters": parameters}, timeout=timeout
    ) as reply:
        if reply.status_code != 200:
            raise UserError(f"{reply.status_code} from {url}: {reply.read().decode().strip()}")
        yield from server_sent_events(reply.iter_lines(), url)


def server_sent_events(lines: Iterable[str | bytes], source: str) -> Iterator[dict]:
    """Yield the JSON objects in a stream's lines as they arrive.

    Raises:
        UserError: an event is an error.
    """
    for line in lines:
        event = parse_event(line)
        if event is None:
            continue
        if "error" in event:
            raise UserError(f"the stream from {source} ended early: {event['error']['message']}")
        yield event


def parse_event(line: str | bytes) -> dict | None:
    """Return the JSON object in a line of a stream; None for any other line.

    Both APIs send each server-sent event as one line, `data: {...}`. OpenAI's ends the stream with
    `data: [DONE]`.
    """
    text = line.decode() if isinstance(line, bytes) else line
    return json.loads(text.removeprefix("data: ")) if text.startswith("data: {") else None
