"""Losses of one prediction against one target (F7), and the mean over examples that makes a loss of them (F1).

The classification losses take **logits**, never probabilities: with `p = s(h)` rounded to 0 or 1 the textbook
form is infinite and its gradient NaN (F16). The forms below are finite, with a finite and right gradient, at
every logit up to ±1e9, and at logit 0 too, where JAX differentiates `|h|` and `max(h, 0)` one-sidedly and the
usual "stable" form `max(h, 0) − yh + log(1 + e^−|h|)` therefore has a wrong gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxgrad.checks import Labels, NotNegative, checked
from jaxgrad.types import Params

ExampleLoss = Callable[[Any, Any], Float[Array, ""]]


@checked
def squared(prediction: Float[Array, "*k"], y: Labels) -> Float[Array, ""]:
    """`Σ (y − ŷ)²` over the outputs of one example: MSE once averaged (F4, F7).

    Raises ValueError unless `y` has as many entries as the prediction: one target for several outputs would be spread
    over all of them.
    """
    return jnp.sum(_residual(prediction, y) ** 2)


@checked
def half_squared(prediction: Float[Array, "*k"], y: Labels) -> Float[Array, ""]:
    """`½ Σ (y − ŷ)²` over the outputs of one example (F9); ValueError as in `squared`."""
    return 0.5 * squared(prediction, y)


@checked
def absolute(prediction: Float[Array, "*k"], y: Labels) -> Float[Array, ""]:
    """`Σ |y − ŷ|` over the outputs of one example: MAE once averaged (F7); ValueError as in `squared`.

    Not differentiable where `ŷ = y`; there the gradient is the subgradient 0.
    """
    residual = _residual(prediction, y)
    # JAX takes d|r|/dr = 1 at r = 0; r·sign(r) with sign held constant gives the subgradient 0 there.
    return jnp.sum(residual * jax.lax.stop_gradient(jnp.sign(residual)))


def _residual(prediction: Any, y: Any) -> Any:
    if np.shape(prediction) == np.shape(y):
        return y - prediction
    if np.size(prediction) != 1 or np.size(y) != 1:
        raise ValueError(
            f"the model predicts an array of shape {np.shape(prediction)} for one example, but its target has shape "
            f"{np.shape(y)}: they must be alike, or the target would be spread over the outputs"
        )
    return jnp.reshape(y, np.shape(prediction)) - prediction


@checked
def logloss(logit: Float[Array, "*n"], y: Labels) -> Float[Array, "*n"]:
    """`−[y log s(h) + (1−y) log(1−s(h))]` from the logit `h`, for a label `y` in {0, 1} (F15, F16).

    For those labels it equals `softplus((1−2y) h)`: one term, no cancellation, full relative accuracy at any
    `h`. The gradient `dL/dh = s(h) − y` is finite everywhere. The label may be of any real dtype or a bool. A label
    other than 0 and 1 makes loss and gradient NaN. Arrays are taken entry by entry.
    """
    y = jnp.asarray(y)
    if not jnp.issubdtype(y.dtype, jnp.floating):  # 1 − 2y of an unsigned integer wraps around
        y = y.astype(jnp.result_type(logit))
    sign = 1 - 2 * y
    return _softplus(jnp.where(jnp.abs(sign) == 1, sign, jnp.nan) * logit)


@jax.custom_jvp
def _softplus(z: Any) -> Any:
    return jax.nn.softplus(z)


@_softplus.defjvp
def _softplus_jvp(primals: Any, tangents: Any) -> Any:
    # JAX's own derivative, exp(z − softplus(z)), is the same number at three times the cost: it needs the value.
    (z,), (dz,) = primals, tangents
    return _softplus(z), dz * jax.nn.sigmoid(z)


@checked
def softmax_cross_entropy(logits: Float[Array, " k"], label: Labels) -> Float[Array, ""]:
    """`−log softmax(z)[label]` from the logits `z[k]`, for a class number from 0 to k−1 or a distribution `label[k]`.

    A class number outside 0 to k−1 makes loss and gradient NaN. A distribution may be of any real dtype.

    Raises TypeError for a class number that is a float: it would pass for a distribution. Raises ValueError for logits
    that are not one-dimensional, and for a distribution of another length.
    """
    if np.ndim(logits) != 1:
        raise ValueError(
            f"softmax_cross_entropy takes the logits z[k] of one example, got shape {np.shape(logits)}: let the model "
            "return one logit for each class"
        )
    k = logits.shape[0]
    log_p = jax.nn.log_softmax(logits)
    label = jnp.asarray(label)
    if label.ndim == 0 and not jnp.issubdtype(label.dtype, jnp.integer):
        raise TypeError(f"a class number must be an integer, got {label.dtype}: convert it, e.g. y.astype(jnp.int32)")
    if label.ndim == 0:
        label = _wide(label)
        # The factor, not a choice between the two, so that the gradient is NaN, too.
        return -log_p[label] * jnp.where((label >= 0) & (label < k), jnp.ones((), log_p.dtype), jnp.nan)
    if label.shape != logits.shape:
        raise ValueError(
            f"the label must be a class number or a distribution over the {k} classes, got shape {label.shape}"
        )
    # An infinitely unlikely class of weight 0 costs 0, not 0·∞.
    return -jnp.sum(jnp.where(label == 0, 0, label.astype(log_p.dtype) * log_p))


@dataclass(frozen=True, eq=False)
class MeanLoss:
    """`L(w) = (1/n) Σᵢ ℓ(w, example i) + (l2/2) Σ‖W‖²`, a loss that is a mean and says so (`jaxgrad.means`).

    Made by `mean_loss` and `mean_of`; called as `loss(params, batch)`.
    """

    example: Callable[[Params, Any], Any]
    """`ℓ(params, example)`, one number; the example has the batch's pytree without the axis of examples."""
    l2: float = 0.0
    model: Callable[[Params, Any], Any] | None = None
    """Of `mean_loss`: what predicts, for the number of classes."""
    example_loss: ExampleLoss | None = None
    """Of `mean_loss`: what takes the label."""
    classes: int | None = None
    """Of `mean_loss` with a weight for each class: how many there are."""

    def __call__(self, params: Params, batch: Any) -> Float[Array, ""]:
        losses = jax.vmap(partial(self.example, params))(batch)
        if losses.size != losses.shape[0]:
            raise ValueError(
                f"the loss of one example must be one number, got an array of shape {losses.shape[1:]}: take the sum "
                "or the mean over the outputs"
            )
        data_term = jnp.mean(losses)
        unpenalised = not isinstance(self.l2, Tracer) and self.l2 == 0
        return data_term if unpenalised else data_term + 0.5 * self.l2 * _weights_squared(params)


