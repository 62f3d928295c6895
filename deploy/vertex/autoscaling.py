"""Simulate how Vertex AI adds and removes replicas: pure arithmetic, for plots.

The rule is from "Scale inference nodes by using autoscaling"
(https://docs.cloud.google.com/vertex-ai/docs/predictions/autoscaling). Every 15 seconds the service
computes how many replicas the current utilization needs,

    wanted = ceil(replicas * utilization / target)

and uses the highest value of the last 5 minutes. So it scales up at the next tick, and down only 5
minutes after the load is gone.

We simplify. The load is in replicas' worth of work and spreads evenly. Work that does not fit is
lost, not queued, and shows as a utilization over 100 %. The utilization is known at once; the real
metric is sampled and delayed. A new replica takes `start_seconds`; Google documents no number.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

TICK_SECONDS = 15
WINDOW_SECONDS = 300
TARGET_PERCENT = 60


class AutoscalerState(NamedTuple):
    """One tick of the autoscaler."""

    seconds: int
    load: float
    """Work, in replicas that would be busy all the time."""
    wanted: int
    """What the rule wants, within minimum and maximum."""
    replicas: int
    """Those that serve. You pay for them."""
    starting: int
    """Those that are requested and do not serve yet."""
    utilization: float
    """Percent: load divided by serving replicas. Over 100, work is lost."""


def simulate(
    load: Callable[[int], float] | Sequence[float],
    seconds: int,
    *,
    minimum: int = 1,
    maximum: int = 1,
    target: float = TARGET_PERCENT,
    start_seconds: int = 180,
) -> list[AutoscalerState]:
    """Simulate the autoscaler under a load, and return one state for every 15 s.

    Args:
        load: replicas' worth of work, as a function of the second or as one value per tick. The
            last value then stays.
        seconds: the length of the simulation.
        minimum: the smallest number of replicas.
        maximum: the largest number of replicas.
        target: the utilization to keep, in percent.
        start_seconds: from the request for a replica to its first response.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 1 <= minimum <= maximum:
        raise ValueError(f"minimum={minimum}, maximum={maximum}: should be 1 <= minimum <= maximum")
    if not 0 < target <= 100:
        raise ValueError(f"target={target}: should be over 0 and at most 100 percent")
    if start_seconds < 0:
        raise ValueError(f"start_seconds={start_seconds}: should be 0 or more")
    at = load if callable(load) else _steps(load)
    recent: deque[int] = deque(maxlen=WINDOW_SECONDS // TICK_SECONDS)
    ready_at = [0] * minimum  # when each replica serves, oldest first
    states = []
    for now in range(0, seconds, TICK_SECONDS):
        work = float(at(now))
        if not work >= 0:
            raise ValueError(f"load at {now} s: {work}; should be 0 or more")
        serving = sum(moment <= now for moment in ready_at)
        utilization = 100 * work / serving
        # serving * utilization / target, without its rounding errors.
        recent.append(math.ceil(round(100 * work / target, 9)))
        wanted = min(max(*recent, minimum), maximum)
        states.append(
            AutoscalerState(now, work, wanted, serving, len(ready_at) - serving, utilization)
        )
        ready_at += [now + start_seconds] * (wanted - len(ready_at))
        del ready_at[wanted:]  # the youngest go first, which do not serve yet
    return states


def replica_hours(states: Sequence[AutoscalerState]) -> float:
    """The hours that you pay for: those of serving and of starting replicas.

    Google says "you pay for each model deployed". We read this as including starting replicas.
    """
    return sum(state.replicas + state.starting for state in states) * TICK_SECONDS / 3600


def _steps(values: Sequence[float]) -> Callable[[int], float]:
    if not values:
        raise ValueError("load: empty; give one value per tick, or a function of the second")
    return lambda second: values[min(second // TICK_SECONDS, len(values) - 1)]
