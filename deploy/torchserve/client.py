"""Send requests to a server and read its responses, in plain HTTP."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import httpx

from deploy.common.paths import UserError

SAMPLE_REQUEST: dict[str, Any] = {
    "instances": [{"messages": [{"role": "user", "content": "What is the capital of Japan?"}]}]
}
"""The request of `make quickstart` and `make test`."""


def predict(url: str, body: dict, timeout: float = 600.0) -> dict:
    """POST a request in Vertex AI's shape and return the body of the response.

    Raises:
        UserError: the response is an error; the message includes its status and body.
    """
    response = httpx.post(url, json=body, timeout=timeout)
    if response.status_code != 200:
        raise UserError(f"{response.status_code} from {url}: {response.text.strip()}")
    return response.json()


def stream(url: str, body: dict, timeout: float = 600.0) -> Iterator[dict]:
    """POST a request with `stream` on and yield the server-sent events as they arrive.

    Raises:
        UserError: the response is an error, or an event in the stream is one.
    """
    body = body | {"parameters": body.get("parameters", {}) | {"stream": True}}
    with httpx.stream("POST", url, json=body, timeout=timeout) as response:
        if response.status_code != 200:
            text = response.read().decode().strip()
            raise UserError(f"{response.status_code} from {url}: {text}")
        yield from server_sent_events(split_lines(response.iter_bytes()), url)


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the lines of a stream as they arrive, without their ends.

    Lines end with a newline. httpx's `iter_lines` also splits at U+2028, U+2029 and U+0085, which
    JSON allows in strings.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


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
