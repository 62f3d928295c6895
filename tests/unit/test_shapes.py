"""The shapes of traffic that benchmarks send, the report of the comparison, and the peers."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, groupby
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks import peers, shapes
from benchmarks.load import Client, Report, Request, Target, report
from benchmarks.record import summary
from benchmarks.report import shapes as by_shape
from benchmarks.report import tables
from deploy.common.paths import UserError

NOWHERE = Target("")


class Sent(list[list[Request]]):
    """What each client of a load sends, without a server. The n-th completion is `completion n`."""

    def run_clients(self, _: Target, clients: Sequence[Client]) -> Report:
        for client in clients:
            requests = [next(client)]
            with suppress(StopIteration):
                while True:
                    requests.append(client.send(f"completion {len(requests)}"))
            self.append(requests)
        return report([], seconds=1.0)

    def run_arrivals(self, _: Target, arrivals: Iterator[tuple[float, Request]]) -> Report:
        self.append([request for _, request in arrivals])
        return report([], seconds=1.0)

    @property
    def prompts(self) -> list[str]:
        """The prompts, or the last messages of the chats."""
        contents = [request.content for request in chain(*self)]
        return [c if isinstance(c, str) else c[-1]["content"] for c in contents]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    found = Sent()
    monkeypatch.setattr(shapes, "run_clients", found.run_clients)
    monkeypatch.setattr(shapes, "run_arrivals", found.run_arrivals)
    return found


@pytest.fixture(scope="module")
def tokens(smollm2: Path):
    """A function that counts tokens."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("name", shapes.LOADS)
def test_load_sends_what_it_says(name: str, sent: Sent):
    load = shapes.LOADS[name]
    load.send(NOWHERE, 0)
    assert len(sent) == (load.clients or 1)
    assert sum(map(len, sent)) == load.requests


def test_prompts_are_distinct_in_rounds_loads_and_clients(sent: Sent):
    for seed in range(3):
        for load in shapes.LOADS.values():
            load.send(NOWHERE, seed)
    beginnings = {" ".join(prompt.split()[:4]) for prompt in sent.prompts}
    assert len(beginnings) == len(sent.prompts), "no 9 tokens at a beginning are the same"


def test_same_round_sends_the_same_to_every_system(sent: Sent):
    for name in ("short, 8 clients", "mixed, 8 clients", "chat, 4 clients", "burst"):
        shapes.LOADS[name].send(NOWHERE, 1)
        shapes.LOADS[name].send(NOWHERE, 1)
        half = len(sent) // 2
        assert sent[:half] == sent[half:]
        sent.clear()


@pytest.mark.parametrize("length", [36, 300, 900, 1800])
def test_prompts_have_the_stated_tokens(length: int, sent: Sent, tokens):
    found = [load for load in shapes.LOADS.values() if f"long {length}" == load.shape]
    for load in found or [shapes.LOADS["short, 8 clients"]]:
        load.send(NOWHERE, 0)
    assert {tokens(prompt) for prompt in sent.prompts} == {length}


def test_conversations_share_the_system_prompt_and_grow(sent: Sent, tokens):
    shapes.LOADS["chat, 4 clients"].send(NOWHERE, 0)
    systems = set()
    for requests in sent:
        before: list[dict[str, str]] = []
        for number, request in enumerate(requests):
            messages = request.content
            assert isinstance(messages, list)
            assert messages[: len(before)] == before, "the history does not change"
            roles = ["system", "user", *["assistant", "user"] * number]
            assert [message["role"] for message in messages] == roles
            if number:
                assert messages[-2]["content"] == f"completion {number}"
            before = messages
        systems.add(before[0]["content"])
    assert len(systems) == 1
    assert len(systems.pop().split()) - 1 == shapes.SYSTEM_WORDS


def test_each_round_has_another_system_prompt():
    assert len({shapes.system_prompt(seed)[: shapes._NUMBER] for seed in range(3)}) == 3


