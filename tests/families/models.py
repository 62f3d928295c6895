"""Tiny checkpoints of many architectures, with real configurations and random weights.

A family is a model type of transformers, with a configuration that is small and uses what is
special about the type: a sliding window shorter than the prompts, state-space layers, ALiBi. The
weights make greedy completions diverse, so that an error in a position, a mask or a state changes
them. The weights are exact in float16, so that every engine can have the same ones.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny import ascii_tokenizer

PROMPT = "Once upon a time"
NEW_TOKENS = 20
WINDOW = 8
"""Tokens of a sliding window, fewer than `PROMPT` has."""

_SMALL: dict[str, Any] = {
    **{"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    # Sizes, by the names that configurations use for them.
    **dict.fromkeys(["hidden_size", "n_embd", "d_model"], 64),
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "decoder_layers"], 3),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "decoder_attention_heads"], 4),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "d_ff", "decoder_ffn_dim"], 128),
    **{"num_key_value_heads": 2, "head_dim": 16},
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 512),
    **{"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 128},
    # Mixtures of experts.
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts"], 4),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 32),
    **{"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
    # Latent attention of DeepSeek.
    **{"q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    # State-space layers.
    **dict.fromkeys(["state_size", "mamba_d_state"], 8),
    **dict.fromkeys(["mamba_n_heads", "mamba_d_head"], 8),
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 16, "linear_value_head_dim": 16},
    **{"use_mamba_kernels": False},
    **{"sliding_window": WINDOW, "is_decoder": True, "tie_word_embeddings": False},
}
"""Values for every configuration that has a field with this name."""


class Family(NamedTuple):
    """A model type, and its configuration's values besides `_SMALL`."""

    model_type: str
    values: dict[str, Any] = {}


def _rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **values}}


_LONGROPE = _rope(
    "longrope",
    short_factor=[1.0] * 8,
    long_factor=[1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0],
    original_max_position_embeddings=64,
)
_CONV = ["conv", "full_attention", "conv"]
_LINEAR = ["linear_attention", "full_attention", "linear_attention"]
_MULTI_HEAD = {"num_key_value_heads": 4}
_LATENT = _MULTI_HEAD | {"head_dim": 8}
_MAMBA = {"layers_block_type": ["mamba", "attention", "mamba"]}

