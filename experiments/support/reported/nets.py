"""Feed-forward nets: dense layers, activations, dropout, normalisation, convolutions, pooling."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.support.reported.case import Case, cause, integers, normal, wrong_and_right

CASES: list[Case] = []
wrong, right = wrong_and_right(CASES)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def one_hot(labels, k):
    return np.eye(k)[labels]


# ------------------------------------------------------------------------------------------ dense layers


def relu_net_loss(p, batch):
    X, y = batch
    h_pre = X @ p["W1"] + p["b1"]
    h = jnp.maximum(h_pre, 0)
    scores = h @ p["W2"] + p["b2"]
    log_p = jax.nn.log_softmax(scores)
    return -jnp.mean(log_p[jnp.arange(y.shape[0]), y])


def relu_net_params(seed):
    return {
        "W1": normal(seed, 4, 6),
        "b1": normal(seed + 1, 6),
        "W2": normal(seed + 2, 6, 3),
        "b2": normal(seed + 3, 3),
    }


relu_batch = (normal(100, 14, 4), integers(101, 3, 14))


@wrong(
    relu_net_loss,
    relu_net_params(102),
    relu_batch,
    cause("wrong-derivative", "wrong-value", "extra-derivative", leaf=("W1", "b1"), line="h = jnp.maximum(h_pre, 0)"),
)
def relu_backward_times_relu(p, batch, wrong=True):
    """The derivative of relu is taken to be relu itself: the gradient is multiplied by max(0, z)."""
    X, y = batch
    N = X.shape[0]
    h_pre = X.dot(p["W1"]) + p["b1"]
    h = np.maximum(0, h_pre)
    dscores = (softmax(h.dot(p["W2"]) + p["b2"]) - one_hot(y, 3)) / N
    dh = dscores.dot(p["W2"].T)
    dh_pre = dh * (h if wrong else (h > 0))
    return {
        "W1": X.T.dot(dh_pre),
        "b1": dh_pre.sum(axis=0),
        "W2": h.T.dot(dscores),
        "b2": dscores.sum(axis=0),
    }


@wrong(
    relu_net_loss,
    relu_net_params(106),
    relu_batch,
    cause("missing-derivative", leaf=("W1", "b1"), line="h = jnp.maximum(h_pre, 0)"),
)
def relu_masks_the_wrong_array(p, batch, wrong=True):
    """`dh[dh <= 0] = 0` was meant to zero where h is 0; here nothing is zeroed since a copy was masked."""
    X, y = batch
    hidden = np.maximum(X @ p["W1"] + p["b1"], 0)
    probs = softmax(hidden @ p["W2"] + p["b2"])
    probs[np.arange(len(y)), y] -= 1
    delta = probs / len(y)
    grads = {"W2": hidden.T @ delta, "b2": delta.sum(0)}
    dhidden = np.array(delta @ p["W2"].T)
    masked = dhidden.copy() if wrong else dhidden
    masked[hidden <= 0] = 0
    grads["W1"] = X.T @ dhidden
    grads["b1"] = dhidden.sum(0)
    return grads


@wrong(
    relu_net_loss,
    relu_net_params(110),
    relu_batch,
    cause("extra-derivative", "wrong-derivative", line=("scores = h @", "jax.nn.log_softmax(scores)")),
)
def softmax_derived_twice(p, batch, wrong=True):
    """probs - y is the gradient behind the softmax already; it is multiplied by softmax' once more."""

    class Dense:
        def __init__(self, W, b):
            self.W, self.b = W, b

        def forward(self, x):
            self.x = x
            return x @ self.W + self.b

        def backward(self, dout):
            self.dW = self.x.T @ dout
            self.db = dout.sum(axis=0)
            return dout @ self.W.T

    class SoftmaxLayer:
        def forward(self, x):
            self.out = softmax(x)
            return self.out

        def backward(self, dout):
            return dout * self.out * (1 - self.out) if wrong else dout

    X, y = batch
    first, second, last = Dense(p["W1"], p["b1"]), Dense(p["W2"], p["b2"]), SoftmaxLayer()
    z = first.forward(X)
    probs = last.forward(second.forward(np.maximum(z, 0)))
    d = last.backward((probs - one_hot(y, 3)) / len(y))
    d = second.backward(d) * (z > 0)
    first.backward(d)
    return {"W1": first.dW, "b1": first.db, "W2": second.dW, "b2": second.db}


def softmax_then_log_loss(p, batch):
    X, Y = batch
    z = X @ p["W"] + p["b"]
    probs = jax.nn.softmax(z, axis=-1)
    return -jnp.mean(jnp.sum(Y * jnp.log(probs), axis=-1))


@wrong(
    softmax_then_log_loss,
    {"W": normal(114, 5, 3), "b": normal(115, 3)},
    (normal(116, 16, 5), one_hot(integers(117, 3, 16), 3)),
    cause("wrong-derivative", "missing-term", line="jax.nn.softmax(z"),
)
def softmax_jacobian_is_its_diagonal(p, batch, wrong=True):
    """The softmax is differentiated like a sigmoid, p (1 - p), and the off-diagonal entries are lost."""
    X, Y = batch
    probs = softmax(X @ p["W"] + p["b"])
    dprobs = -Y / probs / len(X)
    dz = np.zeros_like(probs)
    for i in range(len(X)):
        jacobian = np.diag(probs[i]) - np.outer(probs[i], probs[i])
        if wrong:
            jacobian = np.diag(np.diag(jacobian))
        dz[i] = jacobian @ dprobs[i]
    return {"W": X.T @ dz, "b": dz.sum(axis=0)}


