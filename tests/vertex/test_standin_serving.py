"""Running models: the contract with the container, replicas, restarts, traffic, streams."""

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from google.api_core import exceptions

from deploy.common.waiting import wait_until
from tests.vertex.gapic import finish, session

pytestmark = pytest.mark.slow

JSON = {"Content-Type": "application/json"}
SECONDS = 15
"""Enough for a replica to fail its probes or restart on a busy machine."""


def post(host: str, name: str, verb: str, body: object, **more: Any) -> requests.Response:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    address = f"https://{host}/v1/{name}{verb}"
    return session().post(address, data=data, headers=JSON, timeout=60, **more)


def events(standin, number: str) -> list[str]:
    return [e["event"] for e in standin.events() if e.get("deployed_model") == number]


def test_container_gets_the_platforms_variables(grpc_client, standin):
    endpoint = grpc_client.endpoint()
    model = grpc_client.upload(
        {"artifact_uri": "gs://bucket/model"},
        env={"X_OWN": "a", "X_SEES": "$(X_OWN)-$(AIP_MODE)-$(NOPE)-$$(X_OWN)"},
        args=["$(AIP_ENDPOINT_ID)", "$(X_OWN)"],
    )
    number = grpc_client.deploy(endpoint.name, model)
    prediction = grpc_client.predict(endpoint.name)
    env, endpoint_id = dict(prediction["env"]), endpoint.name.rsplit("/", 1)[1]
    assert env.pop("AIP_HTTP_PORT").isdecimal()
    assert env == {
        "AIP_HEALTH_ROUTE": "/ping",
        "AIP_PREDICT_ROUTE": "/predict",
        "AIP_STORAGE_URI": "gs://bucket/model",
        "AIP_MODE": "PREDICTION",
        "AIP_MODE_VERSION": "1.0.0",
        "AIP_FRAMEWORK": "CUSTOM_CONTAINER",
        "AIP_ENDPOINT_ID": endpoint_id,
        "AIP_DEPLOYED_MODEL_ID": number,
        "AIP_MODEL_NAME": endpoint_id,
        "AIP_VERSION_NAME": number,
        "AIP_PROJECT_NUMBER": standin.project_number,
        "AIP_MACHINE_TYPE": "n1-standard-2",
        "X_OWN": "a",
        "X_SEES": "a-PREDICTION-$(NOPE)-$(X_OWN)",
    }
    assert list(prediction["argv"]) == [endpoint_id, "a"]


def test_default_routes(grpc_client):
    endpoint = grpc_client.running(predict_route="", health_route="")
    prediction = grpc_client.predict(endpoint.name)
    assert prediction["path"] == prediction["env"]["AIP_PREDICT_ROUTE"]
    assert prediction["path"].endswith(f"/deployedModels/{prediction['deployed_model_id']}:predict")


def test_prediction_keeps_types_and_names_the_model(client):
    endpoint = client.running()
    response = client.predictions.predict(
        endpoint=endpoint.name,
        instances=[{"a": [1, None, True]}],
        parameters={"echo": True, "k": 50},
    )
    assert response.predictions[0]["instance"] == {"a": [1, None, True]}
    assert response.predictions[0]["got"]["k"] == 50
    assert response.model_version_id == "1" and response.model_display_name == "small"
    assert response.model.startswith(f"projects/{client.standin.project_number}/")


def test_model_server_errors_keep_status_and_message(grpc_client, subtests):
    endpoint = grpc_client.running()
    classes = {
        400: exceptions.BadRequest,
        404: exceptions.NotFound,
        429: exceptions.TooManyRequests,
        500: exceptions.InternalServerError,
        503: exceptions.ServiceUnavailable,
    }
    for status, error in classes.items():
        with subtests.test(str(status)), pytest.raises(error, match="as asked"):
            grpc_client.predict(endpoint.name, status=status)


def test_rejects_response_without_predictions(grpc_client):
    endpoint = grpc_client.running()
    with pytest.raises(exceptions.InvalidArgument, match="predictions"):
        grpc_client.predict(endpoint.name, odd=1)


def test_replicas_alternate_and_restart_after_a_crash(grpc_client, standin):
    endpoint = grpc_client.running(count=2)
    first = Counter(grpc_client.predict(endpoint.name)["pid"] for _ in range(6))
    assert sorted(first.values()) == [3, 3]
    number = grpc_client.predict(endpoint.name)["deployed_model_id"]
    with pytest.raises(exceptions.ServiceUnavailable):
        grpc_client.predict(endpoint.name, die=True)
    wait_until(lambda: events(standin, number).count("in routing") == 3, SECONDS)
    assert "container exited" in events(standin, number)
    second = {grpc_client.predict(endpoint.name)["pid"] for _ in range(6)}
    assert len(second) == 2 and len(second & set(first)) == 1


