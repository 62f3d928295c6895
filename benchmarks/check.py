"""What HTTP costs: `ours int8` through TorchServe against the same engine without it.

    python -m benchmarks.check             # 8 clients, a minute; fails if the server became slow
    python -m benchmarks.check --write     # 1, 8 and 32 clients: results/http.json

Both run at once and take turns of a few seconds, so a change of the machine's speed affects both
and the ratio stays; in `make bench`, minutes pass between two systems. An engine that is slow by
itself is slow on both sides of the ratio; `make bench` shows that.
"""

import sys
from typing import Annotated

import typer

from benchmarks.load import Target, closed_loop
from benchmarks.record import summary, write
from benchmarks.serving import engine_loop
from benchmarks.systems import DIRECT_INT8, OURS_INT8
from deploy.common import cli
from deploy.common.paths import UserError
from handler.engine import Engine

PAIRS = 7
REQUESTS_EACH = {1: 4, 8: 2, 32: 2}
"""Clients -> requests each of them sends."""

LEAST = 0.85
"""Least median of the pairs with 8 clients. A healthy server had 0.93 to 0.98 in trials;
one that is 20 % slower would have 0.78 at most."""


def ratios(target: Target, engine: Engine, clients: int) -> list[float]:
    """Divide tokens per second through HTTP by those of the engine alone, pair by pair."""
    pairs = []
    each = REQUESTS_EACH[clients]
    for seed in range(PAIRS + 1):
        report = closed_loop(target, clients=clients, requests_each=each, seed=seed, warm_up=0)
        if report.errors:
            raise UserError(f"requests failed: {report.errors}")
        alone = engine_loop(engine, clients=clients, requests_each=each, seed=seed)
        pairs.append(report.tokens_per_second / alone)
    return pairs[1:]  # the first pair is the warm-up


app = cli.app(__doc__)


@app.command()
def main(
    write_results: Annotated[
        bool, typer.Option("--write", help="1, 8 and 32 clients; write results/http.json.")
    ] = False,
) -> None:
    """Measure; fail if the ratio with 8 clients is too low."""
    found = {}
    with OURS_INT8() as (target, _), DIRECT_INT8() as (engine, _):
        for clients in REQUESTS_EACH if write_results else (8,):
            pairs = summary(ratios(target, engine, clients))
            found[f"{clients} clients"] = pairs
            spread = ", ".join(f"{ratio:.2f}" for ratio in pairs["values"])
            print(
                f"through HTTP / engine alone, {clients} clients: {pairs['median']:.2f} ({spread})"
            )
    if write_results:
        print(write("http", found, ["torchserve", "openvino", "openvino-genai"]).name)
    if (middle := found["8 clients"]["median"]) < LEAST:
        raise UserError(f"the ratio is {middle:.2f}; it should be at least {LEAST}")


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.check"))
