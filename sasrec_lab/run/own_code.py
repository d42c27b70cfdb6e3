"""Record the parts of a run that are the user's own code: names, options, and checksums of their modules."""

import logging
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sasrec_lab.config.foreign import Foreign
from sasrec_lab.config.foreign_code import options_of
from sasrec_lab.config.schema import TrainConfig
from sasrec_lab.run.record import RunRecord
from sasrec_lab.run.signals import interrupts_deferred

log = logging.getLogger(__name__)


def report_parts(run: RunRecord, cfg: TrainConfig) -> None:
    """Import the parts that are the user's own code, and record and log them, if there are any.

    Raises:
        InputError: one is missing, of another kind, or has a wrong option.
    """
    parts = cfg.parts
    if not parts:
        return
    with interrupts_deferred():  # an import may turn the exception of a signal into another one
        cfg.check_parts()
        run.info["foreign"] = now = _record(parts)
    log.info(f"own    {', '.join(part.name for part in parts)}")
    before = run.previous.get("foreign", {}).get("modules", {})
    if changed := [name for name, checksum in now["modules"].items() if before.get(name, checksum) != checksum]:
        log.warning(f"       {', '.join(changed)} changed since this run began: its epochs are of different code")


def _record(parts: list[Foreign]) -> dict[str, Any]:
    """Return what run.json has of parts: names, options with their defaults, and the SHA-256 of modules.

    These are the imported modules of the same packages; of an installed package only those that the config names.
    """
    named, modules = {}, {}
    for part in parts:
        options = options_of(part)
        named[part.key] = {"name": part.name, "options": {} if options is None else _plain(options)}
        for name in _modules_of(part):
            file = getattr(sys.modules[name], "__file__", None)
            if file and Path(file).is_file():
                modules[name] = sha256(Path(file).read_bytes()).hexdigest()
    return {"parts": named, "modules": modules}


def _plain(options: Any) -> Any:
    return OmegaConf.to_container(OmegaConf.structured(options), enum_to_str=True)


def _modules_of(part: Foreign) -> list[str]:
    """Return the part's module, and the other imported ones of its package unless that is installed."""
    file = getattr(sys.modules[part.module], "__file__", None) or ""
    if not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts):
        return [part.module]
    package = part.module.partition(".")[0]
    return sorted(name for name in list(sys.modules) if f"{name}.".startswith(f"{package}."))
