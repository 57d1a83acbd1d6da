"""Mistakes in whole derivations as people report them: penalties, parameters, time steps, two mistakes at once."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgrad.check import check_gradient

rng = np.random.default_rng(99)


derived = functools.cache(lambda loss: jax.jit(jax.grad(loss)))
"""Autodiff's gradient of a loss, compiled once."""


def draw(*shape, scale=1.0):
    return scale * rng.normal(size=shape)


CASES = {}


def wrong(loss, params, batch, wanted, line=None):
    """Register a wrong gradient of `loss`; `wanted` holds the accepted (kind, leaf, factor), None for any."""

    def add(gradient):
        CASES[gradient.__name__] = (loss, gradient, params, batch, wanted, line)
        return gradient

    return add


def place(loss, text):
    lines, first = inspect.getsourcelines(loss)
    return next(first + i for i, code in enumerate(lines) if text in code)


X, y = draw(15, 3), draw(15)
ONES = np.c_[np.ones(15), X]

# ------------------------------------------------------------------------------------------ penalties and parameters


def spared_bias(theta, batch):
    X, y = batch
    fit = jnp.mean((X @ theta - y) ** 2)
    return fit + 0.15 * jnp.sum(theta[1:] ** 2)


@wrong(spared_bias, draw(4), (ONES, y), {("additive", "params", "0.3")})
def bias_penalised_too(theta, batch):
    X, y = batch
    return 2 * X.T @ (X @ theta - y) / len(y) + 0.3 * theta


def by_norm(p, batch):
    X, y = batch
    fit = jnp.mean((X @ p["w"] - y) ** 2)
    return fit + 0.2 * jnp.sqrt(jnp.sum(p["w"] ** 2))


@wrong(by_norm, {"w": draw(3)}, (X, y), {("missing-derivative", None, None)}, "jnp.sqrt")
def squared_norm_for_norm(p, batch):
    X, y = batch
    return {"w": 2 * X.T @ (X @ p["w"] - y) / len(y) + 0.2 * 2 * p["w"]}


def positive(p, batch):
    X, y = batch
    scale = jnp.exp(p["log_scale"])
    return jnp.mean((X @ p["w"] - y) ** 2) / scale**2 + p["log_scale"]


@wrong(
    positive,
    {"w": draw(3), "log_scale": np.float64(0.3)},
    (X, y),
    {("missing-derivative", "log_scale", None), ("missing-factor", "log_scale", None)},
)
def derivative_by_scale_for_log_scale(p, batch):
    X, y = batch
    s = np.exp(p["log_scale"])
    r = X @ p["w"] - y
    return {"w": 2 * X.T @ r / len(y) / s**2, "log_scale": (-2 * np.mean(r**2) / s**2 + 1) / s}


def lengths(p, batch):
    X, y = batch
    waves = jnp.cos(X / p["length"][None, :]) + jnp.tanh(X * p["length"][None, :])
    return jnp.mean((waves @ p["w"] - y) ** 2)


@wrong(
    lengths, {"w": draw(3), "length": np.abs(draw(3)) + 1}, (X, y), {("extra-derivative", "length", None)}, "jnp.cos"
)
def derivative_by_log_length(p, batch):
    g = derived(lengths)(p, batch)
    return {**g, "length": g["length"] * p["length"]}


def deep(p, batch):
    X, y = batch
    a = jnp.tanh(X @ p["W1"] + p["b1"][None, :])
    out = a @ p["w2"] + p["b2"]
    return jnp.mean((out - y) ** 2)


NET = {"W1": draw(3, 5), "b1": draw(5), "w2": draw(5), "b2": np.float64(0.2)}


@wrong(deep, NET, (X, y), {("scale", None, "n")})
def weights_not_averaged(p, batch):
    g = derived(deep)(p, batch)
    n = len(batch[1])
    return {**g, "W1": n * g["W1"], "w2": n * g["w2"]}


@wrong(deep, NET, (X, y), {("missing-derivative", None, None), ("sign", "b2", "-1")})
def slope_missing_and_bias_negated(p, batch):
    X, y = batch
    a = np.tanh(X @ p["W1"] + p["b1"])
    d = 2 * (a @ p["w2"] + p["b2"] - y) / len(y)
    dz = np.outer(d, p["w2"])
    return {"W1": X.T @ dz, "b1": dz.sum(axis=0), "w2": a.T @ d, "b2": -d.sum()}


