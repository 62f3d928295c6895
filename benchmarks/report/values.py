"""Single numbers for sentences, computed from result files; `docs.generate` puts them in.

A value is the number alone: its unit stands in the sentence. `experiments.X` is the value of X in
`results/experiments.json`, which holds measurements that no program here repeats. `shapes.X` is
computed by `benchmarks.report.shapes` from `results/shapes.json`.
"""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.record import read
from benchmarks.report import shapes
from deploy.common.paths import UserError

SPEED = "tokens_per_second"
BUDGETS = ("1GiB", "2GiB", "4GiB")
CACHE = 30 * 2 * 3 * 64
"""Numbers that SmolLM2 caches for one token: layers, keys and values, heads, size of a head."""


def value(name: str) -> str:
    """Compute one value.

    Raises:
        UserError: there is no value of this name.
    """
    if name.startswith("experiments."):
        experiments = read("experiments")["measurements"]
        if (key := name.removeprefix("experiments.")) in experiments:
            return str(experiments[key]["value"])
    if name.startswith("shapes."):
        return shapes.value(read("shapes"), name.removeprefix("shapes."))
    if name not in VALUES:
        raise UserError(
            f"there is no value {name!r} in benchmarks/report/values.py or, as `experiments.`, "
            "in benchmarks/results/experiments.json"
        )
    return VALUES[name]()


def at(path: str, statistic: str | None = "median") -> Any:
    """Take `result file/key/key` out of its file.

    Args:
        path: the keys, the file's name first.
        statistic: which one of repeated measurements; None for a value that was not repeated.
    """
    name, *keys = path.split("/")
    found = read(name)["measurements"]
    for key in keys:
        found = found[key]
    return found[statistic] if statistic and isinstance(found, dict) else found


def rounds(path: str) -> list[float]:
    """Repeated measurements in the order of the rounds."""
    values: list[float] = at(path, "values")
    return values


def ratios(ours: str, other: str, quantity: str) -> list[float]:
    """Divide two systems of `serving.json` within each round."""
    mine, theirs = (rounds(f"serving/{name}/{quantity}") for name in (ours, other))
    pairs = zip(mine, theirs, strict=True)
    return [a / b for a, b in pairs]


def speedup(ours: str, other: str, clients: int) -> float:
    """Median of the ratios of throughput within the rounds."""
    return statistics.median(ratios(ours, other, f"{SPEED} {clients}"))


def first_token_to_vllm() -> list[float]:
    """Time to first token with 8 clients, divided by vLLM's."""
    return ratios("ours int8", "vllm", "first_token_seconds 8")


def kernel_times(model: str, sequences: int) -> list[float]:
    """Seconds of a decode step on the GPU in which kernels run, by round."""
    name = f"gpu/systems/{model} gpu"
    shares = rounds(f"{name}/share_of_time_in_kernels {sequences}")
    rates = rounds(f"{name}/{SPEED} {sequences}")
    return [share * sequences / rate for share, rate in zip(shares, rates, strict=True)]


def kernels_to_reading(model: str, sequences: int) -> float:
    """How many times as long kernels run as reading the weights would take."""
    name = f"gpu/systems/{model} gpu"
    reading = at(f"{name}/bytes") / at(f"{name}/bandwidth")
    return statistics.median(kernel_times(model, sequences)) / reading


def perplexity_change(row: str) -> float:
    """Per cent over float32's perplexity."""
    change: float = at(f"quality/rows/{row}/perplexity") / at("quality/rows/float32/perplexity") - 1
    return 100 * change


def warm_to_cold() -> list[float]:
    """How many times as fast offloaded layers are when the page cache holds them."""
    return [at(f"offload/{b} warm/{SPEED}") / at(f"offload/{b} cold/{SPEED}") for b in BUDGETS]


def disk_speeds() -> list[float]:
    """GB/s of the disk, median of each row under a budget."""
    rows = [row for row in at("offload", None) if not row.startswith("all")]
    return [at(f"offload/{row}/disk_bytes_per_second") / 1e9 for row in rows]


def share_of_disk(budget: str) -> float:
    """Share of the speed that the disk allows, with nothing in the page cache."""
    name = f"offload/{budget} cold"
    pairs = zip(rounds(f"{name}/{SPEED}"), rounds(f"{name}/disk_limit_{SPEED}"), strict=True)
    return statistics.median(rate / limit for rate, limit in pairs)


DOLLY = "large/engines/openvino int8"
SMALL_GPU, LARGE_GPU = "gpu/systems/smollm2 gpu", "gpu/systems/dolly gpu"

