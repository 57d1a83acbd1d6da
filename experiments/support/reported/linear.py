"""Linear models: regression, classification, penalties, weights."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.support.reported.case import Case, cause, integers, normal, uniform, wrong_and_right

CASES: list[Case] = []
wrong, right = wrong_and_right(CASES)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


# ------------------------------------------------------------------------------------------ least squares


def house_price_loss(theta, batch):
    X, y = batch
    m = X.shape[0]
    errors = X @ theta - y
    return jnp.sum(errors**2) / (2 * m)


house_X = np.c_[np.ones(18), uniform(1, 18, low=400, high=4000), 1.0 + integers(2, 5, 18)]
house_y = 50 + 0.125 * house_X[:, 1] + 8 * house_X[:, 2] + normal(3, 18, scale=16)


@wrong(
    house_price_loss,
    np.array([20.0, 0.25, 4.0]),
    (house_X, house_y),
    cause("scale", "scaled-term", line="/ (2 * m)", factor="n"),
)
def house_prices_not_divided_by_m(theta, batch, wrong=True):
    """Square metres and bedrooms as they are, not scaled, and the 1/m is left out of the gradient."""
    X, y = batch
    m = len(y)
    errors = X.dot(theta) - y
    return X.T.dot(errors) if wrong else X.T.dot(errors) / m


@wrong(
    house_price_loss,
    normal(4, 3),
    (normal(5, 15, 3), normal(6, 15)),
    cause("scale", "scaled-term", line="/ (2 * m)", factor="2"),
)
def two_kept_though_loss_has_a_half(theta, batch, wrong=True):
    """The loss has 1/(2m) and the gradient still has the 2 of the square."""
    X, y = batch
    grad = np.zeros(len(theta))
    factor = 2.0 if wrong else 1.0
    for i in range(len(y)):
        error = X[i] @ theta - y[i]
        for j in range(len(theta)):
            grad[j] += factor * error * X[i, j]
    return grad / len(y)


@wrong(
    house_price_loss,
    normal(7, 3),
    (normal(8, 12, 3), normal(9, 12)),
    cause("missing-term", line=("errors =", "jnp.sum(errors**2)")),
)
def only_last_example_counts(theta, batch, wrong=True):
    """The loop over the examples assigns the gradient where it should add to it."""
    X, y = batch
    m = len(y)
    grad = np.zeros(len(theta))
    for x_i, y_i in zip(X, y, strict=True):
        one = (np.dot(theta, x_i) - y_i) * x_i / m
        grad = one if wrong else grad + one
    return grad


def straight_line_loss(p, batch):
    x, y = batch
    guess = p["m"] * x + p["c"]
    return jnp.mean((y - guess) ** 2)


line_batch = (normal(10, 16), normal(11, 16))


@wrong(
    straight_line_loss,
    {"m": np.asarray(0.75), "c": np.asarray(-0.5)},
    line_batch,
    cause(
        "wrong-value", "extra-derivative", "wrong-derivative", "swapped-leaves", leaf="c", line='p["m"] * x + p["c"]'
    ),
)
def intercept_times_x(p, batch, wrong=True):
    """The derivative by the intercept is a copy of that by the slope, x included."""
    x, y = batch
    n = float(len(x))
    left = y - (p["m"] * x + p["c"])
    m_gradient = -(2 / n) * sum(x * left)
    c_gradient = -(2 / n) * sum(x * left if wrong else left)
    return {"m": m_gradient, "c": c_gradient}


@wrong(
    straight_line_loss,
    {"m": np.asarray(1.25), "c": np.asarray(0.5)},
    line_batch,
    cause("sign", "negated-term", leaf="m", line=("guess =", "(y - guess)"), factor="-1"),
)
def slope_lost_its_minus(p, batch, wrong=True):
    """The inner derivative -x of y - guess lost its minus for the slope, and not for the intercept."""
    x, y = batch
    N = len(y)
    m_grad, c_grad = 0.0, 0.0
    for xi, yi in zip(x, y, strict=True):
        residual = yi - p["m"] * xi - p["c"]
        m_grad += (2 if wrong else -2) * xi * residual
        c_grad += -2 * residual
    return {"m": m_grad / N, "c": c_grad / N}


def rmse_loss(p, batch):
    X, y = batch
    pred = jnp.dot(X, p["w"]) + p["b"]
    mse = jnp.mean(jnp.square(pred - y))
    return jnp.sqrt(mse)


@wrong(
    rmse_loss,
    {"w": normal(12, 4), "b": np.asarray(0.25)},
    (normal(13, 14, 4), normal(14, 14)),
    cause("missing-derivative", "wrong-derivative", line="jnp.sqrt(mse)"),
)
def rmse_with_the_gradient_of_mse(p, batch, wrong=True):
    """The loss is the root of the mean square, the gradient that of the mean square."""
    X, y = batch
    pred = X @ p["w"] + p["b"]
    mse = np.mean((pred - y) ** 2)
    outer = 1.0 if wrong else 0.5 / np.sqrt(mse)
    d_pred = outer * 2 * (pred - y) / len(y)
    return {"w": X.T @ d_pred, "b": d_pred.sum()}


def multi_target_loss(p, batch):
    X, Y = batch
    out = X @ p["W"] + p["b"]
    return jnp.mean((out - Y) ** 2)


@wrong(
    multi_target_loss,
    {"W": normal(15, 4, 3), "b": normal(16, 3)},
    (normal(17, 13, 4), normal(18, 13, 3)),
    cause("scale", "scaled-term", line="jnp.mean((out - Y) ** 2)", factor=("3", "k")),
)
def mean_over_outputs_too(p, batch, wrong=True):
    """The loss is a mean over the examples and the three outputs; the gradient divides by the examples alone."""
    X, Y = batch
    diff = X @ p["W"] + p["b"] - Y
    count = len(X) if wrong else diff.size
    d_out = 2.0 * diff / count
    return {"W": np.dot(X.T, d_out), "b": np.sum(d_out, axis=0)}


def huber_loss(w, batch):
    X, y = batch
    delta = 1.5
    r = X @ w - y
    small = jnp.abs(r) <= delta
    each = jnp.where(small, 0.5 * r**2, delta * (jnp.abs(r) - 0.5 * delta))
    return each.mean()


@wrong(
    huber_loss,
    normal(19, 3),
    (normal(20, 17, 3), normal(21, 17, scale=2)),
    cause("wrong-derivative", "scaled-term", "missing-factor", "wrong-value", line="each = jnp.where("),
)
def huber_slope_one_outside(w, batch, wrong=True):
    """Outside delta the slope is sign(r), as if delta were 1."""
    X, y = batch
    delta = 1.5
    r = X @ w - y
    slope = np.where(np.abs(r) <= delta, r, np.sign(r) * (1.0 if wrong else delta))
    return (X * slope[:, None]).mean(axis=0)


def pinball_loss(w, batch):
    X, y = batch
    tau = 0.875
    u = y - X @ w
    return jnp.mean(jnp.maximum(tau * u, (tau - 1) * u))


@wrong(
    pinball_loss,
    normal(22, 3),
    (normal(23, 19, 3), normal(24, 19)),
    cause("wrong-derivative", "wrong-value", "wrong-argument", line="jnp.maximum(tau * u"),
)
def quantile_sides_swapped(w, batch, wrong=True):
    """In quantile regression the slopes above and below the line are interchanged."""
    X, y = batch
    tau = 0.875
    u = y - X @ w
    above = u < 0 if wrong else u > 0
    return -X.T @ np.where(above, tau, tau - 1) / len(u)


# ------------------------------------------------------------------------------------------ penalties


def ridge_with_intercept_loss(theta, batch):
    X, y, lam = batch
    m = len(y)
    fit = jnp.sum((X @ theta - y) ** 2) / (2 * m)
    shrink = lam / (2 * m) * jnp.sum(theta[1:] ** 2)
    return fit + shrink


ridge_batch = (np.c_[np.ones(15), normal(25, 15, 3)], normal(26, 15), np.asarray(3.0))


@wrong(
    ridge_with_intercept_loss,
    normal(27, 4),
    ridge_batch,
    cause("additive", "entries", "extra-term", "scaled-term", line="jnp.sum(theta[1:] ** 2)"),
)
def intercept_shrunk_too(theta, batch, wrong=True):
    """The loss leaves theta[0] out of the penalty, the gradient does not."""
    X, y, lam = batch
    m = len(y)
    grad = X.T @ (X @ theta - y) / m
    reg = (lam / m) * theta
    if not wrong:
        reg[0] = 0
    return grad + reg


@wrong(
    ridge_with_intercept_loss,
    normal(28, 4),
    ridge_batch,
    cause("scaled-term", line=("lam / (2 * m)", "return fit"), factor="n"),
)
def penalty_not_divided_by_m(theta, batch, wrong=True):
    """The penalty of the loss is divided by 2m; that of the gradient is lambda times theta."""
    X, y, lam = batch
    m = len(y)
    grad = X.T @ (X @ theta - y) / m
    grad[1:] = grad[1:] + (lam * theta[1:] if wrong else lam * theta[1:] / m)
    return grad


@wrong(
    ridge_with_intercept_loss,
    normal(29, 4),
    ridge_batch,
    cause("scaled-term", line=("lam / (2 * m)", "return fit"), factor="1/n"),
)
def penalty_divided_by_m_twice(theta, batch, wrong=True):
    """A bracket closes too late, and the penalty is divided by m once more."""
    X, y, lam = batch
    m = y.shape[0]
    theta_rest = np.r_[0, theta[1:]]
    if wrong:
        return (1 / m) * (X.T.dot(X.dot(theta) - y) + lam / m * theta_rest)
    return (1 / m) * X.T.dot(X.dot(theta) - y) + lam / m * theta_rest


def softmax_decay_loss(p, batch):
    X, labels = batch
    scores = X @ p["W"] + p["b"]
    log_p = scores - jax.scipy.special.logsumexp(scores, axis=1, keepdims=True)
    data = -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=1))
    return data + 0.125 * jnp.vdot(p["W"], p["W"])


decay_params = {"W": normal(30, 4, 3), "b": normal(31, 3)}
decay_batch = (normal(32, 15, 4), integers(33, 3, 15))


@wrong(
    softmax_decay_loss,
    decay_params,
    decay_batch,
    cause("scaled-term", leaf="W", line='jnp.vdot(p["W"], p["W"])', factor="1/2"),
)
def decay_without_its_two(p, batch, wrong=True):
    """The derivative of lambda times the squared norm of W is taken as lambda W."""
    X, labels = batch
    num = len(labels)
    scores = X.dot(p["W"]) + p["b"]
    probs = softmax(scores)
    dscores = probs
    dscores[range(num), labels] -= 1
    dscores /= num
    reg = 0.125
    dW = X.T.dot(dscores) + (reg if wrong else 2 * reg) * p["W"]
    return {"W": dW, "b": dscores.sum(axis=0)}


@wrong(
    softmax_decay_loss,
    decay_params,
    decay_batch,
    cause("additive", "extra-term", leaf="b"),
)
def bias_decays_too(p, batch, wrong=True):
    """The weight decay is put on every parameter; the loss has it on W only."""
    X, labels = batch
    delta = (softmax(X @ p["W"] + p["b"]) - np.eye(3)[labels]) / len(labels)
    grads = {"W": X.T @ delta, "b": delta.sum(0)}
    for name in grads:
        if wrong or name == "W":
            grads[name] = grads[name] + 0.25 * p[name]
    return grads


@wrong(
    softmax_decay_loss,
    decay_params,
    decay_batch,
    cause("missing-term", line=("jnp.take_along_axis(", "log_p =")),
)
def one_hot_not_subtracted(p, batch, wrong=True):
    """The probabilities are passed back as they are; the 1 of the true class is never subtracted."""
    X, labels = batch
    N = X.shape[0]
    dW, db = np.zeros(p["W"].shape), np.zeros(p["b"].shape)
    for i in range(N):
        scores = X[i] @ p["W"] + p["b"]
        probs = np.exp(scores - scores.max())
        probs /= probs.sum()
        for c in range(3):
            truth = 0 if wrong else float(c == labels[i])
            dW[:, c] += (probs[c] - truth) * X[i] / N
            db[c] += (probs[c] - truth) / N
    return {"W": dW + 0.25 * p["W"], "b": db}


def elastic_net_loss(w, batch):
    X, y = batch
    fit = 0.5 * jnp.mean((y - X @ w) ** 2)
    lasso = 0.375 * jnp.sum(jnp.abs(w))
    ridge = 0.25 * jnp.sum(w * w)
    return fit + lasso + ridge


@wrong(
    elastic_net_loss,
    normal(34, 5),
    (normal(35, 16, 5), normal(36, 16)),
    cause("wrong-derivative", "wrong-value", "missing-derivative", line="jnp.sum(jnp.abs(w))"),
)
def lasso_without_its_sign(w, batch, wrong=True):
    """The derivative of the l1 penalty is lambda, whatever the sign of the weight."""
    X, y = batch
    residual = y - X @ w
    grad = np.empty_like(w)
    for j in range(len(w)):
        l1 = 0.375 if wrong or w[j] > 0 else -0.375
        grad[j] = -(X[:, j] @ residual) / len(y) + l1 + 0.5 * w[j]
    return grad


# ------------------------------------------------------------------------------------------ classification


def columns_logistic_loss(p, batch):
    X, Y = batch
    m = X.shape[1]
    A = jax.nn.sigmoid(jnp.dot(p["w"].T, X) + p["b"])
    return -jnp.sum(Y * jnp.log(A) + (1 - Y) * jnp.log(1 - A)) / m


columns_batch = (normal(37, 4, 17), integers(38, 2, 1, 17).astype(float))


@wrong(
    columns_logistic_loss,
    {"w": normal(39, 4, 1, scale=0.5), "b": np.asarray(0.25)},
    columns_batch,
    cause("scale", "scaled-term", leaf="b", line=("jnp.dot(p", "/ m"), factor="n"),
)
def columns_bias_not_averaged(p, batch, wrong=True):
    """Examples are columns; dw is divided by their number and db is not."""
    X, Y = batch
    m = X.shape[1]
    A = sigmoid(np.dot(p["w"].T, X) + p["b"])
    dw = np.dot(X, (A - Y).T) / m
    db = np.sum(A - Y) if wrong else np.sum(A - Y) / m
    return {"w": dw, "b": db}


@wrong(
    columns_logistic_loss,
    {"w": normal(40, 4, 1, scale=0.5), "b": np.asarray(-0.5)},
    columns_batch,
    cause("scale", "scaled-term", line="/ m", factor=("17/4", "n/4", "n/d", "4.25")),
)
def columns_divided_by_features(p, batch, wrong=True):
    """Examples are columns, and m is taken from the wrong axis: the number of features."""
    X, Y = batch
    m = X.shape[0] if wrong else X.shape[1]
    A = sigmoid(p["w"].T @ X + p["b"])
    dZ = A - Y
    return {"w": (1 / m) * X @ dZ.T, "b": (1 / m) * dZ.sum()}


def signed_labels_loss(w, batch):
    X, y = batch
    margin = y * (X @ w)
    return jnp.mean(jnp.logaddexp(0.0, -margin))


signed_batch = (normal(41, 16, 4), 2.0 * integers(42, 2, 16) - 1)


@wrong(
    signed_labels_loss,
    normal(43, 4),
    signed_batch,
    cause("wrong-derivative", "wrong-argument", "wrong-value", line="jnp.logaddexp("),
)
def sigmoid_of_the_margin(w, batch, wrong=True):
    """With labels of ±1 the slope is -sigmoid(-margin); the inner minus is forgotten."""
    X, y = batch
    margin = y * (X @ w)
    s = sigmoid(margin if wrong else -margin)
    return -(X.T @ (y * s)) / len(y)


@wrong(
    signed_labels_loss,
    normal(44, 4),
    signed_batch,
    cause("missing-factor", "wrong-value", line="margin = y * (X @ w)"),
)
def labels_left_out_of_the_margin(w, batch, wrong=True):
    """The derivative of y x·w by w is taken as x."""
    X, y = batch
    total = np.zeros_like(w)
    for x_i, y_i in zip(X, y, strict=True):
        slope = -1 / (1 + np.exp(y_i * np.dot(w, x_i)))
        total += slope * x_i if wrong else slope * y_i * x_i
    return total / len(y)


def weighted_logistic_loss(w, batch):
    class_weights, X, y = batch
    weight = class_weights[y]
    z = X @ w
    losses = jax.nn.softplus(z) - y * z
    return jnp.mean(weight * losses)


@wrong(
    weighted_logistic_loss,
    normal(45, 3),
    (np.array([0.5, 2.0]), normal(46, 14, 3), integers(47, 2, 14)),
    cause("missing-factor", "missing-derivative", "wrong-value", line="jnp.mean(weight * losses)"),
)
def class_weights_left_out(w, batch, wrong=True):
    """The batch begins with the weights of the classes; the gradient ignores them."""
    class_weights, X, y = batch
    error = sigmoid(X @ w) - y
    if not wrong:
        error = error * class_weights[y]
    return np.mean(X * error[:, None], axis=0)


def masked_loss(p, batch):
    X, y, observed = batch
    pred = X @ p["w"] + p["b"]
    square = observed * (pred - y) ** 2
    return jnp.sum(square) / jnp.sum(observed)


@wrong(
    masked_loss,
    {"w": normal(48, 3), "b": np.asarray(0.5)},
    (normal(49, 16, 3), normal(50, 16), np.array([1.0, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0])),
    cause("scale", "wrong-value", "scaled-term", "missing-factor", line="/ jnp.sum(observed)"),
)
def masked_mean_over_all(p, batch, wrong=True):
    """The loss is the mean over the observed examples; the gradient divides by all of them."""
    X, y, observed = batch
    pred = X @ p["w"] + p["b"]
    d = 2 * observed * (pred - y) / (len(y) if wrong else observed.sum())
    return {"w": X.T @ d, "b": d.sum()}


def multiclass_hinge_loss(W, batch):
    X, y = batch
    scores = X @ W
    correct = scores[jnp.arange(len(y)), y]
    margins = jnp.maximum(0.0, scores - correct[:, None] + 1.0)
    margins = margins * (1 - jax.nn.one_hot(y, W.shape[1]))
    return jnp.sum(margins) / len(y)


@wrong(
    multiclass_hinge_loss,
    normal(51, 4, 3),
    (normal(52, 15, 4), integers(53, 3, 15)),
    cause("missing-term", line=("correct = scores[", "scores - correct[:, None]")),
)
def svm_correct_class_forgotten(W, batch, wrong=True):
    """In the loops of the multiclass SVM only the columns of the other classes get their part."""
    X, y = batch
    dW = np.zeros(W.shape)
    for i in range(X.shape[0]):
        scores = X[i].dot(W)
        for j in range(W.shape[1]):
            if j == y[i]:
                continue
            if scores[j] - scores[y[i]] + 1 > 0:
                dW[:, j] += X[i]
                dW[:, y[i]] -= 0 if wrong else X[i]
    return dW / X.shape[0]


def power_law_loss(p, batch):
    x, y = batch
    curve = p["a"] * x ** p["b"]
    return jnp.mean((curve - y) ** 2)


@wrong(
    power_law_loss,
    {"a": np.asarray(1.5), "b": np.asarray(0.75)},
    (uniform(54, 15, low=0.5, high=2.5), uniform(55, 15, low=1, high=3)),
    cause("wrong-derivative", "missing-factor", "missing-derivative", leaf="b", line='p["a"] * x ** p["b"]'),
)
def exponent_by_the_power_rule(p, batch, wrong=True):
    """The curve a x^b is differentiated by b as if it were by x: a b x^(b-1), not a x^b log x."""
    x, y = batch
    a, b = p["a"], p["b"]
    d_curve = 2 * (a * x**b - y) / len(x)
    by_b = a * b * x ** (b - 1) if wrong else a * x**b * np.log(x)
    return {"a": np.sum(d_curve * x**b), "b": np.sum(d_curve * by_b)}


def two_mistakes_loss(p, batch):
    X, t = batch
    y = jax.nn.sigmoid(X @ p["w"] + p["b"])
    return jnp.mean(0.5 * (t - y) ** 2)


@wrong(
    two_mistakes_loss,
    {"w": normal(56, 4), "b": np.asarray(0.25)},
    (normal(57, 18, 4), integers(58, 2, 18).astype(float)),
    cause("missing-derivative", leaf="w", line="jax.nn.sigmoid("),
    cause("scale", "scaled-term", leaf="b", line=("jax.nn.sigmoid(", "jnp.mean("), factor="n"),
)
def delta_rule_twice_wrong(p, batch, wrong=True):
    """The delta rule without sigmoid' for the weights, and summed where it is averaged for the bias."""
    X, t = batch
    y = sigmoid(X @ p["w"] + p["b"])
    error = y - t
    delta = error * y * (1 - y)
    dw = X.T @ (error if wrong else delta) / len(t)
    db = delta.sum() if wrong else delta.mean()
    return {"w": dw, "b": db}