def test_unhealthy_replicas_get_no_requests(grpc_client, standin):
    endpoint = grpc_client.running(count=2)
    number = grpc_client.predict(endpoint.name)["deployed_model_id"]
    sick = grpc_client.predict(endpoint.name, health=500)["pid"]
    wait_until(lambda: "out of routing" in events(standin, number), SECONDS)
    assert sick not in {grpc_client.predict(endpoint.name)["pid"] for _ in range(6)}
    other = grpc_client.predict(endpoint.name, health=500)["pid"]
    assert other != sick
    wait_until(lambda: events(standin, number).count("out of routing") == 2, SECONDS)
    with pytest.raises(exceptions.ServiceUnavailable, match="No replica"):
        grpc_client.predict(endpoint.name)


def test_traffic_split_can_change_and_is_checked(grpc_client):
    endpoint = grpc_client.endpoint()
    first = grpc_client.deploy(endpoint.name, grpc_client.upload(env={"NAME": "old"}))
    second = grpc_client.deploy(
        endpoint.name, grpc_client.upload(env={"NAME": "new"}), split={first: 80, "0": 20}
    )
    now = grpc_client.endpoints.get_endpoint(name=endpoint.name)
    assert dict(now.traffic_split) == {first: 80, second: 20}
    names = Counter(grpc_client.predict(endpoint.name)["name"] for _ in range(100))
    assert 8 <= names["new"] <= 34 and names.total() == 100  # 20 expected; 3.5 deviations
    with pytest.raises(exceptions.FailedPrecondition, match="traffic"):
        grpc_client.endpoints.undeploy_model(endpoint=endpoint.name, deployed_model_id=first)
    now.traffic_split = {second: 100}
    grpc_client.endpoints.update_endpoint(endpoint=now, update_mask={"paths": ["traffic_split"]})
    assert {grpc_client.predict(endpoint.name)["name"] for _ in range(20)} == {"new"}
    for split in ({second: 90}, {"0": 100}, {second: 150, first: -50}):
        now.traffic_split = split
        with pytest.raises(exceptions.InvalidArgument, match="traffic_split"):
            grpc_client.endpoints.update_endpoint(
                endpoint=now, update_mask={"paths": ["traffic_split"]}
            )


def test_number_of_replicas_can_change(client, standin):
    endpoint = client.running()
    number = client.predict(endpoint.name)["deployed_model_id"]

    def resize(count: int) -> set:
        resources = {"min_replica_count": count, "max_replica_count": 4}
        paths = ["dedicated_resources.min_replica_count", "dedicated_resources.max_replica_count"]
        operation = client.endpoints.mutate_deployed_model(
            endpoint=endpoint.name,
            deployed_model={"id": number, "dedicated_resources": resources},
            update_mask={"paths": paths},
        )
        assert finish(operation).deployed_model.dedicated_resources.min_replica_count == count
        return {client.predict(endpoint.name)["pid"] for _ in range(6)}

    assert len(resize(3)) == 3
    assert len(resize(1)) == 1
    assert events(standin, number).count("container stopped") == 2


def test_health_checks_wait_for_the_startup_probe(grpc_client, standin, tmp_path):
    flag = tmp_path / "started"
    probe = {"exec_": {"command": ["test", "-e", str(flag)]}, "period_seconds": 1}
    endpoint = grpc_client.endpoint()
    operation = grpc_client.start_deploy(endpoint.name, grpc_client.upload(startup_probe=probe))
    wait_until(lambda: standin.events()[-1]["event"] == "container started", SECONDS)
    time.sleep(0.5)  # five probes
    assert standin.events()[-1]["event"] == "container started" and not operation.done()
    flag.touch()
    number = finish(operation).deployed_model.id
    seen = events(standin, number)
    assert seen.index("startup probe passed") < seen.index("health check passed")
    metadata = operation.metadata.generic_metadata
    assert metadata.update_time > metadata.create_time


def test_raw_and_streamed_predictions_on_a_dedicated_endpoint(grpc_client):
    endpoint = grpc_client.running(dedicated=True)
    host, name = endpoint.dedicated_endpoint_dns, endpoint.name
    assert host.endswith(".prediction.vertexai.goog")
    raw = post(host, name, ":rawPredict", {"instances": [1], "parameters": {"echo": 1}})
    assert raw.json()["predictions"][0]["instance"] == 1
    assert raw.headers["X-Vertex-AI-Deployed-Model-Id"] and raw.headers["X-Vertex-AI-Model"]
    assert post(host, name, ":rawPredict", {"parameters": {"status": 418}}).status_code == 418
    body = {"instances": [], "parameters": {"stream": 4}}
    times = []
    response = post(host, name, ":streamRawPredict", body, stream=True)
    for line in response.iter_lines():
        if line:
            times.append(time.monotonic())
    assert response.headers["Content-Type"] == "text/event-stream" and len(times) == 4
    assert times[-1] - times[0] > 0.7  # not buffered: the server pauses three times


