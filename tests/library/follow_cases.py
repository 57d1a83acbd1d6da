"""Gradients by hand, in the styles in which people write them, each with a mistake on a line that is marked.

`# wrong: name` marks the line of the mistake in the gradient `name`. In those marked `silent` there is no line that
could be shown to be wrong.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    name: str
    loss: Callable[..., Any]
    gradient: Callable[..., Any]
    params: Any
    batch: Any
    silent: bool
    lines: tuple[int, ...]


CASES: list[Case] = []

ONE_OF_TWO = {"softmax_over_examples", "another_forward_pass"}
"""Cases in which the line that is marked, or the one that uses what it makes, holds the mistake: no more is shown."""


def wrong(loss, params, batch, silent=False):
    """The function below is a wrong gradient of `loss`."""

    def add(gradient, name=None):
        name = name or gradient.__name__
        text = Path(__file__).read_text(encoding="utf-8").split("\n")
        marked = [k for k, line in enumerate(text, 1) if line.rstrip().endswith(f"# wrong: {name}")]
        CASES.append(Case(name, loss, gradient, params, batch, silent, tuple(marked)))
        return gradient

    return add


def normal(seed, *shape, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------ two layers, vectorised


def net_loss(p, batch):
    X, Y = batch
    z1 = X @ p["W1"] + p["b1"]
    a1 = jax.nn.sigmoid(z1)
    z2 = a1 @ p["W2"] + p["b2"]
    logp = jax.nn.log_softmax(z2)
    return -jnp.mean(jnp.sum(Y * logp, axis=1))


net = {"W1": normal(1, 5, 4), "b1": normal(2, 4), "W2": normal(3, 4, 3), "b2": normal(4, 3)}
labelled = (normal(5, 9, 5), np.eye(3)[np.random.default_rng(6).integers(0, 3, 9)])


@wrong(net_loss, net, labelled)
def slope_left_out(p, batch):
    X, Y = batch
    n = X.shape[0]
    z1 = X @ p["W1"] + p["b1"]
    a1 = sigmoid(z1)
    probs = softmax(a1 @ p["W2"] + p["b2"])
    dz2 = (probs - Y) / n
    dW2 = a1.T @ dz2
    db2 = dz2.sum(axis=0)
    da1 = dz2 @ p["W2"].T
    dz1 = da1  # wrong: slope_left_out
    dW1 = X.T @ dz1
    db1 = dz1.sum(axis=0)
    return {"W1": dW1, "b1": db1, "W2": dW2, "b2": db2}


@wrong(net_loss, net, labelled)
def slope_of_tanh(p, batch):
    X, Y = batch
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    probs = softmax(a1 @ p["W2"] + p["b2"])
    delta2 = probs - Y
    delta1 = (delta2 @ p["W2"].T) * (1 - a1**2)  # wrong: slope_of_tanh
    grads = {}
    grads["W2"] = a1.T @ delta2 / len(X)
    grads["b2"] = delta2.mean(axis=0)
    grads["W1"] = X.T @ delta1 / len(X)
    grads["b1"] = delta1.mean(axis=0)
    return grads


@wrong(net_loss, net, labelled)
def plus_for_minus(p, batch):
    X, Y = batch
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    scores = a1 @ p["W2"] + p["b2"]
    e = np.exp(scores)
    probs = e / e.sum(axis=1, keepdims=True)
    d2 = (probs + Y) / len(Y)  # wrong: plus_for_minus
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    return {"W1": X.T @ d1, "b1": d1.sum(0), "W2": a1.T @ d2, "b2": d2.sum(0)}


@wrong(net_loss, net, labelled)
def softmax_over_examples(p, batch):
    X, Y = batch
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    scores = a1 @ p["W2"] + p["b2"]
    e = np.exp(scores)
    probs = e / e.sum(axis=0)  # wrong: softmax_over_examples
    d2 = (probs - Y) / len(Y)
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    return {"W1": X.T @ d1, "b1": d1.sum(0), "W2": a1.T @ d2, "b2": d2.sum(0)}


@wrong(net_loss, net, labelled)
def inputs_for_activations(p, batch):
    X, Y = batch
    z1 = X @ p["W1"] + p["b1"]
    a1 = sigmoid(z1)
    d2 = (softmax(a1 @ p["W2"] + p["b2"]) - Y) / len(Y)
    gW2 = z1.T @ d2  # wrong: inputs_for_activations
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    return {"W1": X.T @ d1, "b1": d1.sum(0), "W2": gW2, "b2": d2.sum(0)}


@wrong(net_loss, net, labelled)
def no_mean_anywhere(p, batch):
    X, Y = batch
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    d2 = softmax(a1 @ p["W2"] + p["b2"]) - Y  # wrong: no_mean_anywhere
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    gW1, gb1 = X.T @ d1, d1.sum(0)
    gW2, gb2 = a1.T @ d2, d2.sum(0)
    return {"W1": gW1, "b1": gb1, "W2": gW2, "b2": gb2}


@wrong(net_loss, net, labelled)
def mean_in_one_layer_only(p, batch):
    X, Y = batch
    n = len(X)
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    d2 = softmax(a1 @ p["W2"] + p["b2"]) - Y
    gW2 = a1.T @ d2 / n
    gb2 = d2.sum(0) / n
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    gW1 = X.T @ d1  # wrong: mean_in_one_layer_only
    gb1 = d1.sum(0) / n
    return {"W1": gW1, "b1": gb1, "W2": gW2, "b2": gb2}


@wrong(net_loss, net, labelled)
def minus_in_the_error(p, batch):
    X, Y = batch
    n = len(X)
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    d2 = Y - softmax(a1 @ p["W2"] + p["b2"])  # wrong: minus_in_the_error
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    return {"W1": X.T @ d1 / n, "b1": d1.sum(0) / n, "W2": a1.T @ d2 / n, "b2": d2.sum(0) / n}


@wrong(net_loss, net, labelled)
def minus_at_the_end(p, batch):
    X, Y = batch
    n = len(X)
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    d2 = (softmax(a1 @ p["W2"] + p["b2"]) - Y) / n
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    g = {"W1": X.T @ d1, "b1": d1.sum(0), "W2": a1.T @ d2, "b2": d2.sum(0)}
    return {k: -v for k, v in g.items()}  # wrong: minus_at_the_end


@wrong(net_loss, net, labelled)
def slope_used_twice(p, batch):
    X, Y = batch
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    d2 = (softmax(a1 @ p["W2"] + p["b2"]) - Y) / len(X)
    slope = a1 * (1 - a1)
    d1 = (d2 @ p["W2"].T) * slope
    d1 *= slope  # wrong: slope_used_twice
    return {"W1": X.T @ d1, "b1": d1.sum(0), "W2": a1.T @ d2, "b2": d2.sum(0)}


@wrong(net_loss, net, labelled)
def bias_from_the_wrong_layer(p, batch):
    X, Y = batch
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    d2 = (softmax(a1 @ p["W2"] + p["b2"]) - Y) / len(X)
    da1 = d2 @ p["W2"].T
    d1 = da1 * a1 * (1 - a1)
    gW1 = X.T @ d1
    gb1 = da1.sum(axis=0)  # wrong: bias_from_the_wrong_layer
    return {"W1": gW1, "b1": gb1, "W2": a1.T @ d2, "b2": d2.sum(0)}


@wrong(net_loss, net, labelled)
def product_written_as_matrix_product(p, batch):
    X, Y = batch
    a1 = sigmoid(X @ p["W1"] + p["b1"])
    d2 = (softmax(a1 @ p["W2"] + p["b2"]) - Y) / len(X)
    da1 = np.dot(d2, p["W2"].T)
    d1 = np.dot(da1, np.dot(a1.T, 1 - a1))  # wrong: product_written_as_matrix_product
    return {"W1": X.T @ d1, "b1": d1.sum(0), "W2": a1.T @ d2, "b2": d2.sum(0)}


def sigmoid_prime(z):
    s = sigmoid(z)
    return s * (1 + s)  # wrong: slope_in_a_helper


@wrong(net_loss, net, labelled)
def slope_in_a_helper(p, batch):
    X, Y = batch
    z1 = X @ p["W1"] + p["b1"]
    a1 = sigmoid(z1)
    d2 = (softmax(a1 @ p["W2"] + p["b2"]) - Y) / len(X)
    d1 = (d2 @ p["W2"].T) * sigmoid_prime(z1)
    return {"W1": X.T @ d1, "b1": d1.sum(0), "W2": a1.T @ d2, "b2": d2.sum(0)}


def forward_with_tanh(p, X):
    z1 = X @ p["W1"] + p["b1"]
    a1 = np.tanh(z1)  # wrong: another_forward_pass
    return z1, a1, a1 @ p["W2"] + p["b2"]


@wrong(net_loss, net, labelled)
def another_forward_pass(p, batch):
    X, Y = batch
    _, a1, z2 = forward_with_tanh(p, X)
    d2 = (softmax(z2) - Y) / len(X)
    d1 = (d2 @ p["W2"].T) * a1 * (1 - a1)
    return {"W1": X.T @ d1, "b1": d1.sum(0), "W2": a1.T @ d2, "b2": d2.sum(0)}


class Network:
    """Two layers with a cache, as courses write them."""

    def __init__(self, params):
        self.params = params
        self.cache = {}
        self.grads = {}

    def forward(self, X):
        Z1 = X @ self.params["W1"] + self.params["b1"]
        A1 = sigmoid(Z1)
        self.cache = {"X": X, "Z1": Z1, "A1": A1}
        return softmax(A1 @ self.params["W2"] + self.params["b2"])

    def backward(self, P, Y, wrong):
        n = len(Y)
        c = self.cache
        c["dZ2"] = (P - Y) / n
        self.grads["W2"] = c["A1"].T @ c["dZ2"]
        self.grads["b2"] = c["dZ2"].sum(axis=0)
        if wrong == "class_wrong_weights":
            c["dA1"] = c["dZ2"] @ (self.params["W2"] - 0.1 * self.grads["W2"]).T  # wrong: class_wrong_weights
        else:
            c["dA1"] = c["dZ2"] @ self.params["W2"].T
        if wrong == "class_slope_of_z":
            c["dZ1"] = c["dA1"] * c["Z1"] * (1 - c["Z1"])  # wrong: class_slope_of_z
        else:
            c["dZ1"] = c["dA1"] * c["A1"] * (1 - c["A1"])
        self.grads["W1"] = c["X"].T @ c["dZ1"]
        if wrong == "class_bias_mean":
            self.grads["b1"] = c["dZ1"].mean(axis=0)  # wrong: class_bias_mean
        else:
            self.grads["b1"] = c["dZ1"].sum(axis=0)


def by_class(wrong):
    def gradient(p, batch):
        X, Y = batch
        net = Network(p)
        net.backward(net.forward(X), Y, wrong)
        return net.grads

    return gradient


for name in ("class_wrong_weights", "class_slope_of_z", "class_bias_mean"):
    wrong(net_loss, net, labelled)(by_class(name), name)


@wrong(net_loss, net, labelled)
def example_by_example(p, batch):
    X, Y = batch
    g = {k: np.zeros_like(v) for k, v in p.items()}
    for x, y in zip(X, Y, strict=True):
        h = sigmoid(x @ p["W1"] + p["b1"])
        s = h @ p["W2"] + p["b2"]
        q = np.exp(s) / np.exp(s).sum()
        d = q - y
        back = p["W2"] @ d
        dh = back * (1 - h)  # wrong: example_by_example
        g["W2"] += np.outer(h, d)
        g["b2"] += d
        g["W1"] += np.outer(x, dh)
        g["b1"] += dh
    return {k: v / len(X) for k, v in g.items()}


@wrong(net_loss, net, labelled)
def example_by_example_index(p, batch):
    X, Y = batch
    n = X.shape[0]
    dW1, db1 = np.zeros_like(p["W1"]), np.zeros_like(p["b1"])
    dW2, db2 = np.zeros_like(p["W2"]), np.zeros_like(p["b2"])
    for i in range(n):
        a = sigmoid(X[i] @ p["W1"] + p["b1"])
        z = a @ p["W2"] + p["b2"]
        e = np.exp(z - z.max())
        dz = e / e.sum() - Y[i]
        dW2 += np.outer(a, dz) / n
        db2 += dz / n
        da = p["W2"] @ dz
        du = da  # wrong: example_by_example_index
        dW1 += np.outer(X[i], du) / n
        db1 += du / n
    return {"W1": dW1, "b1": db1, "W2": dW2, "b2": db2}


@wrong(net_loss, net, labelled)
def example_by_example_sum(p, batch):
    X, Y = batch
    n = X.shape[0]
    dW1, db1 = np.zeros_like(p["W1"]), np.zeros_like(p["b1"])
    dW2, db2 = np.zeros_like(p["W2"]), np.zeros_like(p["b2"])
    for i in range(n):
        a = sigmoid(X[i] @ p["W1"] + p["b1"])
        z = a @ p["W2"] + p["b2"]
        e = np.exp(z - z.max())
        dz = (e / e.sum() - Y[i]) / n
        dW2 += np.outer(a, dz)
        db2 = dz  # wrong: example_by_example_sum
        du = (p["W2"] @ dz) * a * (1 - a)
        dW1 += np.outer(X[i], du)
        db1 += du
    return {"W1": dW1, "b1": db1, "W2": dW2, "b2": db2}


# ------------------------------------------------------------------------------------------ JAX


def relu_loss(p, batch):
    x, y = batch
    h = jax.nn.relu(x @ p["W"] + p["c"])
    out = h @ p["v"]
    return jnp.mean((out - y) ** 2)


relu_params = jax.tree.map(jnp.asarray, {"W": normal(11, 4, 6), "c": normal(12, 6), "v": normal(13, 6)})
relu_batch = (jnp.asarray(normal(14, 12, 4)), jnp.asarray(normal(15, 12)))


@wrong(relu_loss, relu_params, relu_batch)
@jax.jit
def jitted_mask_of_output_weights(p, batch):
    x, y = batch
    pre = x @ p["W"] + p["c"]
    h = jnp.maximum(pre, 0)
    e = 2 * (h @ p["v"] - y) / x.shape[0]
    dh = jnp.outer(e, p["v"])
    dpre = jnp.where(dh > 0, dh, 0)  # wrong: jitted_mask_of_output_weights
    return {"W": x.T @ dpre, "c": dpre.sum(0), "v": h.T @ e}


@wrong(relu_loss, relu_params, relu_batch)
def jax_mask_forgotten(p, batch):
    x, y = batch
    h = jax.nn.relu(x @ p["W"] + p["c"])
    e = 2 * (h @ p["v"] - y) / len(x)
    grads = jax.tree.map(jnp.zeros_like, p)
    grads["v"] = grads["v"] + h.T @ e
    d_h = e[:, None] * p["v"]
    grads["W"] = grads["W"] + x.T @ d_h  # wrong: jax_mask_forgotten
    grads["c"] = grads["c"] + d_h.sum(axis=0)
    return grads


@wrong(relu_loss, relu_params, relu_batch)
def jax_at_add(p, batch):
    x, y = batch
    n = len(x)
    dv = jnp.zeros_like(p["v"])
    dW = jnp.zeros_like(p["W"])
    dc = jnp.zeros_like(p["c"])
    for i in range(n):
        h = jax.nn.relu(x[i] @ p["W"] + p["c"])
        e = 2 * (h @ p["v"] - y[i]) / n
        dv = dv.at[:].add(e * h)
        du = jnp.where(h > 0, e, 0.0) * p["v"] * h  # wrong: jax_at_add
        dW = dW + jnp.outer(x[i], du)
        dc = dc + du
    return {"W": dW, "c": dc, "v": dv}


@wrong(relu_loss, relu_params, relu_batch)
def jax_vmapped(p, batch):
    def one(x, y):
        pre = x @ p["W"] + p["c"]
        h = jax.nn.relu(pre)
        e = h @ p["v"] - y
        dh = 2 * e * p["v"]
        dpre = dh * pre  # wrong: jax_vmapped
        return {"W": jnp.outer(x, dpre), "c": dpre, "v": 2 * e * h}

    x, y = batch
    return jax.tree.map(lambda g: g.mean(axis=0), jax.vmap(one)(x, y))


# ------------------------------------------------------------------------------------------ many layers, time


def deep_loss(layers, batch):
    x, y = batch
    h = x
    for W, b in layers[:-1]:
        h = jnp.tanh(h @ W + b)
    W, b = layers[-1]
    return 0.5 * jnp.mean(jnp.sum((h @ W + b - y) ** 2, axis=1))


layers = [(normal(20 + k, *s, scale=0.6), normal(30 + k, s[1])) for k, s in enumerate([(4, 5), (5, 6), (6, 5), (5, 2)])]
regression = (normal(41, 10, 4), normal(42, 10, 2))


@wrong(deep_loss, layers, regression)
def layers_in_a_loop(layers, batch):
    x, y = batch
    hs = [x]
    for W, b in layers[:-1]:
        hs.append(np.tanh(hs[-1] @ W + b))
    W, b = layers[-1]
    delta = (hs[-1] @ W + b - y) / len(x)
    grads = [(hs[-1].T @ delta, delta.sum(axis=0))]
    for l in range(len(layers) - 2, -1, -1):
        back = delta @ layers[l + 1][0].T
        delta = back * (1 - hs[l] ** 2) if hs[l].shape == back.shape else back  # wrong: layers_in_a_loop
        grads.insert(0, (hs[l].T @ delta, delta.sum(axis=0)))
    return grads


@wrong(deep_loss, layers, regression)
def layers_slope_of_sigmoid(layers, batch):
    x, y = batch
    hs = [x]
    for W, b in layers[:-1]:
        hs.append(np.tanh(hs[-1] @ W + b))
    W, b = layers[-1]
    delta = (hs[-1] @ W + b - y) / len(x)
    dW, db = [hs[-1].T @ delta], [delta.sum(axis=0)]
    for (W, _), h, below in zip(layers[:0:-1], hs[:0:-1], hs[-2::-1], strict=True):
        back = delta @ W.T
        delta = back * h * (1 - h)  # wrong: layers_slope_of_sigmoid
        dW.append(below.T @ delta)
        db.append(delta.sum(axis=0))
    return list(zip(dW[::-1], db[::-1], strict=True))


@wrong(deep_loss, layers, regression)
def layers_weights_not_transposed_right(layers, batch):
    x, y = batch
    hs = [x]
    for W, b in layers[:-1]:
        hs.append(np.tanh(hs[-1] @ W + b))
    deltas = [None] * len(layers)
    deltas[-1] = (hs[-1] @ layers[-1][0] + layers[-1][1] - y) / len(x)
    for l in reversed(range(len(layers) - 1)):
        deltas[l] = (deltas[l + 1] @ layers[l + 1][0].T) * (1 - hs[l + 1] ** 2)
    dW = [h.T @ d for h, d in zip(hs, deltas, strict=True)]
    db = [d.sum(axis=1)[: d.shape[1]] for d in deltas]  # wrong: layers_weights_not_transposed_right
    return list(zip(dW, db, strict=True))


def rnn_loss(p, batch):
    x, y = batch
    h = jnp.zeros((x.shape[0], p["U"].shape[0]))
    for t in range(x.shape[1]):
        a = x[:, t] @ p["W"] + h @ p["U"]
        h = jnp.tanh(a)
    return jnp.mean((h @ p["v"] - y) ** 2)


rnn_params = {"W": normal(51, 3, 4, scale=0.7), "U": normal(52, 4, 4, scale=0.6), "v": normal(53, 4)}
rnn_batch = (normal(54, 8, 5, 3), normal(55, 8))


def unrolled(p, x):
    hs = [np.zeros((len(x), p["U"].shape[0]))]
    for t in range(x.shape[1]):
        hs.append(np.tanh(x[:, t] @ p["W"] + hs[-1] @ p["U"]))
    return hs


@wrong(rnn_loss, rnn_params, rnn_batch)
def rnn_not_transposed(p, batch):
    x, y = batch
    hs = unrolled(p, x)
    e = 2 * (hs[-1] @ p["v"] - y) / len(x)
    dW, dU, dv = np.zeros_like(p["W"]), np.zeros_like(p["U"]), hs[-1].T @ e
    dh = np.outer(e, p["v"])
    for t in reversed(range(x.shape[1])):
        da = dh * (1 - hs[t + 1] ** 2)
        dW += x[:, t].T @ da
        dU += hs[t].T @ da
        dh = da @ p["U"]  # wrong: rnn_not_transposed
    return {"W": dW, "U": dU, "v": dv}


@wrong(rnn_loss, rnn_params, rnn_batch)
def rnn_state_off_by_one(p, batch):
    x, y = batch
    hs = unrolled(p, x)
    e = 2 * (hs[-1] @ p["v"] - y) / len(x)
    dW, dU, dv = np.zeros_like(p["W"]), np.zeros_like(p["U"]), hs[-1].T @ e
    dh = np.outer(e, p["v"])
    for t in reversed(range(x.shape[1])):
        da = dh * (1 - hs[t] ** 2)  # wrong: rnn_state_off_by_one
        dW += x[:, t].T @ da
        dU += hs[t].T @ da
        dh = da @ p["U"].T
    return {"W": dW, "U": dU, "v": dv}


@wrong(rnn_loss, rnn_params, rnn_batch)
def rnn_wrong_state_in_one_leaf(p, batch):
    x, y = batch
    hs = unrolled(p, x)
    e = 2 * (hs[-1] @ p["v"] - y) / len(x)
    dW, dU, dv = np.zeros_like(p["W"]), np.zeros_like(p["U"]), hs[-1].T @ e
    dh = np.outer(e, p["v"])
    for t in reversed(range(x.shape[1])):
        da = dh * (1 - hs[t + 1] ** 2)
        dW += x[:, t].T @ da
        dU += hs[t + 1].T @ da  # wrong: rnn_wrong_state_in_one_leaf
        dh = da @ p["U"].T
    return {"W": dW, "U": dU, "v": dv}


# ------------------------------------------------------------------------------------------ other losses


def norm_loss(p, batch):
    x, y = batch
    z = x @ p["A"]
    mu = jnp.mean(z, axis=1, keepdims=True)
    centred = z - mu
    std = jnp.sqrt(jnp.mean(centred**2, axis=1, keepdims=True) + 1e-5)
    unit = centred / std
    out = p["g"] * unit + p["s"]
    return jnp.mean(jnp.sum(jnp.tanh(out) * y, axis=1))


norm_params = {"A": normal(61, 3, 5), "g": normal(62, 5) + 2, "s": normal(63, 5)}
norm_batch = (normal(64, 11, 3), normal(65, 11, 5))


@wrong(norm_loss, norm_params, norm_batch)
def layer_norm_no_mean_term(p, batch):
    x, y = batch
    z = x @ p["A"]
    c = z - z.mean(axis=1, keepdims=True)
    std = np.sqrt((c**2).mean(axis=1, keepdims=True) + 1e-5)
    unit = c / std
    dout = y * (1 - np.tanh(p["g"] * unit + p["s"]) ** 2) / len(x)
    dunit = dout * p["g"]
    dz = (dunit - unit * (dunit * unit).mean(axis=1, keepdims=True)) / std  # wrong: layer_norm_no_mean_term
    return {"A": x.T @ dz, "g": (dout * unit).sum(0), "s": dout.sum(0)}


@wrong(norm_loss, norm_params, norm_batch)
def layer_norm_gain_from_centred(p, batch):
    x, y = batch
    z = x @ p["A"]
    centred = z - z.mean(axis=1, keepdims=True)
    std = np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5)
    unit = centred / std
    dout = y * (1 - np.tanh(p["g"] * unit + p["s"]) ** 2) / len(x)
    dg = (dout * centred).sum(axis=0)  # wrong: layer_norm_gain_from_centred
    ds = dout.sum(axis=0)
    dunit = dout * p["g"]
    dz = (dunit - dunit.mean(1, keepdims=True) - unit * (dunit * unit).mean(axis=1, keepdims=True)) / std
    return {"A": x.T @ dz, "g": dg, "s": ds}


def ridge_loss(w, batch):
    x, y = batch
    r = x @ w - y
    return jnp.mean(r**2) + 0.1 * jnp.sum(w**2)


ridge_params, ridge_batch = normal(71, 5), (normal(72, 12, 5), normal(73, 12))


@wrong(ridge_loss, ridge_params, ridge_batch)
def penalty_left_out(w, batch):
    x, y = batch
    r = x @ w - y
    g = 2 * x.T @ r / len(y)  # wrong: penalty_left_out
    return g


@wrong(ridge_loss, ridge_params, ridge_batch)
def penalty_halved(w, batch):
    x, y = batch
    r = x @ w - y
    fit = 2 * x.T @ r / len(y)
    penalty = 0.1 * w  # wrong: penalty_halved
    return fit + penalty


@wrong(ridge_loss, ridge_params, ridge_batch)
def square_without_two(w, batch):
    x, y = batch
    r = x @ w - y
    fit = x.T @ r / len(y)  # wrong: square_without_two
    return fit + 0.2 * w


@wrong(ridge_loss, ridge_params, ridge_batch)
def one_line(w, batch):
    x, y = batch
    return 2 * x.T @ (x @ w + y) / len(y) + 0.2 * w  # wrong: one_line


@wrong(ridge_loss, ridge_params, ridge_batch)
def loop_over_features(w, batch):
    x, y = batch
    g = np.zeros_like(w)
    r = x @ w - y
    for j in range(len(w)):
        g[j] = 2 * (r * x[:, j]).mean() + 0.2 * w[0]  # wrong: loop_over_features
    return g


def margin_loss(W, batch):
    x, t = batch
    s = x @ W
    right = s[jnp.arange(len(t)), t][:, None]
    m = jnp.maximum(0.0, s - right + 1.0)
    return jnp.sum(m) / len(t) + 0.05 * jnp.sum(W * W)


margin_batch = (normal(82, 10, 4), np.random.default_rng(83).integers(0, 3, 10))


@wrong(margin_loss, normal(81, 4, 3), margin_batch)
def margins_without_the_right_class(W, batch):
    x, t = batch
    n = len(t)
    s = x @ W
    m = np.maximum(0, s - s[np.arange(n), t][:, None] + 1)
    ds = (m > 0).astype(float) / n  # wrong: margins_without_the_right_class
    dW = x.T @ ds
    return dW + 0.1 * W


@wrong(margin_loss, normal(81, 4, 3), margin_batch)
def margins_in_loops(W, batch):
    x, t = batch
    dW = np.zeros_like(W)
    for i in range(len(t)):
        s = x[i] @ W
        for j in range(W.shape[1]):
            if j != t[i] and s[j] - s[t[i]] + 1 > 0:
                dW[:, j] += x[i]
                dW[:, t[i]] -= x[i]
    dW /= len(t)
    dW += 0.05 * W  # wrong: margins_in_loops
    return dW


def attention_loss(p, batch):
    x, y = batch
    q, k, v = x @ p["Q"], x @ p["K"], x @ p["V"]
    scores = jnp.einsum("ntd,nsd->nts", q, k) / jnp.sqrt(3.0)
    weights = jax.nn.softmax(scores, axis=-1)
    out = weights @ v
    return jnp.mean(jnp.sum((out - y) ** 2, axis=(1, 2)))


attention_params = {"Q": normal(91, 4, 3), "K": normal(92, 4, 3), "V": normal(93, 4, 3)}
attention_batch = (normal(94, 6, 5, 4), normal(95, 6, 5, 3))


def attention_parts(p, x):
    q, k, v = x @ p["Q"], x @ p["K"], x @ p["V"]
    s = np.einsum("ntd,nsd->nts", q, k) / np.sqrt(3.0)
    a = np.exp(s - s.max(-1, keepdims=True))
    return q, k, v, a / a.sum(-1, keepdims=True)


@wrong(attention_loss, attention_params, attention_batch)
def attention_scale_left_out(p, batch):
    x, y = batch
    q, k, v, a = attention_parts(p, x)
    dout = 2 * (a @ v - y) / len(x)
    dV = np.einsum("nti,nto->io", x, a.transpose(0, 2, 1) @ dout)
    da = dout @ v.transpose(0, 2, 1)
    ds = a * (da - (da * a).sum(-1, keepdims=True))
    dq = ds @ k  # wrong: attention_scale_left_out
    dk = ds.transpose(0, 2, 1) @ q / np.sqrt(3.0)
    return {"Q": np.einsum("nti,nto->io", x, dq), "K": np.einsum("nti,nto->io", x, dk), "V": dV}


@wrong(attention_loss, attention_params, attention_batch)
def attention_softmax_without_sum(p, batch):
    x, y = batch
    q, k, v, a = attention_parts(p, x)
    dout = 2 * (a @ v - y) / len(x)
    dV = np.einsum("nti,nto->io", x, a.transpose(0, 2, 1) @ dout)
    da = dout @ v.transpose(0, 2, 1)
    ds = a * da  # wrong: attention_softmax_without_sum
    dq = ds @ k / np.sqrt(3.0)
    dk = ds.transpose(0, 2, 1) @ q / np.sqrt(3.0)
    return {"Q": np.einsum("nti,nto->io", x, dq), "K": np.einsum("nti,nto->io", x, dk), "V": dV}


@wrong(attention_loss, attention_params, attention_batch)
def attention_keys_not_turned(p, batch):
    x, y = batch
    q, k, v, a = attention_parts(p, x)
    dout = 2 * (a @ v - y) / len(x)
    dv = a @ dout  # wrong: attention_keys_not_turned
    da = dout @ v.transpose(0, 2, 1)
    ds = a * (da - (da * a).sum(-1, keepdims=True)) / np.sqrt(3.0)
    dq, dk = ds @ k, ds.transpose(0, 2, 1) @ q
    return {k_: np.einsum("nti,nto->io", x, d) for k_, d in (("Q", dq), ("K", dk), ("V", dv))}


# ------------------------------------------------------------------------------------------ nothing to be shown


@wrong(ridge_loss, ridge_params, ridge_batch, silent=True)
def finite_differences(w, batch):
    """Each entry is a difference quotient of another loss, and no value on the way is one of this loss."""
    x, y = batch

    def value(w):
        return float(np.mean(np.abs(x @ w - y)))

    g = np.zeros_like(w)
    for j in range(len(w)):
        up, down = w.copy(), w.copy()
        up[j] += 1e-2
        down[j] -= 1e-2
        g[j] = (value(up) - value(down)) / 2e-2
    return g


@wrong(net_loss, net, labelled, silent=True)
def last_example_skipped(p, batch):
    """Every term that is added up is right; one is missing."""
    X, Y = batch
    g = {k: np.zeros_like(v) for k, v in p.items()}
    for i in range(len(X) - 1):
        h = sigmoid(X[i] @ p["W1"] + p["b1"])
        e = np.exp(h @ p["W2"] + p["b2"])
        d = (e / e.sum() - Y[i]) / len(X)
        dh = (p["W2"] @ d) * h * (1 - h)
        g["W2"] += np.outer(h, d)
        g["b2"] += d
        g["W1"] += np.outer(X[i], dh)
        g["b1"] += dh
    return g


_made = {}
exec(  # a function without a source
    "def from_text(w, batch):\n    x, y = batch\n    r = x @ w + y\n    return 2 * x.T @ r / len(y) + 0.2 * w\n",
    _made,
)
wrong(ridge_loss, ridge_params, ridge_batch, silent=True)(_made["from_text"])

wrong(ridge_loss, ridge_params, ridge_batch, silent=True)(
    jax.grad(lambda w, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)), "autodiff_of_another_loss"
)
