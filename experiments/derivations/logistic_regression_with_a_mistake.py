"""Logistic regression with a planted mistake: can you see it before the checker tells you?

python -m jaxgrad.check experiments/derivations/logistic_regression_with_a_mistake.py
"""

import jax
import jax.numpy as jnp
import numpy as np


def loss(params, batch):
    X, y = batch
    w, b = params["w"], params["b"]
    h = X @ w + b
    p = jax.nn.sigmoid(h)
    return -jnp.mean(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))


def gradient(params, batch):
    X, y = batch
    w, b = params["w"], params["b"]
    h = X @ w + b
    p = jax.nn.sigmoid(h)
    dp = -(y / p - (1 - y) / (1 - p)) / len(y)
    s = jax.nn.sigmoid(p)
    dh = dp * s * (1 - s)
    return {"w": X.T @ dh, "b": jnp.sum(dh)}


rng = np.random.default_rng(7)
X = rng.normal(size=(40, 2))
y = (X @ np.array([2.0, -1.0]) + rng.logistic(size=40) > 0).astype(float)
params = {"w": np.array([0.5, -0.5]), "b": 0.1}
batch = (X, y)
