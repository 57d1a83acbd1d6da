"""Losses of one prediction against one target (F7), and the mean over examples that makes a loss of them (F1).

The classification losses take **logits**, never probabilities: with `p = s(h)` rounded to 0 or 1 the textbook
form is infinite and its gradient NaN (F16). The forms below are finite, with a finite and right gradient, at
every logit up to ±1e9, and at logit 0 too, where JAX differentiates `|h|` and `max(h, 0)` one-sidedly and the
usual "stable" form `max(h, 0) − yh + log(1 + e^−|h|)` therefore has a wrong gradient.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgrad.checks import NotNegative, checked
from jaxgrad.types import Batch, Loss, Params

ExampleLoss = Callable[[Any, Any], Float[Array, ""]]


@checked
def squared(prediction: Float[Array, "*k"], y: Float[Array, "*k"]) -> Float[Array, ""]:
    """`Σ (y − ŷ)²` over the outputs of one example: MSE once averaged (F4, F7)."""
    return jnp.sum((y - prediction) ** 2)


@checked
def half_squared(prediction: Float[Array, "*k"], y: Float[Array, "*k"]) -> Float[Array, ""]:
    """`½ Σ (y − ŷ)²` over the outputs of one example (F9)."""
    return 0.5 * squared(prediction, y)


@checked
def absolute(prediction: Float[Array, "*k"], y: Float[Array, "*k"]) -> Float[Array, ""]:
    """`Σ |y − ŷ|` over the outputs of one example: MAE once averaged (F7).

    Not differentiable where `ŷ = y`; there the gradient is the subgradient 0.
    """
    residual = y - prediction
    # JAX takes d|r|/dr = 1 at r = 0; r·sign(r) with sign held constant gives the subgradient 0 there.
    return jnp.sum(residual * jax.lax.stop_gradient(jnp.sign(residual)))


@checked
def logloss(logit: Float[Array, ""], y: Float[Array, ""]) -> Float[Array, ""]:
    """`−[y log s(h) + (1−y) log(1−s(h))]` from the logit `h`, for a label `y` in {0, 1} (F15, F16).

    For those labels it equals `softplus((1−2y) h)`: one term, no cancellation, full relative accuracy at any
    `h`. The gradient `dL/dh = s(h) − y` is finite everywhere. Labels other than 0 and 1 give another loss.
    """
    return _softplus((1 - 2 * y) * logit)


@jax.custom_jvp
def _softplus(z: Any) -> Any:
    return jax.nn.softplus(z)


@_softplus.defjvp
def _softplus_jvp(primals: Any, tangents: Any) -> Any:
    # JAX's own derivative, exp(z − softplus(z)), is the same number at three times the cost: it needs the value.
    (z,), (dz,) = primals, tangents
    return _softplus(z), dz * jax.nn.sigmoid(z)


@checked
def softmax_cross_entropy(logits: Float[Array, " k"], label: Any) -> Float[Array, ""]:
    """`−log softmax(z)[label]` from the logits `z[k]`, for an integer label or a distribution `label[k]`.

    Raises TypeError for a class number that is a float: it would pass for a distribution.
    """
    log_p = jax.nn.log_softmax(logits)
    label = jnp.asarray(label)
    if label.ndim == 0 and not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(f"a class number must be an integer, got {label.dtype}: convert it, e.g. y.astype(jnp.int32)")
    if jnp.issubdtype(label.dtype, jnp.integer):
        return -log_p[label]
    # An infinitely unlikely class of weight 0 costs 0, not 0·∞.
    return -jnp.sum(jnp.where(label == 0, 0, label * log_p))


@checked
def mean_loss(model: Callable[[Params, Any], Any], example_loss: ExampleLoss, l2: NotNegative = 0.0) -> Loss:
    """The objective F1: `L(w) = (1/n) Σᵢ example_loss(model(w, xᵢ), yᵢ) + (l2/2) Σ‖W‖²`.

    `model(params, x) -> prediction` sees one example. The penalty covers every parameter but those whose
    name is `b` or starts with `b` and a digit (`b1`, `b2`): biases are not penalised.

    Raises ValueError if `l2` is negative or not finite.
    """

    def loss(params: Params, batch: Batch) -> Float[Array, ""]:
        losses = jax.vmap(lambda x, y: example_loss(model(params, x), y))(batch.x, batch.y)
        data_term = jnp.mean(losses)
        return data_term if l2 == 0 else data_term + 0.5 * l2 * _weights_squared(params)

    return loss


def _weights_squared(params: Params) -> Any:
    """`Σ W²` over the leaves that are not biases."""

    def is_bias(path: tuple[Any, ...]) -> bool:
        name = str(getattr(path[-1], "name", getattr(path[-1], "key", ""))) if path else ""
        return name[:1] == "b" and (name[1:] == "" or name[1:].isdigit())

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum((jnp.sum(leaf**2) for path, leaf in leaves if not is_bias(path)), start=0.0)
