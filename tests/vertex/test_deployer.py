"""The deployer on the stand-in: repeated runs, canary, rollback, failures, cleanup."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions as errors
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import types

from deploy.common.paths import ROOT, UserError
from deploy.common.ports import can_connect, free_port
from deploy.common.waiting import wait_until
from deploy.vertex.changes import includes, removal
from deploy.vertex.deployer import Deployer
from deploy.vertex.messages import fields
from deploy.vertex.operations import timeline
from standin.local import Standin
from tests.vertex.rehearsed import BODY, INVOKE, SHARED, Rehearsed, small

pytestmark = pytest.mark.slow


def covers(wanted: Any, actual: Any) -> bool:
    """Whether the service's message is what ours asks for."""
    return includes(fields(actual), fields(wanted))


@pytest.fixture
def app(quick_standin: Standin, request: pytest.FixtureRequest) -> Iterator[Rehearsed]:
    name = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:30]
    rehearsed = Rehearsed(quick_standin, name.strip("-"))
    yield rehearsed
    rehearsed.deployer().cleanup()
    assert rehearsed.deployer().resources() == []


def test_second_deploy_changes_nothing(app: Rehearsed):
    deployer = app.deployer()
    deployer.deploy(app.image())
    assert app.shares() == {"1": 100}
    before = app.changes()
    app.lines.clear()
    deployer.deploy(app.image())
    assert app.changes() == before
    assert app.lines == [f"{app.app} is deployed like this already: nothing to do"]


def test_predicts_in_every_way_of_a_dedicated_endpoint(app: Rehearsed):
    app.deploy()
    answers = app.predict(BODY)
    assert list(answers) == ["predict", "raw_predict", "stream_raw_predict", "chatCompletions"]
    assert answers["chatCompletions"]["object"] == "chat.completion"
    assert [prediction["instance"] for prediction in answers["predict"]] == ["a", "b"]
    assert answers["raw_predict"]["predictions"] == answers["predict"]
    assert len(answers["stream_raw_predict"]) == 1


def test_shared_endpoint_from_deploy_to_cleanup(app: Rehearsed):
    host = app.deploy(**SHARED)
    assert host == "europe-west4-aiplatform.googleapis.com"
    before = app.changes()
    app.deploy(**SHARED)
    assert app.changes() == before
    answers = app.predict(BODY, **SHARED)
    assert list(answers) == ["predict", "raw_predict", "chatCompletions"]
    assert [prediction["instance"] for prediction in answers["predict"]] == ["a", "b"]
    assert answers["chatCompletions"]["object"] == "chat.completion"
    with pytest.raises(UserError, match=r"predict: 400.*as asked"):
        app.predict({"instances": ["a"], "parameters": {"status": 400}}, **SHARED)
    with pytest.raises(UserError, match=r"dedicated: true in the settings, false at .*: run clean"):
        app.deploy()
    assert app.changes() == before
    listed = app.deployer(**SHARED).resources()
    assert [one.detail for one in listed if one.kind == "endpoint"] == [f"{host} (shared)"]
    app.deploy("2", canary=20, **SHARED)
    assert app.shares() == {"1": 80, "2": 20}
    app.deployer(**SHARED).undeploy()
    with pytest.raises(UserError, match="deployed any more; run `make deploy APP="):
        app.predict(BODY, **SHARED)


