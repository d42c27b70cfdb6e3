"""Grouping of runs: one comparison per protocol, one row per configuration, its seeds averaged."""

import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sasrec_lab.config.convert import flatten, is_bookkeeping
from sasrec_lab.errors import first_few
from sasrec_lab.report.records import Run
from sasrec_lab.run.protocol import LEAK

DEFAULT = "default"  # the label of the row that overrides nothing
_ROW_GROUPS = ("ablation", "dross")  # groups in conf/ whose files are the rows of a paper's table
_MODEL_GROUPS = ("model", "loss", "objective")  # a paper's row chooses these, so another choice is not its row
_CHOICES = ("experiment", *_ROW_GROUPS, "dataset", "sweep")  # overrides that choose a published result
# Besides keys that do not change what is computed, these do not distinguish rows; the keys that a sweep sets do.
_NOT_SETTINGS = ("seed", "row", "name", "sweep")
_PROTOCOL_SECTIONS = ("experiment", "dataset", "evaluation")  # jobs that differ in these share no table


@dataclass(frozen=True)
class Row:
    """Runs that differ only in the seed, one per seed."""

    label: str
    exact_label: str  # with all digits of its numbers
    settings: dict[str, str]  # the overrides in which rows differ
    runs: list[Run]
    published: dict[str, float]  # metric -> value

    @property
    def is_named(self) -> bool:
        """Return whether an ablation or an override names the row, so that it is not `default` for lack of both."""
        return self.label != DEFAULT or bool(self.runs[0].config.get("row"))

    def spread(self, metric: str) -> "Spread":
        """Return mean, standard deviation and number of a metric's values over the seeds."""
        return Spread.from_values([run.metrics[metric] for run in self.runs if metric in run.metrics])

    def mean(self, value: Callable[[Run], float | None]) -> float:
        """Return the mean of a value over the runs that have it."""
        return Spread.from_values([number for run in self.runs if (number := value(run)) is not None]).mean

    @property
    def epochs(self) -> float:
        """Return the mean number of epochs, NaN for a model without epochs."""
        return self.mean(lambda run: run.epochs or None)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n values."""

    mean: float  # NaN without a value
    std: float | None  # None with fewer than two values
    n: int

    @classmethod
    def from_values(cls, values: list[float]) -> "Spread":
        """Return the spread of some values."""
        n = len(values)
        mean = math.fsum(values) / n if n else math.nan
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else None
        return cls(mean, std, n)


@dataclass(frozen=True)
class Comparison:
    """All rows of one protocol, whose numbers may share a column."""

    protocol: dict[str, Any]
    rows: list[Row]
    shared: dict[str, str]  # overrides of every run
    sources: list[str]  # of the published values
    notes: list[str]

    def row(self, label: str | None) -> Row | None:
        """Return the row with this label, rounded or exact."""
        return next((row for row in self.rows if label in (row.label, row.exact_label)), None)

    def metrics(self) -> list[str]:
        """Return the metrics that some run has."""
        return list(dict.fromkeys(metric for row in self.rows for run in row.runs for metric in run.metrics))


def comparisons(runs: list[Run], baseline: str | None, jobs: list[dict[str, str]]) -> list[Comparison]:
    """Return one comparison per protocol; the baseline's row (without one: `default`) is its first.

    `jobs` are the overrides of all jobs of the sweeps. Rows that they will add count when rows are named, so that a
    row has its final label when it is the only one finished.
    """
    by_protocol = _group(runs, lambda run: json.dumps(run.protocol | {LEAK: None}, sort_keys=True))
    parts = [_comparison(members, baseline or DEFAULT, jobs) for members in by_protocol]
    unnamed = [(part, row) for part in parts for row in part.rows if row.label == DEFAULT]
    datasets = [part.protocol.get("dataset") for part, _ in unnamed]
    for part, row in unnamed:
        if datasets.count(part.protocol.get("dataset")) > 1:  # the headings of its table and another one are alike
            part.notes.append(f"{DEFAULT}: {first_few([str(run.folder) for run in row.runs], 2)}")
    return parts


def protocol_differences(parts: list[Comparison]) -> dict[str, list[Any]]:
    """Return key -> its value in each comparison, for the keys whose values differ."""
    flats = [flatten(part.protocol, separator=".") for part in parts]
    keys = dict.fromkeys(key for protocol in flats for key in protocol)
    values = {key: [protocol.get(key) for protocol in flats] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def changed_overrides(shared: dict[str, str]) -> dict[str, str]:
    """Return the overrides that change a published configuration, without those that choose it."""
    return {key: value for key, value in shared.items() if key not in _CHOICES}


def _comparison(runs: list[Run], first: str, jobs: list[dict[str, str]]) -> Comparison:
    """Return the comparison of the runs of one protocol; the row labeled `first` leads."""
    overrides = [{key: value for key, value in run.overrides.items() if _is_setting(key)} for run in runs]
    shared = _shared_overrides(overrides, jobs)
    settings = {
        run.folder: {key: value for key, value in each.items() if key not in shared}
        for run, each in zip(runs, overrides, strict=True)
    }
    notes: list[str] = []
    groups = _group(runs, lambda run: _label(run, settings[run.folder]) + _fingerprint(run))
    groups = [_newest_per_seed(group, notes) for group in groups]
    labels = _disambiguate([_label(group[0], settings[group[0].folder]) for group in groups], groups)
    rows = [
        Row(label, exact, settings[group[0].folder], group, _published(exact, group[0], changed_overrides(shared)))
        for label, exact, group in zip(_round_numbers(labels), labels, groups, strict=True)
    ]
    published = [run.config["published"] for run in runs if _is_published_for(run)]
    cells = [cell for each in published for cell in each.get("cells", {})]
    return Comparison(
        protocol={key: value for run in runs for key, value in run.protocol.items()},  # some lack LEAK
        rows=sorted(rows, key=lambda row: first not in (row.label, row.exact_label)),
        shared=shared,
        sources=list(dict.fromkeys(each["source"] for each in published if "source" in each)),
        notes=[*notes, *_notes_on(rows, _published_only(labels, cells))],
    )


def _shared_overrides(overrides: list[dict[str, str]], jobs: list[dict[str, str]]) -> dict[str, str]:
    """Return the overrides that all runs have, and all jobs that are expected to join their table."""
    protocols = {_protocol_overrides(each) for each in overrides}
    expected = [job for job in jobs if _protocol_overrides(job) in protocols]
    everything = (*overrides, *expected)
    return {key: value for key, value in overrides[0].items() if all(each.get(key) == value for each in everything)}


def _notes_on(rows: list[Row], published_only: list[str]) -> list[str]:
    """Return what a reader of the rows should know: equal configurations, code versions, published rows not run."""
    notes = []
    if same := [alike for alike in _group(rows, lambda row: _fingerprint(row.runs[0])) if len(alike) > 1]:
        pairs = [" and ".join(row.label for row in alike) for alike in same]
        notes.append(f"rows with the same configuration: {first_few(pairs, 3, '; ')}")
    if len(commits := dict.fromkeys(run.commit for row in rows for run in row.runs)) > 1:
        versions = ", ".join("unknown" if commit is None else commit[:7] for commit in commits)
        notes.append(f"runs come from {len(commits)} code versions: {versions}")
    for row in rows:
        if code := dict.fromkeys(name for run in row.runs for name in run.own_code):
            notes.append(f"{row.label} is with code that is not of this package: {', '.join(code)}")
    if published_only:
        notes.append(f"published rows not run here: {', '.join(published_only)}")
    return notes


def _label(run: Run, settings: dict[str, str]) -> str:
    """Return the name of the paper's row if nothing else differs, and the differing overrides if something does.

    Another model than that of a paper with published values is part of the name, except that `default` remains the
    baseline.
    """
    if (row := run.config.get("row")) and not settings.keys() - set(_ROW_GROUPS):
        is_of_paper = row != DEFAULT and run.config.get("published")
        others = _model_overrides(run).items() if is_of_paper else ()
        return " ".join([row, *(f"{key}={value}" for key, value in others)])
    return " ".join(f"{key}={value}" for key, value in settings.items()) or DEFAULT


def _model_overrides(run: Run) -> dict[str, str]:
    """Return the overrides that choose another model, loss or objective than that of the run's experiment."""
    return {key: value for key, value in run.overrides.items() if key in _MODEL_GROUPS}


