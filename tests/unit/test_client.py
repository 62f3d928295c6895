"""Reading streams of server-sent events."""

import pytest

from deploy.common.paths import UserError
from deploy.torchserve.client import parse_event, server_sent_events


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
