"""What kind of number each published number is: what `PUBLISHED` of its experiment says (`experiments/__init__.py`)."""

import itertools
import re
from typing import Any, NamedTuple

import numpy as np

WORDS = re.compile(
    r"exact(?P<jax>, same jax)?"
    r"|machine"
    r"|rounding(, chosen by (?P<chosen>.+ of .+)|, found to (?P<found>\d[\d.e-]*)|, off by (?P<off>.+))?"
    r"|chaotic, axis (?P<late>-?\d+)"
    r"|error, unit (?P<unit>.+)"
    r"|count"
    r"|timing(?P<ratio>, ratio)?(, axis (?P<repeats>-?\d+))?"
    r"|statistical(, (axis (?P<runs>-?\d+)|(?P<by>error|deviation|count of) (?P<key>.+)))?"
)


NUMBER = re.compile(r"\d+(\.\d*)?(e[+-]?\d+)?")
"""A unit that is written out, where it is not the name of a number."""


class Kind(NamedTuple):
    """A declaration, with the keys that it names filled in."""

    name: str
    """`exact`, `machine`, `rounding`, `error`, `count`, `chaotic`, `statistical` or `timing`."""
    by: str = ""
    """What more was said: `jax` (exact), `chosen`, `found`, `off` (rounding), `axis` (statistical, chaotic, timing),
    `error`, `deviation`, `count` (statistical), `ratio` (timing)."""
    key: str = ""
    """The axis of the runs or repeats, the unit of an error, or the key that stands behind the words."""

    @property
    def axis(self) -> int | None:
        """The axis of the runs (statistical), the repeats (timing) or the late steps (chaotic), if there is one."""
        repeated = self.name in ("statistical", "timing", "chaotic") and re.fullmatch(r"-?\d+", self.key)
        return int(self.key) if repeated else None


class Part(NamedTuple):
    """One number, curve or column of an array: what is judged by itself."""

    name: str
    kind: Kind
    value: Any
    pattern: str
    """The key of `PUBLISHED` that decided."""


def parts(name: str, numbers: dict[str, Any], declared: dict[str, str]) -> dict[str, Part]:
    """Every part of the numbers of an experiment by its name, with the kind that the first fitting pattern gives it.

    Raises TypeError, saying what to write, for a number that nobody declared and for words that are no kind.
    """
    for pattern, words in declared.items():
        if not WORDS.fullmatch(words):
            raise TypeError(
                f"PUBLISHED in experiments/{name}.py: {pattern!r} is {words!r}, which is no kind of number; "
                "experiments/__init__.py lists the kinds"
            )
    found = {}
    for key, value in numbers.items():
        for part in _columns(key, value, declared):
            fits = ((pattern, match) for pattern in declared if (match := _regex(pattern).fullmatch(part)))
            pattern, match = next(fits, ("", None))
            if match is None:
                raise TypeError(undeclared(name, part))
            kind = _kind(declared[pattern], match.groups())
            found[part] = Part(part, kind, look_up(numbers, part), pattern)
    return found


def undeclared(name: str, part: str = "") -> str:
    """What to write where an experiment does not say what kind of number one of its numbers is."""
    return (
        f"{name} does not say what kind of number {repr(part) if part else 'each of its numbers'} is; write in "
        f'experiments/{name}.py, below QUICK, PUBLISHED = {{"{part or "..."}": "rounding", ...}}, with "exact", '
        '"rounding", "statistical, ..." or "timing" for every number that run returns; experiments/__init__.py says '
        "which is which"
    )


def look_up(numbers: dict[str, Any], part: str) -> Any:
    """A number by its name, or a column by `name[j]`."""
    if part in numbers:
        return numbers[part]
    key, _, column = part[:-1].rpartition("[")
    return np.asarray(numbers[key])[..., int(column)]


def _columns(key: str, value: Any, declared: dict[str, str]) -> list[str]:
    """The number itself, or its columns `key[j]` where a pattern names columns of it."""
    tables = (pattern[: pattern.rindex("[")] for pattern in declared if re.search(r"\[\d+\]$", pattern))
    if np.ndim(value) and any(_regex(table).fullmatch(key) for table in tables):
        return [f"{key}[{j}]" for j in range(np.shape(value)[-1])]
    return [key]


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile("(.*?)".join(map(re.escape, pattern.split("*"))))


def _words(said: re.Match[str]) -> str:
    return next(
        (said[group] for group in ("chosen", "found", "off", "unit", "key", "runs", "repeats", "late") if said[group]),
        "",
    )


def _kind(words: str, stars: tuple[str, ...]) -> Kind:
    said = WORDS.fullmatch(words)
    assert said is not None
    fill = itertools.cycle(stars)
    key = re.sub(r"\*", lambda _: next(fill), _words(said))
    groups = {
        "jax": "jax",
        "chosen": "chosen",
        "found": "found",
        "off": "off",
        "runs": "axis",
        "late": "axis",
        "ratio": "ratio",
    }
    by = (said["by"] or "").removesuffix(" of") or next((groups[group] for group in groups if said[group]), "")
    return Kind(words.partition(",")[0], by, key)