def _protocol_overrides(overrides: dict[str, str]) -> frozenset[tuple[str, str]]:
    """Return the overrides that determine the protocol."""
    return frozenset((key, value) for key, value in overrides.items() if key.partition(".")[0] in _PROTOCOL_SECTIONS)


def _is_setting(key: str) -> bool:
    """Return whether runs that differ in this key are different rows."""
    return key not in _NOT_SETTINGS and not is_bookkeeping(key) and not key.startswith("hydra.")


def _fingerprint(run: Run) -> str:
    """Return text that is equal for equal configurations."""
    return json.dumps(_settings(run), sort_keys=True)


def _settings(run: Run) -> dict[str, Any]:
    """Return the configuration of a run without the keys that do not distinguish rows, and what features it had."""
    config = {key: value for key, value in flatten(run.config, separator=".").items() if _is_setting(key)}
    return config | ({"item_features": run.item_features[:7]} if run.item_features else {})


def _newest_per_seed(runs: list[Run], notes: list[str]) -> list[Run]:
    """Return the newest run of each seed, because a repeated seed says nothing about the spread."""
    newest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.start):
        if run.seed in newest:
            older = newest[run.seed].folder
            notes.append(f"{older} is ignored: {run.folder} is a newer run of the same configuration and seed")
        newest[run.seed] = run
    return [newest[seed] for seed in sorted(newest)]


