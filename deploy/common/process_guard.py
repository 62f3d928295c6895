"""End the processes of a server if the program that started it dies.

`atexit` does not run after SIGKILL, and nbval and JupyterLab end a kernel with SIGKILL. A separate
process group, which Ctrl-C does not reach, would then keep running. A guard process ends the group
and removes its folder. In case the guard dies, too, the kernel ends the group's first process (on
Linux), whose workers do not outlive it.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from queue import Queue
from typing import Any

_BOUND = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() == int(sys.argv[1]):
    os.execvp(sys.argv[2], sys.argv[2:])
"""


class BoundProcess:
    """A process that the kernel kills when this program ends, on Linux.

    The kernel does that when the *thread* ends that started the process. So a thread starts it, and
    lives until `release`.
    """

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        if sys.platform == "linux":
            bound = [sys.executable, "-S", "-c", _BOUND, str(os.getpid())]
            command = [*bound, *command]
        self._released = threading.Event()
        started: Queue[subprocess.Popen | BaseException] = Queue()

        def run() -> None:
            try:
                started.put(subprocess.Popen(command, **options))
            except BaseException as error:
                started.put(error)
            self._released.wait()

        threading.Thread(target=run, name="starter", daemon=True).start()
        result = started.get()
        if isinstance(result, BaseException):
            self.release()
            raise result
        self.process = result

    def release(self) -> None:
        """End the thread, once the process has ended."""
        self._released.set()


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
