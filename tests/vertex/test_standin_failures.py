"""Common failures on Vertex AI, with the exception class that the SDK raises."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from google.api_core import exceptions

from standin.limits import DEDICATED_BYTES, SHARED_BYTES
from tests.vertex.gapic import Client, finish
from tests.vertex.test_standin_serving import post

pytestmark = pytest.mark.slow

NEVER_READY = "Model server never became ready"
L4 = {"machine_type": "g2-standard-12", "accelerator_type": "NVIDIA_L4", "accelerator_count": 1}


def image(client: Client, text: str) -> str:
    return text.format(r=client.standin.region, p=client.standin.project)


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("{r}-docker.pkg.dev/{p}/serving/nope:1", exceptions.NotFound),
        ("us-central1-docker.pkg.dev/{p}/serving/small:1", exceptions.InvalidArgument),
        ("gcr.io/{p}/small:1", exceptions.InvalidArgument),
        ("pytorch/torchserve:latest-cpu", exceptions.InvalidArgument),
    ],
    ids=["unknown", "of another region", "in gcr.io", "in Docker Hub"],
)
def test_rejects_images_outside_artifact_registry_or_missing(grpc_client, uri, error):
    with pytest.raises(error, match=r"(?i)image"):
        grpc_client.upload(image_uri=image(grpc_client, uri))


def test_missing_archive_names_the_make_command(grpc_client):
    uri = image(grpc_client, "{r}-docker.pkg.dev/{p}/serving/dolly-v2-3b:1")
    with pytest.raises(exceptions.NotFound, match="make archive APP=dolly-v2-3b"):
        grpc_client.upload(image_uri=uri)


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({"env": {"AIP_HTTP_PORT": "1"}}, "AIP_HTTP_PORT"),
        ({"predict_route": "predict"}, "predict_route"),
        ({"deployment_timeout": {"seconds": 7201}}, "2 hours"),
        ({"invoke_route_prefix": "/*"}, "invoke_route_prefix"),
    ],
    ids=["AIP_ variable", "route", "timeout", "two routes"],
)
def test_rejects_invalid_model_fields(client, spec, complaint):
    with pytest.raises(exceptions.BadRequest, match=complaint):
        client.upload(**spec)


def test_failed_deployments_name_reason_and_log(client, subtests):
    """All at once: each waits for its deployment timeout."""
    cases = {
        "port mismatch": ({"PORT": "18080"}, NEVER_READY),
        "127.0.0.1": ({"HOST": "127.0.0.1"}, NEVER_READY),
        "health 500": ({"HEALTH": "500"}, NEVER_READY),
        "token authorization left on": ({"HEALTH": "401"}, NEVER_READY),
        "slower than the timeout": ({"SLOW": "30"}, NEVER_READY),
        "crash": ({"CRASH": "3"}, "Model server exited unexpectedly"),
    }
    endpoint = client.endpoint()
    started = {}
    for case, (env, _) in cases.items():
        seconds = 1800 if "CRASH" in env else 50  # 90 and 2.5 here
        model = client.upload(env=env, deployment_timeout={"seconds": seconds})
        split = {}  # nothing is deployed yet that could share the traffic
        started[case] = model, client.start_deploy(endpoint.name, model, split=split)
    for case, (model, operation) in started.items():
        with subtests.test(case):
            with pytest.raises(exceptions.FailedPrecondition, match=cases[case][1]) as failed:
                finish(operation)
            log = failed.value.message.rsplit(" ", 1)[1].rstrip(".")
            assert "starting" in Path(log).read_text()
            assert not client.models.get_model(name=model).deployed_models
    assert not client.endpoints.get_endpoint(name=endpoint.name).deployed_models


def test_command_that_cannot_start_fails_the_deployment(grpc_client):
    model = grpc_client.upload(command=["/no/such/program"])
    with pytest.raises(exceptions.FailedPrecondition, match="exited unexpectedly"):
        grpc_client.deploy(grpc_client.endpoint().name, model)


@pytest.mark.parametrize(
    ("machine", "error", "words"),
    [
        (
            {"machine_type": "n2-standard-4"} | {k: L4[k] for k in L4 if k[0] == "a"},
            400,
            "NVIDIA_L4",
        ),
        ({"machine_type": "g2-standard-12"}, 400, "needs accelerator_type NVIDIA_L4"),
        (L4 | {"accelerator_count": 2}, 400, "accelerator_count"),
        ({"machine_type": "x9-huge"}, 400, "not supported"),
        ({"machine_type": ""}, 400, "required"),
        (
            {
                "machine_type": "a3-highgpu-1g",
                "accelerator_type": "NVIDIA_H100_80GB",
                "accelerator_count": 1,
            },
            429,
            "custom_model_serving_nvidia_h100_gpus",
        ),
        ({"machine_type": "n1-standard-96"}, 429, "custom_model_serving_cpus"),
    ],
    ids=[
        "GPU on n2",
        "g2 without GPU",
        "wrong count",
        "unknown",
        "none",
        "H100 quota",
        "CPU quota",
    ],
)
def test_rejects_invalid_machines_and_exceeded_quotas(client, machine, error, words):
    classes = {400: exceptions.BadRequest, 429: exceptions.TooManyRequests}
    with pytest.raises(classes[error], match=words):
        client.deploy(client.endpoint().name, client.upload(), machine=machine)


def test_quota_counts_deployed_models(grpc_client):
    endpoint, model = grpc_client.endpoint(), grpc_client.upload()
    first = grpc_client.deploy(endpoint.name, model, machine=L4, most=2)
    with pytest.raises(exceptions.ResourceExhausted, match="nvidia_l4_gpus"):
        grpc_client.deploy(endpoint.name, model, machine=L4, split={first: 100, "0": 0})


@pytest.mark.parametrize("counts", [(0, 1), (2, 1)], ids=["none", "maximum below minimum"])
def test_rejects_invalid_replica_counts(client, counts):
    with pytest.raises(exceptions.BadRequest, match="replica_count"):
        client.deploy(client.endpoint().name, client.upload(), count=counts[0], most=counts[1])


def test_rejects_delete_of_deployed_resources(client):
    endpoint = client.running()
    model = client.endpoints.get_endpoint(name=endpoint.name).deployed_models[0].model
    with pytest.raises(exceptions.BadRequest, match="undeploy"):
        client.endpoints.delete_endpoint(name=endpoint.name)
    with pytest.raises(exceptions.BadRequest, match="undeploy"):
        client.models.delete_model(name=model.split("@")[0])


@pytest.mark.parametrize("kind", ["models", "endpoints"])
def test_missing_resources_are_not_found(client, kind):
    service = getattr(client, kind)
    with pytest.raises(exceptions.NotFound):
        getattr(service, f"get_{kind[:-1]}")(name=f"{client.parent}/{kind}/1")
    with pytest.raises(exceptions.NotFound):
        getattr(service, f"delete_{kind[:-1]}")(name=f"{client.parent}/{kind}/1")


def test_rejects_requests_to_an_empty_endpoint(client):
    endpoint = client.endpoint()
    with pytest.raises(exceptions.BadRequest, match="traffic_split"):
        client.predict(endpoint.name)
    with pytest.raises(exceptions.NotFound):
        client.endpoints.undeploy_model(endpoint=endpoint.name, deployed_model_id="1")


def test_rejects_body_of_11_mb_on_a_shared_endpoint(client):
    endpoint = client.running()
    with pytest.raises(exceptions.BadRequest, match=f"exceeds the limit: {SHARED_BYTES}"):
        client.predictions.predict(endpoint=endpoint.name, instances=["x" * 11_000_000])
    assert client.predict(endpoint.name)  # the connection still works


def test_rejects_body_of_11_mb_on_a_dedicated_endpoint(grpc_client):
    endpoint = grpc_client.running(dedicated=True)
    host = endpoint.dedicated_endpoint_dns
    response = post(host, endpoint.name, ":rawPredict", b"x" * 11_000_000)
    assert response.status_code == 400 and str(DEDICATED_BYTES) in response.text
    body = {"instances": ["x" * 9_000_000]}
    assert post(host, endpoint.name, ":predict", body).status_code == 200


def test_request_of_61_seconds_times_out_on_a_shared_endpoint(grpc_client, clients, standin):
    """On both transports at once."""
    endpoint = grpc_client.running()
    with ThreadPoolExecutor() as pool:
        seconds = 61 * standin.limit_scale
        futures = [pool.submit(c.predict, endpoint.name, sleep=seconds) for c in clients.values()]
        for future in futures:
            with pytest.raises(exceptions.ServiceUnavailable, match="Took too long"):
                future.result()


def test_dedicated_endpoint_keeps_its_inference_timeout(grpc_client):
    endpoint = grpc_client.endpoint(
        dedicated=True, client_connection_config={"inference_timeout": {"seconds": 20}}
    )
    grpc_client.deploy(endpoint.name, grpc_client.upload())
    body = {"instances": [1], "parameters": {"sleep": 2}}  # 20 s are 1 here
    response = post(endpoint.dedicated_endpoint_dns, endpoint.name, ":rawPredict", body)
    assert response.status_code == 503 and "Took too long" in response.text
    with pytest.raises(exceptions.InvalidArgument, match="inference_timeout"):
        grpc_client.endpoint(client_connection_config={"inference_timeout": {"seconds": 20}})


def test_rejects_streaming_on_a_shared_endpoint(grpc_client):
    endpoint = grpc_client.running()
    response = post(grpc_client.host, endpoint.name, ":streamRawPredict", {"instances": [1]})
    assert response.status_code == 400 and "dedicated endpoint" in response.text
    assert post(grpc_client.host, endpoint.name, ":rawPredict", {"instances": [1]}).ok


def test_rejects_invalid_prediction_bodies(grpc_client, subtests):
    endpoint = grpc_client.running()
    for body in ({}, {"instances": []}, {"instances": 1}, {"inst": [1]}, b"no"):
        with subtests.test(str(body)):
            response = post(grpc_client.host, endpoint.name, ":predict", body)
            assert response.status_code == 400
            assert response.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_fields_that_are_not_imitated_are_501(client):
    network = {"network": "projects/1/global/networks/x"}
    with pytest.raises(exceptions.MethodNotImplemented, match="network"):
        client.endpoint(**network)
