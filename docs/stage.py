"""From the repository's files to a folder that Sphinx reads: notebooks, README, LOG, sources.

Pages keep their paths, so a link that is right in the repository is right in the site. Nothing is
executed, and nothing is written twice: the front page is the README's first screen, its chapters
are the README's list. Sphinx itself: conf.py, build.py.

    python -m docs.stage      # takes docs/figures, and their alt texts in README.md, from notebooks
"""

import base64
import re
import shutil
import sys
from collections.abc import Iterator
from html import escape, unescape
from pathlib import Path, PurePosixPath

import nbformat

from deploy.common.paths import ROOT, UserError

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures"
CHAPTERS = re.compile(r"<!-- chapters -->\n(.*?)<!-- end of chapters -->\n", re.DOTALL)
ENTRY = re.compile(
    r"\*\*(?P<number>\d\d) \[(?P<title>[^]]+)\]\((?P<link>notebooks/[^)\s]+)\)\*\*: "
    r"(?P<what>.+(?:\n.+)*)\n\n"
    r'\[<img src="docs/figures/(?P=number)\.png" width="400" alt="(?P<alt>[^"]*)">\]\((?P=link)\)'
)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#]+)((?:#[^)]*)?)\)")
CONSOLE = re.compile(r"^```console\n\$ ([^$].*?)^```$", re.MULTILINE | re.DOTALL)
BACK = "Back to the [README](../README.md)", "Back to the [README](../index.md)"
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".properties": "properties"}


def stage(folder: Path) -> None:
    """Fill a folder anew with the pages of the site, as Markdown and notebooks.

    Raises:
        UserError: the README's list of chapters is not as `entries` wants it, a figure is missing
            or not the notebook's, or has no alt text, or a notebook has another kind of picture.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    readme = (ROOT / "README.md").read_text()
    first, rest = readme.split("\n## ", 1)
    solutions = sorted((ROOT / "notebooks").glob("0*_solutions.ipynb"))
    for path in chapters() + solutions:
        _write_notebook(path, folder)
    cards = _cards(entries(first, chapters()), folder)
    opening, _, closing = CHAPTERS.split(first)
    index = (DOCS / "index.md").read_text()
    for mark, text in {
        "opening": opening,
        "chapters": cards,
        "closing": closing,
        "pages: chapters": _names(chapters()),
        "pages: solutions": _names(solutions, "To chapter {number} <{}>"),
    }.items():
        index = index.replace(f"<!-- {mark} -->", text.strip())
    _write(folder, "index.md", index)
    _write(folder, "README.md", f"# Reference\n\n## {rest}")
    _write(folder, "LOG.md", (ROOT / "LOG.md").read_text())


def chapters() -> list[Path]:
    """The notebooks, without the solutions."""
    found = sorted((ROOT / "notebooks").glob("0*.ipynb"))
    return [path for path in found if "solutions" not in path.name]


def _names(notebooks: list[Path], title: str = "{}") -> str:
    return "\n".join(
        title.format(f"notebooks/{path.stem}", number=int(path.name[:2])) for path in notebooks
    )


def entries(readme: str, wanted: list[Path]) -> list[re.Match]:
    """The README's chapters: each a line that says what it is about, and below it a figure.

    Raises:
        UserError: there is no list, an entry is not written like the others or does not fit its
            notebook, or they are not the chapters in their order.
    """
    if len(blocks := CHAPTERS.findall(readme)) != 1:
        raise UserError(
            "README.md: should have one `<!-- chapters -->` ... `<!-- end of chapters -->`"
        )
    found = []
    for text in re.split(r"\n\n+(?!\[<img)", blocks[0].strip()):
        entry = ENTRY.fullmatch(text)
        if not entry:
            raise UserError(f"README.md: this chapter is not written like the others: {text}")
        found.append(entry)
    links = [Path(entry["link"]).name for entry in found]
    if lost := [path.name for path in wanted if path.name not in links]:
        raise UserError(f"README.md: {lost[0]} is not in the list of chapters")
    if links != [path.name for path in wanted]:
        raise UserError(f"README.md: the chapters are not those of notebooks/, in order: {links}")
    for entry, path in zip(found, wanted, strict=True):
        if _title(path) != f"{int(entry['number'])} {entry['title']}":
            raise UserError(
                f"README.md: {entry['number']} [{entry['title']}] links to {path.name}, "
                f"whose title is {_title(path)}"
            )
    return found


def _title(path: Path) -> str:
    return nbformat.read(path, as_version=4).cells[0].source.splitlines()[0].removeprefix("# ")


def _cards(found: list[re.Match], folder: Path) -> str:
    """The README's chapters, a card for each."""
    cards = []
    for entry in found:
        path, file = ROOT / entry["link"], FIGURES / f"{entry['number']}.png"
        picture, alt = first_figure(path)
        if not file.exists() or file.read_bytes() != picture or unescape(entry["alt"]) != alt:
            raise UserError(
                f"docs/figures/{file.name} or its alt text in README.md is missing, or is not what "
                f"{path.name} shows: run python -m docs.stage"
            )
        shutil.copy2(file, folder)
        alt = re.sub(r"([^\w\s])", r"\\\1", alt)
        text = f"![{alt}]({file.name})\n\n[{_title(path)}]({entry['link']})\n\n{entry['what']}"
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
        _refuse_other_pictures(cell, path)
        if cell.cell_type == "markdown":
            cell.source = _links(cell.source, PurePosixPath("notebooks"), folder)
            cell.source = cell.source.replace(*BACK)
    target = folder / "notebooks" / path.name
    target.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, target)


def _refuse_other_pictures(cell: nbformat.NotebookNode, path: Path) -> None:
    """A chapter's pictures are PNGs in outputs: those have the alt texts that conf.py wants."""
    kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
    other = sorted(kind for kind in kinds if kind.startswith("image/") and kind != "image/png")
    text = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.DOTALL)
    if cell.cell_type == "markdown" and (found := re.search(r"!\[.*|<(img|svg)\b.*", text)):
        other.append(found[0])
    if other:
        raise UserError(f"{path.name}: a picture that `show` did not store: {other[0]}")


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
    """The page of a file or folder of the repository. No menu lists it; search knows no JSON."""
    head = "orphan: true\n" + "nosearch: true\n" * (path.suffix == ".json")
    page.write_text(f"---\n{head}---\n\n# `{path.relative_to(ROOT).as_posix()}`\n\n{text}\n")


def main() -> None:
    """Write docs/figures, and their alt texts in the README, as the notebooks have them."""
    FIGURES.mkdir(exist_ok=True)
    readme = ROOT / "README.md"
    text = readme.read_text()
    found = entries(text, chapters())
    for entry in found:
        picture, alt = first_figure(ROOT / entry["link"])
        (FIGURES / f"{entry['number']}.png").write_bytes(picture)
        text = text.replace(entry[0], with_alt(entry, alt))
    readme.write_text(text)
    for path in FIGURES.glob("*.png"):
        if path.stem not in [entry["number"] for entry in found]:
            path.unlink()


def with_alt(entry: re.Match, alt: str) -> str:
    """A chapter's entry in the README with another alt text, which may hold any character."""
    first, last = (entry.start("alt") - entry.start(), entry.end("alt") - entry.start())
    return entry[0][:first] + escape(alt, quote=False).replace('"', "&quot;") + entry[0][last:]


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
