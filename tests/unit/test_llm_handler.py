"""The handler's ticks, with an engine that does what a test tells it to."""

import json
from types import SimpleNamespace

import pytest

import handler.llm_handler
from handler.config import app_yaml
from handler.engine import Messages, Progress, PromptError, Sampling, SequenceKey
from handler.llm_handler import LLMHandler


class FakeEngine:
    """Queues prompts and completes none by itself; `failures` maps a prompt to an exception."""

    description, max_context = "engine fake", 100

    def __init__(self) -> None:
        self.keys: list[SequenceKey] = []
        self.failures: dict[str, Exception] = {}
        self.next_progress: list[Progress] = []
        self.seconds: list[float] = []

    def submit(self, key: SequenceKey, prompt: str, sampling: Sampling, *, stream: bool) -> int:
        if prompt in self.failures:
            raise self.failures[prompt]
        self.keys.append(key)
        return len(prompt)

    def advance(self, seconds: float) -> list[Progress]:
        self.seconds.append(seconds)
        progress, self.next_progress = self.next_progress, []
        return progress

    def cancel(self, key: SequenceKey) -> None:
        if key in self.keys:
            self.keys.remove(key)

    def alive(self) -> bool:
        return True

    def chat_prompt(self, messages: Messages) -> None:
        return None


class FakeContext:
    """TorchServe's context, with what the handler uses."""

    def __init__(self) -> None:
        self.system_properties = {"model_dir": "unused"}
        self.model_name = "model"
        self.model_yaml_config = app_yaml("my-own-model", local=True)
        self.metrics = SimpleNamespace(
            add_metric_to_cache=lambda *_: SimpleNamespace(add_or_update=lambda *_: None)
        )

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
