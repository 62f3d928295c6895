"""Plots of the result files, in the style that chapters' figures share.

python -m benchmarks.report.plots      # rewrites benchmarks/results/*.svg; a test compares
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import RESULTS, read
from benchmarks.report import shapes as by_shape
from benchmarks.report.labels import SHAPED, SYSTEMS, singular, spaced
from deploy.common import cli

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#222222", "#8a8a8a"
"""Colors that people with any kind of color vision tell apart. Source: Okabe and Ito, 2008."""

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "svg.hashsalt": "serving-llms",  # else every run names its shapes anew
}


def figure(*, width: float = 5.0, height: float = 3.0) -> tuple[Figure, Axes]:
    """Make an empty figure with one pair of axes. Sizes in inches."""
    made, (axes,) = panels(1, width=width, height=height)
    return made, axes


def panels(columns: int, *, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Make an empty figure with `columns` pairs of axes side by side. Sizes in inches.

    matplotlib reads its parameters while it draws, so they stay set.
    """
    matplotlib.rcParams.update(STYLE)
    made = Figure(figsize=(width, height))
    return made, [made.add_subplot(1, columns, i + 1) for i in range(columns)]


def in_rows(axes: Axes) -> None:
    """Put the first horizontal bar on top, and grid lines only where values are read."""
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)


def heading(title: str) -> str:
    """Begin a title with a capital letter."""
    return title[:1].upper() + title[1:]


LOOKS = {
    "ours int8": (BLUE, "o-"),
    "ours int4": (SKY, "o-"),
    "ours transformers": (GREEN, "o-"),
    "vllm": (RED, "s--"),
    "llama.cpp Q8_0": (ORANGE, "^--"),
    "llama.cpp Q4_0": (PURPLE, "^--"),
    "batched": (GREY, "d:"),
    "baseline": (BLACK, "d:"),
}
"""The servers of results/serving.json -> color and line of each in every plot."""

CLIENTS = (1, 8, 32)
COMPLETION = 128
"""Tokens of every completion in results/serving.json."""


def serving(record: dict) -> Figure:
    """Throughput of every server over the number of clients, relative to the baseline handler.

    Each point is the median of the ratios within a round, each bar their spread.
    """
    measured = record["measurements"]
    base = measured["baseline"]["tokens_per_second 1"]["values"]
    made, axes = figure(width=6.8, height=4.4)
    for name, (color, line) in LOOKS.items():
        points = []
        for clients in CLIENTS:
            if found := measured[name].get(f"tokens_per_second {clients}"):
                ratios = [a / b for a, b in zip(found["values"], base, strict=True)]
                points.append((clients, statistics.median(ratios), min(ratios), max(ratios)))
        if points:
            x, y, least, most = zip(*points, strict=True)
            spread = [
                [m - a for m, a in zip(y, least, strict=True)],
                [b - m for m, b in zip(y, most, strict=True)],
            ]
            axes.errorbar(x, y, spread, fmt=line, color=color, label=SYSTEMS[name], capsize=2)
    _doubling(axes, CLIENTS)
    axes.set(
        xlabel="clients, each with one request at a time",
        ylabel="tokens per second, relative",
        title="Throughput relative to the baseline handler with 1 client",
    )
    made.legend(loc="outside lower center", ncol=3, fontsize=8)
    return made


def offload(record: dict) -> Figure:
    """Speed and peak memory of the dolly-v2-3b shape over the RAM it was allowed."""
    measured = record["measurements"]
    made, (speed, memory) = panels(2, width=7.2, height=3.0)
    for state, color, label in (
        ("warm", BLUE, "files in the page cache"),
        ("cold", ORANGE, "files read from the disk"),
    ):
        rows = {name.split()[0]: row for name, row in measured.items() if name.endswith(state)}
        budgets = list(rows)
        places = range(len(budgets))
        for axes, quantity in ((speed, "tokens_per_second"), (memory, "peak_memory_gb")):
            found = [row[quantity] for row in rows.values()]
            middle = [f["median"] for f in found]
            spread = [
                [f["median"] - f["min"] for f in found],
                [f["max"] - f["median"] for f in found],
            ]
            axes.errorbar(places, middle, spread, fmt="o-", color=color, label=label, capsize=2)
            if state == "warm":
                axes.set_xticks(places, [spaced(budget) for budget in budgets])
        if state == "cold":
            limit = [row["disk_limit_tokens_per_second"]["median"] for row in rows.values()]
            speed.plot(places, limit, ":", color=GREY, label="limit of the disk")
    speed.set(yscale="log", xlabel="RAM for weights", ylabel="tokens per second", title="Speed")
    speed.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    speed.minorticks_off()
    memory.set(xlabel="RAM for weights", ylabel="GB", title="Peak memory of the process")
    memory.set_ylim(bottom=0)
    lines, labels = speed.get_legend_handles_labels()
    made.legend(lines, labels, loc="outside lower center", ncol=3, fontsize=8)
    return made


