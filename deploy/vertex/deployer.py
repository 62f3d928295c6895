"""Deploy an app, roll back, undeploy, clean up: read the state, compare it, apply the changes.

Every command can be killed and repeated, because nothing is stored on this machine. IDs follow from
the APP, every resource has labels, and each command begins with what is there and with what an
earlier run still does. `changes` decides what to do; this module talks to Vertex AI.

You pay for replicas from `deploy` to `undeploy` or `cleanup`, even when they are idle. A model in
the registry and an endpoint without a deployed model cost nothing.
"""

from collections.abc import Callable, Iterable
from typing import Any

from google.api_core.client_options import ClientOptions
from google.api_core.exceptions import AlreadyExists, BadRequest, NotFound
from google.api_core.operation import Operation
from google.cloud import aiplatform
from google.cloud.aiplatform_v1 import types
from google.cloud.aiplatform_v1.services.endpoint_service import EndpointServiceClient
from google.cloud.aiplatform_v1.services.model_service import ModelServiceClient
from google.protobuf.field_mask_pb2 import FieldMask

from deploy.common.paths import UserError
from deploy.vertex import artifacts, changes, messages
from deploy.vertex.changes import (
    Change,
    CreateEndpoint,
    DeleteEndpoint,
    DeleteModel,
    DeployVersion,
    Rescale,
    SetTraffic,
    Undeploy,
    UploadVersion,
    Wanted,
    check_canary,
)
from deploy.vertex.config import MANAGED_BY, VertexSettings, api_host
from deploy.vertex.credentials import default_credentials
from deploy.vertex.gauges import check_gauges
from deploy.vertex.operations import READ_TIMEOUT, RETRY, Operations
from deploy.vertex.state import (
    Endpoint,
    Inventory,
    ModelVersion,
    Resource,
    RunningOperation,
    State,
)

CANCELLED = ("DeployModel", "UploadModel")
"""Operations that `undeploy` and `cleanup` cancel: their results would be removed anyway."""


