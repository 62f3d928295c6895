"""A guard process that ends a process group if the program that started the group dies.

`atexit` does not run after SIGKILL, and nbval and JupyterLab end a kernel with SIGKILL. A separate
process group, which Ctrl-C does not reach, would then keep running.
"""

import subprocess
import sys
from pathlib import Path

_CODE = """
import os, shutil, signal, sys, time
sys.stdin.buffer.read()  # returns when the starting program has died and its pipe is closed
group = int(sys.argv[1])
try:
    os.kill(group, signal.SIGTERM)
    time.sleep(2)
    os.killpg(group, signal.SIGKILL)
except ProcessLookupError:
    pass
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


def start_guard(group: int, folder: Path) -> subprocess.Popen:
    """Start a guard for a process group; call `dismiss_guard` once the group has ended.

    Args:
        group: the process group. Its first process gets SIGTERM; two seconds later all of the
            group get SIGKILL.
        folder: removed after that.
    """
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _CODE, str(group), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def dismiss_guard(guard: subprocess.Popen) -> None:
    """Kill a guard before it acts: the group's id may belong to another program by now."""
    guard.kill()
    guard.communicate()  # closes the pipe and reaps the process
