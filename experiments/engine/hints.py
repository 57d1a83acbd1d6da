"""What kind of change does what a re-run shows: a seed, a step size, a mean for a sum, a narrow type, other data."""

from typing import Any

import ml_dtypes
import numpy as np

from experiments.engine.echoes import comparable
from experiments.engine.kinds import EXACT, Rounding, Seconds
from experiments.engine.tolerance import Case, brief, holds_for_all, values


def hint(case: Case, differ: list[str], same_draws: bool | None) -> str:
    """What kind of change moves the parts that differ; empty where nothing tells."""
    for name in differ:
        old, new, kind = case.before[name].value, case.after[name].value, case.before[name].kind
        if kind == EXACT and name.split("/")[-1] == "n":
            return f"data or sizes: {name} was {brief(old)}, is {brief(new)}"
    curves = {
        name: values(case, name)
        for name in differ
        if not isinstance(case.before[name].kind, Seconds)
        and comparable(case.before[name].value, case.after[name].value)
    }
    for name, (a, b) in curves.items():
        if narrow := _narrow(a, b):
            return f"dtype: every value of {name} is a {narrow} number"
    if same_draws is False and not _moved_without_drawing(case, curves):
        return "sampling: the random numbers are others, and so is what they add up to"
    told = [words for name, (a, b) in curves.items() if (words := _course(a, b, case.before[name].kind.along))]
    kinds = [words.split(":")[0] for words in told]
    return max(told, key=lambda words: kinds.count(words.split(":")[0])) if told else ""


def _moved_without_drawing(case: Case, curves: dict[str, Any]) -> bool:
    return any(isinstance(case.before[name].kind, Rounding) for name in curves)


def _narrow(old: np.ndarray, new: np.ndarray) -> str:
    """The narrow type whose numbers all new values are, where the old ones are not."""
    for kind in (ml_dtypes.bfloat16, np.float16):
        with np.errstate(over="ignore", invalid="ignore"):
            was, now = (holds_for_all(x.astype(kind).astype(float) == x, x) for x in (old, new))
        if new.size > 3 and now and not was:
            return np.dtype(kind).name
    return ""


def _course(old: np.ndarray, new: np.ndarray, runs: int | None) -> str:
    """What a deviation looks like along a curve; empty for what is no curve.

    It runs along the last axis, or the one before, if that is of a few coordinates; what else there is is averaged.
    """
    a, b = (x if runs is None else np.moveaxis(x, runs, 0) for x in (old, new))
    if a.ndim > (1 if runs is None else 2) and a.shape[-1] < 4:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    if a.ndim < (1 if runs is None else 2) or a.shape[-1] < 4:
        return ""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    use = np.asarray(np.isfinite(a + b).all(axis=0))
    if use.sum() < 4 or not use[0] or not a[:, use].any():
        return ""
    a, b = a[:, use].mean(axis=0), b[:, use].mean(axis=0)
    changes = np.flatnonzero((a != a[0]) & (b != b[0]))
    if not changes.size:
        return ""  # one of them stays where it is: no course to compare
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(a == b, 1.0, b / a)
        first = (b[changes[0]] - b[0]) / (a[changes[0]] - a[0])
    off = np.abs(ratio - 1)
    if 1.5 < ratio[0] < np.inf and abs(ratio[0] / round(ratio[0]) - 1) < 1e-3:
        return f"mean against sum: it starts {ratio[0]:.4g} times as large"
    if off[0] > 0.05 * np.nanmax(off):
        return "data: it is different from its first entry on"
    away = b - a
    turns = np.abs(np.diff(np.sign(away[away != 0]))) > 1
    if np.sum(turns) > 0.2 * len(turns) and np.nanmax(off) < 0.1:
        return "dtype: it goes astray to both sides, by so much as few digits would make it"
    if abs(first) > 1.5:
        return f"mean against sum: its first change is {abs(first):.4g} times as large"
    return f"step size: its first change is {first:.4g} times as large"
