"""Train, evaluate and compare SASRec-style sequential recommenders."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sasrec_lab.api.finished_run import Run, load_run
    from sasrec_lab.api.sweep_table import load_sweep
    from sasrec_lab.api.training import compose, train_model
    from sasrec_lab.errors import InputError

__version__ = "0.1.0"
__all__ = ["InputError", "Run", "compose", "load_run", "load_sweep", "train_model"]

# A command's first line of this package: from here on Ctrl-C ends it in one line, also while its modules are imported.
# sys.argv[0] is "-m" only while Python looks for the module to run; processes that a command starts have other words.
if sys.argv[:1] == ["-m"] or (sys.orig_argv[1:2] == sys.argv[:1] and "/sasrec-" in "".join(sys.argv[:1])):
    from sasrec_lab.run.signals import exit_at_once

    exit_at_once()

_MODULES = {
    "InputError": "errors",
    "Run": "api.finished_run",
    "compose": "api.training",
    "load_run": "api.finished_run",
    "load_sweep": "api.sweep_table",
    "train_model": "api.training",
}


def __getattr__(name: str) -> Any:
    """Import what Python code asks for only then, so that `import sasrec_lab` and the commands stay fast."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
