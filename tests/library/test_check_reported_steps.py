"""Mistakes in single steps as people report them: the cause and its line, each with an input of its own.

A wrong gradient is made by differentiating the loss with one step that has a wrong rule (`rule`), or by hand.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgrad.check import check_gradient

rng = np.random.default_rng(77)


def draw(*shape, scale=1.0):
    return scale * rng.normal(size=shape)


def rule(forward, backward):
    """`forward` with `backward(out, d, *args)` as what is sent back to its arguments."""

    @jax.custom_vjp
    def step(*args):
        return forward(*args)

    def bwd(kept, d):
        args, out = kept
        sent = backward(out, d, *args)
        sent = sent if isinstance(sent, tuple) else (sent,)
        return tuple(jnp.asarray(s).reshape(jnp.shape(a)) for s, a in zip(sent, args, strict=True))

    step.defvjp(lambda *args: (forward(*args), (args, forward(*args))), bwd)
    return step


CASES = {}


def case(params, batch, kinds, line, leaf=None, **steps):
    """Register a loss `loss(p, batch, *steps)`: each step is (right, wrong)."""

    def add(loss):
        right = [pair[0] for pair in steps.values()]
        wrong = [pair[1] for pair in steps.values()]
        CASES[loss.__name__] = (loss, right, wrong, params, batch, kinds, line, leaf)
        return loss

    return add


def place(loss, text):
    lines, first = inspect.getsourcelines(loss)
    return next(first + i for i, l in enumerate(lines) if text in l and not l.strip().startswith("@"))


X, T = draw(14, 4), draw(14, 3)
L = np.random.default_rng(5).integers(0, 3, 14)
TOKENS = np.random.default_rng(6).integers(0, 7, (14, 5))

# ------------------------------------------------------------------------------------ steps that pick entries


def take(E, tokens):
    return E[tokens]


def last_use(out, d, E, tokens):
    flat = tokens.reshape(-1)
    later = jnp.array([jnp.any(flat[i + 1 :] == flat[i]) for i in range(len(flat))])
    d = d.reshape(len(flat), -1) * ~later[:, None]
    return jnp.zeros_like(E).at[flat].add(d), np.zeros(tokens.shape, jax.dtypes.float0)


@case(
    {"E": draw(7, 4), "W": draw(4, 3)},
    (TOKENS, T),
    {"missing-term"},
    "rows = take",
    "E",
    take=(take, rule(take, last_use)),
)
def embedding_rows_assigned(p, batch, take):
    tokens, y = batch
    rows = take(p["E"], tokens)
    out = jnp.tanh(rows.sum(axis=1)) @ p["W"]
    return jnp.mean(jnp.sum((out - y) ** 2, axis=1))


def top(z):
    return jnp.max(z, axis=1)


@case(
    {"W": draw(4, 3), "v": draw(3)},
    (draw(14, 6, 4), draw(14)),
    {"wrong-derivative"},
    "best = top",
    "W",
    top=(top, rule(top, lambda out, d, z: jnp.broadcast_to(d[:, None], z.shape))),
)
def maximum_sends_to_all(p, batch, top):
    x, y = batch
    z = jnp.tanh(x @ p["W"])
    best = top(z)
    return jnp.mean((best @ p["v"] - y) ** 2)


def spread(h):
    return jnp.repeat(h, 3, axis=1)


@case(
    {"W": draw(4, 3)},
    (X, draw(14, 9)),
    {"missing-term", "scaled-term"},
    "wide = spread",
    None,
    spread=(spread, rule(spread, lambda out, d, h: d[:, 2::3])),
)
def copies_not_added_up(p, batch, spread):
    x, y = batch
    wide = spread(jnp.tanh(x @ p["W"]))
    return jnp.mean(jnp.sum((wide - y) ** 2, axis=1))


# ------------------------------------------------------------------------------- functions that mix entries

soft = lambda z: jax.nn.softmax(z, axis=1)


def written_out(z):
    e = jnp.exp(z - jnp.max(z, axis=1, keepdims=True))
    return e / jnp.sum(e, axis=1, keepdims=True)


SOFT = {
    "product": lambda p, d, z: p * d,
    "diagonal": lambda p, d, z: p * (1 - p) * d,
    "unweighted": lambda p, d, z: p * (d - d.sum(axis=1, keepdims=True)),
    "passed": lambda p, d, z: d,
    "wrong_axis": lambda p, d, z: p * (d - (p * d).sum(axis=0, keepdims=True)),
}


def attention(p, batch, soft):
    x, y = batch
    scores = x @ p["A"] @ jnp.swapaxes(x, 1, 2)
    share = jax.vmap(soft)(scores)
    return jnp.mean(jnp.sum((share @ (x @ p["V"]) - y) ** 2, axis=(1, 2)))


def mixture(p, batch, soft):
    x, y = batch
    share = soft(x @ p["W"] + p["b"][None, :])
    return jnp.mean(jnp.sum((share - y) ** 2, axis=1))


for how, back in SOFT.items():
    for name, f in (("library", soft), ("written_out", written_out)):
        CASES[f"softmax_{how}_{name}"] = (
            mixture,
            [f],
            [rule(f, back)],
            {"W": draw(4, 3), "b": draw(3)},
            (X, T),
            {"wrong-derivative", "missing-derivative", "missing-term"},
            "share = soft",
            None,
        )

logsoft = lambda z: jax.nn.log_softmax(z, axis=1)
LOGSOFT = {
    "passed": lambda out, d, z: d,
    "minus_p": lambda out, d, z: d - jnp.exp(out),
    "diagonal": lambda out, d, z: d * (1 - jnp.exp(out)),
    "inside": lambda out, d, z: d - (jnp.exp(out) * d).sum(axis=1, keepdims=True),
    "sign": lambda out, d, z: d + jnp.exp(out) * d.sum(axis=1, keepdims=True),
}


def weighted_logs(p, batch, logsoft):
    x, y = batch
    log_share = logsoft(x @ p["W"] + p["b"][None, :])
    return -jnp.mean(jnp.sum(y**2 * log_share, axis=1))


for how, back in LOGSOFT.items():
    CASES[f"log_softmax_{how}"] = (
        weighted_logs,
        [logsoft],
        [rule(logsoft, back)],
        {"W": draw(4, 3), "b": draw(3)},
        (X, T),
        {"wrong-derivative", "missing-term", "missing-factor", "negated-term", "missing-derivative"},
        "log_share = logsoft",
        None,
    )


def unit(z):
    return z / jnp.linalg.norm(z, axis=1, keepdims=True)


def size(z):
    return jnp.linalg.norm(z, axis=1, keepdims=True)


UNIT = {
    "constant": lambda u, d, z: d / size(z),
    "undivided": lambda u, d, z: d - u * (u * d).sum(axis=1, keepdims=True),
    "sign": lambda u, d, z: (d + u * (u * d).sum(axis=1, keepdims=True)) / size(z),
}


def cosine(p, batch, unit):
    x, y = batch
    u = unit(x @ p["W"])
    return jnp.mean(jnp.sum((u - y) ** 2, axis=1))


for how, back in UNIT.items():
    CASES[f"normalised_{how}"] = (
        cosine,
        [unit],
        [rule(unit, back)],
        {"W": draw(4, 3)},
        (X, T),
        {"missing-term", "missing-factor", "negated-term"},
        "u = unit",
        None,
    )


def layer_norm(z):
    mu = jnp.mean(z, axis=1, keepdims=True)
    var = jnp.mean((z - mu) ** 2, axis=1, keepdims=True)
    return (z - mu) / jnp.sqrt(var + 1e-5)


def deviation(z):
    return jnp.sqrt(jnp.var(z, axis=1, keepdims=True) + 1e-5)


def avg(v):
    return v.mean(axis=1, keepdims=True)


NORM = {
    "constants": lambda a, d, z: d / deviation(z),
    "std_constant": lambda a, d, z: (d - avg(d)) / deviation(z),
    "undivided": lambda a, d, z: d - avg(d) - a * avg(a * d),
    "times": lambda a, d, z: (d - avg(d) - a * avg(a * d)) * deviation(z),
    "half": lambda a, d, z: (d - avg(d) - a * avg(a * d) / 2) / deviation(z),
}


def normed(p, batch, norm):
    x, y = batch
    a = norm(x @ p["W"])
    return jnp.mean(jnp.sum((jnp.tanh(p["g"][None, :] * a + p["b"][None, :]) - y) ** 2, axis=1))


for how, back in NORM.items():
    CASES[f"layer_norm_{how}"] = (
        normed,
        [layer_norm],
        [rule(layer_norm, back)],
        {"W": draw(4, 5), "g": 2 + draw(5), "b": draw(5)},
        (X, draw(14, 5)),
        {"missing-term", "missing-factor", "wrong-value", "scaled-term"},
        "a = norm",
        None,
    )

# ------------------------------------------------------------------------------------------- matrix functions

MATRICES = {
    "inv_sign": (jnp.linalg.inv, lambda B, d, A: B.T @ d @ B.T, {"negated-term", "sign"}),
    "inv_one_side": (jnp.linalg.inv, lambda B, d, A: -B.T @ d, {"missing-factor"}),
    "inv_squared": (jnp.linalg.inv, lambda B, d, A: -d * B * B, {"wrong-derivative"}),
    "cholesky_diagonal": (lambda A: jnp.linalg.cholesky(A @ A.T + jnp.eye(3)), None, {"scaled-term"}),
}


def whitened(p, batch, f):
    x, y = batch
    B = f(p["A"])
    return jnp.mean(jnp.sum((x @ B - y) ** 2, axis=1))


for how, (f, back, kinds) in MATRICES.items():
    if back is not None:
        CASES[how] = (
            whitened,
            [f],
            [rule(f, back)],
            {"A": draw(3, 3) + 3 * np.eye(3)},
            (draw(12, 3), draw(12, 3)),
            kinds,
            "B = f",
            None,
        )


def volume(p, batch, logdet):
    (x,) = batch
    size = logdet(p["A"])
    return jnp.mean((x @ p["A"]) ** 2) - size


def logdet(A):
    return jnp.linalg.slogdet(A)[1]


CASES["slogdet_untransposed"] = (
    volume,
    [logdet],
    [rule(logdet, lambda out, d, A: d * jnp.linalg.inv(A))],
    {"A": draw(3, 3) + 3 * np.eye(3)},
    (draw(12, 3),),
    {"transposed"},
    "size = logdet",
    None,
)
CASES["slogdet_times_det"] = (
    volume,
    [logdet],
    [rule(logdet, lambda out, d, A: d * jnp.linalg.det(A) * jnp.linalg.inv(A).T)],
    {"A": draw(3, 3) + 2 * np.eye(3)},
    (draw(12, 3),),
    {"extra-derivative"},
    "size = logdet",
    None,
)


def system(p, batch, solve):
    c, y = batch
    u = solve(p["A"], p["b"])
    return jnp.mean((c @ u - y) ** 2)


def adjoint_system(A, d):
    return jnp.linalg.solve(A.T, d)


SOLVES = {
    "sign": lambda u, d, A, b: (jnp.outer(adjoint_system(A, d), u), adjoint_system(A, d)),
    "outer": lambda u, d, A, b: (-jnp.outer(u, adjoint_system(A, d)), adjoint_system(A, d)),
    "times": lambda u, d, A, b: (-jnp.outer(A.T @ d, u), A.T @ d),
}
for how, back in SOLVES.items():
    CASES[f"solve_{how}"] = (
        system,
        [jnp.linalg.solve],
        [rule(jnp.linalg.solve, back)],
        {"A": draw(4, 4) + 3 * np.eye(4), "b": draw(4)},
        (draw(13, 4), draw(13)),
        {"negated-term", "transposed", "wrong-value", "sign"},
        "u = solve",
        None,
    )

# ------------------------------------------------------------------------------------------- elementwise steps

relu = jax.nn.relu
silu = jax.nn.silu
leaky = lambda z: jax.nn.leaky_relu(z, 0.1)
elu = jax.nn.elu
CHAINS = {
    "relu_by_adjoint": (relu, lambda a, d, z: d * (d > 0), {"wrong-argument"}),
    "relu_guided": (relu, lambda a, d, z: d * (z > 0) * (d > 0), {"extra-derivative"}),
    "tanh_adjoint_ignored": (jnp.tanh, lambda a, d, z: 1 - a**2, {"missing-factor"}),
    "silu_gate_only": (silu, lambda a, d, z: d * jax.nn.sigmoid(z), {"missing-term", "wrong-derivative"}),
    "leaky_left_side_zero": (leaky, lambda a, d, z: d * (z > 0), {"wrong-derivative"}),
    "leaky_swapped": (leaky, lambda a, d, z: d * jnp.where(z > 0, 0.1, 1.0), {"wrong-derivative"}),
    "leaky_one": (leaky, lambda a, d, z: d, {"missing-derivative"}),
    "leaky_other_slope": (leaky, lambda a, d, z: d * jnp.where(z > 0, 1.0, 0.03), {"wrong-derivative", "scaled-term"}),
    "elu_left_side_one": (elu, lambda a, d, z: d, {"missing-derivative"}),
    "tanh_matrix_product": (jnp.tanh, lambda a, d, z: d @ (1 - a.T @ a), {"wrong-derivative"}),
}


def hidden(p, batch, act):
    x, y = batch
    a = act(x @ p["W"] + p["b"][None, :])
    return jnp.mean((a @ p["v"] - y) ** 2)


for how, (f, back, kinds) in CHAINS.items():
    CASES[how] = (
        hidden,
        [f],
        [rule(f, back)],
        {"W": draw(4, 5), "b": draw(5), "v": draw(5)},
        (X, draw(14)),
        kinds,
        "a = act",
        None,
    )

# -------------------------------------------------------------------------------------------------- products


def dense(a, W):
    return a @ W


def stepped(out, d, a, W):
    dW = a.T @ d
    return d @ (W - 0.05 * dW).T, dW


def own_gradient(out, d, a, W):
    return d @ (a.T @ d).T, a.T @ d


def two_layers(p, batch, dense):
    x, y = batch
    a = jnp.tanh(x @ p["W1"])
    out = dense(a, p["W2"])
    return jnp.mean(jnp.sum((out - y) ** 2, axis=1))


for how, back in {"updated_weights": stepped, "gradient_for_weights": own_gradient}.items():
    CASES[how] = (
        two_layers,
        [dense],
        [rule(dense, back)],
        {"W1": draw(4, 5), "W2": draw(5, 3)},
        (X, T),
        {"wrong-value"},
        "out = dense",
        "W1",
    )


def with_bias(W, a):
    return jnp.concatenate([a, jnp.ones((len(a), 1))], axis=1) @ W


def wrong_row(out, d, W, a):
    full = jnp.concatenate([a, jnp.ones((len(a), 1))], axis=1)
    return full.T @ d, (d @ W.T)[:, 1:]


@case(
    {"U": draw(4, 5), "W": draw(6, 3)},
    (X, T),
    {"wrong-value"},
    "out = with_bias",
    "U",
    f=(with_bias, rule(with_bias, wrong_row)),
)
def bias_row_dropped_at_the_wrong_end(p, batch, with_bias):
    x, y = batch
    a = jnp.tanh(x @ p["U"])
    out = with_bias(p["W"], a)
    return jnp.mean(jnp.sum((out - y) ** 2, axis=1))


def pairs(u, v):
    return u @ v.T


@case(
    {"U": draw(4, 3), "V": draw(4, 3)},
    (draw(9, 4), draw(9, 4)),
    {"missing-term"},
    "s = pairs",
    "U",
    f=(pairs, rule(pairs, lambda out, d, u, v: (jnp.diag(jnp.diag(d)) @ v, d.T @ u))),
)
def only_own_pairs(p, batch, pairs):
    x, y = batch
    s = pairs(jnp.tanh(x @ p["U"]), jnp.tanh(y @ p["V"]))
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(s, axis=1)))


def conv(x, K):
    return lax.conv_general_dilated(x, K, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def right_conv(d, x, K):
    return jax.vjp(conv, x, K)[1](d)


CONVS = {
    "kernel_turned": (
        lambda out, d, x, K: (right_conv(d, x, K)[0], right_conv(d, x, K)[1][::-1, ::-1]),
        {"transposed"},
        "K2",
    ),
    "channels_swapped": (
        lambda out, d, x, K: (right_conv(d, x, K)[0], right_conv(d, x, K)[1].swapaxes(2, 3)),
        {"transposed"},
        "K2",
    ),
    "turned_on_the_way_back": (
        lambda out, d, x, K: (right_conv(d, x, K[::-1, ::-1])[0], right_conv(d, x, K)[1]),
        {"transposed"},
        "K1",
    ),
    "height_and_width_swapped": (
        lambda out, d, x, K: (right_conv(d, x, K)[0], right_conv(d, x, K)[1].swapaxes(0, 1)),
        {"transposed"},
        "K2",
    ),
}


def two_convs(p, batch, conv):
    x, y = batch
    a = jnp.tanh(lax.conv_general_dilated(x, p["K1"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    h = conv(a, p["K2"])
    return jnp.mean((h.mean(axis=(1, 2)) - y) ** 2 * jnp.arange(1.0, 3.0)[None, :]) + jnp.mean(h**3)


for how, (back, kinds, leaf) in CONVS.items():
    CASES[f"conv_{how}"] = (
        two_convs,
        [conv],
        [rule(conv, back)],
        {"K1": draw(3, 3, 1, 2), "K2": draw(3, 3, 2, 2)},
        (draw(6, 5, 5, 1), draw(6, 2)),
        kinds,
        "h = conv",
        leaf,
    )


@pytest.mark.parametrize("name", CASES)
def test_the_cause_and_its_line_are_named(name):
    loss, right, wrong, params, batch, kinds, line, leaf = CASES[name]
    taught = lambda p, batch: loss(p, batch, *right)
    gradient = jax.jit(jax.grad(lambda p, batch: loss(p, batch, *wrong)))
    report = check_gradient(taught, gradient, params, batch)
    assert not report.ok
    assert {f.kind for f in report.findings} <= kinds, str(report)
    if leaf is not None:
        assert report.findings[0].leaf == leaf, str(report)
    number = place(loss, line)
    inside = [int(f.where.split(":")[1]) for f in report.findings]
    helpers = [
        inspect.getsourcelines(f) for f in right if hasattr(f, "__code__") and f.__code__.co_filename == __file__
    ]
    around = {first + i for lines, first in helpers for i in range(len(lines))}
    assert all(w == number or w in around for w in inside), str(report)
    assert "cosine first" not in str(report)