def digits_loss(p, batch):
    x, t = batch
    activation = x
    for w, b in zip(p["weights"], p["biases"], strict=True):
        z = jnp.dot(w, activation) + b
        activation = jax.nn.sigmoid(z)
    return 0.5 * jnp.sum((activation - t) ** 2) / x.shape[1]


digits_params = {
    "weights": [normal(118, 5, 4), normal(119, 5, 5), normal(120, 3, 5)],
    "biases": [normal(121, 5, 1), normal(122, 5, 1), normal(123, 3, 1)],
}
digits_batch = (normal(124, 4, 12), one_hot(integers(125, 3, 12), 3).T.copy())


@wrong(
    digits_loss,
    digits_params,
    digits_batch,
    cause("wrong-argument", "wrong-derivative", line="activation = jax.nn.sigmoid(z)"),
)
def sigmoid_prime_of_activations(p, batch, wrong=True):
    """sigmoid_prime computes sigmoid(x)(1 - sigmoid(x)), and is given the activations in place of the zs."""

    def sigmoid_prime(x):
        return sigmoid(x) * (1 - sigmoid(x))

    x, t = batch
    activations, zs = [x], []
    for w, b in zip(p["weights"], p["biases"], strict=True):
        zs.append(w @ activations[-1] + b)
        activations.append(sigmoid(zs[-1]))
    nabla_w, nabla_b = [None] * 3, [None] * 3
    given = activations[1:] if wrong else zs
    delta = (activations[-1] - t) / x.shape[1] * sigmoid_prime(given[-1])
    for layer in (2, 1, 0):
        nabla_b[layer] = delta.sum(axis=1, keepdims=True)
        nabla_w[layer] = delta @ activations[layer].T
        if layer:
            delta = p["weights"][layer].T @ delta * sigmoid_prime(given[layer - 1])
    return {"weights": nabla_w, "biases": nabla_b}


@wrong(
    digits_loss,
    digits_params,
    digits_batch,
    cause("sign", "negated-term", line=("(activation - t)", "/ x.shape[1]"), factor="-1"),
)
def target_minus_output(p, batch, wrong=True):
    """The error is target minus output, so that the gradient points the other way in every layer."""
    x, t = batch
    a = [x]
    for w, b in zip(p["weights"], p["biases"], strict=True):
        a.append(sigmoid(w.dot(a[-1]) + b))
    error = t - a[-1] if wrong else a[-1] - t
    delta = error * a[-1] * (1 - a[-1]) / x.shape[1]
    weights, biases = [], []
    for w, below in zip(reversed(p["weights"]), reversed(a[:-1]), strict=True):
        weights.insert(0, delta.dot(below.T))
        biases.insert(0, delta.sum(axis=1)[:, None])
        delta = w.T.dot(delta) * below * (1 - below)
    return {"weights": weights, "biases": biases}


def three_layers_loss(p, batch):
    X, Y = batch
    A1 = jnp.tanh(p["W1"] @ X + p["b1"])
    A2 = jnp.tanh(p["W2"] @ A1 + p["b2"])
    A3 = jax.nn.sigmoid(p["W3"] @ A2 + p["b3"])
    cost = -jnp.mean(Y * jnp.log(A3) + (1 - Y) * jnp.log(1 - A3))
    return cost


def three_layers_params(seed):
    shapes = {"W1": (5, 5), "b1": (5, 1), "W2": (5, 5), "b2": (5, 1), "W3": (1, 5), "b3": (1, 1)}
    return {name: normal(seed + i, *shape, scale=0.5) for i, (name, shape) in enumerate(shapes.items())}


three_layers_batch = (normal(126, 5, 13), integers(127, 2, 1, 13).astype(float))


@wrong(
    three_layers_loss,
    three_layers_params(128),
    three_layers_batch,
    cause("wrong-value", leaf="W2", line='A2 = jnp.tanh(p["W2"] @ A1'),
)
def second_layer_sees_the_inputs(p, batch, wrong=True):
    """dW2 is computed from the inputs X where the hidden activations A1 belong; both have five rows."""
    X, Y = batch
    m = X.shape[1]
    A1 = np.tanh(p["W1"] @ X + p["b1"])
    A2 = np.tanh(p["W2"] @ A1 + p["b2"])
    A3 = sigmoid(p["W3"] @ A2 + p["b3"])
    dZ3 = A3 - Y
    dW3 = dZ3 @ A2.T / m
    db3 = np.sum(dZ3, axis=1, keepdims=True) / m
    dZ2 = (p["W3"].T @ dZ3) * (1 - A2**2)
    dW2 = dZ2 @ (X if wrong else A1).T / m
    db2 = np.sum(dZ2, axis=1, keepdims=True) / m
    dZ1 = (p["W2"].T @ dZ2) * (1 - A1**2)
    dW1 = dZ1 @ X.T / m
    db1 = np.sum(dZ1, axis=1, keepdims=True) / m
    return {"W1": dW1, "b1": db1, "W2": dW2, "b2": db2, "W3": dW3, "b3": db3}


@wrong(
    three_layers_loss,
    three_layers_params(134),
    three_layers_batch,
    cause("missing-factor", "missing-term", "missing-derivative", leaf=("W1", "b1"), line="A2 = jnp.tanh("),
)
def backward_skips_a_layer(p, batch, wrong=True):
    """dA1 is computed from dZ2 without W2: the layer is not passed."""
    X, Y = batch
    m = X.shape[1]
    A1 = np.tanh(np.dot(p["W1"], X) + p["b1"])
    A2 = np.tanh(np.dot(p["W2"], A1) + p["b2"])
    A3 = sigmoid(np.dot(p["W3"], A2) + p["b3"])
    grads = {}

    def layer(n, dZ, A_prev):
        grads[f"W{n}"] = np.dot(dZ, A_prev.T) / m
        grads[f"b{n}"] = np.sum(dZ, axis=1, keepdims=True) / m

    dZ3 = A3 - Y
    layer(3, dZ3, A2)
    dZ2 = np.dot(p["W3"].T, dZ3) * (1 - np.power(A2, 2))
    layer(2, dZ2, A1)
    dA1 = dZ2 if wrong else np.dot(p["W2"].T, dZ2)
    dZ1 = dA1 * (1 - np.power(A1, 2))
    layer(1, dZ1, X)
    return grads


