"""Every measured-looking number in the documents' prose is in a result file, or declared here.

Left out: tables that are made from result files (`tests/unit/test_repository.py` compares those),
code and what programs print (`tests/served/test_readme.py` runs it), outputs of chapters (nbval).
"""

import json
import re
from collections.abc import Iterator

import pytest

from benchmarks.record import RESULTS
from benchmarks.tables import SOURCES, TABLES
from deploy.paths import ROOT
from tests.notebooks.test_policy import CHAPTERS, NOTEBOOKS, read

UNITS = {
    "s": "seconds",
    "seconds": "seconds",
    "ms": "milliseconds",
    "minutes": "minutes",
    "kB": "kilobytes",
    "MB": "megabytes",
    "GB": "gigabytes",
    "KiB": "kibibytes",
    "MiB": "mebibytes",
    "GiB": "gibibytes",
    "tokens/s": "rate",
    "tokens a second": "rate",
    "tokens per second": "rate",
    "%": "per cent",
    "x": "ratio",
    "×": "ratio",
    "times": "ratio",
}
NUMBER = re.compile(
    r"(?<![\w.,-])(\d[\d,]*(?:\.\d+)?)\s*(" + "|".join(sorted(UNITS, key=len)[::-1]) + r")(?!\w)"
)

DECLARED = {
    "1 GiB": ("handler/apps/defaults.yaml", "cache_gb: 1 "),
    "3 GiB": ("notebooks/01_solutions.ipynb", "3GiB"),
    "15 seconds": ("deploy/scaling.py", "TICK_SECONDS = 15"),
    "60 %": ("deploy/scaling.py", "TARGET_PERCENT = 60"),
    "10 MB": ("docker/config.properties", "max_request_size=10485760"),
    "300 kB": ("handler/apps/defaults.yaml", "max_body_bytes: 300000"),
    "5.7 GB": ("handler/apps/dolly-v2-3b.yaml", "gigabytes: 5.7"),
    "0.5 GB": ("handler/apps/gpt2.yaml", "gigabytes: 0.5"),
    "2.4 GB": ("notebooks/05_build_the_container.ipynb", "TorchServe's for CPUs\\\": 2.4e9"),
    "5.9 GB": ("notebooks/05_build_the_container.ipynb", "TorchServe's for GPUs\\\": 5.9e9"),
}
"""Settings and other people's figures: what prose may say -> the file that has it, and the text."""

ASKED_FOR = {
    "2 GB": ("startup", "transformers", "served_mb"),
    "3 GB": ("startup", "transformers", "served_mb"),
    "4 GB": ("serving", "ours int8", "memory_mb"),
    "5 GB": ("image", "cpu", "bytes_without_weights"),
    "6 GB": ("image", "cpu", "bytes_without_weights"),
    "20 GB": ("large", "exports", "openvino int8", "peak_memory_gb"),
}
"""Memory and disk that readers are asked to have: more than what this was measured to take."""


def prose(text: str) -> str:
    """Without tables that are made, and without code."""
    text = re.sub(r"<!-- table: .*?<!-- end of table -->", "", text, flags=re.DOTALL)
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def leaves(value: object, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number of a record with its path; of repeated measurements the median and the ends."""
    if isinstance(value, dict):
        for key, part in value.items():
            if key not in {"rounds", "values"}:
                yield from leaves(part, (*path, key))
    elif isinstance(value, int | float):
        yield path, value


def in_units(path: tuple[str, ...], value: float) -> Iterator[tuple[str, float]]:
    """A measured number in the units that prose may give it in. Its name says its own."""
    name = " ".join(path)
    scale = {"kilobytes": 1e3, "megabytes": 1e6, "gigabytes": 1e9}
    scale |= {"kibibytes": 2**10, "mebibytes": 2**20, "gibibytes": 2**30}
    size = next((s for sign, s in (("_mb", 1e6), ("_gb", 1e9), ("bytes", 1)) if sign in name), 0)
    if "tokens_per_second" in name:
        yield "rate", value
    elif size and "per_second" not in name:
        yield from ((unit, value * size / s) for unit, s in scale.items())
    elif "seconds" in name:
        yield from (("seconds", value), ("milliseconds", 1000 * value), ("minutes", value / 60))
    else:
        yield from (("ratio", value), ("per cent", 100 * value))


def measured() -> dict[str, list[float]]:
    """Unit -> all values in result files, and in the tables that are made from them."""
    found: dict[str, list[float]] = {unit: [] for unit in UNITS.values()}
    records = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    for record in records.values():
        for path, value in leaves(record["figures"]):
            for unit, scaled in in_units(path, value):
                found[unit].append(scaled)
    for name, render in TABLES.items():
        cells = render(records[SOURCES.get(name, name)])
        found["ratio"] += [float(n) for n in re.findall(r"\*\*(\d+\.\d+)\*\*", cells)]
        found["per cent"] += [float(n) for n in re.findall(r"(\d+\.\d+) %", cells)]
    return found


MEASURED = measured()


def untraced(text: str) -> list[str]:
    """Numbers with a unit that are neither measured nor declared."""
    wrong = []
    for match in NUMBER.finditer(prose(text)):
        number, unit = match.groups()
        said = f"{number} {unit}"
        value, digits = float(number.replace(",", "")), len(number.partition(".")[2])
        if said in DECLARED or said in ASKED_FOR:
            continue
        if not any(abs(round(m, digits) - value) < 1e-9 for m in MEASURED[UNITS[unit]]):
            wrong.append(said)
    return wrong


def markdown(path) -> str:
    return "\n\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")


def test_the_readmes_numbers_are_measured():
    assert untraced((ROOT / "README.md").read_text()) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_chapters_numbers_are_measured(path):
    assert untraced(markdown(path)) == []


@pytest.mark.parametrize("said", DECLARED)
def test_what_is_declared_is_where_it_says(said):
    file, text = DECLARED[said]
    assert text in (ROOT / file).read_text()


@pytest.mark.parametrize("said", ASKED_FOR)
def test_readers_are_asked_for_enough(said):
    name, *path = ASKED_FOR[said]
    value = json.loads((RESULTS / f"{name}.json").read_text())["figures"]
    for key in path:
        value = value[key]
    value = value.get("median") if isinstance(value, dict) else value
    gigabytes = dict(in_units(tuple(path), value))["gigabytes"]
    assert gigabytes < float(said.split()[0])


@pytest.mark.parametrize(
    "sentence",
    [
        "vLLM is ready after 51 s.",
        "It writes 4,711 tokens per second.",
        "The image has 1.7 GB.",
        "The first token comes after 33 ms.",
        "It is 7.31 x as fast.",
        "HTTP takes 37.4 % of the time.",
    ],
)
def test_a_planted_number_is_found(sentence):
    readme = (ROOT / "README.md").read_text()
    assert len(untraced(readme.replace("## What you need", sentence + "\n\n## What you need"))) == 1
    assert len(untraced(markdown(CHAPTERS[0]) + "\n\n" + sentence)) == 1


def test_a_measured_number_is_traced():
    vllm = json.loads((RESULTS / "serving.json").read_text())["figures"]["vllm"]
    start, rate = vllm["start_seconds"]["median"], vllm["tokens_per_second 32"]["median"]
    first = 1000 * vllm["first_token_seconds 8"]["median"]
    assert untraced(f"{start:.0f} s, {rate:.0f} tokens per second, {first:.0f} ms") == []
    assert untraced(f"{start:.0f} MB") == [f"{start:.0f} MB"], "the unit counts"
