"""Reading streams of server-sent events."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from deploy.common.paths import UserError
from deploy.torchserve.client import parse_event, server_sent_events, split_lines, stream

SEPARATORS = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg\x1dh\x1ei"
"""Characters at which Python's `splitlines` splits, apart from newlines."""


@pytest.mark.parametrize("line", ['data: {"index": 0}', b'data: {"index": 0}\n'])
def test_parses_the_object_of_an_event(line):
    assert parse_event(line) == {"index": 0}


@pytest.mark.parametrize("line", ["", b"\n", ": a comment", "data: [DONE]", "event: message"])
def test_other_lines_are_no_event(line):
    assert parse_event(line) is None


def test_error_event_ends_the_stream():
    lines = ['data: {"text": "a"}', "", 'data: {"error": {"message": "the worker died"}}']
    events = server_sent_events(lines, "http://here")
    assert next(events) == {"text": "a"}
    with pytest.raises(UserError, match="http://here ended early: the worker died"):
        next(events)


@pytest.fixture
def separators_url() -> Iterator[str]:
    """A server whose events hold all separators, unescaped where JSON allows it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            for text in SEPARATORS:
                event = json.dumps({"text": text}, ensure_ascii=False)
                self.wfile.write(f"data: {event}\n\n".encode())
                self.wfile.flush()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_streams_text_with_every_line_separator(separators_url: str):
    events = list(stream(separators_url, {"instances": ["x"]}))
    assert "".join(event["text"] for event in events) == SEPARATORS


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_lines_end_only_with_newlines_however_they_arrive(size: int):
    text = f"data: {SEPARATORS}\n\nlast".encode()
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    assert list(split_lines(chunks)) == [f"data: {SEPARATORS}".encode(), b"", b"last"]
