"""PredictionService: limits, the choice of a replica, and what goes to it and comes back."""

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from google.cloud.aiplatform_v1 import types as t
from google.protobuf import json_format
from google.protobuf.message import Message

from standin import limits
from standin.errors import STATUS_OF_HTTP, ApiError
from standin.methods import parse, raw
from standin.replicas.deployments import Deployment, Serving
from standin.services.endpoints import Endpoints
from standin.services.models import Models
from standin.settings import Settings

RAW = ("rawPredict", "streamRawPredict", "invoke")
_KEPT_BACK = {"host", "authorization", "content-length", "accept-encoding", "connection"}
_KEPT_BACK |= {"transfer-encoding", "expect", "proxy-connection", "x-goog-user-project"}


@dataclass(frozen=True)
class Allowance:
    """What an endpoint allows: the shared door, or its own."""

    dedicated: bool
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Upstream:
    """A replica's reply that has begun, and whose it is."""

    reply: aiohttp.ClientResponse
    deployment: Deployment
    deadline: float

    @property
    def ids(self) -> str:
        return (
            f"endpoint_id: {self.deployment.endpoint_id}, deployed_model_id: {self.deployment.id}"
        )

    def headers(self) -> dict[str, str]:
        """What raw predictions carry beside the body (seen in Vertex AI's replies)."""
        model = self.deployment.model
        return {
            "Content-Type": self.reply.headers.get("Content-Type", "application/octet-stream"),
            "X-Vertex-AI-Deployed-Model-Id": self.deployment.id,
            "X-Vertex-AI-Model": model.name,
            "X-Vertex-AI-Model-Version-Id": model.version_id,
        }