def test_invoke_from_deploy_to_rollback(app: Rehearsed):
    """From :predict to invoke, and back: two versions of which no request reaches both."""
    app.deploy("1")
    with pytest.raises(UserError, match=r"canary: 20 given, and version 1 beside it has invoke_"):
        app.deploy("2", canary=20, **INVOKE)
    app.lines.clear()
    app.deploy("1", **INVOKE)
    assert app.shares() == {"2": 100}
    assert app.lines[0].startswith("invoke_route_prefix: /*, and none at version 1, which serves")
    before = app.changes()
    app.lines.clear()
    app.deploy("1", **INVOKE)
    assert app.changes() == before and len(app.lines) == 1
    answers = app.predict(BODY, **INVOKE)
    assert list(answers) == ["invoke", "invoke, streamed"]
    assert answers["invoke"]["path"] == f"/predictions/{app.app}/1.0/v1/chat/completions"
    assert len(answers["invoke, streamed"]) == 2
    with pytest.raises(UserError, match=r"predict: .*400.*invoke"):
        app.predict(BODY)
    app.deploy("3", canary=30, **INVOKE)
    assert app.shares() == {"2": 70, "3": 30}
    app.deploy("1", **INVOKE)
    app.lines.clear()
    app.deployer().rollback()
    assert "clients must change from .../invoke/PATH to :predict" in app.lines[0]
    assert app.predict(BODY)["predict"]
    with pytest.raises(UserError, match=r"invoke: 400: .*prefix"):
        app.predict(BODY, **INVOKE)


def test_invoke_after_undeploy_names_the_make_command(app: Rehearsed):
    with pytest.raises(UserError, match=r"nothing of .* is deployed; run"):
        app.predict(BODY, **INVOKE)
    app.deploy(**INVOKE)
    app.deployer().undeploy()
    with pytest.raises(UserError, match="deployed any more; run `make deploy APP="):
        app.predict(BODY, **INVOKE)


def test_numbers_of_replicas_and_metrics_change_in_place(app: Rehearsed):
    app.deploy()
    before = app.changes()
    (first,) = aiplatform.Endpoint(small().endpoint_name(app.app)).list_models()
    scaled = {"target_requests_waiting": 4, "target_cpu": None, "max_replicas": 3}
    app.deploy(**scaled)
    (now,) = aiplatform.Endpoint(small().endpoint_name(app.app)).list_models()
    assert now.id == first.id and now.dedicated_resources.max_replica_count == 3
    (spec,) = now.dedicated_resources.autoscaling_metric_specs
    assert spec.metric_name == "prometheus.googleapis.com/vertex_vllm_num_requests_waiting"
    assert spec.target == 4
    app.deploy(**scaled)
    assert app.changes() == [*before, "MutateDeployedModel"]


def test_order_of_metrics_is_no_change(app: Rehearsed):
    app.deploy(target_kv_cache=80, target_requests_per_minute=30)
    name = small().endpoint_name(app.app)
    client = app.deployer().endpoints
    (deployed,) = client.get_endpoint(name=name).deployed_models
    specs = list(deployed.dedicated_resources.autoscaling_metric_specs)
    deployed.dedicated_resources.autoscaling_metric_specs = specs[::-1]
    path = "dedicated_resources.autoscaling_metric_specs"
    client.mutate_deployed_model(
        endpoint=name, deployed_model=deployed, update_mask={"paths": [path]}
    ).result(timeout=60)
    before = app.changes()
    app.deploy(target_kv_cache=80, target_requests_per_minute=30)
    assert app.changes() == before


def test_shows_an_error_of_the_server(app: Rehearsed):
    app.deploy()
    with pytest.raises(UserError, match=r"predict: .*400.*as asked"):
        app.predict({"instances": ["a"], "parameters": {"status": 400}})


def test_another_image_replaces_the_old_one(app: Rehearsed):
    app.deploy("1")
    app.deploy("2")
    assert app.shares() == {"2": 100}
    assert app.answers(5) == {"2": 5}


def test_other_machines_deploy_the_same_version_again(app: Rehearsed):
    app.deploy()
    before = app.changes()
    app.deploy(machine_type="n2-standard-8", min_replicas=2, max_replicas=2)
    assert app.changes() == [*before, "DeployModel", "UndeployModel"]
    assert app.shares() == {"1": 100}
    (deployed,) = aiplatform.Endpoint(small().endpoint_name(app.app)).list_models()
    assert deployed.dedicated_resources.min_replica_count == 2


def test_other_container_settings_are_another_version(app: Rehearsed):
    app.deploy()
    app.deploy(environment={"NAME": "two"})
    assert app.shares() == {"2": 100}
    answer = app.predict(BODY)["predict"][0]
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
def test_removing_a_container_setting_is_another_version(app: Rehearsed, setting):
    app.deploy(**setting)
    app.deploy()
    assert app.shares() == {"2": 100}
    app.deploy(**setting)
    assert app.shares() == {"1": 100}


