"""Read a folder of weights: the files a server needs, their source, and whether they load."""

import json
import re
import shlex
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deploy.common.paths import UserError, shown
from deploy.weights.config_json import check_config, printable, read_object
from deploy.weights.layouts import GGUF, adapter, other_kind, without_model

SOURCE_FILE = "SOURCE.json"
"""The file that records the source of the weights. It is written last: a folder without it is
unfinished."""

RANDOM = "random weights"
"""The `source` of a checkpoint that `--shape-only` made."""

TEXT_FILES = frozenset(
    {
        SOURCE_FILE,
        # The model.
        "config.json",
        "generation_config.json",
        # The tokenizer, in the form that the engines read and in those that it is converted from.
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "vocab.json",
        "vocab.txt",
        "vocab.bpe",
        "merges.txt",
        "tokenizer.model",
        "sentencepiece.model",
        "sentencepiece.bpe.model",
        "spiece.model",
        "spm.model",
        "tokenizer.tiktoken",
        "qwen.tiktoken",
        "tekken.json",
        "emoji.json",
    }
)
"""The names that transformers gives to the files of a model, apart from its weights."""

_BIN = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_NOT_MODEL = ("consolidated", "adapter_model")
"""Beginnings of names of safetensors that are not the model: Mistral's repositories hold the
weights again, in a form that transformers does not read; peft writes adapters."""

_SHARD = re.compile(r".*-(\d+)-of-(\d+)\.(safetensors|bin)")
_SHOWN = 8
"""Names in a message about files."""

_INDEX = ".index.json"
_SINGLE = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = "*.safetensors and no *.bin file"
_CHECKED_LATER = frozenset({"tokenizer.json", "vocab.json"})
"""Large files, which `deploy.archive` reads anyway."""

_REPOSITORY = re.compile(
    r"^(?:https?:/+(?:huggingface\.co|hf\.co)/)?([A-Za-z0-9][\w.-]*/[\w.-]+)/?$"
)

_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def source_of(folder: Path) -> dict:
    """Return the content of `SOURCE.json`; empty for a folder without one."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text())
    except (OSError, ValueError):
        return {}


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that a server needs; see `choose_files`.

    Shards that the index does not name are left out: transformers does not read them.
    """
    chosen = choose_files([p.name for p in folder.iterdir() if p.is_file()])
    index = next((name for name in chosen if name.endswith(_INDEX)), None)
    named = _shards(folder / index) if index else None
    if named is not None:
        chosen = [n for n in chosen if n in named or not n.endswith((".safetensors", ".bin"))]
    return [folder / name for name in chosen]


def choose_files(names: list[str]) -> list[str]:
    """Choose the files with the model and its tokenizer from a repository's files, weights first.

    Everything else stays out of archives and images, because people keep credentials and notes
    beside weights. Chooses the same weights as transformers' `from_pretrained`: safetensors before
    `*.bin`, which are pickles (transformers reads them with `weights_only`, which runs no code),
    and a single file before shards.
    """
    names = sorted(name for name in names if "/" not in name and not name.startswith("."))
    tensors = [n for n in names if n.endswith(".safetensors") and not n.startswith(_NOT_MODEL)]
    bins = [n for n in names if _BIN.fullmatch(n)]
    index: list[str] = []
    for single, sharded in zip(_SINGLE, (tensors, bins), strict=True):
        if single in names:
            chosen = [single]
            break
        if sharded and single + _INDEX in names:
            chosen, index = sharded, [single + _INDEX]
            break
    else:
        chosen = tensors or bins or [n for n in names if n.endswith(".safetensors")]
    return chosen + [n for n in names if n in TEXT_FILES or n in index]


def _shards(index: Path) -> set[str] | None:
    """Return the files that an index names; None if `check_folder` would reject it."""
    try:
        return {*read_object(index)["weight_map"].values()}
    except (UserError, KeyError, AttributeError, TypeError):
        return None


def left_out(folder: Path, used: list[Path]) -> str:
    """Name what a folder holds besides the used files, in one line; empty if there is nothing."""
    names = {p.name for p in used}
    others = sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir())
    others = [name for name in others if name not in names]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return ", ".join(others[:_SHOWN]) + more


def check_folder(folder: Path) -> Path:
    """Make sure the folder holds a model in Hugging Face layout that is complete, and return it.

    Takes milliseconds: it reads the JSON files and the headers of the weights. `checkpoint.py`
    checks whether transformers knows the model and finds all of its tensors.

    Raises:
        UserError: it holds none; the message says what is missing and how to get it.
    """
    try:
        _check(folder)
    except UserError as error:
        raise UserError(printable(str(error))) from error
    except OSError as error:
        path = Path(error.filename or folder)
        raise UserError(
            f"{shown(path)}: cannot be read ({error.strerror or error}); check the file and its "
            "permissions"
        ) from error
    return folder


def _check(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"{shown(folder)}: {_file(folder)}")
    if not folder.is_dir():
        raise UserError(_no_folder(folder))
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists() and (path.name in choose_files([path.name])):
            raise UserError(
                f"{shown(path)}: is a link to {path.readlink()}, which does not exist; copy the "
                "model's folder with its links followed (cp -rL), or download it again"
            )
    files = weight_files(folder)
    for path in files:
        _check_file(path, folder)
    check_kind(folder)
    for path in files:
        if path.suffix == ".json" and path.name not in _CHECKED_LATER:
            read_object(path)
    index = next((p for p in files if p.name.endswith(_INDEX)), None)
    if index:
        _check_index(index)
    _check_tensors([path for path in files if path.suffix == ".safetensors"])


