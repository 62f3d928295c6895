"""Files and variables of a developer's machine that must not reach archives, images or servers."""

import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

import deploy.image.build
from deploy.archive.build import build_archive
from deploy.archive.pack import ENTRY, HANDLER, pack, sources
from deploy.common.paths import ROOT, UserError
from deploy.torchserve.launch import server_environment, without_secrets
from deploy.torchserve.server import Server
from deploy.weights.folder import check_folder, choose_files

SECRET = "do not publish"
SECRET_FILES = (
    ".env",
    "service-account.json",
    "key.pem",
    "credentials.txt",
    "credentials.yaml",
    "secrets.bin",
    "my.model",
    "prompts.jinja",
    ".git/config",
    ".netrc",
    "aws/credentials.json",
    "apps/service-account.json",
    "engine/.env",
    "engine/token.txt",
)


def plant(folder: Path) -> None:
    for name in SECRET_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(SECRET)


def contents(archive: Path) -> dict[str, bytes]:
    if archive.is_dir():
        files = [path for path in archive.rglob("*") if path.is_file()]
        return {str(path.relative_to(archive)): path.read_bytes() for path in files}
    with zipfile.ZipFile(archive) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


@pytest.mark.parametrize("archive_format", ["no-archive", "zip-store"])
def test_archive_holds_only_code_and_apps_of_the_handler(
    archive_format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    package = shutil.copytree(HANDLER, tmp_path / "handler")
    plant(package)
    outside = tmp_path / "outside.py"
    outside.write_text(SECRET)
    (package / "link.py").symlink_to(outside)
    (package / "linked").symlink_to(tmp_path)
    (package / "apps" / ".hidden.yaml").write_text(SECRET)
    archive = pack(
        "x", package / ENTRY.name, {}, [], package=package, archive_format=archive_format,
        store=tmp_path / "store",
    )  # fmt: skip
    made = contents(archive)
    assert not [name for name, data in made.items() if SECRET.encode() in data]
    of_package = {str(p.relative_to(HANDLER.parent)) for p in sources(HANDLER) if p != ENTRY}
    assert {name for name in made if name.startswith("handler/")} == of_package
    assert {"handler/config.py", "handler/apps/defaults.yaml"} <= of_package
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert line.startswith("leaving out ") and "handler/.env" in line and "link.py" in line


def test_archive_holds_only_the_models_own_files(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plant(model_folder)
    archive = build_archive("x", model_folder, engine={"name": "transformers"}, store=tmp_path)
    made = contents(archive)
    assert not [name for name, data in made.items() if SECRET.encode() in data]
    assert {"weights/config.json", "weights/tokenizer.json"} <= set(made)
    output = capsys.readouterr().out
    assert "leaving out .env, .git/, .netrc, apps/, aws/" in output and "and 5 more" in output


def test_chooses_only_known_names_of_a_repository():
    """The same choice is used for downloads from the Hub."""
    wanted = [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model-00002-of-00002.bin",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "pytorch_model.bin.index.json",
        "tokenizer.json",
        "vocab.json",
    ]
    others = ["training_args.bin", "optimizer.bin", "README.md", "client_secret.json", ".env.json"]
    others += ["model.safetensors.index.json", "onnx/model.bin", "handler.py", "keys.index.json"]
    assert choose_files(sorted(wanted + others)) == wanted


def test_weights_that_a_repository_holds_twice_are_chosen_once():
    """Else the check of memory counts them twice, too."""
    wanted = ["model-00001-of-00001.safetensors", "config.json", "model.safetensors.index.json"]
    for second in ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors"):
        assert choose_files([second, *wanted]) == wanted
        assert choose_files([second, "config.json"]) == [second, "config.json"]


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "generation_config.json"])
def test_rejects_link_out_of_a_model_folder(name: str, model_folder: Path, tmp_path: Path):
    (model_folder / name).rename(tmp_path / "elsewhere.json")
    (model_folder / name).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match=f"{name}: is a link to .*elsewhere.json, outside"):
        check_folder(model_folder)


def test_accepts_links_of_the_hubs_cache_and_linked_weights(model_folder: Path, tmp_path: Path):
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "1234"
    snapshot.parent.mkdir(parents=True)
    (repository / "blobs").mkdir()
    model_folder.rename(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(repository / "blobs" / str(number))
        path.symlink_to(f"../../blobs/{number}")
    assert check_folder(snapshot) == snapshot
    (weights,) = snapshot.glob("*.safetensors")
    moved = tmp_path / "large.safetensors"
    weights.resolve().rename(moved)
    weights.unlink()
    weights.symlink_to(moved)
    assert check_folder(snapshot) == snapshot


SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "GITHUB_TOKEN",
    "OPENAI_API_KEY",
    "NVIDIA_API_KEY",
    "PGPASSWORD",
    "DOCKER_AUTH_CONFIG",
)
NEEDED = {"PATH": "/bin", "HOME": "/h", "LC_ALL": "C", "OMP_NUM_THREADS": "2"}
NEEDED |= {"CUDA_VISIBLE_DEVICES": "0", "LD_LIBRARY_PATH": "/l", "TOKENIZERS_PARALLELISM": "false"}


def test_server_gets_only_variables_of_an_allow_list():
    others = {"DATABASE_URL": "postgres://user:password@host", "KUBECONFIG": "/k", "MY_PIN": "1"}
    assert server_environment(NEEDED | others | dict.fromkeys(SECRETS, "x")) == NEEDED


def test_variables_that_are_secrets_are_known_by_name():
    assert without_secrets(NEEDED | dict.fromkeys(SECRETS, "x")) == NEEDED


def test_server_on_this_machine_passes_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for name in SECRETS:
        monkeypatch.setenv(name, "x")
    server = Server(tmp_path / "x", environment={"CHOSEN_KEY": "the caller's"})
    environment = server._environment()
    assert not set(SECRETS) & set(environment)
    assert environment["PATH"] == os.environ["PATH"] and environment["CHOSEN_KEY"]


def test_build_of_an_image_gets_no_secret(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    docker = tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\n[ "$1" != build ] || env > {tmp_path}/seen\n')
    docker.chmod(0o755)
    monkeypatch.setenv("DOCKER", str(docker))
    monkeypatch.setattr(deploy.image.build, "prepare_context", lambda *_: "cpu")
    for name in SECRETS:
        monkeypatch.setenv(name, "x")
    deploy.image.build.build_image("x", tmp_path)
    seen = (tmp_path / "seen").read_text()
    assert "DOCKER_BUILDKIT=1" in seen and not [n for n in SECRETS if f"{n}=" in seen]


def test_cloud_build_uploads_only_sources():
    """Git and gcloud read the same patterns."""
    needed = ["Makefile", "pyproject.toml", "requirements.lock", "README.md", "tools/setup_env.py"]
    needed += ["docker/Dockerfile", "docker/Dockerfile.dockerignore", "docker/locks/cpu.txt"]
    needed += [
        "docker/ready",
        "docker/serve.py",
        "handler/apps/gpt2.yaml",
        "handler/engine/text.py",
    ]
    folders = ("", "handler/", "docker/", "deploy/")
    secret = [f"{folder}{name}" for folder in folders for name in SECRET_FILES]
    command = ["git", "-c", f"core.excludesFile={ROOT / '.gcloudignore'}", "check-ignore"]
    command += ["--no-index", *needed, *secret]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert set(run.stdout.split()) == set(secret)
