"""Make the archive of an APP from its weights and its YAML.

The archive is self-contained: the handler's package, the app's completed YAML as
`model-config.yaml`, and the weights in the form that the engine loads.
"""

import math
import shutil
from pathlib import Path
from typing import Any

import yaml

from deploy.archive.export import choose_engine, export, exported_files, trace
from deploy.archive.pack import CONFIG, DIRECTORY, WEIGHTS, pack_prepared, place
from deploy.archive.tokenizer import tokenizer_files, with_tokenizer
from deploy.archive.verify import verify
from deploy.common.paths import MODEL_STORE, UserError, link_or_copy, shown, temporary_folder
from deploy.weights.checkpoint import check_checkpoint
from deploy.weights.config_json import names_no_end
from deploy.weights.fetch import get_weights
from deploy.weights.folder import RANDOM, check_folder, left_out, source_of, weight_files
from handler.config import EngineConfig, app_yaml, check_engine, parse_app
from handler.engine.self_check import RECORD
from handler.request import RequestError, default_parameters

TICK_SECONDS = 15
"""What a tick may take with a small model; usually it takes a tenth of a second."""

TICK_SECONDS_PER_GB = {"openvino": 20, "transformers": 40}
"""The longest part of a tick is prefill. On two slow cores, at 50 GFLOP/s, openvino's 128 tokens
take 5 s for each GB of int8 weights. With transformers, the 2,048 tokens of dolly-v2-3b take 20 s
for each GB of float32 weights and 40 s for 16-bit weights. Reading layers from a slow disk takes
10 s for each GB."""


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
        UserError: as `get_weights` and `build_archive`.
    """
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
    with temporary_folder() as temporary:
        prepared = prepare(name, weights, temporary / name, engine=engine)
        return pack_prepared(name, prepared, archive_format=archive_format, store=store)


def prepare(
    name: str, weights: Path, target: Path, *, engine: dict[str, Any] | None = None
) -> Path:
    """Write an archive's content apart from the handler: its configuration and the engine's files.

    Args:
        name: the APP.
        weights: a complete folder, as `get_weights` returns it.
        target: the folder to make; it replaces an existing one.
        engine: fields of `app.engine` that override the app's YAML.

    Raises:
        UserError: the app's YAML is wrong, the tokenizer cannot be read, or the model cannot be
            exported.
    """
    app_yaml(name, local=True)  # a mistake in it is found sooner than one in the weights
    check_folder(weights)
    check_checkpoint(weights)
    config, settings = model_config(name, weights, engine)
    if names_no_end(weights) and not settings.stop_tokens:
        print(
            f"{shown(weights)}: names no eos_token_id, so a completion ends only at max_new_tokens "
            "or a stop string",
            flush=True,
        )
    if others := left_out(weights, weight_files(weights)):
        print(f"{shown(weights)}: leaving out {others}", flush=True)
    tokenizer = tokenizer_files(weights)
    if settings.name == "openvino":
        exported = export(weights, settings)
        files = exported_files(exported)
    else:
        files = weight_files(weights)
    if config["responseTimeout"] is None:
        config["responseTimeout"] = tick_seconds(
            settings.name, sum(path.stat().st_size for path in files)
        )
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    (target / CONFIG).write_text(yaml.safe_dump(config, sort_keys=False))
    place(with_tokenizer(files, tokenizer), target / WEIGHTS)
    if settings.name == "openvino" and settings.self_check:
        record = verify(
            weights, target / WEIGHTS, settings, exported=exported, traced=trace(weights)
        )
        link_or_copy(record, target / WEIGHTS / RECORD)
    return target


def tick_seconds(engine: str, weight_bytes: int) -> int:
    """Return the time after which a tick counts as stuck: a factor for each GB of weights."""
    return max(TICK_SECONDS, math.ceil(TICK_SECONDS_PER_GB[engine] * weight_bytes / 1e9))


def model_config(
    name: str, weights: Path, engine: dict[str, Any] | None = None
) -> tuple[dict[str, Any], EngineConfig]:
    """Return the app's completed YAML for `model-config.yaml`, and its checked engine settings.

    Replaces `app.engine.name: auto` by the engine that this machine's weights are prepared for.
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
    chosen, why = choose_engine(app.engine, weights)
    settings.update(name=chosen, chosen=why)
    return config, app.engine.model_copy(update={"name": chosen})