@checked
def mean_of(example: Callable[[Params, Any], Any], l2: NotNegative = 0.0) -> MeanLoss:
    """The mean over the examples of any loss of one of them: `L(w) = (1/n) Σᵢ example(w, exampleᵢ) + (l2/2) Σ‖W‖²`.

        loss = mean_of(lambda params, row: row.weight * (row.x @ params.w - row.y) ** 2)

    `example(params, row) -> number` sees one row of the batch, whatever its pytree. So the loss is a mean by the way it
    is made, and `descend` may evaluate it in blocks, on disk and on many devices, and `noise` example by example. For
    the penalty see `mean_loss`.

    Raises ValueError if `l2` is negative or not finite; when it is called, if the loss of a row is not one number.
    """
    return MeanLoss(example, l2)


@checked
def mean_loss(
    model: Callable[[Params, Any], Any],
    example_loss: ExampleLoss,
    l2: NotNegative = 0.0,
    *,
    weights: Callable[[Any], Any] | Any = None,
) -> MeanLoss:
    """The objective F1: `L(w) = (1/n) Σᵢ ωᵢ example_loss(model(w, xᵢ), yᵢ) + (l2/2) Σ‖W‖²`, with weights ωᵢ = 1.

    `model(params, x) -> prediction` sees one example. The penalty covers every parameter but those whose
    name is `b` or starts with `b` and a digit (`b1`, `b2`): biases are not penalised.

    Args:
      weights: `weights(example) -> ωᵢ`, a function of one example of the batch (`lambda example: example.weight` for a
        batch with a field `weight`); or an array `ω[k]` of a weight for each class, for labels `yᵢ` from 0 to k−1.

    The sum is divided by n, not by `Σ ωᵢ`: only so is the minibatch gradient unbiased and the loss a mean over
    examples. For a weighted average over a data set, divide the weights by their mean beforehand. A loss that divides
    by the weights of its own batch is another one; write it as a function, and `descend` evaluates it whole.

    Raises ValueError if `l2` is negative or not finite, and for class weights that are not a one-dimensional array of
    finite numbers >= 0.
    """
    if weights is None:
        example = lambda params, row: example_loss(model(params, row.x), row.y)
        return replace(mean_of(example, l2), model=model, example_loss=example_loss)
    weight = weights if callable(weights) else _of_class(weights)
    classes = None if callable(weights) else len(weights)
    if example_loss is logloss:
        _check_weights(classes, 2)

    def weighted(params: Params, row: Any) -> Any:
        prediction = model(params, row.x)
        if example_loss is softmax_cross_entropy:
            _check_weights(classes, jnp.shape(prediction)[-1])
        unweighted = example_loss(prediction, row.y)
        return jnp.asarray(weight(row), unweighted.dtype) * unweighted

    return replace(mean_of(weighted, l2), model=model, example_loss=example_loss, classes=classes)


