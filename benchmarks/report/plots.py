"""Figures in one look: of the result files for the documents, and the chapters' own.

python -m benchmarks.report.plots      # rewrites benchmarks/results/*.svg; a test compares
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import RESULTS
from deploy.common.cli import command

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#222222", "#8a8a8a"
"""Colours that people with any kind of colour vision tell apart. Source: Okabe and Ito, 2008."""

STYLE = {
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


def figure(columns: int = 1, *, width: float = 5.0, height: float = 3.0) -> tuple[Figure, ...]:
    """An empty figure and its `columns` axes side by side. Sizes in inches.

    Whatever is drawn from then on has our look: matplotlib asks for it at each step.
    """
    matplotlib.rcParams.update(STYLE)
    made = Figure(figsize=(width, height))
    return made, *(made.add_subplot(1, columns, i + 1) for i in range(columns))


def in_rows(axes: Axes) -> None:
    """A chart of horizontal bars: the first on top, and lines only where values are read."""
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)


def heading(title: str) -> str:
    """With a capital, whatever the caller's name of the thing begins with."""
    return title[:1].upper() + title[1:]


SYSTEMS = {
    "ours int8": ("this handler, int8", BLUE, "o-"),
    "ours int4": ("this handler, int4", SKY, "o-"),
    "ours transformers": ("this handler, transformers bfloat16", GREEN, "o-"),
    "vllm": ("vLLM, bfloat16", RED, "s--"),
    "llama.cpp Q8_0": ("llama.cpp, 8 bits", ORANGE, "^--"),
    "llama.cpp Q4_0": ("llama.cpp, 4 bits", PURPLE, "^--"),
    "batched": ("TorchServe's own batching", GREY, "d:"),
    "seed": ("one request at a time", BLACK, "d:"),
}
"""Systems of results/serving.json -> how a figure shows them."""

NAMES = {name: label for name, (label, *_) in SYSTEMS.items()} | {
    "direct int8": "the engine alone, int8",
    "direct int4": "the engine alone, int4",
}
"""All systems of results/serving.json -> the words for them, in figures and tables."""

CLIENTS = (1, 8, 32)
COMPLETION = 128
"""Tokens of every completion in results/serving.json."""


def serving(record: dict) -> Figure:
    """Tokens per second of every system over the number of clients, as multiples of the original's.

    Each point is the median of the ratios within a round, each bar their spread.
    """
    figures = record["figures"]
    base = figures["seed"]["tokens_per_second 1"]["values"]
    made, axes = figure(width=6.8, height=4.4)
    for name, (label, colour, line) in SYSTEMS.items():
        points = []
        for clients in CLIENTS:
            if found := figures[name].get(f"tokens_per_second {clients}"):
                ratios = [a / b for a, b in zip(found["values"], base, strict=True)]
                points.append((clients, statistics.median(ratios), min(ratios), max(ratios)))
        if points:
            x, y, least, most = zip(*points, strict=True)
            spread = [
                [m - a for m, a in zip(y, least, strict=True)],
                [b - m for m, b in zip(y, most, strict=True)],
            ]
            axes.errorbar(x, y, spread, fmt=line, color=colour, label=label, capsize=2)
    _doubling(axes, CLIENTS)
    axes.set(
        xlabel="clients that always wait for an answer",
        ylabel="times the original's, with 1 client",
        title="Speed, as a multiple of the original's way",
    )
    made.legend(loc="outside lower center", ncol=3, fontsize=8)
    return made


