"""Wait for a condition: a file, a server, a process's end."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], timeout: float, interval: float = 0.1) -> T:
    """Call `condition` until its result is true, and return that result.

    Let the condition raise what ends the wait early, such as the death of a process. Asynchronous
    code calls `await asyncio.to_thread(wait_until, ...)`.

    Args:
        condition: takes no arguments; is called at least once.
        timeout: seconds from now, after which a last call is made.
        interval: seconds between two calls.

    Raises:
        TimeoutError: the result of the last call is still not true.
    """
    deadline = time.monotonic() + timeout
    while True:
        in_time = time.monotonic() < deadline
        if result := condition():
            return result
        if not in_time:
            raise TimeoutError(f"the condition is still not true after {timeout:g} s")
        time.sleep(interval)
