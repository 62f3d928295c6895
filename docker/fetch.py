"""Bring an archive from Cloud Storage into a model store, for images without weights.

Vertex AI copies a model's artifacts into a bucket of its own and names it in AIP_STORAGE_URI; the
container's service account may read it. STORAGE_EMULATOR_HOST, which Google's library knows, makes
it ask another server, without credentials.
"""

import os
import time
from pathlib import Path, PurePosixPath

from google.auth.credentials import AnonymousCredentials
from google.cloud import storage


def fetch(uri: str, target: Path) -> None:
    """Download everything below `uri` into `target`, which is made.

    Args:
        uri: `gs://bucket` or `gs://bucket/folder`.
        target: the model store; what lies directly in the folder lies directly in it.

    Raises:
        ValueError: not such an address.
        LookupError: nothing is there.
    """
    bucket_name, _, prefix = uri.removeprefix("gs://").partition("/")
    if not uri.startswith("gs://") or not bucket_name:
        raise ValueError(f"AIP_STORAGE_URI={uri}: should be gs://bucket/folder")
    prefix = f"{prefix.rstrip('/')}/" if prefix else ""
    emulated = "STORAGE_EMULATOR_HOST" in os.environ
    credentials = {"credentials": AnonymousCredentials(), "project": "none"} if emulated else {}
    bucket = storage.Client(**credentials).bucket(bucket_name)
    began, size = time.monotonic(), 0
    for blob in bucket.list_blobs(prefix=prefix):
        name = PurePosixPath(blob.name.removeprefix(prefix))
        if blob.name.endswith("/"):
            continue
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{uri}: {blob.name} would be written outside of {target}")
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blob.download_to_filename(path)  # checks the object's checksum
        size += path.stat().st_size
    if not size:
        raise LookupError(f"AIP_STORAGE_URI={uri}: there is nothing")
    print(f"{size / 1e6:.0f} MB from {uri} in {time.monotonic() - began:.0f} s", flush=True)
