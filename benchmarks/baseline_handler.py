"""The baseline handler: a synchronous BaseHandler around `generate`.

It follows the description of the 2023 project's handler. The archive's configuration chooses one
request at a time in float32, as in that project (`baseline`), or TorchServe's dynamic batching in
bfloat16 (`batched`). For the benchmark only, a completion has exactly the requested length, and a
header reports its tokens, as our handler's responses do.
"""

import json
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from ts.torch_handler.base_handler import BaseHandler


class BaselineHandler(BaseHandler):
    """Preprocess, inference, postprocess: TorchServe calls them in this order."""

    def initialize(self, context: Any) -> None:
        folder = context.system_properties["model_dir"] + "/weights"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=context.model_yaml_config["dtype"], device_map="auto"
        )
        self.context = context
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> tuple[list[str], int]:
        """Take one prompt from each request body, and the longest completion requested."""
        bodies: list[Any] = [row.get("body") or row.get("data") for row in data]
        bodies = [b if isinstance(b, dict) else json.loads(b) for b in bodies]
        lengths = [body.get("parameters", {}).get("max_new_tokens", 50) for body in bodies]
        return [body["instances"][0] for body in bodies], max(lengths)

    @torch.inference_mode()
    def inference(self, data: tuple[list[str], int]) -> list[str]:
        prompts, length = data
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        model: Any = self.model  # the library's annotation of `generate` rejects its own classes
        ids = model.generate(
            **inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
        for index in range(len(prompts)):
            self.context.set_response_header(index, "x-completion-tokens", str(length))
        return self.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def postprocess(self, data: list[str]) -> list[dict]:
        return [{"predictions": [text]} for text in data]
