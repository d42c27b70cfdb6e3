"""Write the tables, figures and numbers of README.md and docs/*.md from docs/results/*.json.

python scripts/render_results.py           rewrite every page, docs/speed.svg and docs/scale.svg
python scripts/render_results.py --check   exit with 1 and name each table that differs from its data

In a page, a table with its caption is what is between two markers, each on a line of its own:

    <!-- results:speed -->
    <!-- /results -->

and a number inside a sentence is between `<!-- result:speed/ml1m/rectools/times_faster_training -->` and
`<!-- /result -->`: the table's name, words that pick its first row with these values, then the field. `mean`, `std` or
`n` may follow a field that has them. TABLES has the names of the tables, result_fields.py those of the fields. A block
such as `results:first_run_output` is what a command printed; tables of keys come from the comments in conf/.

Each file of docs/results/ has `measured` (date), `commit`, `dirty`, `machine`, `threads`, `versions`, `command` and
`note`; null is unknown and omitted from captions. A row with a stamp of its own overrides the file's. Figures that
were measured before these files existed have the commit that recorded them.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from benchmark.figure import data_of, draw_scale, draw_speed
from benchmark.results import decimal, mean_and_std
from conf_tables import CONF_TABLES
from result_fields import FIELDS, Row, cell, code

ROOT = Path(__file__).resolve().parent.parent
TABLE = re.compile(r"(<!-- results:(\S+) -->\n)(.*?)(<!-- /results -->)", re.S)
NUMBER = re.compile(r"(<!-- result:(.+?) -->)(.*?)(<!-- /result -->)", re.S)
METRICS = ("ndcg", "recall", "val_ndcg")
SHOWN_VERSIONS = ("torch", "rectools", "replay-rec")


FIGURES = {"speed": draw_speed, "scale": draw_scale}
TABLES: dict[str, tuple[str, str, list[str]]] = {  # by name: file, field that a row must have, columns
    "first_run": ("first_run", "mrr", ["model", "ndcg", "recall", "mrr"]),
    "rounding": ("rounding", "ndcg", ["machine_of_run", "ndcg", "recall"]),
    "quality": (
        "quality",
        "ndcg",
        ["configuration", "run", "ndcg", "recall", "epochs", "best_epoch", "minutes", "n"],
    ),
    "baselines": ("baselines", "ndcg", ["data", "configuration", "run", "ndcg", "recall"]),
    "quality_repeats": ("quality_repeats", "ndcg", ["configuration", "ndcg", "recall", "n"]),
    "paper_table4": ("paper_table4", "ndcg", ["data", "row", "ndcg", "change", "published", "published_change"]),
    "paper_table3": (
        "paper_table4",
        "recall",
        ["data", "ndcg", "published_table3", "recall", "published_recall"],
    ),
    "speed": (
        "speed",
        "positions_per_s",
        ["about", "by", "positions_per_s", "users_per_s", "lists_per_s", "peak_rss_mb"],
    ),
    "speed_models": (
        "speed_models",
        "positions_per_s",
        ["about", "by", "positions_per_s", "users_per_s", "lists_per_s", "peak_rss_mb"],
    ),
    "loading": ("speed", "seconds", ["by", "seconds", "cached_seconds", "tensor_seconds", "peak_rss_mb"]),
    "scale": (
        "scale",
        "cpu_seconds",
        ["interactions", "stage", "seconds", "cpu_seconds", "cpu_us_per_row", "peak_rss_mb"],
    ),
    "speed_repeats": ("speed_repeats", "positions_per_s", ["job", "by", "positions_per_s"]),
    "roofline": (
        "roofline",
        "fraction_of_roofline",
        ["job", "kernels", "positions_per_s", "fraction_of_roofline", "users_per_s", "peak_rss_mb"],
    ),
    "compilers": ("compilers", "kernels", ["kernels", "job", "positions_per_s", "relative_to_gcc"]),
    "bf16": ("bf16", "relative_to_float32", ["machine_of_run", "relative_to_float32"]),
    "parity": ("parity", "difference", ["by", "difference", "largest", "of", "at_most"]),
    "parity_training": ("parity_training", "ndcg", ["by", "ndcg", "recall"]),
    "parity_hstu_ml_latest_small": ("parity_hstu_ml_latest_small", "ndcg", ["by", "ndcg", "recall"]),
    "parity_hstu_yelp_2020": ("parity_hstu_yelp_2020", "ndcg", ["by", "ndcg", "recall"]),
    "times": ("times", "ndcg", ["data", "model", "overrides", "ndcg", "recall", "gain", "p_users"]),
    "features": (
        "features",
        "ndcg",
        ["holdout", "model", "overrides", "ndcg", "recall", "cold_targets", "cold_recall", "gain", "p_users"],
    ),
    "reference": ("reference", "ndcg", ["implementation", "ndcg", "recall"]),
    "support": ("support", "outcome", ["environment", "outcome", "versions_of_run"]),
    "reliability": ("reliability", "fault", ["fault", "tried", "survived", "command"]),
    "techniques": ("techniques", "technique", ["technique", "effect", "file"]),
    "papers": ("papers", "ndcg", ["data", "run", "ndcg", "published", "recall", "published_recall", "minutes"]),
    "records": ("records", "val_ndcg", ["data", "run", "val_ndcg", "best_epoch"]),
    "speedrun": ("speedrun", "bound", ["run", "seconds", "ndcg", "bound", "goal"]),
    "sampled_softmax": ("sampled_softmax", "ndcg", ["data", "loss", "ndcg", "recall", "minutes", "n"]),
}
NAMES_OF_DATA = {
    "sasrec_ml_1m": "MovieLens-1M",
    "ml_1m": "MovieLens-1M, all 3,706 items",
    "bert4rec_beauty": "Beauty, all items",
    "s3rec_beauty": "Beauty, 5-core",
    "s3rec_sports": "Sports, 5-core",
    "s3rec_toys": "Toys, 5-core",
    "yelp": "Yelp",
    "yelp_2020": "Yelp of 2019",
    "ml_100k": "MovieLens-100K",
    "ml_latest_small": "MovieLens latest-small",
}


class PageError(Exception):
    """A marker in a page that does not name a table, row or field."""


def main() -> None:
    """Rewrite the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a page differs")
    args = parser.parse_args()
    try:
        stale = render(ROOT, write=not args.check)
    except PageError as error:
        sys.exit(f"error: {error}")
    if args.check and stale:
        sys.exit("\n".join([*stale, "error: pages differ from docs/results; run python scripts/render_results.py"]))


