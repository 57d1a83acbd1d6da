"""Simple functions of the values of a loss, which a derivation by hand often makes on its way."""

from collections.abc import Callable, Mapping

import numpy as np

from jaxgrad.check.follow.known import Facts, Label

_FUNCTIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "exp": np.exp,
    "exp-": lambda x: np.exp(-x),
    "1+exp-": lambda x: 1 + np.exp(-x),
    "log": np.log,
    "log1p": np.log1p,
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "1-": lambda x: 1 - x,
    "1+": lambda x: 1 + x,
    "x(1-x)": lambda x: x * (1 - x),
    "x^2": np.square,
    "1-x^2": lambda x: 1 - x**2,
    "1+x^2": lambda x: 1 + x**2,
    "1/x": lambda x: 1 / x,
    "1/x^2": lambda x: 1 / x**2,
    "x^3": lambda x: x**3,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "abs": np.abs,
    "sign": np.sign,
    "relu": lambda x: np.maximum(x, 0),
    "x>0": lambda x: (x > 0).astype(float),
    "cos": np.cos,
    "sin": np.sin,
}
LARGEST = 5000


def helpers(facts: Facts) -> dict[Label, np.ndarray]:
    """Functions of one value, along its axes, and of two values of one shape."""
    values = {label: v for label, v in facts.by_label.items() if label[0] == "value" and 2 <= v.size <= LARGEST}
    found: dict[Label, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for (_, slot), value in values.items():
            for name, function in _FUNCTIONS.items():
                found["helper", name, slot] = function(value)
            for axis in range(value.ndim):
                shifted = value - value.max(axis=axis, keepdims=True)
                raised = np.exp(shifted)
                found["helper", f"x-max {axis}", slot] = shifted
                found["helper", f"exp(x-max) {axis}", slot] = raised
                found["helper", f"softmax {axis}", slot] = raised / raised.sum(axis=axis, keepdims=True)
                found["helper", f"x-mean {axis}", slot] = value - value.mean(axis=axis, keepdims=True)
                for how, of in (("sum", np.sum), ("mean", np.mean), ("max", np.max)):
                    found["helper", f"{how} {axis}", slot] = of(value, axis=axis)
                found["helper", f"sum exp {axis}", slot] = np.exp(value).sum(axis=axis)
                found["helper", f"norm {axis}", slot] = np.sqrt((value**2).sum(axis=axis))
    return {label: v for label, v in found.items() if np.all(np.isfinite(v))}
