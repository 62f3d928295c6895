"""How many tokens a sequence can have, by config.json and app.engine.max_context."""

import pytest

from handler.engine.positions import Context, context, positions


@pytest.mark.parametrize(
    "name",
    [
        "max_position_embeddings",
        "n_positions",
        "max_sequence_length",
        "max_seq_len",
        "seq_length",
        "model_max_length",
        "context_length",
    ],
)
def test_configurations_have_several_names_for_the_positions(name: str):
    assert positions({name: 512}) == 512
    assert positions({"text_config": {name: 512}}) == 512


@pytest.mark.parametrize("value", [None, 0, -1, "512", [512], 512.5])
def test_ignores_values_that_are_not_numbers_of_positions(value: object):
    assert positions({"max_position_embeddings": value, "n_positions": None}) is None
    assert positions({"max_position_embeddings": value, "n_positions": 64}) == 64


def test_setting_is_read_if_the_model_names_no_positions():
    assert context({"model_type": "bloom"}, 512) == Context(512)
    with pytest.raises(ValueError, match=r"set app\.engine\.max_context"):
        context({"model_type": "bloom"}, None)


def test_setting_beyond_the_positions_is_cut_with_a_note():
    config = {"max_position_embeddings": 512}
    assert context(config, None) == context(config, 512) == Context(512)
    assert context(config, 100) == Context(100)
    assert context(config, 513) == Context(
        512, " instead of 513, because the model has no more positions"
    )


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "su", "long_factor": [2.0]}},
        {"rope_scaling": {"type": "longrope", "long_factor": [2.0]}},
        {"rope_parameters": {"rope_type": "longrope", "long_factor": [2.0]}},
        {"rope_parameters": {"full_attention": {"rope_type": "longrope", "long_factor": [2.0]}}},
    ],
)
def test_longrope_is_served_up_to_its_original_range(config: dict):
    sizes = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    assert positions(config | sizes) == 4096
    assert positions({"text_config": config | sizes}) == 4096
    (field,) = config
    inside = {field: config[field] | {"original_max_position_embeddings": 2048}}
    assert positions(inside | sizes) == (4096 if "full_attention" in config[field] else 2048)


def test_longrope_takes_the_smaller_of_two_original_ranges():
    """transformers reads the outer field, which for Phi-3 has a default."""
    rules = {"rope_type": "longrope", "long_factor": [2.0]}
    name, sizes = "original_max_position_embeddings", {"max_position_embeddings": 131072}
    for inner, outer, expected in [(400, 200, 200), (200, 400, 200), (8192, None, 4096)]:
        config = sizes | {"rope_scaling": rules | {name: inner}} | ({name: outer} if outer else {})
        assert positions(config) == expected


def test_other_scalings_keep_all_positions():
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert positions({"max_position_embeddings": 512, "rope_parameters": scaling}) == 512
