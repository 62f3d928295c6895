"""Gather the site's pages into one folder that Sphinx reads: documents, notebooks, sources.

A page keeps its path, so a link that works in the repository works in the site. The front page is
README.md, with its table of chapters shown as cards. Nothing is executed. Sphinx itself: conf.py,
build.py.
"""

import base64
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

import nbformat

from deploy.common.paths import ROOT, UserError

DOCS = Path(__file__).parent
CHAPTERS = re.compile(r"^\| +\| Chapter .*\n\|[-|]+\n(?:\|.+\n)+", re.MULTILINE)
CHAPTER = re.compile(
    r"^\| (?P<number>\d) \| \[(?P<title>.+?)\]\((?P<link>.+?)\) \| (?P<what>.+) \|$"
)
THEMED = re.compile(
    r'<picture><source media="\(prefers-color-scheme: dark\)" srcset="(?P<dark>[^"]+)">'
    r'<img src="(?P<light>[^"]+)" (?P<rest>[^>]+)></picture>'
)
LINK = re.compile(r"\]\((?![a-z]+:)([^)#]+)((?:#[^)]*)?)\)|(?<=<img )src=\"([^\"]+)\"")
CONSOLE = re.compile(r"^```console\n\$ ([^$].*?)^```$", re.MULTILINE | re.DOTALL)
PICTURES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json", ".properties": "properties"}


def chapters() -> list[Path]:
    """List the chapters' notebooks, without the solutions."""
    return [path for path in notebooks() if "solutions" not in path.name]


def notebooks() -> list[Path]:
    """List every notebook of the course."""
    return sorted((ROOT / "notebooks").glob("0*.ipynb"))


def documents() -> list[Path]:
    """List the documents that are pages: those at the root and those in docs/pages/."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs" / "pages").glob("*.md")])


def stage(folder: Path) -> None:
    """Fill a new folder with the pages of the site, as Markdown and notebooks.

    Raises:
        UserError: README.md has no table of chapters, a chapter has no figure, a figure has no
            alt text, or a notebook has another kind of picture.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for path in notebooks():
        _write_notebook(path, folder)
    for path in documents():
        if path != ROOT / "README.md":
            _write(folder, PurePosixPath(path.relative_to(ROOT)), path.read_text())
    _write(folder, PurePosixPath("index.md"), _front_page(folder))


def _front_page(folder: Path) -> str:
    readme = (ROOT / "README.md").read_text()
    if not (table := CHAPTERS.search(readme)):
        raise UserError("README.md: should have a table with the columns number, Chapter, contents")
    text = readme.replace(table[0], _cards(chapter_rows(table[0]), folder))
    index = (DOCS / "index.md").read_text()
    solutions = [path for path in notebooks() if path not in chapters()]
    for mark, part in {
        "README": text,
        "chapters": _entries(chapters()),
        "solutions": _entries(solutions, "To chapter {number} <{}>"),
    }.items():
        index = index.replace(f"<!-- {mark} -->", part.strip())
    return index


def _entries(paths: list[Path], form: str = "{}") -> str:
    """List pages as Sphinx's table of contents takes them."""
    return "\n".join(
        form.format(f"notebooks/{path.stem}", number=int(path.name[:2])) for path in paths
    )


def chapter_rows(text: str) -> list[re.Match[str]]:
    """Find the rows of README.md's table of chapters: number, title, link, what."""
    return [row for line in text.splitlines() if (row := CHAPTER.match(line))]


def _cards(rows: Iterable[re.Match[str]], folder: Path) -> str:
    """Show each chapter as a card with its first figure, which the chapter's notebook stores."""
    cards = []
    for row in rows:
        picture, alt = first_figure(ROOT / row["link"])
        file = folder / f"chapter-{row['number']}.png"
        file.write_bytes(picture)
        alt = re.sub(r"([^\w\s])", r"\\\1", alt)
        title = f"[{row['number']} {row['title']}]({row['link']})"
        text = f"![{alt}]({file.name})\n\n{title}\n\n{row['what']}"
        cards.append(f"::::{{container}} chapter\n{text}\n::::")
    return ":::::{container} chapters\n" + "\n".join(cards) + "\n:::::\n"


def first_figure(path: Path) -> tuple[bytes, str]:
    """Return PNG and alt text of a notebook's first figure.

    Raises:
        UserError: the notebook has no figure.
    """
    for figure in figures(nbformat.read(path, as_version=4)):
        return figure
    raise UserError(f"{path.name}: has no figure in its outputs for the front page")


