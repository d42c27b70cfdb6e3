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
    r"(?<!weight\.)\botherwise\b(?!\W*(: ?1|=|`))": "the concrete alternative",
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
    r"(?<!there\s)\b(is|are) no (?!longer|more|need)[a-z]": "is not a",
    r"\bnobody\b|\bwhoever\b|\bwhose kernels\b": "name who",
    r"\bas it stands\b|\bwhere it stands\b": "unchanged",
    r"\bby itself\b": "automatically",
    r"\bin one go\b": "uninterrupted",
    r"colour|behaviour|neighbour|favour|\bgrey\b|\bcentre\b|\blabelled\b|\bcancelled\b": "American spelling",
    r"(normal|optim|initial|synchron|recogn|summar|general|penal|serial|minim)is(e|ing|ation)": "American spelling",
}
OPENING = re.compile(r"\s*(What|How|Who|Of|By|Whose|Where)\b")


# A space of a pattern also matches where a sentence goes to the next line of a comment or a string.
SPACE = r"""(?:[ ]+|[ ]*["']?\n[ \t]*(?:[#/*]+|f?["'])?[ ]*)"""
PATTERNS = {re.compile(pattern.replace(" ", SPACE), re.I): instead for pattern, instead in INSTEAD.items()}


def prose_of_python(path: Path) -> str:
    """Return the text of a Python file with everything but comments and strings left blank."""
    lines = path.read_text().splitlines()
    prose = [""] * (len(lines) + 1)
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", None)):
            for number, text in enumerate(token.string.splitlines(), token.start[0] - 1):
                prose[number] += f" {text}"
    return "\n".join(prose)


def prose_of_text(path: Path, marker: str = "") -> str:
    """Return a text file; with a marker such as `#` only what follows it in each line."""
    lines = path.read_text().splitlines()
    return "\n".join(line.partition(marker)[2] if marker else line for line in lines)


def readers() -> dict[str, str]:
    """Return each file's prose by the file's name relative to the project."""
    found = {}
    own = Path(__file__)  # it names what it looks for
    for path in sorted(
        path for folder in ("sasrec_lab", "scripts", "tests") for path in ROOT.glob(f"{folder}/**/*.py")
    ):
        if path != own:
            found[str(path.relative_to(ROOT))] = prose_of_python(path)
    for path in sorted(ROOT.glob("sasrec_lab/ops/cpp/*")):
        found[str(path.relative_to(ROOT))] = prose_of_text(path, "//")
    for path in sorted(ROOT.glob("conf/**/*.yaml")):
        found[str(path.relative_to(ROOT))] = prose_of_text(path, "" if path.parent == ROOT / "conf" else "#")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "Makefile"]):
        found[str(path.relative_to(ROOT))] = prose_of_text(path)
    return found


PROSE = readers()


@pytest.mark.parametrize("file", PROSE)
def test_words_a_reader_would_read_twice_are_avoided(file):
    text = PROSE[file]
    found = [
        f"{file}:{text.count(chr(10), 0, match.start()) + 1}: {match[0]!r}, write: {instead}"
        for pattern, instead in PATTERNS.items()
        for match in pattern.finditer(text)
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("file", [file for file in PROSE if file.endswith(".py")])
def test_module_docstrings_name_what_the_module_provides(file):
    text = (ROOT / file).read_text()
    assert not text or re.match(r'(#!.*\n)?"""', text), "no docstring"
    assert not OPENING.match(text.partition('"""')[2])
