"""Make requirements.lock from pyproject.toml: every package, exact, with hashes.

    python -m deploy.lock

uv resolves, for Linux and macOS at once; pip installs, with `--no-deps`, because what the lock
leaves out (see `[tool.uv]` in pyproject.toml) must stay out.
"""

import subprocess
import sys
from pathlib import Path

from deploy.paths import ROOT

TORCH_CPU_HASHES = (
    # torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl and ..._aarch64.whl on PyTorch's own
    # index, which uv does not ask; PyPI's hashes of torch are in the lock by themselves.
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "84453b69508ec79902f899c5ed9495acb9e2bbe9fda5f1d5d6f19e3c3842e1a7",
)


def main() -> int:
    """Resolve and write the lock."""
    lock = ROOT / "requirements.lock"
    command = [Path(sys.executable).with_name("uv"), "pip", "compile", "pyproject.toml"]
    command += ["--all-extras", "--universal", "--python-version", "3.11", "--generate-hashes"]
    command += ["--custom-compile-command", "make lock", "--quiet", "--output-file", lock]
    run = subprocess.run(command, cwd=ROOT)
    if run.returncode != 0:
        return run.returncode
    hashes = "".join(f"    --hash=sha256:{value} \\\n" for value in TORCH_CPU_HASHES)
    text = lock.read_text()
    lock.write_text(text.replace("torch==2.13.0 \\\n", "torch==2.13.0 \\\n" + hashes, 1))
    print(f"{lock.name}: {sum(not line.startswith((' ', '#')) for line in text.splitlines())} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
