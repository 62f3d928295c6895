"""What the deployer relies on, tested on the stand-in and, if you want, on the real Vertex AI.

    GCP_PROJECT=my-project VERTEX_REAL=1 pytest tests/vertex/test_contract.py -k google

The real run costs about half an hour of one machine. It needs credentials, and Docker with the
image of `make build-pro`. Each test asserts the same of both, so a real run shows where the
stand-in guesses wrong. These tests were never run on the real service.
"""

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import pytest
import requests
from google.api_core import exceptions as errors
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import types

from deploy.vertex.config import VertexSettings, load_settings
from deploy.vertex.credentials import access_token
from deploy.vertex.deployer import Deployer
from deploy.vertex.messages import METRICS
from deploy.vertex.operations import kind_of
from deploy.vertex.predict import EXAMPLE
from deploy.vertex.push import push
from tests.vertex.rehearsed import BODY, small

pytestmark = pytest.mark.slow

APP = "contract"


class Platform(NamedTuple):
    """Where the tests run: an app that is deployed there, and a request for it."""

    settings: VertexSettings
    deployer: Deployer
    image: str
    body: dict[str, Any]


def on_the_stand_in(request: pytest.FixtureRequest) -> tuple[VertexSettings, str, dict]:
    request.getfixturevalue("quick_standin").add_image(APP)
    return small(), small().image_uri(APP, "1"), BODY


def on_google() -> tuple[VertexSettings, str, dict]:
    if os.environ.get("VERTEX_REAL") != "1":
        pytest.skip("the real Vertex AI costs money: VERTEX_REAL=1 tests it")
    if "VERTEX_STANDIN" in os.environ:
        pytest.skip("the environment leads to the stand-in now: test the real one with -k google")
    if not os.environ.get("GCP_PROJECT"):
        pytest.skip("the real Vertex AI needs a project: set GCP_PROJECT")
    served = "smollm2-135m"
    settings = load_settings(predict_route=f"/predictions/{served}", max_replicas=1)
    return settings, push(settings, served), EXAMPLE


@pytest.fixture(scope="module", params=["stand-in", "google"])
def platform(request: pytest.FixtureRequest) -> Iterator[Platform]:
    if request.param == "google":
        settings, image, body = on_google()
    else:
        settings, image, body = on_the_stand_in(request)
    deployer = Deployer(settings, APP)
    try:
        deployer.deploy(image)
        yield Platform(settings, deployer, image, body)
    finally:
        deployer.cleanup()
    assert deployer.resources() == []


def endpoint_of(platform: Platform) -> aiplatform.Endpoint:
    return aiplatform.Endpoint(platform.settings.endpoint_name(APP))


def read_endpoint(platform: Platform) -> types.Endpoint:
    return platform.deployer.endpoints.get_endpoint(name=platform.settings.endpoint_name(APP))


def upload(platform: Platform, **wrong: Any) -> aiplatform.Model:
    """Upload something that Vertex AI should reject."""
    given = {
        "serving_container_image_uri": platform.image,
        "serving_container_predict_route": "/predict",
        "serving_container_health_route": "/health",
        "labels": platform.settings.labels_for(APP),
    }
    return aiplatform.Model.upload(display_name=APP, **given | wrong)


# ---- names, versions, operations


def test_names_contain_the_projects_number(platform: Platform):
    name = read_endpoint(platform).name.split("/")
    assert name[1].isdigit() and name[2:] == platform.settings.endpoint_name(APP).split("/")[2:]


def test_ids_and_labels_are_ours(platform: Platform):
    endpoint, model = endpoint_of(platform), aiplatform.Model(platform.settings.model_name(APP))
    wanted = platform.settings.labels_for(APP)
    assert wanted.items() <= endpoint.labels.items() and wanted.items() <= model.labels.items()


def test_rejects_an_id_that_exists(platform: Platform):
    name = platform.settings.resource_id(APP)
    with pytest.raises(errors.AlreadyExists):
        aiplatform.Endpoint.create(display_name=APP, endpoint_id=name)


