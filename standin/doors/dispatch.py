"""One request, whichever door it came through: who asks, may he, for what, and the handler."""

import time
from dataclasses import dataclass

from google.protobuf.message import Message

from standin.doors.access import Access
from standin.errors import ApiError
from standin.journal import Journal
from standin.leftovers import Ledger
from standin.methods import Method, get_field, set_field
from standin.names import Identifiers, canonical, region_of_host
from standin.replicas.deployments import Serving
from standin.replicas.images import Images
from standin.services.endpoints import Endpoints
from standin.services.models import Models
from standin.services.operations import Operations
from standin.services.predictions import Predictions
from standin.settings import Settings


@dataclass(frozen=True)
class Caller:
    """Where a request came from.

    Args:
        transport: "rest" or "grpc".
        host: the name the client connected to.
        authorization: the header.
    """

    transport: str
    host: str
    authorization: str


class Api:
    """Everything behind the doors."""

    def __init__(self, settings: Settings, images: Images, ledger: Ledger) -> None:
        self.settings, self.images = settings, images
        self.journal = Journal(settings.folder)
        self.access = Access(settings)
        new_id = Identifiers(settings.seed)
        self.operations = Operations(settings, self.journal, new_id)
        self.models = Models(self.operations, images, new_id)
        self.serving = Serving(settings, self.journal, ledger)
        self.endpoints = Endpoints(settings, self.operations, self.models, self.serving)
        self.predictions = Predictions(settings, self.endpoints, self.models, self.serving)

    def admit(self, caller: Caller, resource: str, permission: str) -> str:
        """The resource's canonical name, if the caller may.

        Raises:
            ApiError: 401, 403, or the name is of another region.
        """
        account = self.access.who(caller.authorization)
        if region_of_host(caller.host) is None:
            raise ApiError("NOT_FOUND", f"The requested URL was not found on {caller.host}.")
        name = canonical(resource, self.settings, caller.host, permission)
        self.access.check(account, permission, name)
        return name

    async def call(self, method: Method, request: Message, caller: Caller) -> Message:
        """Admit a request and hand it over.

        Raises:
            ApiError: what the client gets instead.
        """
        name = self.admit(caller, get_field(request, method.resource), method.permission)
        set_field(request, method.resource, name)
        if method.handler == "deploy_model":
            model = request.deployed_model.model
            request.deployed_model.model = canonical(
                model, self.settings, caller.host, "aiplatform.models.get"
            )
        if method.handler == "upload_model" and request.parent_model:
            request.parent_model = canonical(
                request.parent_model, self.settings, caller.host, method.permission
            )
        for part in (self.models, self.endpoints, self.operations, self.predictions, self):
            if handler := getattr(part, method.handler, None):
                return await handler(request)
        raise ApiError("UNIMPLEMENTED", f"The stand-in does not have {method.name}.")

    async def get_metadata_store(self, request: Message) -> Message:
        """There is none until somebody uses experiments or pipelines: what
        `aiplatform.init(experiment=...)` meets in a new project.

        Words: https://github.com/datahub-project/datahub/pull/17660
        """
        name = request.name.rsplit("/", 1)[1]
        raise ApiError("NOT_FOUND", f"Requested Metadata Store {name} not found.")

    def log(self, began: float, caller: Caller, method: str, path: str, status: str) -> None:
        """Note an answered request."""
        seconds = round(time.time() - began, 4)
        self.journal.call(
            began, caller.transport, method, path, status, host=caller.host, seconds=seconds
        )
