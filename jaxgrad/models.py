"""Models: pure functions of a parameter pytree that predict for **one** example; `jax.vmap` makes batches.

    linear      w·x + b                                  (F4; the logit of logistic regression, F16)
    two_layer   f(x W1 + b1) W2 + b2                     (F8, F10; the lecture has no biases)
    deep        x → f(x W + b) → … → h W + b             (F8: the lecture's dots, any depth)

A parameter whose bias is `None` has no bias: the field is an empty pytree and nothing is learned for it.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrad.checks import Count, Floats, OneKey, Widths, checked
from jaxgrad.types import Deep, Key, Layer, Linear, TwoLayer

Activation = Callable[[Any], Any]


@checked
def linear(params: Linear, x: Float[Array, " d"]) -> Float[Array, "*k"]:
    """`w·x + b`: a scalar for `w[d]`, a vector of k outputs for `w[d, k]`.

    The prediction of linear regression (F4) and the logit of logistic regression (F16).
    """
    return _affine(x, params.w, params.b)


@checked
def two_layer(params: TwoLayer, x: Float[Array, " d"], activation: Activation = jax.nn.sigmoid) -> Float[Array, " k"]:
    """`f(x W1 + b1) W2 + b2`, the two-layer net (F8, F10), for any activation `f`: `[d] -> [k]`."""
    hidden = activation(_affine(x, params.W1, params.b1))
    return _affine(hidden, params.W2, params.b2)


@checked
def deep(params: Deep, x: Float[Array, " d"], activation: Activation = jax.nn.sigmoid) -> Float[Array, " k"]:
    """A net of any depth (F8's dots): `f` after every layer but the last, `[d] -> [k]`."""
    for layer in params[:-1]:
        x = activation(_affine(x, layer.W, layer.b))
    return _affine(x, params[-1].W, params[-1].b)


def _affine(x: Any, W: Any, b: Any) -> Array:
    return x @ W if b is None else x @ W + b


@checked
def init_linear(d: Count, k: Count | None = None, *, bias: bool = True, dtype: Floats = jnp.float32) -> Linear:
    """Zeros: `w[d]` (or `w[d, k]`) and, unless `bias=False`, `b`. A convex problem needs no random start."""
    outputs = () if k is None else (k,)
    return Linear(jnp.zeros((d, *outputs), dtype), jnp.zeros(outputs, dtype) if bias else None)


@checked
def init_two_layer(
    key: OneKey, d: Count, h: Count, k: Count, *, bias: bool = True, dtype: Floats = jnp.float32
) -> TwoLayer:
    """`W ~ N(0, 1/d_in)` (LeCun's scaling: unit inputs give unit pre-activations), zero biases."""
    (W1, b1), (W2, b2) = init_deep(key, (d, h, k), bias=bias, dtype=dtype)
    return TwoLayer(W1, W2, b1, b2)


@checked
def init_deep(key: OneKey, sizes: Widths, *, bias: bool = True, dtype: Floats = jnp.float32) -> Deep:
    """Layers `sizes[0] -> sizes[1] -> …`, with `W ~ N(0, 1/d_in)` and zero biases.

    Raises ValueError for fewer than two sizes or a size below 1.
    """
    return _random_layers(key, sizes, bias, dtype)


# One program with one draw: compiling a draw takes longer than anything else a small net needs at its start.
@partial(jax.jit, static_argnums=(1, 2, 3))
def _random_layers(key: Key, sizes: tuple[int, ...], bias: bool, dtype: Any) -> Deep:
    shapes = list(pairwise(sizes))
    ends = list(accumulate(m * n for m, n in shapes))
    draws = jnp.split(jax.random.normal(key, (ends[-1],), dtype), ends[:-1])
    return tuple(
        Layer(draw.reshape(m, n) / jnp.sqrt(jnp.asarray(m, dtype)), jnp.zeros(n, dtype) if bias else None)
        for draw, (m, n) in zip(draws, shapes, strict=True)
    )
