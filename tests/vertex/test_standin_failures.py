"""What readers meet on Vertex AI, with the class of error that the SDK raises."""

import pytest
from google.api_core import exceptions

from standin.limits import DEDICATED_BYTES, SHARED_BYTES
from tests.vertex.gapic import Client
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
def test_images(grpc_client, uri, error):
    with pytest.raises(error, match=r"(?i)image"):
        grpc_client.upload(image_uri=image(grpc_client, uri))


def test_an_app_without_archive_says_what_to_do(grpc_client):
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
def test_models_that_cannot_be_served(client, spec, complaint):
    with pytest.raises(exceptions.BadRequest, match=complaint):
        client.upload(**spec)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"PORT": "18080"}, NEVER_READY),
        ({"HOST": "127.0.0.1"}, NEVER_READY),
        ({"HEALTH": "500"}, NEVER_READY),
        ({"HEALTH": "401"}, NEVER_READY),
        ({"SLOW": "30"}, NEVER_READY),
        ({"CRASH": "3"}, "Model server exited unexpectedly"),
    ],
    ids=[
        "port mismatch",
        "127.0.0.1",
        "health 500",
        "token authorization left on",
        "slower than the timeout",
        "crash",
    ],
)
def test_servers_that_do_not_come_up(client, standin, env, words):
    endpoint = client.endpoint()
    seconds = 1800 if "CRASH" in env else 30  # 90 and 1.5 here
    model = client.upload(env=env, deployment_timeout={"seconds": seconds})
    with pytest.raises(exceptions.FailedPrecondition, match=words) as failed:
        client.deploy(endpoint.name, model)
    log = failed.value.message.rsplit(" ", 1)[1].rstrip(".")
    with open(log) as file:  # noqa: PTH123
        assert "starting" in file.read()
    assert not client.endpoints.get_endpoint(name=endpoint.name).deployed_models
    assert not client.models.get_model(name=model).deployed_models


def test_the_wrong_command(grpc_client):
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
def test_machines(client, machine, error, words):
    classes = {400: exceptions.BadRequest, 429: exceptions.TooManyRequests}
    with pytest.raises(classes[error], match=words):
        client.deploy(client.endpoint().name, client.upload(), machine=machine)


def test_quota_counts_what_is_deployed(grpc_client):
    endpoint, model = grpc_client.endpoint(), grpc_client.upload()
    first = grpc_client.deploy(endpoint.name, model, machine=L4, most=2)
    with pytest.raises(exceptions.ResourceExhausted, match="nvidia_l4_gpus"):
        grpc_client.deploy(endpoint.name, model, machine=L4, split={first: 100, "0": 0})


@pytest.mark.parametrize("counts", [(0, 1), (2, 1)], ids=["none", "most below least"])
def test_replica_counts(client, counts):
    with pytest.raises(exceptions.BadRequest, match="replica_count"):
        client.deploy(client.endpoint().name, client.upload(), count=counts[0], most=counts[1])


def test_delete_while_deployed(client):
    endpoint = client.running()
    model = client.endpoints.get_endpoint(name=endpoint.name).deployed_models[0].model
    with pytest.raises(exceptions.BadRequest, match="undeploy"):
        client.endpoints.delete_endpoint(name=endpoint.name)
    with pytest.raises(exceptions.BadRequest, match="undeploy"):
        client.models.delete_model(name=model.split("@")[0])


@pytest.mark.parametrize("kind", ["models", "endpoints"])
def test_what_does_not_exist(client, kind):
    service = getattr(client, kind)
    with pytest.raises(exceptions.NotFound):
        getattr(service, f"get_{kind[:-1]}")(name=f"{client.parent}/{kind}/1")
    with pytest.raises(exceptions.NotFound):
        getattr(service, f"delete_{kind[:-1]}")(name=f"{client.parent}/{kind}/1")


def test_nothing_deployed(client):
    endpoint = client.endpoint()
    with pytest.raises(exceptions.BadRequest, match="traffic_split"):
        client.ask(endpoint.name)
    with pytest.raises(exceptions.NotFound):
        client.endpoints.undeploy_model(endpoint=endpoint.name, deployed_model_id="1")


def test_a_body_of_11_mb(client):
    endpoint = client.running()
    with pytest.raises(exceptions.BadRequest, match=f"exceeds the limit: {SHARED_BYTES}"):
        client.predictions.predict(endpoint=endpoint.name, instances=["x" * 11_000_000])
    assert client.ask(endpoint.name)  # and the connection is still good


def test_a_body_of_11_mb_on_a_dedicated_endpoint(grpc_client):
    endpoint = grpc_client.running(dedicated=True)
    host = endpoint.dedicated_endpoint_dns
    reply = post(host, endpoint.name, ":rawPredict", b"x" * 11_000_000)
    assert reply.status_code == 400 and str(DEDICATED_BYTES) in reply.text
    body = {"instances": ["x" * 9_000_000]}
    assert post(host, endpoint.name, ":predict", body).status_code == 200


def test_61_seconds_on_a_shared_endpoint(client, standin):
    endpoint = client.running()
    with pytest.raises(exceptions.ServiceUnavailable, match="Took too long"):
        client.ask(endpoint.name, sleep=61 * standin.limit_scale)


def test_the_inference_timeout_of_a_dedicated_endpoint(grpc_client):
    endpoint = grpc_client.endpoint(
        dedicated=True, client_connection_config={"inference_timeout": {"seconds": 20}}
    )
    grpc_client.deploy(endpoint.name, grpc_client.upload())
    body = {"instances": [1], "parameters": {"sleep": 2}}  # 20 s are 1 here
    reply = post(endpoint.dedicated_endpoint_dns, endpoint.name, ":rawPredict", body)
    assert reply.status_code == 503 and "Took too long" in reply.text
    with pytest.raises(exceptions.InvalidArgument, match="inference_timeout"):
        grpc_client.endpoint(client_connection_config={"inference_timeout": {"seconds": 20}})


def test_streaming_on_a_shared_endpoint(grpc_client):
    endpoint = grpc_client.running()
    reply = post(grpc_client.host, endpoint.name, ":streamRawPredict", {"instances": [1]})
    assert reply.status_code == 400 and "dedicated endpoint" in reply.text
    assert post(grpc_client.host, endpoint.name, ":rawPredict", {"instances": [1]}).ok


@pytest.mark.parametrize("body", [{}, {"instances": []}, {"instances": 1}, {"inst": [1]}, b"no"])
def test_bodies_that_are_no_predictions(grpc_client, body):
    endpoint = grpc_client.running()
    reply = post(grpc_client.host, endpoint.name, ":predict", body)
    assert reply.status_code == 400 and reply.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_what_is_not_imitated_says_so(client):
    network = {"network": "projects/1/global/networks/x"}
    with pytest.raises(exceptions.MethodNotImplemented, match="network"):
        client.endpoint(**network)
