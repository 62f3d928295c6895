"""ModelService: the registry of models and their versions."""

from collections.abc import Iterable

from google.cloud.aiplatform_v1 import types as t
from google.longrunning import operations_pb2 as lro
from google.protobuf import empty_pb2

from standin.errors import ApiError, invalid
from standin.limits import DEPLOYMENT_MAX_SECONDS
from standin.replicas.images import Images
from standin.services.lists import page, select
from standin.services.messages import raw
from standin.services.names import Identifiers, region_of
from standin.services.operations import Operations
from standin.services.resources import check_common_fields, update

NOT_IMITATED = ("explanation_spec", "metadata_schema_uri", "pipeline_job", "base_model_source")
CHANGEABLE = ("display_name", "description", "labels", "version_description")


class Models:
    """All models of one stand-in, by resource name and version."""

    def __init__(self, operations: Operations, images: Images, new_id: Identifiers) -> None:
        self.operations, self.images, self.new_id = operations, images, new_id
        self._all: dict[str, dict[str, t.Model]] = {}
        self.digests: dict[tuple[str, str], str] = {}
        """(name, version) -> the image at the time of the upload."""

    def find(self, name: str) -> t.Model:
        """Return the model of a name, which may end with @version or @alias.

        Raises:
            ApiError: the model does not exist.
        """
        base, _, version = name.partition("@")
        for model in self._all.get(base, {}).values():
            if (version or "default") in (model.version_id, *model.version_aliases):
                return model
        raise ApiError("NOT_FOUND", f"The Model does not exist. Model: {name}")

    async def upload_model(self, request: t.UploadModelRequest) -> lro.Operation:
        model = request.model
        check_model(model)
        region = region_of(request.parent)
        self.images.check_name(model.container_spec.image_uri, region)
        if request.parent_model:
            name = self.find(request.parent_model).name
        else:
            name = f"{request.parent}/models/{request.model_id or self.new_id()}"
            if name in self._all:
                raise ApiError("ALREADY_EXISTS", f"The Model already exists. Model: {name}")

        async def work() -> t.UploadModelResponse:
            digest = await self.images.ingest(model.container_spec.image_uri)
            versions = self._all.setdefault(name, {})
            model.name, model.version_id = name, str(max(map(int, versions), default=0) + 1)
            if not versions and "default" not in model.version_aliases:
                model.version_aliases.append("default")
            for alias in model.version_aliases:
                _move_alias(versions, alias)
            for field in ("create_time", "version_create_time", "version_update_time"):
                getattr(model, field).GetCurrentTime()
            model.update_time.GetCurrentTime()
            if versions:
                model.create_time.CopyFrom(next(iter(versions.values())).create_time)
            kinds = t.Model.DeploymentResourcesType
            model.supported_deployment_resources_types.append(kinds(kinds.DEDICATED_RESOURCES))
            versions[model.version_id] = model
            self.digests[name, model.version_id] = digest
            return raw(t.UploadModelResponse)(model=name, model_version_id=model.version_id)

        return self.operations.start("UploadModel", name, work)

    async def get_model(self, request: t.GetModelRequest) -> t.Model:
        return self.find(request.name)

    async def list_models(self, request: t.ListModelsRequest) -> t.ListModelsResponse:
        prefix = f"{request.parent}/"
        found = (self.find(name) for name in self._all if name.startswith(prefix))
        items, token = page(select(found, request.filter), request.page_size, request.page_token)
        return raw(t.ListModelsResponse)(models=items, next_page_token=token)

    async def list_model_versions(
        self, request: t.ListModelVersionsRequest
    ) -> t.ListModelVersionsResponse:
        name = self.find(request.name).name
        found = select(self._all[name].values(), request.filter)
        items, token = page(found, request.page_size, request.page_token)
        return raw(t.ListModelVersionsResponse)(models=items, next_page_token=token)

    async def update_model(self, request: t.UpdateModelRequest) -> t.Model:
        model = self.find(request.model.name)
        update(model, request.model, request.update_mask.paths, CHANGEABLE, "model")
        check_common_fields("model", model)
        return model

    async def merge_version_aliases(self, request: t.MergeVersionAliasesRequest) -> t.Model:
        model = self.find(request.name)
        for alias in request.version_aliases:
            if alias.startswith("-"):
                if alias == "-default":
                    raise invalid("version_aliases", "The default alias cannot be removed.")
                if alias[1:] in model.version_aliases:
                    model.version_aliases.remove(alias[1:])
                continue
            _move_alias(self._all[model.name], alias)
            model.version_aliases.append(alias)
        return model

    async def delete_model_version(self, request: t.DeleteModelVersionRequest) -> lro.Operation:
        model = self.find(request.name)
        if "@" not in request.name or len(self._all[model.name]) == 1:
            raise ApiError(
                "FAILED_PRECONDITION",
                f"{request.name} is the only version of the Model; use DeleteModel.",
            )
        if "default" in model.version_aliases:
            raise ApiError(
                "FAILED_PRECONDITION", f"The default version cannot be deleted: {request.name}."
            )
        self._check_unused([model])

        async def work() -> empty_pb2.Empty:
            self._all[model.name].pop(model.version_id, None)
            return empty_pb2.Empty()

        return self.operations.start("DeleteModelVersion", model.name, work)

    async def delete_model(self, request: t.DeleteModelRequest) -> lro.Operation:
        name = self.find(request.name).name
        self._check_unused(self._all[name].values())

        async def work() -> empty_pb2.Empty:
            self._check_unused(self._all.get(name, {}).values())
            self._all.pop(name, None)
            return empty_pb2.Empty()

        return self.operations.start("DeleteModel", name, work)

    def _check_unused(self, models: Iterable[t.Model]) -> None:
        for model in models:
            for use in model.deployed_models:
                raise ApiError(
                    "FAILED_PRECONDITION",
                    f"The Model {model.name}@{model.version_id} is deployed or being deployed at "
                    f"the following Endpoint: {use.endpoint}. Please undeploy it first.",
                )


