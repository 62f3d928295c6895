"""What has to fit into memory, and the limits that psutil does not read."""

import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from handler import memory
from handler.memory import GIB, Limit, MemoryLimitError, check_memory, physical_limits

CACHE = "app.engine.openvino.cache_gb: 1"
MACHINE = psutil.virtual_memory().total + psutil.swap_memory().total


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V1 = "sys/fs/cgroup/memory/"
V2 = "sys/fs/cgroup/"


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "max\n"}, []),
        ({"proc/self/cgroup": "0::/\n", V2 + "memory.max": "734003200\n"}, [734003200]),
        (
            {
                "proc/self/cgroup": "0::/user.slice/a.scope\n",
                V2 + "user.slice/a.scope/memory.max": "3000\n",
                V2 + "user.slice/memory.max": "2000\n",
            },
            [2000, 3000],
        ),
        (
            {
                "proc/self/cgroup": "5:devices:/x\n4:cpu,memory:/docker/abc\n0::/\n",
                V1 + "memory.limit_in_bytes": "9223372036854771712\n",
                V1 + "docker/memory.limit_in_bytes": "5000\n",
                V1 + "docker/abc/memory.limit_in_bytes": "4000\n",
            },
            [4000, 5000, 9223372036854771712],
        ),
        (
            {  # in a container that shares the host's namespace: the path is the host's
                "proc/self/cgroup": "4:memory:/docker/abc\n",
                V1 + "memory.limit_in_bytes": "4000\n",
            },
            [4000],
        ),
    ],
    ids=["no groups", "v2, none", "v2", "v2, nested", "v1, nested", "v1, in a container"],
)
def test_limits_of_control_groups(tmp_path, files, limits):
    found = physical_limits(machine(tmp_path, files), machine=False)
    assert [limit.bytes for limit in found] == limits


def test_smallest_limit_is_first(tmp_path):
    root = machine(tmp_path, {"proc/self/cgroup": "0::/", V2 + "memory.max": "1000"})
    assert [limit.bytes for limit in physical_limits(root)] == [1000, MACHINE]


def limits(monkeypatch, *sizes: int) -> None:
    found = [Limit(size, "the memory limit of the container") for size in sizes]
    monkeypatch.setattr(memory, "physical_limits", lambda machine: found)


def test_error_names_setting_sizes_and_what_is_left(monkeypatch):
    limits(monkeypatch, GIB)
    parts = {"the model": GIB // 2, "the KV cache": GIB}
    with pytest.raises(MemoryLimitError) as error:
        check_memory(CACHE, parts)
    text = str(error.value)
    assert text.startswith(f"{CACHE} does not fit into memory: 0.50 (the model) + 1.00 (the KV ca")
    assert "(this process)" in text and "\n" not in text
    assert "the memory limit of the container is 1.00 GiB, which leaves 0." in text
    limits(monkeypatch, 3 * GIB)
    check_memory(CACHE, parts)


def test_process_and_frontend_count(monkeypatch):
    used = psutil.Process().memory_info().rss
    limits(monkeypatch, used + GIB + 50 * 2**20)
    check_memory(CACHE, {"the KV cache": GIB})
    monkeypatch.setattr(memory, "_frontend", lambda _: 300 * 2**20)
    with pytest.raises(MemoryLimitError, match=r"0\.29 \(the frontend\)"):
        check_memory(CACHE, {"the KV cache": GIB})


class Parent:
    """A process in the line above the worker's; one of root hides what it is."""

    def __init__(self, name: str, above: "Parent | None" = None) -> None:
        self._name, self._above = name, above

    def name(self) -> str:
        if self._name == "hidden":
            raise psutil.AccessDenied
        return self._name

    def parent(self) -> "Parent | None":
        return self._above

    def memory_info(self) -> SimpleNamespace:
        return SimpleNamespace(rss=200 * 2**20)


def test_processes_of_other_users_may_be_hidden():
    """As with /proc mounted with hidepid=1."""
    root = Parent("hidden")
    assert memory._frontend(Parent("python3", Parent("java", root))) == 300 * 2**20
    assert memory._frontend(Parent("python3", Parent("bash", root))) == 0
    assert memory._frontend(Parent("python3")) == 0


@pytest.mark.parametrize("kind", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limit_of_a_process_counts(monkeypatch, kind):
    limits(monkeypatch)
    real = resource.getrlimit
    # The process that runs all tests may be larger than any fixed limit.
    process = psutil.Process().memory_info()
    size = (process.vms if kind == "RLIMIT_AS" else process.data) + 2 * GIB
    bound = {getattr(resource, kind): (size, size)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: bound.get(which, real(which)))
    check_memory(CACHE, {"the KV cache": GIB})
    with pytest.raises(MemoryLimitError, match=rf"{kind}, see ulimit\) is {size / GIB:.2f} GiB"):
        check_memory("app.engine.openvino.cache_gb: 5", {"the KV cache": 5 * GIB})
    check_memory(CACHE, {"the KV cache": 5 * GIB}, reserved=True)


@pytest.mark.slow
def test_cache_is_checked_against_ulimit():
    """In a separate process, whose limit is real."""
    code = """
import resource
from pathlib import Path
from handler.config import engine_config
from handler.engine.openvino_engine import _scheduler
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
for size in (1, 4, 22):
    try:
        _scheduler(engine_config(openvino={"cache_gb": size}), Path("not read"))
        print(size, "fits")
    except ValueError as error:
        print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fits, *rejected = run.stdout.splitlines()
    assert fits == "1 fits"
    assert len(rejected) == 2
    for size, line in zip((4, 22), rejected, strict=True):
        assert line.startswith(f"app.engine.openvino.cache_gb: {size} does not fit into memory")


@pytest.mark.slow
def test_model_larger_than_the_container_is_not_loaded(tiny_llama, monkeypatch):
    """accelerate would use the memory of the whole machine."""
    from handler.config import engine_config
    from handler.engine import create_engine

    limits(monkeypatch, psutil.Process().memory_info().rss)
    config = engine_config(name="transformers")
    with pytest.raises(MemoryLimitError, match=r"transformers\.dtype: float32 .*\(the model\)"):
        create_engine(tiny_llama, config)
