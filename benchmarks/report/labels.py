"""How tables, plots and chapters name the systems and settings of the result files."""

import re

SYSTEMS = {
    "ours int8": "this handler, int8",
    "ours int4": "this handler, int4",
    "ours transformers": "this handler, transformers bfloat16",
    "direct int8": "the engine alone, int8",
    "direct int4": "the engine alone, int4",
    "vllm": "vLLM, bfloat16",
    "llama.cpp Q8_0": "llama.cpp, 8 bits",
    "llama.cpp Q4_0": "llama.cpp, 4 bits",
    "batched": "baseline handler, dynamic batching",
    "baseline": "baseline handler",
}
"""Name of a system in results/serving.json -> its name for readers."""
SHAPED = {name: SYSTEMS[name] for name in ("ours int8", "vllm", "llama.cpp Q8_0")}
"""The systems of results/shapes.json."""


def singular(name: str) -> str:
    """Write `1 clients`, as result files name it, as `1 client`."""
    return re.sub(r"\b1 (client|sequence)s\b", r"1 \1", name)


def spaced(budget: str) -> str:
    """Write `1GiB`, as accelerate takes it, as `1 GiB`."""
    return budget.replace("GiB", " GiB")
