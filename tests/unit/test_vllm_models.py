"""The table of models that the engine vllm serves, against the installed vLLM's own list."""

import ast

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from deploy.archive.support import VLLM
from tools.setup_env import vllm_python

pytestmark = pytest.mark.slow

LISTS = ("_TEXT_GENERATION_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS")


def test_vllm_lists_every_type_that_it_is_chosen_for():
    python = vllm_python()
    if python is None:
        pytest.skip("vLLM is not installed: make setup ENGINE=vllm")
    path = "lib/python3.11/site-packages/vllm/model_executor/models/registry.py"
    tree = ast.parse((python.parent.parent / path).read_text())  # importing it takes many seconds
    known = set()
    for node in tree.body:
        target = getattr(node, "target", None) or (getattr(node, "targets", None) or [None])[0]
        if getattr(target, "id", "") in LISTS:
            known |= {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
    assert len(known) > 100
    for kind in VLLM:
        names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
        assert known & ({names} if isinstance(names, str) else {*names}), kind
