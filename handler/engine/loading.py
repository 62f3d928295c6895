"""Load a folder of weights into memory: precision, devices, offload."""

import json
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from handler.config import TransformersConfig
from handler.memory import check_memory

logger = logging.getLogger(__name__)

_WEIGHTS = ("model*.safetensors", "*.safetensors", "*.bin")
"""Files with tensors. transformers reads the first kind that exists."""

_PACKED = {"mxfp4": 4}
"""Bytes in memory for each stored byte, by quantization method: 4 bits become bfloat16."""

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
_DTYPES |= {"BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8, "BOOL": torch.bool}
"""Names of types in safetensors. All others count as `torch.int64`, the largest."""

_SHOWN = 3
"""Tensors that a message names."""


def load_model(weights: Path, config: TransformersConfig) -> PreTrainedModel:
    """Load a causal language model, ready for inference.

    With `device_map: auto` accelerate fills GPUs first, then the RAM that is free, each within
    `max_memory` (for example `{0: 10GiB, cpu: 4GiB}`). The other layers stay on disk and are read
    again at every step, so the disk limits the throughput. Weights that are not in safetensors
    files are written to `offload_folder` for that.

    Source: accelerate's "big model inference", through transformers' `device_map`.

    Raises:
        ValueError: `max_memory` leaves room for no module at all, or the weights lack tensors.
        MemoryLimitError: the weights do not fit into the memory that this process may use.
    """
    if not config.max_memory and not torch.cuda.is_available():
        _check_memory(weights, config)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "local_files_only": True}
    options |= {"trust_remote_code": False, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # to name them; they are an error below
    if config.device_map:
        options["device_map"] = config.device_map
    if config.max_memory:
        options["max_memory"] = config.max_memory
    if config.offload_folder:
        Path(config.offload_folder).mkdir(parents=True, exist_ok=True)
    options["offload_folder"] = config.offload_folder or tempfile.mkdtemp(prefix="offload-")
    load: Any = AutoModelForCausalLM  # whose types leave output_loading_info out
    model, found = load.from_pretrained(weights, **options)
    _check_tensors(type(model).__name__, found)
    if not config.offload_folder:
        with suppress(OSError):  # safetensors are read where they are, so it has stayed empty
            Path(options["offload_folder"]).rmdir()
    if model.device.type == "meta" and not hasattr(model, "hf_device_map"):
        # transformers 5.5 attaches accelerate's hooks only where there are two places or more.
        needed = model.get_input_embeddings().weight.nbytes / 1e6
        raise ValueError(
            f"app.engine.transformers.max_memory: {config.max_memory} leaves no module in memory; "
            f"allow at least {needed:.0f}MB for the embeddings, and one layer more"
        )
    return model.eval()


def _check_tensors(name: str, found: dict[str, Any]) -> None:
    """Make sure that no tensor was missing: transformers would fill it with random numbers."""
    missing = sorted(found["missing_keys"])
    shapes = sorted(name for name, *_ in found["mismatched_keys"])
    for tensors, problem in ((missing, "are missing in"), (shapes, "have a different shape in")):
        if tensors:
            more = f" and {len(tensors) - _SHOWN} more" if len(tensors) > _SHOWN else ""
            raise ValueError(
                f"tensors of {name} {problem} the weights: {', '.join(tensors[:_SHOWN])}{more}; "
                "config.json and all weights must come from one model"
            )


def _check_memory(weights: Path, config: TransformersConfig) -> None:
    """Make sure that the weights fit. With `device_map`, accelerate puts on disk what does not fit
    into the machine's memory, but it does not know the limits of a container or a process.
    """
    stored = json.loads((weights / "config.json").read_text())
    method = (stored.get("quantization_config") or {}).get("quant_method", "none")
    itemsize: int = getattr(torch, config.dtype).itemsize
    size = 0
    for count, kind in _tensors(weights):
        stays = kind.itemsize * _PACKED.get(method, 1)
        size += count * (itemsize if kind.is_floating_point else stays)
    check_memory(
        f"the model in app.engine.transformers.dtype: {config.dtype} (app.engine.transformers."
        "max_memory: {cpu: ...} would leave layers on disk)",
        {"the model": size},
        machine=not config.device_map,
    )


def _tensors(weights: Path) -> Iterator[tuple[int, torch.dtype]]:
    """Read how many numbers each stored tensor has, and of what type."""
    files = next((found for pattern in _WEIGHTS if (found := list(weights.glob(pattern)))), [])
    for file in files:
        if file.suffix == ".bin":
            tensors = torch.load(file, map_location="meta", weights_only=True)
            yield from ((tensor.numel(), tensor.dtype) for tensor in tensors.values())
            continue
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 -- not a dict
                tensor = content.get_slice(name)
                yield math.prod(tensor.get_shape()), _DTYPES.get(tensor.get_dtype(), torch.int64)


def vocabulary(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model has an embedding for."""
    return int(cast(torch.Tensor, model.get_input_embeddings().weight).shape[0])


def device_summary(model: PreTrainedModel) -> str:
    """Say where the weights are: "cpu", or how many modules accelerate put where."""
    device_map = getattr(model, "hf_device_map", None)
    if not device_map or len(set(device_map.values())) == 1:
        return str(model.device)
    counts = Counter(str(device) for device in device_map.values())
    return " + ".join(f"{device} ({count} modules)" for device, count in counts.items())
