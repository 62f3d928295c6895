"""One replica: start it, probe it, take it out of routing, restart it."""

import asyncio
import itertools
from contextlib import suppress
from typing import Protocol

import aiohttp
from google.cloud.aiplatform_v1 import types as t

from standin import limits
from standin.errors import ApiError
from standin.replicas import runners
from standin.settings import StandinSettings

NEVER_READY = (
    "Model server never became ready. Please validate that your model file or container "
    "configuration are valid. Model server logs can be found at {log}."
)
EXITED = "Model server exited unexpectedly. Model server logs can be found at {log}."
"""Both in Vertex AI's wording, with a file instead of a link to Cloud Logging."""
SHORTEST_PERIOD = 0.1
"""Seconds between two probes at least, at any scale: probes cost processor time."""
SHORTEST_STARTING_PERIOD = 0.02
"""The same for health checks while a server starts, which is short and what a client waits for."""


class EventWriter(Protocol):
    """Writes an event about a replica into the journal."""

    def __call__(self, event: str, **details: object) -> None: ...


class Replica:
    """One replica and its probes.

    Args:
        spec: what to run.
        model: the model's routes, probes and timeouts.
        health_route: path of health checks.
        settings: of the stand-in.
        http: client for health checks.
        event: called for every change.
    """

    def __init__(
        self,
        spec: runners.ReplicaSpec,
        *,
        model: t.ModelContainerSpec,
        health_route: str,
        settings: StandinSettings,
        http: aiohttp.ClientSession,
        event: EventWriter,
    ) -> None:
        self.model, self.health_route, self.settings = model, health_route, settings
        self.http, self.event = http, event
        self.runner = runners.make(settings.runner, spec)
        self.ready = False
        self._task: asyncio.Task[None] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.runner.port}"

    async def start(self, *, until_deadline: bool) -> None:
        """Start the model server; wait for the startup probe and a health check.

        Args:
            until_deadline: give up after the deployment's timeout or after `limits.CRASHES` exits.

        Raises:
            ApiError: the start was given up.
        """
        log = self.runner.spec.log
        seconds = self.model.deployment_timeout.ToTimedelta().total_seconds()
        seconds = (seconds or limits.DEPLOYMENT_SECONDS) * self.settings.limit_scale
        try:
            async with asyncio.timeout(seconds if until_deadline else None):
                for crash in itertools.count(1):
                    await self.runner.start()
                    self.event("container started")
                    if await self._passes_startup():
                        break
                    self.event("container exited", code=self.runner.exit_code())
                    if until_deadline and crash == limits.CRASHES:
                        raise ApiError("FAILED_PRECONDITION", EXITED.format(log=log))
                    await asyncio.sleep(self._period(limits.PROBE_PERIOD))
                    await self.runner.stop()
        except TimeoutError as error:
            self.event("deployment timeout", seconds=seconds)
            raise ApiError("FAILED_PRECONDITION", NEVER_READY.format(log=log)) from error
        self.ready = True
        self.event("in routing")

    def start_probing(self) -> None:
        """Probe the replica until `stop`."""
        self._task = asyncio.create_task(self._probe())

    async def stop(self) -> None:
        self.ready = False
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self.runner.stop()
        self.event("container stopped")

    async def _passes_startup(self) -> bool:
        """Wait for the startup probe and a health check; return False if the server exits."""
        probe = self.model.startup_probe
        if command := list(probe.exec_.command):
            period = self._period(probe.period_seconds or limits.PROBE_PERIOD)
            timeout = probe.timeout_seconds or limits.STARTUP_TIMEOUT
            while not await self.runner.execute(command, timeout):
                if self.runner.exit_code() is not None:
                    return False
                await asyncio.sleep(period)
            self.event("startup probe passed")
        while not await self._healthy():
            if self.runner.exit_code() is not None:
                return False
            await asyncio.sleep(self._health_period(SHORTEST_STARTING_PERIOD))
        self.event("health check passed")
        return True

    async def _healthy(self) -> bool:
        probe = self.model.health_probe
        timeout = probe.timeout_seconds or limits.HEALTH_TIMEOUT
        if command := list(probe.exec_.command):
            return await self.runner.execute(command, timeout)
        if not await self.runner.reachable():
            return False
        try:
            async with self.http.get(
                self.url + self.health_route, timeout=aiohttp.ClientTimeout(timeout)
            ) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _probe(self) -> None:
        unreachable = unhealthy = 0
        while True:
            await asyncio.sleep(self._health_period())
            unreachable = 0 if await self.runner.reachable() else unreachable + 1
            code = self.runner.exit_code()
            if code is not None or unreachable == limits.FAILURES:
                self.ready = False
                if code is None:
                    self.event("liveness check failed")
                else:
                    self.event("container exited", code=code)
                await self.runner.stop()
                await self.start(until_deadline=False)
                unreachable = unhealthy = 0
                continue
            unhealthy = 0 if await self._healthy() else unhealthy + 1
            if self.ready and unhealthy == limits.FAILURES:
                self.ready = False
                self.event("out of routing")
            elif not self.ready and not unhealthy:
                self.ready = True
                self.event("in routing")

    def _health_period(self, shortest: float = SHORTEST_PERIOD) -> float:
        return self._period(self.model.health_probe.period_seconds or limits.PROBE_PERIOD, shortest)

    def _period(self, seconds: float, shortest: float = SHORTEST_PERIOD) -> float:
        return max(seconds * self.settings.scale, shortest)
