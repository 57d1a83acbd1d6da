"""The two-layer net with mistakes: four gradients and a backward pass, each wrong in its own way.

    python -m jaxgrad.check experiments/derivations/two_layer_net_with_mistakes.py
    python -m jaxgrad.check experiments/derivations/two_layer_net_with_mistakes.py --only slide

`gradient_slide` is F12 and F13 as the lecture prints them, with only the order of the factors changed to what
their shapes allow: they are derivatives of the sum over the examples, this loss is the mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name


def loss(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    Z = checkpoint_name(X @ W1, "Z")
    A = checkpoint_name(jax.nn.sigmoid(Z), "A")
    Y_hat = checkpoint_name(A @ W2, "Y_hat")
    return jnp.mean(0.5 * jnp.sum((Y - Y_hat) ** 2, axis=1))


def gradient_slide(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    A = jax.nn.sigmoid(X @ W1)
    error = -(Y - A @ W2)
    return {"W1": X.T @ ((error @ W2.T) * A * (1 - A)), "W2": A.T @ error}


def gradient_activation(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    A = jax.nn.sigmoid(X @ W1)
    dY_hat = (A @ W2 - Y) / len(X)
    dZ = dY_hat @ W2.T
    return {"W1": X.T @ dZ, "W2": A.T @ dY_hat}


def gradient_value(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    Z = X @ W1
    A = jax.nn.sigmoid(Z)
    dY_hat = (A @ W2 - Y) / len(X)
    dZ = (dY_hat @ W2.T) * A * (1 - A)
    return {"W1": X.T @ dZ, "W2": Z.T @ dY_hat}


def gradient_two(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    A = jax.nn.sigmoid(X @ W1)
    dY_hat = A @ W2 - Y
    dZ = (dY_hat @ W2.T) * (1 - A**2)
    return {"W1": X.T @ dZ, "W2": A.T @ dY_hat}


def backprop(params, batch):
    X, Y = batch
    W1, W2 = params["W1"], params["W2"]
    A = jax.nn.sigmoid(X @ W1)
    dY_hat = (A @ W2 - Y) / len(X)
    dA = dY_hat @ W2.T
    dZ = -dA * A * (1 - A)
    return {"W1": X.T @ dZ, "W2": A.T @ dY_hat}, {"Y_hat": dY_hat, "A": dA, "Z": dZ}


rng = np.random.default_rng(3)
X = rng.normal(size=(30, 4))
Y = np.sin(X[:, :2]) + 0.1 * rng.normal(size=(30, 2))
params = {"W1": rng.normal(size=(4, 5)), "W2": rng.normal(size=(5, 2))}
batch = (X, Y)
