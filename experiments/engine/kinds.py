"""What kind of number each published number is, so that `verify` knows what a re-run may change.

A study declares `NUMBERS = {"*/n": EXACT, "*/eta": Chosen(by="*/tuning", of="*/etas"), ...}`. A key is the name of a
number, with `*` for anything, or `name[1]` for a column along the last axis. The first key that fits decides, and one
must fit. A `*` in the name of another number (`by`, `of`, `error`, `deviation`, `unit`) stands for what it stood for in
the key. What a re-run may differ by for each kind is worked out in `tolerance.py`.
"""

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Kind:
    """One of the kinds below."""

    @property
    def along(self) -> int | None:
        """The axis of the runs, the repeats or the late steps, if there is one."""
        return getattr(self, "axis", None)

    def filled(self, stars: tuple[str, ...]) -> "Kind":
        """The same, with the stars in names of other numbers filled in."""
        fill = itertools.cycle(stars)
        names = {
            field.name: re.sub(r"\*", lambda _: next(fill), value)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), str)
        }
        return dataclasses.replace(self, **names)


@dataclass(frozen=True)
class Exact(Kind):
    """The same to the last bit: settings, counts, words."""


@dataclass(frozen=True)
class SameJax(Exact):
    """The same where JAX is the same: what its compiler counts."""


@dataclass(frozen=True)
class Machine(Kind):
    """What a machine is and has installed, and who won a race on it."""


@dataclass(frozen=True)
class Rounding(Kind):
    """Computed in floating point without drawing anything, or from the same draws each time."""


@dataclass(frozen=True)
class Chosen(Rounding):
    """The option with the lowest score. At a tie rounding may decide."""

    by: str
    """The scores."""
    of: str
    """The options."""


@dataclass(frozen=True)
class Found(Rounding):
    """What a search ends with."""

    to: float
    """The share of it by which it may be off."""


@dataclass(frozen=True)
class Off(Rounding):
    """What may be off by another number, worked out with it.

    An error that its condition explains, or a jump where a residual is on the other side of 0.
    """

    by: str


@dataclass(frozen=True)
class ErrorOfRounding(Kind):
    """A number that is itself an error of rounding."""

    unit: float | str
    """What it is measured in: a number, or the name of one."""


@dataclass(frozen=True)
class Count(Kind):
    """How many cases pass a threshold, each of which rounding may move across."""


@dataclass(frozen=True)
class Chaotic(Kind):
    """Late steps, along `axis`, of runs that may wander, or stand still but for rounding."""

    axis: int


@dataclass(frozen=True)
class Random(Kind):
    """Of random numbers, with no interval of its own: a path, an error bar."""


@dataclass(frozen=True)
class Runs(Random):
    """One entry along `axis` for each seed."""

    axis: int


@dataclass(frozen=True)
class Mean(Random):
    """A mean whose standard error is the number `error`, or over seeds that scatter by the number `deviation`."""

    error: str = ""
    deviation: str = ""

    def __post_init__(self) -> None:
        if bool(self.error) == bool(self.deviation):
            raise TypeError("Mean takes either error= or deviation=, the name of a number")


@dataclass(frozen=True)
class CountOf(Random):
    """How many of so many runs."""

    runs: str


@dataclass(frozen=True)
class Seconds(Kind):
    """Seconds, repeated along `axis` if there is one."""

    axis: int | None = None


@dataclass(frozen=True)
class Ratio(Seconds):
    """Seconds over seconds of the same run."""


EXACT, SAME_JAX, MACHINE, ROUNDING, COUNT, RANDOM, SECONDS, RATIO = (
    Exact(),
    SameJax(),
    Machine(),
    Rounding(),
    Count(),
    Random(),
    Seconds(),
    Ratio(),
)


class Part(NamedTuple):
    """One number, curve or column of an array: what is judged by itself."""

    name: str
    kind: Kind
    value: Any
    pattern: str
    """The key of `NUMBERS` that decided."""


def parts(name: str, numbers: dict[str, Any], declared: dict[str, Kind]) -> dict[str, Part]:
    """Every part of the numbers of an experiment by its name, with the kind that the first fitting key gives it.

    Raises TypeError, saying what to write, for a number that nobody declared and for what is no kind.
    """
    for pattern, kind in declared.items():
        if not isinstance(kind, Kind):
            raise TypeError(
                f"NUMBERS in experiments/{name}.py: {pattern!r} is {kind!r}, which is no kind of number; "
                "experiments/engine/kinds.py defines the kinds"
            )
    found = {}
    for key, value in numbers.items():
        for part in _columns(key, value, declared):
            fits = ((pattern, match) for pattern in declared if (match := _regex(pattern).fullmatch(part)))
            pattern, match = next(fits, ("", None))
            if match is None:
                raise TypeError(undeclared(name, part))
            found[part] = Part(part, declared[pattern].filled(match.groups()), look_up(numbers, part), pattern)
    return found


def undeclared(name: str, part: str = "") -> str:
    """What to write where an experiment does not say what kind of number one of its numbers is."""
    return (
        f"{name} does not say what kind of number {repr(part) if part else 'each of its numbers'} is; write in "
        f'experiments/{name}.py, below QUICK, NUMBERS = {{"{part or "..."}": ROUNDING, ...}}, with EXACT, ROUNDING, '
        "Runs(axis=...) or SECONDS for every number that run returns; experiments/engine/kinds.py says which is which"
    )


def look_up(numbers: dict[str, Any], part: str) -> Any:
    """A number by its name, or a column by `name[j]`."""
    if part in numbers:
        return numbers[part]
    key, _, column = part[:-1].rpartition("[")
    return np.asarray(numbers[key])[..., int(column)]


def _columns(key: str, value: Any, declared: dict[str, Kind]) -> list[str]:
    """The number itself, or its columns `key[j]` where a key names columns of it."""
    tables = (pattern[: pattern.rindex("[")] for pattern in declared if re.search(r"\[\d+\]$", pattern))
    if np.ndim(value) and any(_regex(table).fullmatch(key) for table in tables):
        return [f"{key}[{j}]" for j in range(np.shape(value)[-1])]
    return [key]


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile("(.*?)".join(map(re.escape, pattern.split("*"))))
