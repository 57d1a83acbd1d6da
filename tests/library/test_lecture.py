"""Every formula of the lecture, by hand against autodiff: one test per id, F1 to F16.

The losses that autodiff differentiates are written here, per example and with `vmap`, in the textbook's
words: they share no line with `jaxgrad.lecture`, which is in matrix form. A check takes the module it checks
as an argument, so that the last tests can hand it a copy with a fault planted and see the check fail.
"""

import ast
import inspect
import itertools
import types
from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import jaxgrad.lecture as hand
from jaxgrad.types import Layer, Linear, TwoLayer

TOLERANCE = 1e-12
SHAPES = [(1, 1, 1, 1), (4, 4, 4, 4), (7, 3, 5, 2)]
"""(n, d, h, k): one of everything; all equal, where a transpose has the right shape; all different."""

ACTIVATIONS = {"SIGMOID": jax.nn.sigmoid, "TANH": jnp.tanh, "RELU": jax.nn.relu}

problems = given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([0.1, 1.0, 2.0]),
)


class Problem:
    """Random inputs of one shape, in [−scale, scale], drawn as they are asked for.

    Bounded, so that no sigmoid saturates and autodiff's own `s(1 − s)` is good to 1e-12: what happens beyond
    is measured against decimal arithmetic, below.
    """

    def __init__(self, shape, seed, scale=1.0):
        self.n, self.d, self.h, self.k = shape
        self.random = np.random.default_rng(seed)
        self.scale = scale
        self.X = self.values(self.n, self.d)

    def values(self, *shape):
        return jnp.asarray(self.random.uniform(-self.scale, self.scale, size=shape))

    def labels(self, *shape):
        return jnp.asarray(self.random.integers(0, 2, size=shape).astype(np.float64))

    def one_hot(self):
        return jnp.asarray(np.eye(self.k)[self.random.integers(0, self.k, self.n)])

    def two_layer(self, bias):
        b1, b2 = (self.values(self.h), self.values(self.k)) if bias else (None, None)
        return TwoLayer(self.values(self.d, self.h), self.values(self.h, self.k), b1, b2)

    def deep(self, depth, bias):
        sizes = [self.d, *[self.h] * (depth - 1), self.k]
        return tuple(Layer(self.values(m, n), self.values(n) if bias else None) for m, n in itertools.pairwise(sizes))


