"""Read and check `vertex.yaml`: the resources on Vertex AI, their sizes and prices.

    load_settings(region="us-central1", max_replicas=4)

The limits are from the API's reference (https://cloud.google.com/vertex-ai/docs/reference/rest/v1).
Only Google knows whether a machine type exists in a region, and whether you have quota for it.
"""

import datetime
import hashlib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from deploy.common.paths import UserError, shown

CONFIG = Path(__file__).parent / "vertex.yaml"
MANAGED_BY = "serving-llms"
_PLAIN = 63 - len(f"{MANAGED_BY}-")
"""Characters of an APP's name in a resource ID."""

ENVIRONMENT = {
    "project": "GCP_PROJECT",
    "region": "GCP_REGION",
    "push_images": "PUSH_IMAGES",
    "push_registry": "PUSH_REGISTRY",
    "architecture": "MACHINE_ARCHITECTURE",
}
"""Field -> the environment variable that replaces the file's value."""

DEDICATED_SECONDS, SHARED_SECONDS = 600, 60
"""For one request, if `inference_timeout` is not given. A shared endpoint has no other.
https://cloud.google.com/vertex-ai/docs/predictions/choose-endpoint-type"""
VLLM_TARGETS = ("target_kv_cache", "target_requests_waiting")
"""Autoscaling by vLLM's gauges, which the server offers if its app says so."""
TARGETS = (
    *("target_cpu", "target_gpu", "target_gpu_dcgm", "target_requests_per_minute"),
    *VLLM_TARGETS,
)

Percent = Annotated[int, Field(ge=1, le=100)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Route = Annotated[str, Field(pattern="^/")]
# No `.`, `..` or wildcards: the container looks for a folder of exactly this name.
Folder = Annotated[
    str,
    Field(pattern=r"^gs://[a-z0-9][a-z0-9._-]+(/[^/\s.*?#\[\]][^/\s*?#\[\]]*)*/?$"),
    AfterValidator(lambda uri: uri.removesuffix("/")),
]
LabelPart = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,63}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Prices(_Strict):
    """Dollars per replica and hour, as far as known."""

    date: datetime.date
    verified: bool
    region: str
    per_hour: dict[str, Annotated[float, Field(gt=0)]]


