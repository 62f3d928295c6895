"""Figures of what a chapter has just measured; `benchmarks.report` draws the committed results."""

import re
from collections.abc import Sequence
from textwrap import shorten

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from benchmarks.load import Report
from benchmarks.report.plots import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    SKY,
    figure,
    heading,
    in_rows,
    panels,
)
from deploy.vertex.capacity import CapacityPlan

PARTS = {"embeddings": ORANGE, "attention": BLUE, "MLP": GREEN}
BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.5}
PLACES = {"cpu": BLUE, "disk": ORANGE}


def parts(models: dict[str, dict[str, int]]) -> Figure:
    """Draw where models have their parameters, and their size in four precisions.

    Args:
        models: title -> part of PARTS -> number of parameters.
    """
    made, (share, memory) = panels(2, width=7.2, height=2.6)
    totals = {title: sum(counts.values()) for title, counts in models.items()}
    left = dict.fromkeys(models, 0.0)
    for part, color in PARTS.items():
        values = {title: 100 * counts[part] / totals[title] for title, counts in models.items()}
        share.barh(
            list(values), list(values.values()), left=list(left.values()), color=color, label=part
        )
        left = {title: left[title] + values[title] for title in left}
    share.set(xlabel="% of the parameters", title="Where the parameters are", xlim=(0, 100))
    in_rows(share)
    looks = ((BLACK, "o"), (GREY, "s"), (PURPLE, "^"), (SKY, "D"))
    for (dtype, size), (color, marker) in zip(BYTES.items(), looks, strict=True):
        gigabytes = [size * total / 1e9 for total in totals.values()]
        memory.scatter(gigabytes, list(totals), label=dtype, color=color, marker=marker)
    memory.set(xscale="log", xlabel="GB", title="Size of the weights", ylim=share.get_ylim())
    memory.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    memory.tick_params(axis="y", labelleft=False, length=0)
    memory.grid(axis="x")
    for axes in (share, memory):
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.25), ncol=4, columnspacing=0.8, fontsize=8
        )
    return made


