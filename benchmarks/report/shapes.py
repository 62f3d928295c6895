"""The comparison by shape: ratios within a round, aims, tables and single values."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.report.labels import SHAPED, singular
from deploy.common.paths import UserError

OURS, VLLM, LLAMA = "ours int8", "vllm", "llama.cpp Q8_0"
PEERS = {"vllm": VLLM, "llama": LLAMA}
"""Name of a peer in a value -> its name in the result file."""

RATE, FIRST_TOKEN, FIRST_TOKEN_P95 = "tokens_per_second", "first_token_p50", "first_token_p95"


@dataclass(frozen=True)
class Aim:
    """What we wanted a ratio of ours to another system to be on a load."""

    load: str
    other: str
    quantity: str
    wanted: float

    def reached(self, ratio: float) -> bool:
        """Whether the ratio is on the right side of the aim: more tokens, or less time."""
        return ratio >= self.wanted if self.quantity == RATE else ratio <= self.wanted


def aims(record: dict) -> Iterator[Aim]:
    """List the aims of every load that was measured.

    With `burst` there is none for throughput, because requests arrive at a given rate.
    """
    for name, load in record["measurements"]["loads"].items():
        if load["clients"] >= 4:
            yield Aim(name, VLLM, RATE, 1.3)
            yield Aim(name, LLAMA, RATE, 1.5)
        if load["clients"] == 1:
            yield Aim(name, LLAMA, RATE, 1.0)
        if load["shape"] == "chat":
            yield Aim(name, VLLM, FIRST_TOKEN, 1.0)


def measured(record: dict, system: str, load: str, quantity: str) -> dict | None:
    """Look up repeated measurements; None if there are none."""
    found: dict | None = (
        record["measurements"]["systems"][system].get("loads", {}).get(load, {}).get(quantity)
    )
    return found


def ratios(record: dict, other: str, load: str, quantity: str) -> list[float]:
    """Divide ours by another system's within each round; empty if one was not measured."""
    mine, theirs = (measured(record, system, load, quantity) for system in (OURS, other))
    if not mine or not theirs:
        return []
    return [a / b for a, b in zip(mine["values"], theirs["values"], strict=True)]


def _ratio(values: list[float]) -> str:
    digits = 1 if statistics.median(values) >= 10 else 2
    middle, least, most = (
        f"{v:.{digits}f}" for v in (statistics.median(values), min(values), max(values))
    )
    return f"**{middle}** ({least} to {most})"


def _compared(record: dict, other: str, load: str, quantity: str) -> str:
    """Write a ratio with its spread, and its aim if there is one."""
    values = ratios(record, other, load, quantity)
    if not values:
        return ""
    text = _ratio(values)
    for aim in aims(record):
        if (aim.load, aim.other, aim.quantity) == (load, other, quantity):
            sign = "≥" if quantity == RATE else "≤"
            missed = "" if aim.reached(statistics.median(values)) else " missed"
            text += f", aim {sign} {aim.wanted:g}{missed}"
    return text


