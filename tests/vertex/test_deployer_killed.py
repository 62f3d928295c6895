"""`deploy` and `cleanup` are killed at every kind of point, and the next run continues.

The points are requests that the stand-in received. The process gets its signal milliseconds later,
while it waits for the response, writes a line, or sleeps between two looks at an operation. The
signal is SIGKILL, or that of Ctrl-C.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from standin.local import Standin
from tests.vertex.preloaded import Preloaded
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
    "CreateEndpoint GetOperation GetOperation",
    "DeployModel",
    "DeployModel GetOperation",
    "DeployModel GetOperation GetOperation",
    "DeployModel GetOperation GetOperation GetOperation",
]
"""Methods that the stand-in must have received, in this order, before the process is killed."""

SECOND = ["UploadModel", "DeployModel", "DeployModel GetOperation", "UndeployModel"]
"""The same for a deployment of another image beside one that serves."""

INTERRUPTED = ["ListModelVersions", "UploadModel", "CreateEndpoint GetOperation", *SECOND[1:3]]
"""Five of the points, for Ctrl-C."""

CLEANUP = ["UndeployModel", "UndeployModel GetOperation", "DeleteEndpoint", "DeleteModel"]
"""The same for `cleanup`."""


@pytest.fixture(scope="module")
def preloaded(quick_standin: Standin) -> Iterator[Preloaded]:
    with Preloaded() as preloaded:
        yield preloaded


class Killer:
    """Starts commands as a user does, and kills them.

    Args:
        standin: where the requests arrive.
        preloaded: starts the processes.
        folder: for the settings and the output.
    """

    def __init__(self, standin: Standin, preloaded: Preloaded, folder: Path) -> None:
        self.standin, self.preloaded = standin, preloaded
        self.config, self.output = folder / "vertex.yaml", folder / "output"
        self.config.write_text(yaml.safe_dump(json.loads(small().model_dump_json())))

    def kill_at(self, point: str, *command: str, by: signal.Signals = signal.SIGKILL) -> int:
        """Start a command, and send it a signal when it has sent some requests.

        Returns:
            Its exit status, or minus the signal.
        """
        log = self.standin.folder / "calls.jsonl"
        seen = log.stat().st_size if log.exists() else 0
        arguments = [*command, "--config", str(self.config)]
        process = self.preloaded.start(arguments, self.output)
        waited_for = point.split()
        deadline = time.monotonic() + 120
        with log.open() as calls:
            calls.seek(seen)
            line = ""
            while waited_for:
                assert time.monotonic() < deadline, self.output.read_text()
                line += calls.readline()
                if line.endswith("\n"):  # it may be read while it is being written
                    if json.loads(line)["method"] == waited_for[0]:
                        waited_for.pop(0)
                    line = ""
                else:
                    time.sleep(0.001)
        os.kill(process, by)
        status = self.preloaded.wait()
        assert by != signal.SIGKILL or status == -by, self.output.read_text()
        return status


@pytest.fixture
def killer(quick_standin: Standin, preloaded: Preloaded, tmp_path: Path) -> Killer:
    return Killer(quick_standin, preloaded, tmp_path)


@pytest.fixture
def app(quick_standin: Standin) -> Iterator[Rehearsed]:
    rehearsed = Rehearsed(quick_standin, "killed")
    yield rehearsed
    rehearsed.deployer().cleanup()


def nothing_is_left(app: Rehearsed) -> bool:
    """Whether the region is empty, labels or not, and no replica's process is left."""
    deployer = app.deployer()
    found = [
        *deployer.resources(),
        *deployer.endpoints.list_endpoints(parent=deployer.parent),
        *deployer.models.list_models(parent=deployer.parent),
    ]
    events = app.standin.events()
    started, stopped = (
        {event["deployed_model"] for event in events if event["event"] == f"container {end}"}
        for end in ("started", "stopped")
    )
    return not found and started == stopped


@pytest.mark.parametrize("point", POINTS)
def test_cleanup_after_a_killed_deploy_leaves_nothing(app: Rehearsed, killer: Killer, point: str):
    killer.kill_at(point, "deploy", app.app, "--image", app.image("1"))
    app.deployer().cleanup()
    assert nothing_is_left(app)


@pytest.mark.parametrize("point", POINTS)
def test_deploy_continues_a_killed_deploy(app: Rehearsed, killer: Killer, point: str):
    before = app.changes()
    killer.kill_at(point, "deploy", app.app, "--image", app.image("1"))
    app.deploy("1")
    assert app.shares() == {"1": 100} and app.answers(1) == {"1": 1}
    made = app.changes()[len(before) :]
    assert sorted(made) == ["CreateEndpoint", "DeployModel", "UploadModel"]  # nothing twice


@pytest.mark.parametrize("point", INTERRUPTED)
def test_ctrl_c_in_a_deployment_says_how_to_clean_up(app: Rehearsed, killer: Killer, point: str):
    """It cannot stop what has begun at Google, so the message has the command that does."""
    given = "deploy", app.app, "--image", app.image("1")
    status = killer.kill_at(point, *given, by=signal.SIGINT)
    output = killer.output.read_text()
    assert status == 130 and "Traceback" not in output, output
    assert "This does not stop Google" in output
    assert f"python -m deploy.vertex cleanup {app.app} --project" in output
    app.deployer().cleanup()
    assert nothing_is_left(app)


@pytest.mark.parametrize("point", SECOND)
def test_deploy_continues_a_killed_deploy_of_a_second_image(
    app: Rehearsed, killer: Killer, point: str
):
    """The old version serves all the time. Then the new one gets all requests, and is alone."""
    app.deploy("1")
    killer.kill_at(point, "deploy", app.app, "--image", app.image("2"))
    assert sum(app.answers(2).values()) == 2
    app.deploy("2")
    assert app.shares() == {"2": 100}


@pytest.mark.parametrize("point", CLEANUP)
def test_cleanup_continues_a_killed_cleanup(app: Rehearsed, killer: Killer, point: str):
    app.deploy("1")
    killer.kill_at(point, "cleanup", app.app)
    app.deployer().cleanup()
    assert nothing_is_left(app)
