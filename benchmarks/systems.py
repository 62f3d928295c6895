"""The systems that are compared, and how to start each, alone on the machine.

All serve SmolLM2-135M-Instruct; the precision in which they hold it is part of the comparison.
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
from benchmarks.load import Target
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
STORE = BUILD / "bench"

Command = list[str | Path]
StartServer = Callable[[], AbstractContextManager[tuple[Target, int]]]
StartEngine = Callable[[], AbstractContextManager[tuple[Engine, int]]]
"""Start a system; provide where to send requests, and the id of its first process."""


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
            return f"{peers.version_of(self.peer)} is not installed (python -m benchmarks.peers)"
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


def _ours(**engine: str | dict[str, str]) -> StartServer:
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


def _vllm() -> StartServer:
    @contextmanager
    def start() -> Iterator[tuple[Target, int]]:
        module = "vllm.entrypoints.openai.api_server"
        command: Command = [peers.python_of("vllm"), "-m", module, "--model", get_weights(APP)]
        command += ["--served-model-name", "m", "--dtype", "bfloat16", "--max-model-len", "2048"]
        command += ["--host", "127.0.0.1", "--port", str(PORT)]
        settings = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": _cores()}
        offline = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        with _process("vllm", command, settings | offline) as pid:
            yield Target(f"http://127.0.0.1:{PORT}/v1/completions", "m"), pid

    return start


def _llama(quantization: str) -> StartServer:
    @contextmanager
    def start() -> Iterator[tuple[Target, int]]:
        command: Command = [peers.llama_binary("llama-server")]
        command += ["-m", peers.gguf(quantization)]
        command += ["--host", "127.0.0.1", "--port", str(PORT), "--no-ui"]
        command += ["--threads", str(os.cpu_count()), "--parallel", "32"]
        command += ["--ctx-size", str(32 * 512), "--no-cache-prompt", "--cache-ram", "0"]
        with _process("llama.cpp", command, {}) as pid:
            url = f"http://127.0.0.1:{PORT}/v1/completions"
            yield Target(url, "m", keep_alive=False), pid

    return start


def _cores() -> str:
    return f"0-{(os.cpu_count() or 1) - 1}"


@contextmanager
def _process(name: str, command: Command, environment: dict[str, str]) -> Iterator[int]:
    """Run a server of another project from its first healthy response to the end of the block."""
    STORE.mkdir(parents=True, exist_ok=True)
    log = STORE / f"{name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with suppress(TimeoutError):
            wait_until(lambda: _healthy() or process.poll() is not None, timeout=300, interval=0.2)
        if not _healthy():
            raise UserError(f"{name} did not start:\n{log.read_text(errors='replace')[-2000:]}")
        yield process.pid
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _healthy() -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


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
    "llama.cpp Q8_0": System("llama-server, Q8_0", _llama("Q8_0"), peer="llama.cpp"),
    "llama.cpp Q4_0": System("llama-server, Q4_0", _llama("Q4_0"), peer="llama.cpp"),
}
