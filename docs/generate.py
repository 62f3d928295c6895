"""Fill in the generated parts of the documents: tables, measured numbers, limits.

python -m docs.generate            # rewrite the documents
python -m docs.generate --check    # fail if a document is not up to date

A document marks what is generated with HTML comments, which readers do not see:

    <!-- table serving -->         a block: everything up to the end marker is replaced
    <!-- end -->

    It takes <!-- value startup.openvino_seconds -->4.0<!-- end --> s.

`BLOCKS` names the functions that write blocks. A value is a limit or setting from `SETTINGS`, read
from the file that declares it, or a measured number from `benchmarks.report.values`. Markers inside
code blocks and code spans are left alone.
"""

import functools
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
import yaml

from benchmarks.report.tables import TABLES, table
from benchmarks.report.values import value
from deploy.archive.build import TICK_SECONDS, TICK_SECONDS_PER_GB
from deploy.common import cli
from deploy.common.paths import ROOT, UserError, shown
from deploy.image.run import STOP_SECONDS
from deploy.torchserve.watch import (
    FAILED_SECONDS,
    FROZEN_SECONDS,
    INTERVAL,
    OCCUPY_SECONDS,
    PATIENCE_SECONDS,
    STEP_SECONDS,
    STUCK_SECONDS,
)
from handler import openai
from handler.config import DEFAULTS, load_app
from handler.engine import EngineLoad
from handler.metrics import FrontendResponses, Metrics
from handler.request import Decoding, SharedParameters, parameter_table


def make_help() -> str:
    """Show the targets as `make help` prints them."""
    command = ["make", "--no-print-directory", "help"]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return f"```console\n$ make help\n{output}```"


def metrics_table() -> str:
    """List the metrics that the server declares, without those of its process."""
    metrics = Metrics(load_app("smollm2-135m"), "")
    metrics.set_load(EngineLoad(0, 0, 0, cached_prompt_tokens=0))
    families = [f for f in metrics.registry.collect() if not f.name.startswith("process_")]
    families += FrontendResponses("").describe()
    rows = ["| metric | type | meaning and label |", "|---|---|---|"]
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels: dict[str, list[str]] = {}
        for sample in family.samples:
            for label, text in sample.labels.items():
                if label not in ("model", "le") and text not in labels.setdefault(label, []):
                    labels[label].append(text)
        text = family.documentation.rstrip(".")
        text += "".join(f". `{label}`: {', '.join(labels[label])}" for label in labels)
        rows.append(f"| `{name}` | {family.type} | {text} |")
    return "\n".join(rows)


def vertex_table() -> str:
    """List the parameters that only Vertex AI's API has; `openai-chat` has the shared ones."""
    names = [name for name in SharedParameters.model_fields if name not in Decoding.model_fields]
    return parameter_table(names=names)


BLOCKS: dict[str, Callable[[], str]] = {
    **{name: functools.partial(table, name) for name in TABLES},
    "make-help": make_help,
    "metrics": metrics_table,
    "parameters": vertex_table,
    "openai-chat": functools.partial(openai.parameter_table, "chat"),
    "openai-completions": functools.partial(openai.parameter_table, "completions"),
}
"""Name of a block -> the function that writes it."""


def default_limit(name: str) -> int:
    """Read a default limit, for apps that do not set it."""
    return int(yaml.safe_load(DEFAULTS.read_text())["app"]["limits"][name])


def declared(file: str, name: str) -> int:
    """Read a whole number that a file assigns to a name at the start of a line."""
    match = re.search(rf"^{name} ?= ?([\d_]+)$", (ROOT / file).read_text(), re.MULTILINE)
    if not match:
        raise UserError(f"{file} does not set {name} to a whole number")
    return int(match[1])


