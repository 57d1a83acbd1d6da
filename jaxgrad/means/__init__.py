"""Whether a loss is a mean over the examples of its batch: known, or proved from its traced program, never guessed.

A loss is a mean if there is a function f of one example with

    loss(params, B) = (1/|B|) Σ_{i in B} f(params, example i)        for every batch B of the sizes in question

A term without examples, such as a penalty, may be added: it is part of f. Such a loss may be evaluated in blocks of
rows, in parts, example by example, or with filled-up rows of weight 0, and gives the same to rounding. Any other loss
(a weighted average, a ratio of sums, a batch statistic, a maximum, a comparison of pairs) may not.

`losses.mean_loss` and `losses.mean_of` make means, and say so. For another function `doubt` traces value and gradient
at each of the sizes and follows the examples through the programs, operation by operation. Every array is one of

    Same(k)     nᵏ times what depends on no example and not on n
    PerRow(k)   nᵏ times an array along whose one axis of examples entry i depends on example i alone, alike for all i
    Total(k)    nᵏ times the sum over that axis of such an array
    Mixed       anything else

The axis of examples is the one whose length changes from size to size, so a feature dimension that happens to equal n
is not taken for it; the 1/n of a mean is the constant that changes as 1/n does. The loss is a mean at these sizes if
its value and each leaf of its gradient come out as Total(−1) or Same(0). The gradient is followed for itself, since a
`jax.custom_vjp` may make it another function than the derivative.

An operation without a rule makes Mixed. So a mean may remain unproved, but what is proved is a mean, to the rounding of
the dtypes that the loss computes in. Whole numbers are held to be exact: a loss that sums int32 beyond 2³¹ is not seen.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.losses import MeanLoss
from jaxgrad.means.kinds import Mixed, PerRow, Same, Total, within
from jaxgrad.means.rules import Apart
from jaxgrad.means.walk import Walk
from jaxgrad.types import Loss, Params

HOW = (
    "Write the loss of one example and let losses.mean_of(example), or losses.mean_loss(model, example_loss), take the "
    "mean"
)


def of_one(loss: Loss, params: Params, data: Any, sizes: Sequence[int], why: str) -> Callable[[Params, Any], Any]:
    """`ℓ(params, example)`, the loss of one example of a mean over batches of `sizes` examples of `data`.

    It is the loss of a batch of that example alone; or twice, where the program for one row is not that for many, as of
    a net whose output is squeezed. Raises ValueError, which begins with `why`, if the loss is not known to be a mean.
    """
    copies = 1
    if found := doubt(loss, params, data, [1, *sizes]):
        copies, found = 2, doubt(loss, params, data, [2, *sizes])
    if found:
        raise ValueError(
            f"{why}, which needs a loss that is a mean over the examples; of this one it is not known: {found}. {HOW}"
        )

    def alone(params: Params, example: Any) -> Any:
        return loss(params, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (copies, *jnp.shape(leaf))), example))

    return alone


def doubt(loss: Loss, params: Params, data: Any, sizes: Sequence[int]) -> str:
    """Why `loss` is not known to be a mean over the examples of batches of all these sizes; empty if it is known.

    `params` and `data` are pytrees of arrays or of their shapes; the leaves of `data` share their leading axis, whose
    length does not matter here. Nothing is computed or compiled.
    """
    if isinstance(loss, MeanLoss):
        return ""
    sizes = sorted({size for size in sizes if size > 0}) or [1]
    if len(sizes) == 1:  # a second size shows which axis and which constants go with n
        sizes = [*sizes, 2 * sizes[0] + 1]
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), _dtype(leaf)), params)
    batches = [
        jax.tree.map(lambda leaf, n=n: jax.ShapeDtypeStruct((n, *np.shape(leaf)[1:]), _dtype(leaf)), data)
        for n in sizes
    ]
    try:
        # The value by itself, too: a `custom_vjp` may compute another one on the way to its gradient.
        programs = [
            [jax.make_jaxpr(function)(one, batch) for batch in batches] for function in (loss, jax.value_and_grad(loss))
        ]
    except Exception as error:
        return f"it cannot be evaluated on batches of {' and '.join(f'{n:,}' for n in sizes)} examples ({_line(error)})"
    given = [Same(0)] * len(jax.tree.leaves(one)) + [PerRow(0)] * len(jax.tree.leaves(data))
    try:
        kinds = [kind for traced in programs for kind in Walk(tuple(sizes)).program(traced, given)]
    except Apart as apart:
        return f"its program for batches of {sizes[0]:,} and of {sizes[-1]:,} examples is not the same ({apart})"
    for kind in kinds:
        if isinstance(kind, Mixed):
            return kind.why
        if not within(kind, Total(-1)):
            return _WRONG_SCALE
    return ""


_WRONG_SCALE = "it is a sum over the examples, or another multiple of their mean, that changes with their number"


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__
