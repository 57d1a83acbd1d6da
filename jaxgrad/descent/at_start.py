"""What is not finite at the start of a run: loss, gradient, or one example."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import checks, means
from jaxgrad.descent.step import leading_axis
from jaxgrad.types import Loss, Params


def not_finite_at_start(value: Any, gradient: Params) -> str:
    """A sentence on what is not finite, loss or gradient; empty if all is finite."""
    if not np.isfinite(value):
        return f"not finite at the start: the loss is {float(value)}"
    where = not_finite_in(gradient)
    words = f"not finite at the start: the loss is {float(value):.3g}, but its gradient is not finite in {where}"
    return words if where else ""


def not_finite_in(tree: Any) -> str:
    """The names of the leaves with an entry that is not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ", ".join(checks.leaf_name(path) for path, leaf in leaves if not jnp.isfinite(leaf).all())


def first_bad_example(loss: Loss, params: Params, data: Any) -> str:
    """Name the first example whose loss or gradient is not finite, if the loss is a mean and some examples are fine."""
    try:
        of_one = means.of_one(loss, params, data, [leading_axis(data)], "")
    except ValueError:
        return ""

    def good(example: Any) -> Any:
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(both(params, example))]).all()

    both = jax.value_and_grad(of_one)
    fine = np.asarray(jax.jit(lambda data: jax.lax.map(good, data, batch_size=256))(data))
    return "" if not fine.any() or fine.all() else f"; the first such example is row {np.argmin(fine):,} (from 0)"
