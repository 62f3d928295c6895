"""The changes from a state to another, without a server and without the SDK."""

import subprocess
import sys
from dataclasses import replace

import pytest

from deploy.common.paths import ROOT, UserError
from deploy.vertex import changes
from deploy.vertex.changes import (
    NEW,
    CreateEndpoint,
    DeleteEndpoint,
    DeleteModel,
    DeployVersion,
    Rescale,
    SetTraffic,
    Undeploy,
    UploadVersion,
    Wanted,
    includes,
)
from deploy.vertex.state import (
    BACK,
    DeployedModel,
    Endpoint,
    Inventory,
    Model,
    ModelVersion,
    RunningOperation,
    State,
)

NAME = "projects/1/locations/europe-west4/endpoints/serving-llms-app"
IMAGES = {number: {"image_uri": f"image:{number}"} for number in (1, 2, 3)}
MACHINES = {"machine_spec": {"machine_type": "n2-standard-4"}, "min_replica_count": 1}
OTHERS = {"machine_spec": {"machine_type": "n2-standard-8"}, "min_replica_count": 1}
LARGER = MACHINES | {"min_replica_count": 2}
QUEUE = {"metric_name": "prometheus.googleapis.com/vertex_vllm_num_requests_waiting", "target": 4}
INVOKE = {"image_uri": "image:2", "invoke_route_prefix": "/*"}


def wanted(image: int = 1, canary: int | None = None, machines: dict = MACHINES) -> Wanted:
    return Wanted(IMAGES[image], "", machines, "", 600, canary)


def state(*deployed: tuple, versions: int | None = None) -> State:
    """An endpoint with deployed models, given as (version, traffic, name suffix, machines)."""
    models = []
    for place, (version, traffic, *more) in enumerate(deployed):
        suffix, machines = [*more, "", MACHINES][0], [*more[1:], MACHINES][0]
        name = f"serving-llms-app-{version}{suffix}"
        models.append(DeployedModel(f"id{place}", version, traffic, machines, "", name))
    known = max((v for v, *_ in deployed), default=0) if versions is None else versions
    endpoint = Endpoint(NAME, {"managed-by": "serving-llms"}, True, 600, "host", tuple(models))
    uploaded = tuple(ModelVersion(number, IMAGES[number]) for number in range(known, 0, -1))
    return State(endpoint, uploaded)


def test_first_deployment_uploads_creates_and_deploys():
    assert changes.deployment(State(), wanted()) == [
        UploadVersion(IMAGES[1], "", 1),
        CreateEndpoint(),
        DeployVersion(None, "", {NEW: 100}),
    ]


def test_interrupted_deployment_continues():
    uploaded = State(versions=(ModelVersion(1, IMAGES[1]),))
    assert changes.deployment(uploaded, wanted()) == [
        CreateEndpoint(),
        DeployVersion(1, "", {NEW: 100}),
    ]
    assert changes.deployment(state(versions=1), wanted()) == [DeployVersion(1, "", {NEW: 100})]
    replaced = state((1, 0), (2, 100))
    assert changes.deployment(replaced, wanted(2)) == [Undeploy(NAME, "id0", 1)]


def test_same_deployment_needs_no_change():
    assert changes.deployment(state((1, 100)), wanted()) == []
    assert changes.deployment(state((1, 80), (2, 20)), wanted(2, canary=20)) == []


def test_another_image_replaces_the_deployed_one():
    assert changes.deployment(state((1, 100)), wanted(2)) == [
        UploadVersion(IMAGES[2], "", 2),
        DeployVersion(None, " after 1", {"id0": 0, NEW: 100}),
        Undeploy(NAME, "id0", 1),
    ]


def test_deploys_the_newest_matching_version_again():
    versions = (ModelVersion(5, IMAGES[1]), ModelVersion(3, IMAGES[1]))
    plan = changes.deployment(State(state().endpoint, versions), wanted())
    assert plan == [DeployVersion(5, "", {NEW: 100})]


def test_another_folder_in_cloud_storage_is_another_version():
    plan = changes.deployment(state((1, 100)), replace(wanted(), artifact_uri="gs://b/a"))
    assert plan[0] == UploadVersion(IMAGES[1], "gs://b/a", 2)


def test_other_machines_deploy_the_same_version_and_inherit_its_predecessor():
    before = state((2, 100, " after 1"))
    assert changes.deployment(before, wanted(2, machines=OTHERS)) == [
        DeployVersion(2, " after 1", {"id0": 0, NEW: 100}),
        Undeploy(NAME, "id0", 2),
    ]


