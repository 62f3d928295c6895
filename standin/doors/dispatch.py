"""Authenticate, authorize and dispatch one API request."""

import time
from dataclasses import dataclass

from google.cloud.aiplatform_v1 import types as t
from google.protobuf.message import Message

from standin.doors.access import Access
from standin.doors.methods import Method, get_field, set_field
from standin.errors import ApiError
from standin.journal import Journal
from standin.replicas.deployments import Deployments
from standin.replicas.images import Images
from standin.replicas.leftovers import Ledger
from standin.services.endpoints import Endpoints
from standin.services.messages import raw
from standin.services.models import Models
from standin.services.names import Identifiers, canonical, region_of_host
from standin.services.operations import Operations
from standin.services.predictions import Predictions
from standin.settings import StandinSettings


@dataclass(frozen=True)
class Caller:
    """The origin of a request.

    Args:
        transport: "rest" or "grpc".
        host: the host name that the client connected to.
        authorization: the header.
    """

    transport: str
    host: str
    authorization: str


class Api:
    """The API that REST and gRPC share."""

    def __init__(self, settings: StandinSettings, images: Images, ledger: Ledger) -> None:
        self.settings, self.images = settings, images
        self.journal = Journal(settings.folder)
        self.access = Access(settings)
        new_id = Identifiers(settings.seed)
        self.operations = Operations(settings, self.journal, new_id)
        self.models = Models(self.operations, images, new_id)
        self.deployments = Deployments(settings, self.journal, ledger)
        self.endpoints = Endpoints(settings, self.operations, self.models, self.deployments)
        self.predictions = Predictions(settings, self.endpoints, self.deployments)

    def authorize(self, caller: Caller, resource: str, permission: str) -> str:
        """Check that a caller may use a resource; return the resource's canonical name.

        Raises:
            ApiError: 401, 403, or the name is of another region.
        """
        account = self.access.authenticate(caller.authorization)
        if region_of_host(caller.host) is None:
            raise ApiError("NOT_FOUND", f"The requested URL was not found on {caller.host}.")
        name = canonical(resource, self.settings, caller.host, permission)
        self.access.check(account, permission, name)
        return name

    async def call(self, method: Method, request: Message, caller: Caller) -> Message:
        """Authorize a request and return its handler's response.

        Raises:
            ApiError: the error that the client gets.
        """
        name = self.authorize(caller, get_field(request, method.resource), method.permission)
        set_field(request, method.resource, name)
        if isinstance(request, raw(t.DeployModelRequest)):
            request.deployed_model.model = canonical(
                request.deployed_model.model,
                self.settings,
                caller.host,
                "aiplatform.models.get",
            )
        if isinstance(request, raw(t.UploadModelRequest)) and request.parent_model:
            request.parent_model = canonical(
                request.parent_model, self.settings, caller.host, method.permission
            )
        for service in (self.models, self.endpoints, self.operations, self):
            if handler := getattr(service, method.handler, None):
                response: Message = await handler(request)
                return response
        raise ApiError("UNIMPLEMENTED", f"The stand-in does not have {method.name}.")

    async def get_metadata_store(self, request: t.GetMetadataStoreRequest) -> t.MetadataStore:
        """Answer that there is no metadata store.

        A new project has none until the first use of experiments or pipelines;
        `aiplatform.init(experiment=...)` gets this error. Its wording is from
        https://github.com/datahub-project/datahub/pull/17660
        """
        name = request.name.rsplit("/", 1)[1]
        raise ApiError("NOT_FOUND", f"Requested Metadata Store {name} not found.")

    def log(self, began: float, caller: Caller, method: str, path: str, status: str) -> None:
        """Write an answered request into the journal."""
        seconds = round(time.time() - began, 4)
        self.journal.call(
            began, caller.transport, method, path, status, host=caller.host, seconds=seconds
        )