SETTINGS: dict[str, Callable[[], str]] = {
    "limits.max_instances": lambda: str(default_limit("max_instances")),
    "limits.max_body_kb": lambda: f"{default_limit('max_body_bytes') / 1000:g}",
    "limits.over_body_kib": lambda: (
        f"{declared('deploy/torchserve/launch.py', 'OVER_LIMIT') / 1024:g}"
    ),
    "limits.seconds": lambda: str(default_limit("seconds")),
    "limits.queue_tokens": lambda: str(load_app("smollm2-135m").engine.max_queue_tokens),
    "limits.smollm2_context": lambda: str(load_app("smollm2-135m").engine.max_context),
    "container.drain_seconds": lambda: str(declared("docker/serve.py", "DRAIN_SECONDS")),
    "container.stop_seconds": lambda: str(STOP_SECONDS),
    "watch.patience": lambda: str(PATIENCE_SECONDS),
    "watch.patience_at_most": lambda: f"{PATIENCE_SECONDS + STEP_SECONDS:g}",
    "watch.occupy": lambda: str(OCCUPY_SECONDS),
    "watch.interval": lambda: f"{INTERVAL:g}",
    "watch.frozen": lambda: str(FROZEN_SECONDS),
    "watch.frozen_at_most": lambda: f"{FROZEN_SECONDS + STEP_SECONDS:g}",
    "watch.failed": lambda: str(FAILED_SECONDS),
    "watch.stuck": lambda: str(STUCK_SECONDS),
    "watch.tick": lambda: str(TICK_SECONDS),
    "watch.tick_openvino": lambda: str(TICK_SECONDS_PER_GB["openvino"]),
    "watch.tick_transformers": lambda: str(TICK_SECONDS_PER_GB["transformers"]),
}
"""Name of a limit or setting -> the function that reads it where it is declared."""

MARKED = re.compile(
    r"(?P<code>^```.*?^```|`[^`\n]+`)"
    r"|<!-- (?P<kind>table|value) (?P<name>\S+) -->"
    r"(?P<old>(?:(?!<!-- (?:table|value|end)\b).)*)(?P<end><!-- end -->)?",
    re.DOTALL | re.MULTILINE,
)

app = cli.app(__doc__)


def documents() -> list[Path]:
    """The documents that may have generated parts."""
    folders = ("", "docs/", "docs/pages/**/", "standin/")
    return sorted(path for folder in folders for path in ROOT.glob(f"{folder}*.md"))


def generate(text: str) -> str:
    """Write every generated part of a document anew.

    Raises:
        UserError: a marker has no end, or a name that does not exist.
    """

    def write(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        kind, name = match["kind"], match["name"]
        marker = f"<!-- {kind} {name} -->"
        if not match["end"]:
            raise UserError(f"{marker} has no <!-- end -->")
        if kind == "value":
            if re.fullmatch(r"\s*([-*>]\s+)*", text[: match.start()].rpartition("\n")[2]):
                raise UserError(f"{marker} begins a line, which Markdown would read as HTML")
            written = SETTINGS[name]() if name in SETTINGS else value(name)
            return f"{marker}{written}<!-- end -->"
        if name not in BLOCKS:
            raise UserError(f"{marker}: there is no block {name!r}, only {', '.join(BLOCKS)}")
        return f"{marker}\n{BLOCKS[name]()}\n<!-- end -->"

    return MARKED.sub(write, text)


@app.command()
def main(
    check: Annotated[bool, typer.Option("--check", help="Change nothing, only compare.")] = False,
) -> None:
    """Rewrite or check every document."""
    outdated = []
    for path in documents():
        text = path.read_text()
        try:
            generated = generate(text)
        except UserError as error:
            raise UserError(f"{shown(path)}: {error}") from error
        if generated != text:
            outdated.append(shown(path))
            if not check:
                path.write_text(generated)
    if check and outdated:
        raise UserError(f"{', '.join(outdated)}: not up to date; run python -m docs.generate")


if __name__ == "__main__":
    sys.exit(cli.run(app, "docs.generate"))
