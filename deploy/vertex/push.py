"""Push an app's image into Artifact Registry, if Vertex AI could run it."""

from collections.abc import Callable

from deploy.common.paths import UserError
from deploy.image.lookup import WEIGHTS_LABEL, how_to_build, image_name, inspect_image, labels_of
from deploy.image.push import push_image
from deploy.vertex.config import VertexSettings

DIGEST_DIGITS = 12
"""Of the image's digest, in its tag: enough to tell builds apart."""


def push(
    settings: VertexSettings, app: str, tag: str = "pro", report: Callable[[str], object] = print
) -> str:
    """Push an app's image and return its address for Vertex AI.

    The tag in the registry is the local tag and the first digits of the image's digest. So another
    build has another tag, and `deploy` notices that it is another image.

    With `push_images: false` nothing is pushed, and the address has the unchanged tag.

    Raises:
        UserError: no container runtime, no such image, an image that Vertex AI could not run with
            these settings, or the registry rejected it.
    """
    if not settings.push_images:
        uri = settings.image_uri(app, tag)
        report(f"not pushed, because push_images is false: {uri}")
        return uri
    local, found = image_name(app, tag), inspect_image(app, tag)
    _check_architecture(settings, local, found["Architecture"])
    _check_weights(settings, app, tag, labels_of(found).get(WEIGHTS_LABEL))
    remote_tag = f"{tag}-{found['Id'].removeprefix('sha256:')[:DIGEST_DIGITS]}"
    uri = settings.image_uri(app, remote_tag)
    folder = settings.image_folder()
    if settings.push_registry:
        folder = f"{settings.push_registry}/{folder.split('/', 1)[1]}"
    report(f"push {local} to {folder}")
    try:
        push_image(app, folder, tag, remote_tag=remote_tag)
    except UserError as error:
        raise UserError(
            f"{error}\nIs there a repository, and may docker write there? `gcloud artifacts "
            f"repositories create {settings.repository} --repository-format=docker --location="
            f"{settings.region}`, `gcloud auth configure-docker {settings.region}-docker.pkg.dev`"
        ) from error
    return uri


def _check_architecture(settings: VertexSettings, image: str, architecture: str) -> None:
    wanted = settings.architecture
    if architecture != wanted:
        raise UserError(
            f"{image} is for {architecture}, and the replicas' machines are {wanted}; build it "
            f"with DOCKER_DEFAULT_PLATFORM=linux/{wanted}, or in Cloud Build "
            "(deploy/vertex/cloudbuild.yaml)"
        )


def _check_weights(settings: VertexSettings, app: str, tag: str, weights: str | None) -> None:
    image = image_name(app, tag)
    if weights == "none" and not settings.artifact_uri:
        raise UserError(
            f"artifact_uri: none given, and {image} has no weights; name their folder in Cloud "
            f"Storage in deploy/vertex/vertex.yaml, or build them in: {how_to_build(app, tag)}"
        )
    if weights == "baked" and settings.artifact_uri:
        raise UserError(
            f"artifact_uri: {settings.artifact_uri} given, and {image} contains weights, which "
            "would be served instead; give none, or build it without: "
            f"{how_to_build(app, tag, 'BAKED=no')}"
        )
