"""A mean over examples is proved from the program of a loss, in whatever way it is written; nothing else is."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from jaxgrad import losses, means, models, noise
from jaxgrad.sampling import distinct
from jaxgrad.types import Batch

SIZES = (1000, 64, 40)
D, T, H, V = 5, 6, 4, 9  # features or steps in time, length of a text, hidden units, words


@pytest.fixture(autouse=True)
def as_people_have_it():
    """float32, and the promotions that people rely on."""
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def numbers(*shape):
    return np.zeros(shape, np.float32)


X, Y, LABEL = numbers(8, D), numbers(8), np.zeros(8, np.int32)
LINEAR = {"w": numbers(D), "b": numbers()}
MATRIX = numbers(D, 3)
NET = {"W1": numbers(D, H), "b1": numbers(H), "W2": numbers(H, 1)}


def apart(p, b):
    return b.x @ p["w"] + p["b"] - b.y


def squared_norm(p, b):
    r = apart(p, b)
    return r @ r / len(b.y)


def by_position(W, b):
    return -jax.nn.log_softmax(b.x @ W)[jnp.arange(len(b.y)), b.y].mean()


def along_an_axis(W, b):
    return -jnp.take_along_axis(jax.nn.log_softmax(b.x @ W), b.y[:, None], axis=1).mean()


def one_hot(W, b):
    return -jnp.mean(jnp.sum(jax.nn.one_hot(b.y, 3) * jax.nn.log_softmax(b.x @ W), axis=-1))


def of_optax(W, b):
    return optax.softmax_cross_entropy_with_integer_labels(b.x @ W, b.y).mean()


def squeezed_net(p, b):
    return jnp.mean(((jax.nn.relu(b.x @ p["W1"] + p["b1"]) @ p["W2"]).squeeze() - b.y) ** 2)


def layer_norm(p, b):
    h = b.x @ p["W1"]
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-5)
    return jnp.mean(((h @ p["W2"])[:, 0] - b.y) ** 2)


def embedded(p, b):
    return jnp.mean((p["E"][b.x].sum(1) @ p["v"] - b.y) ** 2)


def convolved(p, b):
    image = b.x.reshape(b.x.shape[0], 8, 8, 1)
    h = lax.conv_general_dilated(image, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = lax.reduce_window(jax.nn.relu(h), -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    return jnp.mean((h.reshape(h.shape[0], -1) @ p["v"] - b.y) ** 2)


def recurrent(p, b):
    def step(h, x):
        h = jnp.tanh(x[:, None] * p["u"] + h @ p["W"])
        return h, h

    h, _ = lax.scan(step, jnp.zeros((b.x.shape[0], H)), b.x.T)
    return jnp.mean((h @ p["v"] - b.y) ** 2)


def attention(p, b):
    x = p["E"][b.x]
    q, k, v = (x @ p[name] for name in "QKV")
    a = jax.nn.softmax(jnp.einsum("bth,bsh->bts", q, k) + jnp.where(jnp.tril(jnp.ones((T, T))), 0, -1e9), axis=-1)
    logits = (jnp.einsum("bts,bsh->bth", a, v) @ p["O"]).reshape(-1, V)
    return optax.softmax_cross_entropy_with_integer_labels(logits, b.x.reshape(-1)).mean()


def gated(p, b):
    i, g = jnp.split(b.x @ p["W"], 2, axis=1)
    return jnp.mean((jnp.sum(jax.nn.sigmoid(i) * jnp.tanh(g), axis=1) - b.y) ** 2)


def chosen(p, b):
    r = apart(p, b)
    return jnp.mean(jnp.where(jnp.abs(r) < 1, 0.5 * r**2, jnp.abs(r) - 0.5))


def stacked(p, b):
    both = jnp.stack([b.x @ p["w"], jnp.tile(b.y[:, None], (1, 2)).sum(1)], axis=1)
    first, second = (both[:, k] for k in range(2))
    return jnp.mean((first - second) ** 2)


TEXT = np.zeros((8, T), np.int32)
ATTENTION = {"E": numbers(V, H), "Q": numbers(H, H), "K": numbers(H, H), "V": numbers(H, H), "O": numbers(H, V)}
RECURRENT = {"u": numbers(H), "W": numbers(H, H), "v": numbers(H)}
ARE_MEANS = [
    ("mean", lambda p, b: jnp.mean(apart(p, b) ** 2), LINEAR, Batch(X, Y)),
    ("sum over len", lambda p, b: jnp.sum(apart(p, b) ** 2) / len(b.y), LINEAR, Batch(X, Y)),
    ("squared norm", squared_norm, LINEAR, Batch(X, Y)),
    ("1/n", lambda p, b: (1 / b.x.shape[0]) * jnp.sum(apart(p, b) ** 2), LINEAR, Batch(X, Y)),
    ("by a numpy number", lambda p, b: jnp.sum(apart(p, b) ** 2) / np.float32(b.y.size), LINEAR, Batch(X, Y)),
    ("half and penalty", lambda p, b: 0.5 * jnp.mean(apart(p, b) ** 2) + 0.1 * p["w"] @ p["w"], LINEAR, Batch(X, Y)),
    ("mean and mean", lambda p, b: jnp.mean(apart(p, b) ** 2) + jnp.mean(jnp.abs(apart(p, b))), LINEAR, Batch(X, Y)),
    ("weights of rows", lambda p, b: jnp.mean((1 + b.y**2) * apart(p, b) ** 2), LINEAR, Batch(X, Y)),
    ("mean over outputs", lambda W, b: jnp.mean((b.x @ W) ** 2), MATRIX, Batch(X, Y)),
    ("norms", lambda W, b: jnp.mean(jnp.linalg.norm(b.x @ W + 1, axis=1)), MATRIX, Batch(X, Y)),
    ("vmap", lambda p, b: jax.vmap(lambda x, y: (x @ p["w"] - y) ** 2)(b.x, b.y).mean(), LINEAR, Batch(X, Y)),
    ("checkpoint", lambda p, b: jnp.mean(jax.checkpoint(lambda x: jnp.sin(x @ p["w"]))(b.x)), LINEAR, Batch(X, Y)),
    ("jit", jax.jit(lambda p, b: jnp.mean(apart(p, b) ** 2)), LINEAR, Batch(X, Y)),
    ("logistic", lambda p, b: optax.sigmoid_binary_cross_entropy(b.x @ p["w"], b.y).mean(), LINEAR, Batch(X, Y)),
    ("huber", chosen, LINEAR, Batch(X, Y)),
    ("by position", by_position, MATRIX, Batch(X, LABEL)),
    ("along an axis", along_an_axis, MATRIX, Batch(X, LABEL)),
    ("one hot", one_hot, MATRIX, Batch(X, LABEL)),
    ("optax", of_optax, MATRIX, Batch(X, LABEL)),
    ("squeezed net", squeezed_net, NET, Batch(X, Y)),
    ("layer norm", layer_norm, NET, Batch(X, Y)),
    ("embedding", embedded, {"E": numbers(V, H), "v": numbers(H)}, Batch(TEXT, Y)),
    ("convolution", convolved, {"k": numbers(3, 3, 1, 2), "v": numbers(32)}, Batch(numbers(8, 64), Y)),
    ("recurrent", recurrent, RECURRENT, Batch(X, Y)),
    ("attention", attention, ATTENTION, Batch(TEXT, Y)),
    ("stacked", stacked, LINEAR, Batch(X, Y)),
    ("a column set", lambda p, b: jnp.mean((jnp.asarray(b.x).at[:, 0].set(1.0) @ p["w"]) ** 2), LINEAR, Batch(X, Y)),
    ("numpy's places", lambda W, b: -jnp.mean((b.x @ W)[np.arange(len(b.y)), b.y]), MATRIX, Batch(X, LABEL)),
    ("numpy's ones", lambda p, b: jnp.mean(np.ones(len(b.y), np.float32) * apart(p, b) ** 2), LINEAR, Batch(X, Y)),
    ("gelu", lambda p, b: jnp.mean(jax.nn.gelu(apart(p, b), approximate=False)), LINEAR, Batch(X, Y)),
    ("spectrum", lambda p, b: jnp.mean(jnp.abs(jnp.fft.rfft(b.x * p["w"], axis=1)) ** 2), LINEAR, Batch(X, Y)),
    ("gates", gated, {"W": numbers(D, 2 * H)}, Batch(X, Y)),
]


def normalised(W, b):
    h = b.x @ W
    return jnp.mean(((h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)) ** 2)


def ranking(p, b):
    s = b.x @ p["w"]
    return jnp.mean(jax.nn.relu(s[:, None] - s[None, :]))


def pairs_by_reshape(p, b):
    s = (b.x @ p["w"]).reshape(-1, 2)
    return jnp.mean((s[:, 0] - s[:, 1]) ** 2)


def contrastive(W, b):
    z = b.x @ W
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(z @ z.T, axis=1)))


def soft_f1(p, b):
    q = jax.nn.sigmoid(b.x @ p["w"])
    return 1 - 2 * jnp.sum(q * b.y) / (jnp.sum(q) + jnp.sum(b.y))


def weighted(p, b):
    w = 1 + b.y**2
    return jnp.sum(w * apart(p, b) ** 2) / jnp.sum(w)


@jax.custom_vjp
def clip(p):
    return p


clip.defvjp(lambda p: (p, None), lambda _, g: (jax.tree.map(lambda leaf: jnp.clip(leaf, -1, 1), g),))


def mse(p, b):
    return jnp.mean(apart(p, b) ** 2)


def dropped(p, b):
    return jnp.mean(jax.random.bernoulli(jax.random.key(0), 0.5, b.y.shape) * apart(p, b) ** 2)


def by_turns(p, b):
    """As many turns as the rows say."""
    return mse(p, b) * lax.while_loop(lambda k: k < jnp.sum(b.y), lambda k: k + 1, jnp.float32(1))


def transposed(p, b):
    """Feature by feature, then row by row: merged the other way round."""
    flat = b.x.T.reshape(-1)
    return jnp.mean(flat.reshape(-1, D) @ p["w"])


ARE_NONE = [
    ("sum", lambda p, b: jnp.sum(apart(p, b) ** 2), LINEAR, "sum over the examples"),
    ("a number that was n", lambda p, b: jnp.sum(apart(p, b) ** 2) / 1000, LINEAR, "sum over the examples"),
    ("n - 1", lambda p, b: jnp.sum(apart(p, b) ** 2) / (len(b.y) - 1), LINEAR, "not as 1/n"),
    ("root of n", lambda p, b: jnp.sum(apart(p, b)) / np.sqrt(len(b.y)), LINEAR, "not as 1/n"),
    ("another loss for few", lambda p, b: mse(p, b) * (2 if len(b.y) > 50 else 1), LINEAR, "not as 1/n"),
    ("penalty times n", lambda p, b: mse(p, b) + len(b.y) * 1e-3 * p["w"] @ p["w"], LINEAR, "more of a sum"),
    ("weighted average", weighted, LINEAR, r"divides by a sum over the examples \(test_means.py:\d+\)"),
    ("soft F1", soft_f1, LINEAR, "divides by a sum"),
    ("variance", lambda p, b: mse(p, b) + jnp.var(apart(p, b)), LINEAR, "number of examples|more of a sum"),
    ("product of means", lambda p, b: mse(p, b) * jnp.mean(apart(p, b)), LINEAR, "more of a sum"),
    ("root of a mean", lambda p, b: jnp.sqrt(mse(p, b)), LINEAR, "more of a sum"),
    ("batch normalisation", normalised, MATRIX, "more of a sum"),
    ("maximum", lambda p, b: jnp.max(apart(p, b) ** 2), LINEAR, "reduce_max"),
    ("logsumexp", lambda p, b: jax.nn.logsumexp(apart(p, b)), LINEAR, "reduce_max"),
    ("ranking", ranking, LINEAR, "pairs of examples"),
    ("pairs by reshape", pairs_by_reshape, LINEAR, "pairs of examples"),
    ("contrastive", contrastive, MATRIX, "pairs of examples"),
    ("the first row", lambda p, b: mse(p, b) + b.x[0] @ p["w"], LINEAR, "slice"),
    ("places", lambda p, b: jnp.mean(jnp.arange(len(b.y)) * apart(p, b)), LINEAR, "places of the examples"),
    ("cumulative", lambda p, b: jnp.mean(jnp.cumsum(apart(p, b))), LINEAR, "cumsum"),
    ("trimmed", lambda p, b: jnp.mean(jnp.sort(apart(p, b))[: len(b.y) // 2]), LINEAR, "pad"),
    ("turned round", lambda p, b: jnp.mean(apart(p, b) * apart(p, b)[::-1]), LINEAR, "rev"),
    ("rolled", lambda p, b: jnp.mean(apart(p, b) * jnp.roll(apart(p, b), 1)), LINEAR, "slice|split"),
    ("stacked on itself", lambda p, b: jnp.mean(jnp.stack([b.y, b.y[::-1]]).prod(0) * apart(p, b)), LINEAR, "rev"),
    ("tiled", lambda p, b: jnp.mean(jnp.tile(b.y, 2) * jnp.repeat(apart(p, b), 2)), LINEAR, "tile|reshape|broadcast"),
    ("transposed", transposed, LINEAR, "reshape"),
    ("a mask drawn inside", dropped, LINEAR, "random_bits"),
    ("turns of a loop", by_turns, LINEAR, "loop turns|custom|not known|Reverse"),
    ("clipped gradient", lambda p, b: mse(clip(p), b), LINEAR, "more of a sum"),
    ("clipped slopes", lambda p, b: jnp.mean((clip(b.x @ p["w"]) - b.y) ** 2), LINEAR, "number of examples"),
]


# What an adversary got past earlier rules, each with its own way of not being a mean.
TABLE = np.random.default_rng(5).normal(size=(4, 2000)).astype(np.float32)
BYTES = np.zeros((8, D), np.uint8)


@jax.custom_vjp
def other_value(r):
    return jnp.max(r)


other_value.defvjp(lambda r: (jnp.mean(r), r), lambda r, g: (g * jnp.ones_like(r) / r.shape[0],))


def counted(count):
    """Of whole numbers of the batch, times a parameter."""
    return lambda p, b: p["b"] * jnp.asarray(count(b), jnp.float32) / len(b.y)


def filled(p, b):
    total = jnp.sum(b.x * p["w"], axis=0)
    return jnp.take(total, jnp.array([1, 9]), mode="fill", fill_value=1.0).sum() / len(b.y)


def updated(p, b):
    return jnp.mean(lax.dynamic_update_slice((b.x * p["w"]) ** 2, jnp.zeros((40, D)), (0, 0)))


TRICKS = [
    ("a window of a fixed table", lambda p, b: jnp.mean((apart(p, b) + jnp.asarray(TABLE)[2, : len(b.y)]) ** 2)),
    ("rows of a fixed table", lambda p, b: p["b"] * jnp.mean(jnp.asarray(TABLE)[jnp.array([0, 2]), : len(b.y)].sum(0))),
    ("whole division", counted(lambda b: jnp.sum(b.y) // 255)),
    ("bytes that wrap", counted(lambda b: jnp.sum(b.y, dtype=jnp.uint8))),
    ("a product of bytes", counted(lambda b: jnp.dot(b.x[:, 0], b.x[:, 1]))),
    ("a product of truths", counted(lambda b: jnp.dot(b.x[:, 0] > 1, b.x[:, 1] > 1))),
    ("a sum as a truth", counted(lambda b: jnp.sum(b.y).astype(bool))),
    ("a negative of whole numbers", counted(lambda b: -jnp.sum(b.y))),
    ("scattered bytes", counted(lambda b: jnp.zeros(9, jnp.uint8).at[b.y.astype(int)].add(b.x[:, 0]).sum() * 1.0)),
    ("places backwards", lambda p, b: jnp.mean((b.x @ p["w"])[-jnp.arange(len(b.y))] * b.y)),
    ("signs of places", lambda p, b: p["b"] * jnp.mean(jnp.where(-jnp.arange(len(b.y)) < 0, 1.0, 0.0) * b.y)),
    ("a part of the entries", lambda p, b: p["b"] * jnp.mean(lax.dynamic_slice_in_dim(b.x.reshape(-1), 0, len(b.y)))),
    ("rows overwritten", updated),
    ("filled up beyond the range", filled),
    ("another value than its gradient's", lambda p, b: other_value(b.x @ p["w"])),
    ("a callback", lambda p, b: jax.pure_callback(lambda: np.float32(len(b.y)), jax.ShapeDtypeStruct((), "float32"))),
    ("a solver", lambda p, b: jax.scipy.sparse.linalg.cg(lambda v: v * (1 + len(b.y)), p["w"])[0].sum()),
]


@pytest.mark.parametrize(("name", "loss"), TRICKS, ids=[each[0] for each in TRICKS])
@pytest.mark.parametrize("sizes", [SIZES, (40, 1000), (1, 40)])
def test_no_trick_of_an_adversary_is_proved(name, loss, sizes):
    whole = "bytes" in name or "whole" in name or "truth" in name
    batch = Batch(BYTES, np.zeros(8, np.uint8)) if whole else Batch(X, Y)
    assert means.doubt(loss, LINEAR, batch, sizes)


def test_what_is_no_array_is_looked_at_too():
    assert (
        means.doubt(lambda p, b: jnp.mean((b.x @ p["w"]) * p["f"]), {"w": numbers(D), "f": 0.5}, Batch(X, Y), SIZES)
        == ""
    )
    assert means.doubt(lambda p, b: jnp.mean(b.x @ p), numbers(D), Batch(X, Y), [0, 12]) == ""


@pytest.mark.parametrize(("name", "loss", "params", "batch"), ARE_MEANS, ids=[each[0] for each in ARE_MEANS])
def test_a_mean_is_proved_however_it_is_written(name, loss, params, batch):
    assert means.doubt(loss, params, batch, SIZES) == ""


@pytest.mark.parametrize(("name", "loss", "params", "words"), ARE_NONE, ids=[each[0] for each in ARE_NONE])
def test_what_is_no_mean_is_never_proved_and_the_reason_is_said(name, loss, params, words):
    assert re.search(words, means.doubt(loss, params, Batch(X, Y), SIZES))


@pytest.mark.parametrize(("name", "loss", "params", "batch"), ARE_MEANS, ids=[each[0] for each in ARE_MEANS])
def test_the_losses_of_single_examples_average_to_the_loss(name, loss, params, batch):
    """The other route: numbers, at drawn points."""
    r = np.random.default_rng(3)
    params = jax.tree.map(lambda leaf: r.normal(size=leaf.shape).astype(np.float32), params)
    batch = jax.tree.map(lambda leaf: _drawn(r, leaf), batch)
    of_one = means.of_one(loss, params, batch, [8], "")
    alone = [of_one(params, jax.tree.map(lambda leaf, i=i: leaf[i], batch)) for i in range(8)]
    np.testing.assert_allclose(np.mean(alone), loss(params, batch), rtol=1e-4, atol=1e-5)


def _drawn(r, leaf):
    if leaf.dtype.kind == "f":
        return r.normal(size=leaf.shape).astype(np.float32)
    return r.integers(0, 3, leaf.shape).astype(np.int32)


def test_a_dimension_or_constant_that_happens_to_equal_n_is_not_taken_for_it():
    n = 40

    def loss(p, b):
        return jnp.sum((b.x @ p) ** 2) / n / len(b.y) * n

    assert means.doubt(loss, numbers(n), Batch(numbers(n, n), numbers(n)), [n]) == ""
    assert means.doubt(lambda p, b: jnp.sum((b.x @ p) ** 2) / n, numbers(n), Batch(numbers(n, n), numbers(n)), [n])


def test_a_loss_made_to_be_a_mean_says_so_whatever_its_program():
    def looked_up(params, row):
        return lax.while_loop(lambda k: k[0] < row.y, lambda k: (k[0] + 1, k[1] * params["b"]), (0.0, 1.0))[1]

    assert means.doubt(losses.mean_of(looked_up), LINEAR, Batch(X, Y), SIZES) == ""
    assert means.doubt(losses.mean_loss(models.linear, losses.squared, l2=0.1), LINEAR, Batch(X, Y), SIZES) == ""


def test_the_noise_of_what_is_no_mean_is_refused_and_that_of_a_squeezed_net_is_not():
    r = np.random.default_rng(0)
    batch = Batch(r.normal(size=(30, D)).astype(np.float32), r.normal(size=30).astype(np.float32))
    params = jax.tree.map(lambda leaf: r.normal(size=leaf.shape).astype(np.float32), NET)
    with pytest.raises(ValueError, match=r"comes from the gradients of single examples.*mean_of"):
        noise.measure(weighted, LINEAR, batch, curvature=False)
    with pytest.raises(ValueError, match="law of the batch gradient's noise"):
        noise.squared_norms(weighted, LINEAR, batch, distinct(4), jax.random.split(jax.random.key(0), 3))
    found = noise.measure(squeezed_net, params, batch, curvature=False)
    each = jax.tree.leaves(noise.example_gradients(squeezed_net, params, batch))
    trace = sum(float(np.sum(np.var(np.asarray(leaf, float), axis=0))) for leaf in each)
    np.testing.assert_allclose(found.trace, trace, rtol=1e-4)
