"""The life of a deployment on the stand-in: twice the same, canary, rollback, failures, cleanup."""

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.api_core import exceptions as errors
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import types

from deploy.common.paths import ROOT, UserError
from deploy.common.ports import can_connect, free_port
from deploy.vertex import commands, deployer
from deploy.vertex.deployer import cleanup, deploy, rollback, timeline, undeploy, what_is_there
from deploy.vertex.resources import within
from standin.local import Standin
from tests.vertex.rehearsed import BODY, Rehearsed, small

pytestmark = pytest.mark.slow


@pytest.fixture
def app(quick_standin: Standin, request: pytest.FixtureRequest) -> Iterator[Rehearsed]:
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:30]
    rehearsed = Rehearsed(quick_standin, name.strip("-"))
    yield rehearsed
    cleanup(rehearsed.vertex(), rehearsed.app)
    assert list(what_is_there(rehearsed.vertex(), rehearsed.app)) == []


def test_a_second_deploy_changes_nothing(app: Rehearsed):
    vertex = app.vertex()
    deploy(vertex, app.app, app.image())
    assert app.shares() == {"1": 100}
    before = app.changes()
    app.lines.clear()
    deploy(vertex, app.app, app.image())
    assert app.changes() == before
    assert app.lines == [f"{app.app} is deployed like this already: nothing to do"]


def test_all_three_ways_of_asking(app: Rehearsed):
    app.deploy()
    answers = commands.ask(app.vertex(), app.app, BODY)
    assert list(answers) == ["predict", "raw_predict", "stream_raw_predict"]
    assert [one["instance"] for one in answers["predict"]] == ["a", "b"]
    assert answers["raw_predict"]["predictions"] == answers["predict"]
    assert len(answers["stream_raw_predict"]) == 1


def test_an_error_of_the_server_is_shown(app: Rehearsed):
    app.deploy()
    with pytest.raises(UserError, match=r"predict: .*400.*as asked"):
        commands.ask(app.vertex(), app.app, {"instances": ["a"], "parameters": {"status": 400}})


def test_another_image_takes_over_and_the_old_one_stops_billing(app: Rehearsed):
    app.deploy("1")
    app.deploy("2")
    assert app.shares() == {"2": 100}
    assert app.answers(5) == {"2": 5}


def test_other_machines_are_another_deployment_of_the_same_version(app: Rehearsed):
    app.deploy()
    app.deploy(min_replicas=2, max_replicas=2)
    assert app.shares() == {"1": 100}
    (deployed,) = aiplatform.Endpoint(small().endpoint_name(app.app)).list_models()
    assert deployed.dedicated_resources.min_replica_count == 2


def test_other_settings_of_the_container_are_another_version(app: Rehearsed):
    app.deploy()
    app.deploy(environment={"NAME": "two"})
    assert app.shares() == {"2": 100}
    answer = commands.ask(app.vertex(), app.app, BODY)["predict"][0]
    assert answer["name"] == "two"


