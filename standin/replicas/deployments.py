"""Deployed models: start replicas, probe them, take them out of routing, restart them."""

import asyncio
import itertools
import os
from collections.abc import Callable
from contextlib import suppress

import aiohttp
from google.cloud.aiplatform_v1 import types as t
from google.protobuf.message import Message

from standin import limits
from standin.errors import ApiError
from standin.journal import Journal
from standin.leftovers import Ledger
from standin.replicas import runners
from standin.settings import Settings

NEVER_READY = (
    "Model server never became ready. Please validate that your model file or container "
    "configuration are valid. Model server logs can be found at {log}."
)
EXITED = "Model server exited unexpectedly. Model server logs can be found at {log}."
"""Both as Vertex AI words them, with a file where it has a link to Cloud Logging."""
SHORTEST = 0.1
"""However small the scale: probes cost processor time."""


class Deployment:
    """One deployed model and its replicas."""

    def __init__(
        self,
        serving: "Serving",
        endpoint: Message,
        deployed: Message,
        model: Message,
        image: str,
    ) -> None:
        self.serving, self.image = serving, image
        self.model, self.spec = model, model.container_spec
        self.id, self.endpoint_id = deployed.id, endpoint.name.rsplit("/", 1)[1]
        self.machine = deployed.dedicated_resources.machine_spec
        default = f"/v1/endpoints/{self.endpoint_id}/deployedModels/{self.id}"
        self.predict_route = self.spec.predict_route or f"{default}:predict"
        self.health_route = self.spec.health_route or default
        self.replicas: list[Watched] = []
        self._numbers, self._turn = itertools.count(), itertools.count()
        self.touch: Callable[..., None] = lambda: None

    def event(self, event: str, **details: object) -> None:
        self.serving.journal.event(event, deployed_model=self.id, **details)
        self.touch()

    async def resize(self, count: int) -> None:
        """Start or stop replicas until there are so many.

        Raises:
            ApiError: a replica did not become ready; none of the new ones is left.
        """
        gone = self.replicas[count:]
        new = [Watched(self, next(self._numbers)) for _ in range(count - len(self.replicas))]
        try:
            async with asyncio.TaskGroup() as group:
                for replica in new:
                    group.create_task(replica.bring_up(until_deadline=True))
        except BaseException as error:
            await asyncio.gather(*(replica.stop() for replica in new))
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        self.replicas = self.replicas[:count] + new
        for replica in new:
            replica.watch()
        await asyncio.gather(*(replica.stop() for replica in gone))

    def choose(self) -> "Watched | None":
        """The next healthy replica, in turn."""
        ready = [replica for replica in self.replicas if replica.ready]
        return ready[next(self._turn) % len(ready)] if ready else None

    def plan(self, number: int) -> runners.Plan:
        """What one replica is started with.

        Variables: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
        """
        port = self.spec.ports[0].container_port if self.spec.ports else 8080
        environment = {
            "AIP_HTTP_PORT": str(port),
            "AIP_HEALTH_ROUTE": self.health_route,
            "AIP_PREDICT_ROUTE": self.predict_route,
            "AIP_STORAGE_URI": self.model.artifact_uri,
            "AIP_MODE": "PREDICTION",
            "AIP_MODE_VERSION": "1.0.0",
            "AIP_FRAMEWORK": "CUSTOM_CONTAINER",
            "AIP_ENDPOINT_ID": self.endpoint_id,
            "AIP_DEPLOYED_MODEL_ID": self.id,
            "AIP_MODEL_NAME": self.endpoint_id,
            "AIP_VERSION_NAME": self.id,
            "AIP_PROJECT_NUMBER": self.serving.settings.number,
            "AIP_MACHINE_TYPE": self.machine.machine_type,
        }
        if self.machine.accelerator_type:
            kind = t.AcceleratorType(self.machine.accelerator_type).name
            environment["AIP_ACCELERATOR_TYPE"] = kind
        environment |= {variable.name: variable.value for variable in self.spec.env}
        name = f"standin-{os.getpid()}-{self.id}-{number}"  # two with one seed have the same IDs
        return runners.Plan(
            *(name, self.image, list(self.spec.command), list(self.spec.args), environment, port),
            shm_mb=self.spec.shared_memory_size_mb,
            log=self.serving.logs / f"{self.id}-{number}.log",
            ledger=self.serving.ledger,
            network=self.serving.network,
        )