def offload(record: dict) -> Figure:
    """Speed and peak memory of the dolly-v2-3b shape over the RAM it was allowed."""
    figures = record["figures"]
    made, speed, memory = figure(2, width=7.2, height=3.0)
    for state, colour, label in (
        ("warm", BLUE, "files in the page cache"),
        ("cold", ORANGE, "files read from the disk"),
    ):
        rows = {name.split()[0]: row for name, row in figures.items() if name.endswith(state)}
        budgets = list(rows)
        places = range(len(budgets))
        for axes, quantity in ((speed, "tokens_per_second"), (memory, "peak_memory_gb")):
            found = [row[quantity] for row in rows.values()]
            middle = [f["median"] for f in found]
            spread = [
                [f["median"] - f["min"] for f in found],
                [f["max"] - f["median"] for f in found],
            ]
            axes.errorbar(places, middle, spread, fmt="o-", color=colour, label=label, capsize=2)
            if state == "warm":
                axes.set_xticks(places, [spaced(budget) for budget in budgets])
        if state == "cold":
            limit = [row["disk_limit_tokens_per_second"]["median"] for row in rows.values()]
            speed.plot(places, limit, ":", color=GREY, label="what the disk allows")
    speed.set(yscale="log", xlabel="RAM for weights", ylabel="tokens per second", title="Speed")
    speed.set_yticks([0.1, 0.2, 0.5, 1, 2, 5], ["0.1", "0.2", "0.5", "1", "2", "5"])
    speed.minorticks_off()
    memory.set(xlabel="RAM for weights", ylabel="GB", title="Peak memory of the process")
    memory.set_ylim(bottom=0)
    lines, labels = speed.get_legend_handles_labels()
    made.legend(lines, labels, loc="outside lower center", ncol=3, fontsize=8)
    return made


def spaced(budget: str) -> str:
    """`1GiB`, as accelerate takes it -> "1 GiB", as people read it."""
    return budget.replace("GiB", " GiB")


def soak(record: dict) -> Figure:
    """Memory of the server, and the slowest requests, over the half hour."""
    figures = record["figures"]
    made, memory, times = figure(2, width=7.2, height=2.6)
    minutes, held = zip(*figures["memory_mb"], strict=True)
    memory.plot(minutes, held, color=BLUE)
    memory.set(xlabel="minute", ylabel="MB", title="Memory of the server (PSS)")
    memory.set_ylim(bottom=0)
    minutes, slowest = zip(*figures["p99_seconds_a_token"], strict=True)
    times.plot(minutes, [1000 * s for s in slowest], "o-", color=ORANGE)
    times.set(xlabel="minute", ylabel="ms a token", title="99th percentile of the requests")
    times.set_ylim(bottom=0)
    return made


def latency(record: dict) -> Figure:
    """Seconds of a completion over the throughput of the server, a line for each system.

    The seconds are the mean that Little's law gives for clients that always wait for an answer:
    clients * tokens of a completion / tokens per second.
    """
    made, axes = figure(width=6.8, height=3.8)
    for name, (label, colour, line) in SYSTEMS.items():
        found = record["figures"][name]
        points = [
            (rate["median"], clients * COMPLETION / rate["median"], clients)
            for clients in CLIENTS
            if (rate := found.get(f"tokens_per_second {clients}"))
        ]
        if points:
            rates, seconds, numbers = zip(*points, strict=True)
            axes.plot(rates, seconds, line, color=colour, label=label)
        if points and name == "ours int8":
            for rate, second, number in zip(rates, seconds, numbers, strict=True):
                at = {"xytext": (-6, -3) if number == 1 else (5, -9), "fontsize": 8}
                at |= {"textcoords": "offset points", "ha": "right" if number == 1 else "left"}
                text = f"{number} client{'s' * (number > 1)}"
                axes.annotate(text, (rate, second), color=colour, **at)
    axes.set(xscale="log", yscale="log", xlabel="tokens per second, all clients together")
    axes.set(ylabel=f"seconds for {COMPLETION} tokens", title="1, 8, 32 clients along each line")
    _plain_ticks(axes, [20, 50, 100, 200, 500, 1000], [1, 2, 5, 10, 20, 50])
    axes.set_xlim(right=2000)
    made.legend(loc="outside lower center", ncol=3, fontsize=8)
    return made


def first_tokens(record: dict) -> Figure:
    """Median time to first token of each system that streams, with one client and with eight."""
    found = {
        label: [record["figures"][name][f"first_token_seconds {n}"] for n in (1, 8)]
        for name, (label, *_) in SYSTEMS.items()
        if "first_token_seconds 8" in record["figures"][name]
    }
    made, axes = figure(width=6.0, height=2.6)
    for label, both in found.items():
        alone, busy = (1000 * figures["median"] for figures in both)
        axes.plot([alone, busy], [label, label], color="#cccccc", zorder=0)
    for i, (colour, marker, label) in enumerate(((SKY, "o", "1 client"), (BLUE, "s", "8 clients"))):
        values = [1000 * both[i]["median"] for both in found.values()]
        axes.plot(values, list(found), marker, color=colour, label=label)
    axes.set(xlabel="ms until the first token, median", xlim=(0, None))
    axes.set_title("Waiting for the first token")
    _dots_in_rows(axes)
    axes.legend(fontsize=8)
    return made


