"""EndpointService: endpoints and their deployed models."""

from collections import Counter
from collections.abc import Iterable

from google.cloud.aiplatform_v1 import types as t
from google.longrunning import operations_pb2 as lro
from google.protobuf import empty_pb2

from standin import limits
from standin.errors import ApiError, invalid
from standin.replicas.deployments import Deployments
from standin.services.lists import page, select
from standin.services.messages import raw
from standin.services.models import Models
from standin.services.names import last_part, region_of
from standin.services.operations import Operations
from standin.services.resources import check_common_fields, update
from standin.settings import StandinSettings

CHANGEABLE = ("display_name", "description", "labels", "traffic_split", "client_connection_config")
MUTABLE = ("min_replica_count", "max_replica_count", "autoscaling_metric_specs")
NOT_IMITATED = (
    "network",
    "enable_private_service_connect",
    "private_service_connect_config",
    "encryption_spec",
    "predict_request_response_logging_config",
    "private_model_server_enabled",
)


class Endpoints:
    """All endpoints of one stand-in, by resource name."""

    def __init__(
        self,
        settings: StandinSettings,
        operations: Operations,
        models: Models,
        deployments: Deployments,
    ) -> None:
        self.settings, self.operations = settings, operations
        self.models, self.deployments = models, deployments
        self._all: dict[str, t.Endpoint] = {}
        self._deploying: dict[str, tuple[str, t.DeployedModel]] = {}
        """Deployed model's ID -> endpoint's name and the deployed model, until it is ready."""

    def find(self, name: str) -> t.Endpoint:
        """Return the endpoint of a name.

        Raises:
            ApiError: the endpoint does not exist.
        """
        if name not in self._all:
            raise ApiError("NOT_FOUND", f"The Endpoint does not exist. Endpoint: {name}")
        return self._all[name]

    async def create_endpoint(self, request: t.CreateEndpointRequest) -> lro.Operation:
        endpoint = request.endpoint
        check_endpoint(endpoint)
        endpoint.name = (
            f"{request.parent}/endpoints/{request.endpoint_id or self.operations.new_id()}"
        )
        if endpoint.name in self._all:
            raise ApiError("ALREADY_EXISTS", f"Endpoint {endpoint.name} already exists.")

        async def work() -> t.Endpoint:
            endpoint.create_time.GetCurrentTime()
            endpoint.update_time.GetCurrentTime()
            if endpoint.dedicated_endpoint_enabled:
                endpoint.dedicated_endpoint_dns = (
                    f"{last_part(endpoint.name)}.{region_of(endpoint.name)}"
                    f"-{self.settings.project_number}.prediction.vertexai.goog"
                )
            self._all[endpoint.name] = endpoint
            return endpoint

        return self.operations.start("CreateEndpoint", endpoint.name, work)

    async def get_endpoint(self, request: t.GetEndpointRequest) -> t.Endpoint:
        return self.find(request.name)

    async def list_endpoints(self, request: t.ListEndpointsRequest) -> t.ListEndpointsResponse:
        found = [e for name, e in self._all.items() if name.startswith(f"{request.parent}/")]
        items, token = page(select(found, request.filter), request.page_size, request.page_token)
        return raw(t.ListEndpointsResponse)(endpoints=items, next_page_token=token)

    async def update_endpoint(self, request: t.UpdateEndpointRequest) -> t.Endpoint:
        endpoint = self.find(request.endpoint.name)
        if "traffic_split" in request.update_mask.paths:
            _check_split(dict(request.endpoint.traffic_split), _ids(endpoint))
        update(endpoint, request.endpoint, request.update_mask.paths, CHANGEABLE, "endpoint")
        check_common_fields("endpoint", endpoint)
        return endpoint

    async def delete_endpoint(self, request: t.DeleteEndpointRequest) -> lro.Operation:
        endpoint = self.find(request.name)
        self._check_empty(endpoint)

        async def work() -> empty_pb2.Empty:
            self._check_empty(endpoint)
            self._all.pop(endpoint.name, None)
            return empty_pb2.Empty()

        return self.operations.start("DeleteEndpoint", endpoint.name, work)

    async def deploy_model(self, request: t.DeployModelRequest) -> lro.Operation:
        endpoint, deployed = self.find(request.endpoint), request.deployed_model
        model = self.models.find(deployed.model)
        deployed.id = deployed.id or self.operations.new_id()
        split = {deployed.id if k == "0" else k: v for k, v in request.traffic_split.items()}
        self._check_deployment(endpoint, deployed, model, split)
        deployed.model = f"{model.name}@{model.version_id}"
        deployed.model_version_id = model.version_id
        deployed.display_name = deployed.display_name or model.display_name
        use = raw(t.DeployedModelRef)(endpoint=endpoint.name, deployed_model_id=deployed.id)
        model.deployed_models.append(use)
        self._deploying[deployed.id] = endpoint.name, deployed
        image = self.models.digests[model.name, model.version_id]

        async def work() -> t.DeployModelResponse:
            await self.deployments.deploy(
                endpoint,
                deployed,
                model,
                image,
                lambda stage="": self.operations.touch(operation.name, stage),
            )
            deployed.create_time.GetCurrentTime()
            endpoint.deployed_models.append(self._deploying.pop(deployed.id)[1])
            if split:
                endpoint.traffic_split.clear()
                endpoint.traffic_split.update(split)
            return raw(t.DeployModelResponse)(deployed_model=deployed)

        def undo() -> None:
            del self._deploying[deployed.id]
            _remove_use(model, deployed.id)

        operation = self.operations.start(
            "DeployModel", endpoint.name, work, undo, deployed_model=deployed.id
        )
        self.operations.touch(operation.name, "STARTING_DEPLOYMENT")
        return operation

    def _check_deployment(
        self,
        endpoint: t.Endpoint,
        deployed: t.DeployedModel,
        model: t.Model,
        split: dict[str, int],
    ) -> None:
        if region_of(model.name) != region_of(endpoint.name):
            raise invalid("deployed_model.model", "The Model is in another location.")
        if model.container_spec.invoke_route_prefix and not endpoint.dedicated_endpoint_enabled:
            raise ApiError("FAILED_PRECONDITION", "invoke_route_prefix needs a dedicated endpoint.")
        if deployed.id in _ids(endpoint) or deployed.id in self._deploying:
            raise ApiError("ALREADY_EXISTS", f"DeployedModel {deployed.id} already exists.")
        if split:
            _check_split(split, [*_ids(endpoint), deployed.id])
        check_resources(deployed)
        self._check_quota(endpoint.name, deployed)

    async def undeploy_model(self, request: t.UndeployModelRequest) -> lro.Operation:
        endpoint = self.find(request.endpoint)
        deployed = self._find_deployed(endpoint, request.deployed_model_id)
        left = {k: v for k, v in endpoint.traffic_split.items() if k != deployed.id}
        others = [i for i in _ids(endpoint) if i != deployed.id]
        split = dict(request.traffic_split)
        if split:
            _check_split(split, others)
        elif others and endpoint.traffic_split.get(deployed.id, 0):
            raise ApiError(
                "FAILED_PRECONDITION",
                f"DeployedModel {deployed.id} has {endpoint.traffic_split[deployed.id]} % of the "
                "traffic. Give a traffic_split that sends it elsewhere.",
            )

        async def work() -> t.UndeployModelResponse:
            self._find_deployed(endpoint, deployed.id)
            endpoint.traffic_split.clear()
            endpoint.traffic_split.update(split or left)
            await self._remove(endpoint, deployed)
            return raw(t.UndeployModelResponse)()

        return self.operations.start(
            "UndeployModel", endpoint.name, work, deployed_model=deployed.id
        )

    async def mutate_deployed_model(self, request: t.MutateDeployedModelRequest) -> lro.Operation:
        endpoint, new = self.find(request.endpoint), request.deployed_model
        deployed = self._find_deployed(endpoint, new.id)
        paths = [path.removeprefix("dedicated_resources.") for path in request.update_mask.paths]
        for path in paths:
            if path not in MUTABLE:
                raise invalid("update_mask", f"deployed_model.{path} cannot be updated.")
        wanted = raw(t.DeployedModel)()
        wanted.CopyFrom(deployed)
        for path in paths:
            wanted.dedicated_resources.ClearField(path)
            value = getattr(new.dedicated_resources, path)
            if path == "autoscaling_metric_specs":
                wanted.dedicated_resources.autoscaling_metric_specs.extend(value)
            else:
                setattr(wanted.dedicated_resources, path, value)
        check_resources(wanted)

        async def work() -> t.MutateDeployedModelResponse:
            deployed.CopyFrom(wanted)
            count = deployed.dedicated_resources.min_replica_count
            await self.deployments.resize(deployed.id, count)
            return raw(t.MutateDeployedModelResponse)(deployed_model=deployed)

        return self.operations.start(
            "MutateDeployedModel", endpoint.name, work, deployed_model=deployed.id
        )

    def _find_deployed(self, endpoint: t.Endpoint, deployed_id: str) -> t.DeployedModel:
        for deployed in endpoint.deployed_models:
            if deployed.id == deployed_id:
                return deployed
        raise ApiError(
            "NOT_FOUND", f"DeployedModel {deployed_id} is not found at Endpoint {endpoint.name}."
        )

    async def _remove(self, endpoint: t.Endpoint, deployed: t.DeployedModel) -> None:
        deployed_id, model = deployed.id, deployed.model
        await self.deployments.undeploy(deployed_id)
        for index, other in enumerate(endpoint.deployed_models):
            if other.id == deployed_id:
                del endpoint.deployed_models[index]
                break
        _remove_use(self.models.find(model), deployed_id)

    def _check_empty(self, endpoint: t.Endpoint) -> None:
        busy = [i for i, (name, _) in self._deploying.items() if name == endpoint.name]
        if ids := _ids(endpoint) + busy:
            raise ApiError(
                "FAILED_PRECONDITION",
                f"The Endpoint {endpoint.name} has deployed or being-deployed DeployedModel(s) "
                f"with id(s): {', '.join(ids)}. Please undeploy them first.",
            )

    def _check_quota(self, endpoint: str, new: t.DeployedModel) -> None:
        prefix = endpoint.rsplit("/", 2)[0] + "/"
        deployed = [
            d for n, e in self._all.items() if n.startswith(prefix) for d in e.deployed_models
        ]
        deployed += [d for n, d in self._deploying.values() if n.startswith(prefix)]
        used: Counter[str] = Counter()
        for item in deployed:
            used.update(_usage(item))
        added = _usage(new)
        exceeded = limits.over_quota({metric: used[metric] + added[metric] for metric in added})
        if exceeded:
            raise ApiError(
                "RESOURCE_EXHAUSTED",
                "The following quota metrics exceed quota limits: "
                + ",".join(f"aiplatform.googleapis.com/{metric}" for metric in exceeded),
            )


