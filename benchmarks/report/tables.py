"""Tables of the documents, made from result files, so that no number is typed by hand.

python -m benchmarks.report.tables         # rewrite them; a test compares
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path

from benchmarks.record import RESULTS
from benchmarks.report.plots import NAMES, spaced
from deploy.common.paths import ROOT

DOCUMENTS = ("LOG.md", "README.md")


def singular(name: str) -> str:
    """`1 clients`, as result files name it, is one client."""
    return re.sub(r"\b1 (client|sequence)s\b", r"1 \1", name)


def engine_batching(record: dict) -> str:
    """Tokens per second of each way of batching, with the ratio of ours to it."""
    lines = ["| | ours | `generate` | continuous | ours to these |", "|---|---|---|---|---|"]
    for case, systems in record["figures"].items():
        rate = {name: s["tokens_per_second"]["median"] for name, s in systems.items()}
        ratios = [f"{rate['ours'] / rate[name]:.2f}" for name in ("generate", "continuous")]
        row = [f"{rate[name]:.0f}" for name in ("ours", "generate", "continuous")]
        lines.append(f"| {singular(case)} | {' | '.join(row)} | {' and '.join(ratios)} |")
    return "\n".join(lines)


def serving(record: dict) -> str:
    """Everybody beside `ours int8`: the median over the rounds of the ratio within a round."""
    figures = record["figures"]
    quantities = [f"tokens_per_second {n}" for n in (1, 8, 32)] + ["first_token_seconds 8"]
    head = "tokens per second, 1 client", "8 clients", "32 clients"
    head += "time to first token, 8 clients", "memory", "start"
    lines = [f"| | {' | '.join(head)} |", "|---" * 7 + "|"]
    for name, system in figures.items():
        if why := system.get("not measured"):
            lines.append(f"| {NAMES[name]} | not measured: {why} | | | | | |")
            continue
        cells = [ratio(figures, name, "ours int8", quantity) for quantity in quantities]
        if name == "ours int8":
            cells = ["1"] * len(quantities)  # all are divided by it
        memory, start = system.get("memory_mb"), system.get("start_seconds")
        cells.append(f"{memory['median'] / 1000:.1f} GB" if memory else "")
        cells.append(f"{start['median']:.0f} s" if memory else "")
        lines.append(f"| {NAMES[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def http(record: dict) -> str:
    """What is left of the engine's speed behind HTTP."""
    lines = ["| | through HTTP / engine alone, tokens per second |", "|---|---|"]
    for clients, pairs in record["figures"].items():
        spread = f"({pairs['min']:.2f} to {pairs['max']:.2f}, {pairs['rounds']} pairs)"
        lines.append(f"| {singular(clients)} | **{pairs['median']:.2f}** {spread} |")
    return "\n".join(lines)


TARGETS = (
    ("int8 through HTTP against the engine alone", "ours int8", "direct int8", (0.95, 0.95, 0.95)),
    ("int4 through HTTP against the engine alone", "ours int4", "direct int4", (0.95, 0.95, 0.95)),
    ("int8 against the original's way", "ours int8", "seed", (5, 24, None)),
    ("int8 against vLLM", "ours int8", "vllm", (2.0, 1.5, 1.25)),
    ("int8 against llama.cpp, 8 bits", "ours int8", "llama.cpp Q8_0", (1.0, 1.3, 1.6)),
    ("int4 against llama.cpp, 4 bits", "ours int4", "llama.cpp Q4_0", (1.0, 1.3, 1.6)),
)
"""What was to be reached at 1, 8 and 32 clients, in tokens per second."""


def targets(record: dict) -> str:
    """Ratios reached, and the ones aimed at."""
    lines = ["| tokens per second | 1 client | 8 clients | 32 clients |", "|---|---|---|---|"]
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
    head = "perplexity", "against float32", "same choice", "same tokens"
    lines = [f"| | {' | '.join(head)} |", "|---" * 5 + "|"]
    for name, row in rows.items():
        change = round(100 * (row["perplexity"] / base - 1), 2)
        more = f"{change:+.2f} %" if change else "0.00 %"  # nothing has no sign
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


GPU_MODELS = {"smollm2 gpu": "SmolLM2-135M", "dolly gpu": "dolly-v2-3b's shape"}


