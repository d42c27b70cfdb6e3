"""Train a run on the workers of a Ray cluster, all of which restart from last.ckpt when one is lost."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Thread
from typing import Any

from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.errors import InputError, ProcessLost
from sasrec_lab.files import display_path
from sasrec_lab.run.folder import has_checkpoint, read_metrics
from sasrec_lab.run.provenance import is_first_process

PRINTED = ".printed"  # in the run folder, while the run lasts
_POLL_SECONDS = 0.3

Train = Callable[[TrainConfig, Path], object]

log = logging.getLogger(__name__)


def train_on_workers(cfg: TrainConfig, folder: Path, train: Train) -> dict[str, Any]:
    """Run `train` in each worker, which all see `folder`; return the content of metrics.json.

    Raises:
        InputError: Ray is missing, it lacks the workers, workers were lost more often than `cluster.restarts`, or the
            first worker has recorded that the run failed.
    """
    cluster = cfg.cluster
    assert cluster is not None
    if not (find_spec("ray") and find_spec("ray.train")):
        raise InputError("cluster=ray needs Ray; install it with pip install 'sasrec-lab[cluster]'")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    has_own = not ray.is_initialized()
    if has_own:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
    try:
        _check_resources(cfg, ray.cluster_resources())
        workers = TorchTrainer(
            _work,
            train_loop_config={"cfg": cfg, "folder": folder.absolute(), "train": train},
            scaling_config=ScalingConfig(
                num_workers=cluster.workers, use_gpu=_needs_gpu(cfg), resources_per_worker=_resources_per_worker(cfg)
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=str(folder.absolute()),
                failure_config=FailureConfig(max_failures=cluster.restarts),
            ),
        )
        with _printing_from(folder / PRINTED):
            workers.fit()
    except ray.train.TrainingFailedError as error:
        log.debug("Ray Train failed", exc_info=True)
        raise InputError(_describe_failure(error, folder, cluster.restarts)) from error
    finally:
        if has_own:
            ray.shutdown()
    results = read_metrics(folder)
    if results.get("status") != "finished":
        raise InputError(str(results.get("error") or "the workers have recorded no result; see Ray's logs"))
    return results


def _needs_gpu(cfg: TrainConfig) -> bool:
    return cfg.trainer.get("accelerator") in ("gpu", "cuda")


def _resources_per_worker(cfg: TrainConfig) -> dict[str, float]:
    assert cfg.cluster is not None
    cpus: dict[str, float] = {"CPU": cfg.cluster.cpus}
    return cpus | {"GPU": 1} if _needs_gpu(cfg) else cpus


def _check_resources(cfg: TrainConfig, there: dict[str, float]) -> None:
    """Raise InputError if the cluster will never have the workers, for which Ray would wait."""
    assert cfg.cluster is not None
    workers = cfg.cluster.workers
    for name, each in _resources_per_worker(cfg).items():
        if workers * each > there.get(name, 0):
            raise InputError(
                f"cluster.workers={workers} need {workers * each:g} {name}s, but the Ray cluster has"
                f" {there.get(name, 0):g}; lower it, add machines, or set RAY_ADDRESS to another cluster"
            )


def _work(settings: dict[str, Any]) -> None:
    """Train in a worker; after a restart, from last.ckpt.

    A user's mistake is recorded and not raised, because Ray would try again.
    """
    cfg, folder, train = settings["cfg"], settings["folder"], settings["train"]
    if cfg.ckpt is None and has_checkpoint(folder):  # the command has refused a folder with one
        cfg = replace(cfg, ckpt="last")
    _log_as_the_command(folder)
    try:
        train(cfg, folder)
    except ProcessLost:
        raise
    except InputError as error:
        log.debug(str(error))


def _log_as_the_command(folder: Path) -> None:
    """Let the first worker write to train.log, and what it would print to a file that the command prints."""
    if not is_first_process():
        logging.disable(logging.WARNING)
        return
    logger = logging.getLogger("sasrec_lab")
    to_file = logging.FileHandler(folder / "train.log")
    to_file.setFormatter(logging.Formatter("[%(asctime)s][%(levelname)s] %(message)s"))
    logger.setLevel(logging.INFO)
    logger.handlers, logger.propagate = [logging.FileHandler(folder / PRINTED), to_file], False


@contextmanager
def _printing_from(path: Path) -> Iterator[None]:
    """Print what the first worker adds to a file, without the lines of Ray's own processes."""
    path.write_text("")
    is_over = Event()

    def copy() -> None:
        with path.open() as file:
            while True:
                is_last = is_over.wait(_POLL_SECONDS)
                sys.stdout.write(file.read())
                sys.stdout.flush()
                if is_last:
                    return

    thread = Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        path.unlink(missing_ok=True)


def _describe_failure(error: Exception, folder: Path, restarts: int) -> str:
    """Return a line on a run that Ray has given up, with the failure of one of the workers."""
    failures = list(getattr(error, "worker_failures", {}).values())
    lines = str(failures[0] if failures else error).strip().splitlines() or [type(error).__name__]
    return (
        f"the workers of this run failed once more than cluster.restarts={restarts} allows ({lines[-1].strip()});"
        f" resume it with ckpt=last and hydra.run.dir={display_path(folder)}"
    )


def ray_strategy() -> tuple[Any, Any]:
    """Return the strategy and the environment with which Lightning's Trainer runs as a worker of Ray Train."""
    from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment

    return RayDDPStrategy(), RayLightningEnvironment()