@wrong(
    three_layers_loss,
    three_layers_params(140),
    three_layers_batch,
    cause("wrong-value", "wrong-derivative", leaf=("W1", "b1"), line="A1 = jnp.tanh("),
)
def tanh_slope_of_the_next_layer(p, batch, wrong=True):
    """The slope 1 - A² of the first layer is taken at A2, an index off by one."""
    X, Y = batch
    m = X.shape[1]
    A = {0: X}
    A[1] = np.tanh(p["W1"] @ A[0] + p["b1"])
    A[2] = np.tanh(p["W2"] @ A[1] + p["b2"])
    A[3] = sigmoid(p["W3"] @ A[2] + p["b3"])
    g = {}
    dZ = A[3] - Y
    for layer in (3, 2, 1):
        g[f"W{layer}"] = dZ @ A[layer - 1].T / m
        g[f"b{layer}"] = dZ.mean(axis=1, keepdims=True)
        if layer > 1:
            at = 2 if wrong else layer - 1
            dZ = (p[f"W{layer}"].T @ dZ) * (1 - A[at] ** 2)
    return g


@wrong(
    three_layers_loss,
    three_layers_params(146),
    three_layers_batch,
    cause("structure", leaf="b2"),
)
def bias_summed_to_one_number(p, batch, wrong=True):
    """np.sum without an axis adds over the units too and leaves one number for a bias of five."""
    X, Y = batch
    m = X.shape[1]
    A1 = np.tanh(p["W1"] @ X + p["b1"])
    A2 = np.tanh(p["W2"] @ A1 + p["b2"])
    dZ3 = (sigmoid(p["W3"] @ A2 + p["b3"]) - Y) / m
    dZ2 = p["W3"].T @ dZ3 * (1 - A2 * A2)
    dZ1 = p["W2"].T @ dZ2 * (1 - A1 * A1)
    db2 = np.sum(dZ2, keepdims=True) if wrong else np.sum(dZ2, axis=1, keepdims=True)
    return {
        "W1": dZ1 @ X.T,
        "b1": dZ1.sum(1, keepdims=True),
        "W2": dZ2 @ A1.T,
        "b2": db2,
        "W3": dZ3 @ A2.T,
        "b3": dZ3.sum(1, keepdims=True),
    }


@wrong(
    three_layers_loss,
    three_layers_params(152),
    three_layers_batch,
    cause("transposed", leaf="W2", line='A2 = jnp.tanh(p["W2"] @ A1'),
)
def outer_product_the_other_way(p, batch, wrong=True):
    """dW2 is A1 dZ2' and not dZ2 A1'; the matrix is square, so nothing complains."""
    X, Y = batch
    n_examples = X.shape[1]
    A1 = np.tanh(p["W1"] @ X + p["b1"])
    A2 = np.tanh(p["W2"] @ A1 + p["b2"])
    out = {name: np.zeros_like(value) for name, value in p.items()}
    for i in range(n_examples):
        x, a1, a2 = X[:, i : i + 1], A1[:, i : i + 1], A2[:, i : i + 1]
        d3 = (sigmoid(p["W3"] @ a2 + p["b3"]) - Y[:, i : i + 1]) / n_examples
        d2 = p["W3"].T @ d3 * (1 - a2**2)
        d1 = p["W2"].T @ d2 * (1 - a1**2)
        out["W3"] += d3 @ a2.T
        out["b3"] += d3
        out["W2"] += a1 @ d2.T if wrong else d2 @ a1.T
        out["b2"] += d2
        out["W1"] += d1 @ x.T
        out["b1"] += d1
    return out


def decayed_net_loss(p, batch):
    X, y = batch
    h = jnp.tanh(X @ p["W1"] + p["b1"])
    out = h @ p["W2"] + p["b2"]
    fit = jnp.mean((out[:, 0] - y) ** 2)
    decay = 0.0625 * (jnp.sum(p["W1"] ** 2) + jnp.sum(p["W2"] ** 2))
    return fit + decay


decayed_params = {"W1": normal(158, 4, 6), "b1": normal(159, 6), "W2": normal(160, 6, 1), "b2": normal(161, 1)}
decayed_batch = (normal(162, 15, 4), normal(163, 15))


@wrong(decayed_net_loss, decayed_params, decayed_batch, cause("additive", "extra-term", leaf=("b1", "b2")))
def both_biases_decay(p, batch, wrong=True):
    """The decay is added in a loop over all parameters, the biases included."""
    X, y = batch
    h = np.tanh(X @ p["W1"] + p["b1"])
    d_out = 2 * (h @ p["W2"] + p["b2"] - y[:, None]) / len(y)
    d_h = d_out @ p["W2"].T * (1 - h**2)
    grads = {"W1": X.T @ d_h, "b1": d_h.sum(0), "W2": h.T @ d_out, "b2": d_out.sum(0)}
    decayed = p if wrong else ("W1", "W2")
    return {name: g + 0.125 * p[name] if name in decayed else g for name, g in grads.items()}


