"""Prepare build/image, the part of the build context that is made and not written."""

import re
import shutil
import sys
from pathlib import Path

from deploy.archive.build import prepare
from deploy.archive.export import EXPORTED
from deploy.common.paths import BUILD, ROOT, link_or_copy
from handler.config import app_yaml
from tools.setup_env import pip_sources

CONTEXT = BUILD / "image"
_TORCH_LOCK = ROOT / "docker" / "locks" / "torch.txt"


def prepare_context(app: str, weights: Path, target: str | None = None) -> str:
    """Write the app's prepared model and wheels for pip; return the target to build.

    Args:
        app: the APP.
        weights: a complete folder, as `get_weights` returns it.
        target: a target of the Dockerfile. None chooses the smallest that has the app's engine.
    """
    shutil.rmtree(CONTEXT / "prepared", ignore_errors=True)
    gpu = target == "gpu"
    named = app_yaml(app, local=True)["app"]["engine"]["name"]
    engine = {"name": "auto"} if gpu and named == "openvino" else None  # that image lacks it
    prepared = prepare(app, weights, CONTEXT / "prepared" / app, engine=engine, gpu_image=gpu)
    collect_wheels(CONTEXT / "wheels")
    if target is None:
        target = "cpu-lean" if (prepared / "weights" / EXPORTED).is_file() else "cpu"
    return target


def collect_wheels(folder: Path) -> None:
    """Collect the wheel of torch from the folders in pip's configuration (find-links).

    Most machines have none. Then the build downloads it from PyTorch's index.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (version,) = re.findall(r"^torch==(\S+)", _TORCH_LOCK.read_text(), re.MULTILINE)
    for source in pip_sources(Path(sys.executable))["find-links"]:
        for wheel in Path(source).glob(f"torch-{version}-*.whl"):
            if not (folder / wheel.name).exists():
                link_or_copy(wheel, folder / wheel.name)