def check_endpoint(endpoint: t.Endpoint) -> None:
    """Check a new endpoint.

    Raises:
        ApiError: a field is invalid or not imitated.
    """
    check_common_fields("endpoint", endpoint)
    for field in NOT_IMITATED:
        if field in {descriptor.name for descriptor, _ in endpoint.ListFields()}:
            raise ApiError("UNIMPLEMENTED", f"The stand-in does not imitate endpoint.{field}.")
    timeout = endpoint.client_connection_config.inference_timeout.ToTimedelta().total_seconds()
    if timeout and not endpoint.dedicated_endpoint_enabled:
        raise invalid(
            "endpoint.client_connection_config.inference_timeout", "Dedicated endpoints have it."
        )
    if timeout > limits.DEDICATED_MAX_SECONDS:
        raise invalid(
            "endpoint.client_connection_config.inference_timeout", "It is at most 3600 s."
        )


def check_resources(deployed: t.DeployedModel) -> None:
    """Check a deployed model's machine type and number of replicas.

    Raises:
        ApiError: the machine type or the number is invalid.
    """
    where = "deployed_model.dedicated_resources"
    if deployed.WhichOneof("prediction_resources") != "dedicated_resources":
        raise invalid("deployed_model", "The Model supports dedicated_resources only.")
    resources = deployed.dedicated_resources
    if problem := limits.machine_problem(*_machine(deployed)):
        raise invalid(f"{where}.machine_spec", problem)
    if resources.min_replica_count < 1:
        raise invalid(f"{where}.min_replica_count", "The number must be at least 1.")
    if resources.max_replica_count and resources.max_replica_count < resources.min_replica_count:
        raise invalid(f"{where}.max_replica_count", "The number is below min_replica_count.")
    for spec in resources.autoscaling_metric_specs:
        field, name = f"{where}.autoscaling_metric_specs", spec.metric_name
        if name == limits.PUBSUB_METRIC:  # its labels are in v1beta1 only
            raise ApiError("UNIMPLEMENTED", f"The stand-in does not imitate {field} by Pub/Sub.")
        if name not in limits.AUTOSCALING_METRICS:
            raise invalid(field, f"The metric {name!r} is not supported.")
        if [s.metric_name for s in resources.autoscaling_metric_specs].count(name) > 1:
            raise invalid(field, f"The metric {name!r} appears more than once.")
        most = limits.AUTOSCALING_METRICS[name]
        if not 0 <= spec.target <= most:  # 0: not given, which means 60
            raise invalid(field, f"The target of {name!r} is {spec.target}, not 1 to {most}.")
        if name in limits.GPU_METRICS and not resources.machine_spec.accelerator_count:
            raise invalid(field, f"The metric {name!r} needs an accelerator.")


