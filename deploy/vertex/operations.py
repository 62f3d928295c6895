"""Long-running operations: wait for them, show their stages, record their times.

The SDK's convenient classes (`aiplatform.Model.upload`, `Model.deploy`) wait inside and do not
return the operation. We need its name to continue after a crash, its stage to show progress, and
its times to draw. So changes go through the SDK's generated clients (`aiplatform.gapic`).
"""

import datetime
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from google.api_core import exceptions
from google.api_core.operation import Operation as StartedOperation
from google.api_core.retry import Retry
from google.cloud.aiplatform_v1 import types
from google.cloud.aiplatform_v1.services.endpoint_service import EndpointServiceClient
from google.longrunning.operations_pb2 import ListOperationsRequest, Operation

from deploy.vertex.state import RunningOperation

FIRST_POLL, LONGEST_POLL = 0.2, 3.0
"""Seconds between two looks at an operation."""
POLL_GROWTH = 1.5
READ_TIMEOUT = 30
"""Seconds for a call that changes nothing, retries included."""
RETRY = Retry(timeout=READ_TIMEOUT)


class Event(NamedTuple):
    """What one look at an operation saw."""

    step: str
    operation: str
    stage: str
    """Of a deployment, such as `GETTING_CONTAINER_IMAGE`; of others, empty."""
    began: datetime.datetime
    at: datetime.datetime
    """When the service last changed it."""
    done: bool


class Span(NamedTuple):
    """A bar of the timeline, in seconds since the first operation began."""

    step: str
    stage: str
    """Empty for the whole operation."""
    began: float
    ended: float


class Operations:
    """The long-running operations of a region.

    Args:
        client: any client of the region; all of them have the operations' methods.
        report: takes one line for every step.
        progress: takes a line that replaces the one before, after every poll: at most
            `LONGEST_POLL` seconds apart.
    """

    def __init__(
        self,
        client: EndpointServiceClient,
        report: Callable[[str], object],
        progress: Callable[[str], object],
    ) -> None:
        self._client, self._report, self._progress = client, report, progress
        self.events: list[Event] = []

    def running(self, resource: str) -> list[RunningOperation]:
        """List the operations of a model or endpoint that are not done; it need not exist yet."""
        found: list[RunningOperation] = []
        token = ""
        while True:
            request = ListOperationsRequest(name=resource, page_token=token)
            try:
                page = self._client.list_operations(request, retry=RETRY, timeout=READ_TIMEOUT)
            except exceptions.NotFound:
                return found
            found += [RunningOperation(o.name, kind_of(o)) for o in page.operations if not o.done]
            token = page.next_page_token
            if not token:
                return found

    def finish(self, step: str, started: StartedOperation) -> Any:
        """Wait for an operation that this program has just started, and return its response.

        Raises:
            GoogleAPICallError: it failed; the class is the one that the SDK raises.
        """
        self._report(step)
        final = self.wait(step, started.operation)
        if final.error.code:
            raise exceptions.from_grpc_status(final.error.code, final.error.message)
        return _message(final.response)

    def wait(self, step: str, operation: Operation | RunningOperation) -> Operation:
        """Look at an operation until it is done, and return its last state, failed or not."""
        began, pause = time.monotonic(), FIRST_POLL
        if isinstance(operation, RunningOperation):
            operation = self._get(operation.name)
        self._record(step, operation)
        while not operation.done:
            time.sleep(pause)
            pause = min(pause * POLL_GROWTH, LONGEST_POLL)
            operation = self._get(operation.name)
            stage = self._record(step, operation)
            self._progress(f"{step}: {stage or 'waiting'}, {time.monotonic() - began:.0f} s")
        if operation.error.code:
            self._report(f"{step}: failed after {time.monotonic() - began:.0f} s")
        return operation

    def cancel(self, operation: RunningOperation) -> None:
        """Request the end of an operation. Google does not guarantee it, so wait afterwards."""
        try:
            self._client.cancel_operation({"name": operation.name})
        except exceptions.GoogleAPICallError as error:
            self._report(f"cannot be cancelled ({error.message}); waiting for it instead")

    def _get(self, name: str) -> Operation:
        return self._client.get_operation({"name": name}, retry=RETRY, timeout=READ_TIMEOUT)

    def _record(self, step: str, operation: Operation) -> str:
        """Keep the times in an operation's metadata if they are new; return the stage."""
        metadata = _message(operation.metadata)
        if metadata is None:
            return ""
        stage = getattr(metadata, "deployment_stage", None)
        stage = stage.name if stage else ""
        times = metadata.generic_metadata
        seen = next((e for e in reversed(self.events) if e.operation == operation.name), None)
        is_new = not seen or (seen.stage, seen.done) != (stage, operation.done)
        if times.create_time and is_new:
            began, at = times.create_time, times.update_time or times.create_time
            self.events.append(Event(step, operation.name, stage, began, at, operation.done))
        return stage


def kind_of(operation: Operation) -> str:
    """What an operation does, by its metadata: `DeployModel`, `UploadModel`, ..."""
    return operation.metadata.type_url.rsplit(".", 1)[-1].removesuffix("OperationMetadata")


def timeline(events: list[Event]) -> list[Span]:
    """Bars to draw: every operation and the stages in it, by the service's own clock."""
    return list(_spans(events))


def _message(packed: Any) -> Any:
    """The message in an operation's metadata or response; None if it is not one of Vertex AI's."""
    kind = getattr(types, packed.type_url.rsplit(".", 1)[-1], None)
    return kind.deserialize(packed.value) if kind else None


def _spans(events: list[Event]) -> Iterator[Span]:
    if not events:
        return
    zero = min(event.began for event in events)
    for name in dict.fromkeys(event.operation for event in events):
        looks = [event for event in events if event.operation == name]
        first, last = looks[0], looks[-1]
        yield Span(first.step, "", _since(zero, first.began), _since(zero, last.at))
        for look, following in itertools.pairwise(looks):
            if look.stage:
                began = max(look.at, look.began)
                yield Span(first.step, look.stage, _since(zero, began), _since(zero, following.at))


def _since(zero: datetime.datetime, moment: datetime.datetime) -> float:
    return (moment - zero).total_seconds()
