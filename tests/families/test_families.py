"""The transformers engine on each family: it generates what `generate` does, or refuses to start.

Prompts are shorter and longer than a sliding window, and longer than one forward pass of a prefill.
"""

import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from handler.config import engine_config
from handler.engine import Engine, Sampling, create_engine
from tests.families.models import FAMILIES, NEW_TOKENS, PROMPT, greedy, write_family

pytestmark = pytest.mark.slow

PROMPTS = ["Hello", PROMPT, "Pack my box with five dozen liquor jugs. " * 4]
MAX_PREFILL = 48

REFUSED = {
    "generates different text than the model": {
        # `generate` passes positions that differ from the model's own.
        *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta"),
        *("xlm-roberta-xl", "xmod"),
        # `generate` passes different inputs than one forward pass over the text does.
        *("moshi", "prophetnet", "xlm", "xlnet", "glm_moe_dsa"),
    },
}
"""Families that the engine does not serve, by its error message."""

ALONE = {
    # States instead of keys and values, or beside them.
    *(
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "granitemoehybrid-rope",
        "jamba",
        "lfm2",
        "lfm2_moe",
    ),
    *("mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text"),
    *("qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2"),
    # Positions that count the padding.
    *("bart", "blenderbot", "marian", "mbart", "mvp", "pegasus", "plbart", "roformer", "trocr"),
    *("llama4_text", "whisper"),
    # Masks that are wrong for a chunk of a prompt, or no cache.
    *("deepseek_v2", "doge", "openai-gpt", "reformer"),
}
"""Families that run one sequence at a time."""

NO_LENGTH = {
    "bloom",
    "bloom-odd-heads",
    "falcon_mamba",
    "mamba",
    "mamba2",
    "recurrent_gemma",
    "whisper",
    "xlstm",
    "xlnet",
}
"""Families whose configuration names no context length."""


@pytest.mark.parametrize("name", FAMILIES)
def test_family_generates_what_generate_does_or_is_refused(name: str, tmp_path: Path):
    weights = write_family(tmp_path / name, name)
    config = engine_config(
        name="transformers",
        max_context=512 if name in NO_LENGTH else None,
        transformers={"max_prefill_tokens": MAX_PREFILL},
    )
    begin = time.monotonic()
    try:
        engine = create_engine(weights, config)
    except ValueError as error:
        assert time.monotonic() - begin < 10
        assert any(name in names and what in str(error) for what, names in REFUSED.items()), error
        return
    assert name not in set.union(*REFUSED.values())
    assert (name in ALONE) == (engine._max_batch == 1)
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()
    prompts = [p for p in PROMPTS if len(engine.folder.encode(p)) + NEW_TOKENS < engine.max_context]
    expected = [greedy(model, engine.folder.encode(prompt)) for prompt in prompts]
    assert [generate(engine, [prompt])[0] for prompt in prompts] == expected
    assert generate(engine, prompts) == expected
    assert generate(engine, prompts, steps_between=3) == expected
    assert generate(engine, prompts[::-1], steps_between=2, stream=True) == expected[::-1]


def generate(
    engine: Engine, prompts: list[str], *, steps_between: int = 0, stream: bool = False
) -> list[list[int]]:
    """Return the tokens of each prompt; with `steps_between` they join one after the other."""
    sampling = Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.submit(i, prompt, sampling, stream=stream)
        for _ in range(steps_between):
            collect(engine, tokens)
    while engine.unfinished:
        collect(engine, tokens)
    return tokens


def collect(engine: Engine, tokens: list[list[int]]) -> None:
    for progress in engine.advance(0):
        assert progress.finish_reason in (None, "length")
        tokens[progress.key] += progress.token_ids
