"""The space of a search: keys with several values, written as Hydra writes those of a sweep.

So files of conf/sweep/ serve both.
"""

from dataclasses import dataclass
from itertools import islice
from math import isfinite
from typing import Literal

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from sasrec_lab.config.command_line import word_of
from sasrec_lab.config.hydra_internals import MAX_JOBS
from sasrec_lab.errors import InputError


@dataclass(frozen=True)
class Dimension:
    """A key of a space: listed `values`, words of a command line, or numbers from `low` to `high`, both included."""

    key: str
    text: str  # as typed
    values: list[str] | None = None
    low: float = 0
    high: float = 0
    step: float | None = None
    is_log: bool = False

    @property
    def kind(self) -> Literal["choice", "int", "float"]:
        """Return what the values are: words, or numbers of this type."""
        if self.values is not None:
            return "choice"
        return "float" if any(isinstance(number, float) for number in (self.low, self.high, self.step)) else "int"

    @property
    def size(self) -> float:
        """Return the number of values, infinite for an interval of floats."""
        if self.values is not None:
            return len(self.values)
        step = self.step or (1 if self.kind == "int" else None)
        return float("inf") if step is None else round((self.high - self.low) / step) + 1

    def listed(self) -> list[str | float]:
        """Return all values of a dimension of finite size."""
        if self.values is not None:
            return [*self.values]
        step = self.step or 1
        return [self.low + number * step for number in range(int(self.size))]

    def word(self, value: str | float) -> str:
        """Return the override that sets a value; floats that steps lead to lose their last digits, as in 0.1 + 0.2."""
        is_stepped = isinstance(value, float) and self.step is not None
        return f"{self.key}={float(f'{value:.12g}') if is_stepped else value}"


def dimension_of(key: str, override: Override) -> Dimension:
    """Return a key with several values as a dimension of the space.

    Raises:
        InputError: it is not an interval of finite numbers, or has an unknown tag.
    """
    value, word = override.value(), word_of(override)
    text = word.partition("=")[2]
    tags: set[str] = getattr(value, "tags", set())
    if tags - {"log"} or (tags and not isinstance(value, IntervalSweep)):
        raise InputError(f"{word}: the only tag is log, for intervals, as in tag(log,interval(0.001,0.1)); remove it")
    if key == "seed":
        raise InputError(f"{word}: a seed is not searched; seeds=<number> trains each trial with several")
    if isinstance(value, IntervalSweep):
        low, high = value.start, value.end
        if low is None or high is None or not (isfinite(low) and isfinite(high) and low < high):
            raise InputError(f"{word} must be an interval from a number to a larger one, such as interval(0.1,0.5)")
        if tags and low <= 0:
            raise InputError(f"{word}: an interval with tag log must begin above 0")
        return Dimension(key, text, low=low, high=high, is_log=bool(tags))
    values = list(islice(override.sweep_string_iterator(), MAX_JOBS + 1))
    if not values:
        raise InputError(f"{word} has no value to choose; --help shows how a space is written")
    if len(values) > MAX_JOBS:
        raise InputError(f"{word} has more than {MAX_JOBS:,} values; use an interval")
    if isinstance(value, RangeSweep) and len(values) > 1 and not value.shuffle and value.step and value.step > 0:
        assert value.start is not None
        high = value.start + (len(values) - 1) * value.step
        return Dimension(key, text, low=value.start, high=high, step=value.step)
    return Dimension(key, text, values=list(dict.fromkeys(values)))


def example_value(override: Override) -> object:
    """Return the first value of a searched key, or the value of a fixed one."""
    if not override.is_sweep_override():
        return override.get_value_element_as_str()
    value = override.value()
    return value.start if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())
