"""Deployed models: their replicas and the routing between these."""

import asyncio
import itertools
import os
from typing import Protocol

import aiohttp
from google.cloud.aiplatform_v1 import types as t

from standin.errors import ApiError
from standin.journal import Journal
from standin.replicas.leftovers import LABEL, Ledger, label_of_this_process
from standin.replicas.probes import Replica
from standin.replicas.runners import ReplicaSpec, docker
from standin.settings import StandinSettings

DEFAULT_PORT = 8080
"""https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements"""


class Touch(Protocol):
    """Updates a deployment's operation: its time, and its stage if there is one."""

    def __call__(self, stage: str = "") -> None: ...


def _ignore(stage: str = "") -> None:
    """Do nothing: the operation of a deployed model has ended."""


class Deployment:
    """One deployed model and its replicas."""

    def __init__(
        self,
        deployments: "Deployments",
        endpoint: t.Endpoint,
        deployed: t.DeployedModel,
        model: t.Model,
        image: str,
    ) -> None:
        self.deployments, self.image = deployments, image
        self.model, self.spec = model, model.container_spec
        self.id, self.endpoint_id = deployed.id, endpoint.name.rsplit("/", 1)[1]
        self.machine = deployed.dedicated_resources.machine_spec
        default = f"/v1/endpoints/{self.endpoint_id}/deployedModels/{self.id}"
        self.predict_route = self.spec.predict_route or f"{default}:predict"
        self.health_route = self.spec.health_route or default
        self.replicas: list[Replica] = []
        self._numbers, self._turn = itertools.count(), itertools.count()
        self.touch: Touch = _ignore

    def event(self, event: str, **details: object) -> None:
        self.deployments.journal.event(event, deployed_model=self.id, **details)
        self.touch()

    async def resize(self, count: int) -> None:
        """Start or stop replicas until there are `count`.

        Raises:
            ApiError: a replica did not become ready; all new replicas are stopped.
        """
        surplus = self.replicas[count:]
        new = [self._make_replica() for _ in range(count - len(self.replicas))]
        try:
            async with asyncio.TaskGroup() as group:
                for replica in new:
                    group.create_task(replica.start(until_deadline=True))
        except BaseException as error:
            await asyncio.gather(*(replica.stop() for replica in new))
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        self.replicas = self.replicas[:count] + new
        for replica in new:
            replica.start_probing()
        await asyncio.gather(*(replica.stop() for replica in surplus))

    def next_replica(self) -> Replica | None:
        """Return the next ready replica, in turn; None if no replica is ready."""
        ready = [replica for replica in self.replicas if replica.ready]
        return ready[next(self._turn) % len(ready)] if ready else None

    def _make_replica(self) -> Replica:
        number = next(self._numbers)
        return Replica(
            self._replica_spec(number),
            model=self.spec,
            health_route=self.health_route,
            settings=self.deployments.settings,
            http=self.deployments.http,
            event=lambda event, **details: self.event(event, replica=number, **details),
        )

    def _replica_spec(self, number: int) -> ReplicaSpec:
        """Describe what one replica runs.

        Variables: https://cloud.google.com/vertex-ai/docs/predictions/custom-container-requirements
        """
        port = self.spec.ports[0].container_port if self.spec.ports else DEFAULT_PORT
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
            "AIP_PROJECT_NUMBER": self.deployments.settings.project_number,
            "AIP_MACHINE_TYPE": self.machine.machine_type,
        }
        if self.machine.accelerator_type:
            kind = t.AcceleratorType(self.machine.accelerator_type).name
            environment["AIP_ACCELERATOR_TYPE"] = kind
        environment |= {variable.name: variable.value for variable in self.spec.env}
        return ReplicaSpec(
            # With the process ID: two stand-ins with the same seed have the same identifiers.
            name=f"standin-{os.getpid()}-{self.id}-{number}",
            image=self.image,
            command=list(self.spec.command),
            args=list(self.spec.args),
            environment=environment,
            port=port,
            shm_mb=self.spec.shared_memory_size_mb,
            log=self.deployments.logs / f"{self.id}-{number}.log",
            ledger=self.deployments.ledger,
            network=self.deployments.network,
        )


class Deployments:
    """All deployed models of one stand-in."""

    def __init__(self, settings: StandinSettings, journal: Journal, ledger: Ledger) -> None:
        self.settings, self.journal, self.ledger = settings, journal, ledger
        self.logs = settings.folder / "logs"
        self.network = ""
        self._all: dict[str, Deployment] = {}

    async def start(self) -> None:
        """Create what all deployed models share: an HTTP client and a container network."""
        self.logs.mkdir(exist_ok=True)
        self.http = aiohttp.ClientSession(
            auto_decompress=False, connector=aiohttp.TCPConnector(limit=0)
        )
        if self.settings.runner == "docker":
            self.network = f"standin-{label_of_this_process()}"
            code, text = await docker(
                "network",
                "create",
                "--label",
                f"{LABEL}={label_of_this_process()}",
                # Without masquerading containers reach nothing outside this network.
                "--opt",
                "com.docker.network.bridge.enable_ip_masquerade=false",
                self.network,
            )
            if code != 0:
                raise RuntimeError(f"docker network create: {text}")

    async def stop(self) -> None:
        await asyncio.gather(*(self.undeploy(deployed_id) for deployed_id in list(self._all)))
        await self.http.close()
        if self.network:
            await docker("network", "rm", self.network)

    async def deploy(
        self,
        endpoint: t.Endpoint,
        deployed: t.DeployedModel,
        model: t.Model,
        image: str,
        touch: Touch,
    ) -> None:
        """Start a deployed model's replicas and return when all are in routing.

        Args:
            endpoint: the endpoint to deploy at.
            deployed: the deployed model of the request.
            model: the model.
            image: what `Images.ingest` returned when the model was uploaded.
            touch: called at every event until this returns.

        Raises:
            ApiError: a replica never became ready, or its model server exited.
        """
        touch("GETTING_CONTAINER_IMAGE")
        if self.settings.runner == "docker":
            code, text = await docker("pull", "--quiet", image)
            if code != 0:
                raise ApiError("FAILED_PRECONDITION", f"The image cannot be pulled: {text}")
            self.journal.event("image pulled", deployed_model=deployed.id, image=image)
        deployment = Deployment(self, endpoint, deployed, model, image)
        deployment.touch = touch
        touch("STARTING_MODEL_SERVER")
        await deployment.resize(deployed.dedicated_resources.min_replica_count)
        touch("FINISHING_UP")
        deployment.touch = _ignore
        self._all[deployed.id] = deployment

    async def undeploy(self, deployed_id: str) -> None:
        """Stop a deployed model's replicas."""
        await self._all.pop(deployed_id).resize(0)

    async def resize(self, deployed_id: str, count: int) -> None:
        """Change a deployed model's number of replicas."""
        await self._all[deployed_id].resize(count)

    def find(self, deployed_id: str) -> Deployment:
        return self._all[deployed_id]