def test_dedicated_endpoint_has_its_own_host_name(grpc_client):
    endpoint = grpc_client.running(dedicated=True)
    with pytest.raises(exceptions.FailedPrecondition, match="dedicated dns name"):
        grpc_client.predict(endpoint.name)
    other = grpc_client.endpoint(dedicated=True)
    response = post(other.dedicated_endpoint_dns, endpoint.name, ":predict", {"instances": [1]})
    assert response.status_code == 404


CHAT = {"messages": [{"role": "user", "content": "a"}]}
FORMAT = {"@requestFormat": "chatCompletions"}


def test_invoke_passes_any_path_but_the_root_on(grpc_client, standin):
    """One deployment for all of it: a start of a replica takes longest."""
    endpoint = grpc_client.endpoint(dedicated=True)
    model = grpc_client.upload(predict_route="", invoke_route_prefix="/*")
    number = grpc_client.deploy(endpoint.name, model)
    host, name = endpoint.dedicated_endpoint_dns, endpoint.name
    url = f"https://{host}/v1/{name}"

    for door in ("/invoke", f"/deployedModels/{number}/invoke"):
        response = post(host, name, f"{door}/v1/chat/completions", CHAT)
        assert response.json()["path"] == "/v1/chat/completions"
        assert response.headers["X-Vertex-AI-Deployed-Model-Id"] == number
    response = post(host, name, "/deployedModels/1/invoke/v1/chat/completions", CHAT)
    assert response.status_code == 404

    # The path and the query arrive as the client wrote them, with its own headers but the token.
    path = "/v1/a%2Fb%20c/chat/completions?a=1&b=%2F&a=2"
    headers = JSON | {"X-Own": "yes", "Accept": "text/event-stream"}
    seen = session().post(f"{url}/invoke{path}", json=CHAT, headers=headers, timeout=9).json()
    assert seen["path"] == path
    assert seen["headers"]["X-Own"] == "yes" and seen["headers"]["Accept"] == "text/event-stream"
    assert "authorization" not in {header.lower() for header in seen["headers"]}

    response = post(host, name, "/invoke/v1/models/a:predict/chat/completions", CHAT)
    assert response.json()["path"] == "/v1/models/a:predict/chat/completions"

    # GET, as for /v1/models; other verbs are not known.
    seen = session().get(f"{url}/invoke/echo/models?x=1", timeout=9).json()
    assert (seen["verb"], seen["path"]) == ("GET", "/echo/models?x=1")
    for verb in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert session().request(verb, f"{url}/invoke/echo", timeout=9).status_code == 501

    # The root is closed.
    for root in ("/invoke", "/invoke/", "/invoke//", "/invoke/?a=1"):
        response = post(host, name, root, CHAT)
        assert response.status_code == 404 and "root" in response.json()["error"]["message"]

    # Streams are not buffered.
    body, times = CHAT | {"stream": True, "events": 3}, []
    response = post(host, name, "/invoke/v1/chat/completions", body, stream=True)
    times = [time.monotonic() for line in response.iter_lines() if line]
    assert response.headers["Content-Type"] == "text/event-stream" and len(times) == 3
    assert times[-1] - times[0] > 0.4

    # The container's own errors keep their status.
    body = {"instances": [], "parameters": {"status": 418}}
    assert post(host, name, "/invoke/any", body).status_code == 418
    assert post(host, name, "/invoke/any", b"x" * 10_500_000).status_code == 400

    # Everything else is off.
    for verb in (":predict", ":rawPredict", ":streamRawPredict"):
        response = post(host, name, verb, {"instances": [1]})
        assert response.status_code == 400 and "invoke" in response.json()["error"]["message"]
    # The shared host does not have it, and nobody without a token.
    shared = post(grpc_client.host, name, "/invoke/v1/chat/completions", CHAT)
    assert shared.status_code == 400 and "dedicated dns name" in shared.json()["error"]["message"]
    response = requests.post(f"{url}/invoke/v1/chat/completions", json=CHAT, timeout=9)
    assert response.status_code == 401


