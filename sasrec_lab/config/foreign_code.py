"""Import parts of a run that are the user's own code (foreign.py), with options that their own dataclass types.

Importing runs code, so this is called only for parts that the user named. Nothing here imports torch; the user's module
may.
"""

import dataclasses
import inspect
import pkgutil
import sys
import traceback
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from sasrec_lab.config.foreign import OPTIONS, Foreign, options_key
from sasrec_lab.config.value_errors import full_key, wrong_value
from sasrec_lab.errors import InputError, did_you_mean, nearest


def load(part: Foreign) -> Callable[..., Any]:
    """Import a part and return it with its options, to be called with what its kind takes.

    Raises:
        InputError: the module or the part does not exist, it is not of its kind, or an option is wrong.
    """
    options = options_of(part)
    return find(part) if options is None else partial(find(part), **{OPTIONS: options})


def find(part: Foreign) -> Any:
    """Import a part and return it, without options; raise InputError if it is not trusted."""
    if not part.is_trusted:
        package = part.module.partition(".")[0]
        raise InputError(
            f"{part.key}={part.name} is code that is not of this package; if you trust the module {part.module} that"
            f" you have here, add trust=[{package}]"
        )
    module = _imported(part)
    found = getattr(module, part.title, None)
    if found is None:
        known = [name for name in vars(module) if not name.startswith("_")]
        hint = did_you_mean(part.title, known) or "; correct the name behind the colon"
        raise InputError(f"{part.key}={part.name}: the module {part.module} has no {part.title}{hint}")
    _check_kind(part, found)
    return found


def _imported(part: Foreign) -> Any:
    try:
        return import_module(part.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{part.module}.".startswith(f"{error.name}."):
            raise _import_error(part, error) from error
        parent, _, name = error.name.rpartition(".")
        found = nearest(name, _modules_in(list(sys.modules[parent].__path__) if parent else sys.path))
        where = "install it, or add its folder to PYTHONPATH"
        if found:
            similar = f"{parent}.{found}".strip(".")
            where = f"did you mean {similar}?" if parent else f"did you mean {similar}? If not, {where}"
        raise InputError(f"{part.key}={part.name}: there is no module {error.name}; {where}") from error
    except (Exception, SystemExit) as error:  # whatever the module does
        raise _import_error(part, error) from error


def _modules_in(places: list[str]) -> list[str]:
    """Return the names of modules in some folders, and of the folders there, which may be packages without a file."""
    names = [each.name for each in pkgutil.iter_modules(places) if not each.name.startswith("_")]
    folders = [path.name for place in places if Path(place).is_dir() for path in Path(place).iterdir() if path.is_dir()]
    return [*names, *(name for name in folders if name.isidentifier() and not name.startswith("_"))]


def _import_error(part: Foreign, error: BaseException) -> InputError:
    """Return the refusal of a module that fails while it is imported, with the line of its file."""
    frames = traceback.extract_tb(error.__traceback__)
    file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (None, None)
    if file is None and frames and "importlib" not in frames[-1].filename:
        file, line = frames[-1].filename, frames[-1].lineno
    place = f" ({Path(file).name}, line {line})" if file else ""
    reason = f"{type(error).__name__}: {getattr(error, 'msg', None) or error}"
    return InputError(f"{part.key}={part.name}: importing {part.module} failed{place}: {reason}; correct it")


def _check_kind(part: Foreign, found: Any) -> None:
    """Raise InputError if a part cannot be called as its kind is, or lacks an attribute."""
    kind = part.kind
    if lacking := [name for name in kind.has if not hasattr(found, name)]:
        raise InputError(
            f"{part.key}={part.name} is not a {kind.noun}: it has no {lacking[0]}; docs/extend.md has an example"
        )
    arguments = f"({', '.join(kind.takes)})" if kind.takes else "no arguments"
    if not callable(found):
        raise InputError(f"{part.key}={part.name} is not a {kind.noun}: it must be callable with {arguments}")
    if (signature := _signature(found)) is None:
        return
    try:
        signature.bind(*kind.takes, **({OPTIONS: None} if OPTIONS in signature.parameters else {}))
    except TypeError as error:
        raise InputError(
            f"{part.key}={part.name} must be callable with {arguments}, and {OPTIONS} if it has any, but takes"
            f" ({', '.join(signature.parameters)}); docs/extend.md has an example"
        ) from error


def _signature(found: Any) -> inspect.Signature | None:
    """Return the parameters of a part, None if Python does not know them, as of functions in C."""
    try:
        return inspect.signature(found)
    except (TypeError, ValueError):
        return None


def options_of(part: Foreign) -> Any:
    """Import a part and return its options as its own dataclass, None if it takes none."""
    found = find(part)
    signature, key = _signature(found), options_key(part.key)
    if signature is None or OPTIONS not in signature.parameters:
        if part.options:
            raise InputError(
                f"{key} has {', '.join(part.options)}, but {part.name} takes no options: remove them, or give it a"
                f" parameter `{OPTIONS}` that is annotated with a dataclass"
            )
        return None
    schema = _annotation(found, signature.parameters[OPTIONS].annotation)
    if not (isinstance(schema, type) and dataclasses.is_dataclass(schema)):
        raise InputError(f"{part.key}={part.name}: its parameter `{OPTIONS}` must be annotated with a dataclass")
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), part.options))
    except InputError:
        raise
    except ConfigKeyError as error:
        named = full_key(str(error))
        unknown = named[1] if named else str(error.key)
        names = [each.name for each in dataclasses.fields(schema)]
        suggestion = nearest(unknown, names)
        known = f"; {part.title} has {', '.join(names) or 'no options'}"
        hint = f"; did you mean {key}.{suggestion}?" if suggestion else known
        raise InputError(f"unknown key '{key}.{unknown}'{hint}") from error
    except MissingMandatoryValue as error:
        raise InputError(f"{key}.{error.full_key} has no value; set it") from error
    except OmegaConfBaseException as error:
        line = wrong_value(str(error), f"{key}.")
        raise InputError(line or f"{key}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # of the dataclass's own checks
        raise InputError(f"{key}: {error or type(error).__name__}") from error


def _annotation(found: Any, annotation: Any) -> Any:
    """Return what an annotation names; only this one, as others may name what is imported for type checks only."""
    if not isinstance(annotation, str):
        return annotation
    function: Any = inspect.unwrap(found.__init__ if isinstance(found, type) else found)  # type: ignore[misc]
    names = getattr(function, "__globals__", {})
    try:
        return get_type_hints(SimpleNamespace(__annotations__={OPTIONS: annotation}), names)[OPTIONS]
    except NameError:
        return None
