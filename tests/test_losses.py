"""Losses against plain numpy and mpmath-free closed forms, and their gradients where JAX goes wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import losses, models
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
    textbook = lambda h, y: jnp.maximum(h, 0) - y * h + jnp.log1p(jnp.exp(-jnp.abs(h)))  # noqa: E731
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
    ones = lambda *shape: jnp.ones(shape)  # noqa: E731
    zero_model = lambda params, x: jnp.zeros(())  # noqa: E731
    loss = losses.mean_loss(zero_model, losses.squared, l2=2.0)
    batch = Batch(ones(4, 3), jnp.zeros(4))
    assert loss((Layer(ones(3, 5), ones(5)), Layer(ones(5, 2), ones(2))), batch) == 15 + 10
    assert loss({"W1": ones(3, 2), "b1": ones(2), "beta": ones(4)}, batch) == 6 + 4
    assert loss(ones(3), batch) == 3


@pytest.mark.parametrize("l2", [-1.0, float("nan"), float("inf")])
def test_l2_must_be_a_finite_number(l2):
    with pytest.raises(ValueError, match="l2 must be a finite number >= 0"):
        losses.mean_loss(models.linear, losses.squared, l2=l2)
