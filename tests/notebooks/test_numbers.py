"""Every number of the documents' prose that looks measured is declared in `numbers.py`.

A declaration is a piece of a sentence. Its numbers are put in from a result file, or it says that
nobody can do that: another's figure, read by hand, asked for. A new or changed number is in no
declared piece, and fails here.

Left out: tables made from result files (`tests/unit/test_repository.py` compares those), blocks of
code and what programs print (`tests/served/test_readme.py` runs it), outputs of chapters (nbval).
Not seen: a bare count, such as "640 kernels", and most comparisons in words.
"""

import ast
import re
from collections.abc import Iterable, Iterator
from html import unescape
from pathlib import Path

import pytest

from benchmarks.report.tables import TABLES
from deploy.common.paths import ROOT
from tests.notebooks import numbers
from tests.notebooks.test_policy import NOTEBOOKS, read

DOCUMENTS = {path.name: path for path in (ROOT / "README.md", ROOT / "LOG.md", *NOTEBOOKS)}
ONES = r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(?:\w+)teen"
TENS = "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|dozen|hundred|thousand|million"
WORD = rf"\b(?i:{ONES}|{TENS})\b"
MORE = rf"(?:\d(?:[\d,]*\d)?(?:\.\d+)?|{WORD})"
COUNT = rf"(?<![\w.,=])(?<!\w-){MORE}"
AND = r"\s*(?:-|–|/|,|\bto\b|\band\b|\bor\b|\bof\b)\s*"
TIME = "s|sec|second|min|minute|h|hour|day|token"
UNIT = (
    r"(?:[mµun]?s|m?secs?|min|h|(?:milli|micro)?seconds?|minutes?|hours?|days?"
    r"|[kKMGT]i?B|(?:kilo|mega|giga|tera)?bytes?|%|per\s?cent|x|×|times"
    rf"|\w+/(?:{TIME})|(?:\w+\s+)?(?:\w+s|[kMG]i?B)\s+(?:in\s+)?(?:per|an?|one|each|every)\s+(?:{TIME})"
    r")(?!\w)"
)
PART = "third|quarter|fifth|sixth|seventh|eighth|ninth|tenth|twentieth|thirtieth|hundredth"
CLAIMS = [
    rf"{COUNT}(?:{AND}{MORE})*[\s-]*{UNIT}",
    rf"{COUNT}(?:{AND}{MORE})*-?fold\b|\b(?:{ONES}|{TENS})-?fold\b",
    rf"factors?\s+(?:of\s+)?{COUNT}",
    r"\b(?:twice|thrice|half|halves|halved|(?:doubl|tripl)(?:e[sd]?|ing))\b",
    rf"\b(?:an?|{ONES})[\s-]+(?:{PART})s?\b",
    r"(?<![\w.,=/-])\d+\.\d+(?![\w.]*\.?\d)",
    rf"{COUNT}\s+(?:out\s+of|of|in|from)\s+{MORE}\b|\bfrom\s+{COUNT}\s+to\s+{MORE}\b",
    r"\borders?\s+of\s+magnitude\b",
    r"(?<![\w.])\d[\d.,]*\s*(?:k?Wh?|[MG]Hz|[GT]?FLOPS?|[GT]FLOP/s)\b",
    r"(?<=\|)\s*(?:about|some|over|under|[~≈<>±+])?\s*\d[^|\n]*(?=\|)",
]
"""Numbers and number words with a unit; ratios and parts; a bare 0.71; a number alone in a cell."""
VERSION = r"\b(?:Python|torch|transformers|TorchServe|CUDA|Docker|engine|Netty|From) \d+(?:\.\d+)+"