def _dots_in_rows(axes: Axes) -> None:
    """Room above the first row and below the last; lines lead from a name to its dots."""
    axes.margins(y=0.12)
    axes.invert_yaxis()
    axes.grid(axis="x")


RIVALS = ("llama.cpp Q4_0", "llama.cpp Q8_0", "vllm", "batched", "seed")


def verdict(record: dict) -> Figure:
    """How many times as many tokens per second `ours int8` writes as each of RIVALS."""
    figures = record["figures"]
    made, axes = figure(width=6.0, height=2.7)
    looks = ((SKY, "o"), (BLUE, "s"), (BLACK, "^"))
    for clients, (colour, marker) in zip(CLIENTS, looks, strict=True):
        quantity = f"tokens_per_second {clients}"
        ratios = {
            SYSTEMS[name][0]: statistics.median(
                mine / theirs
                for mine, theirs in zip(
                    figures["ours int8"][quantity]["values"],
                    figures[name][quantity]["values"],
                    strict=True,
                )
            )
            for name in RIVALS
            if quantity in figures[name]
        }
        label = f"{clients} client{'s' * (clients > 1)}"
        axes.plot(list(ratios.values()), list(ratios), marker, color=colour, label=label)
    axes.axvline(1, color=GREY)
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 1, 2, 4, 8, 16, 32])
    axes.xaxis.set_major_formatter("{x:g} x")
    axes.set(xlabel="tokens per second of this handler, int8, divided by theirs")
    axes.set_title("Left of the line they are faster, right of it this handler is")
    _dots_in_rows(axes)
    axes.legend(fontsize=8, frameon=True, framealpha=1, edgecolor="white")
    return made


def roofline(record: dict) -> Figure:
    """What the machine allows over operations per byte, and where the engine is."""
    figures = record["figures"]
    ceilings = figures["machine"]
    made, axes = figure(width=6.0, height=3.2)
    x = [2 ** (i / 8) for i in range(-8, 89)]  # 0.5 to 2048
    for peak, colour, label in (
        ("int8_flops", BLACK, "8-bit products"),
        ("float32_flops", GREY, "float32 products"),
    ):
        y = [min(ceilings["bytes_per_second"] * flop, ceilings[peak]) / 1e9 for flop in x]
        axes.plot(x, y, color=colour, label=f"the machine, {label}")
    for name, row in figures["points"].items():
        colour = ORANGE if name.startswith("decode") else GREEN
        place, reached = row["flop_per_byte"], row["flops"] / 1e9
        axes.vlines(place, reached, row["roof"] / 1e9, color=colour, linestyle=":", linewidth=1)
        axes.plot(place, reached, "o", color=colour, markersize=6)
        at = {"xytext": (7, -8 if colour == ORANGE else 0), "textcoords": "offset points"}
        at |= {"fontsize": 8, "va": "center"}
        axes.annotate(_point_name(name), (place, reached), **at)
    axes.set_xscale("log", base=2)
    axes.set(yscale="log", xlabel="operations per byte read from memory")
    axes.set(ylabel="billion operations a second", title="The roofline, and the engine below it")
    lowest = min(row["flops"] for row in figures["points"].values())
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


FIGURES: dict[str, Callable[[dict], Figure]] = {
    "serving": serving,
    "offload": offload,
    "soak": soak,
    "latency": latency,
    "roofline": roofline,
}
SOURCES = {"latency": "serving"}
"""Figures whose result file has another name."""


def save(name: str, path: Path) -> None:
    """Draw one figure of FIGURES from its result file."""
    source = RESULTS / f"{SOURCES.get(name, name)}.json"
    made = FIGURES[name](json.loads(source.read_text()))
    made.savefig(path, metadata={"Date": None})


@command
def main(arguments: list[str] | None) -> None:
    """Draw all of them."""
    for name in FIGURES:
        save(name, RESULTS / f"{name}.svg")


if __name__ == "__main__":
    sys.exit(main())
