"""Which models the engines `openvino` and `vllm` serve, by config.json alone.

OpenVINO GenAI replaces a model's attention with its paged attention, and can lose what it does not
recognize, without any error. So the engine serves only the model types that `tests/families`
compares with transformers. After an update of the libraries, those tests also show which entries
can change. The tables hold for optimum-intel 2.2, openvino-genai 2026.4 and transformers 5.5.

vLLM rejects a model that it does not know, so for it the table is its own list of architectures, as
model types. A test compares it with vLLM 0.32.0 where that is installed.
"""

from pathlib import Path
from typing import Any

from deploy.weights.config_json import quantization, read_object
from handler.engine.positions import positions

SERVED = frozenset(
    {
        *("afmoe", "arcee", "biogpt", "bloom", "codegen", "cohere", "cohere2", "falcon", "glm4"),
        *("gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite"),
        *("granitemoe", "hunyuan_v1_dense", "llama", "mistral", "mixtral"),
        *("olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe"),
        *("qwen3", "qwen3_moe", "smollm3", "stablelm", "starcoder2"),
    }
)
"""Types that are served correctly, except for the cases that `unsupported` names."""

LEFT_OUT = {
    "mpt": "OpenVINO GenAI loses its ALiBi positions",
    "granitemoehybrid": "OpenVINO GenAI generates different text if several layers have attention",
    **dict.fromkeys(("gpt_neox_japanese", "xglm"), "OpenVINO GenAI has no paged attention for it"),
    **dict.fromkeys(
        ("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "mbart", "pegasus"),
        "it is an encoder-decoder",
    ),
}
"""Types that optimum-intel exports, and why they are not served."""

VLLM = frozenset(
    {
        *("afmoe", "apertus", "arcee", "bloom", "code_llama", "cohere", "cohere2", "cwm"),
        *("dbrx", "deepseek_v2", "deepseek_v3", "ernie4_5", "ernie4_5_moe", "exaone4"),
        *("exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "gemma", "gemma2"),
        *("gemma3_text", "gemma3n_text", "gemma4_text", "glm", "glm4", "glm4_moe"),
        *("glm4_moe_lite", "glm_moe_dsa", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox"),
        *("gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared"),
        *("hunyuan_v1_dense", "hunyuan_v1_moe", "jais2", "jamba", "lfm2", "lfm2_moe", "llama"),
        *("llama4", "llama4_text", "longcat_flash", "mamba", "mamba2", "minimax_m2"),
        *("ministral3", "mistral", "mixtral", "nemotron", "nemotron_h", "olmo", "olmo2"),
        *("olmo3", "olmo_hybrid", "olmoe", "opt", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3"),
        *("qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe"),
        *("qwen3_next", "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma"),
        "zamba2",
    }
)
"""Types whose architecture vLLM lists for generating text."""


def unsupported_by_vllm(weights: Path) -> str | None:
    """Return why the `vllm` engine cannot serve a model; None if it can, as far as we know."""
    kind = read_object(weights / "config.json").get("model_type")
    if kind in VLLM:
        return None
    return f"the vllm engine does not serve model_type {kind}: vLLM does not list it"


def unsupported(weights: Path, max_context: int | None) -> str | None:
    """Return why the `openvino` engine cannot serve a model correctly; None if it can.

    Args:
        weights: the model's folder.
        max_context: the setting; None for all positions of the model.
    """
    config = read_object(weights / "config.json")
    kind = config.get("model_type")
    if kind not in SERVED:
        why = LEFT_OUT.get(str(kind), "optimum-intel cannot export it with these versions")
        return f"the openvino engine does not serve model_type {kind}: {why}"
    if method := quantization(weights):
        return f"the openvino engine does not serve weights quantized with {method}"
    if kind == "falcon" and config.get("alibi"):
        return "the openvino engine does not serve Falcon with alibi: OpenVINO GenAI loses it"
    heads = config.get("num_attention_heads")
    if kind == "phi" and config.get("num_key_value_heads", heads) not in (None, heads):
        return (
            "the openvino engine does not serve Phi with num_key_value_heads below "
            "num_attention_heads"
        )
    if kind == "qwen3_moe" and not config.get("head_dim"):
        return "the openvino engine does not serve Qwen3-MoE without head_dim in config.json"
    if kind == "gpt_neo" and _has_local_attention(config):
        window = config.get("window_size", 256)
        length = min(filter(None, (positions(config), max_context)), default=window + 1)
        if length > window:
            return (
                f"the openvino engine serves GPT-Neo only up to its window of {window} tokens "
                f"(app.engine.max_context), not {length}: OpenVINO GenAI loses the window"
            )
    return None


def _has_local_attention(config: dict[str, Any]) -> bool:
    types = config.get("attention_types", "local")  # global and local layers, if not stated
    return "local" in str(types) or "local" in str(config.get("attention_layers"))
