"""The lecture's logistic regression (F16), its gradient in the form that never divides by zero: right.

python -m jaxgrad.check experiments/derivations/logistic_regression.py
"""

import jax
import jax.numpy as jnp
import numpy as np


def loss(params, batch):
    X, y = batch
    w, b = params["w"], params["b"]
    h = X @ w + b
    return jnp.mean(jax.nn.softplus(h) - y * h)


def gradient(params, batch):
    X, y = batch
    w, b = params["w"], params["b"]
    h = X @ w + b
    p = jax.nn.sigmoid(h)
    # dL/dh = p - y, example by example; then h = w1 x1 + w2 x2 + b
    dh = (p - y) / len(y)
    return {"w": X.T @ dh, "b": jnp.sum(dh)}


rng = np.random.default_rng(7)
X = rng.normal(size=(40, 2))
y = (X @ np.array([2.0, -1.0]) + rng.logistic(size=40) > 0).astype(float)
params = {"w": np.array([0.5, -0.5]), "b": 0.1}
batch = (X, y)
