"""Make requirements.lock from pyproject.toml: every package, exact, with hashes.

    python -m deploy.lock

uv resolves, for Linux and macOS at once; pip installs, with `--no-deps`, because what the lock
leaves out (see `[tool.uv]` in pyproject.toml) must stay out.
"""

import re
import subprocess
import sys
from pathlib import Path

from deploy.paths import ROOT

TORCH_CPU_HASHES = (
    # torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl and ..._aarch64.whl on PyTorch's own
    # index. uv asks PyPI, whose Linux wheels carry CUDA.
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
)

_EVERYWHERE = " ; sys_platform == 'darwin' or sys_platform == 'linux'"
_BLOCK = re.compile(r"^[a-z0-9][^\n]*\n(?:[ ]+[^\n]*\n)*", re.MULTILINE)


def main() -> int:
    """Resolve and write the lock."""
    lock = ROOT / "requirements.lock"
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "pyproject.toml"]
    command += ["--all-extras", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--custom-compile-command", "make lock", "--quiet", "--output-file", lock]
    run = subprocess.run(command, cwd=ROOT)
    if run.returncode != 0:
        return run.returncode
    text = tidy(lock.read_text())
    lock.write_text(text)
    print(f"{lock.name}: {len(set(re.findall(r'^([a-z0-9.-]+)==', text, re.MULTILINE)))} packages")
    return 0


def tidy(text: str) -> str:
    """Take out what was overridden away, and give torch its CPU build on Linux."""
    blocks = [block.replace(_EVERYWHERE, "") for block in _BLOCK.findall(text)]
    blocks = [block for block in blocks if "sys_platform == 'never'" not in block]
    at = next(i for i, block in enumerate(blocks) if block.startswith("torch=="))
    version = re.match(r"torch==([\d.]+)", blocks[at]).group(1)
    cpu = [f"torch=={version}+cpu ; sys_platform == 'linux'"]
    cpu += [f"    --hash=sha256:{value}" for value in TORCH_CPU_HASHES]
    first = f"torch=={version}"
    blocks[at] = blocks[at].replace(first, f"{first} ; sys_platform == 'darwin'", 1)
    blocks.insert(at, " \\\n".join(cpu) + "\n")
    return text[: _BLOCK.search(text).start()] + "".join(blocks)


if __name__ == "__main__":
    sys.exit(main())
