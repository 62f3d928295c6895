"""The methods that the stand-in imitates, for REST and gRPC, and how a REST request is read.

All other methods are answered with 501. Verbs, URLs and bodies are those of the SDK's generated
REST clients, which are made from the `google.api.http` options in
https://github.com/googleapis/googleapis/tree/master/google/cloud/aiplatform/v1
"""

import importlib
import re
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from google.cloud.aiplatform_v1 import types as t
from google.longrunning import operations_pb2 as lro
from google.protobuf.message import Message

from standin.errors import ApiError
from standin.services.messages import parse, raw

PACKAGE = "google.cloud.aiplatform.v1."
VERSIONS = ("v1", "v1beta1", "ui")
"""gcloud polls under v1beta1, the SDK's REST client under /ui/ (seen in their requests)."""
_SYSTEM_PARAMETERS = {"alt", "$alt", "key", "prettyPrint", "fields", "access_token", "quotaUser"}

_PERMISSIONS = {
    "ModelService": {
        "UploadModel": "models.upload",
        "GetModel": "models.get",
        "ListModels": "models.list",
        "ListModelVersions": "models.list",
        "UpdateModel": "models.update",
        "MergeVersionAliases": "models.update",
        "DeleteModelVersion": "models.delete",
        "DeleteModel": "models.delete",
    },
    "EndpointService": {
        "CreateEndpoint": "endpoints.create",
        "GetEndpoint": "endpoints.get",
        "ListEndpoints": "endpoints.list",
        "UpdateEndpoint": "endpoints.update",
        "DeleteEndpoint": "endpoints.delete",
        "DeployModel": "endpoints.deploy",
        "UndeployModel": "endpoints.undeploy",
        "MutateDeployedModel": "endpoints.deploy",
    },
    "PredictionService": {"Predict": "endpoints.predict"},
    "MetadataService": {"GetMetadataStore": "metadataStores.get"},
}
"""Service -> imitated method -> what IAM checks, without "aiplatform."."""


@dataclass(frozen=True)
class Method:
    """One method of the API.

    Args:
        name: Service/Method, as in gRPC.
        request: message type.
        permission: what IAM checks.
        verb: HTTP verb.
        path: URL path after the version; the group `resource` is the resource's name.
        resource: the request's field with the resource's name, such as "model.name".
        body: "*" for all fields, one field of the request, or "" for no body.
    """

    name: str
    request: type[Message]
    permission: str
    verb: str
    path: re.Pattern[str]
    resource: str
    body: str

    @property
    def short_name(self) -> str:
        """Return the name without the service: UploadModel."""
        return self.name.rsplit("/", 1)[1]

    @property
    def handler(self) -> str:
        """Return the name of the function that answers: upload_model."""
        return _snake_case(self.short_name)


def _snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _read_from_sdk(service: str, name: str, permission: str) -> Method:
    """Read a method's verb, URL and body from the SDK's REST client; take the first binding."""
    module = importlib.import_module(
        f"google.cloud.aiplatform_v1.services.{_snake_case(service)}.transports.rest_base"
    )
    transport = getattr(module, f"_Base{service}RestTransport")
    rule = getattr(transport, f"_Base{name}")._get_http_options()[0]
    before, resource, pattern, after = re.split(r"\{([\w.]+)=([^}]+)\}", rule["uri"])
    pattern = pattern.replace("*", "[^/:]+")
    return Method(
        name=f"{PACKAGE}{service}/{name}",
        request=raw(getattr(t, f"{name}Request")),
        permission=f"aiplatform.{permission}",
        verb=rule["method"].upper(),
        path=re.compile(f"{before.removeprefix('/v1/')}(?P<resource>{pattern}){after}"),
        resource=resource,
        body=rule.get("body", ""),
    )


def _operations_method(
    name: str, request: type[Message], verb: str, path: str, body: str = ""
) -> Method:
    parent = r"projects/[^/:]+/locations/[^/:]+(?:/(?:models|endpoints)/[^/:]+)?"
    return Method(
        name=f"google.longrunning.Operations/{name}Operation{'s' * (name == 'List')}",
        request=request,
        permission=f"aiplatform.operations.{name.lower()}",
        verb=verb,
        path=re.compile(path.replace("PARENT", parent)),
        resource="name",
        body=body,
    )


METHODS = [
    *(
        _read_from_sdk(service, name, permission)
        for service, methods in _PERMISSIONS.items()
        for name, permission in methods.items()
    ),
    # Not from the SDK: it has a hundred URLs for each and no body for `cancel`.
    _operations_method(
        "Get", lro.GetOperationRequest, "GET", "(?P<resource>PARENT/operations/[^/:]+)"
    ),
    _operations_method(
        "Cancel",
        lro.CancelOperationRequest,
        "POST",
        "(?P<resource>PARENT/operations/[^/:]+):cancel",
        "*",
    ),
    _operations_method("List", lro.ListOperationsRequest, "GET", "(?P<resource>PARENT)/operations"),
]
BY_NAME = {method.name: method for method in METHODS}


def find(verb: str, path: str) -> tuple[Method, str] | None:
    """Find the method for a REST request; return it and the resource's name in the path.

    Args:
        verb: the HTTP verb.
        path: the URL's path without the version.
    """
    for method in METHODS:
        match = method.path.fullmatch(path) if method.verb == verb else None
        if match:
            return method, match["resource"]
    return None


def read_rest(method: Method, resource: str, query: dict[str, str], body: Any) -> Message:
    """Read a REST request as the method's message.

    Args:
        method: as `find` returned it.
        resource: as `find` returned it.
        query: the URL's parameters.
        body: the JSON body, parsed.

    Raises:
        ApiError: a field that the API does not know, or of another type.
    """
    fields: dict[str, Any] = {}
    if method.body == "*":
        fields = body if isinstance(body, dict) else {"": body}
    elif method.body:
        fields = {method.body: body}
    for key, value in query.items():
        if key not in _SYSTEM_PARAMETERS:
            _put(fields, key, value)
    _put(fields, method.resource, resource)
    return parse(fields, method.request())


def get_field(message: Message, path: str) -> str:
    """Return a string field, such as "model.name"."""
    return str(attrgetter(path)(message))


def set_field(message: Message, path: str, value: str) -> None:
    """Set a string field, such as "model.name"."""
    parent, _, field = path.rpartition(".")
    setattr(attrgetter(parent)(message) if parent else message, field, value)


def _put(fields: dict[str, Any], path: str, value: str) -> None:
    *parents, field = path.split(".")
    for name in parents:
        fields = fields.setdefault(name, {})
        if not isinstance(fields, dict):
            raise ApiError("INVALID_ARGUMENT", f"Invalid JSON payload received. {name}")
    fields[field] = value