FAMILIES: dict[str, Family] = {
    # Named after the model type; `_SMALL` is the whole configuration.
    **{
        name: Family(name)
        for name in (
            *("afmoe", "apertus", "arcee", "aria_text", "bart", "bert", "bert-generation"),
            *("big_bird", "biogpt", "bitnet", "blenderbot", "bloom", "camembert", "cohere"),
            *("cohere2", "ctrl", "cwm", "data2vec-text", "deepseek_v2", "diffllama", "doge"),
            *("electra", "ernie", "ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe"),
            *("falcon_mamba", "flex_olmo", "fuyu", "gemma", "gemma2", "gemma3_text", "glm"),
            *("glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese"),
            *("gpt_oss", "granite", "granitemoe", "granitemoeshared", "helium"),
            *("hunyuan_v1_dense", "hunyuan_v1_moe", "jais2", "jetmoe", "llama", "mamba"),
            *("marian", "mbart", "megatron-bert", "minimax", "minimax_m2", "ministral"),
            *("ministral3", "mistral", "mixtral", "modernbert-decoder", "moshi", "mpt", "mvp"),
            *("nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmo_hybrid", "olmoe"),
            *("openai-gpt", "opt", "pegasus", "persimmon", "phi3", "phimoe", "plbart"),
            *("prophetnet", "qwen2", "qwen2_moe", "qwen3", "recurrent_gemma"),
            *("rembert", "roberta", "roberta-prelayernorm", "roformer", "rwkv", "seed_oss"),
            *("smollm3", "solar_open", "stablelm", "starcoder2", "trocr", "vaultgemma"),
            *("whisper", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet"),
        )
    },
    # Variants of attention and positions.
    "bloom-odd-heads": Family("bloom", {"n_head": 6, "hidden_size": 96}),
    "codegen": Family("codegen", {"rotary_dim": 8}),
    "phi": Family("phi", _MULTI_HEAD),
    "phi-groups": Family("phi"),
    "falcon": Family("falcon", {"alibi": False, "multi_query": True}),
    "falcon-alibi": Family("falcon", {"alibi": True, "multi_query": False, "bias": True}),
    "falcon-new": Family("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "gemma3-layers": Family("gemma3_text", {"num_hidden_layers": 6}),
    "gpt_neo": Family(
        "gpt_neo",
        {
            **{"num_hidden_layers": 2, "attention_types": [[["global", "local"], 1]]},
            **{"window_size": WINDOW},
        },
    ),
    "gptj": Family("gptj", {"rotary_dim": 8}),
    "llama-tied": Family("llama", {"tie_word_embeddings": True}),
    "llama4_text": Family(
        "llama4_text",
        {
            **{"attention_chunk_size": WINDOW, "no_rope_layers": [1, 1, 0, 1]},
            **{"num_hidden_layers": 4, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64},
        },
    ),
    "mistral-full": Family("mistral", {"sliding_window": None}),
    "opt-post-norm": Family("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    "qwen2-window": Family(
        "qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW}
    ),
    "phi3-longrope": Family(
        "phi3", {"max_position_embeddings": 512, "sliding_window": None} | _LONGROPE
    ),
    "llama-longrope": Family("llama", _LONGROPE),
    "llama-dynamic": Family(
        "llama", {"max_position_embeddings": 64} | _rope("dynamic", factor=4.0)
    ),
    "llama-linear": Family("llama", _rope("linear", factor=4.0)),
    "llama-heads-of-24": Family("llama", {"head_dim": 24, "num_key_value_heads": 1}),
    "llama-partial": Family("llama", _rope("default", partial_rotary_factor=0.5)),
    "qwen3_moe": Family("qwen3_moe", {"head_dim": 16}),
    "qwen3-window": Family(
        "qwen3",
        {
            **{"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
            **{"use_sliding_window": True, "max_window_layers": 0, "sliding_window": WINDOW},
        },
    ),
    "llama-llama3": Family(
        "llama",
        _rope(
            "llama3",
            **{"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            original_max_position_embeddings=64,
        ),
    ),
    "llama-yarn": Family("llama", _rope("yarn", factor=8.0, original_max_position_embeddings=64)),
    # Latent attention.
    "deepseek_v3": Family("deepseek_v3", _LATENT),
    "glm4_moe_lite": Family("glm4_moe_lite", _LATENT | {"qk_head_dim": 24}),
    "youtu": Family("youtu", _LATENT),
    # State-space, convolution and linear attention, with and without attention beside them.
    "bamba": Family("bamba", {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 16}),
    "falcon_h1": Family(
        "falcon_h1",
        {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_chunk_size": 16},
    ),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {
            **{"layer_types": ["mamba", "attention", "mamba"], "num_local_experts": 0},
            **{"mamba_n_heads": 8, "mamba_d_head": 16, "shared_intermediate_size": 64},
        },
    ),
    "granitemoehybrid-rope": Family(
        "granitemoehybrid",
        {
            **{"layer_types": ["mamba", "attention"] * 2, "num_hidden_layers": 4},
            **{"mamba_n_heads": 8, "mamba_d_head": 16, "shared_intermediate_size": 64},
            **{"num_local_experts": 0, "position_embedding_type": "rope"},
        },
    ),
    "jamba": Family("jamba", {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4}),
    "lfm2": Family("lfm2", {"layer_types": _CONV}),
    "lfm2_moe": Family("lfm2_moe", {"layer_types": _CONV, "num_dense_layers": 1}),
    "mamba2": Family("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "nemotron_h": Family(
        "nemotron_h",
        {
            **{"layers_block_type": ["mamba", "attention", "moe"], "mamba_num_heads": 8},
            **{"mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 16},
            **{"moe_shared_expert_intermediate_size": 32},
        },
    ),
    "qwen3_next": Family("qwen3_next", {"layer_types": _LINEAR}),
    "qwen3_5_text": Family("qwen3_5_text", {"layer_types": _LINEAR}),
    "qwen3_5_moe_text": Family("qwen3_5_moe_text", {"layer_types": _LINEAR}),
    "xlstm": Family("xlstm", {"num_heads": 4, "chunk_size": 16, "qk_dim_factor": 1.0}),
    "zamba": Family(
        "zamba",
        {
            **{"layers_block_type": ["mamba", "hybrid", "mamba"], "mamba_dt_rank": 4},
            **{"n_mamba_heads": 2, "attention_head_dim": 32, "attention_hidden_size": 128},
        },
    ),
    "zamba2": Family(
        "zamba2",
        {
            **{"layer_types": ["mamba", "hybrid", "mamba"], "mamba_headdim": 16},
            **{"n_mamba_heads": 8, "mamba_ngroups": 1, "chunk_size": 16, "mamba_expand": 2},
            **{"hybrid_layer_ids": [1], "num_mem_blocks": 1, "attention_head_dim": 32},
            **{"use_mem_eff_path": False},
        },
    ),
    # Others.
    "reformer": Family(
        "reformer",
        {
            **{"axial_pos_embds_dim": (32, 32), "axial_pos_shape": (16, 32)},
            **{"attn_layers": ["local", "lsh"], "num_hidden_layers": 2, "num_buckets": 4},
            **{"local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "hash_seed": 0},
        },
    ),
    "dbrx": Family(
        "dbrx",
        {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    "dots1": Family("dots1", {"n_shared_experts": 1}),
    "gemma3n_text": Family(
        "gemma3n_text",
        {
            **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 8},
            **{"layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96},
            **{"intermediate_size": [128] * 4, "activation_sparsity_pattern": [0.0] * 4},
        },
    ),
    "gemma4_text": Family(
        "gemma4_text",
        {
            **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "global_head_dim": 16},
            **{"layer_types": ["sliding_attention", "full_attention"] * 2},
            **{"hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 96},
        },
    ),
    "glm_moe_dsa": Family("glm_moe_dsa", _LATENT | {"index_topk": 4, "index_head_dim": 16}),
    "longcat_flash": Family(
        "longcat_flash",
        _LATENT
        | {"num_layers": 2, "expert_ffn_hidden_size": 32, "zero_expert_num": 2, "moe_topk": 2}
        | {"ffn_hidden_size": 64},
    ),
    "xmod": Family("xmod", {"default_language": "en_XX"}),
}
"""By a name of ours."""


def write_family(folder: Path, name: str) -> Path:
    """Write a tiny checkpoint of a family; its tokens are ASCII characters."""
    best, most = None, 0
    for gain, embedding in _SCALES:
        model = _random_model(FAMILIES[name], gain, embedding)
        different = len(set(greedy(model, ascii_tokenizer()(PROMPT)["input_ids"])))
        if different > most:
            best, most = model, different
        if different >= _DIVERSE:
            break
    assert best, f"{name}: no tokens"
    best.save_pretrained(folder)
    ascii_tokenizer().save_pretrained(folder)
    return folder


def greedy(
    model: PreTrainedModel, prompt_ids: list[int], new_tokens: int = NEW_TOKENS
) -> list[int]:
    """Return the tokens that transformers' own `generate` adds, past any end token."""
    ids = torch.tensor([prompt_ids])
    output = model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens + 1,  # some configurations force the last token
        eos_token_id=-1,  # no token
    )
    return output[0, len(prompt_ids) : -1].tolist()


_DIVERSE = 10
"""Different tokens of `NEW_TOKENS` that are enough."""

_SCALES = [(1.3, 1.0), (1.6, 0.3), (2.0, 0.15), (2.0, 0.05), (2.5, 0.3), (3.0, 0.1), (6.0, 1.0)]
"""Gain of the matrices, and standard deviation of the embeddings: tried in turn."""

_STATE_PARAMETERS = ("A_log", "dt_", "conv1d", ".D", "rg_lru", "recurrent_param", "time_")
"""Parts of the names of parameters that need the values of the library's own initialization."""


def _random_model(family: Family, gain: float, embedding: float) -> PreTrainedModel:
    defaults = AutoConfig.for_model(family.model_type)
    known = {*defaults.to_dict(), *defaults.attribute_map}
    small = {name: value for name, value in _SMALL.items() if name in known}
    config = AutoConfig.for_model(family.model_type, **small | family.values)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not any(part in name for part in _STATE_PARAMETERS):
                parameter.copy_(_random(name, parameter, gain, embedding))
            parameter.copy_(parameter.half().float())
    return model


def _random(name: str, old: torch.Tensor, gain: float, embedding: float) -> torch.Tensor:
    noise = torch.randn_like(old)
    if old.dim() < 2:
        return noise * 0.1 if name.endswith("bias") else old + noise * 0.1
    is_embedding = any(part in name for part in ("embed", "wte", "wpe")) and "embed_out" not in name
    return noise * (embedding if is_embedding else gain / math.sqrt(old.shape[-1]))
