"""Compose configs with Hydra and turn them into typed objects, with errors in one line.

Like all of config/ it imports neither torch nor Lightning.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Optional

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from sasrec_lab.config.convert import to_typed
from sasrec_lab.config.dataset import DatasetConfig
from sasrec_lab.config.hydra_errors import explain
from sasrec_lab.config.hydra_internals import VERSION_BASE, add_config_dir, hydra_state_restored
from sasrec_lab.config.list_commands import RecommendConfig
from sasrec_lab.config.overrides import check_syntax, typed_keys
from sasrec_lab.config.schema import CONF_DIR, TrainConfig
from sasrec_lab.config.trust import check_code
from sasrec_lab.config.unread import check_unread
from sasrec_lab.errors import InputError, MissingKey

_HANDLERS = ("console", "file")  # of logging; conf/train.yaml sets their formats


def load(overrides: list[str], config_dir: Optional[str] = None) -> TrainConfig:
    """Return the typed config for these overrides."""
    cfg = typed_without_hydra(compose_config(overrides, config_dir))
    assert isinstance(cfg, TrainConfig)
    return cfg


def load_dataset(overrides: list[str]) -> DatasetConfig:
    """Return the typed `dataset` section for these overrides, with item features also if no model reads them."""
    cfg = compose_config(overrides)
    typed_without_hydra(cfg.copy())  # a mistake is reported with its key
    dataset = OmegaConf.to_object(cfg.dataset)
    assert isinstance(dataset, DatasetConfig)
    return dataset


def compose_config(overrides: list[str], config_dir: Optional[str] = None, name: str = "train") -> DictConfig:
    """Compose conf/<name>.yaml with these overrides, as the command line would; Hydra's own keys are included.

    Raises:
        InputError: anything that Hydra rejects, in one line, with the nearest existing name.
    """
    check_syntax(overrides, name)
    with composing(config_dir, name, overrides):
        return compose_checked(overrides, name)


def compose_checked(overrides: list[str], name: str = "train") -> DictConfig:
    """Compose a config while Hydra is initialized; refuse code that it names, and typed keys that nothing reads."""
    cfg = compose(name, overrides=overrides, return_hydra_config=True)
    _check_hydra_sections(cfg.hydra)
    typed = typed_keys(overrides)
    check_code(cfg, typed)
    check_unread(cfg, sorted(typed))
    return cfg


@contextmanager
def composing(config_dir: Optional[str] = None, name: str = "train", words: Sequence[str] = ()) -> Iterator[None]:
    """Initialize Hydra with conf/ and the user's folder, for the body; its errors become InputErrors.

    A caller's own Hydra is as before afterwards.
    """
    with explained(name, words), hydra_state_restored(), warnings.catch_warnings():
        GlobalHydra.instance().clear()
        warnings.filterwarnings("error", r"provider=hydra.searchpath")  # a folder that does not exist
        with initialize_config_dir(config_dir=CONF_DIR, **VERSION_BASE):
            if config_dir:
                add_config_dir(config_dir)
            yield


@contextmanager
def explained(name: str, words: Sequence[str] = ()) -> Iterator[None]:
    """Turn what Hydra, OmegaConf or their parser raise in the body into an InputError."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # their exceptions share no base class
        raise InputError(explain(error, name, words)) from error


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Return a copy of a composed config without Hydra's own keys."""
    copied = cfg.copy()
    with open_dict(copied):
        del copied["hydra"]
    return copied


def typed_without_hydra(cfg: DictConfig) -> TrainConfig | RecommendConfig:
    """Return the composed config as typed objects, without Hydra's own keys; name the file that misses a key."""
    choices = cfg.hydra.runtime.choices
    with open_dict(cfg):
        del cfg["hydra"]
    try:
        return to_typed(cfg)
    except MissingKey as error:
        group = error.key.partition(".")[0]
        if Path(CONF_DIR, error.key).is_dir():
            names = sorted(file.stem for file in Path(CONF_DIR, group).glob("[!_]*.yaml"))
            raise InputError(
                f"{group} has no choice; write {group}=... ({group} is one of: {', '.join(names)})"
            ) from error
        if group not in choices or Path(CONF_DIR, group, f"{choices[group]}.yaml").is_file():
            raise
        base = next(Path(CONF_DIR, group).glob("[!_]*.yaml")).stem
        raise InputError(
            f"{group}/{choices[group]}.yaml does not set {error.key}; set it there, or begin the file with"
            f" 'defaults: [{base}]' to inherit what it does not change"
        ) from error
    except InputError as error:
        experiment = choices.get("experiment")
        if choices.get("dross") and experiment and not experiment.startswith("dross/"):
            raise InputError(
                f"{error}; files of dross/ are rows of experiment=dross/..., not of experiment={experiment}"
            ) from error
        raise


def _check_hydra_sections(hydra: DictConfig) -> None:
    """Raise InputError if Hydra would fail after it has made the run's folder."""
    for section in ("launcher", "sweeper"):
        if not isinstance(hydra[section], DictConfig) or not isinstance(hydra[section].get("_target_"), str):
            raise InputError(f"hydra.{section} must name its class; remove it, or choose hydra/{section}=basic")
    for section in ("job_logging", "hydra_logging"):
        if not isinstance(hydra[section], DictConfig) or hydra[section].get("version") != 1:
            raise InputError(f"hydra/{section} must be a logging configuration; remove it, or choose default")
    if not all(OmegaConf.select(hydra, f"job_logging.handlers.{name}.class") for name in _HANDLERS):
        raise InputError(
            f"hydra/job_logging={hydra.runtime.choices.get('hydra/job_logging')} lacks the handlers"
            f" {' and '.join(_HANDLERS)}, which runs log to; choose hydra/job_logging=default"
        )
    if not isinstance(hydra.verbose, (bool, str, ListConfig)):
        raise InputError(f"hydra.verbose={hydra.verbose} must be true, false, or names of loggers")
