"""Fail if the server has become slow: `ours int8` through HTTP against the same engine without it.

    python -m benchmarks.check

Both are alive at once and take turns, so the machine's moods touch both and the ratio stays. About
a minute. It measures what a change to the handler can spoil; an engine that is slow by itself is
slow on both sides, and `make bench` tells.
"""

import statistics
import sys

from benchmarks.load import closed_loop
from benchmarks.serving import engine_loop
from benchmarks.systems import SYSTEMS
from deploy.cli import command
from deploy.paths import UserError

PAIRS = 7
CLIENTS = 8
LEAST = 0.85
"""By hand the median of such pairs was 0.93 to 0.96, single pairs 0.81 to 1.09. A server that is
20 % slower would have 0.77 at most."""


def ratios() -> list[float]:
    """Tokens per second through HTTP, divided by those of the engine alone, pair by pair."""
    pairs = []
    common = {"clients": CLIENTS, "requests_each": 2}
    with SYSTEMS["ours int8"].start() as (target, _), SYSTEMS["direct int8"].start() as (engine, _):
        for seed in range(PAIRS + 1):
            report = closed_loop(target, **common, seed=seed, warm_up=0)
            if report.errors:
                raise UserError(f"requests failed: {report.errors}")
            pairs.append(report.tokens_per_second / engine_loop(engine, **common, seed=seed))
    return pairs[1:]  # the first pair is the warm-up


@command
def main(arguments: list[str] | None) -> None:
    """Measure and judge."""
    pairs = ratios()
    middle = statistics.median(pairs)
    spread = ", ".join(f"{ratio:.2f}" for ratio in pairs)
    print(f"through HTTP / engine alone, {CLIENTS} clients: {middle:.2f} (pairs: {spread})")
    if middle < LEAST:
        raise UserError(f"the ratio is {middle:.2f}; at least {LEAST} is wanted")


if __name__ == "__main__":
    sys.exit(main())
