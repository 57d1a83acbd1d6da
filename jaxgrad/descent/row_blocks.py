"""A mean over all examples, evaluated in blocks of rows: one pass over data larger than the cache, in bounded memory.

    f(w; all) = Σ_k (m_k / n) f(w; block k)      for a mean over examples, and so for its gradient

Only a loss that is known to be such a mean (`jaxgrad.means`) is evaluated so. The result equals the plain evaluation
to rounding.

The gradient of a linear model reads its data twice, forward and back. In blocks, the second read comes from the cache.
A net keeps the activations of one block only.

XLA on the CPU copies a block before it reads it, with one thread, and does not run two independent functions at once
(jaxlib 0.10 and 0.12). So if the step is simple enough for one function (`small_steps`), `on_all_cores` takes blocks
of a few rows, which the nearest cache holds, in one thread per core.

Data that fit the cache are not cut into blocks. But the way back of a linear model is a product of a vector by the rows
of a long matrix. XLA takes up to twice as long for it as for one batched product over parts of the rows (5000 x 784
and 10⁶ x 64, float32, two cores, jaxlib 0.10). `in_parts` does that: nothing is copied, and the sums are shorter.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import means
from jaxgrad.descent import small_steps
from jaxgrad.types import Loss, Params

BLOCK = 2**22
"""Bytes of the largest array of a block, data or intermediate: a few such arrays fit the cache of a processor."""
FEWEST_BLOCKS = 5
"""Fewer blocks than this gain nothing: the data stay in the cache from one evaluation to the next."""
GROUP = 256
"""The number of blocks that `on_all_cores` sums before it adds their sum to the total."""
BLOCK_PER_CORE = 2**13
"""Bytes of data in a block of `on_all_cores`: it is copied and read twice within the nearest cache."""
PARTS = 10
"""The number of parts for `in_parts`, about. On two cores, 10 to 20 are alike for 25 to 784 columns; with 9 columns, 10
parts take a fifth less time than the whole, and 20 parts take as long as the whole."""
SMALLEST_IN_PARTS = 2**20
"""Smaller data (in bytes) are evaluated whole: steps are short, and splitting them gained nothing."""


def mean(function: Callable[[Params, Any], Any], rows: int) -> Callable[[Params, Any], Any]:
    """`function(params, data)`, a mean over examples or its gradient, evaluated over blocks of `rows` rows.

    `data` is a pytree whose leaves share their leading axis. If `rows` does not divide it, the last block is smaller.
    """

    def blocked(params: Params, data: Any) -> Any:
        n = jax.tree.leaves(data)[0].shape[0]
        blocks, left = divmod(n, rows)

        def add(k: Any, total: Any) -> Any:
            block = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, k * rows, rows), data)
            return jax.tree.map(lambda sum, part: sum + part * (rows / n), total, function(params, block))

        zero = jax.tree.map(lambda out: jnp.zeros(out.shape, out.dtype), jax.eval_shape(function, params, data))
        total = jax.lax.fori_loop(0, blocks, add, zero)
        if left:
            rest = function(params, jax.tree.map(lambda leaf: leaf[blocks * rows :], data))
            total = jax.tree.map(lambda sum, part: sum + part * (left / n), total, rest)
        return total

    return blocked


def in_parts(function: Callable[[Params, Any], Any], parts: int) -> Callable[[Params, Any], Any]:
    """`function(params, data)`, a mean over examples or its gradient, evaluated over equal parts of the rows at once.

    `parts` must divide the number of rows.
    """

    def parted(params: Params, data: Any) -> Any:
        cut = jax.tree.map(lambda leaf: leaf.reshape(parts, -1, *leaf.shape[1:]), data)
        return jax.tree.map(lambda out: out.mean(axis=0), jax.vmap(function, in_axes=(None, 0))(params, cut))

    return parted


def parts_for(loss: Loss, params: Params, data: Any) -> int:
    """The number of equal parts of the rows in which to evaluate the gradient at once; 1 if that is not faster.

    It is faster on a CPU, for data that fit its cache (larger data go in blocks: `rows_for`), with products of a matrix
    by a vector only: XLA multiplies two matrices better whole than in parts. The loss must be known to be a mean over
    the examples (`jaxgrad.means`), so that parts give the same.
    """
    n, size = jax.tree.leaves(data)[0].shape[0], sum(leaf.nbytes for leaf in jax.tree.leaves(data))
    divisors = [parts for parts in range(PARTS // 2, 2 * PARTS) if n % parts == 0]
    if not divisors or jax.default_backend() != "cpu" or not SMALLEST_IN_PARTS <= size < FEWEST_BLOCKS * BLOCK:
        return 1
    parts = min(divisors, key=lambda parts: abs(parts - PARTS))
    if not small_steps.products_of_vectors(jax.grad(loss), params, data):
        return 1
    return 1 if means.doubt(loss, params, data, [n, n // parts]) else parts


def on_all_cores(loss: Loss, params: Params, data: Any) -> Callable[[Params, Any], Any] | None:
    """`∇loss(params, data)` as a function to call from Python, not under `jit`: each core takes a share of the blocks.

    None if there is one core or no CPU, if the gradient has other than simple operations, or if the loss is not known
    to be a mean over the examples (`jaxgrad.means`).
    """
    n, cores = jax.tree.leaves(data)[0].shape[0], _cores()
    rows = max(1, BLOCK_PER_CORE * n // sum(leaf.nbytes for leaf in jax.tree.leaves(data)))
    block = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), data)
    if cores == 1 or not small_steps.fits(jax.grad(loss), params, block):
        return None
    if means.doubt(loss, params, data, sizes(n, rows)):
        return None
    cuts = np.linspace(0, n // rows, cores + 1).astype(np.int32)

    def slope(params: Params, data: Any) -> Any:
        share = partial(_share, params, data, loss=loss, rows=rows)
        others = [_threads(cores - 1).submit(share, *cut) for cut in pairwise(cuts[1:])]
        own = share(cuts[0], cuts[1])
        return _total(params, data, [own, *(other.result() for other in others)], loss=loss, rows=rows)

    return slope


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@lru_cache
def _threads(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="jaxgrad-blocks")


@partial(jax.jit, static_argnames=("loss", "rows"))
def _share(params, data, first, last, *, loss, rows):
    """`Σ_k ∇loss(params, block k)` over the blocks from `first` to `last`."""

    def loop(params, data, first, last):
        def add(k, total):
            block = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, k * rows, rows), data)
            return jax.tree.map(jnp.add, total, jax.grad(loss)(params, block))

        def group(k, total):
            # Sums of sums: adding a million small terms one by one would lose digits.
            part = jax.lax.fori_loop(k * GROUP, jnp.minimum(last, (k + 1) * GROUP), add, zero)
            return jax.tree.map(jnp.add, total, part)

        zero = jax.tree.map(jnp.zeros_like, params)
        start = jnp.minimum(last, (first // GROUP + 1) * GROUP)
        head = jax.lax.fori_loop(first, start, add, zero)
        return jax.lax.fori_loop(first // GROUP + 1, -(-last // GROUP), group, head)

    return small_steps.call(loop, params, data, first, last)


@partial(jax.jit, static_argnames=("loss", "rows"))
def _total(params, data, shares, *, loss, rows):
    n = jax.tree.leaves(data)[0].shape[0]
    total = jax.tree.map(lambda *parts: sum(parts) * (rows / n), *shares)
    if left := n % rows:
        rest = jax.grad(loss)(params, jax.tree.map(lambda leaf: leaf[-left:], data))
        total = jax.tree.map(lambda sum, part: sum + part * (left / n), total, rest)
    return total


def rows_for(loss: Loss, params: Params, data: Any) -> int | None:
    """The number of rows of a block. None if blocks are not faster, or if the loss is not known to be a mean over the
    examples (`jaxgrad.means`): blocks might then give another result."""
    n = jax.tree.leaves(data)[0].shape[0]
    if any(len(leaf.devices()) > 1 for leaf in jax.tree.leaves(data) if isinstance(leaf, jax.Array)):
        return None
    per_example = _largest(loss, params, data) / n
    rows = max(1, int(BLOCK // per_example))
    if n * per_example < FEWEST_BLOCKS * BLOCK or means.doubt(loss, params, data, sizes(n, rows)):
        return None
    return rows


def sizes(n: int, rows: int) -> list[int]:
    """The numbers of rows on which a loss is evaluated in blocks of `rows` out of n: all, a block, the rest."""
    return [size for size in (n, min(rows, n), n % rows) if size]


def _largest(loss: Loss, params: Params, data: Any) -> int:
    """Bytes of the largest array that the gradient touches, the data among them."""

    def sizes(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            for variable in equation.outvars:
                shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
                yield int(np.prod(shape)) * getattr(dtype, "itemsize", 4)
            for value in equation.params.values():
                if hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
                    yield from sizes(inner)

    traced = jax.make_jaxpr(jax.grad(loss))(params, data).jaxpr
    return max([*sizes(traced), *(leaf.nbytes for leaf in jax.tree.leaves(data))])
