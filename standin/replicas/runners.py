"""One copy of a model server: a container, a plain process, or this repository's TorchServe.

All three answer the same questions, so `serving.py` does not know which one it has.
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

from deploy.image.runtime import container_runtime
from deploy.torchserve.server import Server, ServerError
from standin.leftovers import LABEL, Ledger, label_of_this_process
from standin.limits import SHM_MB
from standin.replicas.images import archive_of, can_connect, free_port

HARDENED = ["--security-opt", "no-new-privileges", "--pids-limit", "512"]
"""Of `deploy.image.run.HARDENED` what changes nothing for an image that runs on Vertex AI, where
the file system can be written and the user is the image's."""
GRACE = 10.0


@dataclass
class Plan:
    """What to start.

    Args:
        name: of this replica, unique.
        image: what `Images.ingest` returned.
        command: instead of the image's entry point.
        args: instead of the image's arguments.
        environment: the platform's variables and the model's.
        port: where the server listens, inside.
        shm_mb: size of /dev/shm.
        log: where its output goes.
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
        """Environment, command and arguments with $(NAME) replaced, as Kubernetes does.

        https://kubernetes.io/docs/tasks/inject-data-application/define-interdependent-environment-variables
        """
        done: dict[str, str] = {}
        for name, value in self.environment.items():  # a variable sees the ones before it
            done[name] = expand(value, done)
        return done, *([expand(part, done) for part in x] for x in (self.command, self.args))


def expand(text: str, environment: dict[str, str]) -> str:
    """Replace $(NAME) where NAME is known; $$ is a dollar sign."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda match: "$" if match[0] == "$$" else environment.get(match[1], match[0]),
        text,
    )