def test_versions_are_listed_with_their_containers(platform: Platform):
    (model,) = platform.deployer.models.list_model_versions(name=platform.settings.model_name(APP))
    assert model.container_spec.image_uri == platform.image
    assert model.container_spec.predict_route == platform.settings.predict_route
    assert model.container_spec.ports[0].container_port == platform.settings.port
    assert model.version_id == "1" and "default" in model.version_aliases


def test_dedicated_endpoint_has_its_own_host(platform: Platform):
    host = endpoint_of(platform).dedicated_endpoint_dns
    assert host.endswith(".prediction.vertexai.goog") and platform.settings.region in host


def test_operations_of_a_resource_are_listed_with_their_times(platform: Platform):
    name = platform.settings.endpoint_name(APP)
    found = list(platform.deployer.endpoints.list_operations({"name": name}).operations)
    kinds = {kind_of(operation) for operation in found}
    assert {"CreateEndpoint", "DeployModel"} <= kinds
    assert all(operation.done for operation in found)
    assert platform.deployer.operations.running(name) == []


def test_missing_resource_has_no_operations(platform: Platform):
    parent = platform.settings.parent
    running = platform.deployer.operations.running
    assert running(f"{parent}/endpoints/there-is-no-such-endpoint") == []
    assert running(f"{parent}/models/there-is-no-such-model") == []


def test_deployed_model_has_version_machine_and_traffic(platform: Platform):
    endpoint = read_endpoint(platform)
    (deployed,) = endpoint.deployed_models
    machine = deployed.dedicated_resources.machine_spec.machine_type
    assert machine == platform.settings.machine_type and deployed.model_version_id == "1"
    assert dict(endpoint.traffic_split) == {deployed.id: 100}


# ---- predictions


def test_predict(platform: Platform):
    answer = endpoint_of(platform).predict(
        platform.body["instances"], parameters=platform.body["parameters"]
    )
    assert len(answer.predictions) == len(platform.body["instances"])
    assert answer.model_version_id == "1" and answer.deployed_model_id
    assert answer.model_resource_name.endswith(f"/models/{platform.settings.resource_id(APP)}")


def test_raw_predict_names_the_deployed_model(platform: Platform):
    body, headers = json.dumps(platform.body).encode(), {"Content-Type": "application/json"}
    response = endpoint_of(platform).raw_predict(body, headers)
    assert response.status_code == 200 and "predictions" in response.json()
    (deployed,) = read_endpoint(platform).deployed_models
    assert response.headers["X-Vertex-AI-Deployed-Model-Id"] == deployed.id


def test_stream_raw_predict(platform: Platform):
    body = platform.body | {"parameters": platform.body["parameters"] | {"stream": True}}
    headers = {"Content-Type": "application/json"}
    lines = endpoint_of(platform).stream_raw_predict(json.dumps(body).encode(), headers)
    assert any(line.startswith(b"data: ") for line in lines)


def test_predict_passes_an_object_on(platform: Platform):
    """At a dedicated endpoint `predictions` may be OpenAI's object instead of a list."""
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
    instance = {"@requestFormat": "chatCompletions"} | chat
    predictions = cast(dict, endpoint_of(platform).predict([instance]).predictions)
    assert predictions["choices"][0]["message"]["role"] == "assistant"


def test_metrics_of_a_deployed_model_change_in_place(platform: Platform):
    queue = "prometheus.googleapis.com/vertex_vllm_num_requests_waiting"
    for name in (queue, METRICS["target_cpu"]):
        change_metrics(platform, name)
        (deployed,) = read_endpoint(platform).deployed_models
        (spec,) = deployed.dedicated_resources.autoscaling_metric_specs
        assert (spec.metric_name, spec.target) == (name, 60)


def change_metrics(platform: Platform, name: str) -> None:
    """Scale the deployed model by one metric only."""
    (deployed,) = read_endpoint(platform).deployed_models
    spec = types.AutoscalingMetricSpec(metric_name=name, target=60)
    deployed.dedicated_resources.autoscaling_metric_specs = [spec]
    platform.deployer.endpoints.mutate_deployed_model(
        endpoint=platform.settings.endpoint_name(APP),
        deployed_model=deployed,
        update_mask={"paths": ["dedicated_resources.autoscaling_metric_specs"]},
    ).result(timeout=1200)


