"""Choose an engine, and export weights for the `openvino` engine when the archive is made.

`trace.py` (optimum-intel) traces the model; `compress.py` (nncf) compresses its weights. Both run
as separate processes, because they need torch, transformers and, for large models, much memory.
Serving needs none of them. Results stay under `build/export/`. Their names depend on weights,
versions and settings, so a change of any of these makes a new export.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import psutil

from deploy.archive.support import unsupported, unsupported_by_vllm
from deploy.common.locks import one_at_a_time
from deploy.common.paths import BUILD, ROOT, UserError, link_or_copy, shown
from deploy.weights.folder import TEXT_FILES, choose_files, weight_files
from handler.config import EngineConfig
from tools.setup_env import vllm_python

EXPORTS = BUILD / "export"
EXPORTED = "openvino_model.xml"

_EXPORT_MEMORY = 2.4
"""Peak memory of an export in multiples of the checkpoint's size: benchmarks/results/large.json."""

NAMED = "the configuration names it"
"""The reason for an engine that was not chosen but named."""

OTHER_ENGINE = "serve it with another engine: ENGINE=transformers"

_NAME = 40
"""Letters of a model's name in the names of our folders. A letter has up to four bytes, and a file
system allows 255 for a name."""


class ExportError(UserError):
    """The `openvino` engine cannot have this model; the other engine may."""


_TRACE = Path(__file__).with_name("trace.py")
_COMPRESS = Path(__file__).with_name("compress.py")


def has_gpu() -> bool:
    """Whether torch can use a GPU of this machine."""
    import torch

    return torch.cuda.is_available()


def has_vllm() -> bool:
    """Whether the engine vllm is installed with CUDA."""
    return vllm_python("cuda") is not None


def choose_engine(
    config: EngineConfig,
    weights: Path,
    cache: Path = EXPORTS,
    *,
    gpu: Callable[[], bool] = has_gpu,
    vllm: Callable[[], bool] = has_vllm,
) -> tuple[str, str]:
    """Return the engine for `name: auto`, and the reason.

    On a GPU `vllm` if it is installed and knows the model. `openvino` on a CPU if it is installed,
    serves the model correctly, and the export fits into memory. `transformers` with `max_memory`,
    and in all other cases.

    Args:
        config: the engine's settings.
        weights: the model's folder.
        cache: where exports are.
        gpu: whether the machine that will serve has a GPU.
        vllm: whether the machine that will serve has vLLM with CUDA.

    Raises:
        UserError: the configuration names an engine that does not serve this model.
    """
    if config.name != "auto":
        if config.name == "openvino" and (why := unsupported(weights, config.max_context)):
            raise UserError(f"{shown(weights)}: {why}; {OTHER_ENGINE}")
        if config.name == "vllm" and (why := unsupported_by_vllm(weights)):
            raise UserError(f"{shown(weights)}: {why}; {OTHER_ENGINE}")
        return config.name, NAMED
    if config.transformers.max_memory:
        return "transformers", "max_memory needs it"
    if gpu():
        if not vllm():
            return "transformers", "there is a GPU, and vLLM is not installed"
        if why := unsupported_by_vllm(weights):
            return "transformers", why
        return "vllm", "there is a GPU"
    if importlib.util.find_spec("openvino_genai") is None:
        return "transformers", "OpenVINO is not installed"
    if why := unsupported(weights, config.max_context):
        return "transformers", why
    needed = _EXPORT_MEMORY * sum(path.stat().st_size for path in weight_files(weights))
    free = psutil.virtual_memory().available
    if needed > free and not _exported_file(weights, config, cache).is_file():
        sizes = f"{needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} are free"
        return "transformers", f"exporting for OpenVINO takes {sizes}"
    return "openvino", "there is no GPU"


def export(weights: Path, config: EngineConfig, cache: Path = EXPORTS) -> Path:
    """Return the folder that the `openvino` engine loads; make it if it does not exist.

    Raises:
        ExportError: the model cannot be exported; the message names the log.
    """
    folder = _exported_file(weights, config, cache).parent
    if not (folder / EXPORTED).is_file():
        with one_at_a_time(cache):
            if not (folder / EXPORTED).is_file():  # another program may have made it meanwhile
                _make(folder, weights, config, cache)
    return folder


