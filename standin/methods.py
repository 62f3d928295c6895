"""The methods this stand-in has: one table for both doors, and strict reading of requests.

Every other method is 501. Types are the SDK's own. Source of the paths: the `google.api.http`
options in https://github.com/googleapis/googleapis/tree/master/google/cloud/aiplatform/v1
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from google.cloud.aiplatform_v1 import types as t
from google.longrunning import operations_pb2 as lro
from google.protobuf import empty_pb2, json_format
from google.protobuf.message import Message

from standin.errors import ApiError

PACKAGE = "google.cloud.aiplatform.v1."
VERSIONS = ("v1", "v1beta1", "ui")
"""gcloud polls under v1beta1, the SDK's REST client under /ui/ (seen in their requests)."""
_SYSTEM_PARAMETERS = {"alt", "$alt", "key", "prettyPrint", "fields", "access_token", "quotaUser"}


@dataclass(frozen=True)
class Method:
    """One method of the API.

    Args:
        name: Service/Method as gRPC has it, without the package.
        rule: HTTP verb and path, with `{field=pattern}`.
        request: message type.
        reply: message type.
        permission: what IAM checks.
        body: "*", a field of the request, or "" for none.
    """

    name: str
    rule: str
    request: type
    reply: type
    permission: str
    body: str = ""

    @property
    def verb(self) -> str:
        return self.rule.split(" ")[0]

    @property
    def handler(self) -> str:
        """UploadModel -> upload_model."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.name.split("/")[1]).lower()

    @cached_property
    def resource(self) -> list[str]:
        """The field with the resource's name, as a path: ["model", "name"]."""
        return re.search(r"\{([\w.]+)=", self.rule)[1].split(".")

    @cached_property
    def path(self) -> re.Pattern:
        def group(match: re.Match) -> str:
            pattern = match[2].replace("**", ".+").replace("*", "[^/:]+")
            return f"(?P<resource>{pattern.replace('.+', '.*')})"

        return re.compile(re.sub(r"\{([\w.]+)=([^}]+)\}", group, self.rule.split(" ")[1]))


_LOCATION = "projects/*/locations/*"
_MODEL = f"{_LOCATION}/models/*"
_ENDPOINT = f"{_LOCATION}/endpoints/*"
_OPERATION_OF = (
    f"{_LOCATION}/operations/*",
    f"{_MODEL}/operations/*",
    f"{_ENDPOINT}/operations/*",
)


def _method(service: str, name: str, rule: str, reply: type, permission: str, body: str) -> Method:
    request = getattr(t, f"{name}Request")
    return Method(f"{service}/{name}", rule, raw(request), raw(reply), permission, body)


def raw(kind: type) -> type:
    """The protobuf class behind a class of the SDK."""
    return kind.pb() if hasattr(kind, "pb") else kind


# Service, method, verb, path, reply, permission, body (- for none).
_TABLE = """
Model UploadModel POST {parent=LOCATION}/models:upload Operation models.upload *
Model GetModel GET {name=MODEL} Model models.get -
Model ListModels GET {parent=LOCATION}/models ListModelsResponse models.list -
Model ListModelVersions GET {name=MODEL}:listVersions ListModelVersionsResponse models.list -
Model UpdateModel PATCH {model.name=MODEL} Model models.update model
Model MergeVersionAliases POST {name=MODEL}:mergeVersionAliases Model models.update *
Model DeleteModelVersion DELETE {name=MODEL}:deleteVersion Operation models.delete -
Model DeleteModel DELETE {name=MODEL} Operation models.delete -
Endpoint CreateEndpoint POST {parent=LOCATION}/endpoints Operation endpoints.create endpoint
Endpoint GetEndpoint GET {name=ENDPOINT} Endpoint endpoints.get -
Endpoint ListEndpoints GET {parent=LOCATION}/endpoints ListEndpointsResponse endpoints.list -
Endpoint UpdateEndpoint PATCH {endpoint.name=ENDPOINT} Endpoint endpoints.update endpoint
Endpoint DeleteEndpoint DELETE {name=ENDPOINT} Operation endpoints.delete -
Endpoint DeployModel POST {endpoint=ENDPOINT}:deployModel Operation endpoints.deploy *
Endpoint UndeployModel POST {endpoint=ENDPOINT}:undeployModel Operation endpoints.undeploy *
Endpoint MutateDeployedModel POST {endpoint=ENDPOINT}:mutateDeployedModel Operation \
    endpoints.deploy *
Prediction Predict POST {endpoint=ENDPOINT}:predict PredictResponse endpoints.predict *
Metadata GetMetadataStore GET {name=LOCATION/metadataStores/*} MetadataStore metadataStores.get -
"""


