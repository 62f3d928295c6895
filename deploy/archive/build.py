"""Make the archive of an APP from its weights and its YAML.

The archive is self-contained: the handler's package, the app's completed YAML as
`model-config.yaml`, and the weights in the form that the engine loads.
"""

import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from deploy.archive.export import (
    NAMED,
    OTHER_ENGINE,
    ExportError,
    choose_engine,
    export,
    exported_files,
)
from deploy.archive.pack import CONFIG, DIRECTORY, WEIGHTS, check_format, pack_prepared, place
from deploy.archive.tokenizer import tokenizer_files, with_tokenizer
from deploy.archive.verify import verify
from deploy.common.environments import worker_python
from deploy.common.paths import MODEL_STORE, UserError, link_or_copy, shown, temporary_folder
from deploy.weights.checkpoint import check_checkpoint, check_type
from deploy.weights.config_json import names_no_end, read_object
from deploy.weights.fetch import get_weights
from deploy.weights.folder import RANDOM, check_folder, left_out, source_of, weight_files
from handler.config import EngineConfig, app_yaml, check_engine, parse_app
from handler.engine.folder import ModelFolder
from handler.engine.positions import positions
from handler.engine.self_check import RECORD, SelfCheckError
from handler.errors import RequestError
from handler.request import default_parameters

CONTEXT = 2048
"""Tokens of a sequence if nothing names a limit. Models with ALiBi or with states have none."""

_NO_LENGTH = 1_000_000
"""Tokens. A tokenizer that knows no limit has a larger model_max_length."""

TICK_SECONDS = 15
"""What a tick may take with a small model; usually it takes a tenth of a second."""

TICK_SECONDS_PER_GB = {"openvino": 20, "transformers": 40, "vllm": 40}
"""The longest part of a tick is prefill. On two slow cores, at 50 GFLOP/s, openvino's 128 tokens
take 5 s for each GB of int8 weights. With transformers, the 2,048 tokens of dolly-v2-3b take 20 s
for each GB of float32 weights and 40 s for 16-bit weights. Reading layers from a slow disk takes
10 s for each GB. vllm on a CPU is as fast as transformers or faster, in 16 bits."""


def build_app(
    name: str,
    *,
    model_dir: Path | None = None,
    shape_only: bool = False,
    archive_format: str = DIRECTORY,
    engine: str | None = None,
) -> Path:
    """Get an app's weights, make its archive, and print where it is.

    Args:
        name: the APP.
        model_dir: a folder in Hugging Face layout to use instead of the app's weights.
        shape_only: use random weights of the true architecture and size.
        archive_format: one of `FORMATS`.
        engine: the engine to use instead of the one the app names.

    Raises:
        UserError: as `get_weights` and `build_archive`, or the engine is not installed.
    """
    # Before the minutes that weights may take.
    worker_python(engine or app_yaml(name, local=True)["app"]["engine"]["name"])
    weights = get_weights(name, model_dir=model_dir, shape_only=shape_only)
    archive = build_archive(
        name, weights, archive_format=archive_format, engine={"name": engine} if engine else None
    )
    print(f"{name}: archived as {shown(archive)}", flush=True)
    return archive


def build_archive(
    name: str,
    weights: Path,
    *,
    archive_format: str = DIRECTORY,
    engine: dict[str, Any] | None = None,
    store: Path = MODEL_STORE,
) -> Path:
    """Make the archive of an app and return its path; it replaces an existing one.

    Args:
        name: the APP, and the model's name in the URL.
        weights: a complete folder, as `get_weights` returns it.
        archive_format: one of `FORMATS`.
        engine: fields of `app.engine` that override the app's YAML.
        store: TorchServe's model store.

    Raises:
        UserError: the app's YAML is wrong, or torch-model-archiver failed.
    """
    check_format(archive_format)  # before anything is exported
    with temporary_folder() as temporary:
        prepared = prepare(name, weights, temporary / name, engine=engine)
        return pack_prepared(name, prepared, archive_format=archive_format, store=store)


