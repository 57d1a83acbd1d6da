"""Full passes over rows on disk: the loss and its gradient are means, evaluated in parts and added up.

    f(w; all) = Σ_j (m_j / n) f(w; part j)

Threads take a part of the file each, and the sums are added in order.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgrad import means
from jaxgrad.descent import row_blocks
from jaxgrad.rows import (
    THREADS,
    Layout,
    Rows,
    check_entries,
    example,
    map_ahead,
    mapped,
    no_class,
    parts_of,
    pieces_of,
    read,
)
from jaxgrad.types import Batch, Loss, Params

BLOCK = 2**18
"""Bytes of rows that a full pass evaluates at once on a CPU: with intermediate results they fit a core's cache."""


@dataclass(frozen=True)
class OfRows:
    """A loss of any form, as a function of rows as they are in the file."""

    loss: Any
    layout: Layout

    def __call__(self, params: Params, rows: Any, **given: Any) -> Any:
        return self.loss(params, self.layout.batch(rows), **given)


def full_gradient(loss: Loss, params: Params, rows: Rows) -> Params:
    """`Σ (m_j/n) ∇L(w; part j)`, in one pass over the rows."""
    return _sum(partial(_part, function=jax.grad, loss=OfRows(loss, rows.layout)), params, rows)


def full_loss(loss: Loss, params: Params, rows: Rows) -> jax.Array:
    """`Σ (m_j/n) L(w; part j)`, in one pass over the rows."""
    return _sum(partial(_part, function=_itself, loss=OfRows(loss, rows.layout)), params, rows)


def check_mean(loss: Loss, params: Params, rows: Rows) -> None:
    """Raise ValueError unless the loss is known to be a mean over the examples, as a full pass in blocks needs."""
    dtype = jax.dtypes.canonicalize_dtype(rows.dtype)
    counts = {high - low for low, high in parts_of(rows)}
    sizes = {size for count in counts for size in row_blocks.sizes(count, rows_of_block(count, rows.columns, dtype))}
    batch = jax.eval_shape(rows.as_batch, example(rows))
    if found := means.doubt(loss, params, batch, [rows.n, *sizes]):
        raise ValueError(
            "the rows lie on disk, so the full loss is evaluated in blocks of them, which needs a loss that is a mean "
            f"over the examples; of this one it is not known: {found}. {means.HOW}, or load the rows into memory"
        )


def _itself(loss: Loss) -> Loss:
    return loss


def _sum(evaluate: Callable[..., Any], params: Params, rows: Rows) -> Any:
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params)):
        raise TypeError(
            "a pass over rows on disk cannot stand inside a function that JAX traces (jax.jit, jax.grad, a metric, "
            "observe): call full_loss and full_gradient outside, or evaluate rows that are in memory there"
        )

    def of_part(bounds: tuple[int, int]) -> Any:
        pieces = pieces_of(rows, *bounds)
        whole = len(pieces) == 1
        part = mapped(*pieces[0][:1], rows, *pieces[0][1:3], ahead=True) if whole else read(rows, *bounds)
        found, bad = jax.block_until_ready(evaluate(params, part))
        if bad:
            check_entries(rows, np.array(part), bounds[0])
        return found

    total = None
    bounds = parts_of(rows)
    for (low, high), own in zip(bounds, map_ahead(of_part, bounds, THREADS), strict=True):
        total = _add(total, own, np.float64((high - low) / rows.n))
    return total


@partial(jax.jit, static_argnames=("function", "loss"))
def _part(params: Params, part: Any, *, function: Callable[[Loss], Any], loss: OfRows) -> Any:
    """`function(loss)` of the rows of a part, and a flag that is not 0 if any entry is invalid."""

    def of_block(params: Params, block: Any) -> Any:
        bad = jnp.any(~jnp.isfinite(block))
        if loss.layout.classes is not None:
            bad |= jnp.any(no_class(block[:, loss.layout.target], loss.layout.classes))
        flag = block.dtype if jnp.issubdtype(block.dtype, jnp.floating) else jnp.float32
        return function(loss.loss)(params, _by_columns(loss, params, block)), bad.astype(flag)

    return row_blocks.mean(of_block, rows_of_block(part.shape[0], part.shape[1], part.dtype))(params, part)


def rows_of_block(count: int, columns: int, dtype: Any) -> int:
    """The number of rows, out of `count`, that are evaluated at once."""
    if jax.default_backend() != "cpu":
        return count
    return min(count, max(256, BLOCK // (columns * np.dtype(dtype).itemsize)))


def _by_columns(loss: OfRows, params: Params, block: Any) -> Any:
    """Rows as the loss sees them, stored by columns if the loss only multiplies x by matrices.

    XLA then multiplies whole vectors: with eight columns, in half the time. Other operations would be slower.
    """
    batch = loss.layout.batch(block)
    if not isinstance(batch, Batch):
        return batch
    traced = jax.make_jaxpr(loss.loss)(params, batch).jaxpr
    x = traced.invars[-2]
    uses = {equation.primitive.name for equation in traced.eqns if any(x is given for given in equation.invars)}
    if uses != {"dot_general"}:
        return batch
    columns, y = jax.lax.optimization_barrier((batch.x.T, batch.y))
    return Batch(columns.T, y)


@jax.jit
def _add(total: Any, own: Any, share: Any) -> Any:
    own = jax.tree.map(lambda part: part * share.astype(part.dtype), own)
    return own if total is None else jax.tree.map(jnp.add, total, own)
