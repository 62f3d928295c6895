"""The handler's ticks, with an engine that does what a test tells it to."""

import json
from types import SimpleNamespace

import pytest

import handler.llm_handler
from handler.config import app_yaml
from handler.engine import (
    EngineLoad,
    Messages,
    ParameterError,
    Progress,
    PromptError,
    Sampling,
    SequenceKey,
)
from handler.llm_handler import LLMHandler
from handler.metrics import OUTCOMES, REFUSALS
from handler.response import PROBE


class FakeEngine:
    """Queues prompts and completes none by itself; `failures` maps a prompt to an exception."""

    description, max_context = "engine fake", 100

    def __init__(self) -> None:
        self.keys: list[SequenceKey] = []
        self.waiting_tokens = 0
        self.failures: dict[str, Exception] = {}
        self.next_progress: list[Progress] = []
        self.seconds: list[float] = []

    def submit(self, key: SequenceKey, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        if prompt in self.failures:
            raise self.failures[prompt]
        self.keys.append(key)
        self.waiting_tokens += len(prompt)
        return len(prompt)

    def advance(self, seconds: float) -> list[Progress]:
        self.seconds.append(seconds)
        progress, self.next_progress = self.next_progress, []
        return progress

    def expire(self, key: SequenceKey) -> None:
        self.next_progress.append(Progress(key, "", 0, "timeout"))

    def cancel(self, key: SequenceKey) -> None:
        if key in self.keys:
            self.keys.remove(key)

    def alive(self) -> bool:
        return True

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(0, len(self.keys), self.waiting_tokens)

    def chat_prompt(self, messages: Messages) -> None:
        return None


class FakeContext:
    """TorchServe's context, with what the handler uses."""

    def __init__(self) -> None:
        self.system_properties = {"model_dir": "unused"}
        self.model_name = "model"
        self.paths: dict[str, str] = {}
        """Request id -> the rest of its path."""
        self.model_yaml_config = app_yaml("my-own-model", local=True)

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        path = self.paths.get(self.request_ids[idx])
        return {} if path is None else {"url_path": path}

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        self.statuses[idx] = code

    def set_response_header(self, idx: int, key: str, value: str) -> None:
        self.headers[idx, key] = value


class Worker:
    """Calls the handler as TorchServe's worker does: with all active requests, once a tick."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine = FakeEngine()
        monkeypatch.setattr(handler.llm_handler, "create_engine", lambda *_: self.engine)
        self.context = FakeContext()
        self.handler = LLMHandler()
        self.handler.initialize(self.context)
        self.bodies: dict[str, dict] = {}

    def probe(self) -> tuple[int, bytes]:
        """Send the watcher's probe beside the active requests."""
        context = self.context
        context.request_ids = dict(enumerate([*self.bodies, "probe"]))
        context.statuses, context.headers = {}, {}
        data = [{"body": json.dumps(body)} for body in self.bodies.values()]
        bodies = self.handler.handle([*data, {"body": PROBE}], context)
        return context.statuses[len(data)], bodies[len(data)]

    def tick(self, **new: dict) -> dict[str, tuple[int, dict]]:
        """Send requests; return request id -> status and body of those that are answered."""
        self.bodies |= new
        context = self.context
        context.request_ids = dict(enumerate(self.bodies))
        context.statuses, context.headers = {}, {}
        data = [{"body": json.dumps(body)} for body in self.bodies.values()]
        bodies = self.handler.handle(data, context)
        answered = {}
        for position, request_id in context.request_ids.items():
            answered[request_id] = context.statuses[position], json.loads(bodies[position])
            del self.bodies[request_id]
        return answered


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    return Worker(monkeypatch)


def body(*instances: str) -> dict:
    return {"instances": list(instances)}


def end(key: SequenceKey, text: str) -> Progress:
    return Progress(key, text, 1, "stop")


def test_response_is_sent_when_all_instances_are_complete(worker):
    assert worker.tick(one=body("a"), two=body("b", "c")) == {}
    first, second = SequenceKey("two", 0), SequenceKey("two", 1)
    worker.engine.next_progress = [end(second, "!"), end(SequenceKey("one", 0), "?")]
    assert worker.tick() == {"one": (200, {"predictions": ["a?"]})}
    worker.engine.next_progress = [end(first, "...")]
    assert worker.tick() == {"two": (200, {"predictions": ["b...", "c!"]})}
    assert worker.handler.active == {}


def test_prompt_error_is_a_400_that_names_the_instance(worker):
    worker.engine.failures["bad"] = PromptError("has 9 tokens")
    answered = worker.tick(mixed=body("good", "bad"), good=body("good"))
    status, content = answered["mixed"]
    assert status == 400 and content["error"]["field"] == "instances[1]"
    assert content["error"]["message"] == "instances[1]: the prompt has 9 tokens"
    assert worker.engine.keys == [SequenceKey("good", 0)], "nothing else is cancelled"
    assert list(answered) == ["mixed"]


@pytest.mark.parametrize("error", [ValueError("/secret/path"), KeyError("x"), RuntimeError("y")])
def test_engine_bug_is_a_500_without_internal_text(worker, error):
    """A ValueError too: it says nothing about the prompt, unless it is a PromptError."""
    worker.engine.failures["bad"] = error
    status, content = worker.tick(mixed=body("good", "bad"))["mixed"]
    assert status == 500
    message = "the server failed on this request; its log says why"
    assert content["error"] == {"code": 500, "status": "INTERNAL", "message": message}
    assert worker.engine.keys == [] and worker.handler.active == {}


def test_request_of_a_client_that_left_is_cancelled(worker):
    worker.tick(stays=body("a"), leaves=body("b", "c"))
    del worker.bodies["leaves"]
    worker.tick()
    assert worker.engine.keys == [SequenceKey("stays", 0)]
    assert list(worker.handler.active) == ["stays"]


def test_full_server_answers_429_with_the_time_to_retry(worker):
    limits = worker.handler.app.engine
    room = limits.max_batch + limits.max_queue
    requests = {f"r{i}": body(*["a"] * 32) for i in range(room // 32)}
    assert worker.tick(**requests) == {}
    status, content = worker.tick(late=body("a"))["late"]
    assert status == 429 and f"{room} sequences are running" in content["error"]["message"]
    assert worker.context.headers[len(requests), "retry-after"] == "2"
    assert len(worker.engine.keys) == room


def test_tick_with_new_requests_decodes_one_step_and_others_longer(worker):
    worker.tick(one=body("a"))
    worker.tick()
    worker.tick(**{f"r{i}": body("a") for i in range(31)})
    worker.tick()
    tick = handler.llm_handler.TICK_SECONDS
    assert worker.engine.seconds == [0, pytest.approx(tick * 33 / 32), 0, pytest.approx(tick * 2)]


LONG = "x" * 30_000


def test_prompts_beyond_the_queue_limit_are_rejected_with_the_numbers(worker):
    assert worker.tick(one=body(LONG)) == {}
    status, content = worker.tick(two=body(LONG))["two"]
    assert status == 429
    assert content["error"]["message"] == (
        "the server is full: 30000 prompt tokens are waiting, this request adds 30000 or more, "
        "and 32768 is the most; retry later"
    )
    assert worker.context.headers[1, "retry-after"] == "2"
    assert worker.engine.keys == [SequenceKey("one", 0)]
    worker.engine.waiting_tokens = 0
    assert worker.tick(two=body(LONG)) == {}


def test_short_request_is_accepted_while_long_prompts_fill_the_queue(worker):
    assert worker.tick(many=body(LONG, LONG)) == {}, "any request, if nothing waits"
    assert worker.tick(short=body("x" * 512)) == {}
    assert list(worker.tick(longer=body("x" * 513))) == ["longer"]


@pytest.fixture
def clock(monkeypatch):
    """The handler's clock; a test moves it."""
    now = SimpleNamespace(time=1000.0)
    monkeypatch.setattr(handler.llm_handler.time, "monotonic", lambda: now.time)
    return now


def timed(seconds: float, *instances: str, stream: bool = False) -> dict:
    return body(*instances) | {"parameters": {"timeout": seconds, "stream": stream}}


def test_plain_request_ends_at_its_deadline_with_what_it_has(worker, clock):
    worker.tick(one=timed(2, "a", "b"), two=timed(3, "c"))
    worker.engine.next_progress = [end(SequenceKey("one", 0), "!")]
    clock.time += 1.9
    assert worker.tick() == {}
    clock.time += 0.1
    assert worker.tick() == {"one": (200, {"predictions": ["a!", "b"]})}
    assert worker.context.headers[0, "x-finish-reason"] == "stop,timeout"
    assert list(worker.handler.active) == ["two"]
    assert worker.engine.keys == [SequenceKey("two", 0)]


@pytest.mark.parametrize("stream", [False, True])
def test_request_without_a_token_at_its_deadline_is_a_504(worker, clock, stream):
    worker.tick(one=timed(2, "a", "b", stream=stream))
    clock.time += 2
    status, content = worker.tick()["one"]
    message = "no token was generated within 2 seconds; retry later"
    assert status == 504
    assert content["error"] == {"code": 504, "status": "DEADLINE_EXCEEDED", "message": message}
    assert worker.handler.active == {}


def test_deadline_of_the_app_holds_for_a_request_without_timeout(worker, clock):
    worker.tick(one=body("a"))
    clock.time += worker.handler.app.limits.seconds - 1
    assert worker.tick() == {}
    clock.time += 1
    assert worker.tick()["one"][0] == 504


def test_clock_starts_when_the_request_is_first_seen(worker, clock, monkeypatch):
    """A tick admits requests for a moment only; the others are admitted in later ticks."""
    submit = worker.engine.submit

    def slow(*args, **options):
        clock.time += 1
        return submit(*args, **options)

    monkeypatch.setattr(worker.engine, "submit", slow)
    worker.tick(one=timed(1.5, "a"), two=timed(1.5, "b"))
    assert list(worker.handler.active) == ["one"]
    worker.tick()
    assert worker.handler.active["two"].arrived_at == 1000


def test_long_request_is_admitted_in_a_flood_of_short_ones(worker, clock, monkeypatch):
    """They are refused, so that they need no place and never end."""

    def refuse(key, prompt, *args, **options):
        clock.time += 0.01
        if prompt == "short":
            raise PromptError("is refused")
        return len(prompt)

    monkeypatch.setattr(worker.engine, "submit", refuse)
    worker.tick(long=body("long" * 100), **{f"{i}": body("short") for i in range(30)})
    began, ticks = clock.time, 0
    while "long" not in worker.handler.active:
        assert clock.time < began + 2
        ticks += 1
        worker.tick(**{f"{ticks}, {i}": body("short") for i in range(30 - len(worker.bodies))})
    assert clock.time > began + 0.5, "the short ones were first for a while"


def test_failure_anywhere_in_a_tick_ends_the_worker(worker, monkeypatch):
    """An exception that reached TorchServe would fail every request with a wrong response."""

    class Left(BaseException):
        pass

    def leave(code):
        raise Left(code)

    monkeypatch.setattr(handler.llm_handler.os, "_exit", leave)
    for broken in ("set_response_header", "request_ids"):
        worker.engine.next_progress = []
        with monkeypatch.context() as patch, pytest.raises(Left, match="1"):
            worker.tick(**{broken: body("a")})
            worker.engine.next_progress = [end(SequenceKey(broken, 0), "!")]
            patch.setattr(worker.context, broken, None)
            worker.handler.handle([{}], worker.context)


def test_probe_is_answered_when_the_server_is_full_or_draining(monkeypatch, tmp_path):
    """It costs no place and is not counted as rejected."""
    monkeypatch.setenv("SERVING_STATE", str(tmp_path))
    worker = Worker(monkeypatch)
    counted = []
    worker.handler.metrics.count_refused = lambda *_: counted.append(1)
    assert worker.probe() == (200, b'{"status": "ok"}')
    full = worker.handler.app.engine.max_batch + worker.handler.app.engine.max_queue
    for i in range(full // 32):
        worker.tick(**{f"r{i}": {"instances": ["a"] * 32}})
    assert worker.tick(late={"instances": ["a"]})["late"][0] == 429
    counted.clear()
    assert worker.probe() == (200, b'{"status": "ok"}')
    (tmp_path / "draining").touch()
    assert worker.probe() == (200, b'{"status": "ok"}') and not counted


def value(worker: Worker, name: str, **labels: str) -> float:
    """The value of one of the handler's metrics."""
    found = worker.handler.metrics.registry.get_sample_value(name, {"model": "model", **labels})
    assert found is not None, (name, labels)
    return found


def refused(worker: Worker) -> dict[str, float]:
    """The reasons for which requests were rejected, with their numbers."""
    counts = {r: value(worker, "llm_refused_requests_total", reason=r) for r in REFUSALS}
    return {reason: count for reason, count in counts.items() if count}


def test_rejected_requests_are_counted_by_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("SERVING_STATE", str(tmp_path))
    worker = Worker(monkeypatch)
    app = worker.handler.app
    worker.engine.failures["bug"] = RuntimeError()
    worker.tick(wrong={"instances": 5}, large=body("a" * (app.limits.max_body_bytes + 1)))
    worker.tick(bug=body("bug"))
    assert refused(worker) == {"bad_request": 1, "too_large": 1, "internal_error": 1}
    worker.tick(first=body("a"))
    worker.tick(long=body("a" * (app.engine.max_queue_tokens + 1)))
    for i in range((app.engine.max_batch + app.engine.max_queue) // 32):
        worker.tick(**{f"r{i}": {"instances": ["a"] * 32}})
    (tmp_path / "draining").touch()
    worker.tick(late=body("a"))
    assert refused(worker) == {
        "bad_request": 1,
        "too_large": 1,
        "internal_error": 1,
        "queue_tokens": 1,
        "full": 1,
        "draining": 1,
    }


def test_gauges_follow_each_tick_and_a_client_that_leaves(worker):
    worker.tick(one=body("a", "b"), two=body("c"))
    assert value(worker, "llm_waiting_sequences") == 3
    assert value(worker, "llm_waiting_prompt_tokens") == 3
    del worker.bodies["one"]
    worker.tick()
    assert value(worker, "llm_waiting_sequences") == 1
    assert value(worker, "llm_sequences_total", finish_reason="cancelled") == 2
    assert sum(value(worker, "llm_requests_total", outcome=o) for o in OUTCOMES) == 0


def test_requests_are_answered_while_the_state_folder_is_missing(monkeypatch, tmp_path):
    monkeypatch.setenv("SERVING_STATE", str(tmp_path / "state"))
    (tmp_path / "state").mkdir()
    worker = Worker(monkeypatch)
    (tmp_path / "state" / "ticked").unlink()
    (tmp_path / "state").rmdir()
    assert worker.tick(a={"instances": ["a"]}) == {}
    worker.engine.next_progress = [Progress(SequenceKey("a", 0), "b", 1, "stop", 0.0)]
    assert worker.tick()["a"][0] == 200


def test_worker_without_a_model_responds_with_503_and_leaves_the_reason(monkeypatch, tmp_path):
    monkeypatch.setenv("SERVING_STATE", str(tmp_path))

    def fail(*_: object) -> None:
        raise OSError("config.json is missing")

    monkeypatch.setattr(handler.llm_handler, "create_engine", fail)
    worker = Worker.__new__(Worker)
    worker.context, worker.handler, worker.bodies = FakeContext(), LLMHandler(), {}
    worker.handler.initialize(worker.context)
    status, body = worker.tick(a={"instances": ["a"]})["a"]
    assert status == 503 and body["error"]["message"].startswith("the model cannot be loaded")
    assert "config.json" not in body["error"]["message"], "the reason describes the machine"
    assert (tmp_path / "failed").read_text() == "config.json is missing"


def test_short_requests_are_admitted_before_long_ones(worker):
    """A hundred long prompts, even refused ones, take half a minute to tokenize."""
    worker.tick(long=body("a" * 1000), longer=body("a" * 2000), short=body("a"))
    assert [key.request_id for key in worker.engine.keys] == ["short", "long", "longer"]


CHAT = {"messages": [{"role": "user", "content": "Hi"}]}


def test_apis_share_a_tick(worker):
    """Each request is answered or rejected in the shape of the API that it uses."""
    worker.context.paths = dict.fromkeys(["text", "wrong", "route"], "v1/completions")
    worker.context.paths |= {"route": "v1/embeddings", "list": "v1/models"}
    answered = worker.tick(
        vertex=body("a"), text={"prompt": "b"}, wrong={"prompt": 1}, route={}, list={}
    )
    assert {name: status for name, (status, _) in answered.items()} == {
        "wrong": 400,
        "route": 404,
        "list": 200,
    }
    assert answered["wrong"][1]["error"]["param"] == "prompt"
    assert answered["list"][1]["data"][0]["id"] == "model"
    worker.engine.next_progress = [end(SequenceKey(name, 0), "x") for name in ("vertex", "text")]
    answered = worker.tick()
    assert answered["vertex"][1] == {"predictions": ["ax"]}
    assert answered["text"][1]["choices"][0]["text"] == "x"


def test_parameter_that_the_engine_rejects_is_named_as_in_the_body(worker):
    worker.engine.failures = {"a": ParameterError("json_schema", "is not a schema")}
    worker.context.paths = {"text": "v1/completions"}
    answered = worker.tick(text={"prompt": "a"}, vertex=body("a"), other=body("b"))
    assert answered["text"][1]["error"]["message"] == "response_format: is not a schema"
    assert answered["vertex"][1]["error"]["field"] == "response_format"
    assert "other" not in answered and [key.request_id for key in worker.engine.keys] == ["other"]


def test_model_that_cannot_be_loaded_answers_in_the_shape_of_each_api(worker):
    worker.handler.failure = "the model cannot be loaded"
    worker.context.paths = {"chat": "v1/chat/completions"}
    answered = worker.tick(chat=CHAT, vertex=body("a"))
    assert answered["chat"][0] == answered["vertex"][0] == 503
    assert answered["chat"][1]["error"]["type"] == "server_error"
    assert answered["vertex"][1]["error"]["status"] == "UNAVAILABLE"
