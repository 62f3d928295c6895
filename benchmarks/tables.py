"""Tables of the documents, made from result files, so that no number is typed by hand.

python -m benchmarks.tables         # rewrite them; a test compares
"""

import json
import re
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


TABLES = {"engine_batching": engine_batching, "engines": engines}


def with_tables(text: str) -> str:
    """The document with every marked table made anew."""
    for name, render in TABLES.items():
        mark, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        table = render(json.loads((RESULTS / f"{name}.json").read_text()))
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