@wrong(
    decayed_net_loss,
    decayed_params,
    decayed_batch,
    cause("missing-term", leaf="W1", line=('jnp.sum(p["W1"] ** 2)', "return fit + decay")),
)
def first_layer_not_decayed(p, batch, wrong=True):
    """The penalty of the first layer is forgotten."""
    X, y = batch
    hidden = np.tanh(X @ p["W1"] + p["b1"])
    error = hidden @ p["W2"] + p["b2"] - y.reshape(-1, 1)
    back = 2 * error / len(y)
    gW2 = hidden.T @ back + 2 * 0.0625 * p["W2"]
    back_hidden = (back @ p["W2"].T) * (1 - hidden * hidden)
    gW1 = X.T @ back_hidden + (0 if wrong else 2 * 0.0625 * p["W1"])
    return {"W1": gW1, "b1": back_hidden.sum(axis=0), "W2": gW2, "b2": back.sum(axis=0)}


# ------------------------------------------------------------------------------------------ activations, dropout


def dropout_loss(p, batch):
    X, y, mask = batch
    keep = 0.75
    h = jax.nn.relu(X @ p["W1"])
    h = h * mask / keep
    out = h @ p["w2"]
    return jnp.mean((out - y) ** 2)


dropout_params = {"W1": normal(164, 4, 6), "w2": normal(165, 6)}
dropout_batch = (normal(166, 14, 4), normal(167, 14), (integers(168, 4, 14, 6) > 0).astype(float))


@wrong(
    dropout_loss,
    dropout_params,
    dropout_batch,
    cause("missing-factor", "missing-derivative", leaf="W1", line="h = h * mask / keep"),
)
def dropout_not_in_the_backward_pass(p, batch, wrong=True):
    """The mask and 1/keep are applied forward and not backward."""
    X, y, mask = batch
    keep = 0.75
    z = X @ p["W1"]
    h = np.maximum(z, 0) * mask / keep
    d_out = 2 * (h @ p["w2"] - y) / len(y)
    d_h = np.outer(d_out, p["w2"])
    if not wrong:
        d_h = d_h * mask / keep
    return {"W1": X.T @ (d_h * (z > 0)), "w2": h.T @ d_out}


@wrong(
    dropout_loss,
    dropout_params,
    dropout_batch,
    cause("scale", "scaled-term", "missing-factor", leaf="W1", line="h = h * mask / keep", factor="3/4"),
)
def inverted_dropout_not_rescaled(p, batch, wrong=True):
    """The mask is applied backward, its division by the keep probability is not."""
    X, y, mask = batch
    keep_prob = 0.75
    Z1 = X.dot(p["W1"])
    A1 = Z1 * (Z1 > 0) * mask / keep_prob
    dA2 = 2 * (A1.dot(p["w2"]) - y) / X.shape[0]
    dA1 = dA2[:, None] * p["w2"][None, :] * mask
    if not wrong:
        dA1 /= keep_prob
    dZ1 = np.where(Z1 > 0, dA1, 0)
    return {"W1": np.dot(X.T, dZ1), "w2": np.dot(A1.T, dA2)}


def leaky_loss(p, batch):
    X, y = batch
    h = jax.nn.leaky_relu(X @ p["W1"] + p["b1"], 0.125)
    return jnp.mean((h @ p["w2"] - y) ** 2)


@wrong(
    leaky_loss,
    {"W1": normal(169, 4, 5), "b1": normal(170, 5), "w2": normal(171, 5)},
    (normal(172, 13, 4), normal(173, 13)),
    cause("wrong-derivative", "wrong-value", leaf=("W1", "b1"), line="jax.nn.leaky_relu("),
)
def leaky_relu_backward_as_relu(p, batch, wrong=True):
    """The forward pass has a leaky relu, the backward pass the mask of a relu."""
    X, y = batch
    z = X @ p["W1"] + p["b1"]
    h = np.where(z > 0, z, 0.125 * z)
    d_out = 2 * (h @ p["w2"] - y) / len(y)
    slope = np.where(z > 0, 1.0, 0.0 if wrong else 0.125)
    d_z = d_out[:, None] * p["w2"] * slope
    return {"W1": X.T @ d_z, "b1": d_z.sum(axis=0), "w2": h.T @ d_out}


def swish_loss(p, batch):
    X, y = batch
    z = X @ p["W1"]
    h = z * jax.nn.sigmoid(z)
    out = h @ p["w2"]
    return 0.5 * jnp.mean((out - y) ** 2)


@wrong(
    swish_loss,
    {"W1": normal(174, 3, 5), "w2": normal(175, 5)},
    (normal(176, 12, 3), normal(177, 12)),
    cause("missing-term", "wrong-derivative", leaf="W1", line="h = z * jax.nn.sigmoid(z)"),
)
def product_rule_half_done(p, batch, wrong=True):
    """The derivative of z sigmoid(z) is taken as z sigmoid'(z): one half of the product rule."""
    X, y = batch

    def swish_grad(z):
        s = sigmoid(z)
        return z * s * (1 - s) + (0 if wrong else s)

    z = X @ p["W1"]
    h = z * sigmoid(z)
    err = (h @ p["w2"] - y) / len(y)
    return {"W1": X.T @ (np.outer(err, p["w2"]) * swish_grad(z)), "w2": err @ h}


def elu_loss(p, batch):
    X, y = batch
    alpha = 0.5
    z = X @ p["W1"]
    h = jnp.where(z > 0, z, alpha * (jnp.exp(z) - 1))
    return jnp.mean((h @ p["w2"] - y) ** 2)