def figures(notebook: nbformat.NotebookNode) -> Iterator[tuple[bytes, str]]:
    """Yield PNG and alt text of every picture, as `helpers.show` stores them in the outputs.

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
        _reject_other_pictures(cell, path)
        if cell.cell_type == "markdown":
            cell.source = _links(cell.source, PurePosixPath("notebooks"), folder)
    target = folder / "notebooks" / path.name
    target.parent.mkdir(exist_ok=True)
    nbformat.write(notebook, target)


def _reject_other_pictures(cell: nbformat.NotebookNode, path: Path) -> None:
    """Accept PNGs in outputs only: they have the alt texts that conf.py needs."""
    kinds = {kind for output in cell.get("outputs", []) for kind in output.get("data", {})}
    other = sorted(kind for kind in kinds if kind.startswith("image/") and kind != "image/png")
    text = re.sub(r"```.*?```|`[^`]*`", "", cell.source, flags=re.DOTALL)
    if cell.cell_type == "markdown" and (found := re.search(r"!\[.*|<(img|svg)\b.*", text)):
        other.append(found[0])
    if other:
        raise UserError(f"{path.name}: a picture that `show` did not store: {other[0]}")


def _write(folder: Path, name: PurePosixPath, text: str) -> None:
    """Write one document as a page."""
    text = CONSOLE.sub(_without_prompt, text)
    # GitHub chooses between the pictures of a `<picture>`; here the theme's classes do.
    text = THEMED.sub(
        r'<img src="\g<light>" class="only-light" \g<rest>>'
        r'<img src="\g<dark>" class="only-dark" \g<rest>>',
        text,
    )
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(_links(text, name.parent, folder))


def _without_prompt(block: re.Match[str]) -> str:
    """Drop the prompt of one command with several lines, so that a reader copies all of them."""
    command = block.group(1)
    several = "\n$ " not in command and "'{\n" in command
    return f"```bash\n{command}```" if several else block.group(0)


def _links(text: str, room: PurePosixPath, folder: Path) -> str:
    """Stage what a text links to: pictures as they are, source files as pages.

    Args:
        text: Markdown.
        room: the folder of the text, relative to the repository.
        folder: where the site's pages are gathered.
    """

    def link(match: re.Match[str]) -> str:
        target, anchor, source = match.groups()
        path = (ROOT / room / (target or source)).resolve()
        if path == ROOT / "README.md":
            return f"]({target.removesuffix('README.md')}index.md{anchor})"
        if path in documents() or path.suffix == ".ipynb" or not path.exists():
            return match[0]
        staged = folder / path.relative_to(ROOT)
        staged.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in PICTURES:
            shutil.copy2(path, staged)
            return match[0]
        if path.suffix == ".md":
            if not staged.exists():
                staged.touch()  # before its own links are followed, which may lead back
                inside = PurePosixPath(path.parent.relative_to(ROOT))
                staged.write_text(
                    f"---\norphan: true\n---\n\n{_links(path.read_text(), inside, folder)}"
                )
            return match[0]
        if path.is_dir():
            staged.mkdir(exist_ok=True)
            names = sorted(file.name for file in path.iterdir() if file.is_file())
            _write_source(path, staged.with_name(path.name + ".md"), _list(path, names, folder))
            return f"]({target.rstrip('/')}.md{anchor})"
        _write_source(path, staged.with_name(path.name + ".md"), _code(path))
        return f"]({target}.md{anchor})"

    return LINK.sub(link, text)


def _list(path: Path, names: list[str], folder: Path) -> str:
    """List a folder's files as links, in Markdown that stands beside the folder."""
    text = "\n".join(f"- [`{name}`]({path.name}/{name})" for name in names)
    return _links(text, PurePosixPath(path.parent.relative_to(ROOT)), folder)


def _code(path: Path) -> str:
    language = LANGUAGES.get(path.suffix, "docker" if path.name == "Dockerfile" else "text")
    return f"``````{language}\n{path.read_text().rstrip()}\n``````"


def _write_source(path: Path, page: Path, text: str) -> None:
    """Write the page of a file or folder. No menu lists it, and search leaves JSON out."""
    head = "orphan: true\n" + "nosearch: true\n" * (path.suffix == ".json")
    page.write_text(f"---\n{head}---\n\n# `{path.relative_to(ROOT).as_posix()}`\n\n{text}\n")
