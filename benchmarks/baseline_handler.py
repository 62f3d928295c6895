"""The original project's way, as a peer to measure: a BaseHandler around `generate`.

Written from the original's description: loads with accelerate, answers `instances`, synchronously.
The model-config says the rest: one request at a time in float32 as the original had it (`seed`), or
TorchServe's dynamic batching in bfloat16 (`batched`). For the benchmark alone, a completion has
exactly the length that was asked for, and a header counts its tokens, as ours does.
"""

import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from ts.torch_handler.base_handler import BaseHandler


class SeedHandler(BaseHandler):
    """Preprocess, inference, postprocess: TorchServe calls them in this order."""

    def initialize(self, context) -> None:
        folder = context.system_properties["model_dir"] + "/weights"
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=context.model_yaml_config["dtype"], device_map="auto"
        )
        self.context = context
        self.initialized = True

    def preprocess(self, data: list[dict]) -> tuple[list[str], int]:
        """The bodies of a batch -> one prompt each, and the longest completion asked for."""
        bodies = [row.get("body") or row.get("data") for row in data]
        bodies = [b if isinstance(b, dict) else json.loads(b) for b in bodies]
        lengths = [body.get("parameters", {}).get("max_new_tokens", 50) for body in bodies]
        return [body["instances"][0] for body in bodies], max(lengths)

    @torch.inference_mode()
    def inference(self, data: tuple[list[str], int]) -> list[str]:
        prompts, length = data
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True).to(self.model.device)
        ids = self.model.generate(
            **inputs, max_new_tokens=length, min_new_tokens=length, do_sample=False
        )
        for index in range(len(prompts)):
            self.context.set_response_header(index, "x-completion-tokens", str(length))
        return self.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def postprocess(self, data: list[str]) -> list[dict]:
        return [{"predictions": [text]} for text in data]
