"""By how much a re-run may differ: from what kind of number each is, and from what was recorded.

Nobody types a tolerance in.

**Exact**: not at all.

**Rounding**: by as much as rounding moves numbers like this one, which no data type tells (a sum loses an ulp; a step
of GD beyond the edge doubles what was lost before), and which is measured on the echoes of the study (`echoes.py`).
With r the root mean square of the deviations of entries of like size (within a factor of 16 or so) in the same array,
those that moved at all, a re-run agrees within

    t(1 − α/2N, ν) · r + 4 u |x|

t: quantile of Student's distribution. ν: how many echoes r rests on (times the runs, where an array has an axis of
runs: the entries of a curve share its history), fewer where a few of them, or of the entries, make up most of it
(Satterthwaite). α: `LEVEL`, the chance that a sound re-run of an experiment is called different. N: how many parts it
has (Bonferroni). u: unit of rounding of the precision in which the values are saved, or of float32 where all of them
are float32 numbers, or moved as such move. Where no entry of like size moved, r is relative, over the array; where
nothing of it moved, over the parts that were declared with it; where none of those moved, the tolerance is the
rounding of a sum over the n examples in another order, √n u |x|. For an entry that is 0, r is absolute, over the
array; and u |x| is at least a unit of rounding, of float64, of the array's root mean square. So nothing that is
computed has the tolerance 0. A whole number that is computed, a step at which a threshold is crossed, may move by 1;
what a search found, by the share that is declared; what a study says may be off by a number, by that number. Chaotic
numbers (late losses of a net at a large step size) get a wide tolerance because their echoes scatter; no other does.

**Error**: a number that is itself an error of rounding, in the unit that is declared, is one draw of a random number
of its own size. So is that of the re-run: it may be off by z(1 − α/2N) √2 times the published one, or the unit where
that is larger.

**Chaotic**: late steps of a run that wanders, or stands still but for rounding. Of each run the median size is
compared, in logarithms, with how much its steps vary, and a factor of 2: within z(1 − α/2N) of these.

**Count**: how many cases pass a threshold. It is held to what the echoes show over all counts of the experiment, or
to 1 where they show less.

**Statistical**: a re-run draws the same random numbers, so it is held to the tolerance of rounding first. Beyond it,
the deviation is compared with what the seeds of both imply (Welch's t for runs, a normal interval for means with a
standard error, a binomial one for counts, at α/N over the entries). Within, it agrees *with other random numbers*,
and that is said: the same code, versions and device draw the same. If the runs of both follow each other seed by
seed, though, the random numbers are the same and what was done with them is not: it differs. A few single runs that
part from their published selves while most stay are chaos, and agree.

**Timing**: seconds are not compared. Their logarithms are, less the median difference of all times of the experiment
(how much faster this machine is): what is left are ratios between contenders of one run. They are held to the scatter
of the echoes' own ratios in the same way. Times of another kind of machine, and of `--quick`, are not comparable.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.engine.echoes import RELATIVE, SCALE, ZERO, Moments, Pools, Spread, comparable, pools_of, scale_of
from experiments.engine.kinds import Count, CountOf, Found, Mean, Off, Part, Random, Runs, look_up
from experiments.engine.results import Result

LEVEL = 1e-3
"""Chance that a sound re-run of one experiment is called different, for all of its numbers together."""

FLOAT32 = 2.0**-36
"""Relative deviations of this size have been through float32: far beyond a sum in float64, far below a float32 unit."""


class Case(NamedTuple):
    """A committed result, a re-run, and what is known of both together."""

    old: Result
    new: Result
    before: dict[str, Part]
    after: dict[str, Part]
    spread: Spread | None
    level: float
    """α/N."""
    examples: float
    """n, for the error of a sum over them."""
    pace: float
    """Median logarithm of the times here over there."""
    timed: bool
    """Whether times are long enough to be compared."""


def values(case: Case, name: str) -> tuple[np.ndarray, np.ndarray]:
    """A part as it is published, and as the re-run gives it."""
    return np.asarray(case.before[name].value, float), np.asarray(case.after[name].value, float)


def exceeding(old: np.ndarray, new: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Which entries are off by more than they may be."""
    with np.errstate(invalid="ignore"):
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        return ~same & ~(np.abs(new - old) <= allowed)


