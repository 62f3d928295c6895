"""Long-running operations, with metadata, failure and cancellation."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable
from typing import Any

from google.cloud.aiplatform_v1 import types as t
from google.longrunning import operations_pb2 as lro
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from standin.errors import ApiError
from standin.journal import Journal
from standin.limits import DURATIONS
from standin.services.lists import page
from standin.services.messages import raw
from standin.services.names import Identifiers
from standin.settings import StandinSettings

Work = Callable[[], Awaitable[Message]]

METADATA: dict[str, type[Any]] = {
    "UploadModel": t.UploadModelOperationMetadata,
    "CreateEndpoint": t.CreateEndpointOperationMetadata,
    "DeployModel": t.DeployModelOperationMetadata,
    "UndeployModel": t.UndeployModelOperationMetadata,
    "MutateDeployedModel": t.MutateDeployedModelOperationMetadata,
}
"""Method -> type of its operation's metadata; all others have DeleteOperationMetadata."""


class Operations:
    """All operations of one stand-in."""

    def __init__(self, settings: StandinSettings, journal: Journal, new_id: Identifiers) -> None:
        self.settings, self.journal, self.new_id = settings, journal, new_id
        self._all: dict[str, lro.Operation] = {}
        self._metadata: dict[str, Any] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(
        self,
        kind: str,
        resource: str,
        work: Work,
        undo: Callable[[], None] = lambda: None,
        **details: str,
    ) -> lro.Operation:
        """Start an operation and return it.

        Args:
            kind: the method, such as "DeployModel".
            resource: the resource's name, which the operation's name starts with.
            work: does the work after the platform's own duration and returns the response.
            undo: called if the operation fails or is cancelled, even before `work` started.
            details: for the journal.
        """
        operation = lro.Operation(name=f"{resource}/operations/{self.new_id()}")
        metadata = raw(METADATA.get(kind, t.DeleteOperationMetadata))()
        metadata.generic_metadata.create_time.GetCurrentTime()
        self._all[operation.name], self._metadata[operation.name] = operation, metadata
        self.touch(operation.name)
        self.journal.event(
            f"{kind} started", resource=resource, operation=operation.name, **details
        )
        self._tasks[operation.name] = asyncio.create_task(
            self._run(kind, resource, operation, work, undo)
        )
        return _copy(operation)

    async def get_operation(self, request: lro.GetOperationRequest) -> lro.Operation:
        return _copy(self._find(request.name))

    async def list_operations(
        self, request: lro.ListOperationsRequest
    ) -> lro.ListOperationsResponse:
        if request.filter:
            raise ApiError("UNIMPLEMENTED", "The stand-in has no filter for operations.")
        found = [o for name, o in self._all.items() if name.startswith(f"{request.name}/")]
        items, token = page(found, request.page_size, request.page_token)
        return lro.ListOperationsResponse(operations=items, next_page_token=token)

    async def cancel_operation(self, request: lro.CancelOperationRequest) -> empty_pb2.Empty:
        self._find(request.name)
        self._tasks[request.name].cancel()
        return empty_pb2.Empty()

    def touch(self, name: str, stage: str = "") -> None:
        """Set an operation's update time to now.

        Args:
            name: the operation's name.
            stage: a name of `DeploymentStage` to set as well, for a deployment.
        """
        metadata = self._metadata[name]
        metadata.generic_metadata.update_time.GetCurrentTime()
        if stage:
            metadata.deployment_stage = getattr(t.DeploymentStage, stage)
        self._all[name].metadata.Pack(metadata)

    async def stop(self) -> None:
        """Cancel all running operations."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _find(self, name: str) -> lro.Operation:
        if name not in self._all:
            raise ApiError("NOT_FOUND", f"Operation {name} is not found.")
        return self._all[name]

    async def _run(
        self,
        kind: str,
        resource: str,
        operation: lro.Operation,
        work: Work,
        undo: Callable[[], None],
    ) -> None:
        outcome = "done"
        try:
            await asyncio.sleep(DURATIONS[kind] * self.settings.scale)
            response = await work()
            self.touch(operation.name)
            operation.response.Pack(response)
        except ApiError as error:
            outcome = error.status
            operation.error.CopyFrom(error.operation())
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            operation.error.CopyFrom(ApiError(outcome, "The operation was cancelled.").operation())
        except Exception:  # a bug of the stand-in, which the client should see too
            outcome = "INTERNAL"
            text = f"The stand-in has a bug: {traceback.format_exc()}"
            operation.error.CopyFrom(ApiError(outcome, text).operation())
        if outcome != "done":
            undo()
        operation.done = True
        self.journal.event(
            f"{kind} ended", resource=resource, operation=operation.name, outcome=outcome
        )


def _copy(operation: lro.Operation) -> lro.Operation:
    copy = lro.Operation()
    copy.CopyFrom(operation)
    return copy