def soak(record: dict) -> Figure:
    """Memory of the server and the slowest requests, over the run."""
    measured = record["measurements"]
    made, (memory, times) = panels(2, width=7.2, height=2.6)
    lines = {"server": measured["memory_mb"]} | measured.get("memory_mb_by_part", {})
    for (name, line), color in zip(lines.items(), (BLUE, ORANGE, GREEN, RED), strict=False):
        minutes, held = zip(*line, strict=True)
        memory.plot(minutes, held, color=color, label=name)
    if len(lines) > 1:
        memory.legend(fontsize=8)
    memory.set(xlabel="minute", ylabel="MB", title="Memory of the server (PSS)")
    memory.set_ylim(bottom=0)
    minutes, slowest = zip(*measured["p99_seconds_a_token"], strict=True)
    times.plot(minutes, [1000 * s for s in slowest], "o-", color=ORANGE)
    times.set(xlabel="minute", ylabel="ms a token", title="99th percentile of the requests")
    times.set_ylim(bottom=0)
    return made


def latency(record: dict) -> Figure:
    """Seconds of a completion over the throughput of the server, a line for each system.

    The seconds are the mean that Little's law gives for clients with one request at a time:
    clients * tokens of a completion / tokens per second.
    """
    made, axes = figure(width=6.8, height=3.8)
    for name, (color, line) in LOOKS.items():
        found = record["measurements"][name]
        points = [
            (rate["median"], clients * COMPLETION / rate["median"], clients)
            for clients in CLIENTS
            if (rate := found.get(f"tokens_per_second {clients}"))
        ]
        if points:
            rates, seconds, numbers = zip(*points, strict=True)
            axes.plot(rates, seconds, line, color=color, label=SYSTEMS[name])
        if points and name == "ours int8":
            for rate, second, number in zip(rates, seconds, numbers, strict=True):
                axes.annotate(
                    f"{number} client{'s' * (number > 1)}",
                    (rate, second),
                    xytext=(-6, -3) if number == 1 else (5, -9),
                    textcoords="offset points",
                    ha="right" if number == 1 else "left",
                    fontsize=8,
                    color=color,
                )
    axes.set(xscale="log", yscale="log", xlabel="tokens per second, all clients together")
    axes.set(
        ylabel=f"seconds for {COMPLETION} tokens",
        title="Latency and throughput with 1, 8, 32 clients",
    )
    _plain_ticks(axes, [20, 50, 100, 200, 500, 1000], [1, 2, 5, 10, 20, 50])
    axes.set_xlim(right=2000)
    made.legend(loc="outside lower center", ncol=3, fontsize=8)
    return made


def first_tokens(record: dict) -> Figure:
    """Median time to first token of each system that streams, with one client and with eight."""
    found = {
        SYSTEMS[name]: [record["measurements"][name][f"first_token_seconds {n}"] for n in (1, 8)]
        for name in LOOKS
        if "first_token_seconds 8" in record["measurements"][name]
    }
    made, axes = figure(width=6.0, height=2.6)
    for label, both in found.items():
        alone, busy = (1000 * seconds["median"] for seconds in both)
        axes.plot([alone, busy], [label, label], color="#cccccc", zorder=0)
    for i, (color, marker, label) in enumerate(((SKY, "o", "1 client"), (BLUE, "s", "8 clients"))):
        values = [1000 * both[i]["median"] for both in found.values()]
        axes.plot(values, list(found), marker, color=color, label=label)
    axes.set(xlabel="ms until the first token, median", xlim=(0, None))
    axes.set_title("Time to first token")
    _dots_in_rows(axes)
    axes.legend(fontsize=8)
    return made


def _dots_in_rows(axes: Axes) -> None:
    """Room above the first row and below the last; lines lead from a name to its dots."""
    axes.margins(y=0.12)
    axes.invert_yaxis()
    axes.grid(axis="x")


OTHERS = ("llama.cpp Q4_0", "llama.cpp Q8_0", "vllm", "batched", "baseline")


def verdict(record: dict) -> Figure:
    """Throughput of `ours int8`, divided by that of each of OTHERS."""
    measured = record["measurements"]
    made, axes = figure(width=6.0, height=2.7)
    looks = ((SKY, "o"), (BLUE, "s"), (BLACK, "^"))
    for clients, (color, marker) in zip(CLIENTS, looks, strict=True):
        quantity = f"tokens_per_second {clients}"
        ratios = {
            SYSTEMS[name]: statistics.median(
                mine / theirs
                for mine, theirs in zip(
                    measured["ours int8"][quantity]["values"],
                    measured[name][quantity]["values"],
                    strict=True,
                )
            )
            for name in OTHERS
            if quantity in measured[name]
        }
        label = f"{clients} client{'s' * (clients > 1)}"
        axes.plot(list(ratios.values()), list(ratios), marker, color=color, label=label)
    axes.axvline(1, color=GREY)
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 1, 2, 4, 8, 16, 32])
    axes.xaxis.set_major_formatter("{x:g} x")
    axes.set(xlabel="tokens per second of this handler, int8, relative")
    axes.set_title("Right of the line, this handler is faster")
    _dots_in_rows(axes)
    axes.legend(fontsize=8, frameon=True, framealpha=1, edgecolor="white")
    return made


