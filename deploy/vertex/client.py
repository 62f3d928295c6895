"""Talking to Vertex AI: clients, and the long-running operations behind everything slow.

The SDK's convenient classes (`aiplatform.Model.upload`, `Model.deploy`) wait inside and keep the
operation to themselves. We need it: its name to take up after a crash, its stage to show progress,
its times to draw. So what changes something goes through the SDK's own generated clients
(`aiplatform.gapic`), and what asks goes through `aiplatform.Endpoint`.
"""

import datetime
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from deploy.common.paths import UserError
from deploy.vertex.config import Settings

try:
    import google.auth
    from google.api_core import exceptions, operation, retry
    from google.api_core.exceptions import NotFound
    from google.cloud import aiplatform
    from google.cloud.aiplatform_v1 import types
except ImportError as error:
    raise UserError(f"Google's SDK is not installed ({error}); run `make setup`") from error

SCOPES = ["https://www.googleapis.com/auth/cloud-platform"]
FIRST_POLL, LONGEST_POLL = 0.2, 3.0
"""Seconds between two looks at an operation."""
READ = {"retry": retry.Retry(timeout=30), "timeout": 30}
"""For calls that change nothing: seconds for which passing faults are tried again."""


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


class Vertex:
    """A project in a region: its clients, where progress is reported, what was seen.

    Args:
        settings: from `load_settings`.
        report: takes one line for every step.
        tick: takes a line that replaces the one before, about every second of a long step.

    Raises:
        UserError: no project, or no application-default credentials.
    """

    def __init__(
        self,
        settings: Settings,
        report: Callable[[str], Any] = print,
        tick: Callable[[str], Any] | None = None,
    ) -> None:
        self.settings, self.report, self.tick = settings, report, tick or (lambda line: None)
        self.parent = settings.parent
        self.credentials = default_credentials()
        self.events: list[Event] = []
        self.begun: list[str] = []  # what this object has changed, in words
        aiplatform.init(
            project=settings.project, location=settings.region, credentials=self.credentials
        )
        options = {"api_endpoint": f"{settings.region}-aiplatform.googleapis.com"}
        given = {"credentials": self.credentials, "client_options": options}
        self.endpoints = aiplatform.gapic.EndpointServiceClient(**given)
        self.models = aiplatform.gapic.ModelServiceClient(**given)

    def running(self, resource: str) -> list:
        """The operations of a model or endpoint that are not done; it need not exist (yet)."""
        found, token = [], ""
        while True:
            request = {"name": resource, "page_token": token}
            try:
                page = self.endpoints.list_operations(request, **READ)
            except NotFound:
                return found
            found += [one for one in page.operations if not one.done]
            token = page.next_page_token
            if not token:
                return found

    def finish(self, step: str, started: operation.Operation) -> Any:
        """Wait for an operation that this program has just started; return its response.

        Raises:
            GoogleAPICallError: it failed; the class is the one that the SDK raises.
        """
        self.begun.append(step)
        self.report(step)
        final = self.wait(step, started.operation)
        if final.error.code:
            raise exceptions.from_grpc_status(final.error.code, final.error.message)
        kind = final.response.type_url.rsplit(".", 1)[-1]
        return (
            getattr(types, kind).deserialize(final.response.value) if kind in dir(types) else None
        )

    def wait(self, step: str, current: Any) -> Any:
        """Look at an operation until it is done, and return its last state, failed or not."""
        began, pause = time.monotonic(), FIRST_POLL
        name = current.name
        self._note(step, current)
        while not current.done:
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_POLL)
            current = self.endpoints.get_operation({"name": name}, **READ)
            stage = self._note(step, current)
            self.tick(f"{step}: {stage or 'waiting'}, {time.monotonic() - began:.0f} s")
        if current.error.code:
            self.report(f"{step}: failed after {time.monotonic() - began:.0f} s")
        return current

    def cancel(self, current: Any) -> None:
        """Ask for an operation to stop. Google promises nothing: wait for it all the same."""
        try:
            self.endpoints.cancel_operation({"name": current.name})
        except exceptions.GoogleAPICallError as error:
            self.report(f"cannot be cancelled ({error.message}); waiting for it instead")

    def _note(self, step: str, current: Any) -> str:
        """Keep what an operation's metadata say, if it is new; return the stage."""
        kind = current.metadata.type_url.rsplit(".", 1)[-1]
        if not hasattr(types, kind):
            return ""
        metadata = getattr(types, kind).deserialize(current.metadata.value)
        stage = getattr(metadata, "deployment_stage", None)
        stage = stage.name if stage else ""
        generic = metadata.generic_metadata
        seen = next((e for e in reversed(self.events) if e.operation == current.name), None)
        if generic.create_time and (not seen or (seen.stage, seen.done) != (stage, current.done)):
            times = generic.create_time, generic.update_time or generic.create_time
            self.events.append(Event(step, current.name, stage, *times, current.done))
        return stage


def kind_of(running: Any) -> str:
    """What an operation does, by its metadata: `DeployModel`, `UploadModel`, ..."""
    return running.metadata.type_url.rsplit(".", 1)[-1].removesuffix("OperationMetadata")


def timeline(events: list[Event]) -> list[Span]:
    """Bars to draw: every operation, and the stages in it, by the service's own clock."""
    return list(_spans(events))


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


def default_credentials() -> Any:
    """Application-default credentials.

    Raises:
        UserError: there are none.
    """
    try:
        credentials, _ = google.auth.default(scopes=SCOPES)
    except google.auth.exceptions.DefaultCredentialsError as error:
        raise UserError(
            "no application-default credentials; run `gcloud auth application-default login` "
            f"(or rehearse without Google: `make rehearse`). {str(error).splitlines()[0]}"
        ) from error
    return credentials