def holds_for_all(condition: np.ndarray, value: np.ndarray) -> bool:
    """Whether it holds for all finite values, of which there is one."""
    finite = np.isfinite(value)
    return bool(finite.any() and np.all(condition[finite]))


def tolerance(case: Case, name: str) -> np.ndarray:
    """By how much rounding may move each entry of a part."""
    saved, kind = np.asarray(case.before[name].value), case.before[name].kind
    value = saved.astype(float)
    with np.errstate(over="ignore", invalid="ignore"):
        # Float32 numbers, and not such round ones that anything could have given them.
        single = saved.dtype == np.float32 or (
            holds_for_all(np.float32(value) == value, value) and not holds_for_all(np.float16(value) == value, value)
        )
        unit = np.finfo(np.float32 if single else np.float64).eps * np.abs(value)
        pools = {} if case.spread is None else case.spread.parts.get(name, {})
        if (known := pools.get(RELATIVE)) and known.squares / known.moved > FLOAT32**2:
            # It moved as float32 numbers move, however it was saved.
            unit = np.maximum(unit, np.finfo(np.float32).eps * np.abs(value))
        # A difference of numbers of the array's size is off by a unit of theirs, however small it is itself.
        unit = np.maximum(unit, np.finfo(np.float64).eps * scale_of(value))
    runs = value.shape[kind.along] if kind.along is not None else 1
    if pools and not isinstance(kind, Count):
        allowed = 4 * unit + reach(value, pools, runs, case.level)
    elif family := _family(case, name):
        allowed = 4 * unit + bound(family, runs, case.level) * (1 if isinstance(kind, Count) else np.abs(value))
    else:
        allowed = max(4.0, np.sqrt(case.examples)) * unit
    if isinstance(kind, Found):
        allowed = np.maximum(allowed, kind.to * np.abs(value))
    elif isinstance(kind, Off):
        allowed = np.maximum(allowed, np.nan_to_num(np.asarray(look_up(case.old.numbers, kind.by), float)))
    whole = saved.dtype.kind in "iu" or isinstance(kind, Count)
    return np.maximum(allowed, 1.0) if whole else allowed


def _family(case: Case, name: str) -> Moments | None:
    """What is known of the parts that one pattern declares, together: of counts absolute, of all others relative."""
    if case.spread is None:
        return None
    part = case.before[name]
    known = [(case.before[other], pools) for other, pools in case.spread.parts.items() if other in case.before]
    if isinstance(part.kind, Count):
        kin = [
            pools[SCALE].scaled(scale_of(np.asarray(o.value, float))) for o, pools in known if isinstance(o.kind, Count)
        ]
    else:
        kin = [pools[RELATIVE] for o, pools in known if o.pattern == part.pattern and RELATIVE in pools]
    return functools.reduce(Moments.beside, kin) if kin else None


def reach(value: np.ndarray, pools: Pools, runs: int, level: float) -> np.ndarray:
    """`t · r` of every entry: from its own pool and the next ones, or where these did not move, from all."""
    pool, out = pools_of(value), np.zeros(value.shape)
    for number in np.unique(pool[np.isfinite(pool)]):
        near = [one.scaled(4.0**step) for step in (-1, 0, 1) if (one := pools.get(f"{number + step:.0f}"))]
        here = pool == number
        if near:
            out[here] = bound(functools.reduce(Moments.beside, near), runs, level) * 4.0**number
        elif RELATIVE in pools:
            out[here] = bound(pools[RELATIVE], runs, level) * np.abs(value[here])
    if zero := pools.get(ZERO) or pools.get(SCALE):
        out[value == 0] = bound(zero, runs, level) * scale_of(value)
    return out