def test_ignores_fields_that_the_service_fills_in():
    spec = types.ModelContainerSpec
    probe = {"exec_": {"command": ["true"]}, "period_seconds": 10}
    filled = {"health_probe": {"period_seconds": 10}, "grpc_ports": [{"container_port": 8500}]}
    default = {"startup_probe": {"period_seconds": 10, "failure_threshold": 3}}
    assert covers(spec(image_uri="a"), spec(image_uri="a", **filled | default))
    assert covers(
        spec(startup_probe=probe), spec(startup_probe=probe | {"success_threshold": 1}, **filled)
    )
    assert not covers(spec(image_uri="a"), spec(image_uri="a", command=["x"]))
    assert not covers(spec(image_uri="a"), spec(image_uri="a", startup_probe=probe))


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
def test_adding_or_removing_a_machine_setting_is_a_difference(before, now):
    dedicated = {"min_replica_count": 1}
    before = types.DedicatedResources(dedicated | before)
    assert not covers(types.DedicatedResources(dedicated | now), before)


@pytest.fixture
def buckets(monkeypatch, tmp_path) -> Iterator[Path]:
    """A folder that a small Cloud Storage serves, with an archive in gs://artifacts/folder."""
    archive = tmp_path / "artifacts" / "folder" / "app"
    archive.mkdir(parents=True)
    (archive / "weights").write_text("first")
    port = free_port()
    server = ROOT / "tests" / "container" / "gcs_server.py"
    process = subprocess.Popen([sys.executable, server, tmp_path, str(port)])
    wait_until(lambda: can_connect(port) or process.poll() is not None, 20, 0.05)
    assert process.poll() is None
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield tmp_path
    process.kill()
    process.wait()


def test_another_folder_in_cloud_storage_is_another_version(app: Rehearsed, buckets: Path):
    app.deploy()
    for _ in range(2):
        app.deploy(artifact_uri="gs://artifacts/folder")
    assert app.shares() == {"2": 100}
    answer = app.predict(BODY)["predict"][0]
    assert answer["env"]["AIP_STORAGE_URI"] == "gs://artifacts/folder"
    app.deploy()
    assert app.shares() == {"1": 100}


def test_rejects_a_folder_where_there_is_no_cloud_storage(app: Rehearsed):
    """The stand-in has none, and lets no request out to Google's."""
    before = app.changes()
    with pytest.raises(UserError, match=r"artifact_uri: gs://bucket/folder cannot be listed"):
        app.deploy(artifact_uri="gs://bucket/folder")
    assert app.changes() == before


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


def test_rejects_an_empty_or_unknown_folder_before_any_change(app, buckets):
    before = app.changes()
    with pytest.raises(UserError, match="artifact_uri: gs://artifacts/fold given, but it is empty"):
        app.deploy(artifact_uri="gs://artifacts/fold")
    with pytest.raises(UserError, match=r"artifact_uri: gs://unknown/a cannot be listed: 404 "):
        app.deploy(artifact_uri="gs://unknown/a")
    assert app.changes() == before


def test_canary_gets_its_share_and_is_promoted(app: Rehearsed):
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
    with pytest.raises(UserError, match=r"version 1 of .* is the first one known"):
        app.deployer().rollback()
    app.deploy("2", canary=20)
    app.deployer().rollback()
    assert app.shares() == {"1": 100}
    app.deploy("2")
    app.deployer().rollback()
    assert app.shares() == {"1": 100} and app.answers(3) == {"1": 3}
    uploads = app.changes().count("UploadModel")
    app.deploy("2")
    assert app.shares() == {"2": 100} and app.changes().count("UploadModel") == uploads


