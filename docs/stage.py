"""From the repository's files to a folder that Sphinx reads: notebooks, README, LOG, sources.

Pages keep their paths, so a link that is right in the repository is right in the site. Nothing is
executed, and nothing is written twice: the front page is the README's first screen, its chapters
are the README's table. Sphinx itself: conf.py, build.py.

    python -m docs.stage      # takes docs/figures, and their alt texts in README.md, from notebooks
"""

import base64
import re
import shutil
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path, PurePosixPath

import nbformat

from deploy.paths import ROOT, UserError

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
ROW = re.compile(
    r'^\| \[<img src="docs/figures/(?P<number>\d\d)\.png" width="\d+" alt="(?P<alt>[^"]+)">\]'
    r"\((?P<link>notebooks/[^)]+)\) \| \d\d \[[^]]+\]\((?P=link)\)<br>(?P<what>.+) \|$",
    re.MULTILINE,
)
COLUMNS = "number", "alt", "link", "what"
TABLE = re.compile(r"^\| \| chapter \|\n(?:\|.*\n)+", re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#]+)((?:#[^)]*)?)\)")
CONSOLE = re.compile(r"^```console\n\$ ([^$].*?)^```$", re.MULTILINE | re.DOTALL)
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".properties": "properties"}


def stage(folder: Path) -> None:
    """Fill a folder anew with the pages of the site, as Markdown and notebooks.

    Raises:
        UserError: the README has no table of chapters, or a chapter is missing in it, or has no
            figure, or a figure no alt text.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    readme = (ROOT / "README.md").read_text()
    first, rest = readme.split("\n## ", 1)
    notebooks = sorted((ROOT / "notebooks").glob("0*.ipynb"))
    chapters = [path for path in notebooks if "solutions" not in path.name]
    solutions = [path for path in notebooks if "solutions" in path.name]
    for path in notebooks:
        _write_notebook(path, folder)
    if len(parts := TABLE.split(first)) != 2:
        raise UserError(
            "README.md: before the first `##` there should be one table `| | chapter |`"
        )
    opening, closing = parts
    index = (DOCS / "index.md").read_text()
    for mark, text in {
        "opening": opening,
        "chapters": _cards(readme, chapters, folder),
        "closing": closing,
        "pages: chapters": _names(chapters),
        "pages: solutions": _names(solutions, "To chapter {number} <{}>"),
    }.items():
        index = index.replace(f"<!-- {mark} -->", text.strip())
    _write(folder, "index.md", index)
    _write(folder, "README.md", f"# Reference\n\n## {rest}")
    _write(folder, "LOG.md", (ROOT / "LOG.md").read_text())


def _names(notebooks: list[Path], title: str = "{}") -> str:
    return "\n".join(
        title.format(f"notebooks/{path.stem}", number=int(path.name[:2])) for path in notebooks
    )


def _cards(readme: str, chapters: list[Path], folder: Path) -> str:
    """The README's table of chapters, a card for each row."""
    rows = {Path(row["link"]).name: row for row in ROW.finditer(readme)}
    cards = []
    for path in chapters:
        if path.name not in rows:
            raise UserError(f"README.md: {path.name} is not in the table of chapters")
        number, alt, link, what = map(unescape, rows[path.name].group(*COLUMNS))
        title = nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")
        shutil.copy2(FIGURES / f"{number}.png", folder)
        text = f"![{alt}]({number}.png)\n\n[{title}]({link})\n\n{what}"
        cards.append(f"::::{{container}} chapter\n{text}\n::::")
    return ":::::{container} chapters\n" + "\n".join(cards) + "\n:::::"


def first_figure(path: Path) -> tuple[bytes, str]:
    """PNG and alt text of the picture that stands for a chapter.

    Raises:
        UserError: there is none.
    """
    for figure in figures(nbformat.read(path, as_version=4)):
        return figure
    raise UserError(f"{path.name}: has no figure in its outputs for README.md")


