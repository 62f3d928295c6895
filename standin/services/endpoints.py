"""EndpointService: endpoints, and the models deployed at them."""

from collections import Counter

from google.cloud.aiplatform_v1 import types as t
from google.longrunning import operations_pb2 as lro
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from standin import limits
from standin.errors import ApiError, invalid
from standin.methods import raw
from standin.names import check_common, matches, page, region_of
from standin.replicas.deployments import Serving
from standin.services.models import Models, update
from standin.services.operations import Operations
from standin.settings import Settings

Endpoint, DeployedModel = raw(t.Endpoint), raw(t.DeployedModel)
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
    """Resource name -> endpoint."""

    def __init__(
        self, settings: Settings, operations: Operations, models: Models, serving: Serving
    ) -> None:
        self.settings, self.operations = settings, operations
        self.models, self.serving = models, serving
        self._all: dict[str, Endpoint] = {}
        self._deploying: dict[str, tuple[str, DeployedModel]] = {}
        """Deployed model's ID -> endpoint and what is on its way there."""

    def find(self, name: str) -> Endpoint:
        """The endpoint of a name.

        Raises:
            ApiError: there is none.
        """
        if name not in self._all:
            raise ApiError("NOT_FOUND", f"The Endpoint does not exist. Endpoint: {name}")
        return self._all[name]

    async def create_endpoint(self, request: Message) -> lro.Operation:
        endpoint = request.endpoint
        check_endpoint(endpoint)
        endpoint.name = (
            f"{request.parent}/endpoints/{request.endpoint_id or self.operations.new_id()}"
        )
        if endpoint.name in self._all:
            raise ApiError("ALREADY_EXISTS", f"Endpoint {endpoint.name} already exists.")

        async def work() -> Message:
            endpoint.create_time.GetCurrentTime()
            endpoint.update_time.GetCurrentTime()
            if endpoint.dedicated_endpoint_enabled:
                number, region = self.settings.number, region_of(endpoint.name)
                endpoint.dedicated_endpoint_dns = (
                    f"{endpoint.name.rsplit('/', 1)[1]}.{region}-{number}.prediction.vertexai.goog"
                )
            self._all[endpoint.name] = endpoint
            return endpoint

        return self.operations.start("CreateEndpoint", endpoint.name, work)

    async def get_endpoint(self, request: Message) -> Endpoint:
        return self.find(request.name)

    async def list_endpoints(self, request: Message) -> Message:
        found = [e for name, e in self._all.items() if name.startswith(f"{request.parent}/")]
        found = filter(matches(request.filter), found)
        items, token = page(found, request.page_size, request.page_token)
        return raw(t.ListEndpointsResponse)(endpoints=items, next_page_token=token)

    async def update_endpoint(self, request: Message) -> Endpoint:
        endpoint = self.find(request.endpoint.name)
        if "traffic_split" in request.update_mask.paths:
            _check_split(dict(request.endpoint.traffic_split), _ids(endpoint))
        update(endpoint, request.endpoint, request.update_mask.paths, CHANGEABLE, "endpoint")
        check_common("endpoint", endpoint)
        return endpoint

    async def delete_endpoint(self, request: Message) -> lro.Operation:
        endpoint = self.find(request.name)
        self._check_empty(endpoint)

        async def work() -> Message:
            self._check_empty(endpoint)
            self._all.pop(endpoint.name, None)
            return empty_pb2.Empty()

        return self.operations.start("DeleteEndpoint", endpoint.name, work)

    async def deploy_model(self, request: Message) -> lro.Operation:
        endpoint, deployed = self.find(request.endpoint), request.deployed_model
        model = self.models.find(deployed.model)
        deployed.id = deployed.id or self.operations.new_id()
        split = {deployed.id if k == "0" else k: v for k, v in request.traffic_split.items()}
        self._check_deployment(endpoint, deployed, model, split)
        deployed.model = f"{model.name}@{model.version_id}"
        deployed.model_version_id = model.version_id
        deployed.display_name = deployed.display_name or model.display_name
        model.deployed_models.add(endpoint=endpoint.name, deployed_model_id=deployed.id)
        self._deploying[deployed.id] = endpoint.name, deployed
        digest = self.models.digests[model.name, model.version_id]

        async def work() -> Message:
            await self.serving.deploy(
                *(endpoint, deployed, model, digest),
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
            _drop(model, deployed.id)

        operation = self.operations.start(
            "DeployModel", endpoint.name, work, undo, deployed_model=deployed.id
        )
        self.operations.touch(operation.name, "STARTING_DEPLOYMENT")
        return operation

    def _check_deployment(
        self, endpoint: Endpoint, deployed: DeployedModel, model: Message, split: dict[str, int]
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

    async def undeploy_model(self, request: Message) -> lro.Operation:
        endpoint = self.find(request.endpoint)
        deployed = self._deployed(endpoint, request.deployed_model_id)
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

        async def work() -> Message:
            self._deployed(endpoint, deployed.id)
            endpoint.traffic_split.clear()
            endpoint.traffic_split.update(split or left)
            await self._remove(endpoint, deployed)
            return raw(t.UndeployModelResponse)()

        return self.operations.start(
            "UndeployModel", endpoint.name, work, deployed_model=deployed.id
        )

    async def mutate_deployed_model(self, request: Message) -> lro.Operation:
        endpoint, new = self.find(request.endpoint), request.deployed_model
        deployed = self._deployed(endpoint, new.id)
        paths = [path.removeprefix("dedicated_resources.") for path in request.update_mask.paths]
        for path in paths:
            if path not in MUTABLE:
                raise invalid("update_mask", f"deployed_model.{path} cannot be updated.")
        wanted = DeployedModel()
        wanted.CopyFrom(deployed)
        for path in paths:
            wanted.dedicated_resources.ClearField(path)
            value = getattr(new.dedicated_resources, path)
            if path == "autoscaling_metric_specs":
                wanted.dedicated_resources.autoscaling_metric_specs.extend(value)
            else:
                setattr(wanted.dedicated_resources, path, value)
        check_resources(wanted)

        async def work() -> Message:
            deployed.CopyFrom(wanted)
            await self.serving.resize(deployed.id, deployed.dedicated_resources.min_replica_count)
            return raw(t.MutateDeployedModelResponse)(deployed_model=deployed)

        return self.operations.start(
            "MutateDeployedModel", endpoint.name, work, deployed_model=deployed.id
        )

    def _deployed(self, endpoint: Endpoint, number: str) -> DeployedModel:
        for deployed in endpoint.deployed_models:
            if deployed.id == number:
                return deployed
        raise ApiError(
            "NOT_FOUND", f"DeployedModel {number} is not found at Endpoint {endpoint.name}."
        )

    async def _remove(self, endpoint: Endpoint, deployed: DeployedModel) -> None:
        number, name = deployed.id, deployed.model
        await self.serving.undeploy(number)
        left = [d for d in endpoint.deployed_models if d.id != number]
        copies = [DeployedModel.FromString(d.SerializeToString()) for d in left]
        endpoint.ClearField("deployed_models")
        endpoint.deployed_models.extend(copies)
        _drop(self.models.find(name), number)

    def _check_empty(self, endpoint: Endpoint) -> None:
        busy = [i for i, (name, _) in self._deploying.items() if name == endpoint.name]
        if ids := _ids(endpoint) + busy:
            raise ApiError(
                "FAILED_PRECONDITION",
                f"The Endpoint {endpoint.name} has deployed or being-deployed DeployedModel(s) "
                f"with id(s): {', '.join(ids)}. Please undeploy them first.",
            )

    def _check_quota(self, endpoint: str, new: DeployedModel) -> None:
        prefix = endpoint.rsplit("/", 2)[0] + "/"
        deployed = [
            d for n, e in self._all.items() if n.startswith(prefix) for d in e.deployed_models
        ]
        deployed += [d for n, d in self._deploying.values() if n.startswith(prefix)]
        used = Counter()
        for item in deployed:
            used.update(_usage(item))
        asked = _usage(new)
        exceeded = limits.over_quota({metric: used[metric] + asked[metric] for metric in asked})
        if exceeded:
            raise ApiError(
                "RESOURCE_EXHAUSTED",
                "The following quota metrics exceed quota limits: "
                + ",".join(f"aiplatform.googleapis.com/{metric}" for metric in exceeded),
            )


def check_endpoint(endpoint: Endpoint) -> None:
    """Check an endpoint that somebody creates.

    Raises:
        ApiError: it cannot be.
    """
    check_common("endpoint", endpoint)
    for field in NOT_IMITATED:
        if field in {descriptor.name for descriptor, _ in endpoint.ListFields()}:
            raise ApiError("UNIMPLEMENTED", f"The stand-in does not imitate endpoint.{field}.")
    timeout = endpoint.client_connection_config.inference_timeout.ToTimedelta().total_seconds()
    if timeout and not endpoint.dedicated_endpoint_enabled:
        raise invalid(
            "endpoint.client_connection_config.inference_timeout", "Dedicated endpoints have it."
        )
    if timeout > limits.DEDICATED_MOST_SECONDS:
        raise invalid(
            "endpoint.client_connection_config.inference_timeout", "It is at most 3600 s."
        )


def check_resources(deployed: DeployedModel) -> None:
    """Check what a deployed model shall run on.

    Raises:
        ApiError: no such machine, or no such number of replicas.
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


def _machine(deployed: DeployedModel) -> tuple[str, str, int]:
    spec = deployed.dedicated_resources.machine_spec
    name = t.AcceleratorType(spec.accelerator_type).name if spec.accelerator_type else ""
    return spec.machine_type, name, spec.accelerator_count


def _usage(deployed: DeployedModel) -> dict[str, int]:
    resources = deployed.dedicated_resources
    return limits.usage(
        *_machine(deployed), max(resources.max_replica_count, resources.min_replica_count)
    )


def _check_split(split: dict[str, int], ids: list[str]) -> None:
    for number in split:
        if number not in ids:
            raise invalid("traffic_split", f"DeployedModel {number} is not at the Endpoint.")
    if sum(split.values()) != 100 or min(split.values(), default=0) < 0:
        raise invalid("traffic_split", f"The percentages add up to {sum(split.values())}, not 100.")


def _ids(endpoint: Endpoint) -> list[str]:
    return [deployed.id for deployed in endpoint.deployed_models]


def _drop(model: Message, number: str) -> None:
    left = [(d.endpoint, d.deployed_model_id) for d in model.deployed_models]
    model.ClearField("deployed_models")
    for endpoint, deployed in left:
        if deployed != number:
            model.deployed_models.add(endpoint=endpoint, deployed_model_id=deployed)
