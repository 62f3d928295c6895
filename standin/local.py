"""Start and stop the local Vertex AI from Python.

    from standin.local import Standin

    with Standin(scale=0.01, limit_scale=0.1) as standin:
        aiplatform.init(project=standin.project, location=standin.region)   # code unchanged

It runs in another process. Start it before the SDK's first call: gRPC reads the certificates when
it opens its first connection.
"""

import atexit
import contextlib
import functools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import trustme

from deploy.common.paths import ROOT, UserError
from deploy.common.waiting import wait_until
from deploy.image.runtime import container_runtime
from standin import journal
from standin.settings import PROJECT_NUMBER, READY, write_private

START_SECONDS = 120.0
STOP_SECONDS = 60.0
"""For a busy machine; usually it takes one or two seconds."""
ARCHITECTURES = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
"""Of this machine -> as images name it."""


class Standin:
    """One stand-in, and the environment variables that direct clients to it.

    Args:
        scale: factor for the platform's own durations and probe periods.
        limit_scale: factor for time limits of requests (60 s, 600 s) and of deployments. Models run
            at real speed, so the default is `scale`, but at least 0.1.
        seed: of identifiers and of the choice between models that share traffic.
        runner: "docker" or "process"; None for "docker" if Docker and docker-registry are
            installed.
        project: the project's ID.
        region: the region in the environment variables.
        folder: where keys, logs and journals go; None for a temporary folder, removed at the end.
        port: the proxy's port; 0 for any free one.
    """

    def __init__(
        self,
        scale: float = 0.01,
        seed: int = 0,
        runner: str | None = None,
        *,
        limit_scale: float | None = None,
        project: str = "standin-project",
        region: str = "europe-west4",
        folder: Path | None = None,
        port: int = 0,
    ) -> None:
        self.scale, self.seed = scale, seed
        self.limit_scale = max(scale, 0.1) if limit_scale is None else limit_scale
        self.project, self.region, self.project_number = project, region, PROJECT_NUMBER
        self.environment: dict[str, str] = {}
        self.runner = choose_runner(runner)
        self._given, self._port = folder, port
        self._process: subprocess.Popen[bytes] | None = None
        self._before: dict[str, str | None] = {}

    def start(self) -> "Standin":
        """Start the stand-in and set this process's environment variables.

        Raises:
            UserError: it did not start; the message has its output.
        """
        given = self._given
        self.folder = Path(given or tempfile.mkdtemp(prefix="standin-")).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        (self.folder / READY).unlink(missing_ok=True)
        options = {
            "scale": self.scale,
            "limit_scale": self.limit_scale,
            "seed": self.seed,
            "runner": self.runner,
            "project": self.project,
            "region": self.region,
        }
        command = [sys.executable, "-m", "standin.program", json.dumps(options)]
        command += [str(self.folder), "keep" if given else "remove", str(self._port)]
        for name, pem in zip(("ca.pem", "ca.key"), _authority(), strict=True):
            write_private(self.folder / name, pem)
        log = self.folder / "standin.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,  # closed when this process ends, even if it is killed
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.stop)
        process, ready = self._process, self.folder / READY
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: ready.exists() or process.poll() is not None, START_SECONDS, 0.02)
        if not ready.exists():
            text = log.read_text(errors="replace")
            self.stop()
            raise UserError(f"the stand-in did not start:\n{text}")
        self._set_environment(json.loads(ready.read_text()))
        return self

    def stop(self) -> None:
        """Stop the stand-in and all its replicas; restore the environment. Safe to call twice."""
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before = {}
        if self._process is not None:
            self._process.terminate()
            if self._process.stdin:
                self._process.stdin.close()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        atexit.unregister(self.stop)

    def calls(self) -> list[dict[str, Any]]:
        """Return all requests so far, oldest first.

        Keys: time, transport ("rest" or "grpc"), method, path, status, host, seconds.
        """
        return journal.read(self.folder, "calls")

    def events(self) -> list[dict[str, Any]]:
        """Return the platform's events, oldest first: time, event, and the resource or replica."""
        return journal.read(self.folder, "events")

    def logs(self, deployed_model: str) -> str:
        """Return the output of a deployed model's containers."""
        files = sorted((self.folder / "logs").glob(f"{deployed_model}-*.log"))
        return "\n".join(path.read_text(errors="replace") for path in files)

    def add_image(self, name: str) -> str:
        """Add an image for models that have a command; without Docker only.

        Returns:
            The image's address in Artifact Registry.
        """
        with (self.folder / "images.txt").open("a") as file:
            file.write(f"{name}\n")
        return f"{self.region}-docker.pkg.dev/{self.project}/serving/{name}:latest"

    def wait(self) -> int:
        """Wait until the stand-in ends by itself; return its exit code."""
        if self._process is None:
            raise UserError("the stand-in is not running; call `start()` first")
        return self._process.wait()

    @property
    def pid(self) -> int | None:
        """Process ID of the stand-in; None if it is not running."""
        return self._process.pid if self._process else None

    def __enter__(self) -> "Standin":
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _set_environment(self, ports: dict[str, Any]) -> None:
        self.environment = environment(self, ports)
        for name, value in self.environment.items():
            self._before[name] = os.environ.get(name)
            os.environ[name] = value