def quadratic(w, batch):
    (A,) = batch
    q = w @ A @ w
    return 0.5 * q + jnp.sum(w)


@wrong(
    quadratic,
    draw(4),
    (draw(4, 4),),
    {("missing-term", None, None), ("scaled-term", None, "1/2"), ("transposed", None, None)},
    "q = w @ A @ w",
)
def only_half_of_a_quadratic_form(w, batch):
    (A,) = batch
    return 0.5 * A @ w + 1


# ------------------------------------------------------------------------------------------------------ time steps


def recurrent(p, batch):
    x, y = batch

    def step(h, x_t):
        h = jnp.tanh(x_t @ p["Wx"] + h @ p["Wh"])
        return h, None

    h, _ = lax.scan(step, jnp.zeros((x.shape[0], 4)), x.swapaxes(0, 1))
    return jnp.mean(jnp.sum((h @ p["Wy"] - y) ** 2, axis=1))


RNN = {"Wx": draw(3, 4, scale=0.7), "Wh": draw(4, 4, scale=0.6), "Wy": draw(4, 2)}
SERIES = (draw(8, 5, 3), draw(8, 2))


def backwards(slope=True, transpose=True, previous=True, carry=1.0):
    def gradient(p, batch):
        x, y = batch
        hs = [np.zeros((len(x), 4))]
        for t in range(x.shape[1]):
            hs.append(np.tanh(x[:, t] @ p["Wx"] + hs[-1] @ p["Wh"]))
        e = 2 * (hs[-1] @ p["Wy"] - y) / len(x)
        g = {"Wy": hs[-1].T @ e, "Wx": 0.0, "Wh": 0.0}
        d = e @ p["Wy"].T
        for t in reversed(range(x.shape[1])):
            dz = d * (1 - hs[t + 1] ** 2 if slope else 1)
            g["Wx"] = g["Wx"] + x[:, t].T @ dz
            g["Wh"] = g["Wh"] + hs[t if previous else t + 1].T @ dz
            d = carry * dz @ (p["Wh"].T if transpose else p["Wh"])
        return g

    return gradient


STEP = 'jnp.tanh(x_t @ p["Wx"]'
for name, how, kind in (
    ("slope_missing_at_every_step", {"slope": False}, "missing-derivative"),
    ("weights_not_transposed_at_every_step", {"transpose": False}, "transposed"),
    ("new_state_for_old_at_every_step", {"previous": False}, "wrong-value"),
    ("carry_negated", {"carry": -1.0}, "negated-term"),
    ("carry_missing", {"carry": 0.0}, "missing-term"),
):
    CASES[name] = (recurrent, backwards(**how), RNN, SERIES, {(kind, None, None)}, STEP)


def noted(p, batch):
    x, y = batch
    h = jnp.zeros((x.shape[0], 3))
    total = 0.0
    for t in range(x.shape[1]):
        h = jnp.tanh(x[:, t] @ p["Wx"] + h @ p["Wh"])
        total += jnp.mean(jnp.sum((h - y[:, t]) ** 2, axis=1))
    return total


@wrong(
    noted,
    {"Wx": draw(2, 3, scale=0.7), "Wh": draw(3, 3, scale=0.6)},
    (draw(6, 4, 2), draw(6, 4, 3)),
    {("missing-term", None, None)},
    "jnp.tanh(x[:, t]",
)
def carry_missing_with_a_loss_at_every_step(p, batch):
    x, y = batch
    h = np.zeros((len(x), 3))
    g = {"Wx": np.zeros((2, 3)), "Wh": np.zeros((3, 3))}
    for t in range(x.shape[1]):
        old, h = h, np.tanh(x[:, t] @ p["Wx"] + h @ p["Wh"])
        dz = 2 * (h - y[:, t]) / len(x) * (1 - h**2)
        g["Wx"] += x[:, t].T @ dz
        g["Wh"] += old.T @ dz
    return g


