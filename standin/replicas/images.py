"""The source of images: a registry on loopback, or this repository's apps without Docker.

Imitated: an image must be in Artifact Registry. Its digest is read when the model is uploaded, so a
tag that moves later changes nothing. On the stand-in `REGION-docker.pkg.dev/P/R/NAME:TAG` is
`127.0.0.1:PORT/P/R/NAME:TAG`.
"""

import asyncio
import re
import subprocess
from abc import ABC, abstractmethod
from pathlib import Path

import aiohttp

from deploy.common.paths import MODEL_STORE
from deploy.common.ports import can_connect, free_port
from deploy.image.runtime import container_runtime
from handler.config import APPS
from standin.errors import ApiError, invalid
from standin.settings import StandinSettings

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
REGISTRY_SECONDS = 10.0
"""docker-registry starts in less than a second."""


class Images(ABC):
    """The images that models can use."""

    def __init__(self, settings: StandinSettings) -> None:
        self.settings = settings

    def check_name(self, uri: str, region: str) -> None:
        """Check that an image's name is in Artifact Registry and in the model's region.

        Raises:
            ApiError: the name is of another registry or region.
        """
        match = _URI.fullmatch(uri)
        if not match:
            raise invalid(
                "model.container_uri",
                f"{uri!r} is not an image in Artifact Registry, such as "
                f"{region}-docker.pkg.dev/PROJECT/REPOSITORY/IMAGE:TAG.",
            )
        if match["region"] not in (region, *_MULTI_REGIONS):
            raise invalid(
                "model.container_uri",
                f"The image is in {match['region']}; it must be in {region}, as the Model is.",
            )

    @abstractmethod
    async def ingest(self, uri: str) -> str:
        """Look an image up; return what a runner starts for it.

        Raises:
            ApiError: the image does not exist.
        """

    def _parts(self, uri: str) -> tuple[str, str]:
        match = _URI.fullmatch(uri)
        if match is None:
            raise self._missing(uri)
        return match["path"], match["digest"] or match["tag"] or "latest"

    def _missing(self, uri: str, why: str = "") -> ApiError:
        return ApiError(
            "NOT_FOUND",
            f"Image {uri!r} is not found{why}, or the Vertex AI Service Agent service-"
            f"{self.settings.project_number}@gcp-sa-aiplatform.iam.gserviceaccount.com has no "
            "permission to read it (roles/artifactregistry.reader).",
        )


class Registry(Images):
    """Debian's docker-registry, on a free port of loopback."""

    address = ""

    async def ingest(self, uri: str) -> str:
        path, reference = self._parts(uri)
        url = f"http://{self.address}/v2/{path}/manifests/{reference}"
        async with (
            aiohttp.ClientSession() as http,
            http.head(url, headers={"Accept": _ACCEPT}) as response,
        ):
            if response.status != 200:
                raise self._missing(uri)
            return f"{self.address}/{path}@{response.headers['Docker-Content-Digest']}"

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
        try:
            async with asyncio.timeout(REGISTRY_SECONDS):
                while not can_connect(port):
                    await asyncio.sleep(0.05)
        except TimeoutError as error:
            raise RuntimeError(
                f"docker-registry does not answer; see {folder / 'registry.log'}"
            ) from error

    async def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        # Removes names only: an image that was pushed from this machine keeps its own name.
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
    """Images without Docker: this repository's apps that have an archive.

    The last part of the name counts, without the tag: `.../smollm2-135m:pro` is
    model_store/smollm2-135m. images.txt in the folder lists additional names, for models that have
    a command.
    """

    async def ingest(self, uri: str) -> str:
        name = self._parts(uri)[0].rsplit("/", 1)[1]
        extra = self.settings.folder / "images.txt"
        if archive_of(name) or (extra.exists() and name in extra.read_text().split()):
            return name
        if (APPS / f"{name}.yaml").exists():
            raise self._missing(uri, f" (without Docker: run `make archive APP={name}` first)")
        raise self._missing(uri)


def archive_of(app: str) -> Path | None:
    """Return the archive of an app, in either format; None if there is none."""
    found = [MODEL_STORE / app, MODEL_STORE / f"{app}.mar"]
    return next((path for path in found if path.exists()), None)