def test_rollback_goes_to_what_served_before_not_to_the_lower_number(app: Rehearsed):
    """A, B, A: version 1 serves after version 2."""
    app.deploy("1")
    app.deploy("2")
    app.deploy("1")
    app.deploy("1", machine_type="n2-standard-8")  # on other machines: still after version 2
    assert app.shares() == {"1": 100}
    app.deployer().rollback()
    assert app.shares() == {"2": 100}
    app.deployer().rollback()
    assert app.shares() == {"1": 100}
    with pytest.raises(UserError, match=r"version 1 of .* is the first one known"):
        app.deployer().rollback()


def test_rollback_of_an_old_version_as_canary(app: Rehearsed):
    app.deploy("1")
    app.deploy("2")
    app.deploy("1", canary=20)
    assert app.shares() == {"1": 20, "2": 80}
    app.deployer().rollback()
    assert app.shares() == {"2": 100}
    app.deploy("1", canary=90)  # also of one that has most by now
    app.deployer().rollback()
    assert app.shares() == {"2": 100}


def test_rollback_of_other_machines_as_canary(app: Rehearsed):
    app.deploy()
    app.deploy(canary=20, max_replicas=2)
    app.deployer().rollback()
    (deployed,) = aiplatform.Endpoint(small().endpoint_name(app.app)).list_models()
    assert deployed.dedicated_resources.max_replica_count == 1


