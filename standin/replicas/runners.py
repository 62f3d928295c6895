"""Runners of one model server: a container, a process, or this repository's TorchServe.

All three have the same methods, so `probes` does not depend on the kind.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.common.ports import can_connect, free_port
from deploy.image.runtime import container_runtime
from deploy.torchserve.server import Server, ServerError
from standin.limits import SHM_MB
from standin.replicas.images import archive_of
from standin.replicas.leftovers import LABEL, Ledger, label_of_this_process

HARDENED = ["--security-opt", "no-new-privileges", "--pids-limit", "512"]
"""A part of `deploy.image.run.HARDENED`: on Vertex AI the file system is writable and the user is
the image's."""
GRACE_SECONDS = 10.0
"""Between SIGTERM and SIGKILL, as `docker stop` has it."""
HANG_UP_SECONDS = 0.05
"""How long Docker's proxy takes to close a connection that it cannot pass on."""
TIMED_OUT = 124
"""Exit code for a command that took too long, as of coreutils' `timeout`."""
CANNOT_START = 127
"""Exit code for a command that cannot be started, as of a shell."""


@dataclass
class ReplicaSpec:
    """What a runner starts.

    Args:
        name: of this replica, unique.
        image: what `Images.ingest` returned.
        command: instead of the image's entry point.
        args: instead of the image's arguments.
        environment: the platform's variables and the model's.
        port: the server's port inside the container.
        shm_mb: size of /dev/shm; 0 for the platform's default.
        log: file for the server's output.
        ledger: list of started processes.
        network: the container network.
    """

    name: str
    image: str
    command: Sequence[str]
    args: Sequence[str]
    environment: dict[str, str]
    port: int
    shm_mb: int
    log: Path
    ledger: Ledger
    network: str = ""

    def expanded(self) -> tuple[dict[str, str], list[str], list[str]]:
        """Return environment, command and arguments with $(NAME) replaced, as in Kubernetes.

        https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables
        """
        done: dict[str, str] = {}
        for name, value in self.environment.items():  # a variable can use those before it
            done[name] = expand(value, done)
        command, args = ([expand(part, done) for part in x] for x in (self.command, self.args))
        return done, command, args


def expand(text: str, environment: dict[str, str]) -> str:
    """Replace $(NAME) if NAME is known, and $$ with a dollar sign."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda match: "$" if match[0] == "$$" else environment.get(match[1], match[0]),
        text,
    )


class Container:
    """A container, published on a free port of loopback."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec, self.port = spec, 0
        self._follower: subprocess.Popen[bytes] | None = None
        self._waiter: subprocess.Popen[bytes] | None = None
        self._code: int | None = None

    async def start(self) -> None:
        self._code = self._waiter = self._follower = None
        environment, command, args = self.spec.expanded()
        options = [*HARDENED, "--name", self.spec.name, "--network", self.spec.network]
        options += ["--label", f"{LABEL}={label_of_this_process()}"]
        options += ["--publish", f"127.0.0.1::{self.spec.port}"]
        options += ["--no-healthcheck"]  # Vertex AI has its own probes, and ignores the image's
        options += ["--shm-size", f"{self.spec.shm_mb or SHM_MB}m"]
        for name, value in environment.items():
            options += ["--env", f"{name}={value}"]
        if command:
            options += ["--entrypoint", command[0]]
        await docker("rm", "--force", self.spec.name)
        code, text = await docker("run", "--detach", *options, self.spec.image, *command[1:], *args)
        with self.spec.log.open("ab") as log:
            if code != 0:  # for example because the image has no such entry point
                log.write(text.encode())
                self._code = CANNOT_START
                return
            self._follower = subprocess.Popen(
                [container_runtime(), "logs", "--follow", self.spec.name], stdout=log, stderr=log
            )
        self._waiter = subprocess.Popen(
            [container_runtime(), "wait", self.spec.name], stdout=subprocess.PIPE
        )
        _, text = await docker("port", self.spec.name, str(self.spec.port))
        match = re.search(
            r"127\.0\.0\.1:(\d+)", text
        )  # no match if the container has already exited
        self.port = int(match[1]) if match else 0

    def exit_code(self) -> int | None:
        """Return the container's exit code; None while it runs."""
        if self._code is None and self._waiter is not None and self._waiter.poll() is not None:
            text, _ = self._waiter.communicate()
            self._code = int(text) if text.strip().isdigit() else 1
        return self._code

    async def reachable(self) -> bool:
        """Return whether the server inside the container accepts connections.

        Docker's proxy always accepts them and closes them at once if no server is reachable inside.
        """
        if not self.port:
            return False
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            async with asyncio.timeout(HANG_UP_SECONDS):
                return bool(await reader.read(1))
        except TimeoutError:
            return True
        except OSError:
            return False
        finally:
            writer.close()

    async def execute(self, command: Sequence[str], timeout: float) -> bool:
        code, _ = await docker("exec", self.spec.name, *command, timeout=timeout)
        return code == 0

    async def stop(self) -> None:
        await docker("stop", "--time", str(int(GRACE_SECONDS)), self.spec.name)
        await docker("rm", "--force", self.spec.name)
        for helper in (self._follower, self._waiter):
            if helper is not None:
                helper.kill()
                helper.wait()


