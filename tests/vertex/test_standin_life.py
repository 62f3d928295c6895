"""Start and stop: clean-up, repeatable identifiers, and what a killed stand-in leaves behind."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import requests
from google.cloud.aiplatform.constants.base import SUPPORTED_REGIONS

from deploy.common.paths import ROOT, UserError
from deploy.common.waiting import wait_until
from standin import local
from standin.limits import REGIONS
from standin.local import Standin
from tests.vertex.conftest import SCALE
from tests.vertex.gapic import Client

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from standin.local import Standin
standin = Standin(float(sys.argv[1]), runner="process").start()
about = {"pid": standin.pid, "folder": str(standin.folder), "environment": standin.environment}
print(json.dumps(about), flush=True)
sys.stdin.read()
"""


@dataclass
class Running:
    """A program with a stand-in and a deployed model."""

    program: subprocess.Popen
    standin: int
    folder: Path
    replica: int


@pytest.fixture(scope="module")
def programs() -> Iterator[list[subprocess.Popen]]:
    """Two programs that start a stand-in, at the same time."""
    proxies = {"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(SCALE)],
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if k not in proxies},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    yield started
    for program in started:
        program.kill()
        program.communicate()


@pytest.fixture
def running(
    programs: list[subprocess.Popen], monkeypatch: pytest.MonkeyPatch, code: str
) -> Running:
    """One of the programs; this process deploys a model on its stand-in."""
    program = programs.pop()
    about = json.loads(program.stdout.readline())
    standin = Standin(runner="process")  # not started: a name for the program's
    standin.folder = Path(about["folder"])
    with monkeypatch.context() as patch:
        for name, value in about["environment"].items():
            patch.setenv(name, value)
        client = Client(standin, "rest", standin.add_image("small"), code)
        replica = int(client.predict(client.running().name)["pid"])
    return Running(program, about["pid"], standin.folder, replica)


def ended(pid: int) -> bool:
    """Return whether a process has ended, whether or not its parent has reaped it."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def wait_for_end(pid: int, seconds: float = 20) -> None:
    wait_until(lambda: ended(pid), seconds)


def test_stop_leaves_nothing_and_restores_the_environment(code):
    before = dict(os.environ)
    with Standin(SCALE, runner="process") as standin:
        client = Client(standin, "grpc", standin.add_image("small"), code)
        pid = int(client.predict(client.running().name)["pid"])
        child, folder = standin.pid, standin.folder
        assert os.environ["HTTPS_PROXY"] != before.get("HTTPS_PROXY")
    assert dict(os.environ) == before
    assert ended(pid) and ended(child) and not folder.exists()
    standin.stop()  # a second time has no effect


def test_standin_ends_with_the_program_that_started_it(running: Running):
    running.program.kill()
    running.program.wait()
    wait_for_end(running.standin)
    wait_for_end(running.replica)
    assert not running.folder.exists()


def test_next_start_removes_what_a_killed_standin_left(running: Running):
    os.kill(running.standin, signal.SIGKILL)
    wait_for_end(running.standin)
    assert not ended(running.replica)
    with Standin(SCALE, runner="process"):
        wait_for_end(running.replica, 5)
        assert not running.folder.exists()
    running.program.kill()
    running.program.wait()


def test_regions_are_those_of_the_sdk():
    assert SUPPORTED_REGIONS - {"global"} == REGIONS


def test_command_prints_environment_variables(tmp_path):
    folder = tmp_path / "kept"
    process = subprocess.Popen(
        [sys.executable, "-m", "standin", "--runner", "process", "--folder", folder],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = []
    while not lines or not lines[-1].startswith("#"):
        lines.append(process.stdout.readline().strip())
        assert lines[-1], lines
    found = dict(line.removeprefix("export ").split("=", 1) for line in lines[:-1])
    token = (folder / "token").read_text()
    region, project = found["GCP_REGION"], found["GCP_PROJECT"]
    response = requests.get(
        f"https://{region}-aiplatform.googleapis.com/v1/projects/{project}/locations/{region}/models",
        headers={"Authorization": f"Bearer {token}"},
        proxies={"https": found["HTTPS_PROXY"]},
        verify=found["REQUESTS_CA_BUNDLE"],
        timeout=10,
    )
    assert response.json() == {}
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    call = json.loads((folder / "calls.jsonl").read_text().splitlines()[-1])
    assert call["method"] == "ListModels" and call["status"] == "OK"


def test_runs_processes_if_docker_is_not_installed(monkeypatch, capsys):
    monkeypatch.setenv("DOCKER", "/no/docker")
    assert local.choose_runner(None) == "process"
    assert "models run as processes: /no/docker cannot be started" in capsys.readouterr().err
    with pytest.raises(UserError, match="/no/docker"):
        local.choose_runner("docker")
    monkeypatch.setenv("DOCKER", "/bin/true")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="docker-registry is not installed"):
        local.choose_runner("docker")