def bound(known: Moments, runs: int, level: float) -> float:
    """The bound that one more deviation from this source exceeds with probability `level`. Zeros are ignored.

    Each echo is one draw for each of `runs`. Echoes, or entries, that move more than others count for fewer
    (Satterthwaite).
    """
    if not known.moved or not known.squares:
        return 0.0
    kurtosis = known.moved * known.fourths / known.squares**2
    freedom = min(runs * known.squares**2 / known.between, 2 * known.moved / max(kurtosis - 1, 1e-9))
    return float(stats.t.isf(level / 2, freedom) * np.sqrt(known.squares / known.moved))


def standard_error(case: Case, name: str) -> np.ndarray:
    """Of the difference between two independent runs of a part."""
    kind: Any = case.before[name].kind
    squares: list[Any] = []
    a, b = values(case, name)
    for result in (case.old, case.new):
        if isinstance(kind, CountOf):
            about = np.asarray(look_up(result.numbers, kind.runs), float)
            share = np.clip((a + b + 1) / (2 * about + 2), 0, 1)
            squares.append(about * share * (1 - share))
        else:
            about = np.asarray(look_up(result.numbers, kind.error or kind.deviation), float)
            squares.append(about**2 / (result.config["seeds"] if kind.deviation else 1))
    return np.sqrt(squares[0] + squares[1])


def welch(a: np.ndarray, b: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Difference of the means of two samples along the leading axis, and what it may be: of the finite runs.

    Where one sample has fewer than two of those, the difference is that of their numbers, and it may be 0.
    """
    finite = [np.isfinite(x) for x in (a, b)]
    n, m = (ok.sum(axis=0) for ok in finite)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        means = [np.where(ok, x, 0).sum(axis=0) / k for x, ok, k in zip((a, b), finite, (n, m), strict=True)]
        errors = [
            np.where(ok, x - mean, 0).__pow__(2).sum(axis=0) / (k - 1) / k
            for x, ok, k, mean in zip((a, b), finite, (n, m), means, strict=True)
        ]
        freedom = (errors[0] + errors[1]) ** 2 / (errors[0] ** 2 / (n - 1) + errors[1] ** 2 / (m - 1))
        allowed = stats.t.isf(level / 2, np.where(freedom > 0, freedom, 1.0)) * np.sqrt(errors[0] + errors[1])
    few = (n < 2) | (m < 2)
    return np.where(few, np.asarray(m - n, float), means[1] - means[0]), np.where(few, 0.0, allowed)


def same_draws(case: Case) -> bool | None:
    """Whether the random numbers of both are the same, as their runs tell; None where nothing tells."""
    follow, squares = [], []
    for name, part in case.before.items():
        if not isinstance(part.kind, Random) or name not in case.after:
            continue
        if not comparable(part.value, case.after[name].value):
            continue
        a, b = values(case, name)
        if (
            isinstance(part.kind, Runs)
            and (told := _follow(*(np.moveaxis(x, part.kind.axis, 0) for x in (a, b)))) is not None
        ):
            follow.append(told)
        elif isinstance(part.kind, Mean):
            with np.errstate(invalid="ignore", divide="ignore"):
                z = (b - a) / standard_error(case, name)
            if np.isfinite(z).any():
                squares.append(float(np.mean(z[np.isfinite(z)] ** 2)))
    if follow:
        return sum(follow) > len(follow) / 2
    # Independent draws would give mean squares about 1.
    return bool(stats.chi2.cdf(sum(squares), len(squares)) < LEVEL) if squares else None


def _follow(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether runs `[run, ...]` follow each other: their median correlation over the entries is beyond chance."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        each = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    each = each[np.isfinite(each)]
    if len(a) < 4 or not each.size:
        return None
    r = float(np.clip(np.median(each), -1 + 1e-12, 1 - 1e-12))
    return bool(stats.t.sf(r * np.sqrt((len(a) - 2) / (1 - r**2)), len(a) - 2) < LEVEL)


def brief(value: Any) -> str:
    """A value in at most 60 signs."""
    words = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return words if len(words) <= 60 else f"{words[:57]}..."
