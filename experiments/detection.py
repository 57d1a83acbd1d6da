"""Which gradient checker sees a wrong gradient, and ours also says which step of the derivation is wrong.

A zoo of hand-derived gradients of seven losses: right ones, written on several routes and in both floating
types, and wrong ones, each with one or two mistakes that people make. Every gradient is tried at random
parameters, at trained ones, where the gradient is nearly zero, and at saturated ones. A checker should
refuse every wrong gradient and no right one. `jax.test_util.check_grads` is called as it is, with its own
tolerances for float32 and float64; `scipy.optimize.check_grad` returns a number without a verdict, here
refused above 1e-6; the criteria of `torch.autograd.gradcheck` and of HIPS autograd's `check_grads` are applied
to the same central differences with their default tolerances, since neither package is needed otherwise.
Every checker sees the same gradients, those computed in float32 among them.

For our checker the study also counts how often it names the right cause and the right line.
"""

import inspect
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import COUNT, EXACT, ROUNDING, SECONDS
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support import checkers
from experiments.support.exact import decimals, dyadic, normal, sigmoid
from jaxgrad.check import check_gradient


@dataclass(frozen=True)
class Config:
    """Size of the zoo."""

    species: tuple[str, ...] = (
        "linear",
        "logistic",
        "cross entropy",
        "softmax",
        "two-layer net",
        "deep net",
        "poisson",
    )
    """Losses."""
    seeds: int = 12
    """Data and parameters drawn this many times for the right gradients."""
    wrong_seeds: int = 1
    """The same for the wrong ones."""
    examples: int = 24
    """Examples in each data set."""
    train_steps: int = 400
    """Descent steps to the trained point."""
    cold: bool = True
    """Whether to time the first check of a fresh process, compile included."""


