"""How far rounding moves each published number: measured on *echoes* of the study, and saved beside it.

An echo is the whole study again, with the same programs and random numbers, in one of the `ENVIRONMENTS`. Of what an
echo moves, only the size is kept: the *moments* of the deviations, pooled over entries that share a scale.

    results/<experiment>/<device>.spread.json   `moments`: by part (`kinds.parts`) and pool, how many deviations
                                                are not 0, and sums of their powers (`Moments`). `seal`: the hash of
                                                the result that they belong to. `echoes`: the environments.

Pools: a number `d`, the entries of a size from 4^d to 4^(d+1), whose deviations are measured in 4^d; `zero`, those
that are saved as 0, in the root mean square of the part; `relative`, all others, in units of themselves; `scale`,
all, in the root mean square of the part.

That the tolerances hold where they were not made, `proof.left_out` proves.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.engine import results
from experiments.engine.kinds import Exact, Kind, Machine, Part, Ratio, Seconds, parts
from experiments.engine.results import Result
from jaxgrad import atomic

ZERO, RELATIVE, SCALE = "zero", "relative", "scale"


class Moments(NamedTuple):
    """What is known of the deviations of one pool; of those that are not 0."""

    moved: int
    """How many there are."""
    squares: float
    """The sum of their squares."""
    fourths: float
    """The sum of their fourth powers."""
    between: float
    """The sum, over the echoes, of the square of each one's own sum of squares: how many echoes it rests on."""

    def plus(self, other: "Moments") -> "Moments":
        """Of both together, from different echoes."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))  # type: ignore[arg-type]

    def beside(self, other: "Moments") -> "Moments":
        """Of both together, from the same echoes, which may have moved both at once."""
        return self.plus(other)._replace(between=(self.between**0.5 + other.between**0.5) ** 2)

    def scaled(self, by: float) -> "Moments":
        """Of the deviations times `by`."""
        return Moments(self.moved, self.squares * by**2, self.fourths * by**4, self.between * by**4)


Pools = dict[str, Moments]


class Spread(NamedTuple):
    """What is known of the rounding of one result."""

    echoes: tuple[str, ...]
    parts: dict[str, Pools]
    """By part; a part that no echo moved is not in it."""


def deviations(old: Result, new: Result, declared: dict[str, Kind]) -> dict[str, np.ndarray]:
    """By how much each part of a re-run deviates from the saved numbers.

    Times deviate by the logarithm, less the median of all: how much faster the machine was.
    """
    before, after = (parts(old.name, result.numbers, declared) for result in (old, new))
    out = {}
    for name, part in before.items():
        if name in after and comparable(part.value, after[name].value) and not isinstance(part.kind, Exact | Machine):
            a, b = (np.asarray(value, float) for value in (part.value, after[name].value))
            if isinstance(part.kind, Seconds):
                out[name] = log_ratio(part.kind.along, a, b)
            else:
                with np.errstate(invalid="ignore"):
                    out[name] = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, b - a)
    pace = median_pace(before, out)
    return {k: v - pace if _paced(before[k].kind) else v for k, v in out.items()}


def median_pace(before: dict[str, Part], logs: dict[str, np.ndarray]) -> float:
    """The median logarithm over all seconds: how much slower everything was."""
    seconds = [logs[k].ravel() for k in logs if _paced(before[k].kind)]
    finite = [values[np.isfinite(values)] for values in seconds]
    return float(np.median(np.concatenate(finite))) if sum(map(len, finite)) else 0.0


def _paced(kind: Kind) -> bool:
    """Whether a number is of seconds that a slower machine makes longer."""
    return isinstance(kind, Seconds) and not isinstance(kind, Ratio)


def log_ratio(repeats: int | None, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Logarithm of new over old times, of their medians where an axis is that of repeats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (np.log(values) for values in (old, new))
        return b - a if repeats is None else np.median(b, axis=repeats) - np.median(a, axis=repeats)


def comparable(old: Any, new: Any) -> bool:
    """Whether both are numbers of one shape."""
    return np.shape(old) == np.shape(new) and all(np.asarray(value).dtype.kind in "fiu" for value in (old, new))


# --- moments -----------------------------------------------------------------------------------------------------


def pools_of(value: np.ndarray) -> np.ndarray:
    """The number of the pool of each entry: floor(log4 |x|); NaN for 0 and for what is not finite."""
    with np.errstate(divide="ignore", invalid="ignore"):
        pool = np.maximum(np.floor(np.log2(np.abs(value)) / 2), -511)  # 4^-511 is a normal number
    return np.where(np.isfinite(value) & (value != 0), pool, np.nan)


def scale_of(value: np.ndarray) -> float:
    """Root mean square of the finite entries; 1 where they are 0."""
    finite = np.abs(value[np.isfinite(value)])
    largest = finite.max(initial=0.0)
    return float(largest * np.sqrt(np.mean((finite / largest) ** 2))) if largest > 0 else 1.0


def moments(value: np.ndarray, away: np.ndarray) -> Pools:
    """Of the deviations `away` of the entries of `value`, pool by pool; pools that did not move are left out."""
    pool = pools_of(value)
    found = {
        f"{number:.0f}": _moments(away[pool == number] / 4.0**number) for number in np.unique(pool[np.isfinite(pool)])
    }
    found[ZERO] = _moments(away[value == 0] / scale_of(value))
    with np.errstate(over="ignore"):
        found[RELATIVE] = _moments(away[np.isfinite(pool)] / np.abs(value[np.isfinite(pool)]))
    found[SCALE] = _moments(away / scale_of(value))
    return {name: one for name, one in found.items() if one.moved}


def _moments(deviations: np.ndarray) -> Moments:
    sizes = np.abs(deviations[np.isfinite(deviations) & (deviations != 0)])
    with np.errstate(over="ignore"):
        squares = float(np.sum(sizes**2))
        return Moments(sizes.size, squares, float(np.sum(sizes**4)), squares**2)


def measure(old: Result, echoes: dict[str, Result], declared: dict[str, Kind], timed: Sequence[str] = ()) -> Spread:
    """The spread of a result over its echoes; that of its times over those named in `timed`, which were as fast."""
    before = parts(old.name, old.numbers, declared)
    found: dict[str, Pools] = {}
    for label, echo in echoes.items():
        for name, away in deviations(old, echo, declared).items():
            value = np.asarray(before[name].value, float)
            timing = isinstance(before[name].kind, Seconds)
            if timing and label not in timed:
                continue
            # Logarithms of times have a unit of their own.
            pools = {SCALE: _moments(away)} if timing else moments(value, away)
            own = found.setdefault(name, {})
            for pool, more in pools.items():
                if more.moved:
                    own[pool] = own[pool].plus(more) if pool in own else more
    return Spread(tuple(echoes), {name: pools for name, pools in found.items() if pools})


# --- files -------------------------------------------------------------------------------------------------------


def write(folder: str | Path, old: Result, spread: Spread) -> Path:
    """Write the spread of a saved result beside it; returns the path."""
    document = {
        "echoes": list(spread.echoes),
        "moments": {
            name: {pool: [float(f"{value:.4g}") for value in one] for pool, one in pools.items()}
            for name, pools in spread.parts.items()
        },
        "seal": results.seal(folder, old.name, old.device),
    }
    path = _path(folder, old)
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(pools)}" for name, pools in document["moments"].items())
    text = (
        f'{{"echoes": {json.dumps(document["echoes"])},\n "seal": {json.dumps(document["seal"])},\n'
        f' "moments": {{\n{lines}\n }}\n}}\n'
    )
    atomic.write(path, text.encode())
    return path


def read(folder: str | Path, old: Result) -> Spread | None:
    """The spread that was recorded for these very numbers, if there is one."""
    path = _path(folder, old)
    if not path.is_file():
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        found = {
            name: {pool: Moments(int(one[0]), *map(float, one[1:4])) for pool, one in pools.items()}
            for name, pools in document["moments"].items()
        }
        seal, echoes = str(document["seal"]), tuple(map(str, document["echoes"]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not whole ({error!r}); run `python -m experiments spread` again") from None
    return Spread(echoes, found) if results.has_seal(folder, old.name, old.device, seal) else None


def _path(folder: str | Path, result: Result) -> Path:
    return Path(folder) / result.name / f"{result.device}.spread.json"
