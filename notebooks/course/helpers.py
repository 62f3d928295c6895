"""What all chapters share: progress, tables, figures, source code, servers."""

import ast
import atexit
import base64
import inspect
import io
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np
from IPython import get_ipython
from IPython.display import HTML, display
from IPython.utils.capture import capture_output
from ipywidgets import ValueWidget, VBox  # type: ignore[import-untyped]  # no types published
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image as Picture
from PIL.Image import Quantize

from benchmarks.record import read
from benchmarks.report import tables
from deploy.common.paths import BUILD, ROOT
from deploy.torchserve.server import Server, port_holder

T = TypeVar("T")


def short_errors() -> None:
    """Show errors in one line from now on: the deliberate ones need no traceback."""
    get_ipython().InteractiveTB.set_mode("Minimal")


@contextmanager
def busy(what: str) -> Iterator[None]:
    """Show a moving bar while the block runs; send what it prints to build/notebook.log.

    What the block displays is dropped: whether a library shows its progress bar depends on what is
    already on the disk, and stored outputs must not.
    """
    bar = display(HTML(f"<progress></progress> {what}"), display_id=True)
    try:
        with (
            _log() as log,
            _descriptors(log.fileno()),
            redirect_stdout(log),
            redirect_stderr(log),
            capture_output(stdout=False, stderr=False),  # libraries display progress bars
        ):
            yield
    except BaseException:
        bar.update(HTML(f"✗ {what}"))
        raise
    bar.update(HTML(f"✓ {what}"))


def _log() -> TextIO:
    BUILD.mkdir(exist_ok=True)
    return (BUILD / "notebook.log").open("a")


def progress(values: Sequence[T], what: str) -> Iterator[T]:
    """Iterate over `values` with a progress bar."""

    def shown(done: int) -> HTML:
        return HTML(f'<progress max="{len(values)}" value="{done}"></progress> {what}')

    bar = display(shown(0), display_id=True)
    for done, value in enumerate(values, start=1):
        yield value
        bar.update(shown(done))
    bar.update(HTML(f"✓ {what}"))


@contextmanager
def _descriptors(log: int) -> Iterator[None]:
    """Also send what child processes write to a log: they do not use sys.stdout."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        yield
    finally:
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


def table(rows: Sequence[dict[str, object]]) -> None:
    """Show rows with the same keys as a table, numbers aligned to the right."""
    names = list(rows[0])
    right = {n: all(isinstance(row[n], int | float) for row in rows) for n in names}
    lines = [f"| {' | '.join(names)} |"]
    lines.append("|" + "|".join("---:" if right[n] else "---" for n in names) + "|")
    for row in rows:
        cells = (f"{v:,}" if isinstance(v, int) else str(v) for v in (row[n] for n in names))
        lines.append(f"| {' | '.join(cells)} |")
    markdown("\n".join(lines))


def document_table(name: str) -> None:
    """Show a table of the documents, made from its result file."""
    markdown(tables.table(name))


def interactive(controls: dict[str, ValueWidget], text: Callable[..., str]) -> None:
    """Show Markdown that follows some controls; without a kernel, that of their first values.

    Args:
        controls: argument of `text` -> a widget with a value.
        text: makes Markdown from the values of the controls.
    """

    def shown() -> dict[str, str]:
        made = text(**{name: widget.value for name, widget in controls.items()})
        return {"text/markdown": made, "text/plain": made}

    below = display(shown(), raw=True, display_id=True)
    for widget in controls.values():
        widget.observe(lambda _: below.update(shown(), raw=True), "value")
    sliders = VBox(list(controls.values()))._repr_mimebundle_()
    display(sliders | {"text/plain": "(The sliders appear where the notebook runs.)"}, raw=True)


def markdown(text: str) -> None:
    """Show Markdown; viewers without Markdown show its source."""
    display({"text/markdown": text, "text/plain": text}, raw=True)


def show(drawing: Figure, alt: str) -> None:
    """Show a figure in few bytes, with a caption.

    Args:
        drawing: the figure.
        alt: one sentence that says what the figure shows. It is also the caption, because neither
            JupyterLab nor nbconvert shows the alt text of an output.
    """
    stream = io.BytesIO()
    drawing.savefig(stream, format="png", dpi=110)
    small = io.BytesIO()
    few = Picture.open(stream).convert("RGB").quantize(32, Quantize.MAXCOVERAGE)  # keeps rare hues
    few.save(small, "PNG", optimize=True)
    content = f"{alt}\n{_content(drawing)}"
    picture = {"image/png": base64.b64encode(small.getvalue()).decode(), "text/plain": content}
    display(picture, metadata={"image/png": {"alt": alt}}, raw=True)
    markdown(f"*{alt}*")


def _content(drawing: Figure) -> str:
    """Describe what is drawn, without measured values: nbval compares this, not the picture."""
    lines = []
    for axes in drawing.axes:
        titles = [axes.get_title("left"), axes.get_xlabel(), axes.get_ylabel()]
        ticks = [*axes.get_xticklabels(), *axes.get_yticklabels()]
        names = [tick.get_text() for tick in ticks if any(map(str.isalpha, tick.get_text()))]
        series = axes.get_legend_handles_labels()[1]
        bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
        drawn = {
            "lines": sum(np.size(line.get_xdata()) > 0 for line in axes.lines),
            "bars": sum(bool(bar.get_width() * bar.get_height()) for bar in bars),
            "arrows and boxes": len(axes.patches) - len(bars),
            "clouds": sum(np.size(cloud.get_offsets()) > 0 for cloud in axes.collections),
            "words": [text.get_text() for text in axes.texts],
        }
        lines.append(f"{titles} {names} {series} {drawn}")
    return "\n".join(lines)


def source(thing: Callable | type | Path, start: str = "", end: str = "") -> None:
    """Show source code: a function, a class, or a file from one line to before another.

    Args:
        thing: what to show; a path is relative to the project.
        start: begin at the first line that contains this.
        end: stop before the first line after that which contains this.
    """
    path = ROOT / thing if isinstance(thing, Path) else Path(inspect.getfile(thing))
    text = path.read_text() if isinstance(thing, Path) else inspect.getsource(thing)
    lines = textwrap.dedent(text).splitlines()
    if start:
        lines = lines[next(i for i, line in enumerate(lines) if start in line) :]
    if end:
        lines = lines[: next(i for i, line in enumerate(lines) if i and end in line)]
    language = {".py": "python", ".yaml": "yaml", ".properties": "properties"}.get(path.suffix, "")
    code = textwrap.dedent("\n".join(lines)).strip("\n")
    if language == "python" and not _is_python(code):
        language = ""
    markdown(f"`{path.relative_to(ROOT)}`\n```{language}\n{code}\n```")


def _is_python(text: str) -> bool:
    """Whether text is valid code: a part of a docstring should not be highlighted as code."""
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def result(name: str) -> dict:
    """Read a benchmark's record, as committed in benchmarks/results."""
    return read(name)


def start(archive: Path, port: int, **settings: Any) -> Server:
    """Start TorchServe with one archive; it stops with the notebook at the latest."""
    server = Server(archive, port=port, **settings)
    atexit.register(server.stop)
    with busy(f"starting TorchServe with {server.name}"):
        server.start()
    return server


def stop(server: Server) -> None:
    """Stop a server, and check that its ports are free."""
    server.stop()
    for port in server.ports:
        assert port_holder(port) is None, f"port {port} is still taken by {port_holder(port)}"
    print(f"stopped; ports {server.ports[0]} and {server.ports[1]} are free")
