"""Prepare a model's tokenizer: one for both engines, which tokenizes text as transformers does.

An engine reads only tokenizer.json, tokenizer_config.json and the chat template. transformers reads
more: it adds the tokens and start tokens that other files name, converts older formats, and
rebuilds some tokenizers from their vocabulary. So the archive contains the tokenizer that
`AutoTokenizer` makes from the folder.

`LlamaTokenizer` is rebuilt. The result differs from a Llama 2 repository's tokenizer.json in text
with a leading space or after a special token, where that file agrees with SentencePiece. We still
follow transformers, so that prompts have the same tokens as in `generate`.
"""

import hashlib
import re
import shlex
import shutil
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from deploy.common.locks import one_at_a_time
from deploy.common.paths import BUILD, UserError, link_or_copy, shown, temporary_folder
from deploy.weights.config_json import read_object
from deploy.weights.folder import SOURCE_FILE, TEXT_FILES
from handler.engine import Messages
from handler.engine.folder import ModelFolder

TOKENIZERS = BUILD / "tokenizer"

TOKENIZER_FILES = TEXT_FILES - {SOURCE_FILE, "config.json", "generation_config.json"}
"""The files from which transformers makes a tokenizer, apart from those in folders."""

_SENTENCEPIECE = {name for name in TOKENIZER_FILES if name.endswith(".model")}
_OTHER_SOURCES = {"vocab.json", "vocab.txt", "vocab.bpe"}

_OBJECTS = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
_OBJECTS |= {"chat_template.json", "vocab.json"}

_COPY = "copy the tokenizer.json of the same model into the folder"

_PROBES = [
    "Hello world",
    " A space first, and  two.",
    "It's 12 o'clock; don't . stop !",
    "def f(x):\n\treturn x\n\n",
    "Zażółć gęślą jaźń, 東京, 🎉",
]
_MESSAGES: list[Messages] = [
    [{"role": "user", "content": "What is 2 + 2? "}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Zażółć 🎉"},
        {"role": "user", "content": "東京?\n"},
    ],
]


def tokenizer_files(weights: Path, cache: Path = TOKENIZERS) -> list[Path]:
    """Return the tokenizer's files for an archive; make them if they do not exist.

    Raises:
        UserError: the folder has no tokenizer, or one that the engines cannot read.
    """
    sources = _sources(weights)
    folder = cache / f"{weights.name[:40]}-{_key(sources)}"  # names of 255 bytes at most
    if not folder.is_dir():
        _check_sources(weights, {path.name for path in sources})
        with one_at_a_time(cache), temporary_folder() as temporary:
            if not folder.is_dir():  # another program may have made it meanwhile
                _make(weights, sources, temporary / "made")
                folder.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(temporary / "made", folder)
    return sorted(folder.iterdir())


def with_tokenizer(files: list[Path], tokenizer: list[Path]) -> list[Path]:
    """Replace the tokenizer among some files of a model."""
    return [path for path in files if path.name not in TOKENIZER_FILES] + tokenizer


def _sources(weights: Path) -> list[Path]:
    """Return the files that transformers may read. Links in subfolders could lead out: left out."""
    files = [weights / name for name in sorted({*TOKENIZER_FILES, "config.json"})]
    more = sorted(weights.glob("additional_chat_templates/*.jinja"))
    more = [path for path in more if not path.is_symlink() and not path.parent.is_symlink()]
    return [path for path in files if path.is_file()] + more


def _key(sources: list[Path]) -> str:
    parts = [f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in sources]
    parts += [f"{name} {version(name)}" for name in ("tokenizers", "transformers")]
    parts.append(Path(__file__).read_text())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _check_sources(weights: Path, names: set[str]) -> None:
    """Reject a folder without a tokenizer, or with one that we cannot convert."""
    where = shown(weights)
    for name in sorted(_OBJECTS & names):
        read_object(weights / name)
    if "tokenizer.json" in names:
        _check_json(weights / "tokenizer.json")
    elif names & _OTHER_SOURCES:
        return
    elif found := sorted(names & _SENTENCEPIECE):
        if _is_tiktoken(weights / found[0]):
            raise UserError(
                f"{where}: {found[0]} is in tiktoken's format, and there is no tokenizer.json, "
                f"which the engines read; {_COPY}"
            )
        # transformers 5 converts these files as well, but for most models it loses the space that
        # SentencePiece writes before the text.
        raise UserError(
            f"{where}: has {found[0]} and no tokenizer.json, which the engines read; {_COPY}, or "
            "make it in another environment: pip install 'transformers<5' sentencepiece protobuf "
            f'&& cd {shlex.quote(str(weights.resolve()))} && python -c "from transformers import '
            "AutoTokenizer as A; A.from_pretrained('.').save_pretrained('.')\""
        )
    elif "tekken.json" in names or any("tiktoken" in name for name in names):
        found = sorted(name for name in names if "tek" in name or "tiktoken" in name)
        raise UserError(f"{where}: has {found[0]} and no tokenizer.json; {_COPY}")
    else:
        raise UserError(f"{where}: has no tokenizer; {_COPY}")


