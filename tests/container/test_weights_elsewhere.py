"""Images without weights, which are mounted or in Cloud Storage; and images in a registry."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.archive.build import build_archive
from deploy.common.paths import UserError
from deploy.common.waiting import wait_until
from deploy.image.push import push_image
from deploy.image.run import HARDENED, container_name, run_container
from deploy.image.runtime import container_runtime
from deploy.torchserve.client import SAMPLE_REQUEST, predict
from deploy.torchserve.server import port_holder
from tests.container.conftest import APP, PORT, docker
from tests.container.test_container import URL

pytestmark = pytest.mark.slow

REGISTRY_PORT = 7249
NETWORK, BUCKETS = "serving-llms-test", "serving-llms-gcs"


@pytest.fixture(scope="module")
def store(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store")
    build_archive(APP, smollm2, store=folder)
    for path in [folder.parent.parent, folder.parent, *folder.rglob("*"), folder]:
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))
    return folder


@pytest.fixture
def cloud_storage(lean: str, store: Path):
    """A stand-in for Cloud Storage in a container, on a network without internet access."""
    server = Path(__file__).with_name("gcs_server.py")
    docker("network", "create", "--internal", NETWORK)
    mounts = ["--volume", f"{server}:/gcs_server.py:ro"]
    mounts += ["--volume", f"{store}:/buckets/artifacts:ro"]
    command = ["--entrypoint", "python", lean, "/gcs_server.py", "/buckets", "8000"]
    docker("run", "--detach", "--name", BUCKETS, "--network", NETWORK, *mounts, *command)
    yield {"STORAGE_EMULATOR_HOST": f"http://{BUCKETS}:8000"}
    docker("rm", "--force", BUCKETS, container_name(APP), check=False)
    docker("network", "rm", NETWORK)


def test_mounted_archive(bare, store):
    run_container(APP, tag="bare-test", port=PORT, store=store)
    assert "Tokyo" in predict(URL, SAMPLE_REQUEST)["predictions"][0]


def test_no_archive_to_mount(bare, tmp_path):
    with pytest.raises(UserError, match=f"has no weights; run `make archive APP={APP}`"):
        run_container(APP, tag="bare-test", port=PORT, store=tmp_path)
    with pytest.raises(UserError, match=r"/models is empty, but should hold one archive"):
        run_container(APP, tag="bare-test", port=PORT)


@pytest.mark.parametrize("folder", ["", f"/{APP}"], ids=["archive-in-it", "is-the-archive"])
def test_archive_from_cloud_storage(bare, cloud_storage, folder):
    """gcloud copies an archive either into the folder or, if it is new, as the folder."""
    name = run_container(
        APP,
        tag="bare-test",
        port=PORT,
        environment=cloud_storage | {"AIP_STORAGE_URI": f"gs://artifacts{folder}"},
        arguments=["--network", NETWORK],
    )
    form = f"{{{{(index .NetworkSettings.Networks {NETWORK!r}).IPAddress}}}}".replace("'", '"')
    address = docker("inspect", "--format", form, name)
    response = predict(f"http://{address}:7080/predictions/{APP}", SAMPLE_REQUEST)
    assert "Tokyo" in response["predictions"][0]
    assert f"MB from gs://artifacts{folder} in" in docker("logs", name)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3://artifacts", "should be gs://bucket/folder"),
        ("gs://artifacts/nothing", "there are no objects"),
        ("gs://unknown", "404"),
    ],
)
def test_rejects_wrong_storage_uri(bare, cloud_storage, uri, message):
    variables = cloud_storage | {"AIP_STORAGE_URI": uri}
    flags = [part for name, value in variables.items() for part in ("--env", f"{name}={value}")]
    command = [container_runtime(), "run", "--rm", "--network", NETWORK, *HARDENED, *flags, bare]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2 and message in run.stderr, run.stderr
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1


@pytest.fixture
def registry(tmp_path: Path):
    """Debian's docker-registry, on loopback."""
    program = shutil.which("docker-registry")
    if not program:
        pytest.skip("docker-registry is not installed (Debian's package of that name)")
    address = f"127.0.0.1:{REGISTRY_PORT}"
    config = {
        "version": 0.1,
        "log": {"level": "error"},
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
    }
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    process = subprocess.Popen([program, "serve", tmp_path / "config.yml"])
    wait_until(lambda: port_holder(REGISTRY_PORT), timeout=5)
    yield address
    process.terminate()
    process.wait()


def test_push_and_pull(lean, registry):
    address = push_image(APP, f"{registry}/project/serving", "lean-test")
    assert address.startswith(f"{registry}/project/serving/{APP}@sha256:")
    before = docker("image", "inspect", "--format", "{{.Id}}", lean)
    docker("image", "rm", f"{registry}/project/serving/{APP}:lean-test")
    docker("pull", address)
    assert docker("image", "inspect", "--format", "{{.Id}}", address) == before
    docker("image", "rm", address)
    with pytest.raises(UserError, match=r"push .*refused"):
        push_image(APP, "127.0.0.1:9/project/serving", "lean-test")
