"""Recognize folders that hold a model in a form that the engines do not load, and name a remedy."""

import json
import re
from pathlib import Path

from deploy.common.paths import shown

_ORIGINAL = "name a folder with the original checkpoint in Hugging Face layout (config.json and "
_ORIGINAL += "*.safetensors)"

GGUF = (
    "holds GGUF, the format of llama.cpp ({file}); " + _ORIGINAL + ", or convert it with "
    "transformers: AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={file!r})"
    ".save_pretrained(NEW_FOLDER), and copy the original model's tokenizer.json and "
    "tokenizer_config.json into NEW_FOLDER"
)
"""What to do with a {file} of llama.cpp."""

_FORMATS = {
    "*.gguf": GGUF,
    "consolidated*.pth": (
        "holds a model in Meta's own layout ({file}); download the same model in Hugging Face "
        "layout (config.json and model*.safetensors, beside the folder `original` on the Hub)"
    ),
    "consolidated*.safetensors": (
        "holds a model in Mistral's own layout ({file}); download the files in Hugging Face "
        "layout (config.json and model*.safetensors) of the same repository"
    ),
    "openvino_*.xml": "holds a model that is already exported for OpenVINO ({file}); "
    + _ORIGINAL
    + ", which `make archive` exports itself",
    "*.onnx": "holds only an ONNX model ({file}); " + _ORIGINAL,
    "tf_model*.h5": "holds only TensorFlow weights ({file}), which this version of "
    "transformers does not read; " + _ORIGINAL,
    "*.weights.h5": "holds only Keras weights ({file}); " + _ORIGINAL,
    "*.keras": "holds only a Keras model ({file}); " + _ORIGINAL,
    "saved_model.pb": "holds only a TensorFlow model ({file}); " + _ORIGINAL,
    "*.ckpt.index": "holds only a TensorFlow checkpoint ({file}); " + _ORIGINAL,
    "flax_model*.msgpack": "holds only Flax weights ({file}), which this version of "
    "transformers does not read; " + _ORIGINAL,
    "_CHECKPOINT_METADATA": "holds only an Orbax checkpoint of JAX ({file}); " + _ORIGINAL,
    "zero_to_fp32.py": "holds a checkpoint of DeepSpeed, in pieces ({file}); join them with "
    "`python {file} . OUT --safe_serialization` there, and put config.json and the tokenizer "
    "beside the result",
    "*.distcp": "holds a distributed checkpoint of PyTorch, in pieces ({file}); join them with "
    "`accelerate merge-weights FOLDER OUT`, and put config.json and the tokenizer beside the "
    "result",
    "*.nemo": "holds a NeMo archive ({file}); " + _ORIGINAL,
    "*.npz": "holds weights for MLX ({file}); " + _ORIGINAL,
    "*.engine": "holds an engine of TensorRT-LLM ({file}); " + _ORIGINAL,
    "*.task": "holds a model for MediaPipe ({file}); " + _ORIGINAL,
    "*.litertlm": "holds a model for LiteRT ({file}); " + _ORIGINAL,
    "*.tflite": "holds a model for TensorFlow Lite ({file}); " + _ORIGINAL,
    "*.llamafile": "holds a llamafile, which is GGUF and a program ({file}); " + _ORIGINAL,
    "*.mlpackage": "holds a Core ML model ({file}); " + _ORIGINAL,
    "rust_model.ot": "holds only weights for Rust ({file}); " + _ORIGINAL,
    "*.ckpt": "holds a training checkpoint ({file}); load it in its training program and write it "
    "with save_pretrained",
    "lit_model.pth": "holds a model of LitGPT ({file}); convert it with "
    "`litgpt convert_from_litgpt`, and put config.json and the tokenizer beside the result",
    "*.mar": "holds a finished archive ({file}); name the model's folder that it was made from",
    "*.zip": "holds a compressed file ({file}); unpack it and name the folder with config.json",
    "*.tar*": "holds a compressed file ({file}); unpack it and name the folder with config.json",
    "*.tgz": "holds a compressed file ({file}); unpack it and name the folder with config.json",
    "*.incomplete": "holds an incomplete download ({file}); run the download again",
    "*.part": "holds an incomplete download ({file}); run the download again",
    "*.crdownload": "holds an incomplete download ({file}); run the download again",
    "*.pth": "holds weights in an unknown layout ({file}); load them in the program that wrote "
    "them and write the model with save_pretrained",
    "*.pt": "holds weights in an unknown layout ({file}); load them in the program that wrote "
    "them and write the model with save_pretrained",
}
"""Messages about folders without a model in Hugging Face layout, by file. The first match counts,
so the most specific files come first."""

_OF_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args")
"""Beginnings of the names of files beside a model that only its training reads."""

_WEIGHTS = {".safetensors", ".bin"}
_CTRANSLATE2 = ("vocabulary.json", "vocabulary.txt", "shared_vocabulary.json")