@functools.cache
def _authority() -> tuple[str, str]:
    """Make a temporary certificate authority, the same for all stand-ins of one process.

    gRPC reads its trusted certificates once, and a notebook may start a second stand-in.
    """
    authority = trustme.CA()
    return authority.cert_pem.bytes().decode(), authority.private_key_pem.bytes().decode()


def environment(standin: Standin, ports: dict[str, Any]) -> dict[str, str]:
    """Return the variables that direct the SDK, gcloud, curl and Docker to a stand-in."""
    folder, port = standin.folder, ports["proxy"]
    proxy, authority = f"http://127.0.0.1:{port}", str(folder / "ca.pem")
    local = "127.0.0.1,localhost,::1"
    result = dict.fromkeys(("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"), proxy)
    result |= dict.fromkeys(("NO_PROXY", "no_proxy"), local)
    result |= dict.fromkeys(
        (
            "REQUESTS_CA_BUNDLE",
            "CURL_CA_BUNDLE",
            "SSL_CERT_FILE",
            "GRPC_DEFAULT_SSL_ROOTS_FILE_PATH",
            "CLOUDSDK_CORE_CUSTOM_CA_CERTS_FILE",
        ),
        authority,
    )
    result |= {
        "GOOGLE_APPLICATION_CREDENTIALS": str(folder / "admin.json"),
        "GOOGLE_CLOUD_PROJECT": standin.project,
        "GCP_PROJECT": standin.project,
        "GCP_REGION": standin.region,
        "NO_GCE_CHECK": "true",
        "CLOUDSDK_CONFIG": str(folder / "gcloud"),
        "CLOUDSDK_CORE_PROJECT": standin.project,
        "CLOUDSDK_AI_REGION": standin.region,
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "1",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "1",
        "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(folder / "token"),
        "CLOUDSDK_PROXY_TYPE": "http",
        "CLOUDSDK_PROXY_ADDRESS": "127.0.0.1",
        "CLOUDSDK_PROXY_PORT": str(port),
        "MACHINE_ARCHITECTURE": ARCHITECTURES.get(platform.machine().lower(), "amd64"),
        "VERTEX_STANDIN": str(folder),
    }
    if "registry" in ports:
        result["PUSH_REGISTRY"] = ports["registry"]
    else:  # the archives in model_store are the images
        result["PUSH_IMAGES"] = "false"
    return result


def choose_runner(wanted: str | None) -> str:
    """Choose "docker" if Docker and docker-registry are installed, else "process".

    Args:
        wanted: "docker" or "process" to require it; None to choose.

    Raises:
        UserError: Docker is required and not available.
    """
    if wanted == "process":
        return wanted
    try:
        container_runtime()
        if not shutil.which("docker-registry"):
            raise UserError(
                "docker-registry is not installed (Debian: apt install docker-registry)"
            )
    except UserError as error:
        if wanted == "docker":
            raise
        print(f"models run as processes: {error}", file=sys.stderr)
        return "process"
    return "docker"