def render(root: Path, write: bool) -> list[str]:
    """Return what differs from its data, as `page: name`, and rewrite it if asked."""
    stale = []
    for page in [root / "README.md", *sorted((root / "docs").glob("*.md"))]:
        old = page.read_text()
        try:
            new, differing = render_page(old, root / "docs/results")
        except PageError as error:
            raise PageError(f"{page.relative_to(root)}: {error}") from None
        stale += [f"{page.relative_to(root)}: {name} differs from its data" for name in differing]
        if write and new != old:
            page.write_text(new)
    for name, draw in FIGURES.items():
        figure, data = root / f"docs/{name}.svg", root / f"docs/results/{name}.json"
        if data.exists():
            rows = json.loads(data.read_text())["rows"]
            if not figure.exists() or data_of(rows) not in figure.read_text():
                stale.append(f"docs/{name}.svg differs from its data")
                if write:
                    draw(rows, figure)
    return stale


def render_page(text: str, results: Path) -> tuple[str, list[str]]:
    """Return the page with its tables and numbers from the data, and the names of those that were different."""
    stale = []

    def replace(match: re.Match, content: str) -> str:
        if content != match[3]:
            stale.append(match[2])
        return match[1] + content + match[4]

    text = TABLE.sub(lambda match: replace(match, block(match[2], results)), text)
    return NUMBER.sub(lambda match: replace(match, number(match[2], results)), text), stale


