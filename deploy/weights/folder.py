"""Read a folder of weights: the files a server needs, their source, and whether they load."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deploy.common.paths import UserError, shown

SOURCE_FILE = "SOURCE.json"
"""The file that records the source of the weights. It is written last: a folder without it is
unfinished."""

RANDOM = "random weights"
"""The `source` of a checkpoint that `--shape-only` made."""

_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"


def source_of(folder: Path) -> dict:
    """Return the content of `SOURCE.json`; empty for a folder without one."""
    try:
        return json.loads((folder / SOURCE_FILE).read_text())
    except (OSError, ValueError):
        return {}


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder that a server needs; see `choose_files`."""
    names = [p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")]
    return [folder / name for name in choose_files(names)]


def choose_files(names: list[str]) -> list[str]:
    """Choose the files with the model and its tokenizer from a repository's files, weights first.

    Prefers safetensors to `*.bin`, which are pickles; transformers reads them with `weights_only`,
    which runs no code. Leaves out the formats of other frameworks.
    """
    names = sorted(name for name in names if "/" not in name)
    tensors = [n for n in names if n.endswith(".safetensors")]
    tensors = tensors or [n for n in names if n.endswith(".bin") and "training" not in n]
    index = f"{Path(tensors[0]).suffix}.index.json" if tensors else ".index.json"
    texts = [n for n in names if Path(n).suffix in {".json", ".txt", ".model", ".jinja"}]
    return tensors + [n for n in texts if not n.endswith(".index.json") or n.endswith(index)]


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
