"""Tables for documents and chapters, made from result files; `docs.generate` puts them in."""

import statistics
from collections.abc import Callable

from benchmarks.record import read
from benchmarks.report import shapes
from benchmarks.report.labels import SYSTEMS, singular, spaced


def engine_batching(record: dict) -> str:
    """Tokens per second of each way of batching, with the ratio of ours to it."""
    lines = ["| | ours | `generate` | continuous | ours to these |", "|---|---|---|---|---|"]
    for case, systems in record["measurements"].items():
        rate = {name: s["tokens_per_second"]["median"] for name, s in systems.items()}
        ratios = [f"{rate['ours'] / rate[name]:.2f}" for name in ("generate", "continuous")]
        row = [f"{rate[name]:.0f}" for name in ("ours", "generate", "continuous")]
        lines.append(f"| {singular(case)} | {' | '.join(row)} | {' and '.join(ratios)} |")
    return "\n".join(lines)


def serving(record: dict) -> str:
    """Each system divided by `ours int8`: median over the rounds of the ratio within a round."""
    measured = record["measurements"]
    quantities = [f"tokens_per_second {n}" for n in (1, 8, 32)] + ["first_token_seconds 8"]
    head = ["tokens per second, 1 client", "8 clients", "32 clients"]
    head += ["time to first token, 8 clients", "memory", "start"]
    lines = [f"| | {' | '.join(head)} |", "|---" * 7 + "|"]
    for name, system in measured.items():
        if why := system.get("not measured"):
            lines.append(f"| {SYSTEMS[name]} | not measured: {why} | | | | | |")
            continue
        cells = [ratio(measured, name, "ours int8", quantity) for quantity in quantities]
        if name == "ours int8":
            cells = ["1"] * len(quantities)  # all are divided by it
        memory, start = system.get("memory_mb"), system.get("start_seconds")
        cells.append(f"{memory['median'] / 1000:.1f} GB" if memory else "")
        cells.append(f"{start['median']:.0f} s" if memory else "")
        lines.append(f"| {SYSTEMS[name]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def http(record: dict) -> str:
    """Throughput through HTTP, divided by that of the engine alone."""
    lines = ["| | through HTTP / engine alone, tokens per second |", "|---|---|"]
    for clients, pairs in record["measurements"].items():
        spread = f"({pairs['min']:.2f} to {pairs['max']:.2f}, {pairs['rounds']} pairs)"
        lines.append(f"| {singular(clients)} | **{pairs['median']:.2f}** {spread} |")
    return "\n".join(lines)


AIMS = (
    ("int8 through HTTP against the engine alone", "ours int8", "direct int8", (0.95, 0.95, 0.95)),
    ("int4 through HTTP against the engine alone", "ours int4", "direct int4", (0.95, 0.95, 0.95)),
    ("int8 against the baseline handler", "ours int8", "baseline", (5, 24, None)),
    ("int8 against vLLM", "ours int8", "vllm", (2.0, 1.5, 1.25)),
    ("int8 against llama.cpp, 8 bits", "ours int8", "llama.cpp Q8_0", (1.0, 1.3, 1.6)),
    ("int4 against llama.cpp, 4 bits", "ours int4", "llama.cpp Q4_0", (1.0, 1.3, 1.6)),
)
"""Comparison, two systems, and the ratios of throughput we aimed at with 1, 8 and 32 clients."""


def aims(record: dict) -> str:
    """Ratios reached, and the ones aimed at."""
    lines = ["| tokens per second | 1 client | 8 clients | 32 clients |", "|---|---|---|---|"]
    for what, ours, other, wanted in AIMS:
        cells = []
        for clients, aim in zip((1, 8, 32), wanted, strict=True):
            reached = ratio(record["measurements"], ours, other, f"tokens_per_second {clients}")
            cells.append(f"{reached}, aim {aim}" if aim and reached else reached)
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def ratio(measured: dict, name: str, other: str, quantity: str) -> str:
    """Median, least and most of the ratios within a round; empty if one was not measured."""
    mine, theirs = measured[name].get(quantity), measured[other].get(quantity)
    if not mine or not theirs:
        return ""
    values = [a / b for a, b in zip(mine["values"], theirs["values"], strict=True)]
    middle, least, most = statistics.median(values), min(values), max(values)
    digits = 1 if middle >= 10 else 2
    return f"**{middle:.{digits}f}** ({least:.{digits}f} to {most:.{digits}f})"


def quality(record: dict) -> str:
    """Perplexity and agreement of each precision."""
    rows = record["measurements"]["rows"]
    base = next(iter(rows.values()))["perplexity"]
    head = "perplexity", "against float32", "same choice", "same tokens"
    lines = [f"| | {' | '.join(head)} |", "|---" * 5 + "|"]
    for name, row in rows.items():
        change = round(100 * (row["perplexity"] / base - 1), 2)
        more = f"{change:+.2f} %" if change else "0.00 %"  # not +0.00 %
        same = f"{100 * row['same_choice']:.1f} % | {row['same_words']:.0f} of 64"
        lines.append(f"| {name} | {row['perplexity']:.2f} | {more} | {same} |")
    return "\n".join(lines)


def large(record: dict) -> str:
    """The dolly-v2-3b shape: speed, share of the roofline, memory; and what the export takes."""
    measured = record["measurements"]
    head = "tokens per second, 1 sequence", "8 sequences", "of the roofline at 1", "peak memory"
    lines = [f"| | {' | '.join(head)} | export |", "|---" * 6 + "|"]
    base = next(iter(measured["engines"].values()))
    for name, row in measured["engines"].items():
        cells = []
        for sequences in (1, 8):
            quantity = f"tokens_per_second {sequences}"
            rate, slow = row[quantity]["median"], base[quantity]["median"]
            cells.append(f"{rate:.1f}, {rate / slow:.1f} x")
        cells += [f"{row['share_of_roofline']['median']:.2f}"]
        cells += [f"{row['peak_memory_gb']['median']:.1f} GB"]
        made = measured["exports"].get(name)
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
        row = {q: found["values"] for q, found in record["measurements"]["systems"][name].items()}
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
    for name, row in record["measurements"]["points"].items():
        cells = [f"{row['tokens_per_second']['max']:.0f}", f"{row['flop_per_byte']:.0f}"]
        cells += [f"**{row['share_of_roof']:.2f}**"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def startup(record: dict) -> str:
    """Start of the server beside the load of its engine, and memory."""
    ratios = "READY to engine, median of the rounds' ratios"
    head = "engine alone", "server READY", ratios, "memory, loaded", "after 32 clients"
    lines = [f"| | {' | '.join(head)} |", "|---" * 6 + "|"]
    for name, row in record["measurements"].items():
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
    for name, row in record["measurements"].items():
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
    """A long run under load, in one line a quantity; then what each fault did."""
    measured = record["measurements"]
    thirds = ", ".join(
        f"{1000 * s:.1f}" for s in measured["p99_seconds_a_token_by_third"] if s is not None
    )
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in measured["requests"].items())
    rows = {
        "clients, minutes, cores": f"{measured['clients']}, {measured['minutes']:.0f}, "
        f"{measured['cores_used']} of {record['machine']['cores']}",
        "requests and their outcomes": outcomes,
        "memory after the warm-up, at the end": " and ".join(
            f"{measured[q]:,.0f} MB" for q in ("memory_mb_after_warm_up", "memory_mb_at_the_end")
        ),
        "slope of the memory": f"{measured['memory_mb_a_minute']:+.2f} MB a minute",
        **{
            f"slope of the {part}": f"{slope:+.2f} MB a minute"
            for part, slope in measured.get("memory_mb_a_minute_by_part", {}).items()
        },
        "99th percentile by third, ms a token": thirds,
    }
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    if faults := measured.get("faults"):
        lines += ["", "| fault | times | longest without a response, without a 200 | exit codes |"]
        lines += ["|---|---|---|---|"]
        for name in dict.fromkeys(fault["fault"] for fault in faults):
            found = [fault for fault in faults if fault["fault"] == name]
            response = max(fault["seconds_without_a_response"] for fault in found)
            good = max(fault["seconds_without_200"] for fault in found)
            codes = ", ".join(str(code) for fault in found for code in fault["ended"])
            lines.append(f"| {name} | {len(found)} | {response:.0f} s, {good:.0f} s | {codes} |")
    return "\n".join(lines)


PARTS = (
    *("torch", "transformers", "OpenVINO", "TorchServe", "other packages"),
    *("Python", "Java", "Debian"),
)


def image(record: dict) -> str:
    """Images by part, and what building and starting them takes."""
    measured = record["measurements"]
    names = [name for name in measured if "bytes" in measured[name]]
    lines = [f"| | {' | '.join(f'`{name}`' for name in names)} |", "|---" * (len(names) + 1) + "|"]

    rows: dict[str, Callable[[dict], str]] = {
        "**all without weights, MB**": lambda m: f"**{m['bytes_without_weights'] / 1e6:.0f}**",
        "SmolLM2's weights, int8, MB": lambda m: f"{m['bytes']['weights'] / 1e6:.0f}",
        "compressed, weights included, MB": lambda m: f"{m['compressed_bytes'] / 1e6:.0f}",
    }
    if "ready_seconds" in measured[names[0]]:
        rows |= {
            "build without layers in the cache": lambda m: f"{m['cold_seconds']:.0f} s",
            "build after an edit of the handler": lambda m: f"{m['edit_seconds']['median']:.0f} s",
            "ready, beside the bare process": lambda m: f"{m['ready_to_process']['median']:.2f} x",
            "memory when ready, MB": lambda m: f"{m['memory_mb']['median']:.0f}",
        }
    for part in PARTS:
        sizes = (f"{measured[name]['bytes'].get(part, 0) / 1e6:.0f}" for name in names)
        lines.append(f"| {part}, MB | {' | '.join(sizes)} |")
    for title, cell in rows.items():
        lines.append(f"| {title} | {' | '.join(cell(measured[name]) for name in names)} |")
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
    "aims": aims,
    "shapes": shapes.throughput,
    "shapes-first-token": shapes.first_token,
    "shapes-described": shapes.described,
    "shapes-missed": shapes.missed,
}
SOURCES = {"aims": "serving"} | dict.fromkeys(
    ("shapes-first-token", "shapes-described", "shapes-missed"), "shapes"
)
"""Tables whose result file has another name."""


def table(name: str) -> str:
    """Make a table from its result file."""
    return TABLES[name](read(SOURCES.get(name, name)))