def test_changes_the_number_of_replicas_and_the_metrics_in_place():
    more = changes.deployment(state((2, 100)), wanted(2, machines=LARGER))
    assert more == [Rescale("id0", 2, LARGER, ("min_replica_count",))]
    by_queue = MACHINES | {"autoscaling_metric_specs": [QUEUE]}
    plan = changes.deployment(state((2, 100)), wanted(2, machines=by_queue))
    assert plan == [Rescale("id0", 2, by_queue, ("autoscaling_metric_specs",))]


def test_rescales_and_promotes_a_canary():
    plan = changes.deployment(state((1, 80), (2, 20)), wanted(2, machines=LARGER))
    assert [type(change) for change in plan] == [Rescale, SetTraffic, Undeploy]


def test_other_numbers_of_replicas_as_canary_are_deployed_beside():
    plan = changes.deployment(state((1, 100)), wanted(1, canary=20, machines=LARGER))
    assert plan == [DeployVersion(1, " after 1", {"id0": 80, NEW: 20})]


def test_other_account_is_not_changed_in_place():
    asked = replace(wanted(machines=LARGER), service_account="a@b")
    plan = changes.deployment(state((1, 100)), asked)
    assert [type(change) for change in plan] == [DeployVersion, Undeploy]


def test_invoke_is_another_version_and_clients_are_told():
    before = state((1, 100))
    asked = replace(wanted(), container=INVOKE)
    assert changes.deployment(before, asked)[0] == UploadVersion(INVOKE, "", 2)
    line = changes.other_doors(before, INVOKE)
    assert line and line.startswith("invoke_route_prefix: /*, and none at version 1, which serves")
    assert line.endswith(
        "clients must change from :predict, :rawPredict and :streamRawPredict to .../invoke/PATH"
    )
    assert changes.other_doors(before, IMAGES[2]) is None
    assert changes.other_doors(State(), INVOKE) is None


def test_removing_invoke_is_another_version():
    served = State(state((1, 100)).endpoint, (ModelVersion(1, INVOKE | {"image_uri": "image:1"}),))
    assert changes.deployment(served, wanted())[0] == UploadVersion(IMAGES[1], "", 2)


def test_rollback_over_invoke_names_what_clients_must_change():
    known = (ModelVersion(2, INVOKE), ModelVersion(1, IMAGES[1]))
    line, _ = changes.rollback(State(state((2, 100, " after 1")).endpoint, known), "app")
    assert line.startswith("back from version 2 to 1, which is deployed again; invoke_route_prefix")
    assert "clients must change from .../invoke/PATH to :predict" in line


def test_rejects_a_canary_that_takes_other_requests():
    asked = replace(wanted(canary=20), container=INVOKE)
    with pytest.raises(UserError, match=r"canary: 20 given, and version 1 .*prefix none, not /\*"):
        changes.deployment(state((1, 100)), asked)


@pytest.mark.parametrize(("here", "there"), [(True, False), (False, True)])
def test_names_the_type_of_an_endpoint_that_cannot_change(here, there):
    served = replace(state((1, 100)).endpoint, dedicated=there)
    message = f"dedicated: {str(here).lower()} in the settings, {str(there).lower()} at {NAME}; .*"
    with pytest.raises(UserError, match=message + "run cleanup first"):
        changes.deployment(State(served), replace(wanted(), dedicated=here))


def test_another_service_account_deploys_again():
    plan = changes.deployment(state((1, 100)), replace(wanted(), service_account="a@b"))
    assert [type(change) for change in plan] == [DeployVersion, Undeploy]


def test_canary_gets_its_share_and_the_busiest_model_the_rest():
    plan = changes.deployment(state((1, 100)), wanted(2, canary=20))
    assert plan[1:] == [DeployVersion(None, " after 1", {"id0": 80, NEW: 20})]
    more = changes.deployment(state((1, 80), (2, 20)), wanted(2, canary=50))
    assert more == [SetTraffic({"id0": 50, "id1": 50}, {"id0": 1, "id1": 2})]
    third = changes.deployment(state((1, 80), (2, 20), versions=3), wanted(3, canary=10))
    assert third == [
        DeployVersion(3, " after 1", {"id0": 90, "id1": 0, NEW: 10}),
        Undeploy(NAME, "id1", 2),
    ]


def test_promotes_a_canary():
    assert changes.deployment(state((1, 80), (2, 20)), wanted(2)) == [
        SetTraffic({"id0": 0, "id1": 100}, {"id1": 2}),
        Undeploy(NAME, "id0", 1),
    ]


