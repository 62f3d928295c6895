"""The command that starts TorchServe, on this machine (`server.py`) and in the container.

The container's entry (`docker/serve.py`) imports this file, which imports only the standard library
and PyYAML.
"""

import importlib.util
import os
import re
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

HEAP = "512m"
"""Java's heap limit. Java's default is a quarter of the machine; the frontend uses 0.2 GB."""
BUFFERS = 384 * 2**20
"""Bytes for Java's network buffers, outside the heap: 1,000 bodies of the largest size."""
OVER_LIMIT = 65_536
"""Bytes by which a body may exceed the app's limit and still reach the handler, whose error says
what is allowed. TorchServe rejects larger bodies with an empty 413, before it reads them."""
FOREIGN_LIMIT = 1_000_000
"""The limit in bytes for the archive of another handler, without `app.limits.max_body_bytes`."""
_CONFIG = "model-config.yaml"
CORS_ORIGIN = "CORS_ORIGIN"
"""The environment variable with the origin of the web pages that may use the server. The handler
reads it too (`handler/origin.py`)."""
_ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://([a-z0-9._-]+|\[[0-9a-f:]+\])(:[1-9][0-9]{0,4})?")

_PASSED = re.compile(
    # The system, Java and Python.
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|JAVA_HOME|LD_\w+|DYLD_\w+|MALLOC_\w+|GLIBC_TUNABLES"
    r"|PYTHON\w+|VIRTUAL_ENV|CONDA_PREFIX"
    # Threads and devices of the engines.
    r"|(OMP|GOMP|KMP|MKL|OPENBLAS|ONEDNN|DNNL|OV|OPENVINO|CUDA|NVIDIA|NCCL|TORCH|PYTORCH)_\w+"
    r"|(TRITON|TORCHINDUCTOR|TOKENIZERS|VLLM|FLASHINFER)_\w+"
)
_SECRET = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|CREDENTIAL|APIKEY|(^|_)(KEYS?|AUTH|PASS|PAT)(_|$)", re.IGNORECASE
)


def java_command(
    java: Path | str,
    *,
    config: Path,
    log4j: Path,
    store: Path,
    archive: str,
    temporary: Path,
    python: Path | str = sys.executable,
    log: Path | None = None,
) -> list[str]:
    """Return Java and its arguments.

    We do not use the `torchserve` command: it leaves Java running when it is stopped, and does not
    report when Java has died. The main class is ours (`Frontend.java`).

    Args:
        java: the program.
        config: config.properties.
        log4j: the logging configuration.
        store: the model store.
        archive: the archive's name in the store; without `.mar` it is the model's name.
        temporary: an empty folder for Java's temporary files.
        python: the interpreter of the workers.
        log: a file for the log, which rotates. None is stdout.
    """
    spec = importlib.util.find_spec("ts")  # importing TorchServe's package would import torch
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchserve is not installed")
    torchserve = Path(spec.origin).parent
    name = archive.removesuffix(".mar")
    frontend = torchserve / "frontend"
    classes = os.pathsep.join([str(Path(__file__).parent / "frontend.jar"), str(frontend / "*")])
    home = _home(torchserve, temporary)
    command: list[str | Path] = [java, *_memory_options(), f"-Dmodel_server_home={home}"]
    # Unix sockets need netty's native library: beside the jar in the image (docker/slim.py).
    # Elsewhere netty extracts it there, and not to /tmp, which may be mounted with noexec.
    command += [f"-Djava.library.path={frontend}", f"-Dio.netty.native.workdir={frontend}"]
    command += [f"-Djava.io.tmpdir={temporary}", f"-Dlog4j.configurationFile={log4j}"]
    if log:
        command += ["-Dserving.appender=FILE", f"-Dserving.log={log}"]
    command += ["-cp", classes, "serving.Frontend"]
    command += ["--python", python, "-f", config, "-ncs"]
    command += ["-s", store, "-m", f"{name}={archive}"]
    return [str(part) for part in command]


def _home(torchserve: Path, temporary: Path) -> Path:
    """Make the folder in which Java looks for files of TorchServe's package; return it.

    Links lead to the package, and to our own program of a worker (`worker.py`).
    """
    home = temporary / "torchserve"
    package = home / "ts"
    package.mkdir(parents=True, exist_ok=True)
    links = {name: torchserve / name for name in ("configs", "version.txt")}
    links["model_service_worker.py"] = Path(__file__).absolute().with_name("worker.py")
    for name, target in links.items():
        (package / name).unlink(missing_ok=True)  # from an earlier start of the same container
        (package / name).symlink_to(target)
    return home


