"""Start and stop: what is left, what is repeated, what an end without order leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import requests

from deploy.common.paths import ROOT, UserError
from standin import local
from standin.local import Standin
from standin.services.lists import page
from standin.services.names import Identifiers
from tests.vertex.gapic import Client

pytestmark = pytest.mark.slow

RUN = """
import sys
from standin.local import Standin
from tests.vertex.gapic import Client
standin = Standin(0.01, runner="process").start()
client = Client(standin, "grpc", standin.add_image("small"), sys.argv[1])
endpoint = client.running()
pid = int(client.ask(endpoint.name)["pid"])
print(standin.pid, standin.folder, pid, endpoint.name, flush=True)
sys.stdin.read()
"""


def start(code: str) -> tuple[subprocess.Popen, list[str]]:
    """A program with a stand-in and a deployed model; what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, code],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if k not in local_names()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    return process, process.stdout.readline().split()


def local_names() -> set[str]:
    """Variables of a stand-in of this process, which another one must not inherit."""
    return {"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"}


def gone(pid: int, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def test_stop_leaves_nothing_and_restores_the_environment(code):
    before = dict(os.environ)
    with Standin(0.01, runner="process") as standin:
        client = Client(standin, "grpc", standin.add_image("small"), code)
        pid = int(client.ask(client.running().name)["pid"])
        child, folder = standin.pid, standin.folder
        assert os.environ["HTTPS_PROXY"] != before.get("HTTPS_PROXY")
    assert dict(os.environ) == before
    assert gone(pid, 0) and gone(child, 0) and not folder.exists()
    standin.stop()  # twice is fine


def test_the_stand_in_ends_with_the_program_that_started_it(code):
    process, (child, folder, replica, _) = start(code)
    process.kill()
    process.wait()
    assert gone(int(child)) and gone(int(replica)) and not os.path.exists(folder)  # noqa: PTH110


def test_the_next_start_removes_what_a_killed_one_left(code):
    process, (child, folder, replica, _) = start(code)
    os.kill(int(child), signal.SIGKILL)
    assert gone(int(child)) and psutil.pid_exists(int(replica))
    with Standin(runner="process"):
        assert gone(int(replica), 5) and not os.path.exists(folder)  # noqa: PTH110
    process.kill()
    process.wait()


def test_the_same_seed_gives_the_same_identifiers():
    first, again, other = Identifiers(1), Identifiers(1), Identifiers(2)
    assert [first() for _ in range(3)] == [again() for _ in range(3)] != [other() for _ in range(3)]
    assert len(first()) == 19


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pages_hold_everything_once(size):
    items, token, found = list(range(7)), "", []
    while True:
        part, token = page(items, size, token)
        found += part
        if not token:
            break
    assert found == items


def test_the_command_prints_what_leads_to_it(tmp_path):
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
    reply = requests.get(
        f"https://{region}-aiplatform.googleapis.com/v1/projects/{project}/locations/{region}/models",
        headers={"Authorization": f"Bearer {token}"},
        proxies={"https": found["HTTPS_PROXY"]},
        verify=found["REQUESTS_CA_BUNDLE"],
        timeout=10,
    )
    assert reply.json() == {}
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    call = json.loads((folder / "calls.jsonl").read_text().splitlines()[-1])
    assert call["method"] == "ListModels" and call["status"] == "OK"


def test_docker_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setenv("DOCKER", "/no/docker")
    assert local.choose_runner(None) == "process"
    assert "models run as processes: /no/docker cannot be started" in capsys.readouterr().err
    with pytest.raises(UserError, match="/no/docker"):
        local.choose_runner("docker")
    monkeypatch.setenv("DOCKER", "/bin/true")
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="docker-registry is not installed"):
        local.choose_runner("docker")
