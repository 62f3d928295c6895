"""Where images come from: a registry on loopback, or the apps of this repository without Docker.

Imitated: an image must be in Artifact Registry, and it is looked at when the model is uploaded, so
a tag that moves later changes nothing. On the stand-in `REGION-docker.pkg.dev/P/R/NAME:TAG` is
`127.0.0.1:PORT/P/R/NAME:TAG`.
"""

import asyncio
import re
import socket
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

import aiohttp
from google.protobuf.message import Message

from deploy.common.paths import MODEL_STORE
from deploy.image.runtime import container_runtime
from handler.config import APPS
from standin.errors import ApiError, invalid
from standin.settings import Settings

_URI = re.compile(
    r"(?P<region>[a-z0-9-]+)-docker\.pkg\.dev/(?P<path>[^/:@]+/[^/:@]+/[^:@]+?)"
    r"(?::(?P<tag>[\w.-]+)|@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_ACCEPT = ", ".join(
    (
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
    )
)
_MULTI_REGIONS = ("us", "europe", "asia")


class Images(ABC):
    """What images there are."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def check_name(self, uri: str, region: str) -> None:
        """Make sure that a name may be given to Vertex AI.

        Raises:
            ApiError: it is not in Artifact Registry, or elsewhere.
        """
        match = _URI.fullmatch(uri)
        if not match:
            raise invalid(
                "model.container_spec.image_uri",
                f"{uri!r} is not an image in Artifact Registry, such as "
                f"{region}-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE:TAG.",
            )
        if match["region"] not in (region, *_MULTI_REGIONS):
            raise invalid(
                "model.container_spec.image_uri",
                f"The image is in {match['region']}; it must be in {region}, as the Model is.",
            )

    @abstractmethod
    async def ingest(self, spec: Message) -> str:
        """What to start later for an image that is named now.

        Raises:
            ApiError: there is no such image.
        """

    def _parts(self, uri: str) -> tuple[str, str]:
        match = _URI.fullmatch(uri)
        return match["path"], match["digest"] or match["tag"] or "latest"

    def _missing(self, uri: str, why: str = "") -> ApiError:
        return ApiError(
            "NOT_FOUND",
            f"Image {uri!r} is not found{why}, or the Vertex AI Service Agent "
            f"service-{self.settings.number}@gcp-sa-aiplatform.iam.gserviceaccount.com has no "
            "permission to read it (roles/artifactregistry.reader).",
        )


class Registry(Images):
    """Debian's docker-registry, on a free port of loopback."""

    address = ""

    async def ingest(self, spec: Message) -> str:
        path, reference = self._parts(spec.image_uri)
        url = f"http://{self.address}/v2/{path}/manifests/{reference}"
        async with (
            aiohttp.ClientSession() as http,
            http.head(url, headers={"Accept": _ACCEPT}) as reply,
        ):
            if reply.status != 200:
                raise self._missing(spec.image_uri)
            return f"{self.address}/{path}@{reply.headers['Docker-Content-Digest']}"

    async def start(self) -> None:
        port = free_port()
        self.address = f"127.0.0.1:{port}"
        folder = self.settings.folder
        config = folder / "registry.yml"
        config.write_text(
            "version: 0.1\n"
            "log: {level: warn}\n"
            f"storage: {{filesystem: {{rootdirectory: {folder / 'registry'}}}}}\n"
            f"http: {{addr: '{self.address}'}}\n"
        )
        with (folder / "registry.log").open("wb") as log:
            self._process = subprocess.Popen(
                ["docker-registry", "serve", config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.pid = self._process.pid
        for _ in range(100):
            if can_connect(port):
                return
            await asyncio.sleep(0.1)
        raise RuntimeError(f"docker-registry does not answer; see {folder / 'registry.log'}")

    async def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        # Names alone: what was pushed from this machine stays under its own.
        listed = subprocess.run(
            [
                container_runtime(),
                "image",
                "ls",
                "--digests",
                "--format",
                "{{.Repository}} {{.Tag}} {{.Digest}}",
            ],
            capture_output=True,
            text=True,
        )
        for line in listed.stdout.splitlines():
            repository, tag, digest = line.split()
            if repository.startswith(f"{self.address}/"):
                names = [f"{repository}:{tag}", f"{repository}@{digest}"]
                subprocess.run([container_runtime(), "rmi", *names], capture_output=True)


class Apps(Images):
    """Without Docker: an image is an app of this repository that has an archive.

    The last part of the name decides, whatever the tag: `.../smollm2-135m:pro` is
    model_store/smollm2-135m. images.txt in the folder, one name a line, adds images that need a
    command.
    """

    async def ingest(self, spec: Message) -> str:
        name = self._parts(spec.image_uri)[0].rsplit("/", 1)[1]
        extra = self.settings.folder / "images.txt"
        if archive_of(name) or (extra.exists() and name in extra.read_text().split()):
            return name
        if (APPS / f"{name}.yaml").exists():
            raise self._missing(
                spec.image_uri, f" (without Docker: run `make archive APP={name}` first)"
            )
        raise self._missing(spec.image_uri)


def archive_of(app: str) -> Path | None:
    """The archive of an app, in whatever format."""
    found = [MODEL_STORE / app, MODEL_STORE / f"{app}.mar"]
    return next((path for path in found if path.exists()), None)


def free_port() -> int:
    """A port of loopback that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def can_connect(port: int) -> bool:
    """Whether somebody listens on a port of loopback."""
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0
