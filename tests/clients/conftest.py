"""Clients of other projects, and three servers for them: bare, in a container, on the stand-in.

A client that cannot be had here (no registry, no Node, no Chromium) is skipped with the reason.
Ports start at 7300; the container has a name that no other test uses.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.archive.build import build_archive
from deploy.common.paths import UserError
from deploy.image.build import build_image
from deploy.image.run import HARDENED, wait_until_ready
from deploy.image.runtime import container_runtime
from deploy.torchserve.server import Server
from deploy.vertex import operations
from deploy.vertex.config import VertexSettings, load_settings
from deploy.vertex.credentials import access_token
from deploy.vertex.deployer import Deployer
from standin.local import Standin
from tests.clients.environment import (
    SCRIPTS,
    OutOfReach,
    browser,
    node_clients,
    python_clients,
    run_script,
)

APP = "smollm2-135m"
BARE, TRANSFORMERS, CONTAINER, PAGE, TINY = 7300, 7310, 7320, 7330, 7340
"""Ports: of the servers (each takes the second one after it, too), and of the browser's page."""

MESSAGES = [{"role": "user", "content": "What is the capital of Japan?"}]
PROMPT = "The capital of Japan is"
GREEDY = {"max_tokens": 6, "temperature": 0}
"""Short, because the int8 engine rounds a little differently in every batch shape (LOG.md)."""

ORIGIN = f"http://127.0.0.1:{PAGE}"


@dataclass(frozen=True)
class Target:
    """A server as a client sees it."""

    name: str
    base_url: str
    """What OpenAI's clients take; it ends in `/v1`."""
    predict_url: str = ""
    key: str = "none"
    gets: bool = True
    """Whether GET reaches the server: Vertex AI's `invoke` passes only POST on."""

    def given(self, **more: Any) -> dict[str, Any]:
        """What the scripts read."""
        return {
            "base_url": self.base_url,
            "key": self.key,
            "model": APP,
            "messages": MESSAGES,
            "prompt": PROMPT,
            "greedy": GREEDY,
            "gets": self.gets,
            "proxied": not self.gets,
            **more,
        }


Run = Callable[[str, Any], Any]
"""Runs a script, by its name, with its input; returns its output."""


@pytest.fixture(scope="session")
def run_python() -> Run:
    """Run a script of scripts/ with the Python clients."""
    try:
        python = python_clients()
    except OutOfReach as reason:
        pytest.skip(f"no clients: {reason}")

    return lambda name, given: run_script([python, SCRIPTS / f"{name}.py"], given)


