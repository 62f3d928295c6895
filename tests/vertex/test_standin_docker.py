"""With Docker: the real registry, real containers, and the real SmolLM2 image, end to end.

The SDK, gcloud and curl run as a reader runs them.
"""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from google.api_core import exceptions

from deploy.common.paths import ROOT
from deploy.common.waiting import wait_until
from deploy.image.build import build_image
from deploy.image.lookup import image_name
from deploy.image.runtime import container_runtime
from standin.local import Standin
from tests.vertex.conftest import SCALE
from tests.vertex.gapic import Client, finish

pytestmark = pytest.mark.slow

QUESTION = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
PROMPT = {"instances": [QUESTION], "parameters": {"max_new_tokens": 20}}
CHAT = QUESTION | {"max_tokens": 20, "temperature": 0}
FORMAT = {"@requestFormat": "chatCompletions"}
APP = "smollm2-135m"
SHORT = {"deployment_timeout": {"seconds": 80}}  # 8 s here: four containers start at once


def docker(*arguments: str) -> str:
    run = subprocess.run([container_runtime(), *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def only(standin: Standin) -> list[str]:
    """Filter Docker's lists by one stand-in: others may run on this machine."""
    return ["--filter", f"name=standin-{standin.pid}-"]


def push(name: str, standin: Standin, path: str) -> str:
    """Push an image to the stand-in's registry; return its address for Vertex AI."""
    local = f"{os.environ['PUSH_REGISTRY']}/{standin.project}/serving/{path}"
    docker("tag", name, local)
    docker("push", "--quiet", local)
    return f"{standin.region}-docker.pkg.dev/{standin.project}/serving/{path}"


@pytest.fixture(scope="module")
def base(docker_standin: Standin) -> str:
    """The base of our images, which has Python; the server is the models' command.

    Depends on the stand-in, which skips the tests if Docker is not installed.
    """
    name = "serving-llms/base:standin-test"
    arguments = ["--quiet", "--target", "base", "--file", ROOT / "docker" / "Dockerfile"]
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    run = subprocess.run(
        [container_runtime(), "build", *arguments, "--tag", name, ROOT],
        env={k: v for k, v in os.environ.items() if k not in proxies} | {"DOCKER_BUILDKIT": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return name


@pytest.fixture(scope="module")
def small(base: str, docker_standin: Standin) -> str:
    return push(base, docker_standin, "small:1")


@pytest.fixture
def small_client(docker_standin: Standin, small: str, code: str) -> Iterator[Client]:
    client = Client(docker_standin, "grpc", small, code)
    yield client
    client.delete_everything()


@pytest.fixture(scope="module")
def real(docker_standin: Standin) -> str:
    """The app's image, built if it does not exist."""
    name = image_name(APP, "pro")
    if not docker("image", "ls", "--quiet", name):
        from deploy.weights.fetch import get_weights

        name = build_image(APP, get_weights(APP), tag="vertex-test")
    return push(name, docker_standin, f"{APP}:1")


def test_containers_alternate_and_restart_after_a_crash(small_client, docker_standin):
    endpoint = small_client.running(count=2)
    hosts = {small_client.predict(endpoint.name)["host"] for _ in range(4)}
    assert len(hosts) == 2
    published = docker("ps", *only(docker_standin), "--format", "{{.Ports}}").splitlines()
    assert len(published) == 2 and all(line.startswith("127.0.0.1:") for line in published)
    with pytest.raises(exceptions.ServiceUnavailable):
        small_client.predict(endpoint.name, die=True)

    def events() -> list[str]:
        return [event["event"] for event in docker_standin.events()]

    wait_until(lambda: events().count("in routing") == 3, 30)
    assert "container exited" in events()
    again = {small_client.predict(endpoint.name)["host"] for _ in range(4)}
    assert len(again) == 2 and len(again & hosts) == 1


def test_failed_deployments_name_reason_and_log(small_client, subtests):
    """All at once: each waits for its deployment timeout or three exits."""
    cases = {
        "127.0.0.1": ({"env": {"HOST": "127.0.0.1"}} | SHORT, "never became ready"),
        "port mismatch": ({"env": {"PORT": "18080"}} | SHORT, "never became ready"),
        "crash": ({"env": {"CRASH": "3"}}, "exited unexpectedly"),
        "no such program": ({"command": ["/no/such/program"]}, "exited unexpectedly"),
    }
    endpoint = small_client.endpoint().name
    started = {
        case: small_client.start_deploy(endpoint, small_client.upload(**spec), split={})
        for case, (spec, _) in cases.items()
    }
    for case, operation in started.items():
        with subtests.test(case):
            with pytest.raises(exceptions.FailedPrecondition, match=cases[case][1]) as failed:
                finish(operation)
            log = Path(failed.value.message.rsplit(" ", 1)[1].rstrip("."))
            assert log.stat().st_size
    assert not docker("ps", "--all", "--quiet", *only(small_client.standin))


def test_rejects_image_that_was_not_pushed(small_client, small):
    with pytest.raises(exceptions.NotFound, match="nope"):
        small_client.upload(image_uri=small.replace("small:1", "nope:1"))
    with pytest.raises(exceptions.NotFound, match="small:2"):
        small_client.upload(image_uri=small.replace("small:1", "small:2"))


def test_container_cannot_reach_the_internet(small_client):
    program = (
        "import socket, sys\n"
        "s = socket.socket(); s.settimeout(3)\n"
        "try: s.connect(('1.1.1.1', 443))\n"
        "except OSError as error: print('refused:', error, flush=True); sys.exit(1)\n"
    )
    model = small_client.upload(command=["python3", "-c", program])
    with pytest.raises(exceptions.FailedPrecondition) as failed:
        small_client.deploy(small_client.endpoint().name, model)
    assert "refused:" in Path(failed.value.message.rsplit(" ", 1)[1].rstrip(".")).read_text()


def test_sdk_end_to_end_with_the_real_image(docker_standin, real):
    import google.auth
    from google.cloud import aiplatform

    # Without credentials `init` keeps those of an earlier stand-in in this process.
    credentials, _ = google.auth.default(["https://www.googleapis.com/auth/cloud-platform"])
    aiplatform.init(
        project=docker_standin.project, location=docker_standin.region, credentials=credentials
    )
    model = aiplatform.Model.upload(
        display_name=APP,
        serving_container_image_uri=real,
        serving_container_predict_route=f"/predictions/{APP}",
        serving_container_health_route="/ping",
        serving_container_ports=[7080],
        serving_container_shared_memory_size_mb=512,
        serving_container_startup_probe_exec=["/opt/serving/ready"],
        serving_container_startup_probe_timeout_seconds=10,
        labels={"course": "yes"},
    )
    endpoint = aiplatform.Endpoint.create(display_name=APP, dedicated_endpoint_enabled=True)
    model.deploy(endpoint=endpoint, machine_type="n1-standard-4", traffic_percentage=100)
    try:
        response = endpoint.predict(**PROMPT)
        assert "Paris" in response.predictions[0]
        body, headers = json.dumps(PROMPT).encode(), {"Content-Type": "application/json"}
        raw = endpoint.raw_predict(body=body, headers=headers)
        assert raw.status_code == 200 and raw.json()["predictions"] == response.predictions
        # Long, because an event holds the tokens of a tenth of a second.
        long = {"max_new_tokens": 300, "ignore_eos": True, "stream": True}
        stream = PROMPT | {"parameters": long}
        times = []
        for line in endpoint.stream_raw_predict(body=json.dumps(stream).encode(), headers=headers):
            if line:
                times.append(time.monotonic())
                assert line.startswith(b"data: ")
        assert len(times) > 2 and times[-1] > times[0]
        with ThreadPoolExecutor(16) as pool:
            responses = list(pool.map(lambda _: endpoint.predict(**PROMPT), range(16)))
        assert all("Paris" in a.predictions[0] for a in responses)
        answers_openais_chat_in_an_instance(endpoint)
    finally:
        endpoint.undeploy_all()
        endpoint.delete()
        model.delete()
    assert aiplatform.Endpoint.list() == aiplatform.Model.list() == []
    upload = [c for c in docker_standin.calls() if c["method"] == "UploadModel"]
    assert upload[-1]["transport"] == "grpc"


def answers_openais_chat_in_an_instance(endpoint: Any) -> None:
    headers, expected = {"Content-Type": "application/json"}, endpoint.predict([FORMAT | CHAT])
    text = expected.predictions["choices"][0]["message"]["content"]
    assert "Paris" in text and expected.predictions["usage"]["completion_tokens"] > 1
    body = {"instances": [FORMAT | CHAT]}
    raw = endpoint.raw_predict(json.dumps(body).encode(), headers).json()["predictions"]
    assert raw["choices"][0]["message"]["content"] == text
    body = {"instances": [FORMAT | CHAT | {"stream": True}]}
    lines = list(endpoint.stream_raw_predict(json.dumps(body).encode(), headers))
    assert text_of(lines) == text and lines[-2:] == [b"data: [DONE]", b""]


def text_of(lines: list[bytes]) -> str:
    """The text in the lines of a streamed chat."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith(b"data: {")]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)


def test_invoke_reaches_openais_routes_of_the_real_image(docker_standin, real):
    import google.auth
    import requests
    from google.cloud import aiplatform

    credentials, _ = google.auth.default(["https://www.googleapis.com/auth/cloud-platform"])
    aiplatform.init(
        project=docker_standin.project, location=docker_standin.region, credentials=credentials
    )
    model = aiplatform.Model.upload(
        display_name=APP,
        serving_container_image_uri=real,
        serving_container_invoke_route_prefix="/*",
        serving_container_health_route="/ping",
        serving_container_ports=[7080],
        serving_container_shared_memory_size_mb=512,
        serving_container_startup_probe_exec=["/opt/serving/ready"],
        serving_container_startup_probe_timeout_seconds=10,
    )
    endpoint = aiplatform.Endpoint.create(display_name=APP, dedicated_endpoint_enabled=True)
    model.deploy(endpoint=endpoint, machine_type="n1-standard-4", traffic_percentage=100)
    route, headers = f"/predictions/{APP}/1.0/v1", {"Content-Type": "application/json"}
    try:
        path, body = f"{route}/chat/completions", json.dumps(CHAT).encode()
        whole = endpoint.invoke(path, body, headers)
        text = whole.json()["choices"][0]["message"]["content"]
        assert "Paris" in text
        body = json.dumps(CHAT | {"stream": True}).encode()
        assert text_of(list(endpoint.invoke(path, body, headers, stream=True))) == text
        token = Path(os.environ["CLOUDSDK_AUTH_ACCESS_TOKEN_FILE"]).read_text()
        url = f"https://{endpoint.gca_resource.dedicated_endpoint_dns}/v1/{endpoint.resource_name}"
        models = requests.get(
            f"{url}/invoke{route}/models", headers={"Authorization": f"Bearer {token}"}, timeout=60
        )
        assert [one["id"] for one in models.json()["data"]] == [APP]
        with pytest.raises(ValueError, match=r"400.*invoke"):
            endpoint.predict([QUESTION])
    finally:
        endpoint.undeploy_all()
        endpoint.delete()
        model.delete()


def test_gcloud_and_curl_end_to_end_with_the_real_image(docker_standin, real, tmp_path):
    gcloud = shutil.which("gcloud", path=f"{os.environ['PATH']}:/usr/bin")
    if not gcloud:
        pytest.skip("gcloud is not installed: https://cloud.google.com/sdk/docs/install")
    region = docker_standin.region

    def run(*arguments: str) -> str:
        command = [gcloud, "ai", *arguments, f"--region={region}", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def identifier(kind: str) -> str:
        return run(kind, "list", "--filter=displayName=cli", "--format=value(name.basename())")

    request = tmp_path / "request.json"
    request.write_text(json.dumps(PROMPT))
    upload = [f"--container-image-uri={real}", "--display-name=cli", "--container-ports=7080"]
    upload += [f"--container-predict-route=/predictions/{APP}", "--container-health-route=/ping"]
    upload += ["--container-startup-probe-exec=/opt/serving/ready"]
    upload += ["--container-startup-probe-timeout-seconds=10"]
    run("models", "upload", *upload)
    run("endpoints", "create", "--display-name=cli")
    model, endpoint = identifier("models"), identifier("endpoints")
    deploy = [f"--model={model}", "--display-name=cli", "--machine-type=n1-standard-4"]
    run("endpoints", "deploy-model", endpoint, *deploy, "--traffic-split=0=100")
    assert "Paris" in run("endpoints", "predict", endpoint, f"--json-request={request}")
    raw = [f"--request=@{request}", "--http-headers=Content-Type=application/json"]
    assert "Paris" in run("endpoints", "raw-predict", endpoint, *raw)
    # Options beside the prompt, and nulls, as LangChain and LiteLLM send them.
    flat = {"prompt": "The capital of France is", "max_tokens": 5, "temperature": 0, "stop": None}
    request.write_text(json.dumps({"instances": [flat], "parameters": None}))
    assert "Paris" in run("endpoints", "predict", endpoint, f"--json-request={request}")
    request.write_text(json.dumps({"instances": [FORMAT | CHAT]}))
    assert "chat.completion" in run("endpoints", "raw-predict", endpoint, *raw)
    request.write_text(json.dumps(PROMPT))
    token = Path(os.environ["CLOUDSDK_AUTH_ACCESS_TOKEN_FILE"]).read_text()
    parent = f"projects/{docker_standin.project}/locations/{region}"
    curl = ["curl", "--silent", "--show-error", "--fail-with-body", "--data", f"@{request}"]
    curl += ["--header", f"Authorization: Bearer {token}"]
    curl += ["--header", "Content-Type: application/json"]
    curl += [f"https://{region}-aiplatform.googleapis.com/v1/{parent}/endpoints/{endpoint}:predict"]
    done = subprocess.run(curl, capture_output=True, text=True, timeout=60)
    assert "Paris" in json.loads(done.stdout)["predictions"][0], done
    number = run("endpoints", "describe", endpoint, "--format=value(deployedModels[0].id)")
    run("endpoints", "undeploy-model", endpoint, f"--deployed-model-id={number}")
    run("endpoints", "delete", endpoint)
    run("models", "delete", model)
    assert identifier("models") == identifier("endpoints") == ""


def test_stop_removes_containers_network_and_image_names(base, code):
    """Starts another stand-in beside the module's."""
    standin = Standin(SCALE, runner="docker").start()
    address, mine = os.environ["PUSH_REGISTRY"], only(standin)
    try:
        client = Client(standin, "grpc", push(base, standin, "small:1"), code)
        client.running()
        assert docker("ps", "--quiet", *mine) and docker("network", "ls", "--quiet", *mine)
        assert address in docker("image", "ls")
    finally:
        standin.stop()
    assert not docker("ps", "--all", "--quiet", *mine)
    assert not docker("network", "ls", "--quiet", *mine)
    assert address not in docker("image", "ls")


def test_two_standins_with_the_same_seed_are_independent(small_client, base, code):
    endpoint = small_client.running()
    with Standin(SCALE, runner="docker") as other:
        client = Client(other, "grpc", push(base, other, "small:1"), code)
        assert client.predict(client.running().name)
    assert small_client.predict(endpoint.name)