@wrong(
    elu_loss,
    {"W1": normal(178, 3, 5), "w2": normal(179, 5)},
    (normal(180, 12, 3), normal(181, 12)),
    cause("wrong-derivative", "wrong-value", leaf="W1", line="h = jnp.where(z > 0"),
)
def elu_slope_is_its_value(p, batch, wrong=True):
    """For negative z the slope alpha exp(z) is h + alpha; the alpha is forgotten."""
    X, y = batch
    alpha = 0.5
    z = X @ p["W1"]
    h = np.where(z > 0, z, alpha * (np.exp(np.minimum(z, 0)) - 1))
    slope = np.where(z > 0, 1, h if wrong else h + alpha)
    d_out = 2 * (h @ p["w2"] - y) / len(y)
    return {"W1": X.T @ (d_out[:, None] * p["w2"] * slope), "w2": h.T @ d_out}


def residual_loss(p, batch):
    X, Y = batch
    u = jnp.tanh(X @ p["W1"])
    v = u + jnp.tanh(u @ p["W2"])
    return jnp.mean(jnp.sum((v @ p["W3"] - Y) ** 2, axis=1))


@wrong(
    residual_loss,
    {"W1": normal(182, 4, 5), "W2": normal(183, 5, 5), "W3": normal(184, 5, 2)},
    (normal(185, 13, 4), normal(186, 13, 2)),
    cause("missing-term", leaf="W1", line="v = u + jnp.tanh("),
)
def skip_connection_forgotten(p, batch, wrong=True):
    """Going back through a residual block, only the branch is followed, not the skip."""
    X, Y = batch
    u = np.tanh(X @ p["W1"])
    branch = np.tanh(u @ p["W2"])
    v = u + branch
    dv = 2 * (v @ p["W3"] - Y) @ p["W3"].T / len(X)
    dpre = dv * (1 - branch**2)
    du = dpre @ p["W2"].T
    if not wrong:
        du = du + dv
    return {
        "W1": X.T @ (du * (1 - u**2)),
        "W2": u.T @ dpre,
        "W3": v.T @ (2 * (v @ p["W3"] - Y)) / len(X),
    }


def tied_autoencoder_loss(p, batch):
    (X,) = batch
    code = jax.nn.sigmoid(X @ p["W"] + p["b"])
    back = code @ p["W"].T + p["c"]
    return jnp.mean(jnp.sum((back - X) ** 2, axis=1))


@wrong(
    tied_autoencoder_loss,
    {"W": normal(187, 5, 3), "b": normal(188, 3), "c": normal(189, 5)},
    (normal(190, 14, 5),),
    cause("missing-term", leaf="W", line="code = jax.nn.sigmoid("),
)
def tied_weights_decoder_only(p, batch, wrong=True):
    """Encoder and decoder share W; the gradient of the encoder overwrote nothing but was never added."""
    (X,) = batch
    code = sigmoid(X @ p["W"] + p["b"])
    d_back = 2 * (code @ p["W"].T + p["c"] - X) / len(X)
    d_pre = d_back @ p["W"] * code * (1 - code)
    dW_decoder = d_back.T @ code
    dW_encoder = X.T @ d_pre
    dW = dW_decoder if wrong else dW_decoder + dW_encoder
    return {"W": dW, "b": d_pre.sum(0), "c": d_back.sum(0)}


# ------------------------------------------------------------------------------------------ normalisation


def batch_norm_loss(p, batch):
    X, y = batch
    z = X @ p["W"]
    mu = jnp.mean(z, axis=0)
    var = jnp.mean((z - mu) ** 2, axis=0)
    z_hat = (z - mu) / jnp.sqrt(var + 1e-3)
    h = jnp.tanh(p["gamma"] * z_hat + p["beta"])
    return jnp.mean((jnp.sum(h, axis=1) - y) ** 2)


batch_norm_params = {"W": normal(191, 4, 5), "gamma": normal(192, 5), "beta": normal(193, 5)}
batch_norm_batch = (normal(194, 12, 4), normal(195, 12))


@wrong(
    batch_norm_loss,
    batch_norm_params,
    batch_norm_batch,
    cause("missing-term", leaf="W", line=("mu = jnp.mean(z, axis=0)", "var = jnp.mean(", "z_hat = (z - mu)")),
)
def batch_statistics_as_constants(p, batch, wrong=True):
    """Mean and variance of the batch are treated as constants."""
    X, y = batch
    N = len(X)
    z = X @ p["W"]
    inv_std = 1 / np.sqrt(z.var(axis=0) + 1e-3)
    z_hat = (z - z.mean(axis=0)) * inv_std
    h = np.tanh(p["gamma"] * z_hat + p["beta"])
    dout = 2 * (h.sum(axis=1) - y)[:, None] / N * (1 - h**2)
    dz_hat = dout * p["gamma"]
    dz = dz_hat * inv_std
    if not wrong:
        dz -= inv_std * (dz_hat.mean(axis=0) + z_hat * (dz_hat * z_hat).mean(axis=0))
    return {"W": X.T @ dz, "gamma": (dout * z_hat).sum(axis=0), "beta": dout.sum(axis=0)}


@wrong(
    batch_norm_loss,
    batch_norm_params,
    batch_norm_batch,
    cause("wrong-value", leaf="gamma", line='h = jnp.tanh(p["gamma"] * z_hat'),
)
def dgamma_from_the_raw_activations(p, batch, wrong=True):
    """dgamma is summed against z, the layer's input, and not against the normalised z."""
    X, y = batch
    N = X.shape[0]
    z = X @ p["W"]
    mu = z.mean(0)
    xmu = z - mu
    var = (xmu**2).mean(0)
    ivar = 1.0 / np.sqrt(var + 1e-3)
    z_hat = xmu * ivar
    h = np.tanh(p["gamma"] * z_hat + p["beta"])
    dout = 2.0 / N * (h.sum(1) - y)[:, None] * (1 - h * h)
    dbeta = dout.sum(0)
    dgamma = np.sum(dout * (z if wrong else z_hat), axis=0)
    dxhat = dout * p["gamma"]
    divar = np.sum(dxhat * xmu, axis=0)
    dvar = -0.5 * ivar**3 * divar
    dxmu = dxhat * ivar + 2 / N * xmu * dvar
    dz = dxmu - dxmu.mean(0)
    return {"W": X.T @ dz, "gamma": dgamma, "beta": dbeta}