def check_kind(folder: Path) -> None:
    """Refuse a folder if its file names and config.json show that the model is not served.

    `hub.py` calls it before the weights are there, with empty files in their place.

    Raises:
        UserError: the message says what the folder holds instead, and what to do.
    """
    if why := other_kind(folder):
        raise UserError(
            f"{shown(folder)}: {why}use a model that generates text (ForCausalLM in config.json)"
        )
    if why := adapter(folder):
        raise UserError(f"{shown(folder)}: {why}")
    if not (folder / "config.json").is_file():
        raise UserError(f"{shown(folder)}: {without_model(folder, 'config.json')}")
    check_config(folder)
    names = choose_files([p.name for p in folder.iterdir() if p.is_file()])
    tensors = [folder / name for name in names if name.endswith((".safetensors", ".bin"))]
    if not tensors:
        raise UserError(f"{shown(folder)}: {without_model(folder, _WEIGHTS)}")
    if tensors[0].name not in _SINGLE and not any(name.endswith(_INDEX) for name in names):
        raise UserError(f"{shown(folder)}: {_unread(tensors)}")


def _file(path: Path) -> str:
    """Return what to do with a file that was named instead of a folder."""
    if (path.parent / "config.json").is_file():
        return f"is a file; name the folder that holds the model, {shown(path.parent)}"
    if path.suffix == ".gguf":
        return GGUF.format(file=path.name)
    return "is a file; name the folder that holds the model"


def _no_folder(folder: Path) -> str:
    """Return that a folder does not exist, and how to name a repository on the Hub instead."""
    text = str(folder)
    if match := _REPOSITORY.search(text):
        return (
            f"{text}: there is no such model folder; if {match[1]} is a repository on the Hub, "
            "write handler/apps/NAME.yaml with app: {title: its title, weights: {source: hub, "
            f"repo: {match[1]}, revision: its commit of 40 digits, license: its license}}}} and "
            "leave MODEL_DIR out"
        )
    if match := re.match(r"(\w+):/", text):
        return f"{text}: there is no such model folder; copy it from {match[1]}: to this machine"
    return f"{text}: there is no such model folder; check the path"


def _check_file(path: Path, folder: Path) -> None:
    """Reject links out of the folder, git-lfs pointers and empty files."""
    _check_link(path, folder)
    with path.open("rb") as stream:
        start = stream.read(len(_LFS_POINTER))
    if start == _LFS_POINTER:
        raise UserError(
            f"{shown(path)}: is a git-lfs pointer, not the weights; "
            f"run: git -C {shlex.quote(shown(folder))} lfs pull"
        )
    if not start and path.suffix in {".safetensors", ".bin", ".json", ".model"}:
        raise UserError(f"{shown(path)}: is empty; download it again")


def _check_index(index: Path) -> None:
    """Make sure that the index names files beside it, and that they exist."""
    names = read_object(index).get("weight_map")
    if (
        not isinstance(names, dict)
        or not names
        or not all(isinstance(name, str) and name for name in names.values())
    ):
        raise UserError(
            f"{shown(index)}: weight_map should be an object that maps each tensor to its file; "
            "download the file again"
        )
    for name in sorted({*names.values()}):
        if Path(name).name != name:
            raise UserError(
                f"{shown(index)}: names {name}, but all weights should be in the folder of the "
                "index; move the file there and correct its name in weight_map"
            )
    missing = [name for name in sorted({*names.values()}) if not (index.parent / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise UserError(
            f"{shown(index.parent)}: {index.name} names {missing[0]}, which is missing{more}; "
            "download it again"
        )


def _unread(tensors: list[Path]) -> str:
    """Return why transformers does not read weights with these names."""
    single, first = f"model{tensors[0].suffix}", tensors[0].name
    if first.startswith(_NOT_MODEL):
        return without_model(tensors[0].parent, _WEIGHTS)
    if tensors[0].suffix == ".bin":
        single = "pytorch_model.bin"
    if match := _SHARD.fullmatch(first):
        found = {int(m[1]) for path in tensors if (m := _SHARD.fullmatch(path.name))}
        missing = sorted({*range(1, int(match[2]) + 1)} - found)
        shards = f", and {len(missing)} of {int(match[2])} shards are missing" if missing else ""
        return (
            f"has shards ({first}) but no {single}{_INDEX}, which names the shard of each tensor"
            f"{shards}; download what is missing from the same repository"
        )
    if len(tensors) > 1:
        return (
            f"has {len(tensors)} files of weights ({first}, {tensors[1].name}), none of which is "
            f"called {single}; rename the model's file to {single}"
        )
    return f"has {first}, but the engines read {single}; rename the file"


def _check_link(path: Path, folder: Path) -> None:
    """Reject a link out of the folder: it could put any file of this machine into an archive.

    The Hub's cache links from `snapshots/REVISION` to `blobs`. Weights in safetensors may be
    elsewhere, because their form is checked.
    """
    in_cache = folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()
    home = (folder.parents[1] if in_cache else folder).resolve()
    target = path.resolve()
    if path.suffix != ".safetensors" and not target.is_relative_to(home):
        raise UserError(
            f"{shown(path)}: is a link to {target}, outside its folder; replace it with a copy"
        )


def _check_tensors(paths: list[Path]) -> None:
    """Compare each file's list of tensors with its size, without reading the tensors.

    A tensor in two shards is an error: which copy is loaded depends on the reader.
    """
    place: dict[str, str] = {}
    for path in paths:
        try:
            with safe_open(path, "np") as tensors:
                names = list(tensors.keys())
        except SafetensorError as error:
            raise UserError(
                f"{shown(path)}: is damaged or its download is incomplete ({error}); "
                "download it again"
            ) from error
        for name in names:
            if name in place:
                raise UserError(
                    f"{shown(path)}: holds the tensor {name}, which {place[name]} holds too, so "
                    "shards of two checkpoints are mixed; download the folder again"
                )
            place[name] = path.name
