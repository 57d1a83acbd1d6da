"""What a report says of the loss is true of the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.check import check_gradient

RNG = np.random.default_rng
BATCH = {"x": RNG(0).normal(size=(9, 4)), "y": RNG(1).normal(size=9)}
W = RNG(2).normal(size=4)


@pytest.fixture(autouse=True)
def people_let_shapes_spread():
    with jax.numpy_rank_promotion("allow"):
        yield


def times(loss, factor):
    """The gradient of a loss times a factor, in NumPy's arrays."""
    return lambda w, b: jax.tree.map(lambda g: factor * np.asarray(g), jax.grad(loss)(w, b))


def said(loss, factor, w=W):
    report = check_gradient(loss, times(loss, factor), w, BATCH)
    assert [f.kind for f in report.findings] == ["sign" if factor == -1 else "scale"]
    return report.findings[0].sentence


SQUARES = {
    "power": lambda w, b: jnp.sum((b["x"] @ w - b["y"]) ** 2),
    "product with itself": lambda w, b: jnp.sum((b["x"] * w) * (b["x"] * w)),
    "dot with itself": lambda w, b: jnp.dot(b["x"] @ w, b["x"] @ w),
    "quadratic form": lambda w, b: w @ (b["x"].T @ b["x"]) @ w,
    "jnp.square": lambda w, b: jnp.mean(jnp.square(b["x"] @ w - b["y"])),
    "inverse square": lambda w, b: jnp.sum(1 / (3 + b["x"] @ w) ** 2),
    "variance": lambda w, b: jnp.var(b["x"] @ w),
}
NO_SQUARES = {
    "constant": lambda w, b: jnp.sum(jax.nn.logsumexp(b["x"] * w / 0.5, axis=1)),
    "none": lambda w, b: jnp.sum(jnp.log(jnp.cosh(b["x"] @ w))),
    "cube": lambda w, b: jnp.sum((b["x"] @ w) ** 3),
    "product of two": lambda w, b: jnp.sum(jnp.tanh(b["x"] @ w) * jnp.exp(b["x"] @ w)),
    "square of the data": lambda w, b: jnp.sum(jnp.tanh(b["x"] ** 2 @ w)),
}


@pytest.mark.parametrize("name", SQUARES)
def test_half_is_the_two_of_a_square_where_there_is_one(name):
    assert "the factor 2 of a square's derivative is missing" in said(SQUARES[name], 0.5)


@pytest.mark.parametrize("name", NO_SQUARES)
@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_no_square_is_spoken_of_where_there_is_none(name, factor):
    assert "square" not in said(NO_SQUARES[name], factor)


def test_a_square_of_another_leaf_is_not_spoken_of():
    def loss(p, b):
        return jnp.sum(jnp.tanh(b["x"] @ p["u"])) + jnp.sum((b["y"] - p["c"]) ** 2)

    gradient = lambda p, b: {k: g * (0.5 if k == "u" else 1) for k, g in jax.grad(loss)(p, b).items()}
    report = check_gradient(loss, gradient, {"u": W, "c": np.array(0.4)}, BATCH)
    assert [f.leaf for f in report.findings] == ["u"]
    assert "square" not in report.findings[0].sentence


@pytest.mark.parametrize(
    ("loss", "factor", "words"),
    [
        (NO_SQUARES["constant"], 0.5, "the division by 0.5 is left out"),
        (NO_SQUARES["constant"], 2.0, "the division by 0.5 is there twice"),
        (lambda w, b: jnp.sum(0.5 * jnp.tanh(b["x"] @ w)), 2.0, "the factor 0.5 is left out"),
        (lambda w, b: jnp.sum(jnp.tanh(b["x"] @ w) / 0.7), 0.7, "the division by 0.7 is left out"),
        (lambda w, b: jnp.sum(3 * jnp.tanh(b["x"] @ w)), 3.0, "the factor 3 is there twice"),
    ],
)
def test_the_constant_of_a_line_is_named(loss, factor, words):
    assert words in said(loss, factor)


