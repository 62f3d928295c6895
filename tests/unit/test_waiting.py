"""`wait_until` and its deadline."""

import time

import pytest

from deploy.common.waiting import wait_until


def test_returns_the_first_true_result():
    results = iter([None, "", "ready", "later"])
    assert wait_until(lambda: next(results), timeout=5, interval=0) == "ready"


def test_timeout_is_an_error():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"still not true after 0\.2 s"):
        wait_until(lambda: False, timeout=0.2, interval=0.01)
    assert 0.2 <= time.monotonic() - began < 1


def test_calls_the_condition_once_with_no_time_left():
    assert wait_until(lambda: True, timeout=0)


def test_exception_of_the_condition_ends_the_wait():
    def condition() -> bool:
        raise RuntimeError("the process died")

    with pytest.raises(RuntimeError, match="the process died"):
        wait_until(condition, timeout=5)