def spectrum(p, batch):
    x, y = batch
    a = jax.nn.softplus(x * p["w"][None, :])
    power = jnp.abs(jnp.fft.rfft(a, axis=1)) ** 2
    return jnp.mean((power @ p["v"] - y) ** 2)


def spectrum_without_slope(p, batch):
    x, y = batch
    z = x * p["w"][None, :]
    a = z + lax.stop_gradient(jax.nn.softplus(z) - z)
    power = jnp.abs(jnp.fft.rfft(a, axis=1)) ** 2
    return jnp.mean((power @ p["v"] - y) ** 2)


@wrong(
    spectrum,
    {"w": draw(6), "v": draw(4, scale=0.1)},
    (draw(12, 6), draw(12)),
    {("missing-derivative", "w", None)},
    "a = jax.nn.softplus",
)
def slope_missing_before_a_transform(p, batch):
    return derived(spectrum_without_slope)(p, batch)


def settled(p, batch):
    x, y = batch
    start = (jnp.zeros((x.shape[0], 3)), 0)
    drive = x @ p["U"]
    z, _ = lax.while_loop(lambda s: s[1] < 60, lambda s: (jnp.tanh(s[0] @ p["W"] + drive), s[1] + 1), start)
    return jnp.mean(jnp.sum((z - y) ** 2, axis=1))


@wrong(
    settled,
    {"W": draw(3, 3, scale=0.2), "U": draw(4, 3)},
    (draw(9, 4), draw(9, 3)),
    {("missing-term", None, None)},
    "lax.while_loop",
)
def last_step_of_a_fixed_point(p, batch):
    x, y = batch
    z, drive = np.zeros((len(x), 3)), x @ p["U"]
    for _ in range(60):
        z = np.tanh(z @ p["W"] + drive)
    d = 2 * (z - y) / len(x) * (1 - z**2)
    return {"W": z.T @ d, "U": x.T @ d}


@pytest.mark.parametrize("name", CASES)
def test_the_cause_is_named_with_its_leaf_and_factor(name):
    loss, gradient, params, batch, wanted, line = CASES[name]
    report = check_gradient(loss, gradient, params, batch)
    assert not report.ok
    for f in report.findings:
        fits = [w for w in wanted if all(a in (None, b) for a, b in zip(w, f[:3], strict=True))]
        assert fits, str(report)
    if line is not None:
        assert int(report.findings[0].where.split(":")[1]) == place(loss, line), str(report)


def test_an_unknown_cause_tells_what_is_known():
    def odd(p, batch):
        X, y = batch
        a = np.tanh(X @ p["W1"] + p["b1"])
        d = 2 * (a @ p["w2"] + p["b2"] - y) / len(y)
        dz = np.outer(d, p["w2"]) * np.cos(a) * np.sqrt(np.abs(a))
        return {"W1": X.T @ dz, "b1": dz.sum(axis=0), "w2": a.T @ d, "b2": d.sum()}

    report = check_gradient(deep, odd, NET, (X, y))
    (found,) = report.findings
    assert found.kind == "unknown"
    assert int(found.where.split(":")[1]) == place(deep, "a = jnp.tanh")
    assert "a wrong adjoint of" in found.sentence


def test_what_is_right_for_every_example_alone_is_said_to_be():
    def mixed(p, batch):
        X, y = batch
        a = np.tanh(X @ p["W1"] + p["b1"])
        d = 2 * (a @ p["w2"] + p["b2"] - y) / len(y)
        dz = np.outer(d, p["w2"]) * (1 - a**2).mean(axis=0)
        return {"W1": X.T @ dz, "b1": dz.sum(axis=0), "w2": a.T @ d, "b2": d.sum()}

    report = check_gradient(deep, mixed, NET, (X, y))
    assert report.findings[0].kind == "unknown"
    assert "any one example alone" in report.findings[0].sentence


def test_columns_with_factors_of_their_own_are_listed():
    def scaled(p, batch):
        g = derived(deep)(p, batch)
        return {**g, "W1": g["W1"] * jnp.array([1.0, 1.0, 3.0, 5.0, 1.0])[None, :]}

    report = check_gradient(deep, scaled, NET, (X, y))
    assert "column 2 is 3 times the true one, column 3 is 5 times the true one" in str(report).replace("\n    ", " ")