def _make(folder: Path, weights: Path, config: EngineConfig, cache: Path) -> None:
    for stale in cache.glob("*.unfinished"):  # of a program that was killed; we hold the lock
        shutil.rmtree(stale, ignore_errors=True)
    traced = _trace(weights, cache)
    print(f"making its weights {config.openvino.precision} ...", flush=True)
    with _unfinished(folder) as unfinished:
        command: list[str | Path] = [sys.executable, "-m", "deploy.archive.compress"]
        command += [traced / EXPORTED, unfinished / EXPORTED, *_compress_arguments(config)]
        _run_exporter(command, unfinished, cache)
        for path in exported_files(traced):
            if not (unfinished / path.name).exists():
                link_or_copy(path, unfinished / path.name)


def _exported_file(weights: Path, config: EngineConfig, cache: Path) -> Path:
    """Return the path of the file that `export` makes."""
    recipe = [_TRACE.read_text(), version("nncf"), _COMPRESS.read_text()]
    recipe += _compress_arguments(config)
    name = f"{_short(weights)}-{config.openvino.precision}-{_key(weights, recipe)}"
    return cache / name / EXPORTED


def _short(weights: Path) -> str:
    """Return the name of a model's folder, cut so that ours are not too long for a file system."""
    return weights.name[:_NAME]


def _compress_arguments(config: EngineConfig) -> list[str]:
    if config.openvino.precision == "int4":
        return ["int4", "--group-size", str(config.openvino.group_size)]
    return [config.openvino.precision]


def trace(weights: Path, cache: Path = EXPORTS) -> Path:
    """Return a folder with the model as OpenVINO's graph, weights in float16: compress's input.

    Raises:
        ExportError: as `export`.
    """
    with one_at_a_time(cache):
        return _trace(weights, cache)


def _trace(weights: Path, cache: Path) -> Path:
    folder = cache / f"{_short(weights)}-traced-{_key(weights, [_TRACE.read_text()])}"
    if (folder / EXPORTED).is_file():
        return folder
    print("exporting for OpenVINO ...", flush=True)
    with _unfinished(folder) as unfinished:
        command: list[str | Path] = [sys.executable, "-m", "deploy.archive.trace"]
        _run_exporter([*command, weights.resolve(), unfinished], unfinished, cache)
        for path in unfinished.iterdir():  # optimum's versions of the model's own files
            if path.name in TEXT_FILES - {"tokenizer.json"}:
                path.unlink()
        for name in choose_files([p.name for p in weights.iterdir() if p.suffix != ".safetensors"]):
            if not name.endswith((".bin", ".index.json")):
                (unfinished / name).unlink(missing_ok=True)  # a tokenizer.json
                link_or_copy((weights / name).resolve(), unfinished / name)
    return folder


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Yield an empty folder; give it its name when the block ends, delete it if the block fails."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _run_exporter(command: list[str | Path], target: Path, cache: Path) -> None:
    log = cache / "export.log"
    with log.open("w") as stream:
        # The weights are here, so the exporter needs nothing from the Hub.
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        run = subprocess.run(command, env=environment, stderr=stream, cwd=ROOT)
    if run.returncode != 0 or not (target / EXPORTED).is_file():
        why = _reason(log.read_text()) if run.returncode >= 0 else _KILLED
        raise ExportError(
            f"OpenVINO cannot export this model ({why}; the full log is {shown(log)})"
        )


_KILLED = "the exporter was killed, perhaps because the memory was full"


def _reason(log: str) -> str:
    """Return what an exporter's log says about its end, in one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception): ", line)]
    text = (errors or lines)[-1].rstrip(".:")
    return text if len(text) <= 200 else f"{text[:197]}..."


def exported_files(folder: Path) -> list[Path]:
    """Return the files of an exported folder that a server needs."""
    names = TEXT_FILES | {EXPORTED, "openvino_model.bin", "openvino_config.json"}
    return sorted(p for p in folder.iterdir() if p.name in names)


def _key(weights: Path, recipe: list[str]) -> str:
    parts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in weight_files(weights)]
    parts += [f"{name} {version(name)}" for name in ("openvino", "optimum-intel")]
    return hashlib.sha256("\n".join(parts + recipe).encode()).hexdigest()[:12]
