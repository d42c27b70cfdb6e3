"""Tables of docs/configuration.md and docs/data.md, from the comments in conf/; for render_results.py.

A key's meaning is the comment behind it, continued in comment lines that are indented further, or the comment lines
above it. The comment at the top of a file is its header: it has a data set's counts and a loss's meaning.
"""

import re
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

HEADER = re.compile(r"\A(?:#.*\n)*")
LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w/]+):(?: (?P<value>[^#]*?))? *(?:(?:^|(?<= ))# (?P<comment>.*))?$")
COUNTS = re.compile(
    r"^(.*?): ([\d,]+) users, ([\d,]+) items, ([\d,.]+(?: million)?) (?:interactions|ratings)[.;,]? ?(.*)$"
)


def key_table(file: Path) -> list[str]:
    """Return a table of a config file's keys: name, default and meaning."""
    section = "" if file.name == "train.yaml" else f"{file.parent.name}."
    rows, above, names, depth = [], "", [], 0
    for line in HEADER.sub("", file.read_text(), count=1).splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if text.startswith("# "):
            if rows and indent > depth:
                rows[-1][2] += " " + text[2:]
            else:
                above += " " + text[2:]
        elif match := LINE.match(line):
            if match["key"] in ("defaults", "hydra") and indent == 0:
                names = [None]
            elif indent == 0 or names[0]:
                names, depth = [*names[: indent // 2], match["key"]], indent
                comment = " ".join(filter(None, [above.strip(), match["comment"]]))
                rows.append([section + ".".join(names), match["value"] or "", comment])
            above = ""
        else:
            above = ""
    lines = [f"| `{key}` | {f'`{value}`' if value else ''} | {meaning} |" for key, value, meaning in map(escaped, rows)]
    return ["| key | default | meaning |", "|---|---|---|", *lines]


def escaped(cells: list[str]) -> list[str]:
    """Return the cells with what Markdown would take for the end of a cell or for HTML."""
    return [cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells]


def dataset_table(folder: Path) -> list[str]:
    """Return a table of the published data sets, from the headers of their config files."""
    lines = ["| `dataset=` | data | users | items | interactions | reference and notes |", "|---|---|---|---|---|---|"]
    for file in sorted(folder.glob("*.yaml")):
        counts = COUNTS.match(header(file))
        if counts:
            lines.append(f"| `{file.stem}` | {' | '.join(escaped(list(counts.groups())))} |")
        elif "\nsources:" in file.read_text():
            raise ValueError(f"{file.name}: its header must begin with `NAME: 1 users, 1 items, 1 interactions`")
    return lines


def choice_table(folder: Path) -> list[str]:
    """Return a table of a group's choices, from the headers of their config files."""
    files = sorted(folder.glob("*.yaml"))
    return [
        f"| `{folder.name}=` | meaning |",
        "|---|---|",
        *(f"| `{file.stem}` | {escaped([header(file)])[0]} |" for file in files),
    ]


def loss_table(folder: Path) -> list[str]:
    """Return a table of the losses, with the number of negatives and the sampler that each file sets or inherits."""
    lines = ["| `loss=` | negatives | sampler | meaning |", "|---|---|---|---|"]
    for file in sorted(folder.glob("*.yaml")):
        keys = inherited(file)
        lines.append(f"| `{file.stem}` | {keys['negatives']} | `{keys['sampler']}` | {escaped([header(file)])[0]} |")
    return lines


def inherited(file: Path) -> DictConfig:
    """Return the keys of a config file and of the files in its `defaults`."""
    own = OmegaConf.load(file)
    bases = [inherited(file.with_name(f"{name}.yaml")) for name in own.pop("defaults", []) if name != "_self_"]
    return OmegaConf.merge(*bases, own)


def header(file: Path) -> str:
    """Return the comment at the top of a file, in one line."""
    return " ".join(line[2:] for line in HEADER.match(file.read_text())[0].splitlines())


CONF_TABLES: dict[str, tuple[Callable[[Path], list[str]], str]] = {  # by name: the table, and what in conf/ it is of
    "train_keys": (key_table, "train.yaml"),
    "model_keys": (key_table, "model/sasrec.yaml"),
    "loss_keys": (key_table, "loss/softmax.yaml"),
    "objective_keys": (key_table, "objective/masked_items.yaml"),
    "ease_keys": (key_table, "model/ease.yaml"),
    "itemknn_keys": (key_table, "model/itemknn.yaml"),
    "trainer_keys": (key_table, "trainer/default.yaml"),
    "losses": (loss_table, "loss"),
    "models": (choice_table, "model"),
    "datasets": (dataset_table, "dataset"),
}