VALUES: dict[str, Callable[[], str]] = {
    "serving.speedup_8_clients": lambda: f"{speedup('ours int8', 'baseline', 8):.0f}",
    "serving.to_vllm_32": lambda: f"{speedup('ours int8', 'vllm', 32):.2f}",
    "serving.to_llama_1": lambda: f"{speedup('ours int8', 'llama.cpp Q8_0', 1):.2f}",
    "serving.int4_to_llama_1": lambda: f"{speedup('ours int4', 'llama.cpp Q4_0', 1):.2f}",
    "serving.first_token_to_vllm": lambda: f"{statistics.median(first_token_to_vllm()):.2f}",
    "serving.first_token_to_vllm_min": lambda: f"{min(first_token_to_vllm()):.2f}",
    "serving.first_token_to_vllm_max": lambda: f"{max(first_token_to_vllm()):.2f}",
    "serving.batched_32": lambda: f"{at(f'serving/batched/{SPEED} 32'):.0f}",
    "serving.transformers_32": lambda: f"{at(f'serving/ours transformers/{SPEED} 32'):.0f}",
    "startup.ready_to_engine": lambda: f"{at('startup/openvino/ready_to_engine'):.1f}",
    "startup.overhead_seconds": lambda: (
        f"{at('startup/openvino/ready_seconds') - at('startup/openvino/engine_seconds'):.0f}"
    ),
    "soak.memory_minutes": lambda: f"{at('soak/memory_minutes'):.0f}",
    "soak.memory_mb_per_minute": lambda: f"{at('soak/memory_mb_a_minute'):.1f}",
    "large.int8_bandwidth_share": lambda: f"{at(f'{DOLLY}/share_of_roofline'):.2f}",
    "large.export_memory_gb": lambda: f"{at('large/exports/openvino int8/peak_memory_gb'):.0f}",
    "large.int8_peak_memory_gb": lambda: f"{at(f'{DOLLY}/peak_memory_gb'):.0f}",
    "roofline.context_microseconds": lambda: f"{1e6 * at('roofline/context_seconds'):.1f}",
    "roofline.context_reading_microseconds": lambda: (
        f"{2e6 * CACHE / at('roofline/machine/bytes_per_second'):.1f}"
    ),
    "roofline.cache_kb_per_token": lambda: f"{2 * CACHE / 1000:.1f}",
    "quality.int8_perplexity_percent": lambda: f"{perplexity_change('int8'):.2f}",
    "quality.int8_weights_percent": lambda: (
        f"{perplexity_change('int8, dynamic quantization off'):.2f}"
    ),
    "quality.int8_other_choice_percent": lambda: (
        f"{100 * (1 - at('quality/rows/int8/same_choice')):.0f}"
    ),
    "quality.int4_percent": lambda: f"{perplexity_change('int4, groups of 64'):.0f}",
    "offload.cold_gb": lambda: f"{at('offload/1GiB cold/peak_memory_gb'):.1f}",
    "offload.cold_tokens_per_second": lambda: f"{at(f'offload/1GiB cold/{SPEED}'):.1f}",
    "offload.disk_share_min": lambda: f"{100 * min(map(share_of_disk, BUDGETS)):.0f}",
    "offload.disk_share_max": lambda: f"{100 * max(map(share_of_disk, BUDGETS)):.0f}",
    "offload.warm_to_cold_min": lambda: f"{min(warm_to_cold()):.0f}",
    "offload.warm_to_cold_max": lambda: f"{max(warm_to_cold()):.0f}",
    "offload.disk_gb_per_second_min": lambda: f"{min(disk_speeds()):.1f}",
    "offload.disk_gb_per_second_max": lambda: f"{max(disk_speeds()):.1f}",
    "gpu.small_cpu_to_gpu_1": lambda: (
        f"{at(f'roofline/points/decode 1/{SPEED}', 'max') / at(f'{SMALL_GPU}/{SPEED} 1'):.1f}"
    ),
    "gpu.large_gpu_to_cpu_1": lambda: (
        f"{at(f'{LARGE_GPU}/{SPEED} 1') / at(f'{DOLLY}/{SPEED} 1'):.1f}"
    ),
    "gpu.small_kernels_to_reading_1": lambda: f"{kernels_to_reading('smollm2', 1):.0f}",
    "gpu.large_kernels_to_reading_1": lambda: f"{kernels_to_reading('dolly', 1):.1f}",
    "gpu.large_kernels_to_reading_32": lambda: f"{kernels_to_reading('dolly', 32):.0f}",
    "image.lean_gb": lambda: f"{at('image/cpu-lean/bytes_without_weights') / 1e9:.2f}",
    "image.torchserve_gb": lambda: value("experiments.torchserve_image_gb"),
    "image.torchserve_gpu_gb": lambda: value("experiments.torchserve_gpu_image_gb"),
    "image.java_mb": lambda: f"{at('image/cpu-lean/bytes/Java') / 1e6:.0f}",
}
"""Name of a value -> the function that computes it."""