def prepare(
    name: str,
    weights: Path,
    target: Path,
    *,
    engine: dict[str, Any] | None = None,
    gpu_image: bool = False,
) -> Path:
    """Write an archive's content apart from the handler: its configuration and the engine's files.

    Args:
        name: the APP.
        weights: a complete folder, as `get_weights` returns it.
        target: the folder to make; it replaces an existing one.
        engine: fields of `app.engine` that override the app's YAML.
        gpu_image: as `model_config`.

    Raises:
        UserError: the app's YAML is wrong, the tokenizer cannot be read, or the model cannot be
            exported.
    """
    app_yaml(name, local=True)  # a mistake in it is found sooner than one in the weights
    check_folder(weights)
    check_type(weights)
    # May reject the type.
    config, settings = model_config(name, weights, engine, gpu_image=gpu_image)
    check_checkpoint(weights)
    if names_no_end(weights) and not settings.stop_tokens:
        print(
            f"{shown(weights)}: names no eos_token_id, so a completion ends only at max_new_tokens "
            "or a stop string",
            flush=True,
        )
    if others := left_out(weights, weight_files(weights)):
        print(f"{shown(weights)}: leaving out {others}", flush=True)
    tokenizer = tokenizer_files(weights)
    shutil.rmtree(target, ignore_errors=True)
    if settings.name == "openvino":
        try:
            _place_export(weights, settings, tokenizer, target / WEIGHTS)
        except (ExportError, SelfCheckError) as error:
            shutil.rmtree(target, ignore_errors=True)
            if settings.chosen == NAMED:
                raise UserError(f"{error}; {OTHER_ENGINE}") from error
            print(f"{error}; using the transformers engine instead", flush=True)
            settings = settings.model_copy(update={"name": "transformers", "chosen": str(error)})
            config["app"]["engine"].update(name="transformers", chosen=str(error))
    if settings.name != "openvino":
        place(with_tokenizer(weight_files(weights), tokenizer), target / WEIGHTS)
    try:
        ModelFolder(target / WEIGHTS).end_tokens(settings.stop_tokens)
    except ValueError as error:
        shutil.rmtree(target)
        raise UserError(f"handler/apps/{name}.yaml: {error}") from error
    if config["responseTimeout"] is None:
        size = sum(path.stat().st_size for path in (target / WEIGHTS).iterdir())
        config["responseTimeout"] = tick_seconds(settings.name, size)
    (target / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    return target


def _place_export(
    weights: Path, settings: EngineConfig, tokenizer: list[Path], target: Path
) -> None:
    """Put the exported model and the tokenizer into a folder, with the record of their check.

    Raises:
        UserError: the model cannot be exported or checked.
        SelfCheckError: the export generates different text than the model.
    """
    exported = export(weights, settings)
    place(with_tokenizer(exported_files(exported), tokenizer), target)
    if settings.self_check:
        record = verify(weights, target, settings, exported)
        link_or_copy(record, target / RECORD)


def tick_seconds(engine: str, weight_bytes: int) -> int:
    """Return the time after which a tick counts as stuck: a factor for each GB of weights."""
    return max(TICK_SECONDS, math.ceil(TICK_SECONDS_PER_GB[engine] * weight_bytes / 1e9))


def model_config(
    name: str,
    weights: Path,
    engine: dict[str, Any] | None = None,
    *,
    gpu_image: bool = False,
) -> tuple[dict[str, Any], EngineConfig]:
    """Return the app's completed YAML for `model-config.yaml`, and its checked engine settings.

    Args:
        name: the APP.
        weights: a complete folder, as `get_weights` returns it.
        engine: fields of `app.engine` that override the app's YAML.
        gpu_image: whether the image `gpu` will serve, on a machine with a GPU, and not this one.

    Replaces `app.engine.name: auto` by the engine of the machine that will serve.
    """
    config = app_yaml(name, local=True)
    where = f"handler/apps/{name}.yaml"
    check_engine({"name": config["app"]["engine"].get("name")} | (engine or {}), where)
    settings = config["app"]["engine"]
    for key, value in (engine or {}).items():  # a section overrides field by field
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    if source_of(weights).get("source") == RANDOM:
        config["app"]["random_weights"] = True
    app = parse_app(config, where)
    try:
        default_parameters(app)
    except RequestError as error:
        raise UserError(f"{where}: {error}") from error
    chosen = app.engine
    if chosen.max_context is None and positions(read_object(weights / "config.json")) is None:
        chosen = chosen.model_copy(update={"max_context": _usual_context(weights, where)})
    if gpu_image:
        engine_name, why = choose_engine(chosen, weights, gpu=lambda: True, vllm=lambda: True)
    else:
        engine_name, why = choose_engine(chosen, weights)
    chosen = chosen.model_copy(update={"name": engine_name, "chosen": why})
    settings.update(name=chosen.name, chosen=why)
    if chosen.max_context:
        settings["max_context"] = chosen.max_context
    return config, chosen


def _usual_context(weights: Path, where: str) -> int:
    """Return the context for a model whose config.json names none, and print it."""
    from transformers import AutoConfig  # its classes have defaults

    length, source = None, ""
    with suppress(Exception):  # of a wrong value, which check_checkpoint will name
        config = AutoConfig.from_pretrained(weights, local_files_only=True, trust_remote_code=False)
        length = positions(config.to_dict())
        source = f"the default of model_type {config.model_type}"
    if length is None:
        length, source = CONTEXT, "our default"
        file = weights / "tokenizer_config.json"
        stored = read_object(file).get("model_max_length") if file.is_file() else None
        if isinstance(stored, int) and 2 <= stored < _NO_LENGTH:
            length, source = stored, "model_max_length of its tokenizer"
    print(
        f"{shown(weights)}: config.json names no context length; serving {length} tokens "
        f"({source}); app.engine.max_context in {where} changes it",
        flush=True,
    )
    return length
