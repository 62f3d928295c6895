"""Check a model's JSON files without loading the model: quantization, end tokens, architecture."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deploy.common.paths import UserError, shown

KEPT_METHODS = frozenset({"mxfp4"})
"""Values of `quant_method` that the `transformers` engine serves: transformers itself dequantizes
them, on a CPU too, with the locked packages. The `openvino` engine cannot export them."""

_UNQUANTIZED = (
    "which needs packages or hardware that this server does not have; use the model's checkpoint "
    "without quantization (float16 or bfloat16); `make archive` can make int8 or int4 weights of it"
)

_OTHER_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
"""Other files in which programs write the method."""

_LONGEST = 1000
"""Characters of a message."""

_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "n_positions", "n_embd", "n_layer", "n_head"),
    *("num_layers", "n_layers", "decoder_layers"),
)
"""Fields of config.json that count something."""

_MOST_LAYERS = 500
"""More than any model has. transformers creates all layers before it looks at the weights."""

_SWITCHES = frozenset({"do_sample", "ignore_eos", "include_stop_str_in_output"})
_NUMBERS = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty"),
        *("frequency_penalty", "max_length", "max_new_tokens", "min_new_tokens", "num_beams"),
        *("num_beam_groups", "diversity_penalty", "length_penalty", "num_return_sequences"),
        *("no_repeat_ngram_size", "num_assistant_tokens", "assistant_confidence_threshold"),
        *("max_ngram_size", "rng_seed", "logprobs"),
    }
)
"""Fields of generation_config.json that engines read. Source: GenAI's `GenerationConfig`."""

_NOT_TEXT = {
    "ForSequenceClassification": "classifies texts",
    "ForTokenClassification": "classifies tokens",
    "ForQuestionAnswering": "marks answers in a text",
    "ForMultipleChoice": "chooses between texts",
    "ForNextSentencePrediction": "compares sentences",
    "ForMaskedLM": "fills gaps in a text",
    "ForImageClassification": "classifies images",
    "ForSequenceClassificationReward": "rates texts",
    "ForRewardModel": "rates texts",
    "RewardModel": "rates texts",
    "ForTextEncoding": "makes embeddings",
    "EncoderModel": "makes embeddings",
}
"""Ends of the names of architectures that do not generate text, and what these models do."""


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file is not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{shown(path)}: is not a JSON object ({error}); download the file again"
        ) from error
    if not isinstance(value, dict):
        raise UserError(
            f"{shown(path)}: is not a JSON object but {_brief(value)}; download the file again"
        )
    return value


def check_config(folder: Path) -> None:
    """Refuse a model if its configuration files alone show that it is not served.

    Raises:
        UserError: the message names the field, its value and a remedy.
    """
    path = folder / "config.json"
    config = read_object(path)
    _check_quantization(folder, config)
    _check_architectures(path, config)
    _check_sizes(path, config)
    if "transformers_weights" in config:
        raise UserError(
            f"{shown(path)}: transformers_weights is {_brief(config['transformers_weights'])}; "
            "remove the field and call the file model.safetensors"
        )
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            _check_end(folder / name, config)
    if (folder / "generation_config.json").is_file():
        _check_generation(folder / "generation_config.json")


def quantization(folder: Path) -> str | None:
    """Return the method by which a checkpoint is quantized, in lower case; None if it is not."""
    found = _quantization(folder, read_object(folder / "config.json"))
    return found[1] if found else None


def names_no_end(folder: Path) -> bool:
    """Return whether no file names an end token."""
    for name, field in (
        ("generation_config.json", "eos_token_id"),
        ("config.json", "eos_token_id"),
        ("tokenizer_config.json", "eos_token"),
    ):
        path = folder / name
        if path.is_file() and read_object(path).get(field) not in (None, [], ""):
            return False
    return True


def _check_quantization(folder: Path, config: dict[str, Any]) -> None:
    found = _quantization(folder, config)
    if not found:
        return
    where, method, text = found
    if method in KEPT_METHODS and config.get("model_type") == "gpt_oss":
        return
    raise UserError(f"{shown(folder)}: {where} says {text}, {_UNQUANTIZED}")


