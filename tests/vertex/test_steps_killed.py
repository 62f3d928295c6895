"""`python -m deploy.vertex deploy`, and `cleanup`, are killed at every kind of point: no matter.

The points are calls that the stand-in has seen; the process gets SIGKILL milliseconds later, while
it waits for the reply, writes a line, or sleeps between two looks at an operation.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deploy.common.paths import ROOT
from deploy.vertex.deployer import cleanup, deploy, what_is_there
from standin.local import Standin
from tests.vertex.rehearsed import Rehearsed, small

pytestmark = pytest.mark.slow

POINTS = [
    "ListOperations",
    "GetEndpoint",
    "ListModelVersions",
    "UploadModel",
    "UploadModel GetOperation",
    "CreateEndpoint",
    "CreateEndpoint GetOperation",
    "CreateEndpoint GetOperation GetEndpoint",
    "DeployModel",
    "DeployModel GetOperation",
    "DeployModel GetOperation GetOperation",
    "DeployModel GetOperation GetEndpoint",
]
"""Calls that must have been seen, in this order, before the process is killed."""

SECOND = ["UploadModel", "DeployModel", "DeployModel GetOperation", "UndeployModel"]
"""The same for a deployment of another image beside one that serves."""


CLEANUP = ["UndeployModel", "UndeployModel GetOperation", "DeleteEndpoint", "DeleteModel"]
"""The same for `cleanup`."""


def kill_at(app: Rehearsed, action: list[str], point: str, folder: Path) -> None:
    """Start a command as a user does, and kill it when it has made some calls."""
    config = folder / "vertex.yaml"
    config.write_text(yaml.safe_dump(json.loads(small().model_dump_json())))
    log = app.standin.folder / "calls.jsonl"
    seen = log.stat().st_size if log.exists() else 0
    command = [sys.executable, "-m", "deploy.vertex", action[0], app.app, *action[1:]]
    command += ["--config", str(config)]
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
    waited_for = point.split()
    with log.open() as calls:
        calls.seek(seen)
        line = ""
        while waited_for:
            line += calls.readline()
            if line.endswith("\n"):  # it may be read while it is being written
                if json.loads(line)["method"] == waited_for[0]:
                    waited_for.pop(0)
                line = ""
            else:
                assert process.poll() is None, (folder / "output").read_text()
                time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, (folder / "output").read_text()


@pytest.fixture
def app(quick_standin: Standin) -> Iterator[Rehearsed]:
    rehearsed = Rehearsed(quick_standin, "killed")
    yield rehearsed
    cleanup(rehearsed.vertex(), rehearsed.app)


def nothing_is_left(app: Rehearsed) -> bool:
    """By listing everything in the region, labels or not, and by the processes on this machine."""
    vertex = app.vertex()
    found = list(what_is_there(vertex, app.app))
    found += vertex.endpoints.list_endpoints(parent=vertex.parent)
    found += vertex.models.list_models(parent=vertex.parent)
    started = {
        e["deployed_model"] for e in app.standin.events() if e["event"] == "container started"
    }
    stopped = {
        e["deployed_model"] for e in app.standin.events() if e["event"] == "container stopped"
    }
    return not found and started == stopped


@pytest.mark.parametrize("point", POINTS)
def test_cleanup_after_a_kill_leaves_nothing(app: Rehearsed, point: str, tmp_path: Path):
    kill_at(app, ["deploy", "--image", app.image("1")], point, tmp_path)
    cleanup(app.vertex(), app.app)
    assert nothing_is_left(app)


@pytest.mark.parametrize("point", POINTS)
def test_deploy_after_a_kill_takes_up_where_it_was(app: Rehearsed, point: str, tmp_path: Path):
    before = app.changes()
    kill_at(app, ["deploy", "--image", app.image("1")], point, tmp_path)
    deploy(app.vertex(), app.app, app.image("1"))
    assert app.shares() == {"1": 100} and app.answers(1) == {"1": 1}
    made = app.changes()[len(before) :]
    assert sorted(made) == ["CreateEndpoint", "DeployModel", "UploadModel"]  # nothing twice


@pytest.mark.parametrize("point", SECOND)
def test_a_second_image_after_a_kill(app: Rehearsed, point: str, tmp_path: Path):
    """The old one answers all the time; then the new one has all requests, and is alone."""
    deploy(app.vertex(), app.app, app.image("1"))
    kill_at(app, ["deploy", "--image", app.image("2")], point, tmp_path)
    assert sum(app.answers(2).values()) == 2
    deploy(app.vertex(), app.app, app.image("2"))
    assert app.shares() == {"2": 100}


@pytest.mark.parametrize("point", CLEANUP)
def test_cleanup_after_a_kill_of_cleanup(app: Rehearsed, point: str, tmp_path: Path):
    deploy(app.vertex(), app.app, app.image("1"))
    kill_at(app, ["cleanup"], point, tmp_path)
    cleanup(app.vertex(), app.app)
    assert nothing_is_left(app)
