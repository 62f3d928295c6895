"""Send a request to an app's endpoint in the three ways of Vertex AI."""

import json
from collections.abc import Iterable
from typing import Any, cast

from google.api_core.exceptions import NotFound
from google.cloud import aiplatform

from deploy.common.paths import UserError
from deploy.torchserve.client import SAMPLE_REQUEST, server_sent_events
from deploy.vertex.config import VertexSettings
from deploy.vertex.credentials import default_credentials

EXAMPLE = SAMPLE_REQUEST | {"parameters": {"max_new_tokens": 20, "temperature": 0}}
"""The request of `make test-vertex`."""


def predict_in_three_ways(
    settings: VertexSettings, app: str, body: dict[str, Any]
) -> dict[str, Any]:
    """Send a request with each of the SDK's methods.

    Args:
        settings: the project and region.
        app: the APP.
        body: `{"instances": [...], "parameters": {...}}`.

    Returns:
        `predict`: the predictions. `raw_predict`: the container's own JSON.
        `stream_raw_predict`: the server-sent events.

    Raises:
        UserError: an error was returned; its message. (The SDK raises a bare ValueError for the
            first and checks no status for the others.)
    """
    name = settings.endpoint_name(app)
    aiplatform.init(
        project=settings.project_id, location=settings.region, credentials=default_credentials()
    )
    endpoint = aiplatform.Endpoint(name)
    headers = {"Content-Type": "application/json"}
    try:
        predicted = endpoint.predict(body["instances"], parameters=body.get("parameters"))
    except NotFound as error:
        raise UserError(f"nothing of {app} is deployed; run `make deploy APP={app}`") from error
    except ValueError as error:
        if "no model is deployed" in str(error):  # the endpoint exists, as after `undeploy`
            raise UserError(
                f"nothing of {app} is deployed any more; run `make deploy APP={app}`"
            ) from error
        raise UserError(f"predict: {error}") from error
    raw = endpoint.raw_predict(json.dumps(body).encode(), headers)
    if raw.status_code != 200:
        raise UserError(f"raw_predict: {raw.status_code}: {raw.text.strip()}")
    streamed = body | {"parameters": body.get("parameters", {}) | {"stream": True}}
    # The SDK declares an iterator of responses, and yields the lines of one.
    stream = endpoint.stream_raw_predict(json.dumps(streamed).encode(), headers)
    lines = list(cast(Iterable[bytes], stream))
    events = list(server_sent_events(lines, "stream_raw_predict"))
    if not events:
        raise UserError(f"stream_raw_predict: {b' '.join(lines).decode().strip() or 'no response'}")
    return {
        "predict": predicted.predictions,
        "raw_predict": raw.json(),
        "stream_raw_predict": events,
    }