@wrong(
    batch_norm_loss,
    batch_norm_params,
    batch_norm_batch,
    cause("missing-term", leaf="W", line=("mu = jnp.mean(z, axis=0)", "z_hat = (z - mu)")),
)
def the_way_through_the_mean_is_lost(p, batch, wrong=True):
    """The last step of batch norm, back through the mean, is left out."""
    X, y = batch
    N = X.shape[0]
    z = X @ p["W"]
    centred = z - z.mean(0)
    std = np.sqrt((centred**2).mean(0) + 1e-3)
    h = np.tanh(p["gamma"] * centred / std + p["beta"])
    dout = 2.0 / N * (h.sum(1, keepdims=True) - y[:, None]) * (1 - h * h)
    d_hat = dout * p["gamma"]
    d_std = -(d_hat * centred).sum(0) / std**2
    d_centred = d_hat / std + centred / (N * std) * d_std
    d_mean = 0 if wrong else -d_centred.sum(0)
    dz = d_centred + d_mean / N
    return {"W": X.T @ dz, "gamma": (dout * centred / std).sum(0), "beta": dout.sum(0)}


def layer_norm_loss(p, batch):
    X, y = batch
    z = X @ p["W"]
    mean = z.mean(axis=-1, keepdims=True)
    std = jnp.sqrt(jnp.mean((z - mean) ** 2, axis=-1, keepdims=True) + 1e-3)
    out = p["g"] * (z - mean) / std
    return jnp.mean((jnp.tanh(out) @ jnp.ones(z.shape[-1]) - y) ** 2)


@wrong(
    layer_norm_loss,
    {"W": normal(196, 4, 6), "g": normal(197, 6)},
    (normal(198, 12, 4), normal(199, 12)),
    cause(
        "wrong-value",
        "wrong-derivative",
        "wrong-axis",
        leaf="W",
        line=("mean = z.mean(", "std = jnp.sqrt(", "out = p["),
    ),
)
def layer_norm_by_the_batch_axis(p, batch, wrong=True):
    """The backward pass of batch norm is used for layer norm: its means run over the examples."""
    X, y = batch
    axis = 0 if wrong else -1
    z = X @ p["W"]
    std = np.sqrt(z.var(axis=-1, keepdims=True) + 1e-3)
    hat = (z - z.mean(axis=-1, keepdims=True)) / std
    t = np.tanh(p["g"] * hat)
    d = 2 * (t.sum(axis=-1) - y)[:, None] / len(y) * (1 - t**2)
    d_hat = d * p["g"]
    dz = d_hat - d_hat.mean(axis=axis, keepdims=True) - hat * (d_hat * hat).mean(axis=axis, keepdims=True)
    return {"W": X.T @ (dz / std), "g": (d * hat).sum(axis=0)}


# ------------------------------------------------------------------------------------------ convolutions, pooling