def _from_table(line: str) -> Method:
    service, name, verb, path, reply, permission, body = line.split()
    for word, pattern in (("LOCATION", _LOCATION), ("MODEL", _MODEL), ("ENDPOINT", _ENDPOINT)):
        path = path.replace(f"={word}", f"={pattern}")
    kind = lro.Operation if reply == "Operation" else getattr(t, reply)
    return _method(
        f"{PACKAGE}{service}Service",
        name,
        f"{verb} {path}",
        kind,
        f"aiplatform.{permission}",
        body.replace("-", ""),
    )


def _operations() -> list[Method]:
    service = "google.longrunning.Operations/"
    get, cancel = lro.GetOperationRequest, lro.CancelOperationRequest
    found = []
    for name in _OPERATION_OF:
        found += [
            Method(
                *(f"{service}GetOperation", f"GET {{name={name}}}", get, lro.Operation),
                "aiplatform.operations.get",
            ),
            Method(
                *(f"{service}CancelOperation", f"POST {{name={name}}}:cancel", cancel),
                *(empty_pb2.Empty, "aiplatform.operations.cancel", "*"),
            ),
            Method(
                f"{service}ListOperations",
                f"GET {{name={name.removesuffix('/operations/*')}}}/operations",
                *(lro.ListOperationsRequest, lro.ListOperationsResponse),
                "aiplatform.operations.list",
            ),
        ]
    return found


METHODS = [_from_table(line) for line in _TABLE.strip().splitlines()] + _operations()
BY_NAME = {method.name: method for method in METHODS}


def find(verb: str, path: str) -> tuple[Method, str] | None:
    """The method for a REST request, and the resource's name in its path.

    Args:
        verb: of HTTP.
        path: without the version.
    """
    for method in METHODS:
        match = method.path.fullmatch(path) if method.verb == verb else None
        if match:
            return method, match["resource"]
    return None


def read_rest(method: Method, resource: str, query: dict[str, str], body: Any) -> Message:
    """A REST request as the method's message.

    Args:
        method: as `find` found it.
        resource: likewise.
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
            _put(fields, key.split("."), value)
    _put(fields, method.resource, resource)
    return parse(fields, method.request())


def parse(fields: Any, message: Message) -> Message:
    """Fill a message from JSON, refusing what it does not know, as Google's front end does.

    Raises:
        ApiError: a field that the API does not know, or of another type.
    """
    try:
        return json_format.ParseDict(fields, message, ignore_unknown_fields=False)
    except (json_format.ParseError, TypeError, AttributeError) as error:
        raise ApiError("INVALID_ARGUMENT", f"Invalid JSON payload received. {error}") from error


def dump(message: Message, *, numbers: bool = False) -> dict[str, Any]:
    """A message as JSON; enums as numbers if the client asked for `enum-encoding=int`."""
    return json_format.MessageToDict(message, use_integers_for_enums=numbers)


def get_field(message: Message, path: list[str]) -> str:
    """A string field, by its path."""
    for name in path:
        message = getattr(message, name)
    return message


def set_field(message: Message, path: list[str], value: str) -> None:
    """Set a string field, by its path."""
    for name in path[:-1]:
        message = getattr(message, name)
    setattr(message, path[-1], value)


def _put(fields: dict[str, Any], path: list[str], value: str) -> None:
    for name in path[:-1]:
        fields = fields.setdefault(name, {})
        if not isinstance(fields, dict):
            raise ApiError("INVALID_ARGUMENT", f"Invalid JSON payload received. {name}")
    fields[path[-1]] = value