def _disambiguate(labels: list[str], groups: list[list[Run]]) -> list[str]:
    """Append to a label that several rows have the keys of the config in which these rows differ."""
    configs = [_settings(group[0]) for group in groups]
    unique = []
    for label, config in zip(labels, configs, strict=True):
        alike = [other for name, other in zip(labels, configs, strict=True) if name == label]
        keys = [key for key in config if any(other.get(key) != config[key] for other in alike)]
        unique.append(label + (f" ({', '.join(f'{key}={config[key]}' for key in keys)})" if keys else ""))
    return unique


def _round_numbers(labels: list[str]) -> list[str]:
    """Round the numbers in labels to four significant digits, unless that makes two labels equal.

    A search proposes numbers of sixteen digits.
    """
    short = [re.sub(r"(?<![\w.])\d+\.\d+(e[-+]?\d+)?(?![\w.])", _round_to_four_digits, label) for label in labels]
    return [new if short.count(new) == 1 else old for new, old in zip(short, labels, strict=True)]


def _round_to_four_digits(number: re.Match[str]) -> str:
    """Return the number rounded; one of fewer digits stays as typed, such as 0.10."""
    short = f"{float(number[0]):.4g}"
    return number[0] if float(short) == float(number[0]) else short


def _is_published_for(run: Run) -> bool:
    """Return whether the published results in a run's config are of its data set."""
    published = run.config.get("published") or {}
    return published.get("dataset") == run.config["dataset"]["name"]


def _published(label: str, run: Run, shared: dict[str, str]) -> dict[str, float]:
    """Return the published results of a row.

    A run that is called `default` because all runs share its overrides is looked up by these: the only finished job of
    a sweep over maxlen is not the published default. A paper's row with another model than the paper's has none.
    """
    if not _is_published_for(run) or (run.config.get("row") and _model_overrides(run)):
        return {}
    if label == DEFAULT and not run.config.get("row") and shared:
        label = " ".join(f"{key}={value}" for key, value in shared.items())
    return run.config["published"].get("cells", {}).get(label, {})


def _published_only(labels: list[str], cells: list[str]) -> list[str]:
    """Return the published rows without a run that are of the kind of a row: ablations, or values of the same key."""

    def kind(label: str) -> str:
        return label.partition("=")[0] if "=" in label else "ablation"

    kinds = {kind(label) for label in labels if label in cells and label != DEFAULT}
    return [cell for cell in dict.fromkeys(cells) if kind(cell) in kinds and cell not in labels and cell != DEFAULT]


def _group(members: Iterable[Any], key: Callable[[Any], str]) -> list[list[Any]]:
    """Return the members grouped by a key, in the order in which the keys first appear."""
    groups: dict[str, list[Any]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return list(groups.values())
