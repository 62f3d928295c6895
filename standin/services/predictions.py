"""PredictionService: limits, the choice of a replica, requests to it and its responses."""

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from google.cloud.aiplatform_v1 import types as t
from google.protobuf import json_format
from yarl import URL

from standin import limits
from standin.errors import STATUS_OF_HTTP, ApiError
from standin.replicas.deployments import Deployment, Deployments
from standin.services.endpoints import Endpoints
from standin.services.messages import parse, raw, value_to_json
from standin.settings import StandinSettings

RAW = ("rawPredict", "streamRawPredict", "invoke")
_NOT_FORWARDED = {
    "host",
    "authorization",
    "content-length",
    "accept-encoding",
    "connection",
    "transfer-encoding",
    "expect",
    "proxy-connection",
    "x-goog-user-project",
}
"""Request headers that are between the client and Vertex AI."""


@dataclass(frozen=True)
class RequestLimits:
    """The limits of one request: size of the body and duration."""

    bytes: int
    seconds: float


@dataclass(frozen=True)
class Upstream:
    """A replica's response whose body is not read yet."""

    response: aiohttp.ClientResponse
    deployment: Deployment
    deadline: float

    @property
    def ids(self) -> str:
        return (
            f"endpoint_id: {self.deployment.endpoint_id}, deployed_model_id: {self.deployment.id}"
        )

    def headers(self) -> dict[str, str]:
        """Return the headers of a raw prediction (seen in Vertex AI's responses)."""
        model = self.deployment.model
        return {
            "Content-Type": self.response.headers.get("Content-Type", "application/octet-stream"),
            "X-Vertex-AI-Deployed-Model-Id": self.deployment.id,
            "X-Vertex-AI-Model": model.name,
            "X-Vertex-AI-Model-Version-Id": model.version_id,
        }