def test_continues_an_interrupted_rollback(app: Rehearsed, monkeypatch):
    """The version that comes back is deployed last: it is not taken for a canary."""
    app.deploy("1")
    app.deploy("2")
    with monkeypatch.context() as patched:
        patched.setattr(Deployer, "_undeploy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            app.deployer().rollback()
    assert app.shares() == {"1": 100, "2": 0}
    app.deployer().rollback()
    assert app.shares() == {"1": 100}


def test_rollback_of_an_interrupted_deployment(app: Rehearsed, monkeypatch):
    app.deploy("1")
    with monkeypatch.context() as patched:
        patched.setattr(Deployer, "_undeploy", interrupt)
        with pytest.raises(KeyboardInterrupt):
            app.deploy("2")
    assert app.shares() == {"1": 0, "2": 100}
    app.deployer().rollback()
    assert app.shares() == {"1": 100}


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def test_rejects_impossible_commands_before_any_change(app: Rehearsed):
    before = app.changes()
    with pytest.raises(UserError, match=r"nothing of .* is deployed"):
        app.deployer().rollback()
    with pytest.raises(UserError, match="canary: 20 given, and nothing is deployed"):
        app.deploy(canary=20)
    for wrong in (0, 100, -1, "20", 0.2, True):
        with pytest.raises(UserError, match=rf"canary: {wrong!r} given; should be a whole"):
            app.deploy(canary=wrong)
    elsewhere = app.image().replace("europe-west4", "us-central1")
    with pytest.raises(UserError, match=r"image_uri: us-central1-.* in the same region, europe"):
        app.deployer().deploy(elsewhere)
    app.deployer().undeploy()
    assert app.changes() == before


def test_rejects_a_canary_of_the_only_deployed_version(app: Rehearsed):
    app.deploy()
    with pytest.raises(UserError, match="version 1 of this image is the only one deployed"):
        app.deploy(canary=20)


def test_rejects_an_image_that_does_not_exist(app: Rehearsed):
    with pytest.raises(errors.NotFound, match=r"not found"):
        app.deployer().deploy(small().image_uri("no-such-image", "1"))


def test_crash_of_the_new_server_leaves_the_old_one_alone(app: Rehearsed):
    app.deploy()
    with pytest.raises(errors.BadRequest, match="Model server"):
        app.deploy(environment={"CRASH": "3"})
    assert app.shares() == {"1": 100} and app.answers(2) == {"1": 2}
    app.deploy(environment={"NAME": "fixed"})
    assert app.shares() == {"3": 100}


def test_undeploy_stops_all_replicas_and_deploy_starts_them_again(app: Rehearsed):
    app.deploy("1")
    app.deploy("2", canary=20)
    app.deployer().undeploy()
    left = app.deployer().resources()
    assert {resource.kind for resource in left} == {"endpoint", "model"}
    assert not any(resource.billed for resource in left)
    app.deploy("2")
    assert app.shares() == {"2": 100}


def test_cleanup_removes_what_has_our_labels_and_nothing_else(app: Rehearsed):
    app.deploy()
    labels = small().labels_for(app.app)
    deployer = app.deployer()
    made = aiplatform.Endpoint.create(display_name="by hand", labels=labels)
    kept = [
        aiplatform.Endpoint.create(display_name="unlabelled"),
        aiplatform.Endpoint.create(display_name="other app", labels=labels | {"app": "other"}),
        aiplatform.Endpoint.create(display_name="others'", labels={"app": app.app}),
    ]
    assert made.resource_name in {resource.name for resource in deployer.resources()}
    deployer.cleanup()
    assert deployer.resources() == []
    listed = {endpoint.resource_name for endpoint in aiplatform.Endpoint.list()}
    assert {endpoint.resource_name for endpoint in kept} <= listed
    for endpoint in kept:
        endpoint.delete()


def test_cleanup_names_what_it_cannot_remove(app: Rehearsed):
    """Google rejects the deletion of a model that is deployed at another endpoint."""
    app.deploy()
    deployer = app.deployer()
    foreign = aiplatform.Endpoint.create(display_name="not ours")
    model = aiplatform.Model(small().model_name(app.app))
    foreign.deploy(model, machine_type="n2-standard-4", traffic_percentage=100)
    with pytest.raises(
        UserError, match=r"cleanup: still there, and you may be paying for it: model .*/mod"
    ):
        deployer.cleanup(attempts=1)
    assert any("cannot be deleted" in line for line in app.lines)
    foreign.delete(force=True)


def test_cleanup_continues_if_another_run_undeploys_first(app: Rehearsed):
    app.deploy()
    deployer = app.deployer()
    outdated = deployer.inventory()
    app.deployer().undeploy()
    deployer.apply(removal(outdated))
    assert "undeploy version 1: it is undeployed already" in app.lines
    assert not deployer.resources()


@pytest.mark.parametrize("canary", [None, 20])
def test_cleanup_of_a_running_deployment(app: Rehearsed, canary: int | None):
    """As after a kill, or when two people work on one app: nothing waits for the operation."""
    app.deploy("1")
    deployer = app.deployer()
    endpoint = deployer.endpoints.get_endpoint(name=small().endpoint_name(app.app))
    split = {"0": canary or 100, endpoint.deployed_models[0].id: 100 - (canary or 100)}
    wanted = endpoint.deployed_models[0]
    wanted.id, wanted.create_time = "", None
    request = {"endpoint": endpoint.name, "deployed_model": wanted, "traffic_split": split}
    deployer.endpoints.deploy_model(request)
    assert "operation" in {resource.kind for resource in deployer.resources()}
    deployer.cleanup()
    assert deployer.resources() == []


def test_rejects_an_endpoint_with_another_timeout(app: Rehearsed):
    app.deploy()
    with pytest.raises(UserError, match="inference_timeout: 5 in the settings, 600 at"):
        app.deploy(inference_timeout=5)


def test_rejects_an_endpoint_that_it_did_not_create(app: Rehearsed):
    name = small().resource_id(app.app)
    endpoint = aiplatform.Endpoint.create(display_name="theirs", endpoint_id=name)
    with pytest.raises(UserError, match="was not made by this program"):
        app.deploy()
    app.deployer().cleanup()
    endpoint.delete()


def test_timeline_is_in_order(app: Rehearsed):
    deployer = app.deployer()
    deployer.deploy(app.image())
    whole = [span for span in timeline(deployer.operations.events) if not span.stage]
    assert [span.step.split()[0] for span in whole] == ["upload", "create", "deploy"]
    assert whole[0].began == 0
    for span, following in itertools.pairwise(whole):
        assert span.began < span.ended <= following.began
    stages = [span for span in timeline(deployer.operations.events) if span.stage]
    assert stages == sorted(stages, key=lambda span: span.began)
    assert timeline([]) == []
