"""How much memory this process may use, and what has to fit into it.

Without a check a server reports that it is ready, and the kernel ends it later, when the KV cache
fills. psutil reads the memory of the machine and of processes, but not the limits of a control
group, which is how a container's memory is limited.
"""

import resource
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
_FRONTEND_GROWTH = 100 * 2**20
"""Bytes that the frontend takes under load, in addition to those while the worker starts."""


class MemoryLimitError(ValueError):
    """What has to fit into memory does not."""


@dataclass(frozen=True)
class Limit:
    """An upper bound in bytes, and what sets it."""

    bytes: int
    source: str


def physical_limits(root: Path = Path("/"), *, machine: bool = True) -> list[Limit]:
    """Return the bounds on memory in use, the smallest first: of control groups, of the machine.

    The machine's swap counts for the machine, because a process that swaps is slow but not
    killed. A control group's does not: its limit says how much memory the container should take.

    Args:
        root: where `proc` and `sys` are.
        machine: whether to include the machine.
    """
    group = "the memory limit of the container or control group (cgroup)"
    found = [Limit(size, group) for size in _group_limits(root)]
    if machine:
        size = psutil.virtual_memory().total + psutil.swap_memory().total
        found.append(Limit(size, "the memory of this machine, with swap,"))
    return sorted(found, key=lambda limit: limit.bytes)


def check_memory(
    setting: str, parts: Mapping[str, int], *, reserved: bool = False, machine: bool = True
) -> None:
    """Make sure that everything fits into memory.

    Args:
        setting: the field that the error names, and its value.
        parts: bytes by name: what there will be beside this process and the frontend. The last one
            is what the setting decides.
        reserved: this process has reserved all parts, so no limit on its address space matters.
        machine: whether the machine's own memory is a limit.

    Raises:
        MemoryLimitError: names the sizes, and the first limit that they exceed.
    """
    process = psutil.Process()
    memory = process.memory_info()
    others = {"this process": memory.rss, "the frontend": _frontend(process)}
    for limit in physical_limits(machine=machine):
        _compare(setting, parts, others, limit)
    for kind, used in (("RLIMIT_AS", memory.vms), ("RLIMIT_DATA", getattr(memory, "data", 0))):
        size, _ = resource.getrlimit(getattr(resource, kind))
        if size != resource.RLIM_INFINITY and not reserved:
            limit = Limit(size, f"the limit of a process here ({kind}, see ulimit)")
            _compare(setting, parts, {"what this process has reserved": used}, limit)


def _compare(
    setting: str, parts: Mapping[str, int], others: Mapping[str, int], limit: Limit
) -> None:
    needed = sum(parts.values()) + sum(others.values())
    if needed <= limit.bytes:
        return
    name, wanted = list(parts.items())[-1]
    sizes = [f"{size / GIB:.2f} ({part})" for part, size in {**parts, **others}.items() if size]
    left = max(0, limit.bytes - needed + wanted)
    raise MemoryLimitError(
        f"{setting} does not fit into memory: {' + '.join(sizes)} = {needed / GIB:.2f} GiB; "
        f"{limit.source} is {limit.bytes / GIB:.2f} GiB, which leaves {left / GIB:.2f} for {name}"
    )


def _frontend(process: psutil.Process) -> int:
    """Return what TorchServe's frontend will take, if it started this process."""
    with suppress(psutil.Error):  # of processes of other users, some systems show nothing
        parent = process.parent()
        while parent and parent.name() != "java":
            parent = parent.parent()
        if parent:
            return parent.memory_info().rss + _FRONTEND_GROWTH
    return 0


def _group_limits(root: Path) -> list[int]:
    """Return the limits of the control groups that this process is in, and of those around them.

    Sources: cgroups(7), the kernel's documentation of both versions. In a container the path in
    `/proc/self/cgroup` can be that of the host; then only the root of the mount exists.
    """
    limits = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        folder = mount / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(mount):
                break
            limits += _read_limit(place / name)
    return limits


def _read_limit(path: Path) -> list[int]:
    try:
        text = path.read_text().strip()
    except OSError:  # the root group has none
        return []
    return [int(text)] if text.isdigit() else []  # "max"
