"""Check a checkpoint with transformers: it knows the model, and it finds every tensor.

transformers fills missing tensors with random numbers and ignores those that it does not expect.
Either way, the model generates nonsense. So this module loads the model onto the `meta` device,
which needs names and shapes but no data, and compares.

transformers takes seconds to import, so a folder that has passed is not checked again until its
files, a version or this module changes.
"""

import difflib
import hashlib
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.common.paths import BUILD, UserError, shown
from deploy.weights.config_json import printable, read_object
from deploy.weights.folder import weight_files

CHECKED = BUILD / "checked"
"""The folder of empty files, each named after the digest of a folder that passed."""

_NOT_PARAMETERS = re.compile(
    r"(inv_freq|(cos|sin)_cached|masked_bias|causal_mask|\.(attn|attention)\.bias"
    r"|position_ids|embed_positions\.weights|\.version)$"
)
"""Buffers that older programs saved: constants, not what the model learned."""

_SILENT = 100
"""A level of Python's logging above all others."""

_SINGLE = ("model.safetensors", "pytorch_model.bin")

_SHOWN = 3
"""Tensors that a message names."""


def check_type(folder: Path) -> None:
    """Make sure that transformers knows the type of the model, and that it generates text.

    Args:
        folder: one that `check_folder` accepts.

    Raises:
        UserError: the message names the type and a remedy.
    """
    if not _passed(folder).is_file():
        path = folder / "config.json"
        with _printable_errors():
            _check_type(path, read_object(path))


def check_checkpoint(folder: Path) -> None:
    """Make sure that transformers loads the model as it was saved: all tensors, and no others.

    Args:
        folder: one that `check_type` accepts.

    Raises:
        UserError: the model cannot be loaded or lacks tensors; the message names them and a remedy.
    """
    passed = _passed(folder)
    if passed.is_file():
        return
    with _printable_errors():
        _check(folder)
    CHECKED.mkdir(parents=True, exist_ok=True)
    passed.touch()


def _passed(folder: Path) -> Path:
    """Return the file that exists if the folder has passed and has not changed since."""
    return CHECKED / _key(folder)


@contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(printable(str(error))) from error


def _check(folder: Path) -> None:
    for index in (p for p in weight_files(folder) if p.name.endswith(".index.json")):
        if not isinstance(read_object(index).get("metadata"), dict):
            raise UserError(
                f"{shown(index)}: has no object metadata, which transformers needs; write "
                '"metadata": {} into it'
            )
    try:
        model, found = _load(folder)
        stored = _tensors(folder, "meta")
    except Exception as error:  # the code of a model's class may raise anything
        raise UserError(
            f"{shown(folder)}: transformers {version('transformers')} cannot load this model "
            f"({_one_line(error)}); correct config.json or generation_config.json if the reason "
            "names a field, or download all files again from one repository"
        ) from error
    _check_tensors(folder, model, found)
    parameters = {name for name, p in model.named_parameters() if p.is_floating_point()}
    _check_types(folder, parameters, stored)
    _check_numbers(folder, parameters)