class Predictions:
    """Predictions on all endpoints."""

    def __init__(
        self, settings: StandinSettings, endpoints: Endpoints, deployments: Deployments
    ) -> None:
        self.settings, self.endpoints, self.deployments = settings, endpoints, deployments
        self._random = random.Random(f"traffic {settings.seed}")  # noqa: S311

    def limits(self, name: str, host: str, verb: str) -> RequestLimits:
        """Return a request's limits, before its body is read.

        Raises:
            ApiError: the endpoint has another host name, or does not support the verb.
        """
        endpoint = self.endpoints.find(name)
        dedicated = host.partition(":")[0].endswith(".prediction.vertexai.goog")
        if endpoint.dedicated_endpoint_enabled and not dedicated:
            raise ApiError(
                "FAILED_PRECONDITION",
                f"Dedicated Endpoint {name} cannot be accessed through the shared Vertex AI domain "
                f"aiplatform.googleapis.com. Please access the endpoint using its dedicated dns "
                f"name '{endpoint.dedicated_endpoint_dns}'.",
            )
        if dedicated and host.partition(":")[0] != endpoint.dedicated_endpoint_dns:
            raise ApiError("NOT_FOUND", f"{host} is not the DNS name of {name}.")
        if not dedicated and verb in ("streamRawPredict", "invoke"):
            raise ApiError(
                "FAILED_PRECONDITION", f"{verb} of custom models needs a dedicated endpoint."
            )
        if not dedicated:
            seconds = limits.SHARED_SECONDS
            return RequestLimits(limits.SHARED_BYTES, seconds * self.settings.limit_scale)
        timeout = endpoint.client_connection_config.inference_timeout.ToTimedelta().total_seconds()
        seconds = (timeout or limits.DEDICATED_SECONDS) * self.settings.limit_scale
        return RequestLimits(limits.DEDICATED_BYTES, seconds)

    async def send(
        self,
        name: str,
        limit: RequestLimits,
        body: bytes,
        headers: Mapping[str, str],
        *,
        method: str = "POST",
        path: str = "",
        deployed_model: str = "",
    ) -> Upstream:
        """Send a body to a replica; return when its response starts.

        Args:
            name: the endpoint's name.
            limit: as `limits` returned it.
            body: at most `limit.bytes`.
            headers: the client's headers.
            method: the HTTP verb (`invoke`).
            path: with its query, as the client encoded them, instead of the predict route
                (`invoke`).
            deployed_model: instead of the traffic split.

        Raises:
            ApiError: no replica is healthy, or its response does not start in time.
        """
        if len(body) > limit.bytes:
            raise too_large(limit.bytes)
        deployment = self._choose_deployment(name, deployed_model)
        if bool(path) != bool(deployment.spec.invoke_route_prefix):
            raise ApiError(
                "FAILED_PRECONDITION",
                "invoke needs a Model with invoke_route_prefix, and such a Model has no other way.",
            )
        replica = deployment.next_replica()
        if replica is None:
            raise ApiError(
                "UNAVAILABLE", f"No replica of DeployedModel {deployment.id} is healthy."
            )
        sent = {k: v for k, v in headers.items() if k.lower() not in _NOT_FORWARDED}
        deadline = asyncio.get_running_loop().time() + limit.seconds
        ids = f"endpoint_id: {deployment.endpoint_id}, deployed_model_id: {deployment.id}"
        try:
            async with asyncio.timeout_at(deadline):
                response = await self.deployments.http.request(
                    method,
                    URL(replica.url + (path or deployment.predict_route), encoded=True),
                    data=body if method == "POST" else None,
                    allow_redirects=False,
                    headers=sent,
                    timeout=aiohttp.ClientTimeout(None),
                )
        except TimeoutError as error:
            raise _too_slow(ids) from error
        except aiohttp.ClientError as error:
            raise ApiError(
                "UNAVAILABLE", f"The model server hung up when processing {ids}: {error}"
            ) from error
        return Upstream(response, deployment, deadline)

    async def read(self, upstream: Upstream, limit: RequestLimits) -> bytes:
        """Read the whole body of a response.

        Raises:
            ApiError: the body is too long, too slow, or cut off.
        """
        try:
            async with asyncio.timeout_at(upstream.deadline):
                data = await upstream.response.read()
        except TimeoutError as error:
            raise _too_slow(upstream.ids) from error
        except aiohttp.ClientError as error:
            raise ApiError("UNAVAILABLE", f"{upstream.ids}: {error}") from error
        finally:
            upstream.response.release()
        if len(data) > limit.bytes:
            raise ApiError(
                "INVALID_ARGUMENT",
                f"Response size too large. Received {len(data)} bytes; max is {limit.bytes}.",
            )
        return data

    async def predict_json(self, name: str, limit: RequestLimits, body: bytes) -> dict[str, Any]:
        """Answer `predict`: JSON in the documented shape, for request and response.

        Raises:
            ApiError: request or response has another shape, or the model server sent an error.
        """
        if len(body) > limit.bytes:
            raise too_large(limit.bytes)
        try:
            data = json.loads(body)
        except ValueError as error:
            raise ApiError("INVALID_ARGUMENT", f"Invalid JSON payload received. {error}") from error
        parse(data, raw(t.PredictRequest)())
        if not data.get("instances"):
            raise ApiError("INVALID_ARGUMENT", "instances: Required field is not set.")
        data.pop("endpoint", None)
        headers = {"Content-Type": "application/json"}
        upstream = await self.send(name, limit, json.dumps(data).encode(), headers)
        text = await self.read(upstream, limit)
        if (code := upstream.response.status) != 200:
            fallback = "INTERNAL" if code >= 500 else "INVALID_ARGUMENT"
            raise ApiError(STATUS_OF_HTTP.get(code, fallback), text.decode(errors="replace"))
        try:
            predictions = json.loads(text)["predictions"]
        except (ValueError, LookupError, TypeError):
            predictions = None
        dedicated = self.endpoints.find(name).dedicated_endpoint_enabled
        if isinstance(predictions, dict) and not dedicated:
            # `PredictResponse.predictions` is a list. What Google's shared host makes of an object
            # is not documented; at a dedicated endpoint it comes through, as Model Garden's
            # notebooks and LiteLLM expect.
            raise ApiError(
                "UNIMPLEMENTED",
                'The stand-in does not imitate {"predictions": {...}} through predict on a shared '
                "endpoint: what Vertex AI makes of an object there is not documented. Use "
                "rawPredict, or a dedicated endpoint.",
            )
        if not isinstance(predictions, (list, dict)):
            raise ApiError(
                "INVALID_ARGUMENT",
                f"Failed to handle request. {upstream.ids} with error: the model server's response "
                'is not {"predictions": [...]}.',
            )
        model = upstream.deployment.model
        return {
            "predictions": predictions,
            "deployedModelId": upstream.deployment.id,
            "model": model.name,
            "modelDisplayName": model.display_name,
            "modelVersionId": model.version_id,
        }

    async def predict_message(
        self, request: t.PredictRequest, host: str, size: int
    ) -> t.PredictResponse:
        """Answer `predict` through gRPC.

        Numbers of `google.protobuf.Value` are doubles: the container gets 50.0 instead of 50, as it
        may on Vertex AI.

        Raises:
            ApiError: as `predict_json`.
        """
        limit = self.limits(request.endpoint, host, "predict")
        if size > limit.bytes:
            raise too_large(limit.bytes)
        body = {"instances": [value_to_json(value) for value in request.instances]}
        if request.HasField("parameters"):
            body["parameters"] = value_to_json(request.parameters)
        response = await self.predict_json(request.endpoint, limit, json.dumps(body).encode())
        return json_format.ParseDict(response, raw(t.PredictResponse)())

    def _choose_deployment(self, name: str, deployed_model: str) -> Deployment:
        endpoint = self.endpoints.find(name)
        split = {k: v for k, v in endpoint.traffic_split.items() if v}
        if deployed_model:
            if deployed_model not in {d.id for d in endpoint.deployed_models}:
                raise ApiError("NOT_FOUND", f"DeployedModel {deployed_model} is not at {name}.")
            return self.deployments.find(deployed_model)
        if not split:
            raise ApiError(
                "FAILED_PRECONDITION",
                f"Endpoint {name} doesn't have traffic_split, or no model is deployed at it.",
            )
        return self.deployments.find(self._random.choices([*split], [*split.values()])[0])


def too_large(limit: int) -> ApiError:
    """Make the error for a body that is too large, in Vertex AI's wording."""
    return ApiError("INVALID_ARGUMENT", f"Request payload size exceeds the limit: {limit} bytes.")


def _too_slow(ids: str) -> ApiError:
    return ApiError("UNAVAILABLE", f"Took too long to respond when processing {ids}")