# ------------------------------------------------------------------------------------------ right, but unusual


@right(house_price_loss, normal(59, 3), (normal(60, 13, 3), normal(61, 13)))
def normal_equations(theta, batch):
    """The gradient is written with the Gram matrix: (X'X theta - X'y) / m."""
    X, y = batch
    gram, moment = X.T @ X, X.T @ y
    return (gram @ theta - moment) / len(y)


@right(house_price_loss, np.array([20.0, 0.25, 4.0]), (house_X, house_y))
def house_prices_by_loops(theta, batch):
    """Unscaled features, and plain Python loops over examples and features."""
    X, y = batch
    m, n = X.shape
    grad = [0.0] * n
    for j in range(n):
        for i in range(m):
            h = sum(theta[k] * X[i][k] for k in range(n))
            grad[j] += (h - y[i]) * X[i][j] / m
    return np.array(grad)


@right(two_mistakes_loss, {"w": normal(62, 4), "b": np.asarray(0.25)}, (normal(63, 11, 4), uniform(64, 11)))
def complex_step(p, batch):
    """Every entry by the complex step, exact but for rounding; not a derivation at all."""
    X, t = batch

    def f(w, b):
        y = 0.5 * (1 + np.tanh((X @ w + b) / 2))
        return np.mean(0.5 * (t - y) ** 2)

    h = 1e-30
    gw = [np.imag(f(p["w"] + 1j * h * np.eye(len(p["w"]))[j], p["b"])) / h for j in range(len(p["w"]))]
    return {"b": np.imag(f(p["w"], p["b"] + 1j * h)) / h, "w": np.array(gw)}


