"""Functions whose every output depends on several inputs, and the Jacobians that people take for theirs.

A softmax, its logarithm, a normalised vector and a standardised one are recognised by their values, whether a
library computes them or the person wrote them out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxgrad.check.faults.mistake import Array, At, Change, Mistake, OfMembers, Say
from jaxgrad.check.program.replay import run_piece

Formula = Callable[[Any, Any, Any, Callable[[Any], Any], Callable[[Any], Any]], Any]
"""What is sent back, from the input x, the output a, the incoming adjoint d, and the sum and mean over the axis."""

SOFTMAX: Mapping[str, tuple[str, float, str, Formula]] = {
    "p d": (
        "wrong-derivative",
        1.0,
        "you multiplied the adjoint by the output and left out the sum over the others",
        lambda x, a, d, S, M: a * d,
    ),
    "p (1 - p) d": (
        "wrong-derivative",
        1.0,
        "you kept only the diagonal p (1 - p) of the Jacobian",
        lambda x, a, d, S, M: a * (1 - a) * d,
    ),
    "d": ("missing-derivative", 0.5, "you passed the adjoint on unchanged", lambda x, a, d, S, M: d),
    "d - sum": ("missing-factor", 1.5, "the factor p in front is missing", lambda x, a, d, S, M: d - S(a * d)),
    "p (d - sum d)": (
        "wrong-derivative",
        1.6,
        "the sum must be weighted with p: sum(p * d)",
        lambda x, a, d, S, M: a * (d - S(d)),
    ),
    "p (d - mean d)": (
        "wrong-derivative",
        1.7,
        "you subtracted the mean of d where sum(p * d) belongs",
        lambda x, a, d, S, M: a * (d - M(d)),
    ),
    "p (d - mean)": (
        "scaled-term",
        1.7,
        "you subtracted the mean of p * d where its sum belongs",
        lambda x, a, d, S, M: a * (d - M(a * d)),
    ),
    "p (d + sum)": (
        "negated-term",
        1.6,
        "the sum over the others has the wrong sign",
        lambda x, a, d, S, M: a * (d + S(a * d)),
    ),
    "- p sum": ("missing-term", 1.7, "the term p * d is left out", lambda x, a, d, S, M: -a * S(a * d)),
    "p d (1 - ...)": (
        "wrong-derivative",
        1.8,
        "you subtracted sum(p^2 * d)",
        lambda x, a, d, S, M: a * (d - S(a * a * d)),
    ),
    "p (1 - p)": ("missing-factor", 2.0, "the incoming adjoint is left out", lambda x, a, d, S, M: a * (1 - a)),
    "log": ("wrong-derivative", 1.8, "you used the Jacobian of log-softmax", lambda x, a, d, S, M: d - a * S(d)),
    "sigmoid, all": (
        "wrong-derivative",
        2.0,
        "you used the sum over all entries",
        lambda x, a, d, S, M: a * (d - np.sum(a * d)),
    ),
}
LOG_SOFTMAX: Mapping[str, tuple[str, float, str, Formula]] = {
    "out": (
        "wrong-derivative",
        1.0,
        "you subtracted sum(d * out), with the output in the place of the softmax",
        lambda x, a, d, S, M: d - S(d * a),
    ),
    "out sum": (
        "wrong-derivative",
        1.1,
        "you subtracted out * sum(d), with the output in the place of the softmax exp(out)",
        lambda x, a, d, S, M: d - a * S(d),
    ),
    "d": (
        "missing-term",
        0.9,
        "the term softmax * sum(d) is left out: you passed the adjoint on unchanged",
        lambda x, a, d, S, M: d,
    ),
    "p sum": (
        "missing-term",
        1.2,
        "the incoming adjoint d itself is left out and only - softmax * sum(d) is kept",
        lambda x, a, d, S, M: -np.exp(a) * S(d),
    ),
    "d - p": (
        "missing-factor",
        1.2,
        "the factor sum(d) of the softmax is missing",
        lambda x, a, d, S, M: d - np.exp(a),
    ),
    "d + p": (
        "wrong-derivative",
        1.3,
        "you added the softmax where - softmax * sum(d) belongs",
        lambda x, a, d, S, M: d + np.exp(a),
    ),
    "d (1 - p)": (
        "wrong-derivative",
        1.1,
        "you kept only the diagonal 1 - softmax of the Jacobian",
        lambda x, a, d, S, M: d * (1 - np.exp(a)),
    ),
    "d - sum(p d)": (
        "wrong-derivative",
        1.3,
        "the softmax stands outside the sum: softmax * sum(d)",
        lambda x, a, d, S, M: d - S(np.exp(a) * d),
    ),
    "mean": (
        "wrong-derivative",
        1.4,
        "you subtracted the mean of d where softmax * sum(d) belongs",
        lambda x, a, d, S, M: d - M(d),
    ),
    "sum": ("missing-factor", 1.4, "the factor softmax of sum(d) is missing", lambda x, a, d, S, M: d - S(d)),
    "+": (
        "negated-term",
        1.2,
        "the term softmax * sum(d) has the wrong sign",
        lambda x, a, d, S, M: d + np.exp(a) * S(d),
    ),
    "p mean": (
        "scaled-term",
        1.5,
        "you took the mean of d where its sum belongs",
        lambda x, a, d, S, M: d - np.exp(a) * M(d),
    ),
    "softmax": (
        "wrong-derivative",
        1.5,
        "you used the Jacobian of the softmax",
        lambda x, a, d, S, M: np.exp(a) * (d - S(np.exp(a) * d)),
    ),
    "1/p": (
        "wrong-derivative",
        1.8,
        "you used the Jacobian of the softmax without its factor",
        lambda x, a, d, S, M: d / np.exp(a),
    ),
    "x sum": ("wrong-value", 1.8, "you used the input in the place of the softmax", lambda x, a, d, S, M: d - x * S(d)),
    "e sum": (
        "wrong-value",
        1.8,
        "the exponentials must be divided by their sum",
        lambda x, a, d, S, M: d - np.exp(x) * S(d),
    ),
}
# In both of these s = 1/norm or 1/std is a / (x - mean) entry by entry, any epsilon included.
NORMALISED: Mapping[str, tuple[str, float, str, Formula]] = {
    "constant": (
        "missing-term",
        1.0,
        "the norm is treated as a constant: the term that goes through it is left out",
        lambda x, a, d, S, M: d * a / x,
    ),
    "no 1/norm": (
        "missing-factor",
        1.3,
        "the division by the norm is missing",
        lambda x, a, d, S, M: d - a * S(a * d) * _per(a, S),
    ),
    "identity": ("missing-derivative", 1.2, "you passed the adjoint on unchanged", lambda x, a, d, S, M: d),
    "+": (
        "negated-term",
        1.4,
        "the term that goes through the norm has the wrong sign",
        lambda x, a, d, S, M: (d + a * S(a * d) * _per(a, S)) * a / x,
    ),
    "no sum": (
        "wrong-derivative",
        1.5,
        "you kept only the diagonal of the Jacobian",
        lambda x, a, d, S, M: (d - a * a * d * _per(a, S)) * a / x,
    ),
    "x": (
        "wrong-value",
        1.6,
        "the vector itself stands where the normalised one belongs",
        lambda x, a, d, S, M: (d - x * S(x * d) * _per(a, S)) * a / x,
    ),
    "times": (
        "wrong-value",
        1.6,
        "you multiplied by the norm where it must be divided by it",
        lambda x, a, d, S, M: (d - a * S(a * d) * _per(a, S)) / (a / x),
    ),
    "squared": (
        "wrong-value",
        1.6,
        "you divided by the square of the norm",
        lambda x, a, d, S, M: (d - a * S(a * d) * _per(a, S)) * (a / x) ** 2,
    ),
    "no a": (
        "missing-factor",
        1.7,
        "the normalised vector in front of the sum is missing",
        lambda x, a, d, S, M: (d - S(a * d) * _per(a, S)) * a / x,
    ),
    "mean": (
        "scaled-term",
        1.8,
        "a mean stands where the sum belongs, or a sum for the mean",
        lambda x, a, d, S, M: (d - a * M(a * d)) * a / x,
    ),
    "sum": (
        "scaled-term",
        1.8,
        "a mean stands where the sum belongs, or a sum for the mean",
        lambda x, a, d, S, M: (d - a * S(a * d)) * a / x,
    ),
}
STANDARDISED: Mapping[str, tuple[str, float, str, Formula]] = {
    "constants": (
        "missing-term",
        1.0,
        "mean and standard deviation are treated as constants: the terms that go through them are left out",
        lambda x, a, d, S, M: d * _s(x, a, M),
    ),
    "std constant": (
        "missing-term",
        1.0,
        "the standard deviation is treated as a constant: the term that goes through it is left out",
        lambda x, a, d, S, M: (d - M(d)) * _s(x, a, M),
    ),
    "mean constant": (
        "missing-term",
        1.0,
        "the mean is treated as a constant: the term that goes through it is left out",
        lambda x, a, d, S, M: (d - a * M(a * d)) * _s(x, a, M),
    ),
    "no 1/std": (
        "missing-factor",
        1.3,
        "the division by the standard deviation is missing",
        lambda x, a, d, S, M: d - M(d) - a * M(a * d),
    ),
    "identity": ("missing-derivative", 1.2, "you passed the adjoint on unchanged", lambda x, a, d, S, M: d),
    "times std": (
        "wrong-value",
        1.5,
        "you multiplied by the standard deviation where it must be divided by it",
        lambda x, a, d, S, M: (d - M(d) - a * M(a * d)) / _s(x, a, M),
    ),
    "variance": (
        "wrong-value",
        1.5,
        "you divided by the variance where the standard deviation belongs",
        lambda x, a, d, S, M: (d - M(d) - a * M(a * d)) * _s(x, a, M) ** 2,
    ),
    "sum of d": (
        "scaled-term",
        1.5,
        "the sum of the adjoint stands where its mean belongs",
        lambda x, a, d, S, M: (d - S(d) - a * M(a * d)) * _s(x, a, M),
    ),
    "sum of a d": (
        "scaled-term",
        1.5,
        "a sum stands where the mean belongs, in the term that goes through the variance",
        lambda x, a, d, S, M: (d - M(d) - a * S(a * d)) * _s(x, a, M),
    ),
    "sums": (
        "scaled-term",
        1.5,
        "sums stand where means belong",
        lambda x, a, d, S, M: (d - S(d) - a * S(a * d)) * _s(x, a, M),
    ),
    "+ std": (
        "negated-term",
        1.5,
        "the term that goes through the variance has the wrong sign",
        lambda x, a, d, S, M: (d - M(d) + a * M(a * d)) * _s(x, a, M),
    ),
    "+ mean": (
        "negated-term",
        1.5,
        "the term that goes through the mean has the wrong sign",
        lambda x, a, d, S, M: (d + M(d) - a * M(a * d)) * _s(x, a, M),
    ),
    "twice": (
        "scaled-term",
        1.7,
        "the term that goes through the variance counts twice",
        lambda x, a, d, S, M: (d - M(d) - 2 * a * M(a * d)) * _s(x, a, M),
    ),
    "half": (
        "scaled-term",
        1.7,
        "the term that goes through the variance counts half: the 2 of the square is missing",
        lambda x, a, d, S, M: (d - M(d) - a * M(a * d) / 2) * _s(x, a, M),
    ),
    "centred": (
        "wrong-value",
        1.7,
        "the centred values stand where the standardised ones belong",
        lambda x, a, d, S, M: (d - M(d) - (x - M(x)) * M((x - M(x)) * d)) * _s(x, a, M),
    ),
    "no a": (
        "missing-factor",
        1.7,
        "the standardised values in front of the mean are missing",
        lambda x, a, d, S, M: (d - M(d) - M(a * d)) * _s(x, a, M),
    ),
    "diagonal": (
        "wrong-derivative",
        1.7,
        "you kept only the diagonal of the Jacobian",
        lambda x, a, d, S, M: (d - M(d) - a * a * d / _size(a, S)) * _s(x, a, M),
    ),
}


def _per(a: Any, total: Callable[[Any], Any]) -> Any:
    """1 over the squared length of the normalised vector: 1 for a unit vector, 1/d where its mean square is 1."""
    size = total(a * a)
    count = total(np.ones_like(a))
    return np.where(np.abs(size - 1) < 0.5 * np.abs(size - count), 1.0, 1.0 / count)


def _size(a: Any, total: Callable[[Any], Any]) -> Any:
    return total(np.ones_like(a))


def _s(x: Any, a: Any, mean: Callable[[Any], Any]) -> Any:
    """1/std, epsilon included: the one number that takes the centred values to the standardised ones."""
    c = x - mean(x)
    return mean(a * c) / mean(c * c)


FAMILIES = {
    "softmax": SOFTMAX,
    "log_softmax": LOG_SOFTMAX,
    "normalised": NORMALISED,
    "standardised": STANDARDISED,
}
_TRUE = {
    "softmax": "with p the output and d the adjoint it is p * (d - sum(p * d))",
    "log_softmax": "with d the adjoint it is d - softmax * sum(d)",
    "normalised": "with u the output and d the adjoint it is (d - u * sum(u * d)) / norm",
    "standardised": "with a the output and d the adjoint it is (d - mean(d) - a * mean(a * d)) / std",
}


@dataclass(frozen=True)
class Jacobian(OfMembers):
    """Another Jacobian than that of the function, or the right one over the wrong axes."""

    start: int
    end: int
    members: tuple[int, ...]
    family: str
    axes: tuple[int, ...]
    """The axes over which the function sums."""
    name: str
    over: tuple[int, ...]
    """The axes over which the mistaken derivation sums."""
    free: bool = False

    @property
    def kind(self) -> str:
        return "wrong-derivative" if self.name == "right" else FAMILIES[self.family][self.name][0]

    @property
    def cost(self) -> float:
        return 2.0 if self.name == "right" else FAMILIES[self.family][self.name][1]

    def change(self, at: At) -> Change:
        x, a, d = at.values[self.start], at.values[self.end], at.adjoint(self.end)
        if d is None:
            return None
        total, mean = _sums(self.over)
        with np.errstate(all="ignore"):
            if self.name == "right":
                new = _right(self.family, x, a, d, total, mean, _s(x, a, _sums(self.axes)[1]))
            else:
                new = FAMILIES[self.family][self.name][3](x, a, d, total, mean)
        return {self.start: new - _back(at, self.start, self.end, self.members, d)}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        what = self.family.replace("_", "-") if "soft" in self.family else f"the {self.family} values"
        if self.name == "right":
            where = say.at(self.members[-1])
            return f"In {where} the Jacobian of {what} sums over the wrong axis: it is axis {self.axes[0]}"
        wrong = FAMILIES[self.family][self.name][2]
        return f"In {say.at(self.members[-1])} the Jacobian of {what} is wrong: {wrong}; {_TRUE[self.family]}"


def _right(family: str, x: Any, a: Any, d: Any, S: Callable[[Any], Any], M: Callable[[Any], Any], s: Any) -> Any:
    if family == "softmax":
        return a * (d - S(a * d))
    if family == "log_softmax":
        return d - np.exp(a) * S(d)
    if family == "normalised":
        return (d - a * S(a * d) * _per(a, S)) * a / x
    return (d - M(d) - a * M(a * d)) * s


def _sums(axes: tuple[int, ...]) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    return lambda v: np.sum(v, axis=axes, keepdims=True), lambda v: np.mean(v, axis=axes, keepdims=True)


def _back(at: At, start: int, end: int, members: tuple[int, ...], d: Any) -> Array:
    """What the right derivative of the function sends back."""
    from jaxgrad.check.program.replay import Piece

    if len(members) == 1:
        step = at.program.steps[members[0]]
        found = at.contribution(members[0], step.inputs.index(start))
        if found is not None:
            return found
    piece = Piece(start, end, members, False, ())
    return np.asarray(jax.vjp(lambda x: run_piece(at.program, piece, at.values, x), at.values[start])[1](d)[0])


def family_of(x: Array, a: Array) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The functions that take x to a, each with its axes."""
    for axis in range(x.ndim):
        if x.shape[axis] < 2:
            continue
        axes = (axis,)
        total, mean = _sums(axes)
        with np.errstate(all="ignore"):
            e = np.exp(x - x.max(axis=axis, keepdims=True))
            tries = {
                "softmax": e / total(e),
                "log_softmax": x - x.max(axis=axis, keepdims=True) - np.log(total(e)),
            }
            for name, value in tries.items():
                if np.allclose(a, value, rtol=1e-9, atol=1e-12):
                    yield name, axes
            ratio = a / x
            if np.all(np.isfinite(ratio)) and np.ptp(ratio) > 1e-9:
                same = np.allclose(ratio, mean(ratio), rtol=1e-9)
                size = total(a * a)
                unit = np.allclose(size, 1, rtol=1e-3) or np.allclose(size, x.shape[axis], rtol=1e-3)
                if same and unit:
                    yield "normalised", axes
            c = x - mean(x)
            # with an epsilon in it, the variance is a little less than 1
            straight = np.allclose(mean(a), 0, atol=1e-9) and np.allclose(a, c * _s(x, a, mean), rtol=1e-7, atol=1e-9)
            if straight:
                unit = np.allclose(mean(a * a), 1, rtol=5e-2)
                if unit and not np.allclose(a, c, rtol=1e-6):
                    yield "standardised", axes


def found(at: At) -> Iterator[Mistake]:
    regions = [(p.start, p.end, p.members) for p in at.todo.pieces if not p.elementwise]
    for k, step in enumerate(at.program.steps):
        moving = [s for s in step.inputs if s in at.program.moving]
        if step.primitive in ("softmax", "log_softmax") and len(step.outputs) == 1 and len(moving) == 1:
            regions.append((moving[0], step.outputs[0], (k,)))
    for start, end, members in dict.fromkeys(regions):
        if at.adjoint(end) is None or at.shape(start) != at.shape(end):
            continue
        x, a = at.values[start], at.values[end]
        for family, axes in family_of(x, a):
            for name in FAMILIES[family]:
                yield Jacobian(start, end, members, family, axes, name, axes)
            others = [(i,) for i in range(x.ndim) if (i,) != axes and x.shape[i] > 1] + [tuple(range(x.ndim))]
            for over in others:
                if over != axes:
                    yield Jacobian(start, end, members, family, axes, "right", over)