TIMED = True
QUICK = Config(species=("logistic",), seeds=1, train_steps=100, cold=False)
NUMBERS = {
    "seconds_*": SECONDS, "smallest_detectable": ROUNDING, "alarms_of_ours": EXACT, "judges": EXACT,
    "kinds": EXACT, "misjudged": EXACT, "misplaced": EXACT, "missed_by_us": EXACT, "mistakes": EXACT,
    "points": EXACT, "right_*": COUNT, "with_*": COUNT, "caught": COUNT, "confusion": COUNT,
    "correct": EXACT, "false_alarms": COUNT, "planted": EXACT,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
POINTS = ("random", "trained", "saturated")


# ------------------------------------------------------------------------------------------ the losses
# The comments at the end of lines name the steps, for the expected places below.


def linear_loss(p: Any, batch: Any) -> Any:
    X, y = batch
    r = X @ p["w"] + p["b"] - y  # residual
    return jnp.mean(r**2)  # mean


def logistic_loss(p: Any, batch: Any) -> Any:
    X, y = batch
    z = X @ p["w"] + p["b"]  # logit
    return jnp.mean(jax.nn.softplus(z) - y * z)  # mean


def cross_entropy_loss(p: Any, batch: Any) -> Any:
    X, y = batch
    h = X @ p["w"] + p["b"]  # logit
    s = jax.nn.sigmoid(h)  # sigmoid
    return -jnp.mean(y * jnp.log(s) + (1 - y) * jnp.log(1 - s))  # mean


def softmax_loss(p: Any, batch: Any) -> Any:
    X, Y = batch
    z = X @ p["W"] + p["b"][None, :]  # logit
    log_q = jax.nn.log_softmax(z, axis=1)  # softmax
    return -jnp.mean(jnp.sum(Y * log_q, axis=1))  # mean


def two_layer_loss(p: Any, batch: Any) -> Any:
    X, Y = batch
    z = X @ p["W1"] + p["b1"][None, :]  # hidden
    a = jax.nn.sigmoid(z)  # activation
    out = a @ p["W2"] + p["b2"][None, :]  # output
    return 0.5 * jnp.mean(jnp.sum((out - Y) ** 2, axis=1))  # mean


def deep_loss(p: Any, batch: Any) -> Any:
    X, y = batch
    z1 = X @ p["W1"]  # hidden1
    a1 = jnp.tanh(z1)  # activation1
    z2 = a1 @ p["W2"]  # hidden2
    a2 = jnp.tanh(z2)  # activation2
    out = a2 @ p["w3"]  # output
    return jnp.mean((out - y) ** 2)  # mean


def poisson_loss(p: Any, batch: Any) -> Any:
    X, y = batch
    eta = X @ p["w"] + p["b"]  # rate
    data = jnp.mean(jnp.exp(eta) - y * eta)  # mean
    penalty = 0.05 * jnp.sum(p["w"] ** 2)  # penalty
    return data + penalty  # total


# -------------------------------------------------------------------------------- the hand derivations


def _sigmoid(x: Any) -> Any:
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def linear_hand(bug: str, p: Any, batch: Any) -> Any:
    X, y = batch
    n = len(y)
    r = X @ p["w"] + p["b"] - y
    if bug == "y left out":
        r = r + y
    slope = {"square' left out": np.ones_like(r), "sign of r lost": 2 * np.abs(r)}.get(bug, 2 * r)
    w, b = X.T @ slope / n, slope.mean()
    if bug == "X left out":
        w = np.full_like(w, slope.mean())
    if bug == "last example left out":
        w = X[:-1].T @ slope[:-1] / n
    if bug == "rows shifted by one":
        w = np.roll(X, 1, axis=0).T @ slope / n
    if bug == "l2 added":
        w = w + p["w"] * w.dtype.type(0.1)
    if bug == "one entry zero":
        w = np.where(np.arange(len(w)) == 1, w.dtype.type(0), w)
    if bug == "bias summed":
        b = slope.sum()
    if bug == "one entry off by 1e-6":
        w = w * np.where(np.arange(len(w)) == 2, 1 + 1e-6, 1)
    return {"w": w, "b": b}


def logistic_hand(bug: str, p: Any, batch: Any) -> Any:
    X, y = batch
    n = len(y)
    z = X @ p["w"] + p["b"]
    s = _sigmoid(z)
    d = s - y
    if bug == "as the lecture prints it":
        s = 1 / (1 + np.exp(-z))
        d = -(y / s - (1 - y) / (1 - s)) * s * (1 - s)
    if bug == "sigmoid' once too often":
        d = d * s * (1 - s)
    if bug == "y left out":
        d = s
    if bug == "plus y":
        d = s + y
    if bug == "z for sigmoid(z)":
        d = z - y
    if bug == "tanh for sigmoid":
        d = np.tanh(z) - y
    w, b = X.T @ d / n, d.mean()
    if bug == "X left out":
        w = np.full_like(w, d.mean())
    if bug == "bias zero":
        b = 0 * b
    if bug == "bias negated":
        b = -b
    return {"w": w, "b": b}


def cross_entropy_hand(bug: str, p: Any, batch: Any) -> Any:
    X, y = batch
    n = len(y)
    h = X @ p["w"] + p["b"]
    s = _sigmoid(h)
    if bug == "":
        d = s - y
    else:
        back = -(y / s - (1 - y) / (1 - s))
        if bug == "(1 - y) term left out":
            back = -(y / s)
        if bug == "(1 - y) term negated":
            back = -(y / s + (1 - y) / (1 - s))
        slope = {
            "sigmoid' left out": 1,
            "sigmoid' at its output": _sigmoid(s) * (1 - _sigmoid(s)),
            "sigmoid' squared": (s * (1 - s)) ** 2,
            "tanh' for sigmoid'": 1 - s**2,
            "1 - s left out": s,
            "h for s": h * (1 - h),
        }.get(bug, s * (1 - s))
        d = back * slope
    return {"w": X.T @ d / n, "b": d.mean()}


def softmax_hand(bug: str, p: Any, batch: Any) -> Any:
    X, Y = batch
    n, k = Y.shape
    z = X @ p["W"] + p["b"]
    e = np.exp(z - z.max(axis=1, keepdims=True))
    q = e / e.sum(axis=1, keepdims=True)
    d = (q - Y) / n
    if bug == "Y left out":
        d = q / n
    if bug == "q left out":
        d = -Y / n
    if bug == "q' once too often":
        d = d * q * (1 - q)
    if bug == "divided by k too":
        d = d / k
    if bug == "class 0 left out":
        d = d * (np.arange(k) != 0)
    W, b = X.T @ d, d.sum(axis=0)
    if bug == "bias averaged":
        b = d.mean(axis=0)
    if bug == "W negated":
        W = -W
    if bug == "by columns":
        W = W.reshape(-1).reshape(W.shape, order="F")
    if bug == "W zero":
        W = 0 * W
    if bug == "one column of W zero":
        W = W * (np.arange(k) != 1)
    return {"W": W, "b": b}


def two_layer_hand(bug: str, p: Any, batch: Any) -> Any:
    X, Y = batch
    n = len(X)
    z = X @ p["W1"] + p["b1"]
    a = _sigmoid(z)
    out = a @ p["W2"] + p["b2"]
    d_out = (out - Y) / n
    d_a = d_out @ p["W2"].T
    if bug == "W2^T left out":
        d_a = d_out @ np.ones_like(p["W2"]).T
    s = _sigmoid(a)
    slope = {
        "sigmoid' left out": 1,
        "sigmoid' at its output": s * (1 - s),
        "sigmoid' squared": (a * (1 - a)) ** 2,
        "tanh' for sigmoid'": 1 - a**2,
        "z for a in sigmoid'": z * (1 - z),
        "sigmoid' left out, n too large": n,
    }.get(bug, a * (1 - a))
    d_z = d_a * slope
    if bug == "hidden branch negated":
        d_z = -d_z
    if bug == "hidden branch doubled":
        d_z = 2 * d_z
    W2 = (z if bug == "z for a" else a).T @ d_out
    b2, b1, W1 = d_out.sum(axis=0), d_z.sum(axis=0), X.T @ d_z
    if bug == "hidden bias averaged":
        b1 = d_z.mean(axis=0)
    if bug == "hidden bias from d_a":
        b1 = d_a.sum(axis=0)
    if bug == "W1 off by 1e-8":
        W1 = W1 * (1 + 1e-8)
    if bug == "two mistakes":
        W2, b1 = -W2, 0 * b1
    if bug == "sigmoid' left out, n too large":
        W2, b2 = n * W2, n * b2
    return {"W1": W1, "b1": b1, "W2": W2, "b2": b2}


def deep_hand(bug: str, p: Any, batch: Any) -> Any:
    X, y = batch
    n = len(y)
    z1 = X @ p["W1"]
    a1 = np.tanh(z1)
    z2 = a1 @ p["W2"]
    a2 = np.tanh(z2)
    d_out = 2 * (a2 @ p["w3"] - y) / n
    d_a2 = np.outer(d_out, p["w3"])
    if bug == "w3 left out":
        d_a2 = np.outer(d_out, np.ones_like(p["w3"]))
    slope2 = {
        "both tanh' left out": np.ones_like(a2),
        "tanh' of layer 2 at z1": 1 - np.tanh(z1) ** 2,
        "sigmoid' for tanh'": a2 * (1 - a2),
    }.get(bug, 1 - a2**2)
    d_z2 = d_a2 * slope2
    d_a1 = d_z2 @ (p["W2"] if bug == "W2 not transposed" else p["W2"].T)
    if bug == "W2 left out":
        d_a1 = d_z2
    slope1 = {"tanh' of layer 1 left out": np.ones_like(a1), "both tanh' left out": np.ones_like(a1)}.get(
        bug, 1 - a1**2
    )
    d_z1 = d_a1 * slope1
    W1, W2, w3 = X.T @ d_z1, (z1 if bug == "z1 for a1" else a1).T @ d_z2, a2.T @ d_out
    if bug == "W2's gradient transposed":
        W2 = W2.T
    if bug == "W1 and W2 swapped":
        W1, W2 = W2, W1
    return {"W1": W1, "W2": W2, "w3": w3}


def poisson_hand(bug: str, p: Any, batch: Any) -> Any:
    X, y = batch
    n = len(y)
    eta = X @ p["w"] + p["b"]
    d = np.exp(eta) - y
    if bug == "exp' left out":
        d = 1 - y
    if bug == "y left out":
        d = np.exp(eta)
    if bug == "eta for exp(eta)":
        d = eta - y
    strength = {"penalty left out": 0.0, "penalty's 2 left out": 0.05, "penalty negated": -0.1}.get(bug, 0.1)
    w, b = X.T @ d / n, d.mean()
    w = w + p["w"] * w.dtype.type(strength)
    if bug == "bias penalised":
        b = b + p["b"] * b.dtype.type(0.1)
    if bug == "data term summed":
        w, b = (w - p["w"] * w.dtype.type(strength)) * n + p["w"] * w.dtype.type(strength), b * n
    return {"w": w, "b": b}


class Species(NamedTuple):
    """One loss with its derivation and what can go wrong in it."""

    name: str
    loss: Callable[..., Any]
    hand: Callable[[str, Any, Any], Any]
    draw: Callable[[np.random.Generator, int], tuple[Any, Any]]
    bugs: dict[str, tuple[tuple[str, ...], tuple[str, ...]]]
    """For each mistake the kinds that name it and the steps where it may be placed (none: no place)."""
    train: float
    """Step size to the trained point."""


def _vector(rng: np.random.Generator, n: int, kind: str) -> tuple[Any, Any]:
    X = normal(rng, (n, 4))
    p = {"w": 0.7 * normal(rng, 4), "b": np.asarray(0.3 * normal(rng, ()))}
    signal = X @ normal(rng, 4)
    if kind == "binary":
        y = (rng.random(n) < sigmoid(signal)).astype(float)
    elif kind == "count":
        y = rng.poisson(decimals(np.exp(0.3 * signal))).astype(float)
    else:
        y = signal + 0.3 * normal(rng, n)
    return p, (X, y)


def _classes(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    X = normal(rng, (n, 4))
    labels = np.argmax(X @ normal(rng, (4, 3)) + rng.gumbel(size=(n, 3)), axis=1)
    return {"W": normal(rng, (4, 3)), "b": normal(rng, 3)}, (X, np.eye(3)[labels])


def _net(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    X = normal(rng, (n, 4))
    p = {
        "W1": normal(rng, (4, 6)),
        "b1": normal(rng, 6),
        "W2": normal(rng, (6, 3)),
        "b2": normal(rng, 3),
    }
    return p, (X, dyadic(np.sin(X[:, :3])) + 0.1 * normal(rng, (n, 3)))


def _deep(rng: np.random.Generator, n: int) -> tuple[Any, Any]:
    X = normal(rng, (n, 5))
    p = {
        "W1": 0.6 * normal(rng, (5, 5)),
        "W2": 0.6 * normal(rng, (5, 5)),
        "w3": normal(rng, 5),
    }
    return p, (X, dyadic(np.sin(X[:, 0])) + 0.1 * normal(rng, n))


COMMON: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all negated": (("sign",), ()),
    "all doubled": (("scale",), ()),
    "1/n left out": (("scale",), ()),
    "1/n twice": (("scale",), ()),
    "all zero": (("missing-term",), ()),
}
"""Mistakes in the whole gradient: no line is expected of them."""

SPECIES = (
    Species(
        "linear",
        linear_loss,
        linear_hand,
        lambda rng, n: _vector(rng, n, "real"),
        {
            **COMMON,
            "y left out": (("wrong-value", "missing-term"), ("residual", "mean")),
            "square' left out": (("missing-derivative",), ("mean",)),
            "sign of r lost": (("wrong-derivative",), ("mean",)),
            "X left out": (("missing-factor",), ("residual",)),
            "last example left out": (("missing-term",), ("residual", "mean")),
            "rows shifted by one": (("wrong-value",), ("residual",)),
            "l2 added": (("additive",), ()),
            "one entry zero": (("entries", "missing-term"), ("residual",)),
            "bias summed": (("scale",), ("residual", "mean")),
            "one entry off by 1e-6": (("entries",), ("residual",)),
        },
        0.1,
    ),
    Species(
        "logistic",
        logistic_loss,
        logistic_hand,
        lambda rng, n: _vector(rng, n, "binary"),
        {
            **COMMON,
            "sigmoid' once too often": (("extra-derivative",), ("logit", "mean")),
            "y left out": (("missing-term",), ("mean",)),
            "plus y": (("negated-term",), ("mean",)),
            "z for sigmoid(z)": (("wrong-derivative", "wrong-value"), ("mean",)),
            "tanh for sigmoid": (("wrong-derivative",), ("mean",)),
            "X left out": (("missing-factor",), ("logit",)),
            "as the lecture prints it": (("unstable",), ()),
            "bias zero": (("missing-term",), ("logit",)),
            "bias negated": (("sign",), ("logit", "mean")),
        },
        0.5,
    ),
    Species(
        "cross entropy",
        cross_entropy_loss,
        cross_entropy_hand,
        lambda rng, n: _vector(rng, n, "binary"),
        {
            **COMMON,
            "(1 - y) term left out": (("missing-term",), ("mean",)),
            "(1 - y) term negated": (("negated-term",), ("mean",)),
            "sigmoid' left out": (("missing-derivative",), ("sigmoid",)),
            "sigmoid' at its output": (("wrong-argument",), ("sigmoid",)),
            "sigmoid' squared": (("extra-derivative",), ("sigmoid", "logit")),
            "tanh' for sigmoid'": (("wrong-derivative",), ("sigmoid",)),
            "1 - s left out": (("missing-factor",), ("sigmoid",)),
            "h for s": (("wrong-value",), ("sigmoid",)),
        },
        0.5,
    ),
    Species(
        "softmax",
        softmax_loss,
        softmax_hand,
        _classes,
        {
            **COMMON,
            "Y left out": (("missing-term",), ("softmax", "mean")),
            "q left out": (("missing-term", "missing-derivative"), ("softmax",)),
            "q' once too often": (("extra-derivative",), ("logit", "softmax")),
            "divided by k too": (("scale",), ()),
            "class 0 left out": (("missing-term",), ("logit", "softmax", "mean")),
            "bias averaged": (("scale",), ("logit", "mean")),
            "W negated": (("sign",), ("logit",)),
            "by columns": (("transposed",), ("logit",)),
            "W zero": (("missing-term",), ("logit",)),
            "one column of W zero": (("missing-term", "entries"), ("logit",)),
        },
        0.5,
    ),
    Species(
        "two-layer net",
        two_layer_loss,
        two_layer_hand,
        _net,
        {
            **COMMON,
            "W2^T left out": (("missing-factor",), ("output",)),
            "sigmoid' left out": (("missing-derivative",), ("activation",)),
            "sigmoid' at its output": (("wrong-argument",), ("activation",)),
            "sigmoid' squared": (("extra-derivative",), ("activation", "hidden")),
            "tanh' for sigmoid'": (("wrong-derivative",), ("activation",)),
            "z for a in sigmoid'": (("wrong-value",), ("activation",)),
            "hidden branch negated": (("negated-term",), ("output", "activation")),
            "hidden branch doubled": (("scaled-term",), ("output", "activation")),
            "z for a": (("wrong-value",), ("output",)),
            "hidden bias averaged": (("scale",), ("hidden", "mean")),
            "hidden bias from d_a": (("missing-derivative",), ("activation",)),
            "W1 off by 1e-8": (("scale",), ()),
            "two mistakes": (("sign", "missing-term"), ("output", "hidden")),
            "sigmoid' left out, n too large": (("missing-derivative",), ("activation",)),
        },
        0.5,
    ),
    Species(
        "deep net",
        deep_loss,
        deep_hand,
        _deep,
        {
            **COMMON,
            "w3 left out": (("missing-factor",), ("output",)),
            "both tanh' left out": (("missing-derivative",), ("activation1", "activation2")),
            "tanh' of layer 2 at z1": (("wrong-value",), ("activation2",)),
            "sigmoid' for tanh'": (("wrong-derivative",), ("activation2",)),
            "W2 not transposed": (("transposed",), ("hidden2",)),
            "W2 left out": (("missing-factor",), ("hidden2",)),
            "tanh' of layer 1 left out": (("missing-derivative",), ("activation1",)),
            "z1 for a1": (("wrong-value",), ("hidden2",)),
            "W2's gradient transposed": (("transposed",), ("hidden2",)),
            "W1 and W2 swapped": (("swapped-leaves",), ()),
        },
        0.2,
    ),
    Species(
        "poisson",
        poisson_loss,
        poisson_hand,
        lambda rng, n: _vector(rng, n, "count"),
        {
            **COMMON,
            "exp' left out": (("missing-derivative",), ("mean",)),
            "y left out": (("missing-term",), ("mean",)),
            "eta for exp(eta)": (("wrong-derivative", "wrong-value"), ("mean",)),
            "penalty left out": (("missing-term",), ("penalty", "total")),
            "penalty's 2 left out": (("scaled-term",), ("penalty", "total")),
            "penalty negated": (("negated-term",), ("penalty", "total")),
            "bias penalised": (("additive",), ()),
            "data term summed": (("scaled-term",), ("mean", "total")),
        },
        0.1,
    ),
)


def wrong_gradient(species: Species, bug: str) -> Callable[[Any, Any], Any]:
    """The derivation with one mistake."""

    def gradient(p: Any, batch: Any) -> Any:
        n = len(batch[1])
        right = bug in COMMON
        g = species.hand("" if right else bug, p, batch)
        factor = {"all negated": -1, "all doubled": 2, "1/n left out": n, "1/n twice": 1 / n, "all zero": 0}.get(bug, 1)
        return {k: np.asarray(v * np.asarray(factor, np.asarray(v).dtype)) for k, v in g.items()}

    return gradient


def right_gradients(species: Species) -> dict[str, Callable[[Any, Any], Any]]:
    """The right derivation on several routes."""

    def single(p: Any, batch: Any) -> Any:
        return species.hand("", {k: np.float32(v) for k, v in p.items()}, tuple(np.float32(a) for a in batch))

    def by_example(p: Any, batch: Any) -> Any:
        X, y = batch
        parts = [species.hand("", p, (X[i : i + 1], y[i : i + 1])) for i in range(len(X))]
        return {k: sum(part[k] for part in parts) / len(parts) for k in parts[0]}

    return {
        "by hand, numpy": lambda p, batch: species.hand("", p, batch),
        "by hand, float32": single,
        "mean over examples": by_example,
        "autodiff": _autodiff(species.loss),
    }


def _autodiff(loss: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return jax.jit(jax.grad(loss))


# ------------------------------------------------------------------------------------------ the judges


JUDGES = ("jaxgrad", *checkers.BY_JAX, *checkers.BY_CRITERION)


def _points(species: Species, seed: int, config: Config) -> list[tuple[str, Any, Any]]:
    """Random, trained and saturated parameters with their data."""
    rng = np.random.default_rng([20210407, seed, sum(map(ord, species.name))])
    p, batch = species.draw(rng, config.examples)
    step = _descent(species.loss, species.train, config.train_steps)
    # Rounded: every machine judges the gradient at the same point.
    trained = {k: dyadic(v, 26) for k, v in step(p, batch).items()}
    # Saturated: what the exponentials see is an order of magnitude larger; counts would overflow sooner.
    factor = 3.0 if species.name == "poisson" else 20.0
    return [
        ("random", p, batch),
        ("trained", trained, batch),
        ("saturated", {k: factor * v for k, v in p.items()}, batch),
    ]


_DESCENTS: dict[Any, Any] = {}


def _descent(loss: Callable[..., Any], eta: float, steps: int) -> Any:
    if (loss, eta, steps) not in _DESCENTS:

        def descend(p: Any, batch: Any) -> Any:
            move = lambda _, q: jax.tree.map(lambda a, g: a - eta * g, q, jax.grad(loss)(q, batch))  # noqa: E731
            return jax.lax.fori_loop(0, steps, move, p)

        _DESCENTS[loss, eta, steps] = jax.jit(descend)
    return _DESCENTS[loss, eta, steps]


def _lines(loss: Callable[..., Any]) -> dict[str, int]:
    source, first = inspect.getsourcelines(loss)
    return {line.split("# ")[1].strip(): first + i for i, line in enumerate(source) if "  # " in line}


def run(config: Config, session: Session) -> dict[str, Any]:
    """Judge the whole zoo."""
    kinds: list[str] = []
    rows: list[dict[str, Any]] = []
    with jax.enable_x64(True):
        for species in (s for s in SPECIES if s.name in config.species):
            session.say(f"{species.name}: {len(species.bugs)} mistakes, {len(right_gradients(species))} right routes")
            rows += _judge_species(species, config, session)
    wrong = [r for r in rows if r["wrong"]]
    right = [r for r in rows if not r["wrong"]]
    caught = np.array([[sum(not r[j] for r in wrong if r["point"] == p) for p in POINTS] for j in JUDGES])
    alarms = np.array([[sum(not r[j] for r in right if r["point"] == p) for p in POINTS] for j in JUDGES])
    planted = np.array([sum(r["point"] == p for r in wrong) for p in POINTS])
    correct = np.array([sum(r["point"] == p for r in right) for p in POINTS])
    named = [r for r in wrong if r["expected"]]
    kinds = sorted({r["expected"][0] for r in named} | {r["found"] for r in named})
    confusion = np.zeros((len(kinds), len(kinds)), int)
    for r in named:
        truth = r["found"] if r["found"] in r["expected"] else r["expected"][0]
        confusion[kinds.index(truth), kinds.index(r["found"])] += 1
    placed = [r for r in wrong if r["places"]]
    numbers: dict[str, Any] = {
        "judges": list(JUDGES),
        "points": list(POINTS),
        "caught": caught,
        "false_alarms": alarms,
        "planted": planted,
        "correct": correct,
        "kinds": kinds,
        "confusion": confusion,
        "right_cause": int(sum(r["found"] in r["expected"] for r in named)),
        "with_cause": len(named),
        "right_line": int(sum(r["line"] in r["places"] for r in placed)),
        "with_line": len(placed),
        "mistakes": sorted({f"{r['species']}: {r['bug']}" for r in wrong}),
        "misjudged": sorted(
            {
                f"{r['species']}: {r['bug']} ({r['point']}): {r['found']}"
                for r in named
                if r["found"] not in r["expected"]
            }
        ),
        "misplaced": sorted(
            {
                f"{r['species']}: {r['bug']} ({r['point']}): line {r['line']}"
                for r in placed
                if r["line"] not in r["places"]
            }
        ),
        "missed_by_us": sorted({f"{r['species']}: {r['bug']} ({r['point']})" for r in wrong if r["jaxgrad"]}),
        "alarms_of_ours": sorted(
            {f"{r['species']}: {r['bug']} ({r['point']}): {r['found']}" for r in right if not r["jaxgrad"]}
        ),
        "smallest_detectable": float(max(r["smallest"] for r in right if "float32" not in r["bug"])),
        "seconds_warm": float(np.median([r["seconds"] for r in right])),
        "seconds_warm_wrong": float(np.median([r["seconds"] for r in wrong])),
    }
    if config.cold:
        session.say("the first check of a fresh process, compile included")
        with session.alone():
            numbers["seconds_verdict"] = np.array([_cold("") for _ in range(3)])
            numbers["seconds_diagnosis"] = np.array([_cold("sigmoid' left out") for _ in range(3)])
    return numbers


def _judge_species(species: Species, config: Config, session: Session) -> list[dict[str, Any]]:
    lines = _lines(species.loss)
    value = jax.jit(species.loss)
    rows = []
    for seed in range(max(config.seeds, config.wrong_seeds)):
        for name, p, batch in _points(species, seed, config):
            flat, rebuild = _flatten(p)
            at = lambda x, r=rebuild, b=batch: float(value(r(x), b))  # noqa: E731
            known = checkers.differences(at, flat, np.random.default_rng(seed))
            zoo = (
                [(bug, True, wrong_gradient(species, bug)) for bug in species.bugs] if seed < config.wrong_seeds else []
            )
            if seed < config.seeds:
                zoo += [(route, False, g) for route, g in right_gradients(species).items()]
            for bug, is_wrong, gradient in zoo:
                row = _one(species, bug, is_wrong, gradient, p, batch, known, value, session)
                row["point"] = name
                row["places"] = {lines.get(tag, 0) for tag in species.bugs[bug][1]} if is_wrong else set()
                rows.append(row)
    return rows


def _one(
    species: Species,
    bug: str,
    is_wrong: bool,
    gradient: Any,
    p: Any,
    batch: Any,
    known: Any,
    value: Any,
    session: Session,
) -> dict[str, Any]:
    with session.alone():
        start = time.perf_counter()
        report = check_gradient(species.loss, gradient, p, batch)
        seconds = time.perf_counter() - start
    with np.errstate(all="ignore"):
        g = np.concatenate([np.asarray(v, np.float64).reshape(-1) for v in (dict(gradient(p, batch))[k] for k in p)])
    first = report.findings[0] if report.findings else None
    where = first.where.rpartition(":")[2] if first is not None else ""
    return {
        "species": species.name,
        "bug": bug,
        "wrong": is_wrong,
        "expected": species.bugs[bug][0] if is_wrong else (),
        "found": first.kind if first is not None else "none",
        "line": int(where) if where else 0,
        "jaxgrad": report.ok,
        "smallest": report.smallest_detectable,
        "seconds": seconds,
        **{
            judge: checkers.jax_accepts(value, gradient, p, (batch,), dtype) for judge, dtype in checkers.BY_JAX.items()
        },
        **checkers.accepts(known, g),
    }


def _flatten(p: Any) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
    names, shapes = list(p), [np.shape(v) for v in p.values()]
    flat = np.concatenate([np.asarray(v).reshape(-1) for v in p.values()])

    def rebuild(x: np.ndarray) -> Any:
        out, at = {}, 0
        for name, shape in zip(names, shapes, strict=True):
            size = int(np.prod(shape))
            out[name] = x[at : at + size].reshape(shape)
            at += size
        return out

    return flat, rebuild


def _cold(bug: str) -> float:
    """Seconds of the first check of the two-layer net in a process of its own, imports not counted."""
    code = (
        "import time, jax, numpy as np\n"
        "from experiments import detection as d\n"
        "import jaxgrad.check.gradient\n"
        "s = next(s for s in d.SPECIES if s.name == 'two-layer net')\n"
        "p, batch = s.draw(np.random.default_rng(0), 24)\n"
        f"g = lambda p, b: s.hand({bug!r}, p, b)\n"
        "start = time.perf_counter()\n"
        "r = d.check_gradient(s.loss, g, p, batch)\n"
        "print(time.perf_counter() - start)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.strip().splitlines()[-1])


def claims(numbers: dict[str, Any]) -> list[Claim]:
    """What the zoo shows."""
    caught, planted = np.asarray(numbers["caught"]), np.asarray(numbers["planted"])
    alarms, correct = np.asarray(numbers["false_alarms"]), np.asarray(numbers["correct"])
    cause = numbers["right_cause"] / numbers["with_cause"]
    line = numbers["right_line"] / numbers["with_line"]
    found = [
        Claim(
            "detection",
            f"Our checker refuses every one of {planted.sum()} wrong gradients.",
            f"{caught[0].sum()} refused",
            f"{planted.sum()}",
            bool(caught[0].sum() == planted.sum()),
        ),
        Claim(
            "false alarms",
            f"It refuses none of {correct.sum()} right gradients.",
            f"{alarms[0].sum()} refused",
            "0",
            bool(alarms[0].sum() == 0),
        ),
        Claim(
            "power",
            "In float64 it would have seen an error of 1e-8 in any leaf, at every point.",
            f"{numbers['smallest_detectable']:.1e}",
            "at most 1e-8",
            bool(numbers["smallest_detectable"] <= 1e-8),
        ),
        Claim("cause", "It names the right cause.", f"{cause:.1%}", "at least 95%", bool(cause >= 0.95)),
        Claim("line", "It names the right line of the loss.", f"{line:.1%}", "at least 90%", bool(line >= 0.9)),
    ]
    others = caught[1:].sum(axis=1)
    best = int(np.argmax(others))
    found.append(
        Claim(
            "others",
            "No other checker refuses as many of them.",
            f"{others[best]} by {numbers['judges'][1 + best]}",
            f"fewer than {planted.sum()}",
            bool(others[best] < planted.sum()),
        )
    )
    if "seconds_verdict" in numbers:
        verdict, diagnosis = (
            float(np.median(numbers["seconds_verdict"])),
            float(np.median(numbers["seconds_diagnosis"])),
        )
        found.append(
            Claim(
                "verdict time",
                "The first verdict on a two-layer net, compile included, takes at most 1 s.",
                f"{verdict:.2f} s",
                "at most 1 s",
                verdict <= 1.0,
            )
        )
        found.append(
            Claim(
                "diagnosis time",
                "The first diagnosis, compile included, takes at most 3 s.",
                f"{diagnosis:.2f} s",
                "at most 3 s",
                diagnosis <= 3.0,
            )
        )
    return found


def draw(numbers: dict[str, Any]) -> Figure:
    """Left: wrong gradients let through. Right: what was planted against what was named."""
    judges, points = list(numbers["judges"]), list(numbers["points"])
    caught, planted = np.asarray(numbers["caught"]), np.asarray(numbers["planted"])
    alarms, correct = np.asarray(numbers["false_alarms"]), np.asarray(numbers["correct"])
    figure, (left, right) = plots.figure(2, height=4.9, width_ratios=(1.15, 1))
    rows = np.arange(len(judges))
    colours = (plots.BLUE, plots.ORANGE, plots.VERMILLION)
    height = 0.25
    for i, (point, colour) in enumerate(zip(points, colours, strict=True)):
        missed = 100 * (planted[i] - caught[:, i]) / planted[i]
        at = rows + (i - 1) * height
        left.barh(at, missed, height * 0.9, color=colour, label=f"{point} parameters")
        for y, share, count in zip(at, missed, planted[i] - caught[:, i], strict=True):
            left.text(share + 1, y, f"{count}", va="center", fontsize=7.5, color=plots.ink(colour))
    names = [
        f"{judge}\n{alarms[j].sum()} false alarm{'' if alarms[j].sum() == 1 else 's'}" for j, judge in enumerate(judges)
    ]
    left.set_yticks(rows, names, fontsize=8)
    left.get_yticklabels()[0].set_fontweight("bold")
    left.invert_yaxis()
    left.grid(axis="y", visible=False)
    most = float(np.max(100 * (planted[None, :] - caught) / planted[None, :]))
    left.set_xlim(0, max(10.0, 1.15 * most))
    left.set_xlabel(f"let through, % of {planted[0]} at each kind of point")
    left.set_title(f"{planted.sum()} wrong, {correct.sum()} right gradients")
    left.legend(fontsize=8, loc="lower right")
    kinds = list(numbers["kinds"])
    confusion = np.asarray(numbers["confusion"], float)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    right.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(len(kinds)):
        for j in range(len(kinds)):
            if confusion[i, j]:
                dark = share[i, j] > 0.6
                right.text(
                    j,
                    i,
                    f"{int(confusion[i, j])}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if dark else plots.BLACK,
                )
    right.set_xticks(range(len(kinds)), kinds, rotation=60, ha="right", fontsize=7.5)
    right.set_yticks(range(len(kinds)), kinds, fontsize=7.5)
    right.grid(visible=False)
    right.set_xlabel("diagnosis", fontsize=9)
    right.set_title("planted (rows) and named")
    return figure


def report(numbers: dict[str, Any]) -> str:
    """The detection matrix as a table, and what was misjudged."""
    judges = list(numbers["judges"])
    caught, planted = np.asarray(numbers["caught"]), np.asarray(numbers["planted"])
    alarms, correct = np.asarray(numbers["false_alarms"]), np.asarray(numbers["correct"])
    head = " | ".join(f"missed, {p}" for p in numbers["points"])
    lines = [f"| checker | {head} | missed in all | false alarms |", "|---|" + "---:|" * (len(numbers["points"]) + 2)]
    for j, judge in enumerate(judges):
        cells = " | ".join(str(int(m)) for m in planted - caught[j])
        lines.append(
            f"| {judge} | {cells} | {int((planted - caught[j]).sum())} of {planted.sum()} "
            f"| {int(alarms[j].sum())} of {correct.sum()} |"
        )
    cause, line = numbers["right_cause"] / numbers["with_cause"], numbers["right_line"] / numbers["with_line"]
    lines += [
        "",
        f"Of {numbers['with_cause']} wrong gradients ({len(numbers['mistakes'])} different mistakes) our checker names "
        f"the right cause for {cause:.1%}, and the right line for {line:.1%} of the {numbers['with_line']} that have "
        f"one. A check takes {1e3 * numbers['seconds_warm']:.0f} ms when the loss is compiled already "
        f"({1e3 * numbers['seconds_warm_wrong']:.0f} ms with a diagnosis).",
    ]
    for key, title in (
        ("missed_by_us", "Missed by us"),
        ("alarms_of_ours", "False alarms of ours"),
        ("misjudged", "Another cause named"),
        ("misplaced", "Another line named"),
    ):
        items: Sequence[str] = list(numbers[key])
        if items:
            lines += ["", f"{title}: " + "; ".join(items) + "."]
    return "\n".join(lines)


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