def _machine(deployed: t.DeployedModel) -> tuple[str, str, int]:
    spec = deployed.dedicated_resources.machine_spec
    name = t.AcceleratorType(spec.accelerator_type).name if spec.accelerator_type else ""
    return spec.machine_type, name, spec.accelerator_count


def _usage(deployed: t.DeployedModel) -> dict[str, int]:
    resources = deployed.dedicated_resources
    return limits.usage(
        *_machine(deployed), max(resources.max_replica_count, resources.min_replica_count)
    )


def _check_split(split: dict[str, int], ids: Iterable[str]) -> None:
    for deployed_id in split:
        if deployed_id not in ids:
            raise invalid("traffic_split", f"DeployedModel {deployed_id} is not at the Endpoint.")
    if sum(split.values()) != 100 or min(split.values(), default=0) < 0:
        raise invalid("traffic_split", f"The percentages add up to {sum(split.values())}, not 100.")


def _ids(endpoint: t.Endpoint) -> list[str]:
    return [deployed.id for deployed in endpoint.deployed_models]


def _remove_use(model: t.Model, deployed_id: str) -> None:
    """Remove a deployed model from the list that its model keeps."""
    for index, use in enumerate(model.deployed_models):
        if use.deployed_model_id == deployed_id:
            del model.deployed_models[index]
            return
