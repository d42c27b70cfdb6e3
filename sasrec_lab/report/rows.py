"""Runs -> rows: runs of one protocol stand together, runs that differ in nothing but the seed are one row."""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sasrec_lab.config.convert import flatten, is_bookkeeping
from sasrec_lab.report.runs import Run, few

DEFAULT = "default"  # the label of the row in which nothing is changed
_CHOICES = ("experiment", "ablation", "dataset", "sweep")  # overrides that say which published result is meant
# beside what does not change what is computed; a search by name sets other keys, which tell its rows apart
_NO_SETTING = ("seed", "row", "name", "sweep")
_OF_PROTOCOL = ("experiment", "dataset", "evaluation")  # sections of keys; jobs that differ there share no table


@dataclass(frozen=True)
class Row:
    """Runs that differ in the seed alone, one for each seed."""

    label: str
    exact: str  # the label with all digits of its numbers
    settings: dict[str, str]  # the overrides in which rows differ
    runs: list[Run]
    published: dict[str, float]  # metric -> value

    @property
    def is_named(self) -> bool:
        """By an ablation or by what it overrides; not `default` for want of either."""
        return self.label != DEFAULT or bool(self.runs[0].config.get("row"))

    def spread(self, metric: str) -> "Spread":
        return Spread.of([run.metrics[metric] for run in self.runs if metric in run.metrics])

    def mean(self, value: Callable[[Run], float | None]) -> float:
        return Spread.of([number for run in self.runs if (number := value(run)) is not None]).mean


@dataclass(frozen=True)
class Spread:
    mean: float  # NaN without a value
    std: float | None  # of the sample; None with less than two values
    n: int

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        n = len(values)
        mean = math.fsum(values) / n if n else math.nan
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
        return cls(mean, std, n)


@dataclass(frozen=True)
class Comparison:
    """All rows of one protocol: what may stand in one column."""

    protocol: dict[str, Any]
    rows: list[Row]
    shared: dict[str, str]  # overrides of every run
    source: str | None  # of the published values
    notes: list[str]

    def row(self, label: str | None) -> Row | None:
        return next((row for row in self.rows if label in (row.label, row.exact)), None)

    def metrics(self) -> list[str]:
        return list(dict.fromkeys(metric for row in self.rows for run in row.runs for metric in run.metrics))


def comparisons(runs: list[Run], baseline: str | None, jobs: list[dict[str, str]]) -> list[Comparison]:
    """One for each protocol, never two in one; the baseline's row, or else `default`, comes first. The overrides of
    a sweep's jobs tell what rows will differ in, so that the first row that is there has its name already."""
    by_protocol = _grouped(runs, lambda run: json.dumps(run.protocol, sort_keys=True))
    return [_comparison(members, baseline or DEFAULT, jobs) for members in by_protocol]


