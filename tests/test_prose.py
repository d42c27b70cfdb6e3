"""The project's prose: words that a native reader would read twice appear nowhere in code, configs or docs.

Each pattern is followed by what to write instead. Names, keys and literals that users' files contain are exceptions.
"""

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INSTEAD = {
    r"\bgo(es|ing|ne)? on\b|\bwent on\b|\btak(e|es|en|ing) up again\b|\btaken up\b": "resume, continue",
    r"\banew\b": "again, start over",
    r"\btold\b|\bis said\b|\bsays of\b": "reported",
    r"\b(stands?|stood|standing)\b(?! for)": "is, is stored",
    r"\b(lies|lie|lay|lying)\b": "is, is stored",
    r"\bbeside\b": "next to, in addition to",
    r"\balone\b": "only",
    r"\botherwise\b(?!\W*(: ?1|=|`))": "the concrete alternative",
    r"\bso many\b|\bso-manieth\b": "N, this many",
    r"\bhas had\b|\bhave had\b|\bhad before\b|\bhaving had\b": "has seen",
    r"\bnumber of an item\b|\bitem numbers?\b": "index",
    r"\bexternal (\w+ )?ids?\b": "raw id",
    r"\btwins?\b": "reference implementation",
    r"\bmade-up\b|\bmade up\b": "generated",
    r"\bway back\b": "backward pass",
    r"\bon (its|their) sides?\b": "transposed",
    r"\bof another form\b": "malformed",
    # the exception is a text that metrics.json has recorded in every run: run/protocol.py
    r"\b(left|leave|leaves|leaving) (\w+ )?out\b(?!, a target among them is a miss)": "exclude, omit",
    r"\b(is|are) no (?!longer|more|need)[a-z]": "is not a",
    r"\bnobody\b|\bwhoever\b|\bwhose kernels\b": "name who",
    r"\bas it stands\b|\bwhere it stands\b": "unchanged",
    r"\bby itself\b": "automatically",
    r"\bin one go\b": "uninterrupted",
    r"colour|behaviour|neighbour|favour|\bgrey\b|\bcentre\b|\blabelled\b|\bcancelled\b": "American spelling",
    r"(normal|optim|initial|synchron|recogn|summar|general|penal|serial|minim)is(e|ing|ation)": "American spelling",
}
OPENING = re.compile(r"\s*(What|How|Who|Of|By|Whose|Where)\b")


def words_of_python(path: Path) -> list[tuple[int, str]]:
    """Return (line, text) of the comments and strings of a Python file."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)):
            found += [(token.start[0] + i, line) for i, line in enumerate(token.string.splitlines())]
    return found


def words_of_text(path: Path, marker: str = "") -> list[tuple[int, str]]:
    """Return (line, text) of the lines of a text file; with a marker such as `#` what follows it in each line."""
    lines = enumerate(path.read_text().splitlines(), 1)
    return [(number, line.partition(marker)[2] if marker else line) for number, line in lines]


def readers() -> dict[str, list[tuple[int, str]]]:
    """Return each file's prose by the file's name relative to the project."""
    found = {}
    for path in sorted([*ROOT.glob("sasrec_lab/**/*.py"), *ROOT.glob("scripts/**/*.py")]):
        found[str(path.relative_to(ROOT))] = words_of_python(path)
    for path in sorted(ROOT.glob("sasrec_lab/ops/cpp/*")):
        found[str(path.relative_to(ROOT))] = words_of_text(path, "//")
    for path in sorted(ROOT.glob("conf/**/*.yaml")):
        found[str(path.relative_to(ROOT))] = words_of_text(path, "" if path.parent == ROOT / "conf" else "#")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile"]):
        found[str(path.relative_to(ROOT))] = words_of_text(path)
    return found


PROSE = readers()


@pytest.mark.parametrize("file", PROSE)
def test_words_a_reader_would_read_twice_are_avoided(file):
    found = [
        f"{file}:{line}: {match[0]!r}, write: {instead}"
        for line, text in PROSE[file]
        for pattern, instead in INSTEAD.items()
        if (match := re.search(pattern, text, re.I))
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("file", [file for file in PROSE if file.endswith(".py")])
def test_module_docstrings_name_what_the_module_provides(file):
    text = (ROOT / file).read_text()
    assert not text or re.match(r'(#!.*\n)?"""', text), "no docstring"
    assert not OPENING.match(text.partition('"""')[2])