def test_rejects_a_canary_with_nothing_beside_it():
    with pytest.raises(UserError, match="canary: 20 given, and nothing is deployed"):
        changes.deployment(state(), wanted(canary=20))
    with pytest.raises(UserError, match="version 1 of this image is the only one deployed"):
        changes.deployment(state((1, 100)), wanted(canary=20))


def test_rejects_an_endpoint_that_it_did_not_create():
    ours = state((1, 100)).endpoint
    with pytest.raises(UserError, match=f"{NAME} exists and was not made by this program"):
        changes.deployment(State(replace(ours, labels={})), wanted())
    with pytest.raises(UserError, match="inference_timeout: 600 in the settings, 5 at"):
        changes.deployment(State(replace(ours, inference_timeout=5)), wanted())


def test_rollback_of_a_canary_gives_all_requests_to_the_other_version():
    line, plan = changes.rollback(state((1, 80), (2, 20)), "app")
    assert line == "back from version 2 to 1"
    assert plan == [SetTraffic({"id0": 100, "id1": 0}, {"id0": 1}), Undeploy(NAME, "id1", 2)]


def test_rollback_deploys_what_served_before():
    line, plan = changes.rollback(state((1, 100, " after 3"), versions=3), "app")
    assert line == "back from version 1 to 3, which is deployed again"
    assert plan == [DeployVersion(3, BACK, {"id0": 0, NEW: 100}), Undeploy(NAME, "id0", 1)]


@pytest.mark.parametrize("suffix", ["", " after 9", " after 3", BACK])
def test_rollback_goes_to_the_next_lower_version_if_the_previous_one_is_unknown(suffix):
    _, plan = changes.rollback(state((3, 100, suffix)), "app")
    assert plan[0] == DeployVersion(2, BACK, {"id0": 0, NEW: 100})


def test_continues_an_interrupted_rollback():
    """The version that comes back is the newest one, and no canary."""
    line, plan = changes.rollback(state((2, 0), (1, 100, BACK)), "app")
    assert "which an earlier run began" in line
    assert plan == [Undeploy(NAME, "id0", 2)]


def test_rejects_a_rollback_to_nothing():
    for nothing in (State(), state()):
        with pytest.raises(UserError, match="rollback: nothing of app is deployed"):
            changes.rollback(nothing, "app")
    with pytest.raises(UserError, match="version 1 of app is the first one known"):
        changes.rollback(state((1, 100)), "app")


def test_undeploys_the_busiest_model_last():
    endpoint = state((1, 70), (2, 0), (3, 30)).endpoint
    assert changes.undeploy(endpoint) == [
        Undeploy(NAME, "id1", 2),
        Undeploy(NAME, "id2", 3, {"id0": 100}),
        Undeploy(NAME, "id0", 1),
    ]


def test_removes_deployed_models_then_endpoints_then_models():
    inventory = Inventory((state((1, 100)).endpoint,), (Model("m", {"app": "app"}, "1"),))
    assert changes.removal(inventory) == [
        Undeploy(NAME, "id0", 1),
        DeleteEndpoint(NAME),
        DeleteModel("m"),
    ]


def test_lists_every_resource_and_whether_you_pay_for_it():
    endpoint = replace(state((1, 100)).endpoint, labels={"app": "app"})
    operation = RunningOperation("o", "DeployModel")
    found = Inventory((endpoint,), (Model("m", {"app": "app"}, "1"),), (operation,))
    resources = list(found.resources("app"))
    assert [resource.kind for resource in resources if resource.billed] == [
        "deployed model",
        "operation",
    ]
    assert [resource.kind for resource in resources if not resource.billed] == ["endpoint", "model"]
    assert {resource.app for resource in resources} == {"app"}


def test_ignores_fields_that_the_service_fills_in():
    probe = {"startup_probe": {"exec_": {"command": ["true"]}, "period_seconds": 10}}
    default = {"startup_probe": {"period_seconds": 10}, "health_probe": {"period_seconds": 10}}
    assert includes(IMAGES[1] | default, IMAGES[1])
    assert includes(IMAGES[1] | probe | {"grpc_ports": [1]}, IMAGES[1] | probe)
    assert not includes(IMAGES[1] | probe, IMAGES[1]), "a removed setting is a change"
    assert not includes(IMAGES[1], IMAGES[1] | probe)
    assert not includes(IMAGES[1] | {"args": ["x"]}, IMAGES[1])
    assert not includes(MACHINES | {"spot": True}, MACHINES)


def test_needs_no_sdk():
    code = "import sys, deploy.vertex.changes; sys.exit('google.api_core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