class Process:
    """A model's own command, without Docker.

    AIP_HTTP_PORT is a free port: a server on another port is not found, as on Vertex AI. A server
    that listens on 127.0.0.1 only counts as unreachable too, as it is in a container.
    """

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0

    async def start(self) -> None:
        self.port = free_port()
        self.spec.environment["AIP_HTTP_PORT"] = str(self.port)
        environment, command, args = self.spec.expanded()
        folder = self.spec.log.parent
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        base = {"PATH": path, "HOME": str(folder), "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
        with self.spec.log.open("ab") as log:
            try:
                self.process = subprocess.Popen(
                    [*command, *args],
                    env=base | environment,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                log.write(f"{command[0]}: {error.strerror}\n".encode())
                self.process = None
                return
        self.spec.ledger.add(self.process.pid)

    def exit_code(self) -> int | None:
        return CANNOT_START if self.process is None else self.process.poll()

    async def reachable(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            return False
        return await asyncio.to_thread(self._listens, self.process.pid)

    def _listens(self, pid: int) -> bool:
        with suppress(psutil.Error):
            main = psutil.Process(pid)
            for process in (main, *main.children(recursive=True)):
                for connection in process.net_connections("tcp"):
                    if (
                        connection.status == psutil.CONN_LISTEN
                        and connection.laddr.port == self.port
                        and not connection.laddr.ip.startswith(("127.", "::1"))
                    ):
                        return True
        return False

    async def execute(self, command: Sequence[str], timeout: float) -> bool:
        environment, _, _ = self.spec.expanded()
        code, _ = await run(command, timeout=timeout, environment=os.environ | environment)
        return code == 0

    async def stop(self) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, GRACE_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class TorchServe:
    """The archive of an app in this repository's own TorchServe, without Docker."""

    def __init__(self, spec: ReplicaSpec) -> None:
        self.spec = spec
        self._server: Server | None = None
        self._starting: asyncio.Task[Server] | None = None
        self.port = 0

    async def start(self) -> None:
        archive = archive_of(self.spec.image)
        if archive is None:
            raise ServerError(f"{self.spec.image}: the archive was removed; run `make archive`")
        self.port = _free_server_port()
        environment, _, _ = self.spec.expanded()
        self._server = Server(
            archive,
            port=self.port,
            environment=environment | {"AIP_HTTP_PORT": str(self.port)},
        )
        self._server.log = self.spec.log
        self._starting = asyncio.create_task(asyncio.to_thread(self._server.start))
        while not self._server.started and not self._starting.done():
            await asyncio.sleep(0.05)
        if self._server.started:
            self.spec.ledger.add(self._server.process.pid)

    def exit_code(self) -> int | None:
        if self._starting and self._starting.done() and self._starting.exception() is not None:
            return 1
        return self._server.process.poll() if self._server and self._server.started else None

    async def reachable(self) -> bool:
        return await asyncio.to_thread(can_connect, self.port)

    async def execute(self, command: Sequence[str], timeout: float) -> bool:
        """Ask what the image's probe, /opt/serving/ready, asks: whether a worker is ready."""
        return self._server is not None and await asyncio.to_thread(self._server.ready)

    async def stop(self) -> None:
        if self._server is None or self._starting is None:
            return
        await asyncio.to_thread(self._server.stop)
        with suppress(ServerError, AttributeError):
            await self._starting


Runner = Container | Process | TorchServe


def make(kind: str, spec: ReplicaSpec) -> Runner:
    """Make the runner for a replica. kind: "docker" or "process"."""
    if kind == "docker":
        return Container(spec)
    return Process(spec) if spec.command else TorchServe(spec)


async def docker(*arguments: str, timeout: float | None = None) -> tuple[int, str]:
    """Run the container runtime; return its exit code and output."""
    return await run([container_runtime(), *arguments], timeout=timeout)


async def run(
    command: Sequence[str],
    *,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a command; return its exit code and output. After `timeout` the code is `TIMED_OUT`."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(timeout):
            output, _ = await process.communicate()
    except BaseException as error:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(error, TimeoutError):
            return TIMED_OUT, ""
        raise
    return await process.wait(), output.decode(errors="replace")


def _free_server_port() -> int:
    """Return a port that a `Server` can use: it and the one for metrics are free."""
    while True:
        port = free_port()
        if port < 65_000 and not any(map(can_connect, Server(Path(), port=port).ports)):
            return port
