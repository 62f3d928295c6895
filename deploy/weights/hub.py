"""Download weights from the Hugging Face Hub, at one commit, and verify every file.

`huggingface_hub` transfers the files: it reads HF_ENDPOINT, HF_TOKEN and HF_HOME, resumes a broken
download, and caches files. It does not compare contents with the hashes in the repository's tree;
this module does.
"""

import hashlib
import os
import shutil
import tempfile
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
from deploy.weights.folder import check_kind, choose_files
from handler.config import HubWeights

_DECIDING = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model_index.json",
)
"""Small files that show whether a repository is served."""


def fetch_snapshot(weights: HubWeights, folder: Path) -> None:
    """Download the model and tokenizer files into `folder`.

    Raises:
        UserError: no network, no access, no such revision, or a file with a wrong hash.
    """
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        tree = HfApi().list_repo_tree(weights.repo, revision=weights.revision)
        entries = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        _check_kind(weights, list(entries))
        files = [entries[name] for name in choose_files(list(entries))]
        _check_space(sum(file.size for file in files), folder)
        snapshot = snapshot_download(
            weights.repo,
            revision=weights.revision,
            allow_patterns=[file.path for file in files],
        )
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise UserError(
            f"{weights.repo}: {endpoint} has no such repository, or you may not read it. Check "
            "the name; for a gated repository, accept its terms and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{weights.repo}: has no revision {weights.revision}") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        raise UserError(
            f"{weights.repo}: {endpoint} answered {status}. Try again later; the download resumes"
        ) from error
    except (httpx.HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{weights.repo}: the download from {endpoint} failed ({type(error).__name__}). Check "
            "the network and try again; the download resumes. Without access to the Hub, set "
            "HF_ENDPOINT to a mirror, use a clone with MODEL_DIR=path, or rehearse with "
            "SHAPE_ONLY=1"
        ) from error
    for file in files:
        blob = (Path(snapshot) / file.path).resolve()
        stated = file.lfs.sha256 if file.lfs else file.blob_id
        if git_hash(blob, lfs=file.lfs is not None) != stated:
            blob.unlink()
            raise UserError(
                f"{weights.repo}: {file.path} does not have the hash that the repository states, "
                "and was deleted. Try again"
            )
        link_or_copy(blob, folder / file.path)


def _check_kind(weights: HubWeights, names: list[str]) -> None:
    """Refuse a repository that is not served, before its weights are downloaded.

    Makes a folder with the JSON files that decide, and an empty file for each other file.
    """
    wanted = [name for name in names if name in _DECIDING]
    snapshot = snapshot_download(
        weights.repo, revision=weights.revision, allow_patterns=wanted or ["config.json"]
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, weights.repo)
        folder.mkdir(parents=True)
        for name in (name for name in names if ".." not in Path(name).parts):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
        for name in wanted:
            shutil.copy(Path(snapshot, name), folder / name)
        try:
            check_kind(folder)
        except UserError as error:
            raise UserError(str(error).replace(f"{temporary}/", "")) from error


def git_hash(path: Path, *, lfs: bool) -> str:
    """Return the hash that a repository's tree states: SHA-256 for LFS files, else git's SHA-1."""
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
            f"the download is {size / 1e9:.1f} GB, and the disk has {free / 1e9:.1f} GB free; "
            "free some space"
        )
