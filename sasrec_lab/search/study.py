"""The trials of a search, in a study of Optuna that all processes of the search share.

The study is a journal in the search's folder. Each change of it is made while the process holds the folder's lock, and
a process holds the lock of the trial that it runs: a running trial without its lock was cut off, and is run again.
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, WilcoxonPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from sasrec_lab.config.convert import completed
from sasrec_lab.config.evaluation import is_lower_better
from sasrec_lab.config.search import FOLDER_KEY, Pruner, Sampler, SearchPlan
from sasrec_lab.config.search_space import Dimension
from sasrec_lab.errors import InputError
from sasrec_lab.files import make_folder
from sasrec_lab.run.folder import JOURNAL, SEARCH, write_json
from sasrec_lab.run.lock import is_locked, lock_folder, waiting_lock
from sasrec_lab.run.protocol import LEAK
from sasrec_lab.run.resume import describe_differences, differences

STATES = {
    TrialState.COMPLETE: "finished",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
}
_NAME = "search"  # of the only study in the journal
_WARMUP_EPOCHS = 5  # of pruner=median, and the number of trials before it prunes
_MIN_TRIALS_FOR_IMPORTANCE = 10  # of fewer it is mostly chance

Params = dict[str, str | float]  # key -> value


class Study:
    """The trials of a search that this process takes, and what all processes have found.

    Raises:
        InputError: the folder holds another search, or its journal is broken.
    """

    def __init__(self, plan: SearchPlan):
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        self.plan, self.folder = plan, plan.folder
        make_folder(self.folder)
        with self._locked():
            self._study = self._open()
            self._check_definition()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with waiting_lock(self.folder / ".lock"):
            yield

    def _open(self) -> optuna.Study:
        path = self.folder / JOURNAL
        _drop_torn_line(path)
        lock: Any = _JournalLock(path)  # it has the methods of Optuna's locks
        try:
            with warnings.catch_warnings(action="ignore"):
                self._storage = JournalStorage(JournalFileBackend(str(path), lock_obj=lock))
                return optuna.create_study(
                    storage=self._storage,
                    study_name=_NAME,
                    pruner=_pruner(self.plan),
                    direction="minimize" if is_lower_better(self.plan.example.evaluation.monitor) else "maximize",
                    load_if_exists=True,
                )
        except OSError:
            raise
        except Exception as error:  # those of replaying a file that no search wrote share no base class
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(
                f"{path} is not the journal of a search ({reason}); choose another {FOLDER_KEY}"
            ) from error

    def _check_definition(self) -> None:
        """Record what the search is, or raise InputError if the journal is of another one."""
        now = self.plan.definition()
        before = self._study.user_attrs.get("definition")
        if before is None:
            self._study.set_user_attr("definition", now)
            return
        before = {"fixed": now["fixed"]} | before  # older searches lack it
        others = differences(before | {"config": None}, now | {"config": None})
        if keys := others + differences(self.plan.without_searched(completed(before["config"])), now["config"]):
            raise InputError(
                f"{self.folder} holds another search ({describe_differences(keys)}); choose another {FOLDER_KEY}"
            )

    @contextmanager
    def taken_trial(self) -> Iterator[Trial | None]:
        """Yield a trial that only this process runs: one that was cut off, or a new one; None if there is none left."""
        with ExitStack() as held:
            with self._locked():
                trial = self._next()
                if trial is not None:
                    held.enter_context(lock_folder(self._lock_of(trial.number), FOLDER_KEY))
            yield trial

    def _next(self) -> Trial | None:
        every = self._study.get_trials(deepcopy=False)
        trials = [trial for trial in every if trial.state is not TrialState.WAITING]
        for trial in trials:
            if trial.state is TrialState.RUNNING and not is_locked(self._lock_of(trial.number)):
                self._study.sampler = _sampler(self.plan, trial.number)
                study = self._storage.get_study_id_from_name(_NAME)
                return Trial(self._study, self._storage.get_trial_id_from_study_id_trial_number(study, trial.number))
        if len(trials) >= self.plan.trials:
            return None
        self._study.sampler = _sampler(self.plan, len(trials))
        if self.plan.cfg.sampler is Sampler.grid and len(trials) == len(every):  # else one waits, as after a crash here
            self._study.enqueue_trial(next(islice(self.plan.combinations(), len(trials), None)))
        return self._study.ask()

    def _lock_of(self, number: int) -> Path:
        return self.folder / ".trials" / str(number)

    def params(self, trial: Trial) -> Params:
        """Return the values that a trial tries; those of a trial that was cut off are the same again."""
        with self._locked():
            return {dimension.key: _suggest(trial, dimension) for dimension in self.plan.space}

    def repeated(self, params: Params) -> FrozenTrial | None:
        """Return a trial that has ended and had the same values."""
        ended = (trial for trial in self._study.get_trials(deepcopy=False) if trial.state.is_finished())
        return next((trial for trial in ended if trial.params == params), None)

    def end(self, trial: Trial, state: TrialState, value: float | None = None, error: str | None = None) -> None:
        """Record how a trial has ended, with its value if it has finished."""
        with self._locked():
            if error:
                trial.set_user_attr("error", error)
            self._study.tell(trial.number, value, state)
            self._write_record()

    def check_protocol(self, protocol: dict[str, Any]) -> None:
        """Raise InputError if a run was measured under another protocol than those before it."""
        own = protocol | {LEAK: None}
        with self._locked():
            first = self._study.user_attrs.get("protocol")
            if first is None:
                self._study.set_user_attr("protocol", own)
            elif differing := differences(first, own):
                raise InputError(
                    f"its protocol is not that of the earlier trials ({describe_differences(differing)}), so that their"
                    f" {self.plan.example.evaluation.monitor} cannot be compared; search keys that leave it unchanged"
                )

    def trials(self) -> list[FrozenTrial]:
        """Return all trials by their numbers, as they are now."""
        return self._study.get_trials(deepcopy=False)

    def best(self) -> FrozenTrial | None:
        """Return the finished trial with the best value, which is one of validation; None if none has finished."""
        finished = [trial for trial in self.trials() if trial.state is TrialState.COMPLETE]
        choose = min if is_lower_better(self.plan.example.evaluation.monitor) else max
        return choose(finished, key=lambda trial: trial.value or 0.0) if finished else None

    def _write_record(self) -> None:
        """Write search.json, which reports read."""
        cfg = self.plan.cfg
        trials = [
            {
                "number": trial.number,
                "status": STATES[trial.state],
                "value": trial.value,
                "params": trial.params,
                "error": trial.user_attrs.get("error"),
            }
            for trial in self.trials()
        ]
        record = {
            "sampler": cfg.sampler.name,
            "pruner": cfg.pruner.name,
            "seeds": cfg.seeds,
            "monitor": self.plan.example.evaluation.monitor,
            "space": {dimension.key: dimension.text for dimension in self.plan.space},
            "trials": trials,
            "importance": self._importance(),
        }
        write_json(self.folder / SEARCH, record)

    def _importance(self) -> dict[str, float]:
        """Return by key its share in what makes the best tenth of the finished trials (PED-ANOVA), if they are many."""
        if sum(trial.state is TrialState.COMPLETE for trial in self.trials()) < _MIN_TRIALS_FOR_IMPORTANCE:
            return {}
        try:
            with warnings.catch_warnings(action="ignore"):
                return optuna.importance.get_param_importances(self._study)
        except (RuntimeError, ValueError):  # all values are equal
            return {}


class _JournalLock:
    """Locks the journal through the system: of a process that is killed no file remains that others would wait for."""

    def __init__(self, path: Path):
        self._file, self._held = path.with_name(f".{path.name}.lock"), ExitStack()

    def acquire(self) -> bool:
        """Wait for the lock, as Optuna asks."""
        self._held.enter_context(waiting_lock(self._file))
        return True

    def release(self) -> None:
        """Let other processes write."""
        self._held.close()


def _drop_torn_line(path: Path) -> None:
    """Cut off the end of a journal that a full disk or a power cut left without its end of line."""
    if not path.is_file():
        return
    with path.open("r+b") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            os.fsync(file.fileno())


def _sampler(plan: SearchPlan, number: int) -> BaseSampler:
    """Return the sampler of a trial, which depends on the search's seed and the trial's number only.

    So a search that was cut off proposes the same values again, and a resumed one does not repeat its first draws.
    """
    seed = (plan.example.seed * 1_000_003 + number) % 2**32
    return TPESampler(seed=seed) if plan.cfg.sampler is Sampler.tpe else RandomSampler(seed=seed)


def _pruner(plan: SearchPlan) -> BasePruner:
    epochs = plan.example.trainer.get("max_epochs")
    match plan.cfg.pruner:
        case Pruner.median:
            return MedianPruner(n_startup_trials=_WARMUP_EPOCHS, n_warmup_steps=_WARMUP_EPOCHS)
        case Pruner.hyperband:
            return HyperbandPruner(min_resource=1, max_resource=epochs if epochs and epochs > 0 else "auto")
        case Pruner.wilcoxon:
            return WilcoxonPruner(p_threshold=0.1)
    return NopPruner()


def _suggest(trial: Trial, dimension: Dimension) -> str | float:
    if dimension.values is not None:
        value: str = trial.suggest_categorical(dimension.key, dimension.values)
        return value
    low, high, step, is_log = dimension.low, dimension.high, dimension.step, dimension.is_log
    if dimension.kind == "int":
        return trial.suggest_int(dimension.key, int(low), int(high), step=int(step or 1), log=is_log)
    return trial.suggest_float(dimension.key, low, high, step=step, log=is_log)