def _quantization(folder: Path, config: dict[str, Any]) -> tuple[str, str, str] | None:
    """Return where a quantization is named, its method, and what to call it."""
    for where, value in _settings(config):
        if not isinstance(value, dict):
            return f"{where} in config.json", "unknown", f"{_brief(value)} (not an object)"
        if value.get("load_in_4bit") or value.get("_load_in_4bit"):
            return f"{where} in config.json", "bitsandbytes", "bitsandbytes (4 bits)"
        if value.get("load_in_8bit") or value.get("_load_in_8bit"):
            return f"{where} in config.json", "bitsandbytes", "bitsandbytes (8 bits)"
        bits = value.get("bits") or value.get("nbits") or value.get("w_bit")
        size = f" ({bits} bits)" if isinstance(bits, int) else ""
        method = value.get("quant_method") or value.get("quant_type") or value.get("quant_algo")
        if isinstance(method, str) and method:
            return f"{where} in config.json", method.lower(), f"quant_method {method}{size}"
        mlx = "weights quantized for MLX" if "group_size" in value else "no quant_method"
        return f"{where} in config.json", "unknown", f"{mlx}{size}"
    for name, method in _OTHER_FILES.items():
        if (folder / name).is_file():
            return name, method, f"that the weights are quantized ({method})"
    return None


def _settings(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of quantizations in a config and in its parts, with their names."""
    for name in ("quantization_config", "quantization", "compression_config"):
        if config.get(name) is not None:
            yield prefix + name, config[name]
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict) and "quant" not in key:
            yield from _settings(value, f"{prefix}{key}.")


def _check_architectures(path: Path, config: dict[str, Any]) -> None:
    """Refuse a model that does not generate text. Without `architectures`, accept any model."""
    names = config.get("architectures")
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"{shown(path)}: architectures is {_brief(names)}; it should be a list of names such "
            'as ["LlamaForCausalLM"]'
        )
    for name in names:
        for end, does in _NOT_TEXT.items():
            if name.endswith(end):
                raise UserError(_not_text(path, names, f"{does} and "))
    if not names or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return
    # The import takes seconds; most names need no look into the table.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if not {*names} & {*KNOWN.values()}:
        raise UserError(_not_text(path, names))


def _not_text(path: Path, names: list[str], does: str = "") -> str:
    what = f"{does}does not generate text" if does else "is not served as a text-generation model"
    return (
        f"{shown(path)}: architectures is {', '.join(names)}, which {what}; use a model whose "
        "architecture ends in ForCausalLM or LMHeadModel"
    )


def _check_sizes(path: Path, config: dict[str, Any]) -> None:
    """Refuse sizes that transformers accepts and no model has."""
    text = config.get("text_config")
    for part, prefix in ((config, ""), (text if isinstance(text, dict) else {}, "text_config.")):
        for name in _SIZES:
            value = part.get(name)
            layers = "layer" in name
            if isinstance(value, int) and (value < 1 or (layers and value > _MOST_LAYERS)):
                most = f" and at most {_MOST_LAYERS}" if layers else ""
                raise UserError(
                    f"{shown(path)}: {prefix}{name} is {_brief(value)}; it should be at least 1"
                    f"{most}: correct it, or download the file again"
                )


def _check_generation(path: Path) -> None:
    """Refuse settings of a wrong type, at which OpenVINO GenAI fails when it loads the model."""
    for name, value in read_object(path).items():
        kinds = (bool,) if name in _SWITCHES else (int, float) if name in _NUMBERS else None
        if kinds and value is not None and type(value) not in kinds:
            what = "true or false" if kinds == (bool,) else "a number"
            raise UserError(
                f"{shown(path)}: {name} is {_brief(value)}; it should be {what} or null, so "
                "correct the field or remove it"
            )


def _check_end(path: Path, config: dict[str, Any]) -> None:
    """Check `eos_token_id`: an id of the vocabulary, a list of them, or null."""
    value = read_object(path).get("eos_token_id")
    text = config.get("text_config")
    size = config.get("vocab_size") or (text.get("vocab_size") if isinstance(text, dict) else None)
    limit = size if isinstance(size, int) and size > 0 else None
    for token in value if isinstance(value, list) else [value]:
        if token is None and not isinstance(value, list):
            return
        if type(token) is not int or token < 0 or (limit and token >= limit):
            most = f" and below vocab_size, which is {limit}" if limit else ""
            raise UserError(
                f"{shown(path)}: eos_token_id is {_brief(value)}; it should be a token id (an "
                f"integer, at least 0{most}), a list of such ids, or null; correct the field "
                "or remove it"
            )


def printable(text: str) -> str:
    """Return a message as one line of moderate length: values from a download may hold anything."""
    line = "".join(c if c.isprintable() else "?" for c in text)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _brief(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
