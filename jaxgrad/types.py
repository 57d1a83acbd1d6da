"""The nouns that every module shares.

A *batch* is any pytree whose leaves share a leading axis of examples. *Parameters* are any pytree of
floating-point arrays; the models of this package use the NamedTuples below. A *loss* is a pure function
`loss(params, batch) -> scalar`, by convention the **mean** over the batch's examples (F1); whether it is one is known
or proved (`jaxgrad.means`), and a loss that is none is evaluated on the whole batch. A *sampling* says which
examples a step sees, and is a pure function of `(key, step)`.

One alphabet of sizes everywhere: n examples, d features, h hidden units, k outputs, b batch size, s seeds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int

Params: TypeAlias = Any
"""A pytree of floating-point arrays."""

Key: TypeAlias = jax.Array
"""A JAX random key (`jax.random.key`), or an array of them."""


class Batch(NamedTuple):
    """Examples `x[n, d]` with targets `y[n]` (regression, 0/1 labels, class numbers) or `y[n, k]`."""

    x: Any
    y: Any


class Linear(NamedTuple):
    """Parameters of `w.x + b`: `w[d]` and `b[]`, or `w[d, k]` and `b[k]`; `b=None` means no bias."""

    w: Any
    b: Any = None


class Layer(NamedTuple):
    """One layer of a net: `W[d_in, d_out]` and `b[d_out]`; `b=None` means no bias."""

    W: Any
    b: Any = None


class TwoLayer(NamedTuple):
    """Parameters of `f(x W1 + b1) W2 + b2` (F8, F10): `W1[d, h]`, `W2[h, k]`; the lecture has no biases."""

    W1: Any
    W2: Any
    b1: Any = None
    b2: Any = None


Deep: TypeAlias = tuple[Layer, ...]
"""Parameters of a net of any depth: one `Layer` per matrix, first to last."""

Loss: TypeAlias = Callable[[Params, Any], Float[Array, ""]]
"""`loss(params, batch) -> scalar`, by convention the mean over the batch."""


class Sampling(NamedTuple):
    """Which examples step `t` sees: the one argument that separates GD from SGD.

    Made by `jaxgrad.sampling`. Two samplings of the same kind and batch size are equal and hash alike, so
    a program compiled for one serves the other.
    """

    name: str
    batch_size: int | None
    """b, or None for the full batch."""
    draw: Callable[[Key, Any, int, int], Int[Array, " b"]]
    """`draw(key, step, n, b) -> int32[b]`, pure."""
    rows: int | None = None
    """For the full batch: evaluate its gradient over blocks of this many rows (`descent.row_blocks`)."""
    draw_many: Callable[[Key, Any, int, int, int], Int[Array, "steps b"]] | None = None
    """`draw_many(key, first, steps, n, b) -> int32[steps, b]`: the same, for many steps in less time."""
    take: Callable[[Any, Any], Any] | None = None
    """`take(data, indices) -> batch`, pure; None: those rows of every array."""
    parts: int = 1
    """For the full batch: evaluate its gradient over this many equal parts of rows at once (`descent.row_blocks`)."""
    drop_last: bool = True
    """Whether a pass drops what is left of its order when b does not divide n; else that is its last, smaller batch."""
    n: int | None = None
    """The number of examples, if the data do not show it: padded rows, or a block of rows."""

    def indices(self, key: Key, step: Any, n: int) -> Int[Array, " b"]:
        """The examples of step `step` out of `n`: `int32[b]`, a pure function of `(key, step)`.

        Of a smaller last batch of a pass, as many as it has; where JAX traces `step`, b of them, the first of which
        count (`last_of_pass`).
        """
        found = self.draw(key, step, n, n if self.batch_size is None else self.batch_size)
        last = self.last_of_pass(n)
        if last is None or isinstance(step, Tracer):
            return found
        per_pass, left = last
        return found[:left] if int(step) % per_pass == per_pass - 1 else found

    def last_of_pass(self, n: int) -> tuple[int, int] | None:
        """Steps of a pass, and examples in its last batch where that is smaller than the others; else None."""
        n = self.n or n
        if self.drop_last or self.batch_size is None or n % self.batch_size == 0:
            return None
        return n // self.batch_size + 1, n % self.batch_size

    def examples(self, steps: Any, n: int) -> Any:
        """How many examples the first `steps` steps see, counting repeats."""
        last = self.last_of_pass(n)
        if last is None:
            return steps * (n if self.batch_size is None else self.batch_size)
        per_pass, _ = last
        return steps // per_pass * n + steps % per_pass * self.batch_size

    def batch(self, data: Any, indices: Any) -> Any:
        """The rows `indices` of `data`, which are in range."""
        if self.take is not None:
            return self.take(data, indices)
        return jax.tree.map(lambda leaf: jnp.asarray(leaf).at[indices].get(mode="promise_in_bounds"), data)

    def ahead(self, key: Key, first: Any, steps: int, n: int) -> Int[Array, "steps b"]:
        """The examples of `steps` steps from step `first` on: the same as `indices` for each of them."""
        if self.draw_many is not None:
            return self.draw_many(key, first, steps, n, self.batch_size or n)
        return jax.vmap(lambda step: self.indices(key, step, n))(first + jnp.arange(steps, dtype=jnp.int32))
