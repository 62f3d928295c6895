"""One sequence in transformers' own generation loop, one forward pass at a time.

For models whose sequences cannot share a forward pass, because they cache more than keys and
values: the states of Mamba and of convolutions, or a cache under another name. `generate` prepares
the inputs and the cache that a model needs, so the completion equals that of `generate`.
"""

from collections.abc import Generator
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

_Steps = Generator[torch.Tensor, torch.Tensor, None]


class GenerationLoop:
    """The state of one sequence in `generate`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._steps: _Steps | None = None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [1, vocabulary] after `ids` [1, n]: the prompt, then token by token."""
        if self._steps:
            return self._steps.send(ids)
        config = GenerationConfig(
            # generation_config.json may ask for beams or for a cache of a fixed size.
            **{"do_sample": False, "num_beams": 1, "use_cache": True},
            cache_implementation="dynamic",
            # `_steps` ignores this limit, but some configurations have an invalid one.
            max_new_tokens=1,
            pad_token_id=0,
        )
        self._steps = self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            custom_generate=_steps,
        )
        return next(self._steps)


def _steps(
    model: Any,
    input_ids: torch.Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: object,
    stopping_criteria: object,
    **inputs: Any,
) -> _Steps:
    """Run the prompt, then each token that is sent. Source: transformers' `_sample`."""
    outputs = model._prefill(input_ids, generation_config, inputs)
    while True:
        inputs = model._update_model_kwargs_for_generation(outputs, inputs)
        token = yield outputs.logits[:, -1]
        input_ids = torch.cat([input_ids, token], dim=-1)
        step = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
        outputs = model(**step, return_dict=True)
