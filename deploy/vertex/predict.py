"""Send a request to an app's endpoint in every way that the endpoint has."""

import json
from collections.abc import Iterable
from typing import Any, cast

from google.api_core.exceptions import GoogleAPICallError, NotFound
from google.cloud import aiplatform
from requests import Response

from deploy.common.paths import UserError
from deploy.torchserve.client import SAMPLE_REQUEST, server_sent_events
from deploy.vertex.config import VertexSettings
from deploy.vertex.credentials import default_credentials

EXAMPLE = SAMPLE_REQUEST | {"parameters": {"max_new_tokens": 20, "temperature": 0}}
"""The request of `make test-vertex` in Vertex AI's shape."""
CHAT: dict[str, Any] = SAMPLE_REQUEST["instances"][0] | {"max_tokens": 20, "temperature": 0}
"""The same in OpenAI's."""
HEADERS = {"Content-Type": "application/json"}


def predict_in_every_way(
    settings: VertexSettings, app: str, body: dict[str, Any], chat: dict[str, Any] = CHAT
) -> dict[str, Any]:
    """Send a request with each of the SDK's methods that the endpoint takes.

    Args:
        settings: the project, the region, the type of the endpoint and its methods.
        app: the APP.
        body: `{"instances": [...], "parameters": {...}}`.
        chat: the body of a request to OpenAI's chat completions.

    Returns:
        `predict`: the predictions. `raw_predict`: the container's own JSON. `stream_raw_predict`,
        on a dedicated endpoint: the server-sent events. `chatCompletions`: OpenAI's object, through
        `predict` or, on a shared endpoint, `raw_predict`.
        With `invoke_route_prefix` instead `invoke` and `invoke, streamed`: OpenAI's objects.

    Raises:
        UserError: an error was returned; its message. (The SDK raises a bare ValueError for
            `predict` and checks no status for the others.)
    """
    aiplatform.init(
        project=settings.project_id, location=settings.region, credentials=default_credentials()
    )
    endpoint = aiplatform.Endpoint(settings.endpoint_name(app))
    try:
        if settings.invoke_route_prefix:
            return _invoke(endpoint, app, chat)
        return _predict(endpoint, settings.dedicated, body, chat)
    except NotFound as error:
        raise UserError(f"nothing of {app} is deployed; run `make deploy APP={app}`") from error
    except UserError as error:
        if "no model is deployed" in str(error):  # the endpoint exists, as after `undeploy`
            raise UserError(
                f"nothing of {app} is deployed any more; run `make deploy APP={app}`"
            ) from error
        raise


def _predict(
    endpoint: aiplatform.Endpoint, dedicated: bool, body: dict[str, Any], chat: dict[str, Any]
) -> dict[str, Any]:
    ways = {"predict": _plain(endpoint, body["instances"], body.get("parameters"))}
    ways["raw_predict"] = _json("raw_predict", endpoint.raw_predict(_bytes(body), HEADERS))
    if dedicated:
        streamed = body | {"parameters": body.get("parameters", {}) | {"stream": True}}
        stream = endpoint.stream_raw_predict(_bytes(streamed), HEADERS)
        ways["stream_raw_predict"] = _events("stream_raw_predict", stream)
    instances = [{"@requestFormat": "chatCompletions"} | chat]
    if dedicated:
        ways["chatCompletions"] = _plain(endpoint, instances, None)
    else:  # the type of `predict` on shared endpoints is a list, and OpenAI's response an object
        raw = endpoint.raw_predict(_bytes({"instances": instances}), HEADERS)
        ways["chatCompletions"] = _json("chatCompletions", raw)["predictions"]
    return ways


def _invoke(endpoint: aiplatform.Endpoint, app: str, chat: dict[str, Any]) -> dict[str, Any]:
    path, chat = f"/predictions/{app}/1.0/v1/chat/completions", {"model": app} | chat
    plain = endpoint.invoke(path, _bytes(chat), HEADERS)
    ways = {"invoke": _json("invoke", cast(Response, plain))}
    stream = endpoint.invoke(path, _bytes(chat | {"stream": True}), HEADERS, stream=True)
    return ways | {"invoke, streamed": _events("invoke", stream)}


def _plain(endpoint: aiplatform.Endpoint, instances: list[Any], parameters: Any) -> Any:
    try:
        return endpoint.predict(instances, parameters=parameters).predictions
    except NotFound:
        raise
    except (ValueError, GoogleAPICallError) as error:  # dedicated endpoints raise the first
        raise UserError(f"predict: {error}") from error


def _json(way: str, response: Response) -> Any:
    if response.status_code != 200:
        raise UserError(f"{way}: {response.status_code}: {response.text.strip()}")
    return response.json()


def _events(way: str, stream: object) -> list[dict]:
    # The SDK declares an iterator of responses, and yields the lines of one.
    lines = list(cast(Iterable[bytes], stream))
    events = list(server_sent_events(lines, way))
    if not events:
        raise UserError(f"{way}: {b' '.join(lines).decode().strip() or 'no response'}")
    return events


def _bytes(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()