def _load(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a model without its tensors' data, and return it with what was missing or left over."""
    import torch
    from torch.overrides import TorchFunctionMode

    class EqualWithoutData(TorchFunctionMode):
        """Call tensors without data equal: transformers ties a head only to an equal embedding.

        Either result loads all tensors.
        """

        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return True if func is torch.equal else func(*args, **(kwargs or {}))

    with _quiet(), EqualWithoutData():
        from transformers import AutoModelForCausalLM

        load: Any = AutoModelForCausalLM  # whose types leave output_loading_info out
        model, found = load.from_pretrained(
            folder,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them; they are an error all the same
            local_files_only=True,
            trust_remote_code=False,
        )
        return model, found


def _tensors(folder: Path, device: str) -> list[tuple[str, Any]]:
    """Return the stored tensors with their names: on "meta" without data, on "cpu" mapped."""
    from transformers.modeling_utils import load_state_dict

    stored: list[tuple[str, Any]] = []
    for path in weight_files(folder):
        if path.suffix in {".safetensors", ".bin"}:
            stored += load_state_dict(str(path), map_location=device).items()
    return stored


def _check_numbers(folder: Path, parameters: Collection[str]) -> None:
    """Refuse weights with NaN or infinity: OpenVINO GenAI generates an empty text from them."""
    import torch

    for name, tensor in _tensors(folder, "cpu"):
        if name in parameters or name.endswith(".weight"):
            total = tensor.sum(dtype=torch.float32)  # several times as fast as isfinite
            if not total.isfinite() and not tensor.isfinite().all():
                raise UserError(
                    f"{shown(folder)}: the tensor {name} has values that are not numbers (NaN) or "
                    "infinite, so the weights are damaged; download them again, or take an "
                    "earlier checkpoint of the training"
                )


def _check_types(folder: Path, parameters: Collection[str], stored: list[tuple[str, Any]]) -> None:
    """Refuse weights that are not floating point: transformers would cast them without scales."""
    import torch

    usual = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for name, tensor in stored:
        dtype = getattr(tensor, "dtype", None)
        weight = name in parameters or name.endswith(".weight")
        if weight and dtype is not None and dtype not in usual:
            raise UserError(
                f"{shown(folder)}: the tensor {name} is stored as {str(dtype).split('.')[-1]}, "
                "and config.json has no quantization_config that says how to dequantize it; use "
                "the model's checkpoint in float16, bfloat16 or float32"
            )


_SAME_SOURCE = (
    "config.json and the weights should come from one model, so download both again from one "
    "repository"
)


def _check_type(path: Path, config: dict[str, Any]) -> None:
    """Check that transformers has a class for this model, and that it generates text."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES as KNOWN

    kind, names = config.get("model_type"), config.get("architectures") or []
    ours = f"transformers {version('transformers')}"
    if isinstance(kind, str) and kind and kind not in KNOWN:
        if "auto_map" in config:
            raise UserError(
                f"{shown(path)}: model_type {kind} needs code from the model's repository "
                "(auto_map), and trust_remote_code is not offered, because that code would run "
                f"with the server's permissions; use a model that {ours} knows without such code"
            )
        close = difflib.get_close_matches(kind, KNOWN, 1, 0.8)
        alike = f" (if the architecture is that of {close[0]}, write {close[0]})" if close else ""
        raise UserError(
            f"{shown(path)}: model_type is {kind}, which {ours} does not know; use a model of a "
            f"type that it knows, such as llama, qwen3 or gemma3{alike}"
        )
    # Twice as slow to import as the table above.
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    classes: dict[str, str] = dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if not isinstance(kind, str) or not kind:
        types = [known for known, name in classes.items() if name in names]
        shortest = min(types, key=len, default="")  # llama, not code_llama
        write = f'write "model_type": "{shortest}" into it' if types else "add it"
        given = "has no model_type" if kind is None else f"model_type is {kind!r}, not a name"
        raise UserError(
            f"{shown(path)}: {given}, which says what architecture the weights have; {write}, or "
            "download the file again"
        )
    what = f"{shown(path)}: model_type is {kind}" + (f" ({', '.join(names)})" if names else "")
    use = "use a model that generates text, with an architecture that ends in ForCausalLM"
    if kind not in classes:
        raise UserError(f"{what}, which {ours} does not load as a model that generates text; {use}")
    if config.get("is_encoder_decoder"):
        raise UserError(f"{what}, an encoder-decoder, which is not served; {use}")
    decoder = config.get("is_decoder") or config.get("causal")
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder:
        raise UserError(f"{what}, an encoder, which fills gaps in a text; {use}")
    others = {*names} & {*classes.values()}
    if others and classes[kind] not in names:
        raise UserError(
            f"{what}, but the class of model_type {kind} is {classes[kind]}, which reads the same "
            "weights differently; correct model_type or architectures in it"
        )


def _check_tensors(folder: Path, model: Any, found: dict[str, Any]) -> None:
    """Refuse missing tensors, other shapes, and tensors that the model should have had."""
    kind = type(model).__name__
    errors = [_one_line(error) for error in found.get("error_msgs") or []]
    if errors:
        raise UserError(
            f"{shown(folder)}: transformers cannot load this model ({errors[0]}); {_SAME_SOURCE}"
        )
    if shapes := sorted(found["mismatched_keys"]):
        name, stored, wanted = shapes[0]
        more = f" (and {len(shapes) - 1} more)" if len(shapes) > 1 else ""
        raise UserError(
            f"{shown(folder)}: the tensor {name}{more} has the shape {_shape(stored)} in the "
            f"weights, but {_shape(wanted)} by config.json; {_SAME_SOURCE}"
        )
    unexpected = sorted(found["unexpected_keys"])
    if missing := sorted(found["missing_keys"]):
        if prefix := _prefix(missing, unexpected):
            raise UserError(
                f"{shown(folder)}: the names of the tensors begin with {prefix!r} "
                f"({unexpected[0]}), which a wrapper around the model wrote; save the model inside "
                "it with save_pretrained, or rename the tensors"
            )
        others = (
            f", and {_some(unexpected)} {_are(unexpected)} not part of it" if unexpected else ""
        )
        raise UserError(
            f"{shown(folder)}: {_some(missing)} of {kind} {_are(missing)} missing in the weights"
            f"{others}; {_hidden(folder)}download all files again, or save the model again with "
            "save_pretrained"
        )
    parts = {name for name, _ in model.named_modules()}
    if cut := [name for name in unexpected if _belongs(name, model, parts)]:
        raise UserError(
            f"{shown(folder)}: {_some(cut)} {_are(cut)} in the weights, but {kind} by config.json "
            f"does not use {'it' if len(cut) == 1 else 'them'}; {_SAME_SOURCE}"
        )


def _hidden(folder: Path) -> str:
    """Return which weights to remove, if transformers ignores others because of them."""
    forms = [f"{name}{end}" for name in _SINGLE for end in ("", ".index.json")]
    read, *others = [name for name in forms if (folder / name).is_file()]
    if not others:
        return ""
    return f"remove {read} if {others[0]} is complete (transformers reads only {read}), or "


def _prefix(missing: list[str], unexpected: list[str]) -> str:
    """Return the prefix that turns each missing name into an unexpected one; empty if none does."""
    first = next((name for name in unexpected if name.endswith(missing[0])), "")
    prefix = first.removesuffix(missing[0])
    return prefix if prefix and {prefix + name for name in missing} <= {*unexpected} else ""


def _belongs(name: str, model: Any, parts: set[str]) -> bool:
    """Return whether an unexpected tensor is a part of the model that config.json leaves out.

    It is if the model has its module, its layer, or the same kind of layer with other numbers.
    Heads, vision towers and layers that predict several tokens are not parts of the model.
    """
    if _NOT_PARAMETERS.search(name):
        return False
    parents = name.split(".")[:-1]
    prefixes = [".".join(parents[: i + 1]) for i in range(len(parents))]
    if prefixes and prefixes[-1] in parts:
        return True
    for prefix, part in zip(prefixes, parents, strict=True):
        if part.isdecimal():
            if prefix in parts:
                return True
            above = prefix.rpartition(".")[0]
            if above in parts:
                extra = getattr(model.config.get_text_config(), "num_nextn_predict_layers", 0) or 0
                layers = sum(p.rpartition(".")[0] == above for p in parts)
                return int(part) >= layers + extra
            return False
    return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' reports and progress bars off the user's terminal."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(_SILENT)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _key(folder: Path) -> str:
    parts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in weight_files(folder)]
    parts += [version("transformers"), version("torch"), Path(__file__).read_text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _some(names: Iterable[str]) -> str:
    all_names = list(names)
    more = f" and {len(all_names) - _SHOWN} more" if len(all_names) > _SHOWN else ""
    return f"{'tensor' if len(all_names) == 1 else 'tensors'} {', '.join(all_names[:_SHOWN])}{more}"


def _are(names: list[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(str(size) for size in sizes) or "of a single number"


def _one_line(error: object) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]).rstrip(".")
    if "CONVERSION" in text:  # transformers' report names them, but has many lines
        text = "tensors of its experts are missing or have different shapes"
    if " " not in text:
        text = f"{type(error).__name__} {text}"
    return text if len(text) <= 200 else f"{text[:197]}..."