def test_rejects_a_body_of_11_mb(platform: Platform):
    body, headers = b'"' + b"x" * 11_000_000 + b'"', {"Content-Type": "application/json"}
    response = endpoint_of(platform).raw_predict(body, headers)
    assert response.status_code in (400, 413)


# ---- errors


def test_rejects_a_reserved_variable(platform: Platform):
    with pytest.raises(errors.InvalidArgument):
        upload(platform, serving_container_environment_variables={"AIP_HTTP_PORT": "1"})


def test_rejects_an_image_in_another_registry(platform: Platform):
    with pytest.raises(errors.BadRequest):
        upload(platform, serving_container_image_uri="docker.io/library/busybox:latest")


def test_rejects_an_image_that_does_not_exist(platform: Platform):
    absent = f"{platform.settings.image_folder()}/there-is-no-such-image:1"
    with pytest.raises((errors.NotFound, errors.BadRequest)):
        upload(platform, serving_container_image_uri=absent)


def test_rejects_a_deployment_timeout_over_two_hours(platform: Platform):
    with pytest.raises(errors.InvalidArgument):
        upload(platform, serving_container_deployment_timeout=7201)


@pytest.mark.parametrize(
    "wrong",
    [
        {"serving_container_invoke_route_prefix": "/*"},  # with a predict route
        {
            "serving_container_invoke_route_prefix": "/v1/*",
            "serving_container_predict_route": None,
        },
    ],
    ids=["with predict_route", "another prefix"],
)
def test_rejects_another_invoke_prefix(platform: Platform, wrong: dict):
    with pytest.raises(errors.InvalidArgument):
        upload(platform, **wrong)


def test_rejects_an_unknown_autoscaling_metric(platform: Platform):
    with pytest.raises(errors.BadRequest):
        change_metrics(platform, "prometheus.googleapis.com/no_such_metric")


def test_rejects_an_unknown_field(platform: Platform):
    host = f"https://{platform.settings.region}-aiplatform.googleapis.com"
    response = requests.post(
        f"{host}/v1/{platform.settings.parent}/models:upload",
        json={"model": {"displayName": APP, "containerSpec": {"imageURI": platform.image}}},
        headers={"Authorization": f"Bearer {access_token()}"},
        timeout=60,
    )
    assert response.status_code == 400 and response.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_rejects_a_request_without_credentials(platform: Platform):
    host = f"https://{platform.settings.region}-aiplatform.googleapis.com"
    response = requests.get(f"{host}/v1/{platform.settings.parent}/models", timeout=60)
    assert response.status_code == 401 and response.json()["error"]["status"] == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    "wrong",
    [
        {"machine_type": "n7-standard-4"},
        {"machine_type": "n2-standard-4", "accelerator_type": "NVIDIA_L4", "accelerator_count": 1},
    ],
)
def test_rejects_machines_that_do_not_exist(platform: Platform, wrong: dict):
    model = aiplatform.Model(platform.settings.model_name(APP))
    with pytest.raises((errors.BadRequest, ValueError)):
        endpoint_of(platform).deploy(model, traffic_percentage=0, **wrong)


def test_rejects_traffic_that_does_not_add_up_to_100(platform: Platform):
    (deployed,) = read_endpoint(platform).deployed_models
    name = platform.settings.endpoint_name(APP)
    with pytest.raises(errors.InvalidArgument):
        platform.deployer.endpoints.update_endpoint(
            endpoint=types.Endpoint(name=name, traffic_split={deployed.id: 90}),
            update_mask={"paths": ["traffic_split"]},
        )


def test_rejects_the_deletion_of_resources_in_use(platform: Platform):
    with pytest.raises(errors.FailedPrecondition):
        platform.deployer.endpoints.delete_endpoint(name=platform.settings.endpoint_name(APP))
    with pytest.raises(errors.FailedPrecondition):
        platform.deployer.models.delete_model(name=platform.settings.model_name(APP))


def test_missing_resources_are_not_found(platform: Platform):
    parent = platform.settings.parent
    with pytest.raises(errors.NotFound):
        platform.deployer.endpoints.get_endpoint(name=f"{parent}/endpoints/no-such-endpoint")
    with pytest.raises(errors.NotFound):
        platform.deployer.models.get_model(name=f"{parent}/models/no-such-model")
