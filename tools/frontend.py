"""Compile `deploy/torchserve/*.java` into `frontend.jar` beside them.

    python -m tools.frontend

The jar is in the repository, because a user's machine may have Java, but no compiler. The same
source and the same version of the compiler give the same bytes, which a test checks.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "deploy" / "torchserve"
SOURCES, JAR = sorted(FOLDER.glob("*.java")), FOLDER / "frontend.jar"
SERVICES = {"META-INF/services/org.pytorch.serve.servingsdk.ModelServerEndpoint": "WorkerMetrics"}
"""Our classes that TorchServe looks for, by the file in the jar that names them."""
RELEASE = "17"
"""The oldest Java that TorchServe runs on, and the compiler that makes the committed jar."""


def compiler() -> str | None:
    """Return a javac of version `RELEASE`, if this machine has one."""
    found = shutil.which("javac")
    candidates = [found] if found else []
    candidates += [str(javac) for javac in Path("/usr/lib/jvm").glob("*/bin/javac")]
    for javac in candidates:
        run = subprocess.run([javac, "-version"], capture_output=True, text=True)
        if run.stdout.startswith(f"javac {RELEASE}."):
            return javac
    return None


def build(javac: str, target: Path) -> None:
    """Compile the sources into a jar whose bytes depend only on the source and the compiler."""
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchserve is not installed")
    classpath = Path(spec.origin).parent / "frontend" / "*"
    with tempfile.TemporaryDirectory() as folder:
        options = [
            "-Xlint:all,-processing",
            "-Werror",
            "--release",
            RELEASE,
            "-g:none",
            "-cp",
            str(classpath),
        ]
        subprocess.run([javac, *options, "-d", folder, *map(str, SOURCES)], check=True)
        with zipfile.ZipFile(target, "w") as jar:
            for file in sorted(Path(folder).rglob("*.class")):
                entry = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # dated 1980
                jar.writestr(entry, file.read_bytes())  # stored, not compressed
            for file_name, class_name in SERVICES.items():
                jar.writestr(zipfile.ZipInfo(file_name), f"serving.{class_name}\n")


def main() -> int:
    """Write the jar."""
    javac = compiler()
    if not javac:
        print(f"error: no javac {RELEASE}; on Debian, install openjdk-{RELEASE}-jdk-headless")
        return 1
    build(javac, JAR)
    print(f"{JAR}: {JAR.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
