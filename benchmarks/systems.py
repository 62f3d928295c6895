"""The systems that are compared, and how to start each, alone on the machine.

All serve SmolLM2-135M-Instruct; the precision in which they hold it is part of the comparison.
`SYSTEMS` are those of `benchmarks.serving`, `SHAPED` those of `benchmarks.compare`.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks import peers
from benchmarks.load import Target, openai_target
from deploy.archive.build import build_archive, model_config
from deploy.archive.export import export
from deploy.archive.pack import pack
from deploy.common.paths import BUILD, UserError
from deploy.common.waiting import wait_until
from deploy.torchserve.server import Server
from deploy.weights.fetch import get_weights
from deploy.weights.folder import weight_files
from handler.engine import Engine, create_engine

APP = "smollm2-135m"
PORT = 7300
BASE_URL = f"http://127.0.0.1:{PORT}/v1"
STORE = BUILD / "bench"

Command = list[str | Path]
StartServer = Callable[[], AbstractContextManager[tuple[Target, int]]]
StartEngine = Callable[[], AbstractContextManager[tuple[Engine, int]]]
"""Start a system; provide where to send requests, and the id of its first process."""
StartShaped = Callable[[int, int], AbstractContextManager[tuple[Target, int]]]
"""The same for a number of sequences and a context of each."""


@dataclass(frozen=True)
class System:
    """One row of the comparison.

    `peer` names the environment of `benchmarks.peers` it needs. `most_clients` is low for systems
    that take requests one by one, where more clients would take an hour. `streams`: whether it has
    a first token to time.
    """

    what: str
    start: StartServer | StartEngine
    peer: str = ""
    most_clients: int = 32
    streams: bool = True

    def missing(self) -> str | None:
        """Say why it cannot be measured here, if so."""
        if self.peer and not peers.installed(self.peer):
            return f"{peers.version_of(self.peer)} is not installed (make bench-peers)"
        return None


def _direct(precision: str) -> StartEngine:
    """Run the engine in this process: no TorchServe, no HTTP, no JSON."""

    @contextmanager
    def start() -> Iterator[tuple[Engine, int]]:
        weights = get_weights(APP)
        _, config = model_config(
            APP, weights, {"name": "openvino", "openvino": {"precision": precision}}
        )
        engine = create_engine(export(weights, config), config)
        yield engine, os.getpid()

    return start


def _ours(**engine: str | dict[str, object]) -> StartServer:
    """Serve our handler with TorchServe."""

    @contextmanager
    def start() -> Iterator[tuple[Target, int]]:
        archive = build_archive(APP, get_weights(APP), engine=engine, store=STORE)
        with Server(archive, port=PORT) as server:
            yield Target(server.url), server.process.pid

    return start


def _baseline(name: str, **config: str | int) -> StartServer:
    """Serve the baseline handler with TorchServe."""

    @contextmanager
    def start() -> Iterator[tuple[Target, int]]:
        workers = {"minWorkers": 1, "maxWorkers": 1, "responseTimeout": 600}
        entry = Path(__file__).with_name("baseline_handler.py")
        files = weight_files(get_weights(APP))
        archive = pack(name, entry, workers | config, files, store=STORE)
        with Server(archive, port=PORT) as server:
            yield Target(server.url), server.process.pid

    return start


def _vllm(*, preload: bool = False) -> StartServer:
    """Serve with vLLM's own server; `preload` puts in the libraries that its log asks for."""

    @contextmanager
    def start() -> Iterator[tuple[Target, int]]:
        module = "vllm.entrypoints.openai.api_server"
        command: Command = [peers.python_of("vllm"), "-m", module, "--model", get_weights(APP)]
        command += ["--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "2048"]
        command += ["--host", "127.0.0.1", "--port", str(PORT)]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": _cores()}
        offline = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        if preload:
            settings["LD_PRELOAD"] = ":".join(map(str, peers.vllm_libraries()))
        with other_server("vllm", command, os.environ | settings | offline) as pid:
            yield openai_target(BASE_URL, "m"), pid

    return start


def _llama(quantization: str, options: Command) -> StartServer:
    @contextmanager
    def start() -> Iterator[tuple[Target, int]]:
        command: Command = [peers.llama_binary("llama-server")]
        command += ["-m", peers.gguf(quantization)]
        command += ["--host", "127.0.0.1", "--port", str(PORT), "--no-ui"]
        command += ["--threads", str(os.cpu_count()), *options]
        with other_server("llama.cpp", command, dict(os.environ)) as pid:
            yield openai_target(BASE_URL, "m", keep_alive=False), pid

    return start


def _slots(quantization: str, *options: str) -> StartShaped:
    """Start llama-server with a slot for each client, each with the context of the clients'."""

    def start(slots: int, context: int) -> AbstractContextManager[tuple[Target, int]]:
        size = ["--parallel", str(slots), "--ctx-size", str(slots * context)]
        return _llama(quantization, [*size, *options])()

    return start


def _cores() -> str:
    return f"0-{(os.cpu_count() or 1) - 1}"


@contextmanager
def other_server(
    name: str, command: Command, environment: dict[str, str], port: int = PORT
) -> Iterator[int]:
    """Run a server of another project from its first healthy response to the end of the block.

    Args:
        name: of its log.
        command: what starts it.
        environment: the whole environment of the process.
        port: where it answers `/health`.

    Yields:
        The id of the process.

    Raises:
        UserError: it did not start; the message has the end of its log.
    """
    STORE.mkdir(parents=True, exist_ok=True)
    log = STORE / f"{name}.log"

    def healthy() -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        return False

    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with suppress(TimeoutError):
            wait_until(lambda: healthy() or process.poll() is not None, timeout=300, interval=0.2)
        if not healthy():
            raise UserError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        yield process.pid
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


LLAMA_32: Command = ["--parallel", "32", "--ctx-size", str(32 * 512)]
LLAMA_32 += ["--no-cache-prompt", "--cache-ram", "0"]

OURS_INT8 = _ours(name="openvino")
DIRECT_INT8 = _direct("int8")

SYSTEMS = {
    "baseline": System(
        "baseline handler: TorchServe + generate, float32, one request at a time",
        _baseline("baseline", dtype="float32", batchSize=1),
        most_clients=8,
        streams=False,
    ),
    "batched": System(
        "baseline handler with TorchServe's dynamic batching, bfloat16",
        _baseline("batched", dtype="bfloat16", batchSize=32, maxBatchDelay=50),
        streams=False,
    ),
    "ours transformers": System(
        "our handler, engine transformers, bfloat16",
        _ours(name="transformers", transformers={"dtype": "bfloat16"}),
    ),
    "ours int8": System("our handler, engine openvino, int8", OURS_INT8),
    "ours int4": System(
        "our handler, engine openvino, int4", _ours(name="openvino", openvino={"precision": "int4"})
    ),
    "direct int8": System("the engine of `ours int8`, in-process", DIRECT_INT8, streams=False),
    "direct int4": System("the engine of `ours int4`, in-process", _direct("int4"), streams=False),
    "vllm": System("vLLM on the CPU, bfloat16", _vllm(), peer="vllm"),
    "llama.cpp Q8_0": System(
        "llama-server, Q8_0, 32 slots", _llama("Q8_0", LLAMA_32), peer="llama.cpp"
    ),
    "llama.cpp Q4_0": System(
        "llama-server, Q4_0, 32 slots", _llama("Q4_0", LLAMA_32), peer="llama.cpp"
    ),
}


@dataclass(frozen=True)
class Shaped:
    """One column of the comparison by shape. All are reached through OpenAI's API.

    `start` takes how many sequences the server should hold at once and the context of each.
    `by_slots`: whether it has to start anew for another number; the others start once.
    """

    what: str
    start: StartShaped
    peer: str = ""
    by_slots: bool = False

    def missing(self) -> str | None:
        """Say why it cannot be measured here, if so."""
        if self.peer and not peers.installed(self.peer):
            return f"{peers.version_of(self.peer)} is not installed (make bench-peers)"
        return None


def _ours_shaped(**engine: str | dict[str, object]) -> StartShaped:
    @contextmanager
    def start(slots: int, context: int) -> Iterator[tuple[Target, int]]:
        with _ours(name="openvino", **engine)() as (_, pid):
            yield openai_target(BASE_URL, APP), pid

    return start


def _once(start_server: StartServer) -> StartShaped:
    """Start a server that needs no number of sequences."""
    return lambda slots, context: start_server()


SHAPED = {
    "ours int8": Shaped("our handler, engine openvino, int8, as shipped", _ours_shaped()),
    "vllm": Shaped(
        "vLLM on the CPU, bfloat16, its defaults (prefix caching on), preloaded: "
        + (", ".join(path.name for path in peers.vllm_libraries()) or "nothing"),
        _once(_vllm(preload=True)),
        peer="vllm",
    ),
    "llama.cpp Q8_0": Shaped(
        "llama-server, Q8_0, as many slots as clients, its defaults (prompt cache on)",
        _slots("Q8_0"),
        peer="llama.cpp",
        by_slots=True,
    ),
}
"""The columns of the comparison by shape: each system with the settings that were best for it."""

VARIANTS = {
    "ours int8, no prefix cache": Shaped(
        "our handler without prefix caching",
        _ours_shaped(openvino={"prefix_caching": False}),
    ),
    "vllm, nothing preloaded": Shaped(
        "vLLM without preloaded libraries",
        _once(_vllm()),
        peer="vllm",
    ),
    "llama.cpp Q8_0, unified KV": Shaped(
        "llama-server, as many slots as clients, one cache for all of them",
        _slots("Q8_0", "--kv-unified"),
        peer="llama.cpp",
        by_slots=True,
    ),
    "llama.cpp Q8_0, its slots": Shaped(
        "llama-server with its own number of slots",
        _once(_llama("Q8_0", ["--ctx-size", "8192"])),
        peer="llama.cpp",
    ),
    "llama.cpp Q8_0, no prompt cache": Shaped(
        "llama-server, as many slots as clients, without its prompt cache",
        _slots("Q8_0", "--no-cache-prompt", "--cache-ram", "0"),
        peer="llama.cpp",
        by_slots=True,
    ),
}
"""Other settings of the same systems, measured to choose those of SHAPED (LOG.md)."""
