"""Nothing that the project starts reports to anybody: no telemetry, no news, no update checks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peers
from deploy.common import cli
from deploy.common.paths import ROOT
from tools.setup_env import CUDA_LOCK, LOCK, locked_blocks

pytestmark = pytest.mark.slow

SPY = '''
import os, sys

def note(event, arguments):
    """Write down every address that this process connects to and every name that it looks up."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if host not in ("127.0.0.1", "::1", "localhost", None):
        with open(os.environ["SPY_LOG"], "a") as log:
            log.write(f"{sys.argv} {event} {host}\\n")

sys.addaudithook(note)
'''


@pytest.fixture
def spied(tmp_path: Path) -> dict[str, str]:
    """Variables for a process with an empty home; it and its children report their connections."""
    (tmp_path / "spy").mkdir()
    (tmp_path / "spy" / "sitecustomize.py").write_text(SPY)
    (tmp_path / "home").mkdir()
    # CI: openvino-telemetry and others are silent there, on a user's machine they are not.
    unwanted = ("CI", "HF_HUB_OFFLINE", "HF_HOME", "DO_NOT_TRACK", "XDG_CACHE_HOME", "TMPDIR")
    kept = {k: v for k, v in os.environ.items() if k not in unwanted}
    return kept | {
        "HOME": str(tmp_path / "home"),
        "PYTHONPATH": f"{tmp_path / 'spy'}:{ROOT}",
        "SPY_LOG": str(tmp_path / "connections"),
    }


def connections(spied: dict[str, str]) -> str:
    log = Path(spied["SPY_LOG"])
    return log.read_text() if log.exists() else ""


def run(spied: dict[str, str], code: str, *arguments: object) -> None:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    subprocess.run(command, env=spied, cwd=ROOT, check=True, timeout=300)


def test_spy_sees_a_connection(spied: dict[str, str]):
    run(spied, "import socket\nsocket.socket().connect_ex(('192.0.2.1', 9)) if 0 else None")
    assert not connections(spied)
    code = "import socket\ns = socket.socket(); s.settimeout(0.1); s.connect_ex(('192.0.2.1', 9))"
    run(spied, code)
    assert "192.0.2.1" in connections(spied)


@pytest.mark.parametrize("modules", ["openvino, openvino_genai, nncf", "transformers, torch"])
def test_imports_of_an_engine_report_nothing(spied: dict[str, str], modules: str):
    run(spied, f"import {modules}, sys\nassert 'openvino_telemetry' not in sys.modules")
    assert connections(spied) == ""
    assert not [p for p in Path(spied["HOME"]).rglob("*") if p.is_file()]


def test_export_reports_nothing(spied: dict[str, str], tiny_llama: Path, tmp_path: Path):
    """The whole path of `make archive`: tracing, merging, quantizing and packing."""
    code = """
import sys
from pathlib import Path
from deploy.archive.export import export
from handler.config import engine_config
export(Path(sys.argv[1]), engine_config(), Path(sys.argv[2]))
"""
    run(spied, code, tiny_llama, tmp_path / "cache")
    assert connections(spied) == ""
    ids = [p for p in Path(spied["HOME"]).rglob("*") if p.is_file()]
    assert not ids, ids


def test_analytics_packages_are_not_in_any_lock():
    for lock in (LOCK, CUDA_LOCK, *(ROOT / "docker" / "locks").iterdir(), *peers.LOCKS.values()):
        assert "openvino-telemetry" not in locked_blocks(lock.read_text()), lock


def test_commands_ask_libraries_not_to_track(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    app = cli.app("A program.")
    seen = []
    app.command()(lambda: seen.append(os.environ.get("DO_NOT_TRACK")))
    assert cli.run(app, "x", []) == 0
    assert seen == ["1"]


def test_lab_fetches_no_news_and_looks_for_no_update(spied: dict[str, str]):
    recipe = subprocess.run(["make", "-n", "lab"], cwd=ROOT, capture_output=True, text=True).stdout
    flags = [word for word in recipe.split() if word.startswith("--LabApp.")]
    code = """
import sys
from jupyterlab.labapp import LabApp
from jupyterlab.handlers.announcements import NeverCheckForUpdate
app = LabApp()
app.parse_command_line(sys.argv[1:])
assert app.news_url is None, app.news_url
assert app.check_for_updates_class is NeverCheckForUpdate
"""
    run(spied, code, *flags)


def test_peers_are_installed_with_hashes():
    for peer, lock in peers.LOCKS.items():
        blocks = locked_blocks(lock.read_text())
        assert peers.version_of(peer).split("==")[0] in blocks
        assert all("--hash=sha256:" in block for block in blocks.values()), peer
        assert not {"torchvision", "torchaudio", "torchcodec"} & set(blocks)
