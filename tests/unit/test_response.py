"""What the completions of a request turn into: a body, headers, events."""

import json

import pytest

import handler.response
from handler.config import load_app
from handler.engine import Progress, SequenceKey
from handler.request import default_parameters, parse_body
from handler.response import ActiveRequest, Delivery, Response

APP = load_app("my-own-model", local=True)


@pytest.fixture
def active(request, monkeypatch):
    """Two instances: 5 and 7 prompt tokens, 11 and 3 completion tokens, at known times."""
    clock = iter([100.0, 100.5, 100.75, 102.75, 103.0])
    monkeypatch.setattr(handler.response.time, "monotonic", lambda: next(clock))
    body = {"instances": ["a", "b"], "parameters": {"stream": request.param}}
    active = ActiveRequest(
        parse_body(body, APP, default_parameters(APP)),
    )
    a, b = SequenceKey("request", 0), SequenceKey("request", 1)
    active.add(a, 5, "")
    active.add(b, 7, "")
    active.update(Progress(b, "x", 1, queue_seconds=0.25))
    active.update(Progress(a, "x", 1, queue_seconds=0.5))
    active.update(Progress(a, "y", 11, "length", queue_seconds=0.5))
    active.update(Progress(b, "y", 3, "stop", queue_seconds=0.25))
    return active


@pytest.mark.parametrize("active", [False], indirect=True)
def test_headers_are_in_the_order_of_the_instances(active):
    headers = active.take_response().headers
    assert headers["x-prompt-tokens"] == "5,7"
    assert headers["x-completion-tokens"] == "11,3"
    assert headers["x-finish-reason"] == "length,stop"


def start(stream: bool) -> ActiveRequest:
    """An active request with one instance."""
    body = {"instances": ["a"], "parameters": {"stream": stream}}
    active = ActiveRequest(parse_body(body, APP, {}))
    active.add(KEY, 5, "")
    return active


KEY = SequenceKey("request", 0)
FIRST, LAST = Progress(KEY, "x", 1), Progress(KEY, "y", 2, "stop")
FAILED = Progress(KEY, "", 1, "error")


def deliveries(active: ActiveRequest, ticks: list[list[Progress]]) -> list[Delivery | None]:
    """How the response of each tick is delivered; None without one."""
    found = []
    for progresses in ticks:
        for progress in progresses:
            active.update(progress)
        response = active.take_response()
        found.append(response and response.delivery)
    return found


def test_delivery_of_a_complete_response():
    assert deliveries(start(stream=False), [[], [FIRST], [LAST]]) == [None, None, Delivery.WHOLE]


@pytest.mark.parametrize("end", [LAST, FAILED], ids=["stop", "error"])
def test_delivery_of_a_stream(end):
    pieces = [Delivery.STREAM_PIECE, None, Delivery.STREAM_END]
    assert deliveries(start(stream=True), [[FIRST], [], [end]]) == pieces


@pytest.mark.parametrize("end", [LAST, FAILED], ids=["stop", "error"])
def test_stream_that_ends_in_its_first_tick_is_delivered_complete(end):
    """TorchServe sends status and headers of a stream only with a piece that is not the last."""
    assert deliveries(start(stream=True), [[FIRST, end]]) == [Delivery.WHOLE]


def test_codes_that_torchserve_reads():
    codes = {d: Response(b"", delivery=d).stopping_criterion(None) for d in Delivery}
    assert codes == {
        Delivery.WHOLE: None,
        Delivery.STREAM_PIECE: False,
        Delivery.STREAM_END: True,
    }
    assert [Response(b"", delivery=d).last for d in Delivery] == [True, False, True]


def test_last_event_of_a_stream_has_the_reason_timeout():
    active = start(stream=True)
    active.update(FIRST)
    active.take_response()
    active.update(Progress(KEY, "y", 2, "timeout"))
    response = active.take_response()
    event = json.loads(response.body.removeprefix(b"data: "))
    assert response.delivery == Delivery.STREAM_END
    assert (event["text"], event["finish_reason"], event["completion_tokens"]) == (
        "y",
        "timeout",
        2,
    )


def test_sequence_without_a_token_at_the_deadline_has_no_time_to_first_token():
    active = start(stream=True)
    other = SequenceKey("request", 1)
    active.add(other, 5, "")
    active.update(FIRST)
    active.update(Progress(other, "", 0, "timeout"))
    active.update(Progress(KEY, "", 1, "timeout"))
    events = [json.loads(line[6:]) for line in active.take_response().body.split(b"\n") if line]
    assert [(e["index"], e["finish_reason"]) for e in events] == [(0, "timeout"), (1, "timeout")]
    assert active.completions[other].first_token_at is None


def test_event_has_no_line_separators_of_unicode():
    """Python's `splitlines` and other readers end a line at each of them."""
    active = start(stream=True)
    text = "a\u2028b\u2029c\u0085d\x0b\x0c\x1c\x1d\x1e\r\né"
    active.update(Progress(KEY, text, 1, "stop"))
    event = active.take_response().body.decode()
    assert event.count("\n") == 2 and event.splitlines() == [event.removesuffix("\n\n"), ""]
    assert json.loads(event.removeprefix("data: "))["text"] == text and "é" in event
