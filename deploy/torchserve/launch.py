"""The command that starts TorchServe: one for the laptop (`server.py`) and the container.

The container's entry (`docker/serve.py`) imports this file alone, so: standard library only.
"""

import importlib.util
import sys
from pathlib import Path

HEAP = "512m"
"""Java's memory. Its default is a quarter of the machine's, and the frontend uses 0.2 GB."""


def java_command(
    java: Path | str, *, config: Path, log4j: Path, store: Path, archive: str, temporary: Path
) -> list[str]:
    """Java and its arguments. Not the `torchserve` command: that wrapper, when stopped, leaves Java
    running, and does not tell when Java has died.

    Args:
        java: the program.
        config: config.properties.
        log4j: how to log.
        store: the model store.
        archive: the archive's name in it; without `.mar` it is the model's name.
        temporary: a folder of Java's own.
    """
    home = Path(importlib.util.find_spec("ts").origin).parent.parent
    name = archive.removesuffix(".mar")
    command = [java, f"-Xmx{HEAP}", f"-Dmodel_server_home={home}"]
    command += [f"-Djava.io.tmpdir={temporary}", f"-Dlog4j.configurationFile={log4j}"]
    command += ["-cp", home / "ts" / "frontend" / "*", "org.pytorch.serve.ModelServer"]
    command += ["--python", sys.executable, "-f", config, "-ncs"]
    command += ["-s", store, "-m", f"{name}={archive}"]
    return [str(part) for part in command]


def read_properties(path: Path) -> dict[str, str]:
    """A file of `key=value` lines; `#` begins a comment line."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