@pytest.mark.parametrize("factor", [np.log(2), 1 / np.log(2)])
def test_no_logarithm_is_spoken_of_where_there_is_none(factor):
    assert "logarithm" not in said(lambda w, b: jnp.sum(jnp.tanh(b["x"] @ w)), factor)
    assert "natural logarithm" in said(lambda w, b: jnp.sum(jnp.log(3 + jnp.tanh(b["x"] @ w))), 1 / np.log(2))


def test_a_minus_is_looked_for_only_where_a_derivative_has_one():
    assert "inner derivative" not in said(lambda w, b: jnp.sum(jnp.tanh(b["x"] @ w)), -1)
    assert "inner derivative of -1" in said(lambda w, b: jnp.sum(jnp.tanh(b["y"] - b["x"] @ w)), -1)
    assert "the other way round" in said(lambda w, b: jnp.sum(jnp.tanh(b["x"] @ w - b["y"])), -1)


LABELS = np.eye(3)[RNG(3).integers(0, 3, 9)]
WEIGHTS = RNG(4).normal(size=(4, 3))


def through_softmax(p, x, y):
    dp = -y / p
    return x.T @ (p * (dp - (dp * p).sum(axis=1, keepdims=True))) / len(x)


def subtracts_already(w, b):
    z = b["x"] @ w
    z = z - z.max(axis=1, keepdims=True)
    e = np.exp(z)
    return through_softmax(e / e.sum(axis=1, keepdims=True), b["x"], b["t"])


def subtracts_already_jax(w, b):
    z = b["x"] @ w
    e = jnp.exp(z - jnp.max(z, axis=1, keepdims=True))
    return through_softmax(e / e.sum(axis=1, keepdims=True), b["x"], b["t"])


def by_the_library(w, b):
    return through_softmax(jax.nn.softmax(b["x"] @ w, axis=1), b["x"], b["t"])


def subtracts_nothing(w, b):
    e = np.exp(b["x"] @ w)
    return b["x"].T @ (e / e.sum(axis=1, keepdims=True) - b["t"]) / len(e)


@pytest.mark.parametrize("gradient", [subtracts_already, subtracts_already_jax, by_the_library, subtracts_nothing])
def test_the_largest_logit_is_spoken_of_only_where_an_exponential_overflows(gradient):
    loss = lambda w, b: -jnp.mean(jnp.sum(b["t"] * jax.nn.log_softmax(b["x"] @ w), axis=1))
    report = check_gradient(loss, gradient, WEIGHTS, {"x": BATCH["x"], "t": LABELS})
    assert [f.kind for f in report.findings] == ["unstable"]
    sentence = report.findings[0].sentence
    assert ("largest logit" in sentence) == (gradient is subtracts_nothing)
    assert ("which divides by none" in sentence) == (gradient is not subtracts_nothing)


def centred(w, b):
    z = jnp.tanh(b["x"] @ w)
    return jnp.mean((z - jnp.mean(z)) ** 2)


def by_cosine(w, b):
    z = np.tanh(b["x"] @ w)
    return b["x"].T @ ((z - z.mean()) * np.cos(z) * (1 - z**2))


def test_one_example_alone_is_not_spoken_of_where_it_shows_nothing_of_the_loss():
    assert "example alone" not in str(check_gradient(centred, by_cosine, W, BATCH))
    both = lambda w, b: centred(w, b) + jnp.mean(jnp.sin(b["x"] @ w))
    right = lambda w, b: b["x"].T @ np.cos(b["x"] @ w) / len(b["x"])
    assert "example alone" not in str(check_gradient(both, lambda w, b: by_cosine(w, b) + right(w, b), W, BATCH))
    # It is where one example alone shows all of it.
    rolled = lambda w, b: b["x"].T @ np.roll(np.cos(b["x"] @ w) * np.cosh(b["x"] @ w), 1) / len(b["x"])
    loss = lambda w, b: jnp.mean(jnp.sin(b["x"] @ w))
    mixed = lambda w, b: right(w, b) + (rolled(w, b) - right(w, b)) * (len(b["x"]) > 1)
    assert "any one example alone" in str(check_gradient(loss, mixed, W, BATCH))
