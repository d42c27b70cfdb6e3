"""Train the runs of a trial, one per seed, each in a folder as a run of its own has."""

import sys
from collections.abc import Callable
from math import fsum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig
from optuna.trial import Trial

from sasrec_lab.config.command_line import check_parts
from sasrec_lab.config.hydra_errors import run_hydra
from sasrec_lab.config.hydra_internals import VERSION_BASE
from sasrec_lab.config.overrides import format_override
from sasrec_lab.config.schema import CONF_DIR, TrainConfig
from sasrec_lab.config.search import Pruner, SearchPlan
from sasrec_lab.errors import InputError, Pruned
from sasrec_lab.run.folder import read_metrics
from sasrec_lab.run.sweep import prefix_lines, run_or_resume, typed_job
from sasrec_lab.search.study import Params, Study
from sasrec_lab.train import train

if TYPE_CHECKING:
    import pytorch_lightning as pl


def run_trial(study: Study, trial: Trial, params: Params) -> float:
    """Train a trial with each seed and return the mean of the monitored validation metric.

    Runs that had finished before the trial was cut off are not repeated.

    Raises:
        Pruned: the pruner has stopped the trial.
        InputError: a run is invalid, has failed, or was measured under another protocol than those of other trials.
    """
    plan, values = study.plan, list[float]()
    monitor = plan.example.evaluation.monitor
    for place, seed in enumerate(plan.seeds):
        folder = plan.run_folder(trial.number, params, seed)
        has_curve = place == 0 and plan.cfg.pruner in (Pruner.median, Pruner.hyperband)
        results = _run(plan, trial, plan.words(params, seed), folder, has_curve)
        study.check_protocol(results["protocol"])
        if monitor not in results["metrics"]:
            raise InputError(f"its run in {folder} has no {monitor}; let validation run in at least one epoch")
        values.append(results["metrics"][monitor])
        if plan.cfg.pruner is Pruner.wilcoxon:
            trial.report(values[-1], place)
            if place + 1 < len(plan.seeds) and trial.should_prune():
                raise Pruned(f"stopped after {place + 1} of {len(plan.seeds)} seeds, by pruner=wilcoxon")
    return fsum(values) / len(values)


def _run(plan: SearchPlan, trial: Trial, words: list[str], folder: Path, has_curve: bool) -> dict[str, Any]:
    """Return the metrics.json of a run, which Hydra composes and logs as it does a run of its own command."""
    ended = read_metrics(folder)
    if ended["status"] == "pruned":  # the process was killed before the study knew
        raise Pruned(ended["error"] or "stopped early")
    results: list[dict[str, Any]] = []
    errors: list[Exception] = []

    def task(cfg: DictConfig) -> None:
        try:
            typed = typed_job(cfg, folder)
            check_parts(typed, words, plan.config_dir)
            if plan.cfg.jobs > 1:
                prefix_lines(trial.number)
                typed.trainer["enable_progress_bar"] = False  # several would overwrite each other
            results.append(run_or_resume(typed, folder, _training(plan, trial, has_curve))[0])
        except Exception as error:  # Hydra would print a line about it
            errors.append(error)

    flags = ["--config-dir", plan.config_dir] if plan.config_dir else []
    before = sys.argv
    sys.argv = [before[0], *flags, *words, format_override("hydra.run.dir", str(folder))]
    try:
        run_hydra(hydra.main(config_path=CONF_DIR, config_name="train", **VERSION_BASE)(task), "train")
    finally:
        sys.argv = before
    if errors:
        raise errors[0]
    return results[0]


def _training(plan: SearchPlan, trial: Trial, has_curve: bool) -> Callable[[TrainConfig, Path], dict[str, Any]]:
    """Return the function that trains a run, which the pruner may stop if its curve is reported."""

    def train_with_pruning(cfg: TrainConfig, folder: Path) -> dict[str, Any]:
        callbacks: list[pl.Callback] = []
        if has_curve:
            from sasrec_lab.search.pruning import CurvePruning  # late, as it imports Lightning

            callbacks.append(CurvePruning(trial, cfg.evaluation.monitor, plan.cfg.pruner.name))
        return train(cfg, folder, callbacks)

    return train_with_pruning
