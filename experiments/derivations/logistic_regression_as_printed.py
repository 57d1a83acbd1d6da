"""The lecture's logistic regression exactly as its slide prints it (F16): right on paper, NaN in a computer.

python -m jaxgrad.check experiments/derivations/logistic_regression_as_printed.py
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
    p = 1 / (1 + np.exp(-h))
    # dL/db = -[y/p - (1-y)/(1-p)] s(h)(1 - s(h)), and dL/dw1, dL/dw2 the same times x1, x2
    outer = -(y / p - (1 - y) / (1 - p))
    dh = outer * p * (1 - p)
    return {"w": X.T @ dh / len(y), "b": np.mean(dh)}


rng = np.random.default_rng(7)
X = rng.normal(size=(40, 2))
y = (X @ np.array([2.0, -1.0]) + rng.logistic(size=40) > 0).astype(float)
params = {"w": np.array([0.5, -0.5]), "b": 0.1}
batch = (X, y)
