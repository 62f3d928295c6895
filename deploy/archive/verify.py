"""Compare the `openvino` engine's tokens with the model's, after an export.

    python -m deploy.archive.verify WEIGHTS TRACED FOLDER RECORD < engine.json

The graph in float16 has to generate what the model does, because rounding to 8 or 4 bits would hide
a lost part of the model. The quantized weights are checked for gross errors, and their tokens are
recorded.

The check runs in a separate process, because it needs torch and a lot of memory. Its record goes
into the archive, and each start of the server repeats the check against it.
"""

import hashlib
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.archive.export import EXPORTED, ExportError, trace
from deploy.archive.pack import place
from deploy.common.locks import one_at_a_time
from deploy.common.paths import ROOT, UserError, shown, temporary_folder
from deploy.weights.folder import weight_files
from handler.config import EngineConfig
from handler.engine.self_check import (
    Completion,
    DamagedModelError,
    Record,
    SelfCheckError,
    compare,
    complete,
    prompts,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GRAPH = (EXPORTED, "openvino_model.bin")

_ENGINE = ROOT / "handler" / "engine"
_CHECKED = [Path(__file__), *(_ENGINE / name for name in ("self_check.py", "openvino_engine.py"))]
"""Code whose change makes a new record."""

_WRONG, _DAMAGED = 3, 4
"""Exit statuses of this program: what an engine generates differs; the model is damaged."""

_FULL_PRECISION = 4e9
"""Bytes of a checkpoint up to which the reference is computed in float32. Larger ones keep their
dtype, so that the check needs no more memory than the export."""


def verify(weights: Path, folder: Path, config: EngineConfig, exported: Path) -> Path:
    """Return the record of the check; make it if it does not exist.

    Args:
        weights: the model's own folder.
        folder: what the archive has for the engine: the export and the tokenizer.
        config: the engine's settings.
        exported: what `export` returned; the record is kept beside it.

    Raises:
        SelfCheckError: the engine generates different text than the model.
        ExportError: the check could not run.
        UserError: the model is damaged, so no engine can serve it.
    """
    settings = config.model_dump_json(exclude={"chosen", "name", "transformers", "self_check"})
    tokenizer = (folder / "tokenizer.json").read_bytes()
    recipe = [settings, *(version(name) for name in ("openvino-genai", "transformers", "torch"))]
    recipe += [source.read_text() for source in _CHECKED]
    key = hashlib.sha256("\n".join(recipe).encode() + tokenizer).hexdigest()[:12]
    record = exported.with_name(f"{exported.name}-checked-{key}.json")
    if not record.is_file():
        with one_at_a_time(record):
            if not record.is_file():
                _run([weights, trace(weights), folder], config, record)
    return record


def _run(folders: list[Path], config: EngineConfig, record: Path) -> None:
    print("comparing its tokens with the model's ...", flush=True)
    log = record.with_suffix(".log")
    command: list[str | Path] = [sys.executable, "-m", "deploy.archive.verify"]
    command += [path.resolve() for path in (*folders, record)]
    with log.open("w") as stream:
        run = subprocess.run(
            command,
            input=config.model_dump_json(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=stream,
            cwd=ROOT,
        )
    if run.returncode == 0:
        log.unlink()
        return
    if run.returncode == _WRONG:
        raise SelfCheckError(run.stdout.strip())
    if run.returncode == _DAMAGED:
        raise UserError(f"{shown(folders[0])}: {run.stdout.strip()}")
    last = (log.read_text().strip() or f"exit status {run.returncode}").splitlines()[-1]
    raise ExportError(
        f"{shown(folders[0])}: the self-check after the export could not run ({last}; the full log "
        f"is {shown(log)}); app.engine.self_check: false in the app's YAML turns it off"
    )


def _check(weights: Path, traced: Path, folder: Path, config: EngineConfig) -> Record:
    """Generate tokens with the engine, then compare them with the model's choices."""
    precision = config.openvino.precision
    size = sum(path.stat().st_size for path in weight_files(weights))
    decode, found, note = _complete(folder, config, size)
    settings = {"precision": "fp16", "dynamic_quantization": 0, "inference_precision": "f32"}
    openvino = config.openvino.model_copy(update=settings)
    with temporary_folder() as graph:
        place([p for p in folder.iterdir() if p.name not in _GRAPH], graph)
        place([traced / name for name in _GRAPH], graph)
        _, exact, _ = _complete(
            graph, config.model_copy(update={"openvino": openvino}), size, exact_cache=True
        )

    from handler.engine.reference import score

    model, dtype = _load(weights, size)
    scores = [score(model, completion.prompt, completion.generated) for completion in exact]
    for completion, (gaps, _) in zip(exact, scores, strict=True):
        compare(completion, gaps, dtype, decode)
    largest = max(gap for gaps, _ in scores for gap in gaps)
    scores = [score(model, completion.prompt, completion.generated) for completion in found]
    for completion, (gaps, _) in zip(found, scores, strict=True):
        compare(completion, gaps, precision, decode)
    return Record(
        engine=f"openvino {version('openvino-genai')}",
        precision=precision,
        reference=f"transformers {version('transformers')}, {dtype}",
        largest_gap=round(largest, 3),
        note=note,
        completions=found,
        margins=[[round(margin, 3) for margin in margins] for _, margins in scores],
    )


def _complete(
    folder: Path, config: EngineConfig, size: int, *, exact_cache: bool = False
) -> tuple[Callable[[list[int]], str], list[Completion], str]:
    """Return how to decode, the completions in a batch and alone, and what they do not cover."""
    from handler.engine.openvino_engine import OpenVINOEngine

    config = config.model_copy(update={"self_check": False})
    engine = OpenVINOEngine(folder, config, exact_cache=exact_cache)
    encode, vocabulary = engine.folder.encode, engine.folder.vocabulary()
    texts, note = prompts(encode, engine.folder.config, engine.max_context, size // 2, vocabulary)
    found = complete(engine, texts, encode, together=True)
    found += complete(engine, texts, encode, together=False)
    return engine.folder.decode, found, note


def _load(weights: Path, size: int) -> "tuple[PreTrainedModel, str]":
    from transformers import AutoModelForCausalLM

    dtype = "float32" if size <= _FULL_PRECISION else "auto"
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, local_files_only=True)
    return model.eval(), str(model.dtype).removeprefix("torch.")


def main() -> int:
    """Run the command line; see the module's docstring."""
    weights, traced, folder, record = map(Path, sys.argv[1:])
    config = EngineConfig.model_validate_json(sys.stdin.read())
    try:
        result = _check(weights, traced, folder, config)
    except SelfCheckError as error:
        print(error)
        return _WRONG
    except DamagedModelError as error:
        print(error)
        return _DAMAGED
    unfinished = record.with_suffix(".unfinished")
    result.write(unfinished)
    unfinished.rename(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
