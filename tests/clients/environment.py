"""Install the clients of other projects into a folder of build/, once for each lock.

The main environment stays without them. If no registry can be reached, `install` says so with
`OutOfReach`, and the tests are skipped; every other failure is an error.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from deploy.common.locks import one_at_a_time
from deploy.common.paths import BUILD
from tools.setup_env import SetupError, install_peer, pip_sources

HERE = Path(__file__).parent
LOCK = HERE / "requirements.lock"
NODE = HERE / "node"
SCRIPTS = HERE / "scripts"
NODE_VERSION = 20
"""The oldest major version of Node that openai and undici support."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 120
"""The longest run of one script; they take 2 to 10 seconds on two idle cores."""


class OutOfReach(Exception):
    """A registry cannot be reached, or a program is not installed; the message names it."""


class ScriptError(Exception):
    """A script failed; the message has the end of its output."""


def python_clients() -> Path:
    """Install the Python clients; return their interpreter.

    Raises:
        OutOfReach: no connection to the package index.
        SetupError: the installation failed for another reason.
    """
    folder = _folder("python", LOCK)
    with one_at_a_time(folder):
        if not (folder / "done").exists():
            subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
            try:
                install_peer(folder / "bin" / "python", LOCK)
            except SetupError as error:
                indexes = pip_sources(Path(sys.executable))["index-url"]
                raise _reason(
                    indexes[-1] if indexes else "https://pypi.org/simple/", error
                ) from error
            (folder / "done").touch()
    return folder / "bin" / "python"


def node_clients() -> Path:
    """Install the JavaScript clients; return the folder with their packages and our scripts.

    Raises:
        OutOfReach: no connection to the registry, or Node is missing or too old.
        SetupError: the installation failed for another reason.
    """
    for program in ("node", "npm"):
        if not shutil.which(program):
            raise OutOfReach(f"{program} is not installed")
    version = _output(["node", "--version"])
    if int(version.removeprefix("v").split(".")[0]) < NODE_VERSION:
        raise OutOfReach(f"Node {version} is too old: the clients need {NODE_VERSION} or newer")
    folder = _folder("node", NODE / "package-lock.json")
    with one_at_a_time(folder):
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(NODE, folder)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if run.returncode != 0:
                error = SetupError(f"npm failed:\n{run.stderr.strip()}")
                raise _reason(_output(["npm", "config", "get", "registry"]), error) from error
            (folder / "done").touch()
        for script in SCRIPTS.glob("*.mjs"):  # Node looks for packages beside the script
            shutil.copy(script, folder)
    return folder


def browser() -> str:
    """Find Chromium.

    Raises:
        OutOfReach: it is not installed.
    """
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise OutOfReach("Chromium is not installed")


def run_script(
    command: list[str | Path], given: Any, environment: dict[str, str] | None = None
) -> Any:
    """Run a script that reads JSON from its input and prints JSON as its last line.

    Args:
        command: the program and the script.
        given: the input.
        environment: more variables.

    Raises:
        ScriptError: it failed, or printed something else.
    """
    try:
        run = subprocess.run(
            command,
            input=json.dumps(given),
            env=os.environ | (environment or {}),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        shown = (error.stderr or b"").decode(errors="replace")
        raise ScriptError(f"{command[-1]}: no end after {SECONDS} s\n{shown[-3000:]}") from error
    lines = run.stdout.strip().splitlines()
    try:
        if run.returncode == 0 and lines:
            return json.loads(lines[-1])
    except ValueError:
        pass
    shown = f"{run.stdout[-1000:]}\n{run.stderr[-4000:]}"
    raise ScriptError(f"{command[-1]}: exit status {run.returncode}\n{shown}")


def _folder(kind: str, lock: Path) -> Path:
    digest = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:12]
    return BUILD / "clients" / f"{kind}-{digest}"


def _reason(address: str, error: SetupError) -> Exception:
    """Tell a registry that is out of reach from an installation that failed."""
    try:
        httpx.get(address, timeout=15, follow_redirects=True)
    except httpx.TransportError as unreachable:
        return OutOfReach(f"{urlsplit(address).hostname} is out of reach: {unreachable}")
    return error


def _output(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