def test_invoke_needs_the_prefix_and_a_dedicated_endpoint(grpc_client):
    endpoint = grpc_client.running(dedicated=True)
    host, name = endpoint.dedicated_endpoint_dns, endpoint.name
    response = post(host, name, "/invoke/v1/chat/completions", CHAT)
    assert response.status_code == 400 and "prefix" in response.json()["error"]["message"]
    prefixed = grpc_client.upload(predict_route="", invoke_route_prefix="/*")
    with pytest.raises(exceptions.FailedPrecondition, match="needs a dedicated endpoint"):
        grpc_client.deploy(grpc_client.endpoint().name, prefixed)
    with pytest.raises(exceptions.InvalidArgument, match=r"invoke_route_prefix.*excludes"):
        grpc_client.upload(invoke_route_prefix="/*")
    with pytest.raises(exceptions.InvalidArgument, match=r"invoke_route_prefix.*Only \"/\*\""):
        grpc_client.upload(predict_route="", invoke_route_prefix="/v1/*")


def test_predictions_may_be_an_object_on_a_dedicated_endpoint(grpc_client):
    endpoint = grpc_client.running(dedicated=True)
    host, name = endpoint.dedicated_endpoint_dns, endpoint.name
    for verb in (":predict", ":rawPredict", "%3Apredict"):  # some clients encode the colon
        response = post(host, name, verb, {"instances": [FORMAT | CHAT]})
        assert response.json()["predictions"]["choices"][0]["message"]["content"] == "a"
    response = post(host, name, ":predict", {"instances": [1], "parameters": {"odd": True}})
    assert response.status_code == 400  # neither a list nor an object


def test_predictions_that_are_an_object_are_not_known_on_a_shared_endpoint(client):
    endpoint = client.running()
    instances: Any = [FORMAT | CHAT]
    with pytest.raises(exceptions.MethodNotImplemented, match=r"not documented\. Use raw"):
        client.predictions.predict(endpoint=endpoint.name, instances=instances)
    response = post(client.host, endpoint.name, ":rawPredict", {"instances": instances})
    assert response.json()["predictions"]["choices"][0]["message"]["content"] == "a"


def test_chat_completions_of_an_endpoint_are_refused_by_name(grpc_client):
    """Documented as a URL; what reaches the container is not."""
    endpoint = grpc_client.endpoint()
    for version in ("v1", "v1beta1"):
        url = f"https://{grpc_client.host}/{version}/{endpoint.name}/chat/completions"
        response = session().post(url, json=CHAT, timeout=9)
        assert response.status_code == 501
        assert "/chat/completions" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([("vllm:num_requests_waiting", 4)], "'vllm:num_requests_waiting' is not supported"),
        ([("prometheus.googleapis.com/vertex_vllm_num_requests_waiting", -1)], "not 1 to 2147"),
        ([("prometheus.googleapis.com/vertex_vllm_gpu_cache_usage_perc", 101)], "not 1 to 100"),
        ([("aiplatform.googleapis.com/prediction/online/cpu/utilization", 60)] * 2, "more than"),
        ([("prometheus.googleapis.com/vertex_dcgm_fi_dev_gpu_util", 60)], "needs an accelerator"),
    ],
    ids=["unknown", "negative", "percent", "twice", "accelerator"],
)
def test_rejects_invalid_autoscaling_metrics(grpc_client, specs, message):
    machine = {"machine_spec": {"machine_type": "n1-standard-2"}, "min_replica_count": 1}
    metrics = [{"metric_name": name, "target": target} for name, target in specs]
    deployed: Any = {
        "model": grpc_client.upload(),
        "dedicated_resources": machine | {"autoscaling_metric_specs": metrics},
    }
    with pytest.raises(exceptions.InvalidArgument, match=message):
        grpc_client.endpoints.deploy_model(
            endpoint=grpc_client.endpoint().name,
            deployed_model=deployed,
            traffic_split={"0": 100},
        )


def test_sixteen_concurrent_predictions(client):
    endpoint = client.running()
    with ThreadPoolExecutor(16) as pool:
        futures = [pool.submit(client.predict, endpoint.name, n=n, sleep=0.3) for n in range(16)]
        assert [int(f.result()["got"]["n"]) for f in futures] == list(range(16))


def test_disconnected_client_leaves_the_endpoint_working(grpc_client, standin):
    endpoint = grpc_client.running(dedicated=True)
    host = endpoint.dedicated_endpoint_dns
    body = {"instances": [], "parameters": {"stream": 50}}
    response = post(host, endpoint.name, ":streamRawPredict", body, stream=True)
    next(response.iter_lines())
    response.close()
    assert post(host, endpoint.name, ":predict", {"instances": [1]}).status_code == 200
    wait_until(lambda: any(c["status"] == "CUT OFF" for c in standin.calls()), SECONDS)