def conv_nchw_loss(p, batch):
    x, y = batch
    h = lax.conv_general_dilated(x, p["K"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"))
    h = jax.nn.relu(h + p["b"][None, :, None, None])
    out = jnp.sum(h, axis=(1, 2, 3))
    return jnp.mean((out - y) ** 2)


conv_params = {"K": normal(200, 2, 2, 3, 3, scale=0.25), "b": normal(201, 2)}
conv_batch = (normal(202, 5, 2, 5, 5), normal(203, 5))


def conv_forward(x, K, b):
    n, _, height, width = x.shape
    out = np.zeros((n, K.shape[0], height - 2, width - 2))
    for i in range(height - 2):
        for j in range(width - 2):
            out[:, :, i, j] = np.einsum("nchw,ochw->no", x[:, :, i : i + 3, j : j + 3], K) + b
    return out


@wrong(
    conv_nchw_loss,
    conv_params,
    conv_batch,
    cause("scale", "scaled-term", leaf="b", line='h = jax.nn.relu(h + p["b"]', factor="1/9"),
)
def conv_bias_averaged_over_positions(p, batch, wrong=True):
    """The bias of a convolution is shared by nine positions, and its gradient is their mean, not their sum."""
    x, y = batch
    z = conv_forward(x, p["K"], p["b"])
    d = 2 * (np.maximum(z, 0).sum(axis=(1, 2, 3)) - y) / len(y)
    dz = d[:, None, None, None] * (z > 0)
    dK = np.zeros(p["K"].shape)
    for i in range(dz.shape[2]):
        for j in range(dz.shape[3]):
            dK += np.einsum("no,nchw->ochw", dz[:, :, i, j], x[:, :, i : i + 3, j : j + 3])
    db = dz.mean(axis=(2, 3)).sum(axis=0) if wrong else dz.sum(axis=(0, 2, 3))
    return {"K": dK, "b": db}


@wrong(
    conv_nchw_loss,
    conv_params,
    conv_batch,
    cause("missing-term", "entries", leaf="K", line="h = lax.conv_general_dilated("),
)
def conv_loop_misses_the_last_row(p, batch, wrong=True):
    """The loop over the rows of the output ends one too early in the gradient of the kernel."""
    x, y = batch
    z = conv_forward(x, p["K"], p["b"])
    err = 2 * (np.maximum(z, 0).sum((1, 2, 3)) - y) / x.shape[0]
    dz = np.where(z > 0, err.reshape(-1, 1, 1, 1), 0)
    N, F, rows, cols = dz.shape
    dK = np.zeros_like(p["K"])
    for n in range(N):
        for f in range(F):
            for r in range(rows - 1 if wrong else rows):
                for c in range(cols):
                    dK[f] += dz[n, f, r, c] * x[n, :, r : r + 3, c : c + 3]
    return {"K": dK, "b": dz.sum((0, 2, 3))}


def two_filters_loss(p, batch):
    x, y = batch
    h = jnp.tanh(jax.vmap(lambda row: jnp.convolve(row, p["k1"], mode="valid"))(x))
    out = jax.vmap(lambda row: jnp.correlate(row, p["k2"], mode="valid"))(h)
    return jnp.mean(jnp.sum((out - y) ** 2, axis=1))


@wrong(
    two_filters_loss,
    {"k1": normal(204, 3), "k2": normal(205, 3)},
    (normal(206, 6, 9), normal(207, 6, 5)),
    cause("transposed", "flipped", "wrong-value", leaf="k1", line="jnp.convolve(row"),
)
def convolution_is_not_correlation(p, batch, wrong=True):
    """jnp.convolve flips its kernel, the gradient of k1 is that of a correlation: its entries come in reverse."""
    x, y = batch
    dk1, dk2 = np.zeros(3), np.zeros(3)
    for row, target in zip(x, y, strict=True):
        h = np.tanh(np.convolve(row, p["k1"], mode="valid"))
        d_out = 2 * (np.correlate(h, p["k2"], mode="valid") - target) / len(x)
        dk2 += np.correlate(h, d_out, mode="valid")
        d_h = np.convolve(d_out, p["k2"], mode="full") * (1 - h**2)
        g = np.correlate(row, d_h, mode="valid")
        dk1 += g if wrong else g[::-1]
    return {"k1": dk1, "k2": dk2}


@wrong(
    two_filters_loss,
    {"k1": normal(208, 3), "k2": normal(209, 3)},
    (normal(210, 6, 9), normal(211, 6, 5)),
    cause("transposed", "flipped", "wrong-value", "wrong-derivative", leaf="k1", line="jnp.correlate(row"),
)
def filter_not_flipped_on_the_way_back(p, batch, wrong=True):
    """Back through a correlation goes a full convolution; a full correlation leaves the kernel unflipped."""
    x, y = batch
    n = x.shape[0]
    back = np.correlate if wrong else np.convolve
    grads = {"k1": np.zeros(3), "k2": np.zeros(3)}
    for i in range(n):
        h = np.tanh(np.convolve(x[i], p["k1"], mode="valid"))
        d_out = 2 * (np.correlate(h, p["k2"], mode="valid") - y[i]) / n
        d_h = back(d_out, p["k2"], mode="full") * (1 - h * h)
        for t in range(len(h)):
            grads["k1"] += d_h[t] * x[i][t : t + 3][::-1]
        for t in range(len(d_out)):
            grads["k2"] += d_out[t] * h[t : t + 3]
    return grads


def pooled_loss(p, batch):
    x, y = batch
    h = jnp.tanh(x[..., None] * p["s"] + p["b"])
    n, height, width, c = h.shape
    pooled = h.reshape(n, height // 2, 2, width // 2, 2, c).max(axis=(2, 4))
    out = pooled.reshape(n, -1) @ p["w"]
    return jnp.mean((out - y) ** 2)


pooled_params = {"s": normal(212, 2), "b": normal(213, 2), "w": normal(214, 8)}
pooled_batch = (normal(215, 7, 4, 4), normal(216, 7))


@wrong(
    pooled_loss,
    pooled_params,
    pooled_batch,
    cause("wrong-derivative", "wrong-value", leaf=("s", "b"), line=".max(axis=(2, 4))"),
)
def max_pool_backward_as_average(p, batch, wrong=True):
    """The gradient of a max pool is spread evenly over the window."""
    x, y = batch
    h = np.tanh(x[..., None] * p["s"] + p["b"])
    n, height, width, c = h.shape
    windows = h.reshape(n, height // 2, 2, width // 2, 2, c)
    pooled = windows.max(axis=(2, 4), keepdims=True)
    flat = pooled.reshape(n, -1)
    d_out = 2 * (flat @ p["w"] - y) / n
    d_pooled = np.outer(d_out, p["w"]).reshape(pooled.shape)
    share = np.full(windows.shape, 0.25) if wrong else windows == pooled
    dh = (d_pooled * share).reshape(h.shape) * (1 - h**2)
    return {"s": (dh * x[..., None]).sum(axis=(0, 1, 2)), "b": dh.sum(axis=(0, 1, 2)), "w": flat.T @ d_out}


def average_pool_loss(K, batch):
    x, y = batch
    h = lax.conv_general_dilated(x, K, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    a = jnp.square(h)
    pooled = lax.reduce_window(a, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID") / 4
    return jnp.mean((jnp.sum(pooled, axis=(1, 2, 3)) - y) ** 2)


@wrong(
    average_pool_loss,
    normal(217, 3, 3, 1, 2, scale=0.5),
    (normal(218, 5, 4, 4, 1), normal(219, 5)),
    cause("scale", "scaled-term", "missing-factor", line='"VALID") / 4', factor="4"),
)
def average_pool_without_its_quarter(K, batch, wrong=True):
    """Each pixel gets the whole gradient of its window, not a quarter of it."""
    x, y = batch
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)])
    h = np.einsum("knhwc,kco->nhwo", patches, K.reshape(9, 1, 2))
    pooled = (h**2).reshape(len(x), 2, 2, 2, 2, 2).mean(axis=(2, 4))
    d = 2 * (pooled.sum(axis=(1, 2, 3)) - y) / len(x)
    d_pooled = np.broadcast_to(d[:, None, None, None], pooled.shape)
    da = np.kron(d_pooled, np.ones((1, 2, 2, 1))) * (1.0 if wrong else 0.25)
    dh = da * 2 * h
    return np.einsum("knhwc,nhwo->kco", patches, dh).reshape(K.shape)


# ------------------------------------------------------------------------------------------ right, but unusual


@right(batch_norm_loss, batch_norm_params, batch_norm_batch)
def batch_norm_in_one_formula(p, batch):
    """Batch norm by the closed formula with N in it, as papers print it."""
    X, y = batch
    N = X.shape[0]
    z = X @ p["W"]
    std = np.sqrt(z.var(axis=0) + 1e-3)
    z_hat = (z - z.mean(axis=0)) / std
    h = np.tanh(p["gamma"] * z_hat + p["beta"])
    dy = (1 - h**2) * (2 / N) * (h.sum(axis=1) - y)[:, None]
    dbeta, dgamma = dy.sum(axis=0), (dy * z_hat).sum(axis=0)
    dz = p["gamma"] / (N * std) * (N * dy - dbeta - z_hat * dgamma)
    return {"gamma": dgamma, "beta": dbeta, "W": X.T @ dz}


@right(relu_net_loss, relu_net_params(220), relu_batch)
def layers_as_objects(p, batch):
    """Classes with forward and backward, as in a home-made framework."""

    class Linear:
        def __init__(self, W, b):
            self.W, self.b = W, b

        def forward(self, x):
            self.seen = x
            return x @ self.W + self.b

        def backward(self, grad):
            self.grad_W, self.grad_b = self.seen.T @ grad, grad.sum(0)
            return grad @ self.W.T

    class ReLU:
        def forward(self, x):
            self.on = x > 0
            return x * self.on

        def backward(self, grad):
            return grad * self.on

    X, y = batch
    net = [Linear(p["W1"], p["b1"]), ReLU(), Linear(p["W2"], p["b2"])]
    out = X
    for layer in net:
        out = layer.forward(out)
    grad = (softmax(out) - one_hot(y, 3)) / len(y)
    for layer in reversed(net):
        grad = layer.backward(grad)
    return {"W1": net[0].grad_W, "b1": net[0].grad_b, "W2": net[2].grad_W, "b2": net[2].grad_b}


@right(dropout_loss, dropout_params, dropout_batch)
def dropout_folded_into_the_weights(p, batch):
    """The mask goes with the second weights and not with the activations."""
    X, y, mask = batch
    z = X @ p["W1"]
    v = mask * p["w2"] / 0.75
    e = 2 * (np.sum(np.maximum(z, 0) * v, axis=1) - y) / len(y)
    return {"W1": X.T @ (e[:, None] * v * (z > 0)), "w2": ((np.maximum(z, 0) * mask / 0.75) * e[:, None]).sum(0)}


@right(conv_nchw_loss, conv_params, conv_batch)
def convolution_by_sliding_windows(p, batch):
    """A convolution as one einsum over a strided view of the images."""
    x, y = batch
    views = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))
    z = np.einsum("ncijhw,ochw->noij", views, p["K"]) + p["b"][None, :, None, None]
    dz = (z > 0) * (2 * (np.maximum(z, 0).sum(axis=(1, 2, 3)) - y) / len(y))[:, None, None, None]
    return {"K": np.einsum("noij,ncijhw->ochw", dz, views), "b": np.einsum("noij->o", dz)}


@right(digits_loss, digits_params, digits_batch)
def deltas_of_one_example_at_a_time(p, batch):
    """Backprop for one example after the other, with outer products, then divided by their number."""
    x, t = batch
    m = x.shape[1]
    total_w = [np.zeros(w.shape) for w in p["weights"]]
    total_b = [np.zeros(b.shape) for b in p["biases"]]
    for k in range(m):
        a = [x[:, [k]]]
        for w, b in zip(p["weights"], p["biases"], strict=True):
            a.append(sigmoid(w @ a[-1] + b))
        delta = (a[-1] - t[:, [k]]) * a[-1] * (1 - a[-1])
        for layer in range(len(a) - 2, -1, -1):
            total_w[layer] += delta * a[layer].T / m
            total_b[layer] += delta / m
            delta = p["weights"][layer].T @ delta * a[layer] * (1 - a[layer])
    return {"weights": total_w, "biases": total_b}


@right(pooled_loss, pooled_params, pooled_batch)
def max_pool_by_argmax(p, batch):
    """The max pool by argmax and a scatter to the winners."""
    x, y = batch
    h = np.tanh(x[..., None] * p["s"] + p["b"])
    n, c = h.shape[0], h.shape[3]
    rows = h.reshape(n, 2, 2, 2, 2, c).transpose(0, 1, 3, 5, 2, 4).reshape(-1, 4)
    won = rows.argmax(axis=1)
    pooled = rows[np.arange(len(rows)), won].reshape(n, 8)
    d_out = 2 * (pooled @ p["w"] - y) / n
    d_rows = np.zeros_like(rows)
    d_rows[np.arange(len(rows)), won] = np.outer(d_out, p["w"]).ravel()
    dh = d_rows.reshape(n, 2, 2, c, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(h.shape) * (1 - h**2)
    return {"s": np.einsum("nhwc,nhw->c", dh, x), "b": dh.sum(axis=(0, 1, 2)), "w": d_out @ pooled}


@right(three_layers_loss, three_layers_params(224), three_layers_batch)
def forward_mode_by_hand(p, batch):
    """Not backprop at all: the Jacobian of JAX's forward mode, built parameter by parameter."""
    return jax.tree.map(np.asarray, jax.jacfwd(three_layers_loss)(jax.tree.map(jnp.asarray, p), batch))
