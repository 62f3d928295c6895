"""dolly's instruction format and end marker, on a small GPT-NeoX that has learned them.

The checkpoint has dolly's architecture and special tokens in miniature. It has learned three
answers, each followed by "### End", so that responses can be compared exactly.
"""

import os

import httpx
import pytest
import yaml

from deploy.archive.build import build_archive
from deploy.torchserve.client import predict, stream
from deploy.torchserve.server import Server
from handler.config import load_app
from tests import tiny
from tests.conftest import remove_exports

pytestmark = pytest.mark.served

ANSWERS = {
    "Name a dish with eggs.": "A tortilla.",
    "What is 2 + 2?": "It is 4,\nof course.",
    "Say hello in Spanish, politely, to a whole room.": "Muy buenos días a todos.",
}


@pytest.fixture(scope="module", params=["transformers", "openvino"])
def dolly_server(request, tmp_path_factory: pytest.TempPathFactory):
    app = load_app("dolly-v2-3b")
    pairs = {app.prompt.template.replace("{prompt}", q): a for q, a in ANSWERS.items()}
    tmp_path = tmp_path_factory.mktemp("dolly")
    weights = tiny.taught_model(
        tmp_path / f"weights-{os.getpid()}", tiny.DOLLY, tiny.DOLLY_SPECIAL, pairs, end="### End"
    )
    archive = build_archive(
        "dolly-v2-3b", weights, engine={"name": request.param}, store=tmp_path / "store"
    )
    config = yaml.safe_load((archive / "model-config.yaml").read_text())["app"]
    assert config["prompt"] == app.prompt.model_dump() and config["engine"]["name"] == request.param
    with Server(archive, port=7200) as server:
        yield server
    remove_exports(weights.name)


def post(server, *questions, **parameters):
    parameters |= {"temperature": 0}
    return httpx.post(
        server.url, json={"instances": list(questions), "parameters": parameters}, timeout=60
    )


@pytest.mark.parametrize("question", ANSWERS)
def test_response_is_the_completion_alone(dolly_server, question):
    """No prompt, no keys and no end marker; the marker ended it."""
    response = post(dolly_server, question)
    assert response.json() == {"predictions": [ANSWERS[question]]}
    assert response.headers["x-finish-reason"] == "stop"


def test_several_instances(dolly_server):
    """The 2023 project failed on more than one."""
    assert post(dolly_server, *ANSWERS).json() == {"predictions": list(ANSWERS.values())}


def test_message_is_an_instruction(dolly_server):
    question, answer = next(iter(ANSWERS.items()))
    instance = {"messages": [{"role": "user", "content": question}]}
    assert post(dolly_server, instance).json() == {"predictions": [answer]}


def test_full_text_has_the_instruction_format(dolly_server):
    question, answer = next(iter(ANSWERS.items()))
    (text,) = post(dolly_server, question, return_full_text=True).json()["predictions"]
    assert text.endswith(f"### Instruction:\n{question}\n\n### Response:\n{answer}")


def test_stream_has_the_completion(dolly_server):
    for question, answer in ANSWERS.items():
        body = {"instances": [question], "parameters": {"temperature": 0}}
        events = list(stream(dolly_server.url, body))
        assert "".join(event["text"] for event in events) == answer
        assert events[-1]["finish_reason"] == "stop"


def test_completion_without_end_marker(dolly_server):
    """The 2023 project returned [None] there."""
    question, answer = list(ANSWERS.items())[2]
    body = {"instances": [question], "parameters": {"temperature": 0, "max_new_tokens": 8}}
    (text,) = predict(dolly_server.url, body)["predictions"]
    assert text and answer.startswith(text) and text != answer