def gpu(record: dict) -> str:
    """The engine `transformers` on a GPU: how long a decode step is, and what takes it.

    Reading the weights alone is their bytes by the memory's bandwidth: no step can be shorter.
    """
    head = "tokens per second", "step, ms", "of that, kernels run", "reading the weights alone"
    lines = [f"| model, sequences | {' | '.join(head)} |", "|---" * 5 + "|"]
    for name, model in GPU_MODELS.items():
        row = {q: found["values"] for q, found in record["figures"]["systems"][name].items()}
        read = [1000 * b / s for b, s in zip(row["bytes"], row["bandwidth"], strict=True)]
        for sequences in (1, 8, 32):
            rates = row[f"tokens_per_second {sequences}"]
            steps = [1000 * sequences / rate for rate in rates]
            shares = row[f"share_of_time_in_kernels {sequences}"]
            kernels = [step * share for step, share in zip(steps, shares, strict=True)]
            cells = [f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"]
            cells += [f"{statistics.median(steps):.1f} ({min(steps):.1f} to {max(steps):.1f})"]
            cells += [f"{statistics.median(kernels):.1f}", f"{statistics.median(read):.2g}"]
            lines.append(f"| {model}, {sequences} | {' | '.join(cells)} |")
    return "\n".join(lines)


def roofline(record: dict) -> str:
    """How near the engine comes to what the machine allows."""
    head = "tokens per second", "operations per byte", "of the roof"
    lines = [f"| | {' | '.join(head)} |", "|---" * 4 + "|"]
    for name, row in record["figures"]["points"].items():
        cells = [f"{row['tokens_per_second']['max']:.0f}", f"{row['flop_per_byte']:.0f}"]
        cells += [f"**{row['share_of_roof']:.2f}**"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def startup(record: dict) -> str:
    """Start of the server beside the load of its engine, and memory."""
    ratios = "READY to engine, median of the rounds' ratios"
    head = "engine alone", "server READY", ratios, "memory, loaded", "after 32 clients"
    lines = [f"| | {' | '.join(head)} |", "|---" * 6 + "|"]
    for name, row in record["figures"].items():
        middle = {quantity: found["median"] for quantity, found in row.items()}
        cells = [f"{middle['engine_seconds']:.1f} s", f"{middle['ready_seconds']:.1f} s"]
        cells += [f"{middle['ready_to_engine']:.2f}"]
        cells += [f"{middle[q] / 1000:.2f} GB" for q in ("loaded_mb", "served_mb")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def offload(record: dict) -> str:
    """The dolly-v2-3b shape under a RAM budget: speed, its limit, memory."""
    head = "on disk", "tokens per second", "the disk allows", "share of it", "peak memory"
    lines = [f"| RAM for weights | {' | '.join(head)} |", "|---" * 6 + "|"]
    for name, row in record["figures"].items():
        rate = row["tokens_per_second"]
        cells = [f"{row['bytes_on_disk']['median'] / 1e9:.1f} GB"]
        cells += [f"{rate['median']:.2f} ({rate['min']:.2f} to {rate['max']:.2f})"]
        limit = row.get("disk_limit_tokens_per_second")
        if limit and name.endswith("cold"):
            shares = [r / d for r, d in zip(rate["values"], limit["values"], strict=True)]
            cells += [f"{limit['median']:.2f}", f"{statistics.median(shares):.2f}"]
        else:
            cells += ["", ""]
        cells += [f"{row['peak_memory_gb']['median']:.1f} GB"]
        lines.append(f"| {spaced(name)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def soak(record: dict) -> str:
    """Half an hour of load, in one line a quantity."""
    figures = record["figures"]
    thirds = ", ".join(f"{1000 * s:.1f}" for s in figures["p99_seconds_a_token_by_third"])
    replies = ", ".join(f"{count:,} {outcome}" for outcome, count in figures["requests"].items())
    rows = {
        "clients, minutes, cores": f"{figures['clients']}, {figures['minutes']:.0f}, "
        f"{figures['cores_used']} of {record['machine']['cores']}",
        "requests and their status": replies,
        "memory after the warm-up, at the end": " and ".join(
            f"{figures[q]:,.0f} MB" for q in ("memory_mb_after_warm_up", "memory_mb_at_the_end")
        ),
        "slope of the memory": f"{figures['memory_mb_a_minute']:+.2f} MB a minute",
        "99th percentile by third, ms a token": thirds,
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines)


def image(record: dict) -> str:
    """Images by part, and what building and starting them takes."""
    figures = record["figures"]
    names = [name for name in figures if "bytes" in figures[name]]
    lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]

    def row(title: str, value: Callable[[dict], str]) -> None:
        lines.append(f"| {title} | {' | '.join(value(figures[name]) for name in names)} |")

    for part in ("torch", "transformers", "OpenVINO", "TorchServe", "other packages"):
        row(f"{part}, MB", lambda f, part=part: f"{f['bytes'].get(part, 0) / 1e6:.0f}")
    for part in ("Python", "Java", "Debian"):
        row(f"{part}, MB", lambda f, part=part: f"{f['bytes'][part] / 1e6:.0f}")
    row("**all without weights, MB**", lambda f: f"**{f['bytes_without_weights'] / 1e6:.0f}**")
    row("SmolLM2's weights, int8, MB", lambda f: f"{f['bytes']['weights'] / 1e6:.0f}")
    row("compressed, weights included, MB", lambda f: f"{f['compressed_bytes'] / 1e6:.0f}")
    if "ready_seconds" in figures[names[0]]:
        row("build without layers in the cache", lambda f: f"{f['cold_seconds']:.0f} s")
        row("build after an edit of the handler", lambda f: f"{f['edit_seconds']['median']:.0f} s")
        row("ready, beside the bare process", lambda f: f"{f['ready_to_process']['median']:.2f} x")
        row("memory when ready, MB", lambda f: f"{f['memory_mb']['median']:.0f}")
    return "\n".join(lines)


TABLES = {
    "image": image,
    "large": large,
    "engine_batching": engine_batching,
    "gpu": gpu,
    "http": http,
    "offload": offload,
    "quality": quality,
    "roofline": roofline,
    "serving": serving,
    "soak": soak,
    "startup": startup,
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