class Predictions:
    """Predictions on all endpoints."""

    def __init__(
        self, settings: Settings, endpoints: Endpoints, models: Models, serving: Serving
    ) -> None:
        self.settings, self.endpoints = settings, endpoints
        self.models, self.serving = models, serving
        self._random = random.Random(f"traffic {settings.seed}")  # noqa: S311

    def access(self, name: str, host: str, verb: str) -> Allowance:
        """What a request may be, before its body is read.

        Raises:
            ApiError: the endpoint has another door, or none for this verb.
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
            return Allowance(False, limits.SHARED_BYTES, seconds * self.settings.limit_scale)
        timeout = endpoint.client_connection_config.inference_timeout.ToTimedelta().total_seconds()
        seconds = (timeout or limits.DEDICATED_SECONDS) * self.settings.limit_scale
        return Allowance(True, limits.DEDICATED_BYTES, seconds)

    async def send(
        self,
        name: str,
        access: Allowance,
        body: bytes,
        headers: Mapping[str, str],
        *,
        path: str = "",
        deployed_model: str = "",
    ) -> Upstream:
        """Pass a body to a replica; return when its reply begins.

        Args:
            name: of the endpoint.
            access: as `access` returned it.
            body: at most `access.bytes`.
            headers: the client's; what is between it and Vertex AI stays back.
            path: instead of the predict route (`invoke`).
            deployed_model: instead of the traffic split.

        Raises:
            ApiError: nobody there, or no reply in time.
        """
        if len(body) > access.bytes:
            raise too_large(access.bytes)
        deployment = self._choose(name, deployed_model)
        if bool(path) != bool(deployment.spec.invoke_route_prefix):
            raise ApiError(
                "FAILED_PRECONDITION",
                "invoke needs a Model with invoke_route_prefix, and such a Model has no other way.",
            )
        replica = deployment.choose()
        if replica is None:
            raise ApiError(
                "UNAVAILABLE", f"No replica of DeployedModel {deployment.id} is healthy."
            )
        sent = {k: v for k, v in headers.items() if k.lower() not in _KEPT_BACK}
        deadline = asyncio.get_running_loop().time() + access.seconds
        ids = f"endpoint_id: {deployment.endpoint_id}, deployed_model_id: {deployment.id}"
        try:
            async with asyncio.timeout_at(deadline):
                reply = await self.serving.http.post(
                    replica.url + (path or deployment.predict_route),
                    data=body,
                    headers=sent,
                    timeout=aiohttp.ClientTimeout(None),
                )
        except TimeoutError as error:
            raise _too_slow(ids) from error
        except aiohttp.ClientError as error:
            raise ApiError(
                "UNAVAILABLE", f"The model server hung up when processing {ids}: {error}"
            ) from error
        return Upstream(reply, deployment, deadline)

    async def read(self, upstream: Upstream, access: Allowance) -> bytes:
        """The whole body of a reply.

        Raises:
            ApiError: it is too long, too slow, or cut off.
        """
        try:
            async with asyncio.timeout_at(upstream.deadline):
                data = await upstream.reply.read()
        except TimeoutError as error:
            raise _too_slow(upstream.ids) from error
        except aiohttp.ClientError as error:
            raise ApiError("UNAVAILABLE", f"{upstream.ids}: {error}") from error
        finally:
            upstream.reply.release()
        if len(data) > access.bytes:
            raise ApiError(
                "INVALID_ARGUMENT",
                f"Response size too large. Received {len(data)} bytes; max is {access.bytes}.",
            )
        return data

    async def predict_json(self, name: str, access: Allowance, body: bytes) -> dict[str, Any]:
        """`predict`: JSON in the documented shape, both ways.

        Raises:
            ApiError: the body, or the model's answer, has another shape; or the model's own error.
        """
        if len(body) > access.bytes:
            raise too_large(access.bytes)
        try:
            data = json.loads(body)
        except ValueError as error:
            raise ApiError("INVALID_ARGUMENT", f"Invalid JSON payload received. {error}") from error
        parse(data, raw(t.PredictRequest)())
        if not data.get("instances"):
            raise ApiError("INVALID_ARGUMENT", "instances: Required field is not set.")
        data.pop("endpoint", None)
        headers = {"Content-Type": "application/json"}
        upstream = await self.send(name, access, json.dumps(data).encode(), headers)
        answer = await self.read(upstream, access)
        if (code := upstream.reply.status) != 200:
            fallback = "INTERNAL" if code >= 500 else "INVALID_ARGUMENT"
            raise ApiError(STATUS_OF_HTTP.get(code, fallback), answer.decode(errors="replace"))
        try:
            predictions = json.loads(answer)["predictions"]
        except (ValueError, LookupError, TypeError):
            predictions = None
        if not isinstance(predictions, list):
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

    async def predict_message(self, request: Message, host: str, size: int) -> Message:
        """`predict` through gRPC. Numbers of `google.protobuf.Value` are doubles: 50 arrives as
        50.0, as it may from Vertex AI.

        Raises:
            ApiError: as `predict_json`.
        """
        access = self.access(request.endpoint, host, "predict")
        if size > access.bytes:
            raise too_large(access.bytes)
        body = {"instances": [_json(value) for value in request.instances]}
        if request.HasField("parameters"):
            body["parameters"] = _json(request.parameters)
        answer = await self.predict_json(request.endpoint, access, json.dumps(body).encode())
        return json_format.ParseDict(answer, raw(t.PredictResponse)())

    def _choose(self, name: str, deployed_model: str) -> Deployment:
        endpoint = self.endpoints.find(name)
        split = {k: v for k, v in endpoint.traffic_split.items() if v}
        if deployed_model:
            if deployed_model not in {d.id for d in endpoint.deployed_models}:
                raise ApiError("NOT_FOUND", f"DeployedModel {deployed_model} is not at {name}.")
            return self.serving.find(deployed_model)
        if not split:
            raise ApiError(
                "FAILED_PRECONDITION",
                f"Endpoint {name} doesn't have traffic_split, or no model is deployed at it.",
            )
        return self.serving.find(self._random.choices([*split], [*split.values()])[0])


def too_large(limit: int) -> ApiError:
    """As Vertex AI says it."""
    return ApiError("INVALID_ARGUMENT", f"Request payload size exceeds the limit: {limit} bytes.")


def _too_slow(ids: str) -> ApiError:
    return ApiError("UNAVAILABLE", f"Took too long to respond when processing {ids}")


def _json(value: Message) -> Any:
    """A `google.protobuf.Value` as JSON, with numbers left as doubles."""
    kind = value.WhichOneof("kind")
    if kind == "struct_value":
        return {key: _json(item) for key, item in value.struct_value.fields.items()}
    if kind == "list_value":
        return [_json(item) for item in value.list_value.values]
    return None if kind in (None, "null_value") else getattr(value, kind)