def throughput(record: dict) -> str:
    """Tokens per second of each system, and ours divided by each peer's within a round."""
    head = [SHAPED[system] for system in (OURS, VLLM, LLAMA)]
    head += ["ours to vLLM", "ours to llama.cpp"]
    lines = [f"| tokens per second | {' | '.join(head)} |", "|---" * 6 + "|"]
    for load in record["measurements"]["loads"]:
        cells = []
        for system in (OURS, VLLM, LLAMA):
            found = measured(record, system, load, RATE)
            cells.append(
                f"{found['median']:,.0f} ({found['min']:,.0f} to {found['max']:,.0f})"
                if found
                else ""
            )
        cells += [_compared(record, other, load, RATE) for other in (VLLM, LLAMA)]
        lines.append(f"| {singular(load)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def first_token(record: dict) -> str:
    """Time to first token, 50th and 95th percentile, and ours divided by each peer's."""
    head = [SHAPED[system] for system in (OURS, VLLM, LLAMA)]
    head += ["ours to vLLM", "ours to llama.cpp"]
    lines = [f"| time to first token, ms | {' | '.join(head)} |", "|---" * 6 + "|"]
    for load in record["measurements"]["loads"]:
        cells = []
        for system in (OURS, VLLM, LLAMA):
            middle, high = (
                measured(record, system, load, quantity)
                for quantity in (FIRST_TOKEN, FIRST_TOKEN_P95)
            )
            cells.append(
                f"{1000 * middle['median']:,.0f}, {1000 * high['median']:,.0f}"
                if middle and high
                else ""
            )
        cells += [_compared(record, other, load, FIRST_TOKEN) for other in (VLLM, LLAMA)]
        lines.append(f"| {singular(load)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def described(record: dict) -> str:
    """What each shape sends, and how each system was set."""
    rows: dict[str, tuple[str, list[str], list[str]]] = {}
    for load in record["measurements"]["loads"].values():
        _, clients, requests = rows.setdefault(load["shape"], (load["what"], [], []))
        clients.append(str(load["clients"] or "as they arrive"))
        requests.append(str(load["requests"]))
    lines = ["| shape | what is sent | clients | requests |", "|---|---|---|---|"]
    for shape, (what, clients, requests) in rows.items():
        lines.append(f"| {shape} | {what} | {', '.join(clients)} | {', '.join(requests)} |")
    lines += ["", "| system | settings |", "|---|---|"]
    for name, system in record["measurements"]["systems"].items():
        what = system["what"]
        if why := system.get("not measured"):
            what = f"not measured: {why}"
        lines.append(f"| {SHAPED[name]} | {what} |")
    return "\n".join(lines)


def missed(record: dict) -> str:
    """Every aim that the median of the ratios misses."""
    lines = []
    count = 0
    for aim in aims(record):
        if values := ratios(record, aim.other, aim.load, aim.quantity):
            count += 1
            if not aim.reached(statistics.median(values)):
                what = "tokens per second" if aim.quantity == RATE else "time to first token"
                sign = "at least" if aim.quantity == RATE else "at most"
                lines.append(
                    f"- {singular(aim.load)}: {what} {_ratio(values)} of {SHAPED[aim.other]}, "
                    f"aim {sign} {aim.wanted:g}"
                )
    if not lines:
        return f"All {count} aims are reached."
    return "\n".join([f"{count - len(lines)} of {count} aims are reached. Missed:", "", *lines])


def value(record: dict, name: str) -> str:
    """Compute `QUANTITY.SYSTEM.LOAD`, for example `rate_to.vllm.long_900_8`.

    QUANTITY is `rate`, `first_token_ms` or `first_token_p95_ms` of a system, or `rate_to` or
    `first_token_to` for ours divided by a peer's, `_min` or `_max` appended for the least or most
    of the rounds. SYSTEM is `ours`, `vllm` or `llama`. LOAD is the name of a load, shortened.
    """
    quantity, _, rest = name.partition(".")
    short, _, load = rest.partition(".")
    loads = {_short(full): full for full in record["measurements"]["loads"]}
    system = (PEERS | {"ours": OURS}).get(short)
    statistic = {"min": min, "max": max}.get(quantity.rpartition("_")[2], statistics.median)
    quantity = quantity.removesuffix("_min").removesuffix("_max")
    if system is None or load not in loads:
        raise UserError(f"there is no value shapes.{name}: an unknown system or load")
    kinds = {"rate": RATE, "first_token_ms": FIRST_TOKEN, "first_token_p95_ms": FIRST_TOKEN_P95}
    if quantity in kinds:
        found = measured(record, system, loads[load], kinds[quantity])
        values = found["values"] if found else []
        factor = 1 if quantity == "rate" else 1000
        digits = 0
    elif quantity in ("rate_to", "first_token_to"):
        kind = RATE if quantity == "rate_to" else FIRST_TOKEN
        values, factor, digits = ratios(record, system, loads[load], kind), 1, 2
    else:
        raise UserError(f"there is no value shapes.{name}: an unknown quantity")
    if not values:
        raise UserError(f"shapes.{name} was not measured")
    return f"{factor * statistic(values):,.{digits}f}"


def _short(load: str) -> str:
    """Shorten `long 900, 8 clients` to `long_900_8`."""
    return load.removesuffix(" clients").replace(",", "").replace(" ", "_")
