"""Run commands of `deploy.vertex` in processes that need not import Google's SDK: they are forks.

The import takes seconds of CPU time. So one process imports the SDK, opens no connection, and forks
for every command. The fork is killed like any process that a user starts.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from deploy.common.paths import ROOT

FIRST_POLL, LONGEST_POLL = 0.02, 0.05
"""Seconds: the stand-in is hundreds of times as fast as the platform."""


class Preloaded:
    """The process that forks; use it as a context manager. Its environment is that of its start."""

    def __enter__(self) -> "Preloaded":
        command = [sys.executable, "-m", "tests.vertex.preloaded"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
        assert self._process.stdin and self._process.stdout
        self._input, self._output = self._process.stdin, self._process.stdout
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)

    def start(self, arguments: list[str], output: Path) -> int:
        """Start `python -m deploy.vertex ARGUMENTS`, and return its process ID."""
        print(json.dumps([arguments, str(output)]), file=self._input, flush=True)
        return int(self._output.readline())

    def wait(self) -> int:
        """Wait for the end of the command; return its exit status, or minus its signal."""
        return int(self._output.readline())


def serve() -> None:
    """Fork for every line of standard input; print the process ID, and at its end the status."""
    from deploy.vertex import (  # noqa: F401  what the commands import when they run
        credentials,
        deployer,
        operations,
        predict,
    )
    from deploy.vertex.__main__ import main

    operations.FIRST_POLL, operations.LONGEST_POLL = FIRST_POLL, LONGEST_POLL
    for line in sys.stdin:
        arguments, output = json.loads(line)
        child = os.fork()
        if child == 0:
            file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            # A shell starts background jobs with SIGINT ignored, and the fork inherits that.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = main(arguments)
            sys.stdout.flush()
            os._exit(status)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