class Deployer:
    """One app in one project and region.

    Args:
        settings: from `load_settings`.
        app: the APP.
        report: takes one line for every step.
        progress: takes a line that replaces the one before, after every poll of a long step.

    Raises:
        UserError: no project, or no application-default credentials.
    """

    def __init__(
        self,
        settings: VertexSettings,
        app: str,
        report: Callable[[str], object] = print,
        progress: Callable[[str], object] | None = None,
    ) -> None:
        self.settings, self.app, self.report = settings, app, report
        self.parent, project = settings.parent, settings.project_id
        self.credentials = default_credentials()
        # For the SDK's own classes, such as aiplatform.Endpoint.
        aiplatform.init(project=project, location=settings.region, credentials=self.credentials)
        options = ClientOptions(api_endpoint=api_host(settings.region))
        self.endpoints = EndpointServiceClient(credentials=self.credentials, client_options=options)
        self.models = ModelServiceClient(credentials=self.credentials, client_options=options)
        self.operations = Operations(self.endpoints, report, progress or (lambda line: None))
        self.begun: list[str] = []
        """The changes of this run, in words."""

    # ---- commands

    def deploy(self, image_uri: str, canary: int | None = None) -> str:
        """Deploy an image at the app's endpoint, and leave what is already as wanted.

        Args:
            image_uri: in Artifact Registry, in the settings' region. Another image than before
                becomes another version of the model.
            canary: percent of the requests that this image gets; the version that had most keeps
                the rest. None gives it all requests, and undeploys the others.

        Returns:
            The endpoint's host name.

        Raises:
            UserError: a wrong argument, or a canary with nothing beside it.
            GoogleAPICallError: Google rejected it, or the model server never became ready.
        """
        check_canary(canary)
        check_gauges(self.settings, self.app)
        if not image_uri.startswith(f"{self.settings.region}-docker.pkg.dev/"):
            raise UserError(
                f"image_uri: {image_uri} given; should be in Artifact Registry in the same region, "
                f"{self.settings.image_folder()}/..."
            )
        self.begun.clear()
        wanted = self._wanted(image_uri, canary)
        try:
            return self._deploy(wanted)
        except AlreadyExists:
            # Begun by a run that was killed a moment ago, and not listed until now.
            return self._deploy(wanted)

    def rollback(self) -> None:
        """Go back to what served before the last deployment.

        A canary is undeployed, and the version beside it gets all requests. If all requests go to
        one version already, the version before it is deployed again, which takes minutes: the one
        that had most requests when it was deployed, or if that is unknown, the next lower number.
        So two rollbacks go back by two. The version that is left stays in the model registry.

        Raises:
            UserError: there is nothing to go back to.
        """
        line, plan = changes.rollback(self._observe_when_idle(), self.app)
        self.report(line)
        self._apply_or_report(plan)

    def undeploy(self) -> None:
        """Stop all replicas of the app, so that you no longer pay. Endpoint and model stay."""
        endpoint = self._observe_when_idle(cancel=True).endpoint
        if endpoint:
            self.apply(changes.undeploy(endpoint))
        else:
            self.report(f"{self.app} has no endpoint in {self.settings.region}")

    def cleanup(self, attempts: int = 3) -> None:
        """Remove everything of the app in the region, and list again to prove it.

        Args:
            attempts: how often to list and remove. More than one is for what appears meanwhile,
                such as the model of an upload that could not be cancelled.

        Raises:
            UserError: something is left; it says what.
        """
        found = self.inventory()
        for _ in range(attempts):
            while found.operations:
                self.wait_for_earlier_operations(found.operations, cancel=True)
                found = self.inventory()
            self.apply(changes.removal(found))
            found = self.inventory()
            left = list(found.resources(self.app))
            if not left:
                self.report(f"listed {self.parent} again: nothing of {self.app} is left")
                return
        listed = "; ".join(f"{resource.kind} {resource.name}" for resource in left)
        raise UserError(f"cleanup: still there, and you may be paying for it: {listed}")

    def resources(self, every_app: bool = False) -> list[Resource]:
        """List what this program made in the region, by its labels, and what is still running.

        Args:
            every_app: list the resources of all apps, not only of this one.
        """
        return list(self.inventory(every_app).resources("" if every_app else self.app))

    def served(self) -> tuple[VertexSettings, str] | None:
        """How clients reach what is deployed: the settings as they are there, and the host name.

        None if nothing is deployed. The settings' own values may wait for the next `deploy`.
        """
        state = self.observe()
        prefix = changes.served_prefix(state)
        if state.endpoint is None or prefix is None:
            return None
        there = {
            "dedicated": state.endpoint.dedicated,
            "inference_timeout": state.endpoint.inference_timeout or None,
            "invoke_route_prefix": prefix or None,
        }
        return self.settings.model_copy(update=there), state.endpoint.host

    # ---- observe

    def observe(self) -> State:
        """Read the app's endpoint, versions and running operations, each of them once."""
        endpoint, model = self.settings.endpoint_name(self.app), self.settings.model_name(self.app)
        # First the operations: an endpoint that is read after they have ended shows their result.
        operations = self._running([endpoint, model])
        return State(self._get_endpoint(), self._versions(model), operations)

    def inventory(self, every_app: bool = False) -> Inventory:
        """List all resources with our labels, and the operations that run on them.

        The labels are compared here, not in the request's filter. If a filter meant something else
        than we think, the list would be empty, and `cleanup` would believe it.
        """
        owner = {"managed-by": MANAGED_BY}
        if not every_app:
            owner["app"] = self.settings.labels_for(self.app)["app"]
        endpoints = tuple(
            messages.endpoint_state(message)
            for message in self.endpoints.list_endpoints(
                parent=self.parent, retry=RETRY, timeout=READ_TIMEOUT
            )
            if owner.items() <= dict(message.labels).items()
        )
        models = tuple(
            messages.model_state(message)
            for message in self.models.list_models(
                parent=self.parent, retry=RETRY, timeout=READ_TIMEOUT
            )
            if owner.items() <= dict(message.labels).items()
        )
        names = [endpoint.name for endpoint in endpoints] + [model.name for model in models]
        if not every_app:  # they may be created right now, and not be listed yet
            names += [self.settings.endpoint_name(self.app), self.settings.model_name(self.app)]
        return Inventory(endpoints, models, self._running(names))

    def wait_for_earlier_operations(
        self, operations: Iterable[RunningOperation], cancel: bool = False
    ) -> None:
        """Wait until the operations of an earlier run are done.

        Args:
            operations: which ones.
            cancel: whether to cancel deployments and uploads first.
        """
        for operation in operations:
            step = f"{operation.kind} from an earlier run"
            stop = cancel and operation.kind in CANCELLED
            self.report(f"{step}: {'cancelled, ' if stop else ''}waiting for its end")
            if stop:
                self.operations.cancel(operation)
            self.operations.wait(step, operation)

    def _observe_when_idle(self, cancel: bool = False) -> State:
        state = self.observe()
        while state.operations:
            self.wait_for_earlier_operations(state.operations, cancel)
            state = self.observe()
        return state

    def _get_endpoint(self) -> Endpoint | None:
        name = self.settings.endpoint_name(self.app)
        try:
            message = self.endpoints.get_endpoint(name=name, retry=RETRY, timeout=READ_TIMEOUT)
        except NotFound:
            return None
        return messages.endpoint_state(message)

    def _versions(self, model: str) -> tuple[ModelVersion, ...]:
        try:
            pages = self.models.list_model_versions(name=model, retry=RETRY, timeout=READ_TIMEOUT)
        except NotFound:
            return ()
        versions = [messages.version_state(message) for message in pages]
        return tuple(sorted(versions, key=lambda version: version.number, reverse=True))

    def _running(self, names: Iterable[str]) -> tuple[RunningOperation, ...]:
        # Google answers with the project's number where we use its ID: one resource, two names.
        unique = {name.split("/", 2)[2]: name for name in names}.values()
        return tuple(operation for name in unique for operation in self.operations.running(name))

    # ---- compare

    def _wanted(self, image_uri: str, canary: int | None) -> Wanted:
        """What the settings say about an image; reads the digest of its archive, if it has one."""
        settings, digest = self.settings, ""
        if settings.artifact_uri:
            digest = artifacts.digest_of(
                settings.artifact_uri, settings.project_id, self.credentials
            )
        return Wanted(
            container=messages.fields(
                messages.container_spec(settings, self.app, image_uri, digest)
            ),
            artifact_uri=settings.artifact_uri or "",
            machines=messages.machines(messages.dedicated_resources(settings)),
            service_account=settings.service_account or "",
            inference_timeout=settings.request_seconds if settings.dedicated else 0,
            dedicated=settings.dedicated,
            canary=canary,
        )

    def _deploy(self, wanted: Wanted) -> str:
        state = self._observe_when_idle()
        plan = changes.deployment(state, wanted)
        if line := changes.other_doors(state, wanted.container):
            self.report(line)
        self._apply_or_report(plan)
        endpoint = state.endpoint or self._get_endpoint()
        return endpoint.host if endpoint else ""

    def _apply_or_report(self, plan: list[Change]) -> None:
        if plan:
            self.apply(plan)
        else:
            self.report(f"{self.app} is deployed like this already: nothing to do")

    # ---- apply

    def apply(self, plan: Iterable[Change]) -> None:
        """Make changes in their order, and wait for the end of each."""
        uploaded = 0
        for change in plan:
            match change:
                case UploadVersion():
                    uploaded = self._upload(change)
                case CreateEndpoint():
                    self._create_endpoint()
                case DeployVersion():
                    self._deploy_version(change, change.version or uploaded)
                case Rescale():
                    self._rescale(change)
                case SetTraffic():
                    self._set_traffic(change)
                case Undeploy():
                    self._undeploy(change)
                case DeleteEndpoint():
                    self._delete("endpoint", change.name, self.endpoints.delete_endpoint)
                case DeleteModel():
                    self._delete("model", change.name, self.models.delete_model)

    def _finish(self, step: str, started: Operation) -> Any:
        self.begun.append(step)
        return self.operations.finish(step, started)

    def _upload(self, change: UploadVersion) -> int:
        name = self.settings.resource_id(self.app)
        model = messages.model_to_upload(
            self.settings, self.app, change.container, change.artifact_uri
        )
        request = types.UploadModelRequest(parent=self.parent, model=model)
        if change.number == 1:
            request.model_id = name
        else:
            request.parent_model = self.settings.model_name(self.app)
        step = f"upload version {change.number} of model {name}"
        return int(self._finish(step, self.models.upload_model(request)).model_version_id)

    def _create_endpoint(self) -> None:
        name = self.settings.resource_id(self.app)
        request = types.CreateEndpointRequest(
            parent=self.parent,
            endpoint_id=name,
            endpoint=messages.endpoint_to_create(self.settings, self.app),
        )
        self._finish(f"create endpoint {name}", self.endpoints.create_endpoint(request))

    def _deploy_version(self, change: DeployVersion, version: int) -> None:
        model = messages.model_to_deploy(self.settings, self.app, version, change.name_suffix)
        size = model.dedicated_resources
        step = (
            f"deploy version {version} on {size.min_replica_count} x "
            f"{size.machine_spec.machine_type}, {change.traffic[changes.NEW]} % of requests"
        )
        request = types.DeployModelRequest(
            endpoint=self.settings.endpoint_name(self.app),
            deployed_model=model,
            traffic_split=change.traffic,
        )
        self._finish(step, self.endpoints.deploy_model(request))

    def _rescale(self, change: Rescale) -> None:
        model = messages.model_to_rescale(change.id, change.machines)
        size = model.dedicated_resources
        step = (
            f"version {change.version} on {size.min_replica_count} to {size.max_replica_count} "
            f"replicas, by {len(size.autoscaling_metric_specs)} metrics"
        )
        request = types.MutateDeployedModelRequest(
            endpoint=self.settings.endpoint_name(self.app),
            deployed_model=model,
            update_mask=FieldMask(paths=[f"dedicated_resources.{name}" for name in change.fields]),
        )
        self._finish(step, self.endpoints.mutate_deployed_model(request))

    def _set_traffic(self, change: SetTraffic) -> None:
        shares = ", ".join(
            f"version {version} {change.traffic[id]} %" for id, version in change.versions.items()
        )
        self.begun.append(f"requests: {shares}")
        self.report(self.begun[-1])
        self.endpoints.update_endpoint(
            endpoint=types.Endpoint(
                name=self.settings.endpoint_name(self.app), traffic_split=change.traffic
            ),
            update_mask=FieldMask(paths=["traffic_split"]),
        )

    def _undeploy(self, change: Undeploy) -> None:
        request = types.UndeployModelRequest(
            endpoint=change.endpoint,
            deployed_model_id=change.id,
            traffic_split=change.traffic or {},
        )
        step = f"undeploy version {change.version}"
        try:
            self._finish(step, self.endpoints.undeploy_model(request))
        except NotFound:  # another run, or a killed one, was faster
            self.report(f"{step}: it is undeployed already")

    def _delete(self, kind: str, name: str, call: Callable[..., Operation]) -> None:
        """Delete a resource. One that is gone already is fine; `cleanup` lists what is left."""
        identifier = name.rsplit("/", 1)[1]
        try:
            self._finish(f"delete {kind} {identifier}", call(name=name))
        except NotFound:
            pass
        except BadRequest as error:  # FAILED_PRECONDITION: in use
            self.report(f"{kind} {identifier} cannot be deleted: {error.message}")
