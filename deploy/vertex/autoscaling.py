"""How Vertex AI adds and removes replicas, simulated: pure arithmetic, to be plotted.

The rule, from "Scale inference nodes by using autoscaling"
(https://docs.cloud.google.com/vertex-ai/docs/predictions/autoscaling): every 15 seconds the service
computes how many replicas the present utilization asks for,

    wanted = ceil(replicas * utilization / target)

and goes to the highest of the values it computed in the last 5 minutes. So it scales up at the next
tick, and down only 5 minutes after the load has gone.

Our simplifications: load is in replicas' worth of work, spread evenly; work that does not fit is
lost, not queued, and shows as a utilization of over 100 %; utilization is known at once (the real
metric is sampled and delayed); a new replica takes `start_seconds`, for which Google promises no
number.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

TICK_SECONDS = 15
WINDOW_SECONDS = 300
TARGET_PERCENT = 60


class State(NamedTuple):
    """One tick of the autoscaler."""

    seconds: int
    load: float
    """Work asked for, in replicas that would be busy all the time."""
    wanted: int
    """What the rule asks for, within minimum and maximum."""
    replicas: int
    """Those that serve, and bill."""
    starting: int
    """Those that were asked for and do not serve yet."""
    utilization: float
    """Load over serving replicas, in per cent; over 100, work is lost."""


def simulate(
    load: Callable[[int], float] | Sequence[float],
    seconds: int,
    *,
    minimum: int = 1,
    maximum: int = 1,
    target: float = TARGET_PERCENT,
    start_seconds: int = 180,
) -> list[State]:
    """What the autoscaler does under a load: one state for every 15 s.

    Args:
        load: replicas' worth of work at a second, as a function of it or one value per tick (the
            last one then lasts).
        seconds: how long to simulate.
        minimum: replicas that are always there.
        maximum: replicas at most.
        target: the utilization to be kept, in per cent.
        start_seconds: from asking for a replica to its first answer.

    Raises:
        ValueError: an argument is out of its range.
    """
    if not 1 <= minimum <= maximum:
        raise ValueError(f"minimum={minimum}, maximum={maximum}: should be 1 <= minimum <= maximum")
    if not 0 < target <= 100:
        raise ValueError(f"target={target}: should be over 0 and at most 100 per cent")
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
        # serving * utilization / target, without its rounding errors
        recent.append(math.ceil(round(100 * work / target, 9)))
        wanted = min(max(*recent, minimum), maximum)
        states.append(State(now, work, wanted, serving, len(ready_at) - serving, utilization))
        ready_at += [now + start_seconds] * (wanted - len(ready_at))
        del ready_at[wanted:]  # the youngest go first: those that do not serve yet
    return states


def replica_hours(states: Sequence[State]) -> float:
    """What is billed: serving and starting replicas, in hours.

    That starting replicas bill too is our reading of "you pay for each model deployed".
    """
    return sum(state.replicas + state.starting for state in states) * TICK_SECONDS / 3600


def _steps(values: Sequence[float]) -> Callable[[int], float]:
    if not values:
        raise ValueError("load: empty; give a value per tick, or a function of the second")
    return lambda second: values[min(second // TICK_SECONDS, len(values) - 1)]