@pytest.fixture(scope="session")
def run_node() -> Run:
    """Run a script of scripts/ with the JavaScript clients."""
    try:
        folder = node_clients()
    except OutOfReach as reason:
        pytest.skip(f"no clients: {reason}")

    def run(name: str, given: Any) -> Any:
        # The stand-in's variable, and the one that Node reads.
        authority = os.environ.get("SSL_CERT_FILE")
        more = {"NODE_EXTRA_CA_CERTS": authority} if authority else {}
        return run_script(["node", folder / f"{name}.mjs"], given, more)

    return run


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Chromium."""
    try:
        return browser()
    except OutOfReach as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="session")
def archive(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app's archive with the engine chosen for a CPU."""
    return build_archive(APP, smollm2, store=tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def bare_server(archive: Path) -> Iterator[Server]:
    """The app without Docker. Pages of `ORIGIN` may use it."""
    with Server(archive, port=BARE, environment={"CORS_ORIGIN": ORIGIN}) as server:
        yield server


@pytest.fixture(scope="session")
def transformers_server(
    smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The app with the transformers engine."""
    store = tmp_path_factory.mktemp("store")
    archive = build_archive(APP, smollm2, engine={"name": "transformers"}, store=store)
    with Server(archive, port=TRANSFORMERS) as server:
        yield server


def openai_url(server: Server) -> str:
    """The `base_url` of a server for OpenAI's clients."""
    return f"{server.url}/1.0/v1"


@pytest.fixture(scope="session")
def bare(bare_server: Server) -> Target:
    return Target("bare", openai_url(bare_server), bare_server.url)


@pytest.fixture(scope="session")
def expected(bare: Target) -> dict[str, Any]:
    """The completions and token counts of the same requests in Vertex AI's shape."""
    parameters = {"max_new_tokens": GREEDY["max_tokens"], "temperature": 0}
    parameters["return_full_text"] = False
    found: dict[str, Any] = {}
    for name, instance in (("chat", {"messages": MESSAGES}), ("text", PROMPT)):
        body = {"instances": [instance], "parameters": parameters}
        response = httpx.post(bare.predict_url, json=body, timeout=60).raise_for_status()
        (found[name],) = response.json()["predictions"]
        counts = (response.headers[f"x-{kind}-tokens"] for kind in ("prompt", "completion"))
        found[f"{name}_tokens"] = [int(count) for count in counts]
    return found


@pytest.fixture(scope="session")
def container(smollm2: Path) -> Iterator[Target]:
    """The lean image as `make run` starts it, under another name.

    CI sets REQUIRE_DOCKER=1, which makes a missing container runtime a failure.
    """
    try:
        program = container_runtime()
    except UserError as error:
        if os.environ.get("REQUIRE_DOCKER"):
            raise
        pytest.skip(f"no container runtime: {error}")
    image = build_image(APP, smollm2, tag="clients-test", target="cpu-lean")
    name = f"serving-llms-clients-{os.getpid()}"
    command = [program, "run", "--detach", "--name", name, *HARDENED, "--memory", "3g"]
    command += ["--publish", f"127.0.0.1:{CONTAINER}:7080"]
    command += ["--env", f"CORS_ORIGIN={ORIGIN}", image]
    try:
        subprocess.run(command, check=True, capture_output=True)
        wait_until_ready(program, name)
        url = f"http://127.0.0.1:{CONTAINER}/predictions/{APP}"
        yield Target("container", f"{url}/1.0/v1", url)
    finally:
        subprocess.run([program, "rm", "--force", name], capture_output=True)


def _forwarder(port: int) -> list[str]:
    """The command of a model on the stand-in whose requests go to a server on this machine."""
    return [sys.executable, str(Path(__file__).parent / "forward.py"), str(port)]


@dataclass(frozen=True)
class Platform:
    """The stand-in for Vertex AI, with three endpoints that one server answers."""

    standin: Standin
    endpoints: dict[str, str]
    """Full names: `invoke` and `predict`, which are dedicated, and `shared`."""


@pytest.fixture(scope="session")
def platform(bare_server: Server) -> Iterator[Platform]:
    """The stand-in. Its models pass requests on to the bare server."""
    for install in (python_clients, node_clients):
        with suppress(OutOfReach):
            install()  # now: from here on all programs are directed to the stand-in
    kinds: dict[str, dict[str, Any]] = {
        "invoke": {"invoke_route_prefix": "/*", "predict_route": None},
        "predict": {},
        "shared": {"dedicated": False, "inference_timeout": None},
    }
    ready: dict[str, Any] = {
        "command": _forwarder(BARE),
        "health_route": "/ping",
        "startup_probe": [],
    }
    ready |= {"predict_route": f"/predictions/{APP}", "max_replicas": 1}
    endpoints = {}
    with Standin(scale=0.0005, limit_scale=1.0, runner="process") as standin:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(operations, "FIRST_POLL", 0.02)
            patch.setattr(operations, "LONGEST_POLL", 0.2)
            for kind, given in kinds.items():
                app = f"clients-{kind}"
                standin.add_image(app)
                settings = VertexSettings(**load_settings(**ready).model_dump() | given)
                Deployer(settings, app, print).deploy(settings.image_uri(app, "1"))
                endpoints[kind] = settings.endpoint_name(app)
        yield Platform(standin, endpoints)


@pytest.fixture(scope="session")
def standin(platform: Platform) -> Target:
    """Vertex AI's `invoke`, which passes any path on."""
    from google.cloud import aiplatform

    aiplatform.init(project=platform.standin.project, location=platform.standin.region)
    name = platform.endpoints["invoke"]
    host = aiplatform.Endpoint(name).gca_resource.dedicated_endpoint_dns
    url = f"https://{host}/v1/{name}/invoke/predictions/{APP}"
    return Target("standin", f"{url}/1.0/v1", url, key=access_token(), gets=False)
