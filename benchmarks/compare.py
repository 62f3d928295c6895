"""The comparison by shape: this server, vLLM and llama.cpp, in alternated rounds.

    python -m benchmarks.compare                          # three rounds, at most 40 minutes
    python -m benchmarks.compare --rounds 1 --only "chat" --variants

SmolLM2-135M-Instruct, every system alone on the machine, through OpenAI's API, streamed. A round
starts each system, warms it up, sends every shape of `benchmarks.shapes` and stops it. The first
system of a round is another one in the next round. A system that needs to know how many sequences
it serves is started anew for each number of clients.
"""

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import click
import typer
from tqdm import tqdm

from benchmarks import peers
from benchmarks.load import Report, checked
from benchmarks.record import memory, summary, write
from benchmarks.shapes import LOADS, Load, warm_up
from benchmarks.systems import SHAPED, VARIANTS, Shaped
from deploy.common import cli
from deploy.common.paths import UserError

ROUND_MINUTES = {"ours int8": 2.5, "vllm": 3.5, "llama.cpp Q8_0": 5.0}
"""What a round of all loads takes on two cores, for the estimate."""

ALL = SHAPED | VARIANTS


def groups(system: Shaped, loads: list[Load]) -> list[list[Load]]:
    """Divide loads into those that one start of the system serves."""
    if not system.by_slots:
        return [loads]
    numbers = sorted({load.slots for load in loads})
    return [[load for load in loads if load.slots == slots] for slots in numbers]


def measure(system: Shaped, loads: list[Load], seed: int) -> Iterator[tuple[Load, Report, float]]:
    """Start a system as often as it needs, and measure every load once.

    Yields:
        Each load, its report and the memory of the server after it in MB.
    """
    for group in groups(system, loads):
        slots = max(load.slots for load in group)
        with system.start(slots, max(load.context for load in group)) as (target, pid):
            checked(warm_up(target, seed, min(slots, 8)), "the warm-up")
            for load in group:
                yield load, checked(load.send(target, seed), load.name), memory(pid) / 1e6


def quantities(report: Report) -> dict[str, float]:
    """Choose what the result file keeps of a report."""
    assert report.first_token_p50 is not None and report.first_token_p95 is not None
    return {
        "tokens_per_second": report.tokens_per_second,
        "first_token_p50": report.first_token_p50,
        "first_token_p95": report.first_token_p95,
        "prompt_tokens": report.prompt_tokens,
        "seconds": report.seconds,
    }


app = cli.app(__doc__)


@app.command()
def main(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SYSTEM", click_type=click.Choice(list(ALL)), help="Those of SHAPED by default."
        ),
    ] = None,
    rounds: int = 3,
    only: Annotated[
        list[str] | None, typer.Option(help="Measure loads whose name has this; repeat for more.")
    ] = None,
    variants: Annotated[bool, typer.Option("--variants", help="Other settings too.")] = False,
    output: Annotated[str, typer.Option(help="Name of the result file.")] = "shapes",
) -> None:
    """Measure, and write results/shapes.json."""
    names = names or list(ALL if variants else SHAPED)
    parts = only or [""]
    loads = [load for load in LOADS.values() if any(part in load.name for part in parts)]
    if not loads:
        raise UserError(f"no load has {parts} in its name; there are: {', '.join(LOADS)}")
    missing = {name: ALL[name].missing() for name in names}
    present = [name for name in names if not missing[name]]
    for name, reason in missing.items():
        if reason:
            print(f"{name}: not measured: {reason}")
    minutes = sum(ROUND_MINUTES.get(name, 4) for name in present) * len(loads) / len(LOADS)
    print(f"{len(present)} systems, {rounds} rounds: about {rounds * minutes:.0f} minutes")

    values: dict[str, dict[str, dict[str, list[float]]]] = {name: {} for name in present}
    with tqdm(total=rounds * len(present) * len(loads), unit="load") as progress:
        for round_index in range(rounds):
            first = round_index % max(1, len(present))
            for name in present[first:] + present[:first]:
                progress.set_description(name)
                for load, report, memory_mb in measure(ALL[name], loads, round_index):
                    found = quantities(report) | {"memory_mb": memory_mb}
                    for quantity, value in found.items():
                        values[name].setdefault(load.name, {}).setdefault(quantity, []).append(
                            value
                        )
                    rate, first_token = found["tokens_per_second"], found["first_token_p50"]
                    progress.write(f"{name}, {load.name}: {rate:.0f} tokens/s, {first_token:.2f} s")
                    progress.update()
    systems: dict[str, dict[str, Any]] = {}
    for name in names:
        systems[name] = {"what": ALL[name].what}
        if reason := missing[name]:
            systems[name]["not measured"] = reason
            continue
        systems[name]["loads"] = {
            load.name: {q: summary(v) for q, v in values[name][load.name].items()} for load in loads
        }
    measured = {
        "loads": {
            load.name: {
                "shape": load.shape,
                "what": load.what,
                "clients": load.clients,
                "requests": load.requests,
            }
            for load in loads
        },
        "systems": systems,
    }
    versions = ["torchserve", "openvino", "openvino-genai"]
    others = {peer: peers.version_of(peer) for peer in peers.LOCKS}
    print(write(output, measured, versions, others).name)


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.compare"))
