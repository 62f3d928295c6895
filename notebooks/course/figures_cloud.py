"""Figures of chapter 6: the timeline of a deployment, and the autoscaler."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report.plots import BLUE, GREEN, GREY, ORANGE, RED, SKY, figure, in_rows, panels
from deploy.vertex.autoscaling import AutoscalerState
from deploy.vertex.operations import Span


def timeline(spans: Sequence[Span]) -> Figure:
    """Draw operations as bars, one below the other, and the stages of a deployment."""
    whole = [span for span in spans if not span.stage]
    stages = [span for span in spans if span.stage]
    names = [*(span.step for span in whole), *(f"  {_words(span.stage)}" for span in stages)]
    made, axes = figure(width=7.2, height=1.0 + 0.28 * len(names))
    for row, span in enumerate([*whole, *stages]):
        color = SKY if span.stage else BLUE
        axes.barh(row, max(span.ended - span.began, 0.05), left=span.began, color=color)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlabel="seconds since the first call")
    in_rows(axes)
    for color, label in ((BLUE, "a call"), (SKY, "a stage of the deployment")):
        axes.barh(0, 0, color=color, label=label)
    made.legend(loc="outside upper center", ncol=2, fontsize=8)
    return made


def _words(stage: str) -> str:
    """Write `GETTING_CONTAINER_IMAGE` as "getting container image"."""
    return stage.replace("_", " ").lower()


def autoscaling(states: Sequence[AutoscalerState]) -> Figure:
    """Draw load and replicas over time, and how busy the replicas are."""
    made, (count, use) = panels(2, width=7.2, height=2.8)
    minutes = [state.seconds / 60 for state in states]
    count.step(minutes, [s.wanted for s in states], where="post", color=GREY, label="wanted")
    serving = [state.replicas for state in states]
    count.step(minutes, serving, where="post", color=BLUE, label="serving")
    count.step(minutes, [s.load for s in states], where="post", color=ORANGE, label="load")
    count.set(xlabel="minutes", ylabel="replicas", title="Replicas follow the load")
    count.legend(fontsize=8)
    percent = [min(state.utilization, 250) for state in states]
    use.step(minutes, percent, where="post", color=GREEN, label="used")
    use.axhline(60, color=GREY, linestyle=":", label="target")
    use.axhline(100, color=RED, linestyle="--", label="capacity")
    use.set(xlabel="minutes", ylabel="%", title="How busy they are")
    use.legend(fontsize=8)
    for axes in (count, use):
        highest = max(np.max(line.get_ydata()) for line in axes.lines)
        axes.set_ylim(0, 1.1 * float(highest))
    return made
