"""Google's own clients, unchanged, against the stand-in: the SDK, gcloud, and curl.

Only the stand-in's environment variables direct them to it. Chapter 06 shows the same calls side by
side.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests
from google.cloud import aiplatform

from deploy.common.paths import UserError
from deploy.common.waiting import wait_until
from deploy.vertex import __main__ as command_line
from deploy.vertex.credentials import access_token
from tests.vertex.rehearsed import BODY, INVOKE, Rehearsed, small

pytestmark = pytest.mark.slow

HEADERS = {"Content-Type": "application/json"}


@pytest.fixture
def app(quick_standin, request: pytest.FixtureRequest) -> Iterator[Rehearsed]:
    rehearsed = Rehearsed(quick_standin, "clients")
    yield rehearsed
    rehearsed.deployer().cleanup()


def nothing_is_left(app: Rehearsed) -> bool:
    return not app.deployer().resources()


def test_sdk_convenience_classes(app: Rehearsed):
    settings, labels = small(), small().labels_for(app.app)
    aiplatform.init(project=settings.project, location=settings.region)
    model = aiplatform.Model.upload(
        display_name="by-sdk",
        labels=labels,
        serving_container_image_uri=app.image(),
        serving_container_command=settings.command,
        serving_container_predict_route=settings.predict_route,
        serving_container_health_route=settings.health_route,
        serving_container_ports=[settings.port],
        serving_container_shared_memory_size_mb=256,
        serving_container_deployment_timeout=600,
    )
    assert model.version_id == "1"
    endpoint = aiplatform.Endpoint.create(
        display_name="by-sdk", labels=labels, dedicated_endpoint_enabled=True
    )
    model.deploy(endpoint=endpoint, machine_type="n2-standard-4", traffic_percentage=100)
    predicted = endpoint.predict(BODY["instances"], parameters=BODY["parameters"])
    raw = endpoint.raw_predict(json.dumps(BODY).encode(), HEADERS)
    assert raw.status_code == 200 and raw.json()["predictions"] == predicted.predictions
    with ThreadPoolExecutor(16) as pool:
        many = list(pool.map(lambda _: endpoint.predict(BODY["instances"]), range(16)))
    assert {one.deployed_model_id for one in many} == {predicted.deployed_model_id}
    endpoint.undeploy_all()
    endpoint.delete()
    model.delete()
    assert nothing_is_left(app)


def gcloud(*arguments: str, region: str = "europe-west4") -> Any:
    """Run a command of gcloud; return its output, parsed as JSON."""
    command = ["gcloud", "ai", *arguments, f"--region={region}", "--format=json", "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout) if run.stdout.strip() else None


def gcloud_at_once(*commands: list[str]) -> list[Any]:
    """Run independent commands at the same time: gcloud takes a second to start."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda command: gcloud(*command), commands))


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_deploys_and_predicts(app: Rehearsed, tmp_path):
    request = tmp_path / "request.json"
    request.write_text(json.dumps(BODY))
    labels = ",".join(f"{k}={v}" for k, v in small().labels_for(app.app).items())
    upload = ["models", "upload", "--display-name=by-gcloud", "--container-ports=7080"]
    upload += [f"--container-image-uri={app.image()}"]
    upload += [f"--container-command={','.join(small().command)}"]
    upload += ["--container-predict-route=/predict", "--container-health-route=/health"]
    create = ["endpoints", "create", "--display-name=by-gcloud", f"--labels={labels}"]
    gcloud_at_once(upload, create)
    by_name = "--filter=displayName=by-gcloud"
    found = gcloud_at_once(["models", "list", by_name], ["endpoints", "list", by_name])
    model_id, endpoint_id = (one["name"].rsplit("/", 1)[1] for (one,) in found)
    deploy = ["endpoints", "deploy-model", endpoint_id, f"--model={model_id}"]
    deploy += ["--display-name=by-gcloud", "--machine-type=n2-standard-4", "--traffic-split=0=100"]
    gcloud(*deploy, "--min-replica-count=1", "--max-replica-count=1")
    response, endpoint = gcloud_at_once(
        ["endpoints", "predict", endpoint_id, f"--json-request={request}"],
        ["endpoints", "describe", endpoint_id],
    )
    assert [one["instance"] for one in response["predictions"]] == ["a", "b"]
    (deployed,) = endpoint["deployedModels"]
    gcloud("endpoints", "undeploy-model", endpoint_id, f"--deployed-model-id={deployed['id']}")
    gcloud_at_once(["endpoints", "delete", endpoint_id], ["models", "delete", model_id])
    assert gcloud_at_once(["models", "list"], ["endpoints", "list"]) == [[], []]


