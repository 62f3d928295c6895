"""Tables of the documents, made from result files, so that no number is typed by hand.

python -m benchmarks.tables         # rewrite them; a test compares
"""

import json
import re
import statistics
from pathlib import Path

from benchmarks.record import RESULTS
from deploy.paths import ROOT

DOCUMENTS = ("LOG.md", "README.md")


def engine_batching(record: dict) -> str:
    """Tokens per second of each way of batching, with the ratio of ours to it."""
    lines = ["| | ours | `generate` | continuous | ours to these |", "|---|---|---|---|---|"]
    for case, systems in record["figures"].items():
        rate = {name: s["tokens_per_second"]["median"] for name, s in systems.items()}
        ratios = [f"{rate['ours'] / rate[name]:.2f}" for name in ("generate", "continuous")]
        row = [case, *(f"{rate[name]:.0f}" for name in ("ours", "generate", "continuous"))]
        lines.append(f"| {' | '.join(row)} | {' and '.join(ratios)} |")
    return "\n".join(lines)


def engines(record: dict) -> str:
    """Tokens per second of each engine as multiples of the first one's, which is the original's."""
    figures = record["figures"]["tokens_per_second"]
    cases = list(next(iter(figures.values())))
    base = next(iter(figures.values()))
    lines = [f"| | {' | '.join(cases)} |", "|---" * (len(cases) + 1) + "|"]
    for name, rates in figures.items():
        cells = [f"{rates[c]['median'] / base[c]['median']:.1f} x" for c in cases]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def serving(record: dict) -> str:
    """Everybody beside `ours int8`: the median over the rounds of the ratio within a round."""
    figures = record["figures"]
    quantities = [f"tokens_per_second {n}" for n in (1, 8, 32)] + ["first_token_seconds 8"]
    head = "tokens per second, 1 client", "8", "32", "time to first token, 8 streams"
    lines = [f"| | {' | '.join(head)} | memory | start |", "|---" * 7 + "|"]
    for name, system in figures.items():
        if why := system.get("not measured"):
            lines.append(f"| {name} | not measured: {why} | | | | | |")
            continue
        cells = [ratio(figures, name, "ours int8", quantity) for quantity in quantities]
        memory, start = system.get("memory_mb"), system.get("start_seconds")
        cells.append(f"{memory['median'] / 1000:.1f} GB" if memory else "")
        cells.append(f"{start['median']:.0f} s" if memory else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


TARGETS = (
    ("through HTTP against the engine alone", "ours int8", "direct int8", (0.95, 0.95, 0.95)),
    ("the same, int4", "ours int4", "direct int4", (0.95, 0.95, 0.95)),
    ("against the original's way", "ours int8", "seed", (5, 24, None)),
    ("against vLLM", "ours int8", "vllm", (2.0, 1.5, 1.25)),
    ("against llama.cpp, 8 bits", "ours int8", "llama.cpp Q8_0", (1.0, 1.3, 1.6)),
    ("against llama.cpp, 4 bits", "ours int4", "llama.cpp Q4_0", (1.0, 1.3, 1.6)),
)
"""What was to be reached at 1, 8 and 32 clients, in tokens per second."""


def targets(record: dict) -> str:
    """Ratios reached, and the ones aimed at."""
    lines = ["| tokens per second | 1 client | 8 | 32 |", "|---|---|---|---|"]
    for what, ours, other, aims in TARGETS:
        cells = []
        for clients, aim in zip((1, 8, 32), aims, strict=True):
            reached = ratio(record["figures"], ours, other, f"tokens_per_second {clients}")
            cells.append(f"{reached}, aim {aim}" if aim and reached else reached)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(figures: dict, name: str, other: str, quantity: str) -> str:
    """Median, least and most of the ratios within a round; empty if one was not measured."""
    mine, theirs = figures[name].get(quantity), figures[other].get(quantity)
    if not mine or not theirs:
        return ""
    values = [a / b for a, b in zip(mine["values"], theirs["values"], strict=True)]
    middle, least, most = statistics.median(values), min(values), max(values)
    digits = 1 if middle >= 10 else 2
    return f"**{middle:.{digits}f}** ({least:.{digits}f} to {most:.{digits}f})"


def quality(record: dict) -> str:
    """Perplexity and agreement of each precision."""
    rows = record["figures"]["rows"]
    base = next(iter(rows.values()))["perplexity"]
    lines = ["| | perplexity | | same choice | same words |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        more = f"{100 * (row['perplexity'] / base - 1):+.2f} %"
        same = f"{100 * row['same_choice']:.1f} % | {row['same_words']:.0f} of 64"
        lines.append(f"| {name} | {row['perplexity']:.2f} | {more} | {same} |")
    return "\n".join(lines)


def large(record: dict) -> str:
    """The dolly-v2-3b shape: speed, share of the roofline, memory; and what the export takes."""
    figures = record["figures"]
    head = "tokens per second, 1 sequence", "8 sequences", "of the roofline at 1", "peak memory"
    lines = [f"| | {' | '.join(head)} | export |", "|---" * 6 + "|"]
    base = next(iter(figures["engines"].values()))
    for name, row in figures["engines"].items():
        cells = []
        for sequences in (1, 8):
            quantity = f"tokens_per_second {sequences}"
            rate, slow = row[quantity]["median"], base[quantity]["median"]
            cells.append(f"{rate:.1f}, {rate / slow:.1f} x")
        cells += [f"{row['share_of_roofline']['median']:.2f}"]
        cells += [f"{row['peak_memory_gb']['median']:.1f} GB"]
        made = figures["exports"].get(name)
        cells.append(f"{made['seconds']:.0f} s, {made['peak_memory_gb']:.0f} GB" if made else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "large": large,
    "engine_batching": engine_batching,
    "engines": engines,
    "quality": quality,
    "serving": serving,
    "targets": targets,
}
SOURCES = {"targets": "serving"}
"""Tables whose result file has another name."""


def with_tables(text: str) -> str:
    """The document with every marked table made anew."""
    for name, render in TABLES.items():
        mark, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        if mark not in text:
            continue
        source = RESULTS / f"{SOURCES.get(name, name)}.json"
        table = render(json.loads(source.read_text()))
        pattern = re.escape(mark) + rf"\n(?:(?:\|.*\n)+{re.escape(end)}\n)?"
        text = re.sub(pattern, f"{mark}\n{table}\n{end}\n", text)
    return text


def main() -> None:
    """Rewrite the documents."""
    for name in DOCUMENTS:
        path = Path(ROOT, name)
        path.write_text(with_tables(path.read_text()))


if __name__ == "__main__":
    main()