def relative_error(value, reference):
    """`‖value − reference‖ / ‖reference‖`, each leaf of a pytree by itself, the worst one."""
    assert jax.tree.structure(value) == jax.tree.structure(reference)
    worst = 0.0
    for a, b in zip(jax.tree.leaves(value), jax.tree.leaves(reference), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        difference, size = np.linalg.norm(np.ravel(a - b)), np.linalg.norm(np.ravel(b))
        error = 0.0 if difference == 0 else difference / size
        worst = max(worst, error) if np.isfinite(error) else np.inf
    return worst


def assert_close(value, reference, tolerance=TOLERANCE):
    error = relative_error(value, reference)
    assert error <= tolerance, f"relative error {error:.3g}, allowed {tolerance:.3g}"


# --- The losses that autodiff sees ------------------------------------------------------------------------


def mean_over_examples(example_loss):
    return lambda params, X, Y: jnp.mean(jax.vmap(lambda x, y: example_loss(params, x, y))(X, Y))


def sum_over_examples(example_loss):
    return lambda params, X, Y: jnp.sum(jax.vmap(lambda x, y: example_loss(params, x, y))(X, Y))


def squared_example(w, x, y):
    return jnp.square(y - jnp.dot(x, w))


def apply(layer, x):
    product = jnp.einsum("i,ij->j", x, layer.W)
    return product if layer.b is None else product + layer.b


def predict(layers, x, f):
    for layer in layers[:-1]:
        x = f(apply(layer, x))
    return apply(layers[-1], x)


def layers_of(params):
    return Layer(params.W1, params.b1), Layer(params.W2, params.b2)


def two_layer_example(f):
    return lambda params, x, y: 0.5 * jnp.sum(jnp.square(y - predict(layers_of(params), x, f)))


def logistic_example(params, x, y):
    logit = jnp.dot(x, params.w) + (0.0 if params.b is None else params.b)
    return -y * jax.nn.log_sigmoid(logit) - (1 - y) * jax.nn.log_sigmoid(-logit)


squared_mean = mean_over_examples(squared_example)
logistic_mean = mean_over_examples(logistic_example)


# --- One check per formula --------------------------------------------------------------------------------


def check_F01(lecture, problem):
    w, y, X, n = problem.values(problem.d), problem.values(problem.n), problem.X, problem.n
    value, gradient = jax.value_and_grad(squared_mean)(w, X, y)
    assert_close(lecture.objective(lecture.linear_losses, w, X, y), value)
    assert_close(lecture.objective_gradient(lecture.linear_gradients, w, X, y), gradient)
    value, gradient = jax.value_and_grad(sum_over_examples(squared_example))(w, X, y)
    assert_close(lecture.objective_sum(lecture.linear_losses, w, X, y), value)
    assert_close(lecture.objective_gradient_sum(lecture.linear_gradients, w, X, y), gradient)
    mean = lecture.objective_gradient(lecture.linear_gradients, w, X, y)
    assert_close(lecture.objective_gradient_sum(lecture.linear_gradients, w, X, y), n * mean)


def check_F02(lecture, problem):
    w, y, X = problem.values(problem.d), problem.values(problem.n), problem.X
    loss = lambda w: squared_mean(w, X, y)
    g = jax.grad(loss)(w)
    eta = 0.5 / float(jnp.sum(X**2) / problem.n)  # at most half of 1/(λ_max of the Hessian 2XᵀX/n)
    stepped = lecture.step(w, lecture.linear_gradient(w, X, y), eta)
    assert_close(stepped, w - eta * g)
    assert loss(stepped) < loss(w)
    # The gradient is where L grows fastest: no unit direction has a larger derivative than its own.
    slope = lambda u: float(jax.jvp(loss, (w,), (u / jnp.linalg.norm(u),))[1])
    steepest = slope(g)
    assert abs(steepest - jnp.linalg.norm(g)) <= TOLERANCE * steepest
    assert slope(w - stepped) >= steepest * (1 - TOLERANCE)
    assert all(slope(problem.values(problem.d)) <= steepest * (1 + TOLERANCE) for _ in range(5))


def check_F03(lecture, problem):
    w, y, X = problem.values(problem.d), problem.values(problem.n), problem.X
    etas = [0.3 / (1 + t) / float(jnp.sum(X**2) / problem.n) for t in range(6)]
    path = [w]
    for eta in etas:
        path.append(path[-1] - eta * jax.grad(squared_mean)(path[-1], X, y))
    sizes = [float(jnp.linalg.norm(b - a)) for a, b in itertools.pairwise(path)]
    gradient = lambda w: lecture.linear_gradient(w, X, y)
    assert_close(lecture.gradient_descent(gradient, w, etas, 0.0), jnp.stack(path))
    # It stops after the first step shorter than eps, and that step is taken.
    eps = sizes[2] * (1 + 1e-6)
    taken = next(t for t, size in enumerate(sizes, 1) if size < eps)
    assert_close(lecture.gradient_descent(gradient, w, etas, eps), jnp.stack(path[: taken + 1]))


def check_F04(lecture, problem):
    w, y, X = problem.values(problem.d), problem.values(problem.n), problem.X
    value, gradient = jax.value_and_grad(squared_mean)(w, X, y)
    assert_close(lecture.linear_loss(w, X, y), value)
    assert_close(lecture.linear_gradient(w, X, y), gradient)
    assert_close(lecture.linear_step(w, X, y), w - 0.001 * gradient)


def check_F05(lecture, problem):
    w, y, X, n = problem.values(problem.d), problem.values(problem.n), problem.X, problem.n
    batches = [jnp.asarray(problem.random.integers(0, n, size=b)) for b in (1, 2, n)]  # repeats included
    for B in batches:
        rows = [int(j) for j in B]
        terms = [jax.grad(squared_example)(w, X[j], y[j]) for j in rows]
        gradient = sum(terms[1:], start=terms[0]) / len(rows)
        assert_close(lecture.minibatch_gradient(lecture.linear_gradient, w, X, y, B), gradient)
    etas = [0.2 / float(jnp.sum(X**2))] * 3
    path = [w]
    for B, eta in zip(batches, etas, strict=True):
        path.append(path[-1] - eta * jax.grad(squared_mean)(path[-1], X[B], y[B]))
    descend = lambda eps: lecture.stochastic_gradient_descent(lecture.linear_gradient, w, X, y, batches, etas, eps)
    assert_close(descend(0.0), jnp.stack(path))
    assert_close(descend(jnp.inf), jnp.stack(path[:2]))
    everything = lecture.minibatch_gradient(lecture.linear_gradient, w, X, y, jnp.arange(n))
    assert jnp.array_equal(everything, lecture.linear_gradient(w, X, y))


def check_F06(lecture, problem):
    w, y, X, n = problem.values(problem.d), problem.values(problem.n), problem.X, problem.n
    for b in (1, 3):
        B = jnp.asarray(problem.random.integers(0, n, size=b))
        gradient = jax.grad(squared_mean)(w, X[B], y[B])
        assert_close(lecture.linear_minibatch_gradient(w, X, y, B), gradient)
        assert_close(lecture.linear_minibatch_step(w, X, y, B, 0.1), w - 0.1 * gradient)
        assert_close(lecture.linear_minibatch_step(w, X, y, B), w - 0.001 * gradient)


def check_F07(lecture, problem):
    y_hat, y, labels = problem.values(problem.n), problem.values(problem.n), problem.labels(problem.n)
    p = jnp.asarray(problem.random.uniform(0.01, 0.99, problem.n))
    log_likelihood = lambda p, y: jnp.log(jnp.where(y == 1, p, 1 - p))
    functionals = [
        (lecture.mean_squared_error, lecture.mean_squared_error_gradient, jnp.square, y_hat, y),
        (lecture.mean_absolute_error, lecture.mean_absolute_error_gradient, jnp.abs, y_hat, y),
    ]
    for value, gradient, of_residual, prediction, target in functionals:
        loss = lambda p, y=target, f=of_residual: jnp.sum(jax.vmap(f)(p - y)) / problem.n
        assert_close(value(prediction, target), loss(prediction))
        assert_close(gradient(prediction, target), jax.grad(loss)(prediction))
    loss = lambda p: -jnp.sum(jax.vmap(log_likelihood)(p, labels)) / problem.n
    assert_close(lecture.logloss(p, labels), loss(p))
    assert_close(lecture.logloss_gradient(p, labels), jax.grad(loss)(p))


def check_F08(lecture, problem):
    for depth, bias, name in [(1, True, "RELU"), (2, False, "SIGMOID"), (4, True, "TANH"), (4, False, "RELU")]:
        f, pair, layers = ACTIVATIONS[name], getattr(lecture, name), problem.deep(depth, bias)
        values = lecture.forward(layers, problem.X, pair)
        assert len(values.A) == len(values.Z) == depth
        predictions, pull = jax.vjp(lambda p, f=f: jax.vmap(lambda x: predict(p, x, f))(problem.X), layers)
        assert_close(values.Y_hat, predictions)
        # The derivative of the whole map, against a random cotangent: backprop at any depth.
        cotangent = problem.values(problem.n, problem.k)
        gradient, _ = lecture.deep_backprop(layers, problem.X, cotangent, pair, lambda _, c: c)
        assert_close(gradient, pull(cotangent)[0])


def check_F09(lecture, problem):
    Y_hat, Y = problem.values(problem.n, problem.k), problem.values(problem.n, problem.k)
    example = lambda y_hat, y: 0.5 * jnp.dot(y - y_hat, y - y_hat)
    assert_close(lecture.half_squared_errors(Y_hat, Y), jax.vmap(example)(Y_hat, Y))
    total = lambda Y_hat: jnp.sum(jax.vmap(example)(Y_hat, Y))
    assert_close(lecture.half_squared_adjoint_sum(Y_hat, Y), jax.grad(total)(Y_hat))
    mean = lambda Y_hat: jnp.mean(jax.vmap(example)(Y_hat, Y))
    assert_close(lecture.half_squared_adjoint(Y_hat, Y), jax.grad(mean)(Y_hat))


def check_F10(lecture, problem):
    Y = problem.values(problem.n, problem.k)
    for name, f in ACTIVATIONS.items():
        params = problem.two_layer(bias=name != "SIGMOID")  # sigmoid as in the lecture, without biases
        example, pair = two_layer_example(f), getattr(lecture, name)
        value, gradient = jax.value_and_grad(mean_over_examples(example))(params, problem.X, Y)
        assert_close(lecture.two_layer_loss(params, problem.X, Y, pair), value)
        assert_close(lecture.two_layer_backprop(params, problem.X, Y, pair)[0], gradient)
        value, gradient = jax.value_and_grad(sum_over_examples(example))(params, problem.X, Y)
        assert_close(lecture.two_layer_loss_sum(params, problem.X, Y, pair), value)
        by_hand, _ = lecture.two_layer_backprop(params, problem.X, Y, pair, lecture.half_squared_adjoint_sum)
        assert_close(by_hand, gradient)


def check_F11(lecture, problem):
    pairs = [(getattr(lecture, name), f) for name, f in ACTIVATIONS.items()]
    pairs.append((lecture.Activation(jnp.sin, jnp.cos), jnp.sin))
    x = problem.values(problem.n)
    for outer, f in pairs:
        for inner, g in pairs:
            composed = lecture.chain_rule(outer, inner)
            both = lambda x, f=f, g=g: f(g(x))
            assert_close(composed.f(x), jax.vmap(both)(x))
            assert_close(composed.derivative(x), jax.vmap(jax.grad(both))(x))
    third = lecture.chain_rule(lecture.TANH, lecture.chain_rule(lecture.SIGMOID, pairs[-1][0]))
    chain = lambda x: jnp.tanh(jax.nn.sigmoid(jnp.sin(x)))
    assert_close(third.derivative(x), jax.vmap(jax.grad(chain))(x))


def gradient_of_matrix(problem, reduce, name):
    """Parameters, targets and autodiff's gradient by one matrix of the lecture's net (sigmoid, no biases)."""
    params, Y = problem.two_layer(bias=False), problem.values(problem.n, problem.k)
    gradient = jax.grad(reduce(two_layer_example(jax.nn.sigmoid)))(params, problem.X, Y)
    return params, Y, getattr(gradient, name)


def check_F12(lecture, problem):
    params, Y, gradient = gradient_of_matrix(problem, mean_over_examples, "W2")
    assert_close(lecture.output_layer_gradient(params, problem.X, Y), gradient)
    params, Y, gradient = gradient_of_matrix(problem, sum_over_examples, "W2")
    assert_close(lecture.output_layer_gradient_sum(params, problem.X, Y), gradient)
    one = jax.grad(two_layer_example(jax.nn.sigmoid))(params, problem.X[0], Y[0]).W2
    assert_close(lecture.output_layer_gradient_one_example(params, problem.X[0], Y[0]), one.T)


def check_F13(lecture, problem):
    params, Y, gradient = gradient_of_matrix(problem, mean_over_examples, "W1")
    assert_close(lecture.hidden_layer_gradient(params, problem.X, Y), gradient)
    params, Y, gradient = gradient_of_matrix(problem, sum_over_examples, "W1")
    assert_close(lecture.hidden_layer_gradient_sum(params, problem.X, Y), gradient)
    one = jax.grad(two_layer_example(jax.nn.sigmoid))(params, problem.X[0], Y[0]).W1
    assert_close(lecture.hidden_layer_gradient_one_example(params, problem.X[0], Y[0]), one.T)


def check_F14(lecture, problem):
    h = problem.values(problem.n, problem.k)
    s = lambda h: jnp.exp(h) / (jnp.exp(h) + 1)
    derivative = jax.vmap(jax.vmap(jax.grad(jax.nn.sigmoid)))(h)
    assert_close(lecture.sigmoid(h), s(h))
    assert_close(lecture.sigmoid_as_printed(h), s(h))
    assert_close(lecture.sigmoid_derivative(h), derivative)
    assert_close(lecture.sigmoid_derivative_as_printed(h), derivative)


def check_F15(lecture, problem):
    y, h = problem.labels(problem.n), problem.values(problem.n)
    p = jnp.asarray(problem.random.uniform(0.01, 0.99, problem.n))
    example = lambda p, y: -jnp.log(jnp.where(y == 1, p, 1 - p))
    assert_close(lecture.cross_entropy_as_printed(y, p), jax.vmap(example)(p, y))
    assert_close(lecture.cross_entropy_derivative_as_printed(y, p), jax.vmap(jax.grad(example))(p, y))
    from_logit = lambda h, y: jax.nn.softplus(jnp.where(y == 1, -h, h))
    assert_close(lecture.cross_entropy(y, h), jax.vmap(from_logit)(h, y))


def check_F16(lecture, problem):
    y = problem.labels(problem.n)
    for b in (None, problem.values()):
        params = Linear(problem.values(problem.d), b)
        value, gradient = jax.value_and_grad(logistic_mean)(params, problem.X, y)
        assert_close(lecture.logistic_loss(params, problem.X, y), value)
        for form in ("logistic_gradient", "logistic_gradient_signed", "logistic_gradient_as_printed"):
            assert_close(getattr(lecture, form)(params, problem.X, y), gradient)
    # As the slide has it: one example, two features, dL/dw1, dL/dw2 and dL/db.
    params, x, y = Linear(problem.values(2), problem.values()), problem.values(1, 2), problem.labels(1)
    printed = lecture.logistic_gradient_as_printed(params, x, y)
    assert_close(printed, jax.grad(logistic_example)(params, x[0], y[0]))
    assert_close(printed.w, printed.b * x[0])


# --- F1 to F16 --------------------------------------------------------------------------------------------


@problems
def test_F01_objective(shape, seed, scale):
    check_F01(hand, Problem(shape, seed, scale))


@problems
def test_F02_direction(shape, seed, scale):
    check_F02(hand, Problem(shape, seed, scale))


@problems
def test_F03_gradient_descent(shape, seed, scale):
    check_F03(hand, Problem(shape, seed, scale))


@problems
def test_F04_linear_regression(shape, seed, scale):
    check_F04(hand, Problem(shape, seed, scale))


@problems
def test_F05_stochastic_gradient_descent(shape, seed, scale):
    check_F05(hand, Problem(shape, seed, scale))


@problems
def test_F06_sgd_on_linear_regression(shape, seed, scale):
    check_F06(hand, Problem(shape, seed, scale))


@problems
def test_F07_functionals(shape, seed, scale):
    check_F07(hand, Problem(shape, seed, scale))


@problems
def test_F08_forward_propagation(shape, seed, scale):
    # One single number Ŷ − Y may cancel to fewer digits than 1e-12 asks for, in autodiff as by hand.
    assume(shape != (1, 1, 1, 1))
    check_F08(hand, Problem(shape, seed, scale))


@problems
def test_F09_half_squared_loss(shape, seed, scale):
    check_F09(hand, Problem(shape, seed, scale))


@problems
def test_F10_two_layer_net(shape, seed, scale):
    check_F10(hand, Problem(shape, seed, scale))


@problems
def test_F11_chain_rule(shape, seed, scale):
    check_F11(hand, Problem(shape, seed, scale))


@problems
def test_F12_output_layer(shape, seed, scale):
    check_F12(hand, Problem(shape, seed, scale))


@problems
def test_F13_hidden_layer(shape, seed, scale):
    check_F13(hand, Problem(shape, seed, scale))


@problems
def test_F14_sigmoid(shape, seed, scale):
    check_F14(hand, Problem(shape, seed, scale))


@problems
def test_F15_logloss(shape, seed, scale):
    check_F15(hand, Problem(shape, seed, scale))


@problems
def test_F16_logistic_regression_by_backprop(shape, seed, scale):
    check_F16(hand, Problem(shape, seed, scale))


# --- Backprop: adjoints, biases, k classes ----------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_adjoints_are_the_derivatives_by_the_kept_values(name, bias):
    """A kept value moved by a little moves the loss by its adjoint: autodiff by an added zero."""
    problem, f = Problem((5, 3, 4, 2), seed=8), ACTIVATIONS[name]
    layers, Y = problem.deep(3, bias), problem.values(5, 2)

    def loss(shifts):
        A = problem.X
        for l, layer in enumerate(layers, 1):
            Z = jax.vmap(lambda x, layer=layer: apply(layer, x))(A) + shifts.get(f"Z{l}", 0.0)
            A = f(Z) + shifts.get(f"A{l}", 0.0)
        return 0.5 * jnp.mean(jnp.sum((Y - (Z + shifts["Y_hat"])) ** 2, axis=1))

    _, adjoints = hand.deep_backprop(layers, problem.X, Y, getattr(hand, name))
    assert list(adjoints) == ["Y_hat", "A2", "Z2", "A1", "Z1"]
    assert_close(adjoints, jax.grad(loss)(jax.tree.map(jnp.zeros_like, adjoints)))
    two = TwoLayer(layers[0].W, problem.values(4, 2), layers[0].b, layers[2].b)
    assert list(hand.two_layer_backprop(two, problem.X, Y)[1]) == ["Y_hat", "A1", "Z1"]


def test_backprop_of_the_two_layer_net_is_F12_and_F13():
    problem = Problem((6, 3, 4, 2), seed=3)
    params, Y = problem.two_layer(bias=False), problem.values(6, 2)
    gradient, _ = hand.two_layer_backprop(params, problem.X, Y)
    assert gradient.b1 is None
    assert gradient.b2 is None
    assert_close(gradient.W2, hand.output_layer_gradient(params, problem.X, Y))
    assert_close(gradient.W1, hand.hidden_layer_gradient(params, problem.X, Y))


@problems
def test_deep_net_with_classes(shape, seed, scale):
    problem = Problem(shape, seed, scale)
    layers, Y = problem.deep(3, bias=True), problem.one_hot()
    cross_entropy = lambda layers, x, y: -jnp.vdot(y, jax.nn.log_softmax(predict(layers, x, jnp.tanh)))
    losses = hand.softmax_cross_entropies(hand.forward(layers, problem.X, hand.TANH).Y_hat, Y)
    value, gradient = jax.value_and_grad(mean_over_examples(cross_entropy))(layers, problem.X, Y)
    by_hand, _ = hand.deep_backprop(layers, problem.X, Y, hand.TANH, hand.softmax_adjoint)
    if problem.k > 1:
        assert_close(jnp.mean(losses), value)
        assert_close(by_hand, gradient)
    else:  # one class is certain: nothing to lose, nothing to learn
        assert not any(leaf.any() for leaf in jax.tree.leaves((losses, by_hand)))


def test_deep_net_with_logits():
    problem = Problem((9, 3, 4, 2), seed=5)
    layers, Y = problem.deep(3, bias=True), problem.labels(9, 2)

    def loss(layers, x, y):
        logits = predict(layers, x, jax.nn.relu)
        return jnp.sum(jax.nn.softplus((1 - 2 * y) * logits))

    by_hand, _ = hand.deep_backprop(layers, problem.X, Y, hand.RELU, hand.logistic_adjoint)
    assert_close(by_hand, jax.grad(mean_over_examples(loss))(layers, problem.X, Y))


def test_jit_vmap_and_float32():
    problem = Problem((6, 3, 4, 2), seed=1)
    params, Y = problem.two_layer(bias=True), problem.values(6, 2)
    gradient, adjoints = hand.two_layer_backprop(params, problem.X, Y)
    assert_close(jax.jit(lambda *a: hand.two_layer_backprop(*a))(params, problem.X, Y), (gradient, adjoints))
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    both, _ = jax.vmap(lambda p: hand.two_layer_backprop(p, problem.X, Y))(several)
    assert_close(jax.tree.map(lambda leaf: leaf[0], both), gradient)

    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    forms = zip(
        (hand.SIGMOID, hand.TANH, hand.RELU),
        (hand.half_squared_adjoint, hand.softmax_adjoint, hand.logistic_adjoint),
        strict=True,
    )
    for f, output_adjoint in forms:
        by_hand = hand.two_layer_backprop(*single((params, problem.X, Y)), f, output_adjoint)
        reference = single(hand.two_layer_backprop(params, problem.X, Y, f, output_adjoint))
        assert_close(by_hand, reference, tolerance=1e-5)
    linear, y = Linear(problem.values(3), problem.values()), problem.labels(6)
    for form in (hand.logistic_gradient_as_printed, hand.logistic_gradient, hand.logistic_gradient_signed):
        assert_close(form(*single((linear, problem.X, y))), single(form(linear, problem.X, y)), 1e-5)
    y = problem.values(6)
    by_hand = hand.linear_gradient(*single((linear.w, problem.X, y)))
    assert_close(by_hand, single(hand.linear_gradient(linear.w, problem.X, y)), 1e-5)


def test_kinks():
    """Where there is no derivative the formulas give the subgradient 0."""
    zero = jnp.zeros(3)
    assert not hand.mean_absolute_error_gradient(zero, zero).any()
    assert not hand.relu_derivative(zero).any()
    # And where autodiff is one-sided on |h| (h = 0: every example, at w = 0), these are right.
    assert float(jax.grad(hand.sigmoid)(0.0)) == 0.25
    for form in (hand.logit_adjoint, hand.logit_adjoint_signed, hand.logit_adjoint_as_printed):
        assert form(jnp.asarray([0.0, 1.0]), jnp.zeros(2)).tolist() == [0.5, -0.5]


# --- The misprints are wrong in the way stated ------------------------------------------------------------


def test_F04_slide_is_exactly_a_quarter():
    for seed in range(5):
        problem = Problem((8, 3, 1, 1), seed)  # n a power of two: then -2/n and -1/2/n are exact
        w, y = problem.values(3), problem.values(8)
        by_hand = hand.linear_gradient(w, problem.X, y)
        assert jnp.array_equal(4 * hand.linear_gradient_slide_half(w, problem.X, y), by_hand)
        # It is the gradient of a quarter of the loss: the same direction, a step four times too short.
        quarter = jax.grad(lambda w, X=problem.X, y=y: squared_mean(w, X, y) / 4)(w)
        assert_close(hand.linear_gradient_slide_half(w, problem.X, y), quarter)


def two_layer_problem(shape):
    problem = Problem(shape, seed=12)
    params, Y = problem.two_layer(bias=False), problem.values(problem.n, problem.k)
    gradient = jax.grad(sum_over_examples(two_layer_example(jax.nn.sigmoid)))(params, problem.X, Y)
    return params, problem.X, Y, gradient


def test_F12_as_printed():
    params, X, Y, gradient = two_layer_problem((1, 3, 4, 1))  # one example, one output: right, as a row
    assert_close(hand.output_layer_gradient_as_printed(params, X, Y), gradient.W2.T)
    for shape in [(7, 3, 4, 1), (1, 3, 4, 2), (7, 3, 4, 2)]:
        params, X, Y, _ = two_layer_problem(shape)
        with pytest.raises(ValueError, match=r"F12 as printed does not multiply.*k must equal n"):
            hand.output_layer_gradient_as_printed(params, X, Y)
    params, X, Y, gradient = two_layer_problem((4, 4, 4, 4))  # it multiplies, has the right shape, and is wrong
    printed = hand.output_layer_gradient_as_printed(params, X, Y)
    assert relative_error(printed, gradient.W2) > 0.1
    assert relative_error(printed, gradient.W2.T) > 0.1


def test_F13_as_printed():
    params, X, Y, gradient = two_layer_problem((1, 3, 1, 2))  # one example, one hidden unit: right, as a row
    assert_close(hand.hidden_layer_gradient_as_printed(params, X, Y), gradient.W1.T)
    for shape in [(7, 3, 4, 1), (1, 3, 4, 1), (7, 3, 4, 2)]:
        params, X, Y, _ = two_layer_problem(shape)
        with pytest.raises(ValueError, match=r"F13 as printed does not multiply.*h must equal n"):
            hand.hidden_layer_gradient_as_printed(params, X, Y)
    params, X, Y, gradient = two_layer_problem((4, 4, 4, 4))
    printed = hand.hidden_layer_gradient_as_printed(params, X, Y)
    assert relative_error(printed, gradient.W1) > 0.1
    assert relative_error(printed, gradient.W1.T) > 0.1
    # Nor is it what its left-hand side says, a second dL/dW2.
    assert relative_error(printed, gradient.W2) > 0.1


def test_a_minibatch_needs_an_index():
    problem = Problem((5, 3, 1, 1), seed=0)
    with pytest.raises(ValueError, match="B is empty"):
        hand.linear_minibatch_gradient(problem.values(3), problem.X, problem.values(5), jnp.zeros(0, jnp.int32))


# --- F14–F16 in floating point, against decimal arithmetic ------------------------------------------------


def exact(function, h):
    """`function(h)` at 60 digits for each number of `h`, rounded to float64 at the end.

    `1 + e^−h` needs 310 digits before the 1 still shows at h = −700.
    """
    with localcontext() as context:
        context.prec = 400
        return np.asarray([float(function(Decimal(float(number)))) for number in h])


DTYPES = {"float64": (jnp.float64, 700.0), "float32": (jnp.float32, 87.0)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("y", [0, 1])
def test_the_forms_that_must_be_keep_every_digit(dtype, y):
    kind, end = DTYPES[dtype]
    h = np.concatenate([-np.geomspace(end, 1e-6, 60), [0.0], np.geomspace(1e-6, end, 60)]).astype(dtype)
    label = jnp.full(h.shape, y, kind)
    rounding = float(jnp.finfo(kind).eps)
    one = Decimal(1)
    s = lambda h: one / (one + (-h).exp())
    forms = {
        "sigmoid": (hand.sigmoid(jnp.asarray(h)), s),
        "derivative": (hand.sigmoid_derivative(jnp.asarray(h)), lambda h: s(h) * s(-h)),
        "cross entropy": (hand.cross_entropy(label, jnp.asarray(h)), lambda h: -(s(h) if y else s(-h)).ln()),
        "adjoint": (hand.logit_adjoint_signed(label, jnp.asarray(h)), lambda h: -s(-h) if y else s(h)),
    }
    for name, (computed, formula) in forms.items():
        reference = exact(formula, h)
        error = np.abs(np.asarray(computed, np.float64) - reference) / np.abs(reference)
        assert error.max() <= 4 * rounding, (name, h[error.argmax()], error.max() / rounding)
    # p − y is as good in absolute terms, and has no digit left for y = 1 where p rounds to 1.
    computed, reference = np.asarray(hand.logit_adjoint(label, jnp.asarray(h))), exact(forms["adjoint"][1], h)
    assert np.abs(computed - reference).max() <= rounding
    lost = np.abs(computed - reference) / np.abs(reference) > 0.5
    assert lost.any() == (y == 1)
    assert not lost[h < (36 if dtype == "float64" else 16)].any()


@pytest.mark.parametrize("y", [0.0, 1.0])
@pytest.mark.parametrize("size", [1e2, 1e9])
def test_saturated_gradients_are_finite(y, size):
    X, label = jnp.asarray([[size], [-size], [0.0]]), jnp.full(3, y)
    for form in (hand.logistic_gradient, hand.logistic_gradient_signed):
        # One of the two saturated examples is wrong by 1, whatever the label: (1/3)(±size)(±1).
        assert_close(form(Linear(jnp.ones(1)), X, label).w, jnp.asarray([size / 3]))
    assert jnp.isfinite(hand.logistic_loss(Linear(jnp.ones(1)), X, label))


def first_failure(fails, good, bad):
    """The number nearest to `good` at which `fails` holds, to one unit in the last place, by bisection."""
    good, bad = np.asarray(good), np.asarray(bad)
    assert fails(bad)
    assert not fails(good)
    while True:
        middle = good + (bad - good) / np.asarray(2, good.dtype)
        if middle in (good, bad):
            return float(bad)
        good, bad = (good, middle) if fails(middle) else (middle, bad)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("y", [0, 1])
def test_F16_as_printed_is_nan_from_the_predicted_logits(y, dtype, compiled):
    """`p` rounds to 1 once `e^−h ≤ eps/2`; it is 0 once `e^−h` overflows, or once it is subnormal and flushed."""
    form = jax.jit(hand.logit_adjoint_as_printed) if compiled else hand.logit_adjoint_as_printed
    label = np.asarray(y, dtype)
    is_nan = lambda h: bool(jnp.isnan(form(jnp.asarray(label), jnp.asarray(h))))
    limits = jnp.finfo(dtype)
    bits = limits.nmant + 1
    flushed = float(jnp.asarray(limits.tiny) * jnp.asarray(0.5, dtype)) == 0
    upper = bits * Decimal(2).ln()
    overflow, subnormal = -Decimal(float(limits.max)).ln(), Decimal(float(limits.tiny)).ln()
    lower = overflow if compiled or not flushed else subnormal
    for predicted, far in [(upper, 60), (lower, -1000)]:
        zero, far, toward = np.asarray(0, dtype), np.asarray(far, dtype), np.asarray(2 * far, dtype)
        found = first_failure(is_nan, zero, far)
        nearest = np.asarray(float(predicted), dtype)
        assert found in (nearest, np.nextafter(nearest, toward)), (found, float(predicted))
    inside = np.linspace(float(lower) * (1 - 1e-6), float(upper) * (1 - 1e-6), 4001).astype(dtype)
    assert np.isfinite(form(jnp.full(inside.shape, label), jnp.asarray(inside))).all()
    if dtype == "float64":
        assert abs(float(upper) - 36.73680056967711) < 1e-14
        assert abs(float(overflow) + 709.7827128933841) < 2e-13


def test_one_saturated_example_makes_the_printed_gradient_nan():
    problem = Problem((20, 3, 1, 1), seed=4)
    params, y = Linear(problem.values(3), problem.values()), problem.labels(20)
    for size in (60.0, -800.0):
        X = problem.X.at[7].set(size * params.w / jnp.vdot(params.w, params.w))
        printed = hand.logistic_gradient_as_printed(params, X, y)
        assert all(jnp.isnan(leaf).all() for leaf in jax.tree.leaves(printed))
        reference = jax.grad(logistic_mean)(params, X, y)
        assert_close(hand.logistic_gradient(params, X, y), reference)
        assert_close(hand.logistic_gradient_signed(params, X, y), reference)


def test_F14_and_F15_as_printed_fail_where_p_is_rounded():
    h = jnp.asarray([20.0, 30.0, 37.0])
    error = np.abs(hand.sigmoid_derivative_as_printed(h) / hand.sigmoid_derivative(h) - 1)
    assert error[0] > 1e-10
    assert error[1] > 1e-5
    assert error[2] == 1
    one, zero = jnp.ones(()), jnp.zeros(())
    assert jnp.isnan(hand.cross_entropy_as_printed(one, one))
    assert jnp.isinf(hand.cross_entropy_as_printed(zero, one))
    assert jnp.isnan(hand.cross_entropy_derivative_as_printed(one, one))
    assert jnp.isinf(hand.cross_entropy_derivative_as_printed(zero, one))


# --- The module, and tests that can fail ------------------------------------------------------------------


def test_the_module_asks_for_no_derivative_and_imports_no_model():
    tree = ast.parse(inspect.getsource(hand))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):  # what comes from the package itself by name: a model would
            names = {f"jaxgrad.{alias.name}" for alias in node.names}
            imported |= names if node.module == "jaxgrad" else {node.module}
    assert imported == {"collections.abc", "typing", "jax.numpy", "jaxtyping", "jaxgrad.checks", "jaxgrad.types"}
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not used & {"jax", "grad", "value_and_grad", "vjp", "jvp", "linearize", "jacobian", "jacrev", "nn"}


def test_every_formula_is_named_in_a_docstring():
    documented = [value for value in vars(hand).values() if getattr(value, "__module__", "") == hand.__name__]
    text = " ".join(inspect.getdoc(value) or "" for value in documented)
    for number in range(1, 17):
        assert f"F{number}" in text.replace(",", " ").replace(".", " ").replace("’", " ").split(), number


FAULTS = [
    (check_F01, "return jnp.mean(gradients(w, X, Y), axis=0)", "return jnp.sum(gradients(w, X, Y), axis=0)"),
    (check_F01, "return jnp.mean(losses(w, X, Y))", "return jnp.sum(losses(w, X, Y))"),
    (check_F02, "return w - eta * gradient", "return w + eta * gradient"),
    (check_F03, "< eps", "< 0 * eps"),
    (check_F03, "step(path[-1], gradient(path[-1]), eta)", "step(path[-1], gradient(path[0]), eta)"),
    (check_F04, "return -2 / X.shape[0]", "return -1 / 2 / X.shape[0]"),
    (check_F04, "eta: Number = 0.001", "eta: Number = 0.01"),
    (check_F05, "gradient(w, X[B], Y[B])", "gradient(w, X[B], Y[: B.shape[0]])"),
    (check_F05, "gradient(w, X[B], Y[B])", "gradient(w, X, Y)"),
    (check_F06, "minibatch_gradient(linear_gradient, w, X, y, B)", "linear_gradient(w, X, y)"),
    (check_F07, "return -1 / y.shape[0] * jnp.sign(y - y_hat)", "return -1 / y.shape[0] * (y - y_hat)"),
    (check_F08, "A.append(f.f(Z[-1]))", "A.append(Z[-1])"),
    (check_F08, "for l in range(len(layers), 0, -1)", "for l in range(len(layers), 1, -1)"),
    (check_F09, "return (Y_hat - Y) / Y.shape[0]", "return (Y - Y_hat) / Y.shape[0]"),
    (check_F10, "jnp.sum(dZ, axis=0)", "jnp.mean(dZ, axis=0)"),
    (check_F10, "f.derivative(values.Z[l - 2])", "f.derivative(values.A[l - 1])"),
    (check_F10, "return (z > 0).astype(z.dtype)", "return jnp.ones_like(z)"),
    (check_F10, "return 4 * sigmoid_derivative(2 * z)", "return 2 * sigmoid_derivative(2 * z)"),
    (check_F11, "outer.derivative(inner.f(x)) *", "outer.derivative(x) *"),
    (check_F12, "return values.A[1].T @ (values.Y_hat - Y)", "return values.A[0].T @ (values.Y_hat - Y)"),
    (check_F13, "@ params.W2.T) * f.derivative(values.Z[0]))", "@ params.W2.T))"),
    (check_F14, "return e / (1 + e) ** 2", "return e / (1 + e)"),
    (check_F15, "return y * jnp.logaddexp(0, -h) +", "return y * jnp.logaddexp(0, h) +"),
    (check_F15, "return -(y / p - (1 - y) / (1 - p))", "return -(y / p + (1 - y) / (1 - p))"),
    (check_F16, "return sigmoid(h) - y", "return y - sigmoid(h)"),
    (check_F16, "- y * sigmoid(-h)", "- y * sigmoid(h)"),
    (check_F16, "* (s * (1 - s))", "* s"),
]


@pytest.mark.parametrize(("check", "right", "wrong"), FAULTS)
def test_a_planted_fault_is_caught(check, right, wrong):
    source = inspect.getsource(hand)
    assert source.count(right) >= 1
    faulty = types.ModuleType("faulty")
    exec(source.replace(right, wrong), vars(faulty))
    with pytest.raises((AssertionError, TypeError)):
        check(faulty, Problem((7, 3, 5, 2), seed=6))


@pytest.mark.parametrize("factor", [1 + 1e-11, 1 - 1e-11])
def test_an_error_of_1e_11_is_caught(factor):
    problem = Problem((7, 3, 5, 2), seed=6)
    w, y = problem.values(3), problem.values(7)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(factor * hand.linear_gradient(w, problem.X, y), jax.grad(squared_mean)(w, problem.X, y))