def check_model(model: t.Model) -> None:
    """Check an uploaded model.

    Raises:
        ApiError: the model cannot be served.
    """
    check_common_fields("model", model)
    for field in NOT_IMITATED:
        if field in {descriptor.name for descriptor, _ in model.ListFields()}:
            raise ApiError("UNIMPLEMENTED", f"The stand-in does not imitate model.{field}.")
    spec, where = model.container_spec, "model.container_spec"
    if not spec.image_uri:
        raise invalid(f"{where}.image_uri", "Required field is not set.")
    if model.artifact_uri and not model.artifact_uri.startswith("gs://"):
        raise invalid("model.artifact_uri", "It must begin with gs://.")
    for variable in spec.env:
        if variable.name.startswith("AIP_"):
            raise invalid(f"{where}.env", f"{variable.name}: names with AIP_ are reserved.")
    for field in ("predict_route", "health_route"):
        if getattr(spec, field) and not getattr(spec, field).startswith("/"):
            raise invalid(f"{where}.{field}", "It must begin with /.")
    if spec.invoke_route_prefix not in ("", "/*"):
        raise invalid(f"{where}.invoke_route_prefix", 'Only "/*" is supported.')
    if spec.predict_route and spec.invoke_route_prefix:
        raise invalid(f"{where}.invoke_route_prefix", "It excludes predict_route.")
    if spec.deployment_timeout.ToTimedelta().total_seconds() > DEPLOYMENT_MAX_SECONDS:
        raise invalid(f"{where}.deployment_timeout", "It is at most 2 hours.")
    for probe in ("startup_probe", "health_probe", "liveness_probe"):
        kind = getattr(spec, probe).WhichOneof("probe_type")
        if kind not in (None, "exec_") or (probe == "liveness_probe" and kind):
            raise ApiError("UNIMPLEMENTED", f"The stand-in does not imitate {probe}.{kind}.")


def _move_alias(versions: dict[str, t.Model], alias: str) -> None:
    for other in versions.values():
        if alias in other.version_aliases:
            other.version_aliases.remove(alias)