def block(name: str, results: Path) -> str:
    """Return a table with its caption, a table of what is in conf/, or what a command printed."""
    if name.endswith("_output"):
        rows = read_rows(name.removesuffix("_output"), results)[1]
        return "\n".join(["```", *(row["output"] for row in rows if "output" in row), "```", ""])
    if name in CONF_TABLES:
        table, source = CONF_TABLES[name]
        return "\n".join(["", *table(results.parent.parent / "conf" / source), "", ""])
    if name == "overview":
        return overview(results)
    if name not in TABLES:
        raise PageError(f"results:{name} is not a table; use one of {', '.join([*TABLES, *CONF_TABLES, 'overview'])}")
    file, needed, fields = TABLES[name]
    stamp, rows = read_rows(file, results)
    rows = [row for row in rows if row.get(needed) is not None]
    own = [own_stamp(row) for row in rows]
    dated = [bool(row.get("measured")) for row in rows]
    remarks = ["measured" if all(dated) else "remarks"] if any(own) else []
    headings = [FIELDS[field][0] for field in fields] + remarks
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    group = None
    for row, note in zip(rows, own, strict=True):
        first, *cells = [cell(row, field) for field in fields] + ([note] if any(own) else [])
        lines.append("| " + " | ".join(["" if first == group else first, *cells]) + " |")
        group = first
    has_seeds = any(isinstance(value, dict) and "n" in value for row in rows for value in row.values())
    when = "" if all(dated) else "Rows without a date: measured" if any(dated) else "Measured"
    return "\n".join(["", *lines, "", caption(stamp, when, seeds=has_seeds), "", ""])


def overview(results: Path) -> str:
    """Return the README's table: each preset and model next to the published value, and the popularity baseline."""
    stamp, quality = read_rows("quality", results)
    paper = [row for row in read_rows("paper_table4", results)[1] if row["row"] == "default"]
    stamp["note"] = "rows with a number of seeds: see the page Paper"
    ours = {row["configuration"]: row for row in quality}
    published = next(row["ndcg"] for name, row in ours.items() if "same file" in name)
    everything = "all unseen items"
    rows = [("`dataset=sasrec_ml_1m`", "MovieLens-1M", everything, ours["default"], published)]
    papers = read_rows("papers", results)[1]
    plain = [row["run"].replace(" trainer.precision=bf16-mixed", "") for row in papers]
    for row, run in zip(papers, plain, strict=True):
        if any(run.startswith(f"{other} ") for other in plain):
            continue  # another row with a key changed
        words = row["run"].removeprefix("python -m sasrec_lab.train ")
        rows.append((code(words), row["data"], everything, row, row.get("published")))
    rows.append(("popularity", "MovieLens-1M", everything, ours["popularity"], None))
    for row, name in zip(paper, ("ml_1m", "beauty"), strict=True):
        rows.append((f"`experiment=sasrec_paper/{name}`", row["data"], "101 items", row, row["published_table3"]))
    headings = ["configuration", "data", "candidates", "NDCG@10", "recall@10", "published NDCG@10"]
    lines = ["| " + " | ".join(headings) + " |", "|" + "---|" * len(headings)]
    for name, data, candidates, row, value in rows:
        cells = [decimal(row["ndcg"]), decimal(row["recall"]), "" if value is None else decimal(value)]
        lines.append(f"| {name} | {data} | {candidates} | {' | '.join(cells)} |")
    return "\n".join(["", *lines, "", caption(stamp, "Measured", seeds=True), "", ""])


def number(path: str, results: Path) -> str:
    """Return one formatted number, such as `speed/ml1m/rectools/times_faster_training` or `.../ndcg/mean`."""
    name, *words = path.split("/")
    part = words.pop() if len(words) > 1 and words[-1] in ("mean", "std", "n") and words[-2] in FIELDS else ""
    if name not in TABLES or not words or words[-1] not in FIELDS:
        raise PageError(f"result:{path} must be TABLE/WORD/.../FIELD, as in scripts/render_results.py")
    *words, field = words
    for row in read_rows(TABLES[name][0], results)[1]:
        if row.get(field) is not None and all(word in row.values() for word in words):
            value = row[field][part] if part else row[field]
            return str(value) if part == "n" else FIELDS[field][1](value)
    raise PageError(f"result:{path} has no row in docs/results/{TABLES[name][0]}.json")


