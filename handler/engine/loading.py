"""Load a folder of weights into memory: precision, devices, offload."""

import json
import logging
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from handler.config import TransformersConfig
from handler.memory import check_memory

logger = logging.getLogger(__name__)

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def load_model(weights: Path, config: TransformersConfig) -> PreTrainedModel:
    """Load a causal language model, ready for inference.

    With `device_map: auto` accelerate fills GPUs first, then the RAM that is free, each within
    `max_memory` (for example `{0: 10GiB, cpu: 4GiB}`). The other layers stay on disk and are read
    again at every step, so the disk limits the throughput. Weights that are not in safetensors
    files are written to `offload_folder` for that.

    Source: accelerate's "big model inference", through transformers' `device_map`.

    Raises:
        ValueError: `max_memory` leaves room for no module at all.
        MemoryLimitError: the weights do not fit into the memory that this process may use.
    """
    if not config.max_memory and not torch.cuda.is_available():
        _check_memory(weights, config)
    options: dict[str, Any] = {"dtype": getattr(torch, config.dtype), "local_files_only": True}
    if config.device_map:
        options["device_map"] = config.device_map
    if config.max_memory:
        options["max_memory"] = config.max_memory
    if config.offload_folder:
        Path(config.offload_folder).mkdir(parents=True, exist_ok=True)
    options["offload_folder"] = config.offload_folder or tempfile.mkdtemp(prefix="offload-")
    model = AutoModelForCausalLM.from_pretrained(weights, **options).eval()
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
    return model


def _check_memory(weights: Path, config: TransformersConfig) -> None:
    """Make sure that the weights fit. With `device_map`, accelerate puts on disk what does not fit
    into the machine's memory, but it does not know the limits of a container or a process.
    """
    stored = json.loads((weights / "config.json").read_text())
    name = stored.get("dtype") or stored.get("torch_dtype") or "float32"
    size = sum(p.stat().st_size for pattern in _WEIGHTS for p in weights.glob(pattern))
    scale = getattr(torch, config.dtype).itemsize / getattr(torch, name, torch.float32).itemsize
    check_memory(
        f"the model in app.engine.transformers.dtype: {config.dtype} (app.engine.transformers."
        "max_memory: {cpu: ...} would leave layers on disk)",
        {"the model": round(size * scale)},
        machine=not config.device_map,
    )


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
