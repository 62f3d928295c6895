"""Small tokenizers of every kind, trained on a few lines in milliseconds."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content.strip() }}"
    " [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}{% endfor %}"
)
TEXT = [
    "the quick  brown   fox\n\n\tjumps over the lazy dog, and it's never tired . of it !",
    "Once upon a time there was a model that read every prompt and wrote one token at a time.",
    "def f(x):\n    return x + 1  # 12345",
] * 20
ASCII = [chr(code) for code in range(33, 127)]


def byte_level(*, start: bool = False, end: bool = False) -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen: bytes, and pairs of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return _with_ends(tokenizer, start, end)


def sentencepiece(scheme: str = "normalizer", *, start: bool = True) -> Tokenizer:
    """As Llama 2, Mistral and Gemma: pieces, and bytes for everything else.

    Args:
        scheme: where a space is prepended: by a `normalizer`, by Metaspace (`first`, `always`,
            `never`), or not at all (`gemma`).
        start: whether the tokenizer adds the start token.
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=[*ASCII, "▁"],
        show_progress=False,
    )
    trained.train_from_iterator(TEXT, trainer)
    model = json.loads(trained.to_str())["model"]
    order = sorted(model["vocab"], key=model["vocab"].get)
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += [piece for piece in order if piece not in SPECIAL]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [tuple(pair) for pair in model["merges"]],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    if scheme == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif scheme == "gemma":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "gemma":
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return _with_ends(tokenizer, start, end=False)


def unigram(*, byte_fallback: bool = False) -> Tokenizer:
    """As T5 and XLNet: the likeliest pieces."""
    scored = [(token, 0.0) for token in SPECIAL]
    if byte_fallback:
        scored += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scored += [(piece, -8.0) for piece in ["▁", *ASCII]]
    scored += [(piece, -4.0) for piece in ["▁the", "▁a", "▁Once", "ing", "ed", "▁time", "token"]]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    if byte_fallback:
        steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
        tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: the beginnings of words, and their continuations."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=ASCII, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words; a decoder puts spaces between them."""
    words = sorted({word for line in TEXT for word in line.split()})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def suffixed() -> Tokenizer:
    """As the first GPT: a suffix marks the end of a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=ASCII,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "sentencepiece, normalizer": sentencepiece,
    "sentencepiece, first": lambda: sentencepiece("first"),
    "sentencepiece, always": lambda: sentencepiece("always"),
    "sentencepiece, never": lambda: sentencepiece("never"),
    "sentencepiece, gemma": lambda: sentencepiece("gemma"),
    "unigram": unigram,
    "unigram, bytes": lambda: unigram(byte_fallback=True),
    "wordpiece": word_piece,
    "words": word_level,
    "suffixed": suffixed,
}


def write_tokenizer(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    template: object = CHATML,
    model_type: str = "llama",
    tokenizer_class: str | None = "PreTrainedTokenizerFast",
    **settings: object,
) -> Path:
    """Write a model's folder apart from its weights. A setting of None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": model_type, "vocab_size": 1000, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(config))
    content = {"tokenizer_class": tokenizer_class, "bos_token": "<s>", "eos_token": "</s>"}
    content |= {"unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    content |= {"chat_template": template} | settings
    content = {name: value for name, value in content.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))
    return folder


def _with_ends(tokenizer: Tokenizer, start: bool, end: bool) -> Tokenizer:
    if start or end:
        single = f"{'<s> ' if start else ''}$A{' </s>' if end else ''}"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return tokenizer