_MERGED = {"LORA", "LOHA", "LOKR", "ADALORA", "OFT", "BOFT", "IA3", "VERA", "FOURIERFT", "HRA"}
"""Adapters of peft that `merge_and_unload` can merge. Source: peft's `PeftType`."""

_SHOWN = 3


def adapter(folder: Path) -> str | None:
    """Return why a folder with an adapter of peft is refused; None without one.

    An adapter beside a complete model is refused, too. Without peft, transformers would silently
    serve the base model.
    """
    path = folder / "adapter_config.json"
    files = sorted(p.name for p in folder.glob("adapter_model*.*"))
    if not path.is_file() and not files:
        return None
    settings = _object(path)
    kind = str(settings.get("peft_type") or "LORA").upper()
    base = settings.get("base_model_name_or_path")
    named = f" for {base}" if isinstance(base, str) and base else ""
    what = f"holds a {kind} adapter{named} ({path.name if path.is_file() else files[0]})"
    if kind not in _MERGED:
        what += ", which cannot be merged into its model; " + _ORIGINAL
    else:
        what += (
            ", which cannot be served without its model; merge it with peft ("
            "AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload()"
            ".save_pretrained(NEW_FOLDER)), copy the tokenizer's files into NEW_FOLDER, "
            "and name that folder"
        )
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    beside = any(not path.name.startswith("adapter_model") for path in weights)
    if (folder / "config.json").is_file() and beside:
        what += "; to serve the base model without it, move the adapter's files out of the folder"
    return what


def other_kind(folder: Path) -> str | None:
    """Return why a folder is refused if its index file shows that it generates no text."""
    if (folder / "model_index.json").is_file():
        name = _object(folder / "model_index.json").get("_class_name", "a pipeline")
        return f"holds a pipeline of diffusers ({name} in model_index.json), which makes images; "
    if (folder / "modules.json").is_file():
        return "holds a model of sentence-transformers (modules.json), which makes embeddings; "
    return None


def without_model(folder: Path, missing: str) -> str:
    """Return what a folder without a model in Hugging Face layout holds, and what to do.

    Args:
        folder: an existing folder.
        missing: what this folder lacks and a model's folder has, such as "config.json".
    """
    if inner := _nested(folder):
        more = f" (or {', '.join(map(shown, inner[1:_SHOWN]))})" if len(inner) > 1 else ""
        return (
            f"has no {missing}, but a folder inside it holds a model; name {shown(inner[0])}{more}"
        )
    names = sorted(p.name for p in folder.iterdir() if p.name not in {".git", ".gitattributes"})
    if not names:
        return "is empty; name a folder in Hugging Face layout (config.json and *.safetensors)"
    for pattern, text in _FORMATS.items():
        for depth in ("", "*/"):
            found = sorted(folder.glob(depth + pattern))
            if found := [p for p in found if not p.name.startswith(_OF_TRAINING)]:
                return text.format(file=str(found[0].relative_to(folder)))
    if (folder / "params.json").is_file():
        return _FORMATS["consolidated*.pth"].format(file="params.json")
    weights = [p.name for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in _WEIGHTS]
    if any(name in names for name in _CTRANSLATE2) and "model.bin" in weights:
        return f"holds a model for CTranslate2 (model.bin); {_ORIGINAL}"
    if weights and missing == "config.json":
        return f"has no {missing}; download it from the same repository as the weights"
    if model := next((name for name in weights if "model" in name), None):
        return (
            f"has {model}, but the engines read model.safetensors or pytorch_model.bin; rename the "
            "file if it is one of these, or name a folder with the original checkpoint"
        )
    if index := next((name for name in names if name.endswith(".index.json")), None):
        return f"has no {missing}; download the files that {index} names"
    if "config.json" in names:
        return f"has no {missing}; download the weights from the repository of config.json"
    more = " ..." if len(names) > _SHOWN else ""
    return (
        f"has no {missing} (it holds {', '.join(names[:_SHOWN])}{more}); name a folder in Hugging "
        "Face layout (config.json and *.safetensors)"
    )


def _nested(folder: Path) -> list[Path]:
    """Return folders with a model inside this one, the newest training step or revision first."""
    patterns = ("*", "snapshots/*", "*/snapshots/*", "hub/*/snapshots/*", "*/*")
    for pattern in patterns:
        found = {
            p.parent
            for name in ("config.json", "adapter_config.json")
            for p in folder.glob(f"{pattern}/{name}")
            if not any(part.startswith(".") for part in p.relative_to(folder).parts)
            and (any(p.parent.glob("*.safetensors")) or any(p.parent.glob("*.bin")))
        }
        if found:
            return sorted(found, key=_age, reverse=True)
    return []


def _age(folder: Path) -> tuple[bool, int, float]:
    """Sort the revision that the Hub's cache calls main last, then steps, then the date."""
    main = folder.parents[1] / "refs" / "main"
    current = main.is_file() and main.read_text().strip() == folder.name
    step = re.search(r"-(\d+)$", folder.name)
    return current, int(step[1]) if step else -1, folder.stat().st_mtime


def _object(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