def roofline(record: dict) -> Figure:
    """The roofline of the machine over operations per byte, and the engine below it."""
    measured = record["measurements"]
    ceilings = measured["machine"]
    made, axes = figure(width=6.0, height=3.2)
    x = [2 ** (i / 8) for i in range(-8, 89)]  # 0.5 to 2048
    for peak, color, label in (
        ("int8_flops", BLACK, "8-bit multiplication"),
        ("float32_flops", GREY, "float32 multiplication"),
    ):
        y = [min(ceilings["bytes_per_second"] * flop, ceilings[peak]) / 1e9 for flop in x]
        axes.plot(x, y, color=color, label=f"the machine, {label}")
    for name, row in measured["points"].items():
        color = ORANGE if name.startswith("decode") else GREEN
        place, reached = row["flop_per_byte"], row["flops"] / 1e9
        axes.vlines(place, reached, row["roof"] / 1e9, color=color, linestyle=":", linewidth=1)
        axes.plot(place, reached, "o", color=color, markersize=6)
        axes.annotate(
            _point_name(name),
            (place, reached),
            xytext=(7, -8 if color == ORANGE else 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="operations per byte read from memory")
    axes.set(ylabel="billion operations a second", title="The roofline, and the engine below it")
    lowest = min(row["flops"] for row in measured["points"].values())
    axes.set(xlim=(0.5, 2048), ylim=(lowest / 2e9, 2e-9 * ceilings["int8_flops"]))
    _plain_ticks(axes, [1, 4, 16, 64, 256, 1024], [10, 30, 100, 300, 1000])
    axes.legend(fontsize=8, loc="lower right")
    return made


def _point_name(name: str) -> str:
    kind, number = name.split()
    if kind == "prefill":
        return f"prefill, {number} tokens"
    return f"decode, {number} sequence{'s' * (number != '1')}"


def _plain_ticks(axes: Axes, x: list[float], y: list[float]) -> None:
    """Numbers people read, on logarithmic axes."""
    axes.set_xticks(x, [f"{v:g}" for v in x])
    axes.set_yticks(y, [f"{v:,g}" for v in y])
    axes.minorticks_off()


def _doubling(axes: Axes, values: tuple[int, ...]) -> None:
    """Both axes logarithmic, with the ticks people read."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(values, [str(v) for v in values])
    axes.yaxis.set_major_formatter("{x:g} x")


def shapes(record: dict) -> Figure:
    """Throughput of `ours int8` divided by each peer's, and time to first token, by shape.

    Each ratio is the median of those within a round, each bar their spread.
    """
    loads = list(record["measurements"]["loads"])
    rows = {load: row for row, load in enumerate(loads)}
    made, (rate, first) = panels(2, width=7.6, height=1.3 + 0.27 * len(loads))
    for other, offset in ((by_shape.VLLM, -0.12), (by_shape.LLAMA, 0.12)):
        color, line = LOOKS[other]
        for load, row in rows.items():
            if values := by_shape.ratios(record, other, load, by_shape.RATE):
                middle = statistics.median(values)
                spread = [[middle - min(values)], [max(values) - middle]]
                rate.errorbar(
                    middle, row + offset, xerr=spread, fmt=line[0], color=color, capsize=2
                )
    for system in SHAPED:
        color, line = LOOKS[system]
        points = [
            (1000 * found["median"], rows[load])
            for load in loads
            if (found := by_shape.measured(record, system, load, by_shape.FIRST_TOKEN))
        ]
        if points:
            first.plot(*zip(*points, strict=True), line[0], color=color, label=SHAPED[system])
    rate.axvline(1, color=GREY)
    rate.set_xscale("log", base=2)
    rate.xaxis.set_major_formatter("{x:g} x")
    rate.set(xlabel="this handler, int8, relative to each peer")
    rate.set_title("Tokens per second: right of 1, it is faster", fontsize=9)
    first.set(xscale="log", xlabel="ms, median")
    first.xaxis.set_major_formatter("{x:,g}")
    first.set_title("Time to first token: left is better", fontsize=9)
    for axes in (rate, first):
        axes.set_ylim(len(loads) - 0.5, -0.5)
        axes.grid(axis="x")
        axes.grid(axis="y", visible=False)
    rate.set_yticks(range(len(loads)), [singular(load) for load in loads])
    first.set_yticks(range(len(loads)), [])
    made.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncol=3, fontsize=8)
    return made


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "serving": serving,
    "offload": offload,
    "soak": soak,
    "latency": latency,
    "roofline": roofline,
    "shapes": shapes,
}
SOURCES = {"latency": "serving"}
"""Figures whose result file has another name."""


def save(name: str, path: Path) -> None:
    """Draw one figure of FIGURES from its result file."""
    made = FIGURES[name](read(SOURCES.get(name, name)))
    made.savefig(path, metadata={"Date": None})


app = cli.app(__doc__)


@app.command()
def main() -> None:
    """Draw every figure of FIGURES."""
    for name in FIGURES:
        save(name, RESULTS / f"{name}.svg")


if __name__ == "__main__":
    sys.exit(cli.run(app, "benchmarks.report.plots"))
