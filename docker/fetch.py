"""Download an archive from Cloud Storage into a model store, for images without weights.

Vertex AI copies a model's artifacts to a bucket that it manages and sets AIP_STORAGE_URI to it. The
container's service account may read it. With STORAGE_EMULATOR_HOST, Google's library uses another
server; then this module sends no credentials.
"""

import os
import time
from pathlib import Path, PurePosixPath

from google.api_core.exceptions import GoogleAPIError
from google.auth.credentials import AnonymousCredentials
from google.auth.exceptions import GoogleAuthError
from google.cloud import storage


def fetch(uri: str, target: Path) -> None:
    """Download all objects below `uri` into `target`.

    Args:
        uri: `gs://bucket` or `gs://bucket/folder`.
        target: the model store, which is created. Paths in it are relative to `uri`.

    Raises:
        ValueError: `uri` has another form.
        LookupError: there are no objects, or they may not be read; the message includes Google's.
    """
    bucket_name, _, prefix = uri.removeprefix("gs://").partition("/")
    if not uri.startswith("gs://") or not bucket_name:
        raise ValueError(f"AIP_STORAGE_URI={uri}: should be gs://bucket/folder")
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    emulated = "STORAGE_EMULATOR_HOST" in os.environ
    credentials = {"credentials": AnonymousCredentials(), "project": "none"} if emulated else {}
    bucket = storage.Client(**credentials).bucket(bucket_name)
    began = time.monotonic()
    try:
        size = sum(
            _download(blob, blob.name.removeprefix(prefix), target)
            for blob in bucket.list_blobs(prefix=prefix)
            if not blob.name.endswith("/")
        )
    except (GoogleAPIError, GoogleAuthError) as error:
        reason = " ".join(str(error).split())
        raise LookupError(f"AIP_STORAGE_URI={uri}: {reason}") from error
    if not size:
        raise LookupError(f"AIP_STORAGE_URI={uri}: there are no objects")
    print(f"{size / 1e6:.0f} MB from {uri} in {time.monotonic() - began:.0f} s", flush=True)


def _download(blob: storage.Blob, name: str, target: Path) -> int:
    """Download one object; return its size in bytes."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise ValueError(f"{blob.name} would be written outside of {target}")
    path = target / parts
    path.parent.mkdir(parents=True, exist_ok=True)
    blob.download_to_filename(path)  # checks the object's checksum
    return path.stat().st_size