class Watched:
    """One replica under the platform's eyes."""

    def __init__(self, deployment: Deployment, number: int) -> None:
        self.deployment, self.number = deployment, number
        self.settings = deployment.serving.settings
        self.replica = runners.make(self.settings.runner, deployment.plan(number))
        self.ready = False
        self._task: asyncio.Task | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.replica.port}"

    def event(self, event: str, **details: object) -> None:
        self.deployment.event(event, replica=self.number, **details)

    async def bring_up(self, *, until_deadline: bool) -> None:
        """Start, wait for the startup probe, then for the health route.

        Args:
            until_deadline: give up after the deployment's timeout, or some crashes.

        Raises:
            ApiError: it was given up.
        """
        spec, log = self.deployment.spec, self.replica.log
        seconds = spec.deployment_timeout.ToTimedelta().total_seconds()
        seconds = (seconds or limits.DEPLOYMENT_SECONDS) * self.settings.limit_scale
        try:
            async with asyncio.timeout(seconds if until_deadline else None):
                for crash in itertools.count(1):
                    await self.replica.start()
                    self.event("container started")
                    if await self._passes_probes():
                        break
                    self.event("container exited", code=self.replica.exit_code())
                    if until_deadline and crash == limits.CRASHES:
                        raise ApiError("FAILED_PRECONDITION", EXITED.format(log=log))
                    await asyncio.sleep(self._period(limits.PROBE_PERIOD))
                    await self.replica.stop()
        except TimeoutError as error:
            self.event("deployment timeout", seconds=seconds)
            raise ApiError("FAILED_PRECONDITION", NEVER_READY.format(log=log)) from error
        self.ready = True
        self.event("in routing")

    def watch(self) -> None:
        """Probe it from now on."""
        self._task = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        self.ready = False
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        await self.replica.stop()
        self.event("container stopped")

    async def _passes_probes(self) -> bool:
        """Whether it came up; False if it ended before."""
        probe = self.deployment.spec.startup_probe
        if command := list(probe.exec_.command):
            period = self._period(probe.period_seconds or limits.PROBE_PERIOD)
            timeout = probe.timeout_seconds or limits.STARTUP_TIMEOUT
            while not await self.replica.execute(command, timeout):
                if self.replica.exit_code() is not None:
                    return False
                await asyncio.sleep(period)
            self.event("startup probe passed")
        while not await self._healthy():
            if self.replica.exit_code() is not None:
                return False
            await asyncio.sleep(self._health_period())
        self.event("health check passed")
        return True

    async def _healthy(self) -> bool:
        probe = self.deployment.spec.health_probe
        timeout = probe.timeout_seconds or limits.HEALTH_TIMEOUT
        if command := list(probe.exec_.command):
            return await self.replica.execute(command, timeout)
        if not await self.replica.reachable():
            return False
        http, url = self.deployment.serving.http, self.url + self.deployment.health_route
        try:
            async with http.get(url, timeout=aiohttp.ClientTimeout(timeout)) as reply:
                return reply.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _watch(self) -> None:
        dead = sick = 0
        while True:
            await asyncio.sleep(self._health_period())
            dead = 0 if await self.replica.reachable() else dead + 1
            ended = self.replica.exit_code() is not None
            if ended or dead == limits.FAILURES:
                self.ready = False
                why = "container exited" if ended else "liveness check failed"
                self.event(why, **({"code": self.replica.exit_code()} if ended else {}))
                await self.replica.stop()
                await self.bring_up(until_deadline=False)
                dead = sick = 0
                continue
            sick = 0 if await self._healthy() else sick + 1
            if self.ready and sick == limits.FAILURES:
                self.ready = False
                self.event("out of routing")
            elif not self.ready and not sick:
                self.ready = True
                self.event("in routing")

    def _health_period(self) -> float:
        probe = self.deployment.spec.health_probe
        return self._period(probe.period_seconds or limits.PROBE_PERIOD)

    def _period(self, seconds: float) -> float:
        return max(seconds * self.settings.scale, SHORTEST)


class Serving:
    """All deployed models of one stand-in."""

    def __init__(self, settings: Settings, journal: Journal, ledger: Ledger) -> None:
        self.settings, self.journal, self.ledger = settings, journal, ledger
        self.logs = settings.folder / "logs"
        self.network = ""
        self._all: dict[str, Deployment] = {}

    async def start(self) -> None:
        """Open what deployments share."""
        self.logs.mkdir(exist_ok=True)
        self.http = aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)
        )
        if self.settings.runner == "docker":
            self.network = f"standin-{runners.label_of_this_process()}"
            label = f"{runners.LABEL}={runners.label_of_this_process()}"
            # No way out of it: a model server finds neither Google nor anything else.
            masquerade = "com.docker.network.bridge.enable_ip_masquerade=false"
            code, text = await runners.docker(
                *("network", "create", "--label", label, "--opt", masquerade, self.network)
            )
            if code != 0:
                raise RuntimeError(f"docker network create: {text}")

    async def stop(self) -> None:
        await asyncio.gather(*(self.undeploy(number) for number in list(self._all)))
        await self.http.close()
        if self.network:
            await runners.docker("network", "rm", self.network)

    async def deploy(
        self,
        endpoint: Message,
        deployed: Message,
        model: Message,
        image: str,
        touch: Callable[..., None],
    ) -> None:
        """Start a deployed model's replicas and return when all are in routing.

        Args:
            endpoint: where.
            deployed: what the client asked for.
            model: the model.
            image: what `Images.ingest` returned when it was uploaded.
            touch: called whenever something happened, with the deployment's stage if that changes.

        Raises:
            ApiError: a replica never became ready, or ended.
        """
        touch("GETTING_CONTAINER_IMAGE")
        if self.settings.runner == "docker":
            code, text = await runners.docker("pull", "--quiet", image)
            if code != 0:
                raise ApiError("FAILED_PRECONDITION", f"The image cannot be pulled: {text}")
            self.journal.event("image pulled", deployed_model=deployed.id, image=image)
        deployment = Deployment(self, endpoint, deployed, model, image)
        deployment.touch = touch
        touch("STARTING_MODEL_SERVER")
        await deployment.resize(deployed.dedicated_resources.min_replica_count)
        touch("FINISHING_UP")
        deployment.touch = lambda: None
        self._all[deployed.id] = deployment

    async def undeploy(self, number: str) -> None:
        """Stop a deployed model's replicas."""
        await self._all.pop(number).resize(0)

    async def resize(self, number: str, count: int) -> None:
        """Change the number of replicas."""
        await self._all[number].resize(count)

    def find(self, number: str) -> Deployment:
        return self._all[number]