def figures(notebook: nbformat.NotebookNode) -> Iterator[tuple[bytes, str]]:
    """PNG and alt text of every picture, as `helpers.show` stores them in the outputs.

    Raises:
        UserError: a picture has no alt text.
    """
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if picture := output.get("data", {}).get("image/png"):
                alt = output.metadata.get("image/png", {}).get("alt")
                if not alt:
                    raise UserError(f"a figure without alt text; use `show`: {cell.source}")
                yield base64.b64decode(picture), alt


def _write_notebook(path: Path, folder: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _links(cell.source, PurePosixPath("notebooks"), folder)
    target = folder / "notebooks" / path.name
    target.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, target)


def _write(folder: Path, name: str, text: str) -> None:
    text = CONSOLE.sub(_one_command, text)
    (folder / name).write_text(_links(text, PurePosixPath("."), folder))


def _one_command(block: re.Match) -> str:
    """A command of several lines goes without its prompt: else a reader would copy its first."""
    command = block.group(1)
    several = "\n$ " not in command and "'{\n" in command
    return f"```bash\n{command}```" if several else block.group(0)


def _links(text: str, room: PurePosixPath, folder: Path) -> str:
    """Bring along what a text links to: pictures as they are, source files as pages.

    Args:
        text: Markdown.
        room: the folder of the text, relative to the repository.
        folder: where the site's pages are gathered.
    """

    def link(match: re.Match) -> str:
        target, anchor = match.groups()
        path = (ROOT / room / target).resolve()
        page_of_its_own = path.suffix == ".ipynb" or (path.suffix == ".md" and path.parent == ROOT)
        if page_of_its_own or not path.exists():
            return match.group(0)
        staged = folder / path.relative_to(ROOT)
        staged.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            if not staged.exists():
                staged.touch()  # before its own links are followed, which may lead back
                inside = PurePosixPath(path.parent.relative_to(ROOT))
                staged.write_text(
                    f"---\norphan: true\n---\n\n{_links(path.read_text(), inside, folder)}"
                )
            return match.group(0)
        if path.is_dir():
            staged.mkdir(exist_ok=True)
            names = sorted(file.name for file in path.iterdir() if file.is_file())
            _write_source(path, staged.with_name(path.name + ".md"), _list(path, names, folder))
            return f"]({target.rstrip('/')}.md{anchor})"
        if path.suffix in PICTURES:
            shutil.copy2(path, staged)
            return match.group(0)
        _write_source(path, staged.with_name(path.name + ".md"), _code(path))
        return f"]({target}.md{anchor})"

    return LINK.sub(link, text)


def _list(path: Path, names: list[str], folder: Path) -> str:
    """A folder's files as links, in Markdown that stands beside the folder."""
    text = "\n".join(f"- [`{name}`]({path.name}/{name})" for name in names)
    return _links(text, PurePosixPath(path.parent.relative_to(ROOT)), folder)


def _code(path: Path) -> str:
    language = LANGUAGES.get(path.suffix, "docker" if path.name == "Dockerfile" else "text")
    return f"``````{language}\n{path.read_text().rstrip()}\n``````"


def _write_source(path: Path, page: Path, text: str) -> None:
    """The page of a file or folder of the repository. No menu lists it."""
    page.write_text(
        f"---\norphan: true\n---\n\n# `{path.relative_to(ROOT).as_posix()}`\n\n{text}\n"
    )


def main() -> None:
    """Write docs/figures, and their alt texts in the README's table, as the notebooks have them."""
    FIGURES.mkdir(exist_ok=True)
    readme = ROOT / "README.md"

    def row(match: re.Match) -> str:
        picture, alt = first_figure(ROOT / match["link"])
        alt = escape(alt, quote=False).replace('"', "&quot;")
        (FIGURES / f"{match['number']}.png").write_bytes(picture)
        return match[0].replace(f'alt="{match["alt"]}"', f'alt="{alt}"')

    readme.write_text(ROW.sub(row, readme.read_text()))


if __name__ == "__main__":
    main()
