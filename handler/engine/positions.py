"""Find how many tokens a sequence can have in a model's config.json."""

from typing import Any, NamedTuple

_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "context_length",
)
"""Names for the number of positions that a model was made for."""


class Context(NamedTuple):
    """The most tokens of a sequence. `note` says why there are fewer than the settings request."""

    tokens: int
    note: str = ""


def context(config: dict[str, Any], wanted: int | None) -> Context:
    """Return the context that an engine offers, apart from limits of its memory.

    Args:
        config: the content of `config.json`.
        wanted: `app.engine.max_context`; None for all positions of the model.

    Raises:
        ValueError: neither names a length.
    """
    limit = positions(config)
    if limit is None:
        if wanted is None:
            raise ValueError("config.json names no context length: set app.engine.max_context")
        return Context(wanted)
    if wanted is None or wanted <= limit:
        return Context(wanted or limit)
    return Context(limit, f" instead of {wanted}, because the model has no more positions")


_ORIGINAL = "original_max_position_embeddings"

_PHI3_DEFAULT = 4096
"""`original_max_position_embeddings` of Phi3Config in transformers, if config.json has none. It
goes before the field in `rope_parameters`."""


def positions(config: dict[str, Any]) -> int | None:
    """Return the positions the model was made for; None if its configuration names none.

    A model with longrope has other frequencies for sequences beyond its original range. Which ones
    apply depends on the longest sequence of a batch, and a change makes the KV cache wrong. So only
    the original range counts.
    """
    for part in (config, config.get("text_config")):
        if not isinstance(part, dict):
            continue
        lengths = [part[name] for name in _NAMES if isinstance(part.get(name), int)]
        lengths = [length for length in lengths if length > 0][:1]
        rope = part.get("rope_parameters") or part.get("rope_scaling")
        parts = [rope, *rope.values()] if isinstance(rope, dict) else []
        for rules in parts:
            if isinstance(rules, dict) and "long_factor" in rules:
                found = [rules.get(_ORIGINAL), part.get(_ORIGINAL, _PHI3_DEFAULT)]
                lengths += [length for length in found if isinstance(length, int) and length > 0]
        if lengths:
            return min(lengths)
    return None
