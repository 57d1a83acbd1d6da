"""Models predict one example; vmapped they equal the lecture's matrix form, written out in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import models
from jaxgrad.types import Layer, Linear, TwoLayer


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_is_the_matrix_product(rng, bias):
    X, w, b = rng.normal(size=(7, 3)), rng.normal(size=3), rng.normal(size=()) if bias else None
    params = Linear(jnp.asarray(w), None if b is None else jnp.asarray(b))
    close(jax.vmap(models.linear, (None, 0))(params, X), X @ w + (b if bias else 0))


def test_linear_with_several_outputs(rng):
    X, W, b = rng.normal(size=(7, 3)), rng.normal(size=(3, 2)), rng.normal(size=2)
    close(jax.vmap(models.linear, (None, 0))(Linear(jnp.asarray(W), jnp.asarray(b)), X), X @ W + b)


ACTIVATIONS = {
    "sigmoid": (jax.nn.sigmoid, lambda z: 1 / (1 + np.exp(-z))),
    "tanh": (jnp.tanh, np.tanh),
    "relu": (jax.nn.relu, lambda z: np.maximum(z, 0)),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_two_layer_and_deep_are_the_forward_propagation_of_F8(rng, name, bias):
    f, f_numpy = ACTIVATIONS[name]
    X, W1, W2 = rng.normal(size=(7, 3)), rng.normal(size=(3, 5)), rng.normal(size=(5, 2))
    b1, b2 = (rng.normal(size=5), rng.normal(size=2)) if bias else (None, None)
    expected = f_numpy(X @ W1 + (0 if b1 is None else b1)) @ W2 + (0 if b2 is None else b2)
    as_jax = lambda a: None if a is None else jnp.asarray(a)
    two = TwoLayer(as_jax(W1), as_jax(W2), as_jax(b1), as_jax(b2))
    close(jax.vmap(lambda x: models.two_layer(two, x, f))(X), expected)
    layers = (Layer(two.W1, two.b1), Layer(two.W2, two.b2))
    close(jax.vmap(lambda x: models.deep(layers, x, f))(X), expected)


def test_deep_net_of_one_layer_is_linear(rng):
    X, W = rng.normal(size=(4, 3)), rng.normal(size=(3, 2))
    close(jax.vmap(lambda x: models.deep((Layer(jnp.asarray(W)),), x))(X), X @ W)


def test_init_keeps_the_scale_of_the_signal(key):
    params = models.init_deep(key, (400, 300, 10), dtype=jnp.float64)
    assert [layer.W.shape for layer in params] == [(400, 300), (300, 10)]
    for layer, d in zip(params, (400, 300), strict=True):
        assert abs(float(layer.W.std()) * d**0.5 - 1) < 0.05
        assert not layer.b.any()
    two = models.init_two_layer(key, 400, 300, 10, bias=False)
    assert two.b1 is None
    assert two.W1.dtype == jnp.float32
    assert models.init_linear(5).w.shape == (5,)
    assert models.init_linear(5, 3, bias=False).b is None


def test_init_rejects_a_net_without_layers(key):
    with pytest.raises(ValueError, match="at least an input and an output width"):
        models.init_deep(key, (5,))