def token_times(
    kept: Sequence[float], recomputed: Sequence[float], prefill: dict[int, float]
) -> Figure:
    """Draw the time of each token with and without the KV cache, and of prefills by length."""
    made, (steps, per_token) = panels(2, width=7.2, height=2.8)
    numbers = range(1, len(kept) + 1)
    steps.plot(
        numbers, [1000 * s for s in recomputed], "o-", color=ORANGE, label="without the cache"
    )
    steps.plot(numbers, [1000 * s for s in kept], "o-", color=BLUE, label="with the KV cache")
    steps.set(xlabel="token of the completion", ylabel="ms", title="Time of each token")
    per_token.plot(
        list(prefill),
        [1000 * s / n for n, s in prefill.items()],
        "o-",
        color=GREEN,
        label="prefill, each token of the prompt",
    )
    decode = sorted(kept[1:])[len(kept) // 2]
    per_token.axhline(1000 * decode, color=BLUE, label="decode, each token")
    per_token.set(
        xlabel="length of the prompt", ylabel="ms a token", title="Prefill is cheaper than decode"
    )
    for axes in (steps, per_token):
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    return made


def device_map(places: dict[str, str]) -> Figure:
    """Draw the modules of a model in the order of a forward pass, colored by their place."""
    places = dict(sorted(places.items(), key=lambda item: item[0] == "lm_head"))  # it comes last
    made, axes = figure(width=7.2, height=1.4)
    for i, place in enumerate(places.values()):
        axes.barh(0, 1, left=i, color=PLACES[place], edgecolor="white")
    names = [name.removeprefix("model.").removeprefix("transformer.") for name in places]
    axes.set_xticks([i + 0.5 for i in range(len(names))], names, rotation=90, fontsize=7)
    axes.set(yticks=[], title="One forward pass, left to right: blue is in RAM, orange on disk")
    axes.grid(False)
    return made


def budgets(measured: dict[str, dict[str, dict]], title: str) -> Figure:
    """Draw tokens per second and peak memory over the RAM for weights.

    Args:
        measured: budget -> quantity -> summary, as `benchmarks.offload` measures them.
        title: of the left side.
    """
    made, (speed, peak) = panels(2, width=7.2, height=2.6)
    names = list(measured)
    rates = [measured[name]["tokens_per_second"]["median"] for name in names]
    speed.plot(names, rates, "o-", color=BLUE)
    speed.set(xlabel="RAM for weights", ylabel="tokens per second", title=title)
    held = [measured[name]["peak_memory_gb"]["median"] for name in names]
    peak.plot(names, held, "o-", color=ORANGE)
    peak.set(xlabel="RAM for weights", ylabel="GB", title="Peak memory of the process")
    for axes in (speed, peak):
        axes.set_ylim(bottom=0)
    return made


def waiting(ways: dict[str, dict[str, tuple[float, float]]]) -> Figure:
    """Draw for each way of batching from when to when each request waited, in seconds."""
    made, columns = panels(len(ways), width=7.2, height=2.2)
    latest = max(end for times in ways.values() for _, end in times.values())
    for axes, color, (title, times) in zip(columns, (ORANGE, BLUE), ways.items(), strict=True):
        for name, (sent, answered) in times.items():
            axes.barh(name, answered - sent, left=sent, color=color)
        axes.set(title=heading(title), xlabel="seconds", xlim=(0, 1.05 * latest))
        in_rows(axes)
    return made


def bars(values: dict[str, float], xlabel: str, title: str) -> Figure:
    """Draw one bar for each name."""
    made, axes = figure(width=5, height=0.7 + 0.35 * len(values))
    axes.barh(list(values), list(values.values()), color=(GREY, BLUE, SKY, GREEN)[: len(values)])
    axes.set(xlabel=xlabel, title=title)
    in_rows(axes)
    return made


def columns(rows: Sequence[dict], name: str, quantities: Sequence[str]) -> Figure:
    """Draw the rows of a table as bars, one panel for each quantity."""
    made, places = panels(len(quantities), width=7.2, height=1.9)
    for axes, quantity, color in zip(places, quantities, (ORANGE, BLUE, GREY), strict=False):
        axes.barh([row[name] for row in rows], [row[quantity] for row in rows], color=color)
        axes.set(title=heading(quantity))
        in_rows(axes)
        if axes is not places[0]:
            axes.set_yticks([])
    return made


def readiness(healthy: float, ready: float) -> Figure:
    """Draw from when on /ping reports Healthy, and from when on a worker is READY, in seconds."""
    made, axes = figure(width=6.4, height=1.6)
    end = 1.15 * ready
    axes.barh("/ping says Healthy", end - healthy, left=healthy, color=ORANGE)
    axes.barh("a worker is READY", end - ready, left=ready, color=GREEN)
    axes.set(xlabel="seconds since the start", xlim=(0, end))
    in_rows(axes)
    return made


def counter(samples: Sequence[tuple[float, float]], title: str) -> Figure:
    """Draw a counter over time, from zero. `samples`: (seconds, value)."""
    made, axes = figure(width=5, height=2.4)
    began, base = samples[0]
    seconds, values = [t - began for t, _ in samples], [n - base for _, n in samples]
    axes.step(seconds, values, where="post", color=BLUE)
    axes.set(xlabel="seconds", ylabel="tokens", title=title)
    return made


STAGES = {
    "pip": (1.3, 2),
    "java": (1.3, 1),
    "packages-cpu-lean": (2.9, 1),
    "archive": (4.3, 1),
    "base": (0, 0),
    "runtime": (1.3, 0),
    "runtime-cpu-lean": (2.9, 0),
    "cpu-lean": (4.3, 0),
}
"""Stages of the image without torch -> where to draw each. Row 0 becomes the image."""


def stages(dockerfile: str) -> Figure:
    """Draw how the Dockerfile's stages build on each other, and what is copied between them."""
    made, axes = figure(width=7.2, height=2.6)
    boxes = {stage: _box(axes, stage) for stage in STAGES}
    name = ""
    for line in dockerfile.splitlines():
        if begin := re.match(r"FROM (\S+) AS (\S+)", line):
            origin, name = begin.groups()
            if origin in STAGES and name in STAGES:
                _arrow(axes, boxes, (origin, name), GREY, "-")
        elif (copy := re.match(r"COPY --from=(\S+)", line)) and name in STAGES:
            _arrow(axes, boxes, (copy.group(1), name), BLUE, "--")
    axes.plot([], [], "-", color=GREY, label="FROM: goes on from there")
    axes.plot([], [], "--", color=BLUE, label="COPY --from: takes files out of it")
    axes.legend(loc="upper right", fontsize=8)
    axes.set(xlim=(-0.3, 4.7), ylim=(-0.3, 2.3))
    axes.axis("off")
    return made


def _box(axes: Axes, stage: str) -> Text:
    x, y = STAGES[stage]
    look = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": GREY if y else BLUE}
    return axes.text(x, y, stage, ha="center", va="center", bbox=look)


def _arrow(axes: Axes, boxes: dict[str, Text], ends: tuple[str, str], color: str, s: str) -> None:
    """Draw an arrow from one stage's box to another's."""
    a, b = (boxes[end].get_bbox_patch() for end in ends)
    look = {"arrowstyle": "->", "color": color, "linestyle": s, "patchA": a, "patchB": b}
    axes.annotate("", xy=STAGES[ends[1]], xytext=STAGES[ends[0]], arrowprops=look)


CONTENTS = {
    "Debian": GREY,
    "Python": BLACK,
    "Java": ORANGE,
    "TorchServe": SKY,
    "other packages": PURPLE,
    "OpenVINO": BLUE,
    "torch": RED,
    "transformers": "#F0E442",
    "weights": GREEN,
}


def image_sizes(official: dict[str, float], ours: dict[str, dict[str, int]]) -> Figure:
    """Draw images as bars: the official ones whole, ours by part.

    Args:
        official: name -> bytes.
        ours: name -> part, as `deploy.image.report` names them -> bytes.
    """
    made, axes = figure(width=7.2, height=2.9)
    axes.barh(list(official), [size / 1e9 for size in official.values()], color="#cccccc")
    left = dict.fromkeys(ours, 0.0)
    for part, color in CONTENTS.items():
        sizes = {name: parts.get(part, 0) / 1e9 for name, parts in ours.items()}
        axes.barh(
            list(sizes), list(sizes.values()), left=list(left.values()), color=color, label=part
        )
        left = {name: left[name] + sizes[name] for name in left}
    axes.set(xlabel="GB")
    in_rows(axes)
    axes.legend(loc="lower right", ncol=2, fontsize=8)
    return made


def layers(made_by: Sequence[tuple[str, float]], new: int) -> Figure:
    """Draw the layers of an image from the bottom up, in MB; the `new` topmost ones in orange."""
    names = [shorten(command, 32, placeholder="…") for command, _ in made_by]
    made, axes = figure(width=7.2, height=0.6 + 0.3 * len(made_by))
    colors = [BLUE] * (len(made_by) - new) + [ORANGE] * new
    rows = range(len(made_by))
    axes.barh(rows, [size for _, size in made_by], color=colors)
    axes.set_yticks(rows, names, family="monospace", fontsize=8)
    axes.set(xlabel="MB")
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    return made


def load_curve(reports: dict[int, Report]) -> Figure:
    """Draw latency and time to first token over the number of clients."""
    made, (latency, first) = panels(2, width=6.4, height=2.4)
    rates = [report.tokens_per_second for report in reports.values()]
    waits = [_measured(report.latency_p50) for report in reports.values()]
    latency.plot(rates, waits, "o-", color=BLUE)
    for rate, wait, clients in zip(rates, waits, reports, strict=True):
        latency.annotate(
            str(clients),
            (rate, wait),
            xytext=(0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    latency.set(xlabel="tokens per second", ylabel="seconds", title="Latency, by number of clients")
    names = [str(clients) for clients in reports]
    for quantity, color, label in (
        ("first_token_p50", BLUE, "median"),
        ("first_token_p95", ORANGE, "95th percentile"),
    ):
        values = [1000 * getattr(report, quantity) for report in reports.values()]
        first.plot(names, values, "o-", color=color, label=label)
    first.set(xlabel="clients", ylabel="ms", title="Time to first token")
    first.legend(fontsize=8)
    latency.set_ylim(0, 1.25 * max(waits))
    latency.set_xlim(0, 1.1 * max(rates))
    first.set_ylim(bottom=0)
    return made


def _measured(value: float | None) -> float:
    """Take a quantity of a report that has one."""
    if value is None:
        raise ValueError("the report has no latency: every request failed")
    return value


def shares(rows: dict[str, dict[str, float]], xlabel: str) -> Figure:
    """Draw stacked bars in per cent. `rows`: name -> part -> share of 1."""
    made, axes = figure(width=6.4, height=1.0 + 0.35 * len(rows))
    left = dict.fromkeys(rows, 0.0)
    for part, color in zip(next(iter(rows.values())), (BLUE, GREEN, ORANGE, GREY), strict=False):
        values = {name: 100 * parts[part] for name, parts in rows.items()}
        axes.barh(
            list(values), list(values.values()), left=list(left.values()), color=color, label=part
        )
        left = {name: left[name] + values[name] for name in rows}
    axes.set(xlabel=xlabel, xlim=(0, 100))
    in_rows(axes)
    made.legend(loc="outside upper center", ncol=4, fontsize=8)
    return made


def capacity(plans: dict[float, CapacityPlan], unit: str) -> Figure:
    """Draw replicas and the cost of a million tokens over the traffic.

    Args:
        plans: requests per minute -> its plan.
        unit: of that cost; about 20 letters fit.
    """
    made, (replicas, cost) = panels(2, width=6.4, height=2.3)
    traffic = list(plans)
    replicas.step(traffic, [p.replicas for p in plans.values()], where="post", color=BLUE)
    replicas.set(ylabel="replicas", title="Replicas")
    replicas.set_ylim(bottom=0)
    replicas.yaxis.set_major_locator(MaxNLocator(integer=True))
    cost.plot(traffic, [p.per_million_tokens for p in plans.values()], color=ORANGE)
    cost.set(yscale="log", ylabel=unit, title="A million completion tokens")
    cost.yaxis.set_major_formatter("{x:g}")
    cost.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    cost.yaxis.set_minor_locator(NullLocator())
    for axes in (replicas, cost):
        axes.set(xlabel="requests per minute", xlim=(0, None))
    return made
