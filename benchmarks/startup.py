"""From an archive to READY: how long a start takes beside loading the engine alone, and memory.

    python -m benchmarks.startup        # six minutes

"Engine alone" is a new process that imports the engine, loads the archive's model and warms up.
The server is everything until the management API reports READY: Java, the worker, TorchServe's
imports, the same load. Memory is that of all its processes, before and after serving 32 clients.
"""

import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.load import Target, closed_loop
from benchmarks.record import memory, summary, write
from benchmarks.systems import APP, PORT, STORE
from deploy.archive.build import build_archive
from deploy.common import cli
from deploy.common.paths import UserError
from deploy.torchserve.server import Server
from deploy.weights.fetch import get_weights

ROUNDS = 5
ENGINES = ("openvino", "transformers")

LOAD = """
import sys
from pathlib import Path
import yaml
from handler.config import parse_app
from handler.engine import create_engine
folder = Path(sys.argv[1])
config = yaml.safe_load((folder / "model-config.yaml").read_text())
create_engine(folder / "weights", parse_app(config, "model-config.yaml").engine)
"""


def engine_seconds(archive: Path) -> float:
    """Time a new process from its start to a loaded engine."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", LOAD, archive], check=True, capture_output=True)
    return time.perf_counter() - began


def measure(name: str) -> dict[str, float]:
    """Measure one start of each kind, and the server's memory in MB."""
    archive = build_archive(APP, get_weights(APP), engine={"name": name}, store=STORE)
    alone = engine_seconds(archive)
    began = time.perf_counter()
    with Server(archive, port=PORT) as server:
        ready = time.perf_counter() - began
        loaded = memory(server.process.pid) / 1e6
        report = closed_loop(Target(server.url), clients=32, requests_each=1, seed=0, warm_up=0)
        if report.errors:
            raise UserError(f"requests failed: {report.errors}")
        served = memory(server.process.pid) / 1e6
    return {
        "engine_seconds": alone,
        "ready_seconds": ready,
        "ready_to_engine": ready / alone,
        "loaded_mb": loaded,
        "served_mb": served,
    }


app = cli.app(__doc__)


@app.command()
def main() -> None:
    """Measure, and write results/startup.json."""
    values: dict[str, dict[str, list[float]]] = {name: {} for name in ENGINES}
    for round_index in tqdm(range(ROUNDS + 1), unit="round"):
        for name in ENGINES:
            for quantity, value in measure(name).items():
                if round_index:  # the first round is the warm-up: files come from the disk
                    values[name].setdefault(quantity, []).append(value)
    measured = {name: {q: summary(v) for q, v in found.items()} for name, found in values.items()}
    print(write("startup", measured, ["torch", "torchserve", "openvino", "openvino-genai"]).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.startup"))
