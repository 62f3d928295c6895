"""Weights from the Hugging Face Hub, at one commit, every file verified.

`huggingface_hub` does the transfer: it honours HF_ENDPOINT, HF_TOKEN and HF_HOME, resumes a
broken download, and keeps what it has in its cache. What it does not do is compare file contents
with the hashes in the repository's tree; that happens here.
"""

import hashlib
import os
import shutil
from pathlib import Path

import httpx
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile

from deploy.common.paths import UserError, link_or_copy
from deploy.weights.folder import choose_files
from handler.config import HubWeights


def fetch_snapshot(weights: HubWeights, folder: Path) -> None:
    """Download the model and tokenizer files into `folder`.

    Raises:
        UserError: no network, no access, no such revision, or a file with another hash.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        tree = HfApi().list_repo_tree(weights.repo, revision=weights.revision)
        entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        files = [entries[name] for name in choose_files(list(entries))]
        _check_space(sum(file.size for file in files), folder)
        snapshot = snapshot_download(
            weights.repo,
            revision=weights.revision,
            allow_patterns=[file.path for file in files],
        )
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{weights.repo}: {endpoint} says there is no such repository, or it is not open to "
            "you. Check the name; for a gated one accept its terms and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{weights.repo}: has no revision {weights.revision}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(
            f"{weights.repo}: {endpoint} answered {status}. Repeat later: what has been "
            "downloaded is kept"
        ) from error
    except (httpx.HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{weights.repo}: the download from {endpoint} failed ({type(error).__name__}). Check "
            "the network and repeat: what has been downloaded is kept. Without access to the Hub, "
            "set HF_ENDPOINT to a mirror, give a clone with MODEL_DIR=path, or rehearse with "
            "SHAPE_ONLY=1"
        ) from error
    for file in files:
        blob = (Path(snapshot) / file.path).resolve()
        stated = file.lfs.sha256 if file.lfs else file.blob_id
        if git_hash(blob, lfs=file.lfs is not None) != stated:
            blob.unlink()
            raise UserError(
                f"{weights.repo}: {file.path} does not have the hash the repository states; it was "
                "deleted. Repeat the download"
            )
        link_or_copy(blob, folder / file.path)


def git_hash(path: Path, *, lfs: bool) -> str:
    """The hash a repository's tree states: SHA-256 for LFS files, git's blob SHA-1 for others."""
    digest = hashlib.sha256()
    if not lfs:
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _check_space(size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"the download is {size / 1e9:.1f} GB and the disk has {free / 1e9:.1f} GB free; "
            "make room"
        )
