"""Turn weights into what the `openvino` engine loads: once, when the archive is made.

`optimum-cli` (optimum-intel and nncf) traces the model and quantizes its weights. It needs torch,
transformers and, for large models, memory; serving needs none of that. The result is kept under
`build/export/`, named by weights, versions and settings, so that a change of any makes a new one.
"""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from deploy.paths import BUILD, UserError, link_or_copy, shown
from deploy.weights import choose_files, weight_files
from handler.config import EngineConfig

EXPORTS = BUILD / "export"
EXPORTED = "openvino_model.xml"

_PRECISIONS = {
    "int8": ["--weight-format", "int8"],
    "int4": ["--weight-format", "int4", "--sym", "--ratio", "1.0"],
    "fp16": ["--weight-format", "fp16"],
}


def choose_engine(config: EngineConfig) -> tuple[str, str]:
    """The engine for `name: auto`, and why.

    OpenVINO on a CPU if it is installed; transformers on a GPU, with offload, and everywhere else.
    """
    if config.name != "auto":
        return config.name, "it was asked for"
    if config.max_memory or config.offload_folder:
        return "transformers", "max_memory and offload_folder need it"
    if importlib.util.find_spec("openvino_genai") is None:
        return "transformers", "OpenVINO is not installed"
    import torch

    if torch.cuda.is_available():
        return "transformers", "there is a GPU"
    return "openvino", "there is no GPU"


def export(weights: Path, config: EngineConfig, cache: Path = EXPORTS) -> Path:
    """Return the folder the `openvino` engine loads, made from `weights` if need be.

    Raises:
        UserError: the model cannot be exported; names the other engine.
    """
    folder = cache / _key(weights, config)
    if (folder / EXPORTED).is_file():
        return folder
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    print(f"exporting for OpenVINO, {config.precision} ...", flush=True)
    command = [Path(sys.executable).with_name("optimum-cli"), "export", "openvino"]
    command += ["--model", weights, "--task", "text-generation-with-past"]
    command += [*_PRECISIONS[config.precision], "--disable-convert-tokenizer", unfinished]
    if config.precision == "int4":
        command[-1:-1] = ["--group-size", str(config.group_size)]
    log = cache / "export.log"
    with log.open("w") as stream:
        run = subprocess.run(command, stdout=None, stderr=stream)
    if run.returncode != 0 or not (unfinished / EXPORTED).is_file():
        shutil.rmtree(unfinished, ignore_errors=True)
        last = (log.read_text().strip() or "no message").splitlines()[-1]
        raise UserError(
            f"OpenVINO cannot export this model ({last}; all of it in {shown(log)}). Serve it with "
            "the other engine: set app.engine.name: transformers in its YAML"
        )
    for name in choose_files([p.name for p in weights.iterdir() if p.suffix != ".safetensors"]):
        if not (unfinished / name).exists() and not name.endswith((".bin", ".index.json")):
            link_or_copy((weights / name).resolve(), unfinished / name)
    unfinished.rename(folder)
    return folder


def exported_files(folder: Path) -> list[Path]:
    """The files of an exported folder that a server needs."""
    wanted = {".xml", ".bin", ".json", ".jinja"}
    return sorted(p for p in folder.iterdir() if p.suffix in wanted)


def _key(weights: Path, config: EngineConfig) -> str:
    parts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in weight_files(weights)]
    parts += [f"{name} {version(name)}" for name in ("openvino", "optimum-intel", "nncf")]
    parts += [config.precision, str(config.group_size)]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]
    return f"{weights.name}-{config.precision}-{digest}"