class VertexSettings(_Strict):
    """Everything that a deployment needs besides the APP and its image."""

    project: Annotated[str, Field(pattern=r"^[a-z][a-z0-9:.-]{4,}[a-z0-9]$")] | None = None
    region: Annotated[str, Field(pattern=r"^[a-z]+-[a-z]+[0-9]+$")]
    repository: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")]
    push_images: bool = True
    push_registry: Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+(:[0-9]+)?$")] | None = None
    service_account: Annotated[str, Field(pattern=r"^[^@\s]+@[^@\s]+$")] | None = None
    machine_type: Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*-[a-z0-9-]+$")]
    architecture: Literal["amd64", "arm64"] = "amd64"
    accelerator_type: (
        Literal[
            "NVIDIA_L4",
            "NVIDIA_TESLA_T4",
            "NVIDIA_TESLA_V100",
            "NVIDIA_TESLA_A100",
            "NVIDIA_A100_80GB",
            "NVIDIA_H100_80GB",
        ]
        | None
    ) = None
    accelerator_count: Annotated[int, Field(ge=0, le=16)] = 0
    spot: bool = False
    min_replicas: Annotated[int, Field(ge=1)]
    max_replicas: Annotated[int, Field(ge=1)]
    target_cpu: Percent | None = None
    target_gpu: Percent | None = None
    target_gpu_dcgm: Percent | None = None
    target_requests_per_minute: Count | None = None
    target_kv_cache: Percent | None = None
    target_requests_waiting: Count | None = None
    deployment_timeout: Annotated[int, Field(ge=1, le=7200)]
    inference_timeout: Annotated[int, Field(ge=1, le=3600)] | None = None
    dedicated: bool = True
    shared_memory_mb: Annotated[int, Field(ge=1)]
    port: Annotated[int, Field(ge=1, le=65535)]
    predict_route: Route | None = None
    invoke_route_prefix: Literal["/*"] | None = None
    health_route: Route
    command: list[str] = []
    args: list[str] = []
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = {}
    startup_probe: list[str] = []
    startup_probe_period: Annotated[int, Field(ge=1)]
    startup_probe_timeout: Annotated[int, Field(ge=1)]
    startup_probe_failures: Annotated[int, Field(ge=1)]
    artifact_uri: Folder | None = None
    labels: dict[LabelPart, LabelPart] = {}
    prices: Prices

    @model_validator(mode="after")
    def _check(self) -> "VertexSettings":
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is less than min_replicas, {self.min_replicas}"
            )
        if bool(self.accelerator_type) != bool(self.accelerator_count):
            raise ValueError(
                f"accelerator_count: {self.accelerator_count} with accelerator_type "
                f"{self.accelerator_type or 'none'}; give both or neither"
            )
        if self.machine_type.startswith("g2-") and self.accelerator_type != "NVIDIA_L4":
            raise ValueError(
                f"accelerator_type: {self.accelerator_type or 'none'}; "
                f"{self.machine_type} has NVIDIA_L4 only"
            )
        self._check_endpoint()
        self._check_targets()
        for name in self.environment:
            if name.startswith("AIP_"):
                raise ValueError(f"environment.{name}: the platform sets names with AIP_")
        if self.startup_probe_timeout > self.startup_probe_period:
            raise ValueError(
                f"startup_probe_timeout: {self.startup_probe_timeout} is more than "
                f"startup_probe_period, {self.startup_probe_period}"
            )
        return self

    def _check_endpoint(self) -> None:
        """Make sure that the doors of the container go with the type of the endpoint."""
        if self.invoke_route_prefix and not self.dedicated:
            raise ValueError(
                f"invoke_route_prefix: {self.invoke_route_prefix} with dedicated: false; only "
                "dedicated endpoints have invoke: set dedicated: true, or leave the prefix empty"
            )
        if self.invoke_route_prefix and self.predict_route:
            raise ValueError(
                f"predict_route: {self.predict_route} with invoke_route_prefix: "
                f"{self.invoke_route_prefix}; Vertex AI takes only one of them: leave one empty"
            )
        if self.inference_timeout and not self.dedicated:
            raise ValueError(
                f"inference_timeout: {self.inference_timeout} with dedicated: false; a request to "
                f"a shared endpoint has {SHARED_SECONDS} s: leave it empty, or set dedicated: true"
            )

    def _check_targets(self) -> None:
        """Make sure that Vertex AI has something to scale by."""
        if self.target_gpu_dcgm and not self.accelerator_type:
            raise ValueError(
                f"target_gpu_dcgm: {self.target_gpu_dcgm} without accelerator_type; it is the "
                "utilization of an accelerator: leave it empty, or give an accelerator_type"
            )
        if not self.targets:
            raise ValueError(
                f"target_cpu: none given, and no other target; give at least one of "
                f"{', '.join(TARGETS)}"
            )

    @property
    def targets(self) -> dict[str, int]:
        """Field -> target of the metrics that decide how many replicas there are."""
        given = {name: getattr(self, name) for name in TARGETS if getattr(self, name)}
        if not self.accelerator_type:
            given.pop("target_gpu", None)
        return given

    @property
    def request_seconds(self) -> int:
        """How long one request may take."""
        if not self.dedicated:
            return SHARED_SECONDS
        return self.inference_timeout or DEDICATED_SECONDS

    @property
    def project_id(self) -> str:
        """The project.

        Raises:
            UserError: it is not given.
        """
        if not self.project:
            raise UserError(
                "project: not given; export GCP_PROJECT=..., or set it in deploy/vertex/vertex.yaml"
            )
        return self.project

    @property
    def parent(self) -> str:
        """The parent of all resources: `projects/P/locations/R`.

        Raises:
            UserError: the project is not given.
        """
        return f"projects/{self.project_id}/locations/{self.region}"

    def resource_id(self, app: str) -> str:
        """The ID of an app's model and of its endpoint.

        We choose it, not Google. So a creation that is repeated after a crash finds the first one,
        and its operations can be listed although nothing stores their names.
        """
        return f"{MANAGED_BY}-{_plain(app)}"

    def endpoint_name(self, app: str) -> str:
        """The full name of an app's endpoint."""
        return f"{self.parent}/endpoints/{self.resource_id(app)}"

    def model_name(self, app: str) -> str:
        """The full name of an app's model, without a version."""
        return f"{self.parent}/models/{self.resource_id(app)}"

    def labels_for(self, app: str) -> dict[str, str]:
        """The labels of an app's resources, by which `cleanup` finds them."""
        return {**self.labels, "managed-by": MANAGED_BY, "app": _plain(app)}

    def image_folder(self) -> str:
        """The address of the repository: `REGION-docker.pkg.dev/PROJECT/REPOSITORY`."""
        project = self.project_id.replace(":", "/")  # example.com:name is example.com/name there
        return f"{self.region}-docker.pkg.dev/{project}/{self.repository}"

    def image_uri(self, app: str, tag: str) -> str:
        """The address of an app's image in Artifact Registry."""
        return f"{self.image_folder()}/{app.lower()}:{tag}"

    def route_for(self, app: str) -> str:
        """The path at which the container takes predictions; empty with `invoke_route_prefix`."""
        if self.invoke_route_prefix:
            return ""
        return self.predict_route or f"/predictions/{app}"