@pytest.mark.parametrize(
    "setting",
    [
        {"environment": {"NAME": "two"}},
        {"args": ["unused"]},
        {"startup_probe": ["true"]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_a_setting_of_the_container_is_taken_away_again(app: Rehearsed, setting):
    app.deploy(**setting)
    app.deploy()
    assert app.shares() == {"2": 100}
    app.deploy(**setting)
    assert app.shares() == {"1": 100}


def test_what_the_service_fills_in_is_no_difference():
    spec = types.ModelContainerSpec
    probe = {"exec_": {"command": ["true"]}, "period_seconds": 10}
    filled = {"health_probe": {"period_seconds": 10}, "grpc_ports": [{"container_port": 8500}]}
    default = {"startup_probe": {"period_seconds": 10, "failure_threshold": 3}}
    assert within(spec(image_uri="a"), spec(image_uri="a", **filled | default))
    assert within(
        spec(startup_probe=probe), spec(startup_probe=probe | {"success_threshold": 1}, **filled)
    )
    assert not within(spec(image_uri="a"), spec(image_uri="a", command=["x"]))
    assert not within(spec(image_uri="a"), spec(image_uri="a", startup_probe=probe))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ({"spot": True}, {}),
        ({}, {"spot": True}),
        (
            {"machine_spec": {"accelerator_type": "NVIDIA_TESLA_T4", "accelerator_count": 1}},
            {"machine_spec": {}},
        ),
    ],
)
def test_machines_that_lose_or_gain_a_setting_are_others(before, now):
    dedicated = {"min_replica_count": 1}
    before = types.DedicatedResources(dedicated | before)
    assert not within(types.DedicatedResources(dedicated | now), before)


def test_another_folder_in_cloud_storage_is_another_version(app: Rehearsed):
    app.deploy()
    for _ in range(2):
        app.deploy(artifact_uri="gs://bucket/folder")
    assert app.shares() == {"2": 100}
    answer = commands.ask(app.vertex(), app.app, BODY)["predict"][0]
    assert answer["env"]["AIP_STORAGE_URI"] == "gs://bucket/folder"
    app.deploy()
    assert app.shares() == {"1": 100}


@pytest.fixture
def buckets(monkeypatch, tmp_path) -> Iterator[Path]:
    """A folder that a small Cloud Storage serves, with an archive in gs://artifacts/folder."""
    archive = tmp_path / "artifacts" / "folder" / "app"
    archive.mkdir(parents=True)
    (archive / "weights").write_text("first")
    port = free_port()
    server = ROOT / "tests" / "container" / "gcs_server.py"
    process = subprocess.Popen([sys.executable, server, tmp_path, str(port)])
    deadline = time.monotonic() + 20
    while not can_connect(port):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield tmp_path
    process.kill()
    process.wait()


def test_another_archive_in_the_same_folder_is_another_version(app: Rehearsed, buckets: Path):
    uri = "gs://artifacts/folder"
    for _ in range(2):
        app.deploy(artifact_uri=uri)
    assert app.shares() == {"1": 100}
    (buckets / "artifacts" / "folder" / "app" / "weights").write_text("other")
    app.deploy(artifact_uri=uri)
    assert app.shares() == {"2": 100}
    (buckets / "artifacts" / "folder" / "app" / "weights").write_text("first")
    app.deploy(artifact_uri=uri)
    assert app.shares() == {"1": 100}


def test_a_folder_with_nothing_to_serve_is_refused_before_anything_is_made(app, buckets):
    before = app.changes()
    with pytest.raises(UserError, match="artifact_uri: gs://artifacts/fold given, and there is no"):
        app.deploy(artifact_uri="gs://artifacts/fold")
    with pytest.raises(UserError, match=r"artifact_uri: gs://unknown/a cannot be listed: 404 "):
        app.deploy(artifact_uri="gs://unknown/a")
    assert app.changes() == before


def test_a_canary_gets_its_share_and_is_promoted(app: Rehearsed):
    app.deploy("1")
    app.deploy("2", canary=20)
    assert app.shares() == {"1": 80, "2": 20}
    seen = app.answers(100)
    # 20 of 100 by chance: outside of 6 to 38 less than once in 10,000 runs
    assert sum(seen.values()) == 100 and 6 <= seen["2"] <= 38
    before = app.changes()
    app.deploy("2", canary=20)
    assert app.changes() == before
    app.deploy("2", canary=50)
    assert app.shares() == {"1": 50, "2": 50}
    app.deploy("2")
    assert app.shares() == {"2": 100}


def test_rollback_of_a_canary_and_of_a_full_deployment(app: Rehearsed):
    app.deploy("1")
    with pytest.raises(UserError, match=r"version 1 of .* is the first"):
        rollback(app.vertex(), app.app)
    app.deploy("2", canary=20)
    rollback(app.vertex(), app.app)
    assert app.shares() == {"1": 100}
    app.deploy("2")
    rollback(app.vertex(), app.app)
    assert app.shares() == {"1": 100} and app.answers(3) == {"1": 3}
    uploads = app.changes().count("UploadModel")
    app.deploy("2")
    assert app.shares() == {"2": 100} and app.changes().count("UploadModel") == uploads


def test_rollback_goes_to_what_served_before_whatever_its_number(app: Rehearsed):
    """A, B, A: version 1 serves after version 2."""
    app.deploy("1")
    app.deploy("2")
    app.deploy("1")
    app.deploy("1", max_replicas=2)  # on other machines: still after version 2
    assert app.shares() == {"1": 100}
    rollback(app.vertex(), app.app)
    assert app.shares() == {"2": 100}
    rollback(app.vertex(), app.app)
    assert app.shares() == {"1": 100}
    with pytest.raises(UserError, match=r"version 1 of .* is the first, as far as is known here"):
        rollback(app.vertex(), app.app)


def test_rollback_of_an_old_version_as_canary(app: Rehearsed):
    app.deploy("1")
    app.deploy("2")
    app.deploy("1", canary=20)
    assert app.shares() == {"1": 20, "2": 80}
    rollback(app.vertex(), app.app)
    assert app.shares() == {"2": 100}
    app.deploy("1", canary=90)  # also of one that has most by now
    rollback(app.vertex(), app.app)
    assert app.shares() == {"2": 100}


def test_rollback_of_other_machines_as_canary(app: Rehearsed):
    app.deploy()
    app.deploy(canary=20, max_replicas=2)
    rollback(app.vertex(), app.app)
    (deployed,) = aiplatform.Endpoint(small().endpoint_name(app.app)).list_models()
    assert deployed.dedicated_resources.max_replica_count == 1


def test_rollback_that_was_cut_off_is_taken_up(app: Rehearsed, monkeypatch):
    """The version that comes back is deployed last: it is not taken for a canary."""
    app.deploy("1")
    app.deploy("2")
    with monkeypatch.context() as patched:
        patched.setattr(deployer, "undeploy_model", cut_off)
        with pytest.raises(KeyboardInterrupt):
            rollback(app.vertex(), app.app)
    assert app.shares() == {"1": 100, "2": 0}
    rollback(app.vertex(), app.app)
    assert app.shares() == {"1": 100}


def test_rollback_of_a_deployment_that_was_cut_off(app: Rehearsed, monkeypatch):
    app.deploy("1")
    with monkeypatch.context() as patched:
        patched.setattr(deployer, "undeploy_model", cut_off)
        with pytest.raises(KeyboardInterrupt):
            app.deploy("2")
    assert app.shares() == {"1": 0, "2": 100}
    rollback(app.vertex(), app.app)
    assert app.shares() == {"1": 100}


def cut_off(*_) -> None:
    raise KeyboardInterrupt


def test_what_cannot_be_done_is_refused_before_anything_is_made(app: Rehearsed):
    before = app.changes()
    with pytest.raises(UserError, match=r"nothing of .* is deployed"):
        rollback(app.vertex(), app.app)
    with pytest.raises(UserError, match="canary: 20 given, and nothing is deployed"):
        app.deploy(canary=20)
    for wrong in (0, 100, -1, "20", 0.2, True):
        with pytest.raises(UserError, match=rf"canary: {wrong!r} given; should be a whole"):
            app.deploy(canary=wrong)
    elsewhere = app.image().replace("europe-west4", "us-central1")
    with pytest.raises(UserError, match=r"image_uri: us-central1-.* in the same region, europe"):
        deploy(app.vertex(), app.app, elsewhere)
    undeploy(app.vertex(), app.app)
    assert app.changes() == before


def test_a_canary_of_what_is_alone_already_is_refused(app: Rehearsed):
    app.deploy()
    with pytest.raises(UserError, match="version 1 is alone already"):
        app.deploy(canary=20)


def test_an_image_that_is_not_there(app: Rehearsed):
    with pytest.raises(errors.NotFound, match=r"not found"):
        deploy(app.vertex(), app.app, small().image_uri("no-such-image", "1"))


def test_a_server_that_crashes_leaves_the_old_one_alone(app: Rehearsed):
    app.deploy()
    with pytest.raises(errors.BadRequest, match="Model server"):
        app.deploy(environment={"CRASH": "3"})
    assert app.shares() == {"1": 100} and app.answers(2) == {"1": 2}
    app.deploy(environment={"NAME": "mended"})
    assert app.shares() == {"3": 100}


def test_undeploy_stops_the_bill_and_deploy_starts_it_again(app: Rehearsed):
    app.deploy("1")
    app.deploy("2", canary=20)
    undeploy(app.vertex(), app.app)
    left = list(what_is_there(app.vertex(), app.app))
    assert {one.kind for one in left} == {"endpoint", "model"}
    assert not any(one.bills for one in left)
    app.deploy("2")
    assert app.shares() == {"2": 100}


def test_cleanup_goes_by_labels_and_touches_nothing_else(app: Rehearsed):
    app.deploy()
    labels = small().labels_for(app.app)
    vertex = app.vertex()
    made = aiplatform.Endpoint.create(display_name="by hand", labels=labels)
    kept = [
        aiplatform.Endpoint.create(display_name="unlabelled"),
        aiplatform.Endpoint.create(display_name="other app", labels=labels | {"app": "other"}),
        aiplatform.Endpoint.create(display_name="others'", labels={"app": app.app}),
    ]
    assert made.resource_name in {one.name for one in what_is_there(vertex, app.app)}
    cleanup(vertex, app.app)
    assert list(what_is_there(vertex, app.app)) == []
    there = {one.resource_name for one in aiplatform.Endpoint.list()}
    assert {one.resource_name for one in kept} <= there
    for one in kept:
        one.delete()


def test_cleanup_says_what_it_cannot_remove(app: Rehearsed):
    """The model is deployed at an endpoint that is not ours: Google refuses to delete it."""
    app.deploy()
    vertex = app.vertex()
    foreign = aiplatform.Endpoint.create(display_name="not ours")
    model = aiplatform.Model(small().model_name(app.app))
    foreign.deploy(model, machine_type="n2-standard-4", traffic_percentage=100)
    with pytest.raises(UserError, match=r"cleanup: still there, and perhaps billing: model .*/mod"):
        cleanup(vertex, app.app, attempts=1)
    assert any("cannot be deleted" in line for line in app.lines)
    foreign.delete(force=True)


@pytest.mark.parametrize("canary", [None, 20])
def test_cleanup_of_a_deployment_that_is_going_on(app: Rehearsed, canary: int | None):
    """Nobody waits for it: as after a kill, and as when two people work on one app."""
    app.deploy("1")
    vertex = app.vertex()
    endpoint = vertex.endpoints.get_endpoint(name=small().endpoint_name(app.app))
    split = {"0": canary or 100, endpoint.deployed_models[0].id: 100 - (canary or 100)}
    wanted = endpoint.deployed_models[0]
    wanted.id, wanted.create_time = "", None
    request = {"endpoint": endpoint.name, "deployed_model": wanted, "traffic_split": split}
    vertex.endpoints.deploy_model(request)
    kinds = {one.kind for one in what_is_there(vertex, app.app)}
    assert "operation" in kinds
    cleanup(vertex, app.app)
    assert list(what_is_there(vertex, app.app)) == []


def test_an_endpoint_that_is_not_as_the_settings_say_is_left_alone(app: Rehearsed):
    app.deploy()
    with pytest.raises(UserError, match="inference_timeout: 5 in the settings, 600 at"):
        app.deploy(inference_timeout=5)


def test_an_endpoint_of_somebody_else_is_left_alone(app: Rehearsed):
    name = small().resource_id(app.app)
    endpoint = aiplatform.Endpoint.create(display_name="theirs", endpoint_id=name)
    with pytest.raises(UserError, match="was not made by this program"):
        app.deploy()
    cleanup(app.vertex(), app.app)
    endpoint.delete()


def test_the_timeline_is_in_order(app: Rehearsed):
    vertex = app.vertex()
    deploy(vertex, app.app, app.image())
    whole = [span for span in timeline(vertex.events) if not span.stage]
    assert [span.step.split()[0] for span in whole] == ["upload", "create", "deploy"]
    assert whole[0].began == 0
    for one, following in itertools.pairwise(whole):
        assert one.began < one.ended <= following.began
    stages = [span for span in timeline(vertex.events) if span.stage]
    assert stages == sorted(stages, key=lambda span: span.began)
    assert timeline([]) == []
