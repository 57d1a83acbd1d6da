"""Derivations as people write them down, in NumPy, each with one mistake: its kind, leaf, factor and line are named."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgrad.check import check_gradient

rng = np.random.default_rng(2024)


def draw(*shape, scale=1.0):
    return scale * rng.normal(size=shape)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


CASES = {}


def wrong(loss, params, batch, kinds, line, leaf=None, factor=None):
    """Register a wrong gradient: the accepted kinds, a piece of the line of the loss, the leaf and the factor."""

    def add(gradient):
        CASES[gradient.__name__] = (loss, gradient, params, batch, kinds, line, leaf, factor)
        return gradient

    return add


X, y = draw(12, 3), draw(12)
SIGNS = np.where(draw(12) > 0, 1.0, -1.0)
MASK = (np.arange(5)[None, :] < rng.integers(2, 6, size=8)[:, None]).astype(float)

# ------------------------------------------------------------------------------ factors that are left out


def dropped(p, batch):
    x, y, mask = batch
    h = jnp.maximum(x @ p["W"], 0.0)
    h = h * mask / 0.75
    return jnp.mean((h @ p["v"] - y) ** 2)


@wrong(
    dropped,
    {"W": draw(3, 4), "v": draw(4)},
    (X, y, (rng.random((12, 4)) > 0.3) * 1.0),
    {"missing-factor"},
    "h = h * mask",
    "W",
)
def dropout_forgotten_on_the_way_back(p, batch):
    x, y, mask = batch
    z = x @ p["W"]
    h = np.maximum(z, 0) * mask / 0.75
    d = 2 * (h @ p["v"] - y) / len(y)
    return {"W": x.T @ (np.outer(d, p["v"]) * (z > 0)), "v": h.T @ d}


def completed(p, batch):
    R, seen = batch
    error = seen * (p["U"] @ p["V"] - R)
    return 0.5 * jnp.sum(error**2) + 0.1 * jnp.sum(p["U"] ** 2)


@wrong(
    completed,
    {"U": draw(5, 2), "V": draw(2, 4)},
    (draw(5, 4), (rng.random((5, 4)) > 0.4) * 1.0),
    {"missing-factor"},
    "error = seen",
    "V",
)
def unseen_entries_count(p, batch):
    R, seen = batch
    gap = p["U"] @ p["V"] - R
    return {"U": (seen * gap) @ p["V"].T + 0.2 * p["U"], "V": p["U"].T @ gap}


def hinge(w, batch):
    X, y = batch
    slack = jnp.maximum(0.0, 1 - y * (X @ w))
    return jnp.mean(slack**2)


@wrong(hinge, draw(3), (X, SIGNS), {"missing-derivative"}, "slack = jnp.maximum")
def hinge_never_off(w, batch):
    X, y = batch
    return X.T @ (-2 * y * (1 - y * (X @ w))) / len(y)


def labelled(w, batch):
    X, y = batch
    return jnp.mean(jnp.log1p(jnp.exp(-y * (X @ w))))


@wrong(labelled, draw(3), (X, SIGNS), {"missing-factor"}, "jnp.log1p")
def label_forgotten(w, batch):
    X, y = batch
    return -X.T @ sigmoid(-y * (X @ w)) / len(y)


def pooled(p, batch):
    x, mask, y = batch
    h = jnp.sum(jnp.tanh(x @ p["W"]) * mask[:, :, None], axis=1) / jnp.sum(mask, axis=1, keepdims=True)
    return jnp.mean((h @ p["v"] - y) ** 2)


@wrong(
    pooled,
    {"W": draw(3, 4), "v": draw(4)},
    (draw(8, 5, 3), MASK, draw(8)),
    {"wrong-value"},
    "h = jnp.sum(",
    "W",
)
def padding_counted_in_the_mean(p, batch):
    x, mask, y = batch
    t = np.tanh(x @ p["W"])
    h = (t * mask[:, :, None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    d = 2 * (h @ p["v"] - y) / len(y)
    dt = (d[:, None] * p["v"])[:, None] * mask[:, :, None] / x.shape[1]
    return {"W": np.einsum("ntd,nth->dh", x, dt * (1 - t**2)), "v": h.T @ d}


# ----------------------------------------------------------------------------- masks, sums, ways back


def risk_set(beta, batch):
    X, times = batch
    later = times[None, :] >= times[:, None]
    total = jax.nn.logsumexp(jnp.where(later, (X @ beta)[None, :], -jnp.inf), axis=1)
    return jnp.mean(total - X @ beta)


@wrong(risk_set, draw(3, scale=0.5), (X, rng.uniform(1, 9, 12)), {"wrong-value"}, "total = jax.nn.logsumexp")
def everybody_stays_at_risk(beta, batch):
    X, _ = batch
    return X.T @ (softmax(X @ beta) - 1 / len(X))


def walked(w, batch):
    x, y = batch
    level = jnp.cumsum(jnp.tanh(x @ w), axis=1)
    return jnp.mean((level - y) ** 2)


@wrong(walked, draw(3), (draw(7, 5, 3), draw(7, 5)), {"transposed"}, "level = jnp.cumsum")
def running_sum_not_turned(w, batch):
    x, y = batch
    t = np.tanh(x @ w)
    d = 2 * (np.cumsum(t, axis=1) - y) / y.size
    return np.einsum("nt,ntd->d", np.cumsum(d, axis=1) * (1 - t**2), x)


def entropic(p, batch):
    X, labels = batch
    P = jax.nn.softmax(X @ p["W"])
    entropy = -jnp.sum(P * jnp.log(P), axis=1)
    fit = -jnp.log(P[jnp.arange(labels.shape[0]), labels])
    return jnp.mean(fit - 0.3 * entropy)


@wrong(
    entropic,
    {"W": draw(3, 4)},
    (X, rng.integers(0, 4, 12)),
    {"missing-derivative"},
    "P = jax.nn.softmax",
)
def entropy_past_the_softmax(p, batch):
    X, labels = batch
    P = softmax(X @ p["W"])
    return {"W": X.T @ (P - np.eye(4)[labels] + 0.3 * (np.log(P) + 1)) / len(X)}


def recurrent(p, batch):
    x, y = batch
    h = jnp.zeros((x.shape[0], 3))
    for t in range(4):
        h = jnp.tanh(x[:, t] @ p["U"] + h @ p["W"] + p["b"][None, :])
    return jnp.mean((jnp.sum(h, axis=1) - y) ** 2)


def through_time(p, batch, bias):
    x, y = batch
    h = [np.zeros((len(x), 3))]
    for t in range(4):
        h.append(np.tanh(x[:, t] @ p["U"] + h[-1] @ p["W"] + p["b"]))
    dh = np.repeat(2 * (h[-1].sum(axis=1) - y)[:, None] / len(y), 3, axis=1)
    g = {name: np.zeros_like(value) for name, value in p.items()}
    for t in reversed(range(4)):
        dz = dh * (1 - h[t + 1] ** 2)
        g["U"] += x[:, t].T @ dz
        g["W"] += h[t].T @ dz
        g["b"] = bias(g["b"], dz)
        dh = dz @ p["W"].T
    return g


RECURRENT = ({"U": draw(2, 3), "W": draw(3, 3), "b": draw(3)}, (draw(6, 4, 2), draw(6)))


@wrong(recurrent, *RECURRENT, {"missing-term"}, "h = jnp.tanh", "b")
def bias_assigned_in_the_loop(p, batch):
    return through_time(p, batch, lambda b, dz: dz.sum(axis=0))


def cooled(p, batch):
    u, y = batch
    for _ in range(3):
        u = u - 0.125 * jnp.sin(p["k"]) * u
    return jnp.mean((u - y) ** 2)


@wrong(cooled, {"k": np.asarray(0.8)}, (draw(9), draw(9)), {"missing-term"}, "u = u - 0.125")
def rate_of_one_step_only(p, batch):
    """All three steps contribute the same, so it looks like a factor 1/3."""
    u, y = batch
    keep = 1 - 0.125 * np.sin(p["k"])
    d = 2 * (keep**3 * u - y) / len(y)
    return {"k": np.sum(d * keep**2 * u) * -0.125 * np.cos(p["k"])}


# -------------------------------------------------------------------------------- functions and powers


def power_law(p, batch):
    x, y = batch
    curve = p["a"] * x ** p["b"]
    return jnp.mean((curve - y) ** 2)


@wrong(
    power_law,
    {"a": np.asarray(1.5), "b": np.asarray(0.75)},
    (rng.uniform(0.5, 2.5, 12), y),
    {"wrong-derivative"},
    "curve = p",
    "b",
)
def exponent_by_the_power_rule(p, batch):
    x, y = batch
    a, b = p["a"], p["b"]
    d = 2 * (a * x**b - y) / len(x)
    return {"a": np.sum(d * x**b), "b": np.sum(d * a * b * x ** (b - 1))}


def gamma_shape(p, batch):
    (x,) = batch
    k = jnp.exp(p["log_k"])
    fit = jnp.mean((k - 1) * jnp.log(x) - x)
    return jax.scipy.special.gammaln(k) - fit


@wrong(
    gamma_shape,
    {"log_k": np.asarray(0.3)},
    (rng.uniform(0.5, 3, 12),),
    {"wrong-derivative"},
    "jax.scipy.special.gammaln",
)
def logarithm_for_digamma(p, batch):
    (x,) = batch
    k = np.exp(p["log_k"])
    return {"log_k": (np.log(k) - np.mean(np.log(x))) * k}


def equaliser(p, batch):
    x, y = batch
    error = x * p["gain"] - y
    return jnp.mean(jnp.abs(error) ** 2)


@wrong(
    equaliser,
    {"gain": np.asarray(0.75 - 0.5j)},
    (draw(9) + 1j * draw(9), draw(9) + 1j * draw(9)),
    {"wrong-value"},
    "error = x * p",
)
def error_not_conjugated(p, batch):
    x, y = batch
    return {"gain": 2 * np.mean((x * p["gain"] - y) * x)}


def chain_of_springs(q):
    lengths = jnp.sqrt(jnp.sum((q[1:] - q[:-1]) ** 2, axis=1))
    return 0.5 * jnp.sum((lengths - 0.7) ** 2)


@wrong(chain_of_springs, draw(5, 2), None, {"missing-factor"}, "lengths = jnp.sqrt")
def force_without_its_direction_normed(q):
    gap = q[1:] - q[:-1]
    force = (np.linalg.norm(gap, axis=1) - 0.7)[:, None] * gap
    out = np.zeros_like(q)
    out[1:] += force
    out[:-1] -= force
    return out


def noisy_or(p, batch):
    X, y = batch
    q = jax.nn.sigmoid(X @ p["W"])
    none = jnp.prod(1 - q, axis=1)
    return jnp.mean((1 - none - y) ** 2)


@wrong(noisy_or, {"W": draw(3, 4)}, (X, y), {"missing-factor"}, "none = jnp.prod")
def own_factor_kept_in_the_product(p, batch):
    X, y = batch
    q = sigmoid(X @ p["W"])
    none = np.prod(1 - q, axis=1)
    d = 2 * (1 - none - y) / len(y)
    return {"W": X.T @ ((d * none)[:, None] * q * (1 - q))}


# -------------------------------------------------------------------------------------- where a factor comes in


def decayed(p, batch):
    X, y = batch
    fit = jnp.mean((X @ p["w"] + p["b"] - y) ** 2)
    return fit + 0.25 * jnp.vdot(p["w"], p["w"])


@wrong(
    decayed,
    {"w": draw(3), "b": np.asarray(0.3)},
    (X, y),
    {"scaled-term"},
    "jnp.vdot",
    "w",
    "1/2",
)
def square_by_vdot_without_its_two(p, batch):
    X, y = batch
    d = 2 * (X @ p["w"] + p["b"] - y) / len(y)
    return {"w": X.T @ d + 0.25 * p["w"], "b": d.sum()}


def word_vectors(p, batch):
    context, y = batch
    h = p["E"][context].mean(axis=1)
    return jnp.mean((h @ p["v"] - y) ** 2)


@wrong(
    word_vectors,
    {"E": draw(6, 3), "v": draw(3)},
    (rng.integers(0, 6, (12, 4)), y),
    {"scale", "scaled-term"},
    "h = p",
    "E",
    "4",
)
def words_not_averaged(p, batch):
    context, y = batch
    h = p["E"][context].mean(axis=1)
    d = 2 * (h @ p["v"] - y) / len(y)
    dE = np.zeros_like(p["E"])
    np.add.at(dE, context, (d[:, None] * p["v"])[:, None])
    return {"E": dE, "v": h.T @ d}


def branched(p, batch):
    x, y, flag = batch
    z = x @ p["w"]
    h = lax.cond(flag[0] > 0, lambda z: 0.5 * z, lambda z: jnp.sin(z), z)
    return jnp.mean((h - y) ** 2)


@wrong(branched, {"w": draw(3)}, (X, y, np.array([1.0])), {"scale"}, "h = lax.cond", None, "2")
def half_of_a_branch_left_out(p, batch):
    x, y, flag = batch
    z = x @ p["w"]
    if flag[0] > 0:
        h, slope = 0.5 * z, np.ones_like(z)
    else:
        h, slope = np.sin(z), np.cos(z)
    d = 2 * (h - y) / len(y)
    dz = d * slope
    return {"w": x.T @ dz}


def place(loss, text):
    lines, first = inspect.getsourcelines(loss)
    return next(first + i for i, code in enumerate(lines) if text in code)


@pytest.mark.parametrize("name", CASES)
def test_the_mistake_is_named_where_it_is(name):
    loss, gradient, params, batch, kinds, line, leaf, factor = CASES[name]
    arguments = (params,) if batch is None else (params, batch)
    report = check_gradient(loss, gradient, *arguments)
    assert not report.ok
    assert {f.kind for f in report.findings} <= kinds, str(report)
    (found,) = report.findings
    assert (leaf, factor) == (found.leaf if leaf else None, found.factor if factor else None), str(report)
    assert int(found.where.split(":")[1]) == place(loss, line), str(report)


def test_the_first_line_with_a_factor_is_not_one_that_is_right():
    """The adjoint of h is twice that of z, and it is right: the factor comes in where it is taken for that of z."""
    loss, gradient, params, batch, *_ = CASES["half_of_a_branch_left_out"]
    line = check_gradient(loss, gradient, params, batch).first_wrong_line
    assert line is not None
    assert line.text == "dz = d * slope"