def protocol_differences(parts: list[Comparison]) -> dict[str, list[Any]]:
    """Key -> its value in each comparison, of the keys whose values differ."""
    flats = [flatten(part.protocol, joint=".") for part in parts]
    keys = dict.fromkeys(key for protocol in flats for key in protocol)
    values = {key: [protocol.get(key) for protocol in flats] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _comparison(runs: list[Run], first: str, jobs: list[dict[str, str]]) -> Comparison:
    overrides = [{key: value for key, value in run.overrides.items() if _is_setting(key)} for run in runs]
    protocols = {_of_protocol(each) for each in overrides}
    to_come = [job for job in jobs if _of_protocol(job) in protocols]
    shared = {
        key: value
        for key, value in overrides[0].items()
        if all(each.get(key) == value for each in (*overrides, *to_come))
    }
    settings = {
        run.folder: {key: value for key, value in each.items() if key not in shared}
        for run, each in zip(runs, overrides, strict=True)
    }
    notes: list[str] = []
    groups = _grouped(runs, lambda run: _label(run, settings[run.folder]) + _fingerprint(run))
    groups = [_one_a_seed(group, notes) for group in groups]
    labels = _told_apart([_label(group[0], settings[group[0].folder]) for group in groups], groups)
    rows = [
        Row(label, exact, settings[group[0].folder], group, _published(exact, group[0], deviation(shared)))
        for label, exact, group in zip(_rounded(labels), labels, groups, strict=True)
    ]
    same = [alike for alike in _grouped(rows, lambda row: _fingerprint(row.runs[0])) if len(alike) > 1]
    if same:
        notes.append(f"the same configuration: {few([' and '.join(row.label for row in alike) for alike in same])}")
    if len(commits := dict.fromkeys(run.commit for group in groups for run in group)) > 1:
        versions = ", ".join("unknown" if commit is None else commit[:7] for commit in commits)
        notes.append(f"the runs are of {len(commits)} versions of the code: {versions}")
    published = [run.config["published"] for run in runs if _is_published_for(run)]
    if lacking := _not_run(labels, [cell for each in published for cell in each.get("cells", {})]):
        notes.append(f"published, and not run here: {', '.join(lacking)}")
    return Comparison(
        protocol=runs[0].protocol,
        rows=sorted(rows, key=lambda row: first not in (row.label, row.exact)),
        shared=shared,
        source=published[0].get("source") if published else None,
        notes=notes,
    )


def _label(run: Run, chosen: dict[str, str]) -> str:
    """The ablation's row, where nothing else differs; else the overrides that differ."""
    if (row := run.config.get("row")) and not chosen.keys() - {"ablation"}:
        return row
    return " ".join(f"{key}={value}" for key, value in chosen.items()) or DEFAULT


def _of_protocol(overrides: dict[str, str]) -> frozenset[tuple[str, str]]:
    return frozenset((key, value) for key, value in overrides.items() if key.partition(".")[0] in _OF_PROTOCOL)


def _is_setting(key: str) -> bool:
    return key not in _NO_SETTING and not is_bookkeeping(key) and not key.startswith("hydra.")


def _fingerprint(run: Run) -> str:
    return json.dumps(_settings(run), sort_keys=True)


def _settings(run: Run) -> dict[str, Any]:
    return {key: value for key, value in flatten(run.config, joint=".").items() if _is_setting(key)}


def _one_a_seed(runs: list[Run], notes: list[str]) -> list[Run]:
    """The newest run of each seed: the same seed twice says nothing about the spread."""
    newest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.start):
        if run.seed in newest:
            older = newest[run.seed].folder
            notes.append(f"{older} is left out: {run.folder} is newer and of the same configuration and seed")
        newest[run.seed] = run
    return [newest[seed] for seed in sorted(newest)]


def _told_apart(labels: list[str], groups: list[list[Run]]) -> list[str]:
    """Behind a label that several rows bear, the keys of the config in which these rows differ."""
    flats = [_settings(group[0]) for group in groups]
    told = []
    for label, config in zip(labels, flats, strict=True):
        alike = [other for name, other in zip(labels, flats, strict=True) if name == label]
        keys = [key for key in config if any(other.get(key) != config[key] for other in alike)]
        told.append(label + (f" ({', '.join(f'{key}={config[key]}' for key in keys)})" if keys else ""))
    return told


def _rounded(labels: list[str]) -> list[str]:
    """With four significant digits, as a search draws sixteen; where that makes two alike, as they are."""
    short = [re.sub(r"(?<![\w.])\d+\.\d+(e[-+]?\d+)?(?![\w.])", _four_digits, label) for label in labels]
    return [new if short.count(new) == 1 else old for new, old in zip(short, labels, strict=True)]


def _four_digits(number: re.Match[str]) -> str:
    short = f"{float(number[0]):.4g}"
    return number[0] if float(short) == float(number[0]) else short  # 0.10 stays as it was typed


def _is_published_for(run: Run) -> bool:
    published = run.config.get("published")
    return bool(published) and published.get("dataset") == run.config["dataset"]["name"]


def _published(label: str, run: Run, shared: dict[str, str]) -> dict[str, float]:
    """The cell with the row's name. A run that is `default` only because all share its overrides has theirs, if any:
    the one finished job of a sweep over maxlen is not the published default."""
    if not _is_published_for(run):
        return {}
    if label == DEFAULT and not run.config.get("row") and shared:
        label = " ".join(f"{key}={value}" for key, value in shared.items())
    return run.config["published"].get("cells", {}).get(label, {})


def _not_run(labels: list[str], cells: list[str]) -> list[str]:
    """Of the published cells those that belong beside the rows: ablations beside ablations, dims beside dims."""

    def kind(label: str) -> str:
        return label.partition("=")[0] if "=" in label else "ablation"

    kinds = {kind(label) for label in labels if label in cells and label != DEFAULT}
    return [cell for cell in dict.fromkeys(cells) if kind(cell) in kinds and cell not in labels and cell != DEFAULT]


def deviation(shared: dict[str, str]) -> dict[str, str]:
    """Of the overrides that all rows share those that change what was published, instead of choosing it."""
    return {key: value for key, value in shared.items() if key not in _CHOICES}


def _grouped(members: Iterable[Any], key: Callable[[Any], str]) -> list[list[Any]]:
    groups: dict[str, list[Any]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return list(groups.values())