class Curl:
    """curl with a token, at one region's API."""

    def __init__(self) -> None:
        self.parent = small().parent
        self.host = f"https://{small().region}-aiplatform.googleapis.com"
        self.token = access_token()

    def __call__(self, verb: str, path: str, body: dict | None = None, host: str = "") -> Any:
        url = f"{host or self.host}/v1/{path}"
        command = ["curl", "--silent", "--show-error", "--fail-with-body", "-X", verb, url]
        command += ["-H", f"Authorization: Bearer {self.token}"]
        command += ["-H", "Content-Type: application/json"]
        command += ["-d", json.dumps(body)] if body is not None else []
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
        return json.loads(run.stdout)

    def wait(self, operation: dict) -> dict:
        def done() -> dict | None:
            now = self("GET", operation["name"])
            return now if now.get("done") else None

        ended = wait_until(done, 60)
        assert "error" not in ended, ended
        return ended.get("response", {})


def test_curl_deploys_and_predicts(app: Rehearsed):
    curl, labels = Curl(), small().labels_for(app.app)
    container = {
        "imageUri": app.image(),
        "command": small().command,
        "predictRoute": "/predict",
        "healthRoute": "/health",
        "ports": [{"containerPort": 7080}],
    }
    model = {"displayName": "by-curl", "labels": labels, "containerSpec": container}
    model = curl.wait(curl("POST", f"{curl.parent}/models:upload", {"model": model}))["model"]
    made = {"displayName": "by-curl", "labels": labels, "dedicatedEndpointEnabled": True}
    endpoint = curl.wait(curl("POST", f"{curl.parent}/endpoints", made))["name"]
    machine = {"machineSpec": {"machineType": "n2-standard-4"}, "minReplicaCount": 1}
    deployment = {
        "deployedModel": {"model": model, "dedicatedResources": machine},
        "trafficSplit": {"0": 100},
    }
    curl.wait(curl("POST", f"{endpoint}:deployModel", deployment))
    host = f"https://{curl('GET', endpoint)['dedicatedEndpointDns']}"
    response = curl("POST", f"{endpoint}:predict", BODY, host)
    assert [one["instance"] for one in response["predictions"]] == ["a", "b"]
    (deployed,) = curl("GET", endpoint)["deployedModels"]
    curl.wait(curl("POST", f"{endpoint}:undeployModel", {"deployedModelId": deployed["id"]}))
    curl.wait(curl("DELETE", endpoint))
    curl.wait(curl("DELETE", model))
    assert nothing_is_left(app)


def test_command_line_from_deploy_to_cleanup(app: Rehearsed, tmp_path, capsys):
    config = tmp_path / "vertex.json"
    config.write_text(small().model_dump_json())  # JSON is YAML
    given = [app.app, "--config", str(config)]
    assert command_line.main(["deploy", *given, "--image", app.image("1")]) == 0
    assert "https://serving-llms-clients.europe-west4-" in capsys.readouterr().out
    assert command_line.main(["deploy", *given, "--image", app.image("2"), "--canary", "20"]) == 0
    assert command_line.main(["status", *given]) == 0
    shown = capsys.readouterr().out
    assert "you pay for 2 of these" in shown
    assert "dedicated endpoint: 10 MB, 600 s, streaming; :predict, :rawPredict" in shown
    assert command_line.main(["rollback", *given]) == 0
    assert command_line.main(["test", *given]) == 0
    assert "stream_raw_predict:" in capsys.readouterr().out
    assert command_line.main(["undeploy", *given]) == 0
    assert command_line.main(["cleanup", *given]) == 0
    assert "nothing of clients is left" in capsys.readouterr().out
    assert nothing_is_left(app)


def test_deploys_what_another_program_pushed(app: Rehearsed, tmp_path, capsys):
    """Without Docker the stand-in sets PUSH_IMAGES=false."""
    config = tmp_path / "vertex.json"
    config.write_text(small().model_dump_json())
    assert command_line.main(["deploy", app.app, "--tag", "v1", "--config", str(config)]) == 0
    assert "not pushed, because push_images is false" in capsys.readouterr().out
    (version,) = app.deployer().observe().versions
    assert version.container["image_uri"] == app.image("v1")