def _check_json(path: Path) -> None:
    """Reject a tokenizer.json that the tokenizers library cannot read."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no other class
        message = f"{shown(path)}: is not a tokenizer ({_line(error)}); {_COPY}"
        raise UserError(message) from error


def _is_tiktoken(path: Path) -> bool:
    """Whether the file is a list of lines, each a token in base64 and its rank."""
    with path.open("rb") as stream:
        return bool(re.match(rb"[A-Za-z0-9+/]+=* \d+\n", stream.read(200)))


def _make(weights: Path, sources: list[Path], target: Path) -> None:
    """Save the tokenizer as transformers reads it, and compare what the engines will read."""
    from transformers.utils import logging

    where, level = shown(weights), logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of settings that only training needs
    try:
        with temporary_folder() as folder:
            for path in sources:
                link_or_copy(path.resolve(), folder / path.relative_to(weights))
            tokenizer = _load(where, folder)
        tokenizer.save_pretrained(target)
        shutil.rmtree(target / "additional_chat_templates", ignore_errors=True)
        if not (target / "tokenizer.json").is_file():
            raise UserError(
                f"{where}: its tokenizer, {_name(tokenizer)}, cannot be saved as tokenizer.json, "
                "which the engines read; choose a model that has one"
            )
        found = difference(ModelFolder(target), tokenizer)
    except UserError:
        raise
    except Exception as error:  # a tokenizer's own code may raise anything
        files = ", ".join(path.name for path in sources if path.name in TOKENIZER_FILES)
        message = (
            f"{where}: its tokenizer cannot be read ({_line(error)}); download {files} again, from "
            "one repository"
        )
        raise UserError(message) from error
    finally:
        logging.set_verbosity(level)
    if found:
        raise UserError(
            f"{where}: the engines would read its tokenizer.json differently than transformers' "
            f"{_name(tokenizer)}: {found}; choose another model"
        )
    chat = weights / "chat_template.json"
    if tokenizer.chat_template is None and chat.is_file():
        link_or_copy(chat.resolve(), target / chat.name)


def _load(where: str, folder: Path) -> Any:
    """Load the tokenizer by transformers' rules; if they lose text, from tokenizer.json alone.

    transformers loads some byte-level vocabularies, such as DeepSeek-R1-Distill-Llama's, with
    `LlamaTokenizer`, which drops their spaces (huggingface/transformers#45488).
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        settings = folder / "tokenizer_config.json"
        if settings.is_file() and "auto_map" in read_object(settings):
            raise UserError(
                f"{where}: its tokenizer needs code from its repository (auto_map in "
                "tokenizer_config.json), which never runs here; choose a model that needs none"
            ) from error
        if not _read_plainly(folder)[1]:
            raise
        raise UserError(
            f"{where}: its tokenizer_class cannot be read ({_line(error)}); to read tokenizer.json "
            "alone, set tokenizer_class in tokenizer_config.json to PreTrainedTokenizerFast"
        ) from error
    kept = _kept(tokenizer)
    if len(kept) < len(_PROBES):
        plain, kept_by_plain = _read_plainly(folder)
        if kept_by_plain > kept:
            print(
                f"{where}: using tokenizer.json without {_name(tokenizer)}, which loses text",
                flush=True,
            )
            tokenizer = plain
        elif plain is None and _PROBES[0] not in kept:
            raise UserError(
                f"{where}: the tokenizer that transformers makes from its files loses text; {_COPY}"
            )
    _check_vocabulary(where, folder, tokenizer)
    return tokenizer


def _read_plainly(folder: Path) -> tuple[Any, set[str]]:
    """Read tokenizer.json alone; return the tokenizer, or None, and the probes that it keeps."""
    from transformers import PreTrainedTokenizerFast

    if (folder / "tokenizer.json").is_file():
        with suppress(Exception):  # only the model's own class can read the file
            plain = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
            return plain, _kept(plain)
    return None, set()


def _check_vocabulary(where: str, folder: Path, tokenizer: Any) -> None:
    """Reject a tokenizer that returns no tokens, or tokens beyond the model's vocabulary."""
    ids = tokenizer("Hello", add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError(
            f"{where}: its tokenizer returns no token for 'Hello', so it is empty; {_COPY}"
        )
    config = read_object(folder / "config.json")
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if isinstance(size, int) and max(ids) >= size:
        raise UserError(
            f"{where}: its tokenizer returns token {max(ids)} for 'Hello', but vocab_size in "
            f"config.json is {size}, so it belongs to another model; {_COPY}"
        )


def _kept(tokenizer: Any) -> set[str]:
    """Return the probes whose letters and spaces a tokenizer keeps."""

    def plain(text: str) -> str:
        decomposed = unicodedata.normalize("NFKD", text.casefold())
        return " ".join("".join(c for c in decomposed if not unicodedata.combining(c)).split())

    def again(text: str) -> str:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    return {text for text in _PROBES if plain(again(text)) == plain(text)}


def difference(folder: ModelFolder, tokenizer: Any) -> str:
    """Compare what the engines read with transformers; return a difference, or an empty text.

    The caller refuses the model: a difference would cause wrong completions with status 200, which
    do not show the cause.
    """
    for text in _PROBES:
        ids = tokenizer(text)["input_ids"]
        if folder.encode(text) != ids:
            return f"{text!r} has different tokens"
        if folder.decode(ids) != tokenizer.decode(ids, skip_special_tokens=True):
            return f"the tokens of {text!r} decode to different text"
    if tokenizer.chat_template is None:
        return ""
    options = {"add_generation_prompt": True, "return_dict": False}
    for messages in _MESSAGES:
        texts = [_result(tokenizer.apply_chat_template, messages, tokenize=False, **options)]
        prompt = _result(folder.chat_prompt, messages)
        # Again, because a template may write the time.
        texts += [_result(tokenizer.apply_chat_template, messages, tokenize=False, **options)]
        if prompt not in texts:
            return "the chat template renders different text"
        if prompt is not None:
            ids = tokenizer(str(prompt), add_special_tokens=False)["input_ids"]
            if folder.encode(prompt) != ids:
                return "a chat has different tokens"
    return ""


def _result(function: Callable, *arguments: Any, **options: Any) -> Any:
    """Return a text, or None if the template rejects the messages or has an error."""
    try:
        return function(*arguments, **options)
    except Exception:
        return None


def _name(tokenizer: Any) -> str:
    return type(tokenizer).__name__


def _line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