def _check_weights(given: int | None, classes: int) -> None:
    if given is not None and given != classes:
        raise ValueError(
            f"weights has {given:,} entries for {classes:,} classes: give one for each class, or, for a weight of each "
            "row, a function of it such as weights=lambda row: row.weight"
        )


def _of_class(weights: Any) -> Callable[[Any], Any]:
    """The weight of an example by the number of its class; NaN for a number that is none."""
    table = np.asarray(weights, float) if np.ndim(weights) == 1 else np.array([np.nan])
    if not (np.isfinite(table) & (table >= 0)).all() or table.size == 0:
        raise ValueError(
            "weights must be a function of one example, or one finite number >= 0 for each class, in the order of "
            f"their numbers; got {weights!r}"
        )

    def weight(example: Any) -> Any:
        number = jnp.asarray(example.y)
        number = number if jnp.issubdtype(number.dtype, jnp.floating) else number.astype(jnp.int32)
        # By comparison, so that what is no number of a class has no weight, and a missing one is seen.
        of_each = jnp.where(number == jnp.arange(table.size, dtype=number.dtype), jnp.asarray(table), 0.0)
        known = jnp.any(number == jnp.arange(table.size, dtype=number.dtype))
        return jnp.where(known, jnp.sum(of_each), jnp.nan)

    return weight


def check_labels(loss: Any, params: Params, data: Any, number: Callable[[int], int] = int) -> None:
    """Raise ValueError, naming the row, for labels that `logloss` or `softmax_cross_entropy` has no meaning for.

    `loss` is one made by `mean_loss` with one of these; nothing is known of the labels of others. `number(place)` is
    the number of the row at a place along the leaves of `data`.
    """
    if not isinstance(loss, MeanLoss) or loss.model is None or not hasattr(data, "y"):
        return
    y = data.y
    if loss.classes is not None:
        row, value = _first_bad(y, low=0, high=loss.classes - 1)
        if row is not None or np.ndim(y) != 1:
            found = "the targets are no class numbers" if row is None else f"row {number(row):,} has label {value:g}"
            raise ValueError(
                f"weights by class need labels from 0 to {loss.classes - 1}, but {found} (rows counted from 0); for a "
                "weight of each row, give a function of it such as weights=lambda row: row.weight"
            )
    if loss.example_loss is logloss:
        row, value = _first_bad(y, low=0, high=1)
        if row is not None:
            raise ValueError(
                f"logloss takes the labels 0 and 1: row {number(row):,} (counted from 0) has label {value:g}. Number "
                "the two classes 0 and 1, e.g. (y + 1) / 2 for labels -1 and +1"
            )
    elif loss.example_loss is softmax_cross_entropy and jnp.issubdtype(y.dtype, jnp.integer) and np.ndim(y) == 1:
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), data.x)
        k = jax.eval_shape(loss.model, params, one).shape[-1]
        row, value = _first_bad(y, low=0, high=k - 1)
        if row is not None:
            raise ValueError(
                f"the model has {k} outputs, so labels count from 0 to {k - 1}: row {number(row):,} (counted from 0) "
                f"has label {value:g}. Subtract 1 from labels that count from 1, or give the model an output for each "
                "class"
            )


def _first_bad(y: Any, low: int, high: int) -> tuple[int | None, float]:
    """The first row with a label that is no whole number from `low` to `high`, and that label."""
    y = _wide(jnp.asarray(y))
    bad = ~((y >= low) & (y <= high) & (y == jnp.round(y))) if y.dtype != bool else jnp.zeros_like(y)
    bad = bad.reshape(bad.shape[0], -1).any(axis=1)
    if not bool(bad.any()):
        return None, 0.0
    row = int(jnp.argmax(bad))
    of_row = np.asarray(y[row], float).reshape(-1)
    return row, float(next(v for v in of_row if not (low <= v <= high and v == round(v))))


def _wide(labels: Any) -> Any:
    """Labels in a dtype that holds the number of classes, which a narrow one may not: 256 is 0 in uint8."""
    narrow = jnp.issubdtype(labels.dtype, jnp.integer) and labels.dtype.itemsize < 4
    return labels.astype(jnp.int32) if narrow else labels


def _weights_squared(params: Params) -> Any:
    """`Σ W²` over the leaves that are not biases."""

    def is_bias(path: tuple[Any, ...]) -> bool:
        name = str(getattr(path[-1], "name", getattr(path[-1], "key", ""))) if path else ""
        return name[:1] == "b" and (name[1:] == "" or name[1:].isdigit())

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum((jnp.sum(leaf**2) for path, leaf in leaves if not is_bias(path)), start=0.0)
