"""Which models the `openvino` engine serves, by config.json alone."""

import json
import re
from pathlib import Path

import pytest

from deploy.archive.export import choose_engine
from deploy.archive.support import LEFT_OUT, SERVED, unsupported
from deploy.common.paths import UserError
from handler.config import engine_config

GPT_NEO = {"model_type": "gpt_neo", "max_position_embeddings": 2048, "window_size": 256}
PHI = {"model_type": "phi", "num_attention_heads": 32}
LOCAL = {"attention_types": [[["global", "local"], 12]]}


def folder_of(folder: Path, config: dict) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({}, "model_type None"),
        ({"model_type": "gemma2"}, "model_type gemma2: optimum-intel cannot export it"),
        ({"model_type": "mamba"}, "model_type mamba: optimum-intel cannot export it"),
        ({"model_type": "new-2027"}, "model_type new-2027: optimum-intel cannot export it"),
        ({"model_type": "mpt"}, "model_type mpt: OpenVINO GenAI loses its ALiBi"),
        ({"model_type": "xglm"}, "has no paged attention for it"),
        ({"model_type": "falcon", "alibi": True}, "Falcon with alibi"),
        (PHI | {"num_key_value_heads": 8}, "Phi with num_key_value_heads below"),
        ({"model_type": "qwen3_moe"}, "Qwen3-MoE without head_dim"),
        (GPT_NEO | LOCAL, "only up to its window of 256 tokens .*, not 2048"),
        (GPT_NEO, "only up to its window of 256 tokens"),
        (
            {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
            "quantized with mxfp4",
        ),
    ],
)
def test_unsupported_models_use_transformers_or_are_refused(
    config: dict, reason: str, tmp_path: Path
):
    folder = folder_of(tmp_path, config)
    assert re.search(reason, unsupported(folder, None) or "served")
    chosen, why = choose_engine(engine_config(), folder, tmp_path, gpu=lambda: False)
    assert chosen == "transformers" and re.search(reason, why)
    with pytest.raises(UserError, match=f"{reason}.*ENGINE=transformers$"):
        choose_engine(engine_config(name="openvino"), folder, tmp_path)
    assert choose_engine(engine_config(name="transformers"), folder, tmp_path)[0] == "transformers"


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama"},
        {"model_type": "falcon"},
        {"model_type": "phi"},
        PHI | {"num_key_value_heads": 32},
        {"model_type": "qwen3_moe", "head_dim": 128},
        {"model_type": "falcon", "alibi": False},
        GPT_NEO | {"attention_types": [[["global"], 24]]},
        GPT_NEO | LOCAL | {"window_size": 2048},
    ],
)
def test_accepts_models_that_openvino_serves_correctly(config: dict, tmp_path: Path):
    assert unsupported(folder_of(tmp_path, config), None) is None


def test_gpt_neo_is_served_within_its_window(tmp_path: Path):
    folder = folder_of(tmp_path, GPT_NEO | LOCAL)
    assert unsupported(folder, 256) is None
    assert unsupported(folder, 257)


@pytest.mark.slow
def test_table_lists_each_type_that_the_exporter_supports():
    """After an update, compare the new types with transformers, and add them to the table."""
    import optimum.exporters.openvino  # noqa: F401  (registers the types)
    from optimum.exporters.tasks import TasksManager
    from packaging.version import Version
    from transformers import __version__
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    task = "text-generation-with-past"
    exported = set()
    for kind in TasksManager._SUPPORTED_MODEL_TYPE:
        tasks = TasksManager.get_supported_tasks_for_model_type(
            kind, exporter="openvino", library_name="transformers"
        )
        if task not in tasks or kind.replace("-", "_") not in {
            known.replace("-", "_") for known in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        }:
            continue
        versions = tasks[task].func
        least = Version(str(getattr(versions, "MIN_TRANSFORMERS_VERSION", "0")))
        most = getattr(versions, "MAX_TRANSFORMERS_VERSION", None)
        if least <= Version(__version__) and (
            most is None or Version(__version__) <= Version(str(most).replace("*", "99"))
        ):
            exported.add(kind)
    assert exported == SERVED | LEFT_OUT.keys()
