"""What HTTP costs: `ours int8` through TorchServe against the same engine without it.

    python -m benchmarks.check             # 8 clients, a minute; fails if the server became slow
    python -m benchmarks.check --write     # 1, 8 and 32 clients: results/http.json

Both are alive at once and take turns of a few seconds, so the machine's moods touch both and the
ratio stays; between two systems of `make bench` lie minutes. An engine that is slow by itself is
slow on both sides; `make bench` tells.
"""

import argparse
import sys

from benchmarks.load import Target, closed_loop
from benchmarks.record import summary, write
from benchmarks.serving import engine_loop
from benchmarks.systems import SYSTEMS
from deploy.common.cli import command
from deploy.common.paths import UserError
from handler.engine import Engine

PAIRS = 7
REQUESTS_EACH = {1: 4, 8: 2, 32: 2}
"""Clients -> requests each of them sends."""

LEAST = 0.85
"""By hand the median of such pairs was 0.93 to 0.98, single pairs 0.81 to 1.09. A server that is
20 % slower would have 0.78 at most."""


def ratios(target: Target, engine: Engine, clients: int) -> list[float]:
    """Tokens per second through HTTP, divided by those of the engine alone, pair by pair."""
    pairs = []
    load = {"clients": clients, "requests_each": REQUESTS_EACH[clients]}
    for seed in range(PAIRS + 1):
        report = closed_loop(target, **load, seed=seed, warm_up=0)
        if report.errors:
            raise UserError(f"requests failed: {report.errors}")
        pairs.append(report.tokens_per_second / engine_loop(engine, **load, seed=seed))
    return pairs[1:]  # the first pair is the warm-up


@command
def main(arguments: list[str] | None) -> None:
    """Measure; judge the ratio with 8 clients."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.check")
    parser.add_argument("--write", action="store_true", help="all numbers of clients, kept")
    options = parser.parse_args(arguments)
    found = {}
    with SYSTEMS["ours int8"].start() as (target, _), SYSTEMS["direct int8"].start() as (engine, _):
        for clients in REQUESTS_EACH if options.write else (8,):
            pairs = summary(ratios(target, engine, clients))
            found[f"{clients} clients"] = pairs
            spread = ", ".join(f"{ratio:.2f}" for ratio in pairs["values"])
            print(
                f"through HTTP / engine alone, {clients} clients: {pairs['median']:.2f} ({spread})"
            )
    if options.write:
        print(write("http", found, ["torchserve", "openvino", "openvino-genai"]).name)
    if (middle := found["8 clients"]["median"]) < LEAST:
        raise UserError(f"the ratio is {middle:.2f}; at least {LEAST} is wanted")


if __name__ == "__main__":
    sys.exit(main())