def read_rows(file: str, results: Path) -> tuple[Row, list[Row]]:
    """Return a file's stamp and its rows, those of ablations with their change against the row `default`.

    A row that keeps its runs one by one gets their mean and deviation, and the stamp of the newest.
    """
    stamp = json.loads((results / f"{file}.json").read_text())
    rows = stamp.pop("rows")
    for row in rows:
        if "runs" in row:
            row |= summary(row["runs"])
        if "data" in row:
            row["data"] = NAMES_OF_DATA.get(row["data"], row["data"])
    default = {row["data"]: row for row in rows if row.get("row") == "default"}
    for row in rows:
        if row.get("row") not in (None, "default"):
            reference = default[row["data"]]
            row["change"] = row["ndcg"]["mean"] / reference["ndcg"]["mean"] - 1
            row["published_change"] = row["published"] / reference["published"] - 1
    return stamp, rows


def summary(runs: list[Row]) -> Row:
    """Return mean and deviation of a configuration's runs, their minutes, and when they were measured."""
    newest = max(runs, key=lambda run: run["measured"])
    return {
        **{metric: mean_and_std([run[metric] for run in runs]) for metric in METRICS if metric in runs[0]},
        "minutes": low_to_high([round(run["minutes"]) for run in runs]),
        "best_epoch": low_to_high([run["best_epoch"] for run in runs]),
        "measured": newest["measured"][:10],
        "commit": newest["commit"],
        "note": "seeds at several commits" if len({run["commit"] for run in runs}) > 1 else None,
    }


def low_to_high(numbers: list[int]) -> int | dict[str, int]:
    """Return the lowest and highest number, or the only one."""
    return numbers[0] if min(numbers) == max(numbers) else {"low": min(numbers), "high": max(numbers)}


def caption(stamp: Row, when: str, seeds: bool) -> str:
    """Return when and on what the rows were measured, behind the words `when`; nothing of it if they are ""."""
    legend = "Mean ± standard deviation (number of seeds)." if seeds else ""
    versions = [f"{name} {version}" for name, version in (stamp["versions"] or {}).items() if name in SHOWN_VERSIONS]
    command = f": `{stamp['command']}`" if stamp["command"] else ""
    what = ", ".join(filter(None, [where_and_when(stamp), *versions])) + command
    measured = f"{when} {what}." if what and when else ""
    text = " ".join(filter(None, [legend, measured, remark(stamp)]))
    return f"*{text}*" if text else ""


def own_stamp(row: Row) -> str:
    """Return what a row's stamp has that the file's has not."""
    return "; ".join(filter(None, [where_and_when(row), row.get("note")]))


def where_and_when(stamp: Row) -> str:
    """Return date, commit, processor and threads, as far as they are known."""
    commit = (
        f"at {stamp['commit'][:7]}{' with local changes' if stamp.get('dirty') else ''}" if stamp.get("commit") else ""
    )
    machine = stamp.get("machine")
    card = f"{machine['gpu']} (driver {machine['driver']}), " if machine and "gpu" in machine else ""
    place = f"on {card}{machine['cpu']}, {counted(machine['cores'], 'core')}" if machine else ""
    when = " ".join(filter(None, [stamp.get("measured"), commit, place]))
    return ", ".join(filter(None, [when, counted(stamp.get("threads"), "thread")]))


def counted(number: int | None, noun: str) -> str:
    """Return `2 cores`, `1 core`, or nothing for an unknown number."""
    return f"{number} {noun}{'' if number == 1 else 's'}" if number else ""


def remark(stamp: Row) -> str:
    """Return the note as a sentence of its own."""
    return f"{stamp['note'][0].upper()}{stamp['note'][1:]}." if stamp.get("note") else ""


if __name__ == "__main__":
    main()
