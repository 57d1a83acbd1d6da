"""The lecture's two-layer net (F10): the shape-correct forms of F12 and F13, averaged over the examples: right.

python -m jaxgrad.check experiments/derivations/two_layer_net.py
"""

import jax
import jax.numpy as jnp
import numpy as np


def loss(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    Z = X @ W1
    A = jax.nn.sigmoid(Z)
    Y_hat = A @ W2
    return jnp.mean(0.5 * jnp.sum((Y - Y_hat) ** 2, axis=1))


def gradient(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    n = len(X)
    A = jax.nn.sigmoid(X @ W1)
    dY_hat = (A @ W2 - Y) / n
    dW2 = A.T @ dY_hat
    dZ = (dY_hat @ W2.T) * A * (1 - A)
    dW1 = X.T @ dZ
    return {"W1": dW1, "W2": dW2}


rng = np.random.default_rng(3)
X = rng.normal(size=(30, 4))
Y = np.sin(X[:, :2]) + 0.1 * rng.normal(size=(30, 2))
params = {"W1": rng.normal(size=(4, 5)), "W2": rng.normal(size=(5, 2))}
batch = (X, Y)
