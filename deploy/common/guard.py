"""End a process group when the program that started it is gone, however it went.

`atexit` does not run after SIGKILL, and that is how nbval and JupyterLab end a kernel. A group of
its own, which Ctrl-C must not reach, would then live on.
"""

import subprocess
import sys
from pathlib import Path

_CODE = """
import os, shutil, signal, sys, time
sys.stdin.buffer.read()  # ends when the last one who could write is gone
group = int(sys.argv[1])
try:
    os.kill(group, signal.SIGTERM)
    time.sleep(2)
    os.killpg(group, signal.SIGKILL)
except ProcessLookupError:
    pass
shutil.rmtree(sys.argv[2], ignore_errors=True)
"""


def guard(group: int, folder: Path) -> subprocess.Popen:
    """Start a guard, to be killed by `dismiss` once the group has ended in the usual way.

    Args:
        group: process group, whose first process gets SIGTERM two seconds before all get SIGKILL.
        folder: removed as well.
    """
    return subprocess.Popen(
        [sys.executable, "-S", "-c", _CODE, str(group), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def dismiss(guardian: subprocess.Popen) -> None:
    """Without letting it act: the group's number may belong to somebody else by now."""
    guardian.kill()
    guardian.stdin.close()
    guardian.wait()