def prose(text: str) -> str:
    """Without tables that are made, blocks of code, marks and addresses. Lines are kept."""

    def table(match: re.Match) -> str:
        assert match[1] in TABLES, f"no table `{match[1]}` is made: nobody compares its numbers"
        return ""

    text = re.sub(r"<!-- table: (.*?) -->.*?<!-- end of table -->", table, text, flags=re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r'<img[^>]*alt="([^"]*)"[^>]*>', r"\1", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = unescape(re.sub(r"<!--.*?-->|</?[a-z][^<>\n]*>", "", text, flags=re.DOTALL))
    return re.sub(r"[*`\[\]]|(?<!\w)_|_(?!\w)", "", text)


def declared(document: str) -> Iterator[str]:
    """Pieces of sentences that a document has, with the numbers of the result files in them."""
    for piece, values in numbers.MEASURED.get(document, {}).items():
        yield piece.format(*values)
    for kind in numbers.HOLDS, numbers.ELSEWHERE, numbers.BY_HAND, numbers.MANNER:
        yield from kind.get(document, ())


def spans(piece: str, text: str) -> list[tuple[int, int]]:
    """Where a piece stands, however its lines are broken."""
    words = r"\s+".join(map(re.escape, piece.split()))
    return [match.span() for match in re.finditer(rf"(?<![\w.]){words}(?!\w|\.\d)", text)]


def untraced(document: str, text: str) -> list[str]:
    """What looks measured in a document, and is in no declared piece."""
    text = prose(text)
    known = [span for piece in declared(document) for span in spans(piece, text)]
    known += [match.span() for match in re.finditer(VERSION, text)]
    found = {match.span() for claim in CLAIMS for match in re.finditer(claim, text)}
    found = {span for span in found if not inside(span, known)}
    return [
        f"{document}: {text[max(0, start - 50) : end + 30]!r}"
        for start, end in sorted(found)
        if not inside((start, end), found - {(start, end)})
    ]


def inside(span: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    return any(first <= span[0] and span[1] <= last for first, last in others)


def written(path: Path) -> str:
    """A document's own words: of a notebook its prose, and the captions in its code."""
    if path.suffix == ".md":
        return path.read_text()
    texts = []
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            texts.append(cell.source)
        elif not cell.source.startswith("%%"):
            texts += captions(cell.source)
            texts += [
                o.metadata.get("image/png", {}).get("alt", "")
                for o in cell.outputs
                if "metadata" in o
            ]
    text = "\n\n".join(texts)
    assert "<!-- table:" not in text, f"{path.name}: tables are made in README.md and LOG.md only"
    return text


def captions(code: str) -> Iterator[str]:
    for call in ast.walk(ast.parse(code)):
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "show":
            texts = [*call.args[1:], *(word.value for word in call.keywords)]
            for part in [n for text in texts for n in ast.walk(text)]:
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_number_is_declared(document):
    found = untraced(document, written(DOCUMENTS[document]))
    assert not found, f"declare these in tests/notebooks/numbers.py, with their source: {found}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_declaration_is_used(document):
    """A number that is changed in the document, or in a result file, shows here as well."""
    text = prose(written(DOCUMENTS[document]))
    unused = [piece for piece in declared(document) if not spans(piece, text)]
    assert not unused, f"{document} does not say this (see tests/notebooks/numbers.py): {unused}"


def test_declarations_are_of_documents_that_exist_and_are_no_bare_numbers():
    kinds = numbers.MEASURED, numbers.HOLDS, numbers.ELSEWHERE, numbers.BY_HAND, numbers.MANNER
    for kind in kinds:
        assert kind.keys() <= DOCUMENTS.keys()
        for pieces in kind.values():
            short = [p for p in pieces if len(re.findall(r"[^\W\d_]{2,}", p)) < 2 and p[0] != "|"]
            assert not short


def test_chapters_print_what_they_measure_and_type_none_of_it():
    assert numbers.MEASURED.keys() == {"README.md", "LOG.md"}


def test_comparisons_in_words_hold():
    wrong = [p for pieces in numbers.HOLDS.values() for p, holds in pieces.items() if not holds]
    assert not wrong


def test_what_stands_elsewhere_is_there():
    for pieces in numbers.ELSEWHERE.values():
        for piece, (file, text) in pieces.items():
            assert text in (ROOT / file).read_text(), f"{piece}: {file} has no {text!r}"


CHAPTER = "04_serve_with_torchserve.ipynb"
CHANGES = [
    ("README.md", "takes 13 GB of memory", "takes 7 GB of memory"),
    ("README.md", "serving it then 7 GB", "serving it then 3 GB"),
    ("README.md", "5 GB of disk", "2 GB of disk"),
    ("README.md", "trade half the", "trade a tenth of the"),
    ("LOG.md", "0.71 of vLLM's", "0.51 of vLLM's"),
    ("LOG.md", "some 30 µs", "some 3 µs"),
    ("LOG.md", "six to eleven times", "six to forty times"),
    ("LOG.md", "writes 2.7 times as many", "writes 7.2 times as many"),
    ("LOG.md", "nine times there", "four times there"),
    ("LOG.md", "121 instead of 211", "121 instead of 311"),
    ("LOG.md", "40 % of a decode", "14 % of a decode"),
    (CHAPTER, "about two minutes", "about four minutes"),
    ("01_load_models.ipynb", "eight times as much", "twenty times as much"),
]


@pytest.mark.parametrize(("document", "true", "false"), CHANGES)
def test_a_changed_number_is_found(document, true, false):
    text = written(DOCUMENTS[document])
    assert true in text
    text = text.replace(true, false)
    unused = [piece for piece in declared(document) if not spans(piece, prose(text))]
    assert unused or untraced(document, text)


@pytest.mark.parametrize("document", ["README.md", "LOG.md", CHAPTER])
@pytest.mark.parametrize(
    "sentence",
    [
        "The server answers in 5 s.",
        "It is ready after `37 s`.",
        "It writes **4,711** tokens per second.",
        "It writes 4,711 tok/s.",
        "It answers 99 requests per second.",
        "It writes 3,141 completion tokens per second.",
        "HTTP takes 37.4 percent of the time.",
        "HTTP takes 37 per cent of it.",
        "The image has 1.7 gigabytes.",
        "It reads 4 TB of them.",
        "It takes 3 hours.",
        "It takes thirty-three seconds.",
        "A product takes 30 µs.",
        "The first token comes after 33-44 ms.",
        "It needs 3.9–4.9 GB.",
        "It is forty times as fast.",
        "It is twice as fast.",
        "It takes a tenth of the memory.",
        "It is 20-fold faster.",
        "It is a factor of 7.31 faster.",
        "It reaches 0.93 of it.",
        "Nine out of ten requests fail.",
        "It failed in 7 of 100 requests.",
        "Throughput rose from 48 to 336.",
        "It is an order of magnitude slower.",
        "It draws 700 W.",
        "| | seconds |\n|---|---|\n| vLLM | 51 |",
    ],
)
def test_a_new_number_is_found(document, sentence):
    text = f"{written(DOCUMENTS[document])}\n\n{sentence}\n"
    assert len(untraced(document, text)) == 1


def test_what_is_no_measurement_may_be_said():
    text = (
        "Chapter 5, TorchServe 0.12.0, port 7080, 400 tokens, Python 3.11, 2026-11-26, 127.0.0.1."
    )
    assert untraced("README.md", text) == []


def test_a_table_that_nobody_makes_is_found():
    with pytest.raises(AssertionError, match="no table `speeds` is made"):
        prose("<!-- table: speeds -->\n| vLLM | 51 s |\n<!-- end of table -->")


def test_captions_are_read():
    assert list(captions('show(figure(x), f"It takes {n} of 51 s.")')) == ["It takes ", " of 51 s."]
    assert "/ping says Healthy long before a worker is ready." in written(DOCUMENTS[CHAPTER])