def test_token_is_printed_only_on_request(app: Rehearsed, tmp_path, capsys):
    config = tmp_path / "vertex.json"
    config.write_text(small(**INVOKE).model_dump_json())
    given = ["token", app.app, "--config", str(config)]
    assert command_line.main(given) == 1
    assert (
        "nothing of clients is deployed in europe-west4; run `make deploy"
        in capsys.readouterr().err
    )
    app.deploy(**INVOKE)
    assert command_line.main([*given, "--print"]) == 0
    printed = capsys.readouterr().out.strip()
    assert len(printed) > 20 and len(printed.split()) == 1
    assert command_line.main(given) == 0
    shown = capsys.readouterr().out
    host = "https://serving-llms-clients.europe-west4-"
    assert f"base_url: {host}" in shown and shown.count(printed) == 0
    plain = tmp_path / "plain.json"
    plain.write_text(small().model_dump_json())  # not deployed yet: the text is about what is
    assert command_line.main(["token", app.app, "--config", str(plain)]) == 0
    assert capsys.readouterr().out == shown
    assert command_line.main(["status", app.app, "--config", str(plain)]) == 0
    assert "/invoke/PATH (preview); :predict" in capsys.readouterr().out
    base = next(line.split()[1] for line in shown.splitlines() if "base_url" in line)
    chat = {"messages": [{"role": "user", "content": "hello"}]}
    response = requests.post(
        f"{base}/chat/completions",
        json=chat,
        headers={"Authorization": f"Bearer {printed}"},
        timeout=60,
    )
    assert response.json()["choices"][0]["message"]["content"] == "hello"


def test_googles_errors_are_one_line(app: Rehearsed, quick_standin, monkeypatch, tmp_path, capsys):
    config = tmp_path / "vertex.json"
    config.write_text(small(machine_type="n7-standard-4").model_dump_json())
    given = [app.app, "--config", str(config), "--image", app.image()]
    assert command_line.main(["deploy", *given]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: INVALID_ARGUMENT: ") and "n7-standard-4" in error
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(quick_standin.folder / "viewer.json"))
    assert command_line.main(["deploy", *given]) == 1
    assert capsys.readouterr().err.startswith("error: PERMISSION_DENIED: ")


def test_ctrl_c_names_resources_that_still_cost_money(
    app: Rehearsed, monkeypatch, tmp_path, capsys
):
    config = tmp_path / "vertex.json"
    config.write_text(small().model_dump_json())

    def interrupted(line: str) -> None:
        print(line)
        if line.startswith("deploy version 1"):
            raise KeyboardInterrupt

    monkeypatch.setattr(command_line, "_reporters", lambda: (interrupted, None))
    given = [app.app, "--config", str(config)]
    assert command_line.main(["deploy", *given, "--image", app.image()]) == 130
    error = capsys.readouterr().err
    assert "This does not stop Google" in error and "deploy version 1 on 1 x" in error
    assert f"python -m deploy.vertex cleanup {app.app}" in error
    assert any(resource.billed for resource in app.deployer().resources())  # it continues


def test_rejects_requests_without_token(app: Rehearsed):
    host = f"https://{small().region}-aiplatform.googleapis.com"
    run = subprocess.run(
        ["curl", "--silent", f"{host}/v1/{small().parent}/models"], capture_output=True, text=True
    )
    error = json.loads(run.stdout)["error"]
    assert (error["code"], error["status"]) == (401, "UNAUTHENTICATED")


def test_prediction_after_undeploy_names_the_make_command(app: Rehearsed):
    app.deploy()
    app.deployer().undeploy()
    with pytest.raises(UserError, match="deployed any more; run `make deploy APP=clients`"):
        app.predict(BODY)


def test_rejects_invalid_canary_before_pushing(app: Rehearsed, capsys):
    assert command_line.main(["deploy", app.app, "--canary", "200"]) == 1
    shown = capsys.readouterr()
    assert "push" not in shown.out and shown.err.startswith("error: canary: 200 given")


def test_prediction_without_deployment_names_the_app(app: Rehearsed):
    with pytest.raises(UserError, match="nothing of clients is deployed"):
        app.predict(BODY)