class Container:
    """A container, published on a free port of loopback."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.log, self.port = plan, plan.log, 0
        self._follower: subprocess.Popen | None = None
        self._waiter: subprocess.Popen | None = None
        self._code: int | None = None

    async def start(self) -> None:
        self._code = self._waiter = self._follower = None
        environment, command, args = self.plan.expanded()
        options = [*HARDENED, "--name", self.plan.name, "--network", self.plan.network]
        options += ["--label", f"{LABEL}={label_of_this_process()}"]
        options += ["--publish", f"127.0.0.1::{self.plan.port}"]
        options += ["--shm-size", f"{self.plan.shm_mb or SHM_MB}m"]
        for name, value in environment.items():
            options += ["--env", f"{name}={value}"]
        if command:
            options += ["--entrypoint", command[0]]
        await docker("rm", "--force", self.plan.name)
        code, text = await docker("run", "--detach", *options, self.plan.image, *command[1:], *args)
        with self.log.open("ab") as log:
            if code != 0:  # such as an entry point that is not in the image
                log.write(text.encode())
                self._code = 127
                return
            self._follower = subprocess.Popen(
                [container_runtime(), "logs", "--follow", self.plan.name], stdout=log, stderr=log
            )
        self._waiter = subprocess.Popen(
            [container_runtime(), "wait", self.plan.name], stdout=subprocess.PIPE, text=True
        )
        _, text = await docker("port", self.plan.name, str(self.plan.port))
        match = re.search(r"127\.0\.0\.1:(\d+)", text)  # none if it has ended already
        self.port = int(match[1]) if match else 0

    def exit_code(self) -> int | None:
        """How the container ended; None while it runs."""
        if self._code is None and self._waiter is not None and self._waiter.poll() is not None:
            text = self._waiter.stdout.read().strip()
            self._code = int(text) if text.isdecimal() else 1
        return self._code

    async def reachable(self) -> bool:
        """Whether the server inside takes connections. Docker's own proxy always does, and hangs
        up at once if nobody inside listens where it can reach him.
        """
        if not self.port:
            return False
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        try:
            async with asyncio.timeout(0.05):
                return bool(await reader.read(1))
        except TimeoutError:
            return True
        except OSError:
            return False
        finally:
            writer.close()

    async def execute(self, command: Sequence[str], timeout: float) -> bool:
        code, _ = await docker("exec", self.plan.name, *command, timeout=timeout)
        return code == 0

    async def stop(self) -> None:
        await docker("stop", "--time", str(int(GRACE)), self.plan.name)
        await docker("rm", "--force", self.plan.name)
        for helper in (self._follower, self._waiter):
            if helper is not None:
                helper.kill()
                helper.wait()


class Process:
    """A model's own command, without Docker.

    AIP_HTTP_PORT is a free port: a server that listens elsewhere is not found, as on Vertex AI. One
    that listens on 127.0.0.1 alone counts as unreachable too: the operating system tells.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.log = plan, plan.log
        self.process: subprocess.Popen | None = None
        self.port = 0

    async def start(self) -> None:
        self.port = free_port()
        self.plan.environment["AIP_HTTP_PORT"] = str(self.port)
        environment, command, args = self.plan.expanded()
        folder = self.log.parent
        path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '/usr/bin:/bin')}"
        base = {"PATH": path, "HOME": str(folder), "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
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
        self.plan.ledger.add(self.process.pid)

    def exit_code(self) -> int | None:
        return 127 if self.process is None else self.process.poll()

    async def reachable(self) -> bool:
        return self.exit_code() is None and await asyncio.to_thread(self._listens)

    def _listens(self) -> bool:
        with suppress(psutil.Error):
            main = psutil.Process(self.process.pid)
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
        environment, _, _ = self.plan.expanded()
        code, _ = await run(command, timeout=timeout, environment=os.environ | environment)
        return code == 0

    async def stop(self) -> None:
        if self.process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            await asyncio.to_thread(self.process.wait, GRACE)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class TorchServe:
    """The app's archive in this repository's own TorchServe, without Docker."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.log = plan, plan.log
        self._server: Server | None = None
        self._starting: asyncio.Task | None = None
        self.port = 0

    async def start(self) -> None:
        self.port = _five_free_ports()
        environment, _, _ = self.plan.expanded()
        self._server = Server(
            archive_of(self.plan.image),
            port=self.port,
            environment=environment | {"AIP_HTTP_PORT": str(self.port)},
        )
        self._server.log = self.log
        self._starting = asyncio.create_task(asyncio.to_thread(self._server.start))
        while not self._server.started and not self._starting.done():
            await asyncio.sleep(0.05)
        if self._server.started:
            self.plan.ledger.add(self._server.process.pid)

    def exit_code(self) -> int | None:
        if self._starting.done() and self._starting.exception() is not None:
            return 1
        return self._server.process.poll() if self._server.started else None

    async def reachable(self) -> bool:
        return await asyncio.to_thread(can_connect, self.port)

    async def execute(self, command: Sequence[str], timeout: float) -> bool:
        """The image's probe, /opt/serving/ready, asks what `Server.ready` asks."""
        return await asyncio.to_thread(self._server.ready)

    async def stop(self) -> None:
        await asyncio.to_thread(self._server.stop)
        with suppress(ServerError, AttributeError):
            await self._starting


Replica = Container | Process | TorchServe


def make(runner: str, plan: Plan) -> Replica:
    """The replica for a plan. runner: "docker" or "process"."""
    if runner == "docker":
        return Container(plan)
    return Process(plan) if plan.command else TorchServe(plan)


async def docker(*arguments: str, timeout: float | None = None) -> tuple[int, str]:
    """Run the container engine; return its code and what it wrote."""
    return await run([container_runtime(), *arguments], timeout=timeout)


async def run(
    command: Sequence[str],
    *,
    timeout: float | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[int, str]:
    """Run a command; return its code and what it wrote. A time-out is code 124."""
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
            return 124, ""
        raise
    return process.returncode, output.decode(errors="replace")


def _five_free_ports() -> int:
    while True:
        port = free_port()
        if port < 65_000 and not any(can_connect(port + i) for i in range(5)):
            return port
