"""Long-running operations: they take time, carry metadata, and can fail or be cancelled."""

import asyncio
import traceback
from collections.abc import Awaitable, Callable

from google.cloud.aiplatform_v1 import types as t
from google.longrunning import operations_pb2 as lro
from google.protobuf import empty_pb2
from google.protobuf.message import Message

from standin.errors import ApiError
from standin.journal import Journal
from standin.limits import DURATIONS
from standin.methods import raw
from standin.names import Identifiers, page
from standin.settings import Settings

Work = Callable[[], Awaitable[Message]]

METADATA = {
    "UploadModel": t.UploadModelOperationMetadata,
    "CreateEndpoint": t.CreateEndpointOperationMetadata,
    "DeployModel": t.DeployModelOperationMetadata,
    "UndeployModel": t.UndeployModelOperationMetadata,
    "MutateDeployedModel": t.MutateDeployedModelOperationMetadata,
}
"""The type of each operation's metadata; the rest has DeleteOperationMetadata."""


class Operations:
    """All operations of one stand-in."""

    def __init__(self, settings: Settings, journal: Journal, new_id: Identifiers) -> None:
        self.settings, self.journal, self.new_id = settings, journal, new_id
        self._all: dict[str, lro.Operation] = {}
        self._tasks: dict[str, asyncio.Task] = {}

    def start(
        self,
        kind: str,
        resource: str,
        work: Work,
        undo: Callable[[], None] = lambda: None,
        **details: str,
    ) -> lro.Operation:
        """Begin an operation.

        Args:
            kind: the method, such as "DeployModel".
            resource: what it is about; its name is part of the operation's.
            work: does it, after the time that the platform itself takes, and returns the response.
            undo: called if it fails or is cancelled, be it before `work` began.
            details: for the journal.
        """
        operation = lro.Operation(name=f"{resource}/operations/{self.new_id()}")
        metadata = raw(METADATA.get(kind, t.DeleteOperationMetadata))()
        metadata.generic_metadata.create_time.GetCurrentTime()
        metadata.generic_metadata.update_time.GetCurrentTime()
        operation.metadata.Pack(metadata)
        self._all[operation.name] = operation
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
        """Move an operation's update time: something happened.

        Args:
            name: of the operation.
            stage: of a deployment, a name of `DeploymentStage`, if that changes too.
        """
        operation = self._all[name]
        kind = next(
            kind
            for kind in (*METADATA.values(), t.DeleteOperationMetadata)
            if operation.metadata.Is(raw(kind).DESCRIPTOR)
        )
        metadata = raw(kind)()
        operation.metadata.Unpack(metadata)
        metadata.generic_metadata.update_time.GetCurrentTime()
        if stage:
            metadata.deployment_stage = t.DeploymentStage[stage]
        operation.metadata.Pack(metadata)

    async def stop(self) -> None:
        """Cancel what is running."""
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
        except Exception:  # a mistake of ours, which the client should see too
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