def _memory_options() -> list[str]:
    """Bound Java's memory, and end Java when the heap is full instead of leaving it half alive.

    Connections use memory outside the heap. When it is used up, Java tries to free some for half a
    second, at each request, and all connections wait. Netty's own counter
    (`maxDirectMemory`) fails at once, which costs only the connection that needed the memory. It
    needs access to a private constructor that Java has up to version 20.
    """
    reflection = [
        f"--add-opens=java.base/{name}=ALL-UNNAMED" for name in ("java.nio", "jdk.internal.misc")
    ]
    return [
        f"-Xmx{HEAP}",
        f"-XX:MaxDirectMemorySize={BUFFERS}",
        f"-Dio.netty.maxDirectMemory={BUFFERS}",
        *("-Dio.netty.tryReflectionSetAccessible=true", *reflection),
        "-XX:+ExitOnOutOfMemoryError",
        "-XX:+UseParallelGC",  # counts 98 % of the time in collections as out of memory
    ]


def max_request_size(archive: Path) -> int:
    """Return the size of the largest body that TorchServe should accept for an archive, in bytes.

    The handler's own limit is `app.limits.max_body_bytes`. TorchServe holds each body in Java's
    memory, several times, before the handler can reject it.

    Args:
        archive: a folder, or a `.mar` file.

    Raises:
        ValueError: its model-config.yaml cannot be read.
    """
    settings = app_settings(archive)
    try:
        limit = int(settings.get("limits", {}).get("max_body_bytes", FOREIGN_LIMIT))
    except (AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{archive}: {_CONFIG} cannot be read: {error!r}") from error
    return limit + OVER_LIMIT


def engine_name(archive: Path) -> str:
    """Return the engine of an archive of our handler; "" for another handler.

    Raises:
        ValueError: its model-config.yaml cannot be read.
    """
    engine = app_settings(archive).get("engine")
    return str(engine.get("name", "")) if isinstance(engine, dict) else ""


def app_settings(archive: Path) -> dict[str, Any]:
    """Return what stands under `app` in an archive's model-config.yaml.

    Args:
        archive: a folder, or a `.mar` file.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        if archive.is_dir():
            text = (archive / _CONFIG).read_bytes()
        else:
            with zipfile.ZipFile(archive) as mar:
                text = mar.read(_CONFIG)
        found = yaml.safe_load(text).get("app", {})
    except (OSError, KeyError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"{archive}: {_CONFIG} cannot be read: {error!r}") from error
    except (yaml.YAMLError, zipfile.BadZipFile) as error:
        raise ValueError(f"{archive}: {_CONFIG} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{archive}: {_CONFIG} cannot be read: app is no mapping")
    return found


def server_environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Choose the variables of this machine that TorchServe's processes get.

    An allow-list of what the system and the engines read. The server needs neither HF_TOKEN nor
    anybody's cloud credentials.
    """
    passed = {name: value for name, value in variables.items() if _PASSED.fullmatch(name)}
    return without_secrets(passed)


def without_secrets(variables: Mapping[str, str]) -> dict[str, str]:
    """Leave out the variables whose names say that they hold a secret."""
    return {name: value for name, value in variables.items() if not _SECRET.search(name)}


def cors_settings(origin: str) -> dict[str, str]:
    """Return variables with the CORS headers for config.properties; empty ones send none.

    TorchServe answers a browser's preflight itself, with the same headers for every page.

    Args:
        origin: of the pages that may use the server, such as `http://localhost:3000`; empty for
            none, `*` for all.

    Raises:
        ValueError: it is no origin.
    """
    if origin and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{CORS_ORIGIN}: {origin!r} is no origin; write one, such as http://localhost:3000, "
            "without a path and in lower case, or * for all"
        )
    return {
        CORS_ORIGIN: origin,
        # "*" does not include the header with an API key.
        "CORS_HEADERS": "authorization, *" if origin else "",
        "CORS_METHODS": "GET, POST" if origin else "",
    }


def read_properties(path: Path) -> dict[str, str]:
    """Read a file of `key=value` lines; `#` begins a comment line."""
    lines = (line.strip() for line in path.read_text().splitlines())
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
