"""The openvino engine on each family that its table lists as correct, and on those it leaves out.

The model is exported in float16, which is exact for these weights. The KV cache rounds.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from deploy.archive.compress import compress
from deploy.archive.export import EXPORTED
from deploy.archive.support import LEFT_OUT, SERVED, unsupported
from deploy.archive.trace import trace
from deploy.common.paths import link_or_copy
from handler.config import engine_config
from handler.engine import Engine, create_engine
from handler.engine.reference import score
from tests.families.models import FAMILIES, NEW_TOKENS, PROMPT, write_family
from tests.families.test_families import generate

pytestmark = pytest.mark.slow

_LONG = "Pack my box with five dozen liquor jugs. " * 4
PROMPTS = ["Hello", PROMPT, _LONG, f"{_LONG}And then", f"{_LONG}But not"]
"""Shorter and longer than a sliding window; the last three share what the prefix cache keeps."""

WRONG = ["falcon-alibi", "gpt_neo", "gpt_neox_japanese", "granitemoehybrid-rope", "mpt", "xglm"]
"""Families that can be exported, but then fail or generate different text."""

NOT_EXPORTED = ["phi-groups"]
"""Variants that optimum-intel cannot export. They are not tried: a failure leaves torch changed."""

RIGHT = [
    name
    for name, family in FAMILIES.items()
    if family.model_type in SERVED and name not in WRONG + NOT_EXPORTED
]

TOLERANCE = 0.2
"""In standard deviations of the logits. The largest gap of a correct family was 0.11; the
smallest gap of a wrong one was 0.5."""


def write(folder: Path, name: str) -> tuple[Path, PreTrainedModel]:
    weights = write_family(folder / name, name)
    return weights, AutoModelForCausalLM.from_pretrained(weights, dtype=torch.float32).eval()


def load(weights: Path, folder: Path) -> Engine:
    trace(weights, folder / "traced")
    exported = folder / "exported"
    exported.mkdir()
    compress(folder / "traced" / EXPORTED, exported / EXPORTED, "fp16", -1)
    for path in weights.iterdir():
        if path.suffix != ".safetensors":
            link_or_copy(path, exported / path.name)
    exact = {"precision": "fp16", "dynamic_quantization": 0}
    context = None if "max_position" in (weights / "config.json").read_text() else 512
    config = engine_config(name="openvino", openvino=exact, max_context=context)
    return create_engine(exported, config)


def largest_gap(engine: Engine, model: PreTrainedModel) -> float:
    """Return how far a token is below the model's choice at most: alone, together, joining."""
    encode = engine.folder.encode
    prompts = [p for p in PROMPTS if len(encode(p)) + NEW_TOKENS < engine.max_context]
    assert len(prompts) >= 2
    rounds = [[generate(engine, [prompt])[0] for prompt in prompts]]
    rounds += [generate(engine, prompts), generate(engine, prompts, steps_between=3)]
    return max(
        max(score(model, encode(prompt), tokens).gaps)
        for completions in rounds
        for prompt, tokens in zip(prompts, completions, strict=True)
    )


@pytest.mark.parametrize("name", RIGHT)
def test_family_generates_what_the_model_chooses(name: str, tmp_path: Path):
    weights, model = write(tmp_path, name)
    assert unsupported(weights, None) is None
    assert largest_gap(load(weights, tmp_path), model) < TOLERANCE


@pytest.mark.parametrize("name", WRONG)
def test_family_that_is_left_out_is_still_wrong(name: str, tmp_path: Path):
    """If this fails after an update, the entry in `support.py` can go."""
    weights, model = write(tmp_path, name)
    assert unsupported(weights, None)
    try:
        engine = load(weights, tmp_path)
    except RuntimeError:
        return
    assert largest_gap(engine, model) > TOLERANCE


def test_each_type_of_the_table_has_a_family():
    kinds = {FAMILIES[name].model_type for name in RIGHT}
    assert kinds | {"gpt_neo"} == SERVED  # right within its window
    encoders = {kind for kind, why in LEFT_OUT.items() if "encoder-decoder" in why}
    assert {FAMILIES[name].model_type for name in WRONG} >= LEFT_OUT.keys() - encoders