@right(signed_labels_loss, normal(65, 4), signed_batch)
def signed_labels_turned_into_bits(w, batch):
    """Labels of ±1 become 0 and 1, and the usual p - y does the rest."""
    X, y = batch
    bits = (y + 1) / 2
    return X.T @ (sigmoid(X @ w) - bits) / len(bits)


@right(softmax_decay_loss, decay_params, decay_batch)
def vmapped_over_examples(p, batch):
    """One example's gradient by hand in JAX, vmapped and averaged."""
    X, labels = batch

    def one(x, label):
        q = jax.nn.softmax(x @ p["W"] + p["b"])
        d = q - jax.nn.one_hot(label, 3)
        return jnp.outer(x, d), d

    dW, db = jax.vmap(one)(X, labels)
    return {"W": dW.mean(0) + 0.25 * p["W"], "b": db.mean(0)}


@right(columns_logistic_loss, {"w": normal(66, 4, 1, scale=0.5), "b": np.asarray(0.0)}, columns_batch)
def columns_all_the_way(p, batch):
    """Examples in columns, the sums written as einsum, and 1 - A as the sigmoid of the negative."""
    X, Y = batch
    m = X.shape[1]
    Z = p["w"].T @ X + p["b"]
    dZ = (1 - Y) * sigmoid(Z) - Y * sigmoid(-Z)
    return {"w": np.einsum("dm,om->do", X, dZ) / m, "b": np.einsum("om->", dZ) / m}


@right(elastic_net_loss, normal(67, 5), (normal(68, 16, 5), normal(69, 16)))
def lasso_by_comparison(w, batch):
    """The sign of the l1 penalty by way of a comparison, and no np.sign."""
    X, y = batch
    return X.T @ (X @ w - y) / len(y) + 0.375 * (2.0 * (w > 0) - 1) + 0.5 * w
