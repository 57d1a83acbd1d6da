"""A zoo of hand-derived gradients of seven losses: right ones on several routes, and wrong ones.

A wrong gradient holds one or two mistakes that people make. Each has a name, the kinds that a report may call it by,
and the line of the loss where it lies, by the words that stand there in a comment.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.support.exact import decimals, dyadic, normal, sigmoid

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
