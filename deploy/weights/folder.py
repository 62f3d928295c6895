"""Read a folder of weights: the files a server needs, their source, and whether they load."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deploy.common.paths import UserError, shown

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
_SHOWN = 8
"""Names in a message about files."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def source_of(folder: Path) -> dict:
    """Return the content of `SOURCE.json`; empty for a folder without one."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text())
    except (OSError, ValueError):
        return {}


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that a server needs; see `choose_files`."""
    names = [p.name for p in folder.iterdir() if p.is_file()]
    return [folder / name for name in choose_files(names)]


def choose_files(names: list[str]) -> list[str]:
    """Choose the files with the model and its tokenizer from a repository's files, weights first.

    Everything else stays out of archives and images, because people keep credentials and notes
    beside weights. Prefers safetensors to `*.bin`, which are pickles; transformers reads them with
    `weights_only`, which runs no code.
    """
    names = sorted(name for name in names if "/" not in name and not name.startswith("."))
    tensors = [n for n in names if n.endswith(".safetensors")]
    # Repositories of Mistral hold the weights again, in a form that transformers does not read.
    tensors = [n for n in tensors if not n.startswith("consolidated")] or tensors
    tensors = tensors or [n for n in names if _BIN.fullmatch(n)]
    index = f"{Path(tensors[0]).suffix}.index.json" if tensors else ".index.json"
    texts = TEXT_FILES | {f"{model}{index}" for model in ("model", "pytorch_model")}
    return tensors + [n for n in names if n in texts]


def left_out(folder: Path, used: list[Path]) -> str:
    """Name what a folder holds besides the used files, in one line; empty if there is nothing."""
    names = {p.name for p in used}
    others = sorted(f"{p.name}/" if p.is_dir() else p.name for p in folder.iterdir())
    others = [name for name in others if name not in names]
    more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
    return ", ".join(others[:_SHOWN]) + more


def check_folder(folder: Path) -> Path:
    """Make sure the folder holds a model that can be loaded, and return it.

    Raises:
        UserError: it holds none; the message says what is missing and how to get it.
    """
    if folder.is_file():
        raise UserError(f"{shown(folder)}: is a file; name the folder that holds the model")
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such model folder")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{shown(folder)}: has no config.json; is it a folder in Hugging Face layout?"
        )
    files = weight_files(folder)
    tensors = [p for p in files if p.suffix in {".safetensors", ".bin"}]
    if not tensors:
        raise UserError(f"{shown(folder)}: has no *.safetensors and no *.bin file")
    for path in files:
        _check_link(path, folder)
        with path.open("rb") as stream:
            if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise UserError(
                    f"{shown(path)}: is a git-lfs pointer, not the weights; "
                    f"run: git -C {shown(folder)} lfs pull"
                )
    for index in folder.glob(f"*{tensors[0].suffix}.index.json"):
        shards = set(json.loads(index.read_text())["weight_map"].values())
        missing = sorted(shards - {p.name for p in tensors})
        if missing:
            raise UserError(f"{shown(folder)}: {index.name} names {missing[0]}, which is missing")
    _check_architecture(folder / "config.json")
    for path in tensors:
        if path.suffix == ".safetensors":
            _check_tensors(path)
    return folder


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


def _check_architecture(path: Path) -> None:
    """Reject a model that does not generate text. Without `architectures`, accept any model."""
    try:
        names = json.loads(path.read_text()).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise UserError(f"{shown(path)}: is not a JSON object: {error}") from error
    if not names or any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        return
    # The import takes seconds; most names need no look into the table.
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if not {*names} & {*KNOWN.values()}:
        raise UserError(
            f"{shown(path)}: architectures is {', '.join(names)}, which does not generate text; "
            "use a model whose architecture ends in ForCausalLM or LMHeadModel"
        )


def _check_tensors(path: Path) -> None:
    """Compare the file's list of tensors with its size, without reading the tensors."""
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        raise UserError(
            f"{shown(path)}: is damaged or its download is incomplete ({error}); download it again"
        ) from error
