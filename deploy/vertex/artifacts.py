"""The archive in Cloud Storage that a model version is uploaded with."""

import hashlib

from google.api_core.exceptions import GoogleAPIError
from google.auth.credentials import Credentials
from google.auth.exceptions import GoogleAuthError
from google.cloud.storage import Client
from requests.exceptions import RequestException

from deploy.common.paths import UserError

DIGITS = 12
"""Of the digest: enough that two archives in one folder never share them."""


def digest_of(uri: str, project: str, credentials: Credentials) -> str:
    """Digits that identify the content of a folder in Cloud Storage.

    Vertex AI copies the folder when a version is uploaded. The digits are part of the version's
    environment, which nobody can change, so that a new archive in the same folder is noticed.

    Args:
        uri: `gs://bucket/folder`.
        project: the project that makes the requests.
        credentials: they need storage.objects.list on the bucket.

    Raises:
        UserError: the folder is empty or cannot be listed.
    """
    bucket, _, folder = uri.removeprefix("gs://").partition("/")
    client = Client(project=project, credentials=credentials)
    try:
        blobs = list(client.list_blobs(bucket, prefix=f"{folder}/" if folder else None))
    except (GoogleAPIError, GoogleAuthError, RequestException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"artifact_uri: {uri} cannot be listed: {reason}") from error
    found = sorted((b.name, b.crc32c, b.md5_hash) for b in blobs if not b.name.endswith("/"))
    if not found:
        raise UserError(f"artifact_uri: {uri} given, but it is empty; copy an archive there")
    return hashlib.sha256(repr(found).encode()).hexdigest()[:DIGITS]
