"""Clients of other projects on Vertex AI's endpoints: dedicated, shared, and with invoke.

The stand-in stands for Vertex AI. Its certificates and its proxy reach the clients through the
environment, as a company's would.
"""

import json
import re
import shutil
import subprocess

import pytest

from deploy.vertex.config import load_settings
from deploy.vertex.texts import token_use
from tests.clients.conftest import APP, GREEDY, MESSAGES

pytestmark = pytest.mark.served


def host_of(platform, kind: str) -> str:
    """The host name of a dedicated endpoint."""
    from google.cloud import aiplatform

    standin = platform.standin
    aiplatform.init(project=standin.project, location=standin.region)
    return aiplatform.Endpoint(platform.endpoints[kind]).gca_resource.dedicated_endpoint_dns


@pytest.fixture
def given(platform) -> dict:
    """What the scripts read."""
    return {
        "project": platform.standin.project,
        "location": platform.standin.region,
        "messages": MESSAGES,
        "greedy": GREEDY,
        "model": APP,
    }


def test_openai_client_with_the_address_that_make_token_prints(
    run_python, platform, given, expected
):
    """The text names the app of the endpoint; here the container serves another one."""
    from deploy.vertex.credentials import access_token

    settings = load_settings(project=platform.standin.project, invoke_route_prefix="/*")
    text = token_use(settings, APP, host_of(platform, "invoke"))
    base_url = re.search(r"base_url: (\S+)", text)[1]
    endpoint = settings.endpoint_name(APP)
    assert f"/v1/{endpoint}/invoke/" in base_url
    given["base_url"] = base_url.replace(endpoint, platform.endpoints["invoke"])
    found = run_python("openai_vertex", given | {"key": access_token()})
    assert found["text"] == found["streamed"] == expected["chat"]
    assert found["models"] == [APP] and found["refused"] == 401


def test_litellm_on_shared_and_dedicated_endpoints(run_python, platform, given, expected):
    predict_url = f"https://{host_of(platform, 'predict')}/v1/{platform.endpoints['predict']}"
    given["predict_url"] = f"{predict_url}:predict"
    given["shared"] = platform.endpoints["shared"].rsplit("/", 1)[1]
    found = run_python("litellm_vertex", given)
    assert found["format"] == {"text": expected["chat"], "usage": expected["chat_tokens"]}
    assert found["flat"]["text"].startswith(MESSAGES[0]["content"])  # return_full_text
    assert "ENDPOINT/chat/completions" in found["refused"] and "501" in found["refused"]


@pytest.mark.skipif(not shutil.which("gcloud"), reason="gcloud is not installed")
def test_gcloud_on_a_shared_endpoint(platform, expected, tmp_path):
    request, shared = tmp_path / "request.json", platform.endpoints["shared"].rsplit("/", 1)[1]

    def gcloud(verb: str, instance: dict, *options: str) -> dict:
        request.write_text(json.dumps({"instances": [instance], "parameters": None}))
        command = ["gcloud", "ai", "endpoints", verb, shared, *options, "--format=json"]
        command += [f"--region={platform.standin.region}", "--quiet"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    flat = {"prompt": "The capital of Japan is", "return_full_text": False, "stop": None}
    answer = gcloud("predict", flat | GREEDY, f"--json-request={request}")
    assert answer["predictions"] == [expected["text"]]
    chat = {"@requestFormat": "chatCompletions", "messages": MESSAGES} | GREEDY
    header = "--http-headers=Content-Type=application/json"
    answer = gcloud("raw-predict", chat, f"--request=@{request}", header)
    assert answer["predictions"]["choices"][0]["message"]["content"] == expected["chat"]