def test_conversation_replaces_an_empty_completion():
    client = shapes.conversation(shapes._draw("test"), "system", 2, 8)
    next(client)
    assert all(message["content"] for message in client.send("").content)


def test_longest_sequence_fits_into_the_context(sent: Sent, tokens):
    """A chat's template adds less than 10 tokens to a message, a completion has its stated ones."""
    for load in shapes.LOADS.values():
        load.send(NOWHERE, 0)
        for request in chain(*sent):
            content = request.content
            texts = [content] if isinstance(content, str) else [m["content"] for m in content]
            completions = sum(text.startswith("completion") for text in texts)
            length = sum(tokens(text) + 10 for text in texts)
            assert length + (completions + 1) * request.new_tokens <= load.context
        sent.clear()


def test_mixed_lengths_occur_equally_often(tokens):
    requests = list(chain(*shapes.mixed_requests(0, clients=8, each=3)))
    prompts = sorted(tokens(request.content) for request in requests)
    assert [(k, len(list(g))) for k, g in groupby(prompts)] == [
        (n, 24 // len(shapes.MIXED_PROMPTS)) for n in shapes.MIXED_PROMPTS
    ]
    completions = sorted(request.new_tokens for request in requests)
    assert set(completions) == set(shapes.MIXED_COMPLETIONS)


def test_bursts_arrive_together_at_the_stated_rate():
    long_run = [list(shapes.arrivals(seed)) for seed in range(200)]
    for found in long_run:
        times = [due for due, _ in found]
        assert times == sorted(times)
        sizes = sorted(len(list(group)) for _, group in groupby(times))
        assert sizes == sorted(shapes.BURSTS * (shapes.BURST_COUNT // len(shapes.BURSTS)))
    mean = sum(found[-1][0] for found in long_run) / len(long_run)
    assert mean == pytest.approx(shapes.BURST_COUNT / shapes.BURSTS_PER_SECOND, rel=0.1)


def record(**changed: dict[str, dict[str, list[float]]]) -> dict:
    """A result file of two loads with two rounds; `changed`: system -> load -> rates."""
    loads = {
        "chat, 4 clients": {"shape": "chat", "what": "a chat", "clients": 4, "requests": 20},
        "short, 1 clients": {"shape": "short", "what": "short ones", "clients": 1, "requests": 5},
    }
    rates = {"ours int8": [200.0, 300.0], "vllm": [100.0, 200.0], "llama.cpp Q8_0": [100.0, 100.0]}
    waits = {"ours int8": [0.1, 0.2], "vllm": [0.2, 0.2], "llama.cpp Q8_0": [0.5, 0.5]}
    systems = {
        name: {
            "what": f"{name}, set well",
            "loads": {
                load: {
                    "tokens_per_second": summary(rates[name]),
                    "first_token_p50": summary(waits[name]),
                    "first_token_p95": summary([2 * s for s in waits[name]]),
                }
                for load in loads
            },
        }
        for name in rates
    }
    return {"measurements": {"loads": loads, "systems": systems}}


def test_ratios_are_those_within_a_round():
    assert by_shape.ratios(record(), "vllm", "chat, 4 clients", by_shape.RATE) == [2.0, 1.5]


def test_aims_depend_on_clients_and_shape():
    found = {(a.load.split(",")[0], a.other, a.quantity): a.wanted for a in by_shape.aims(record())}
    assert found == {
        ("chat", "vllm", "tokens_per_second"): 1.3,
        ("chat", "llama.cpp Q8_0", "tokens_per_second"): 1.5,
        ("chat", "vllm", "first_token_p50"): 1.0,
        ("short", "llama.cpp Q8_0", "tokens_per_second"): 1.0,
    }


def test_tables_show_ratios_with_their_spread_and_aims():
    text = by_shape.throughput(record())
    assert "| chat, 4 clients | 250 (200 to 300) | 150 (100 to 200) | 100 (100 to 100) |" in text
    assert "**1.75** (1.50 to 2.00), aim ≥ 1.3 |" in text
    assert "| short, 1 client |" in text
    assert "| 150, 300 | 200, 400 | 500, 1,000 | **0.75** (0.50 to 1.00), aim ≤ 1 |" in (
        by_shape.first_token(record())
    )


def test_missed_aims_are_named():
    assert by_shape.missed(record()) == "All 4 aims are reached."
    slow = record()
    load = slow["measurements"]["systems"]["ours int8"]["loads"]["chat, 4 clients"]
    load["tokens_per_second"] = summary([110.0, 240.0])
    assert by_shape.missed(slow) == (
        "3 of 4 aims are reached. Missed:\n\n"
        "- chat, 4 clients: tokens per second **1.15** (1.10 to 1.20) of vLLM, bfloat16, "
        "aim at least 1.3"
    )
    assert "**1.15** (1.10 to 1.20), aim ≥ 1.3 missed" in by_shape.throughput(slow)


def test_report_has_gaps_where_a_system_was_not_measured():
    without = record()
    without["measurements"]["systems"]["vllm"] = {"what": "vLLM", "not measured": "not there"}
    assert "| 250 (200 to 300) |  | 100 (100 to 100) |  | **2.50**" in by_shape.throughput(without)
    assert "| 150, 300 |  | 500, 1,000 |  | **0.30**" in by_shape.first_token(without)
    assert by_shape.missed(without) == "All 2 aims are reached."
    assert "| vLLM, bfloat16 | not measured: not there |" in by_shape.described(without)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rate.ours.chat_4", "250"),
        ("rate_max.vllm.chat_4", "200"),
        ("first_token_ms.llama.short_1", "500"),
        ("first_token_p95_ms.ours.short_1", "300"),
        ("rate_to.vllm.chat_4", "1.75"),
        ("rate_to_min.vllm.chat_4", "1.50"),
        ("first_token_to.vllm.chat_4", "0.75"),
    ],
)
def test_values_of_the_comparison(name: str, expected: str):
    assert by_shape.value(record(), name) == expected


@pytest.mark.parametrize("name", ["rate.ours.chat_5", "rate.theirs.chat_4", "cost.ours.chat_4"])
def test_rejects_an_unknown_value(name: str):
    with pytest.raises(UserError, match="there is no value"):
        by_shape.value(record(), name)


def test_every_table_of_the_comparison_is_made_from_its_file():
    names = [name for name in tables.TABLES if name.startswith("shapes")]
    assert {tables.SOURCES.get(name, name) for name in names} == {"shapes"}


@pytest.mark.parametrize(("own", "used"), [(None, str(os.cpu_count())), ("7", "7")])
def test_llama_cpp_is_compiled_with_as_many_jobs_as_cores(
    own: str | None, used: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Its package reads LLAMA_CPP_BUILD_JOBS; without it, one compiler per file starts."""
    environments = []

    def install_peer(*_: object, **options: object) -> None:
        environments.append(dict(os.environ))
        raise UserError("only the environment matters here")

    for name in peers.build_settings():
        monkeypatch.delenv(name, raising=False)
    if own:
        monkeypatch.setenv("LLAMA_CPP_BUILD_JOBS", own)
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    monkeypatch.setattr(peers.subprocess, "run", lambda *a, **k: None)
    monkeypatch.setattr(peers, "install_peer", install_peer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", os.environ.copy())
        with pytest.raises(UserError):
            peers.install("llama.cpp")
    assert environments[0]["LLAMA_CPP_BUILD_JOBS"] == used
    assert "-DLLAMA_BUILD_TESTS=OFF" in environments[0]["CMAKE_ARGS"]


def test_vllm_preloads_the_libraries_that_are_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    openmp = tmp_path / "vllm" / "lib" / "libiomp5.so"
    allocator = tmp_path / "tcmalloc" / "usr" / "lib" / "x86_64-linux-gnu" / peers.TCMALLOC
    for path in (openmp, allocator):
        path.parent.mkdir(parents=True)
        path.touch()
    assert peers.vllm_libraries() == [allocator, openmp]
    openmp.unlink()
    assert peers.vllm_libraries() == [allocator]