def api_host(region: str) -> str:
    """The host name of a region's API, which its shared endpoints have too."""
    return f"{region}-aiplatform.googleapis.com"


def _plain(app: str) -> str:
    """Return an APP's name in the characters of IDs and labels, unique for each APP.

    `a.b` and `a-b` would share an endpoint, and `cleanup` of one would remove the other. So a
    changed name ends in a digest.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", app.lower()).strip("-")
    if plain == app and len(plain) <= _PLAIN:
        return plain
    return f"{plain[: _PLAIN - 7]}-{hashlib.sha256(app.encode()).hexdigest()[:6]}"


def load_settings(path: Path = CONFIG, **overrides: Any) -> VertexSettings:
    """Read the settings. Keywords replace environment variables, and these the file's values.

    Args:
        path: a YAML file with the fields of `VertexSettings`.
        overrides: fields; None keeps the value.

    Raises:
        UserError: no such file or field, or a wrong value; it names the field, the value and what
            is allowed.
    """
    try:
        given = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{shown(path)}: {error}") from error
    if not isinstance(given, dict):
        raise UserError(f"{shown(path)}: should be a mapping of fields, not {given!r}")
    for name, variable in ENVIRONMENT.items():
        if os.environ.get(variable):
            given[name] = os.environ[variable]
    given |= {name: value for name, value in overrides.items() if value is not None}
    try:
        return VertexSettings(**given)
    except ValidationError as error:
        raise UserError("; ".join(_complaint(e) for e in error.errors())) from error


def _complaint(error: ErrorDetails) -> str:
    """One of pydantic's errors: the field, the value, what is allowed."""
    if error["type"] == "extra_forbidden":
        known = ", ".join(VertexSettings.model_fields)
        return f"{_field(error)}: there is no such field; there are {known}"
    if not error["loc"]:  # from `_check`, which names the field itself
        return str(error["ctx"]["error"])
    if error["type"] == "missing":
        return f"{_field(error)}: not given"
    return f"{_field(error)}: {error['input']!r} given; {error['msg']}"


def _field(error: ErrorDetails) -> str:
    names = [str(part) for part in error["loc"]]
    return ".".join(name for name in names if not name.startswith(("constrained", "literal")))
