"""The simulated autoscaler against the rule that Google documents."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.vertex.autoscaling import TICK_SECONDS, WINDOW_SECONDS, replica_hours, simulate

loads = st.lists(st.floats(0, 50, allow_nan=False), min_size=1, max_size=80)
bounds = st.tuples(st.integers(1, 5), st.integers(0, 20)).map(lambda b: (b[0], b[0] + b[1]))
targets = st.integers(1, 100)


@given(loads, bounds, targets, st.integers(0, 600))
def test_wants_the_highest_value_of_the_last_five_minutes(load, bound, target, start):
    minimum, maximum = bound
    states = simulate(
        load,
        len(load) * TICK_SECONDS,
        minimum=minimum,
        maximum=maximum,
        target=target,
        start_seconds=start,
    )
    assert [state.seconds for state in states] == [i * TICK_SECONDS for i in range(len(load))]
    window = WINDOW_SECONDS // TICK_SECONDS
    for i, state in enumerate(states):
        recent = max(load[max(0, i + 1 - window) : i + 1])
        needed = math.ceil(round(100 * recent / target, 9))
        assert state.wanted == min(max(needed, minimum), maximum)


@given(loads, bounds, st.integers(0, 600))
def test_replicas_stay_within_bounds_and_start_in_time(load, bound, start):
    minimum, maximum = bound
    states = simulate(load, 1800, minimum=minimum, maximum=maximum, start_seconds=start)
    for state in states:
        assert minimum <= state.replicas <= maximum
        assert state.replicas + state.starting <= maximum
        assert state.utilization == pytest.approx(100 * state.load / state.replicas)
    # after the window and a start under the same load, what is wanted is what serves
    if start <= 1800 - len(load) * TICK_SECONDS - WINDOW_SECONDS - TICK_SECONDS:
        assert states[-1].replicas == states[-1].wanted and states[-1].starting == 0


def test_scales_up_after_a_start_and_down_after_the_window():
    def load(second: int) -> float:
        return 2.4 if 600 <= second < 1200 else 0.3

    states = {s.seconds: s for s in simulate(load, 2400, maximum=8, start_seconds=180)}
    assert states[585].wanted == 1 and states[600].wanted == 4  # 2.4 / 0.6
    assert states[765].replicas == 1 and states[780].replicas == 4
    assert states[600].utilization == pytest.approx(240) and states[780].utilization == 60
    # the last tick with load is at 1185; five minutes of ticks later it is forgotten
    assert states[1470].wanted == 4 and states[1485].wanted == 1
    assert states[1500].replicas == 1


def test_adds_no_replica_exactly_at_the_target():
    assert {s.wanted for s in simulate([0.6], 600, maximum=9)} == {1}
    assert {s.wanted for s in simulate([1.8], 600, minimum=3, maximum=9)} == {3}


@pytest.mark.slow
@settings(max_examples=30, deadline=None)  # 24,000 ticks each
@given(st.integers(1, 9), st.integers(1, 100))
def test_constant_replicas_cost_their_hours(replicas, hours):
    states = simulate([0], hours * 3600, minimum=replicas, maximum=replicas)
    assert replica_hours(states) == pytest.approx(replicas * hours)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"minimum": 0}, "minimum=0"),
        ({"minimum": 3, "maximum": 2}, "minimum=3, maximum=2"),
        ({"target": 0}, "target=0"),
        ({"target": 101}, "target=101"),
        ({"start_seconds": -1}, "start_seconds=-1"),
        ({"load": []}, "load: empty"),
        ({"load": [-1]}, "load at 0 s: -1"),
        ({"load": [float("nan")]}, "load at 0 s: nan"),
    ],
)
def test_rejects_wrong_arguments_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"load": [1], "seconds": 60} | wrong)
