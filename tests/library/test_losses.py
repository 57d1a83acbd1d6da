"""Losses against plain numpy and mpmath-free closed forms, and their gradients where JAX goes wrong."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxgrad import descend, distinct, full_batch, losses, models
from jaxgrad.types import Batch, Layer, Linear

LOGITS = [0.0, -0.0, 1e-30, 0.3, -0.3, 20.0, -20.0, 36.8, -36.8, 710.0, -710.0, 1e9, -1e9]


def test_regression_losses_and_their_gradients():
    prediction, y = jnp.array([1.0, -2.0]), jnp.array([0.5, 1.0])
    assert losses.squared(prediction, y) == 0.25 + 9
    assert losses.half_squared(prediction, y) == (0.25 + 9) / 2
    assert losses.absolute(prediction, y) == 3.5
    np.testing.assert_array_equal(jax.grad(losses.squared)(prediction, y), [1.0, -6.0])
    np.testing.assert_array_equal(jax.grad(losses.half_squared)(prediction, y), [0.5, -3.0])
    np.testing.assert_array_equal(jax.grad(losses.absolute)(prediction, y), [1.0, -1.0])
    assert jax.grad(losses.absolute)(jnp.array(2.0), jnp.array(2.0)) == 0, "the subgradient at the kink"


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("y", [0.0, 1.0])
@pytest.mark.parametrize("h", LOGITS)
def test_logloss_and_gradient_at_every_logit(h, y, dtype):
    signed = (1 - 2 * y) * float(dtype(h))
    value = max(signed, 0.0) + np.log1p(np.exp(-abs(signed)))
    slope = (1 - 2 * y) * (1 / (1 + np.exp(-signed)) if signed > -700 else 0.0)
    got, gradient = jax.value_and_grad(losses.logloss)(jnp.asarray(h, dtype), jnp.asarray(y, dtype))
    tiny, eps = float(jnp.finfo(dtype).tiny), float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(got, value, rtol=4 * eps, atol=tiny)
    np.testing.assert_allclose(gradient, slope, rtol=8 * eps, atol=tiny)


def test_logloss_gradient_under_jit_and_vmap_equals_p_minus_y():
    h, y = jnp.linspace(-30.0, 30.0, 61), jnp.asarray(np.arange(61) % 2, jnp.float64)
    gradient = jax.jit(jax.vmap(jax.grad(losses.logloss)))(h, y)
    np.testing.assert_allclose(gradient, 1 / (1 + np.exp(-h)) - y, atol=2e-16)


def test_the_textbook_stable_form_is_wrong_at_zero_and_ours_is_not():
    """The reason for softplus: JAX takes d|h|/dh = 1 and dmax(h, 0)/dh = 1/2 at 0."""
    textbook = lambda h, y: jnp.maximum(h, 0) - y * h + jnp.log1p(jnp.exp(-jnp.abs(h)))
    for y in (0.0, 1.0):
        assert abs(jax.grad(textbook)(0.0, y) - (0.5 - y)) == 0.5
        assert jax.grad(losses.logloss)(jnp.asarray(0.0), jnp.asarray(y)) == 0.5 - y


def test_softmax_cross_entropy():
    z = jnp.array([1.0, -2.0, 0.5])
    p = np.exp(z) / np.exp(z).sum()
    np.testing.assert_allclose(losses.softmax_cross_entropy(z, 2), -np.log(p[2]), rtol=1e-14)
    soft = jnp.array([0.2, 0.0, 0.8])
    expected = -(0.2 * np.log(p[0]) + 0.8 * np.log(p[2]))
    np.testing.assert_allclose(losses.softmax_cross_entropy(z, soft), expected, rtol=1e-14)
    np.testing.assert_allclose(jax.grad(losses.softmax_cross_entropy)(z, soft), p - soft, atol=1e-15)
    huge = jnp.array([1e9, 0.0, -1e9])
    np.testing.assert_array_equal(jax.grad(losses.softmax_cross_entropy)(huge, 1), [1, -1, 0])
    assert losses.softmax_cross_entropy(huge, jnp.array([1.0, 0.0, 0.0])) == 0


def test_a_class_number_that_is_a_float_is_refused():
    """It would pass for a distribution, and give another loss."""
    with pytest.raises(TypeError, match="a class number must be an integer, got float"):
        losses.softmax_cross_entropy(jnp.zeros(3), 2.0)


def test_mean_loss_is_the_mean_over_examples_F1():
    rng = np.random.default_rng(1)
    X, y, w, b = rng.normal(size=(9, 3)), rng.normal(size=9), rng.normal(size=3), rng.normal()
    params, batch = Linear(jnp.asarray(w), jnp.asarray(b)), Batch(jnp.asarray(X), jnp.asarray(y))
    expected = np.mean((y - X @ w - b) ** 2)
    loss = losses.mean_loss(models.linear, losses.squared)
    np.testing.assert_allclose(loss(params, batch), expected, rtol=1e-14)
    penalised = losses.mean_loss(models.linear, losses.squared, l2=0.3)
    np.testing.assert_allclose(penalised(params, batch), expected + 0.15 * np.sum(w**2), rtol=1e-14)


def test_l2_spares_biases_and_nothing_else():
    ones = lambda *shape: jnp.ones(shape)
    zero_model = lambda params, x: jnp.zeros(())
    loss = losses.mean_loss(zero_model, losses.squared, l2=2.0)
    batch = Batch(ones(4, 3), jnp.zeros(4))
    assert loss((Layer(ones(3, 5), ones(5)), Layer(ones(5, 2), ones(2))), batch) == 15 + 10
    assert loss({"W1": ones(3, 2), "b1": ones(2), "beta": ones(4)}, batch) == 6 + 4
    assert loss(ones(3), batch) == 3


@pytest.mark.parametrize("l2", [-1.0, float("nan"), float("inf")])
def test_l2_must_be_a_finite_number(l2):
    with pytest.raises(ValueError, match="l2 must be a finite number >= 0"):
        losses.mean_loss(models.linear, losses.squared, l2=l2)


# --- labels ----------------------------------------------------------------------------------------------------

KINDS = [
    bool,
    *(getattr(np, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)),
    np.float16,
    np.float32,
    np.float64,
    jnp.bfloat16,
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_labels_0_and_1_cost_the_same_in_every_dtype(kind, knows_float16):
    """1 − 2y of an unsigned 1 wraps around: uint8 gave 254 in place of −1."""
    if kind == np.float16 and not knows_float16:
        pytest.skip("XLA computes no float16 on this processor")
    h, y = jnp.linspace(-3.0, 3.0, 8), np.arange(8) % 2
    with jax.numpy_dtype_promotion("standard"):
        got = [
            jax.value_and_grad(losses.logloss)(logit, jnp.asarray(label))
            for logit, label in zip(h, y.astype(kind), strict=True)
        ]
    right = [jax.value_and_grad(losses.logloss)(logit, label) for logit, label in zip(h, y * 1.0, strict=True)]
    np.testing.assert_allclose(got, right, rtol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if np.dtype(kind).kind in "iu"], ids=str)
def test_class_numbers_cost_the_same_in_every_dtype(kind):
    z = jnp.array([1.0, -2.0, 0.5])
    for label in range(3):
        got = losses.softmax_cross_entropy(z, jnp.asarray(label, kind))
        np.testing.assert_allclose(got, losses.softmax_cross_entropy(z, label), rtol=1e-14)


@pytest.mark.parametrize("k", [128, 256, 300])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if np.dtype(kind).kind in "iu"], ids=str)
def test_as_many_classes_as_a_narrow_dtype_holds_and_more(kind, k):
    z, most = jnp.linspace(-1.0, 1.0, k), min(k - 1, int(np.iinfo(kind).max))
    for label in (0, 44, most):
        got = losses.softmax_cross_entropy(z, jnp.asarray(label, kind))
        np.testing.assert_allclose(got, losses.softmax_cross_entropy(z, label), rtol=1e-14)
    if k == 300 or np.dtype(kind).itemsize == 1:
        loss = losses.mean_loss(models.linear, losses.softmax_cross_entropy)
        assert run(loss, models.init_linear(3, k), np.array([0, 44, most], kind)).status == "finished"


@pytest.mark.parametrize("label", [-1.0, -1, 2, 0.5, 255, 1e9, -0.1])
def test_other_labels_than_0_and_1_make_loss_and_gradient_nan(label):
    for function in (jax.value_and_grad(losses.logloss), jax.jit(jax.value_and_grad(losses.logloss))):
        assert np.isnan(function(jnp.asarray(0.3), jnp.asarray(label))).all()


@pytest.mark.parametrize("label", [-1, -3, 3, 4, 10**6])
def test_other_class_numbers_make_loss_and_gradient_nan(label):
    for function in (jax.value_and_grad(losses.softmax_cross_entropy),) * 2:
        value, gradient = jax.jit(function)(jnp.array([1.0, -2.0, 0.5]), label)
        assert np.isnan(value)
        assert np.isnan(gradient).all()


def test_logloss_of_arrays_is_taken_entry_by_entry():
    h, y = jnp.linspace(-3.0, 3.0, 7), np.arange(7) % 2
    np.testing.assert_array_equal(losses.logloss(h, y), [losses.logloss(h[i], int(y[i])) for i in range(7)])


def test_a_one_hot_label_of_integers_is_a_distribution_not_three_class_numbers():
    z = jnp.array([1.0, -2.0, 0.5])
    for kind in (np.int32, np.uint8, bool, np.float32):
        with jax.numpy_dtype_promotion("standard"):
            got = losses.softmax_cross_entropy(z, jnp.asarray([0, 0, 1], kind))
        np.testing.assert_allclose(got, losses.softmax_cross_entropy(z, 2), rtol=1e-14)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: losses.softmax_cross_entropy(jnp.zeros(3), jnp.zeros(4)), "distribution over the 3 classes"),
        (lambda: losses.softmax_cross_entropy(jnp.zeros((2, 3)), jnp.array([0, 1])), r"logits.*axis"),
        (lambda: losses.squared(jnp.zeros(3), jnp.zeros(())), "its target has shape"),
        (lambda: losses.absolute(jnp.zeros(3), jnp.zeros(2)), "its target has shape"),
        (lambda: losses.half_squared(jnp.zeros(()), jnp.zeros(2)), "its target has shape"),
    ],
)
def test_shapes_that_would_be_spread_over_each_other_are_refused(call, words):
    with pytest.raises((ValueError, TypeCheckError), match=words + "|Type-check error"):
        call()


def test_an_output_of_one_entry_and_a_target_of_none_are_the_same_number():
    assert losses.squared(jnp.array([3.0]), jnp.asarray(1.0)) == 4
    assert losses.absolute(jnp.asarray(3.0), jnp.asarray([1.0])) == 2


# --- means -----------------------------------------------------------------------------------------------------


class Weighted(NamedTuple):
    x: Any
    y: Any
    weight: Any


@pytest.fixture
def weighted():
    r = np.random.default_rng(2)
    return Weighted(*map(jnp.asarray, (r.normal(size=(30, 3)), np.arange(30) % 2.0, r.uniform(0.1, 5, 30))))


def test_the_mean_of_any_loss_of_one_example(weighted):
    loss = losses.mean_of(lambda w, row: row.weight * (row.x @ w - row.y) ** 2, l2=0.2)
    w = jnp.array([1.0, -1.0, 0.5])
    expected = np.mean(weighted.weight * (weighted.x @ w - weighted.y) ** 2) + 0.1 * np.sum(w**2)
    np.testing.assert_allclose(loss(w, weighted), expected, rtol=1e-14)


def test_weights_of_examples_and_of_classes_follow_the_law_that_is_stated(weighted):
    """`(1/n) Σ ωᵢ ℓᵢ`: divided by n, not by the weights."""
    params, of_class = Linear(jnp.array([1.0, -1.0, 0.5]), jnp.asarray(0.1)), np.array([1.0, 20.0])
    each = np.array([losses.logloss(models.linear(params, x), y) for x, y in zip(weighted.x, weighted.y, strict=True)])
    by_row = losses.mean_loss(models.linear, losses.logloss, weights=lambda row: row.weight)
    by_class = losses.mean_loss(models.linear, losses.logloss, weights=of_class)
    np.testing.assert_allclose(by_row(params, weighted), np.mean(weighted.weight * each), rtol=1e-13)
    np.testing.assert_allclose(by_class(params, weighted), np.mean(of_class[np.arange(30) % 2] * each), rtol=1e-13)
    for kind in (np.uint8, np.int64, bool):
        with jax.numpy_dtype_promotion("standard"):
            got = by_class(params, weighted._replace(y=weighted.y.astype(kind)))
        np.testing.assert_allclose(got, by_class(params, weighted), rtol=1e-6)
    assert np.isnan(by_class(params, weighted._replace(y=weighted.y + 1)))


@pytest.mark.parametrize("weights", [[1.0, -1.0], [], [[1.0, 2.0]], [float("nan"), 1.0], "balanced", 3.0])
def test_class_weights_that_cannot_be_are_refused(weights):
    with pytest.raises(ValueError, match="weights must be a function of one example, or one finite number"):
        losses.mean_loss(models.linear, losses.logloss, weights=weights)


def test_a_loss_of_one_example_that_is_several_numbers_is_refused():
    loss = losses.mean_of(lambda w, row: (row.x * w - row.y) ** 2)
    with pytest.raises(ValueError, match="the loss of one example must be one number"):
        loss(jnp.ones(3), Batch(jnp.ones((4, 3)), jnp.ones(4)))


def run(loss, start, y, **how):
    rows = Batch(np.random.default_rng(0).normal(size=(len(y), 3)).astype(np.float32), y)
    how = {"optimizer": 0.1, "sampling": distinct(2), "steps": 2, "key": jax.random.key(0)} | how
    with jax.numpy_dtype_promotion("standard"):
        return descend(loss, start, rows, **how)


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.float32, np.float64])
def test_labels_that_logloss_has_no_meaning_for_are_refused_before_the_first_step(kind):
    loss = losses.mean_loss(models.linear, losses.logloss)
    labels = np.array([1, 0, 1, -1, 1, -1], kind)
    with pytest.raises(ValueError, match=r"takes the labels 0 and 1: row 3 .* has label -1\. .*\(y \+ 1\) / 2"):
        run(loss, models.init_linear(3), labels)
    assert run(loss, models.init_linear(3), abs(labels)).status == "finished"


@pytest.mark.parametrize("kind", [np.uint8, np.int32])
def test_labels_that_count_from_1_are_refused_before_the_first_step(kind):
    loss = losses.mean_loss(models.linear, losses.softmax_cross_entropy)
    with pytest.raises(ValueError, match=r"labels count from 0 to 4: row 4 .* has label 5\. Subtract 1"):
        run(loss, models.init_linear(3, 5), np.array([1, 2, 3, 4, 5, 1], kind))
    assert run(loss, models.init_linear(3, 6), np.array([1, 2, 3, 4, 5, 1], kind)).status == "finished"


def test_labels_that_a_loss_of_their_own_meets_make_a_run_that_says_so():
    loss = lambda p, b: jnp.mean(jax.vmap(lambda x, y: losses.logloss(models.linear(p, x), y))(b.x, b.y))
    trace = run(loss, models.init_linear(3), np.array([1.0, 0, 1, -1, 1, 0]), sampling=full_batch())
    assert trace.status == "not finite at the start: the loss is nan; the first such example is row 3 (from 0)"


@pytest.mark.parametrize("size", [1, 3, 120])
def test_as_many_class_weights_as_rows_or_too_few_are_not_taken_for_those_of_classes(size):
    words = rf"weights has {size} entries for \d classes: .* weights=lambda row: row\.weight"
    with pytest.raises(ValueError, match=words):
        losses.mean_loss(models.linear, losses.logloss, weights=np.ones(size))
    loss = losses.mean_loss(models.linear, losses.softmax_cross_entropy, weights=np.ones(size))
    with pytest.raises(ValueError, match=words):
        run(loss, models.init_linear(3, 5), np.array([0, 1, 2]))


@pytest.mark.parametrize("y", [np.array([1.0, 2.0, 3.0]), np.eye(3), np.array([0.5, 1.0, 0.0])])
def test_class_weights_of_what_is_no_class_number_are_refused(y):
    own = lambda prediction, y: jnp.sum((prediction - y) ** 2)
    with pytest.raises(ValueError, match="weights by class need labels from 0 to 2, but"):
        run(losses.mean_loss(models.linear, own, weights=[1.0, 2.0, 3.0]), models.init_linear(3), y)
