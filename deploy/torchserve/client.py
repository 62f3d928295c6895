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


def server_sent_events(lines: Iterable[str], source: str) -> Iterator[dict]:
    """The JSON objects in a stream's lines, as they arrive.

    Raises:
        UserError: one of them is an error.
    """
    for line in lines:
        if line.startswith("data: "):
            event = json.loads(line.removeprefix("data: "))
            if isinstance(event, dict) and "error" in event:
                raise UserError(f"the stream from {source} broke off: {event['error']['message']}")
            yield event
