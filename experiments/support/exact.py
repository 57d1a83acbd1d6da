"""Grids, draws and starts that are the same to the last bit on every machine.

Sums, products, quotients and square roots of NumPy arrays are: IEEE 754 says what each of them rounds to. That makes
`np.linspace` and `np.mean` of float64 the same everywhere, and draws of integers and permutations are integers anyway.
Not so `exp`, `log`, `sin` and powers, and with them `np.geomspace` and normal draws: the last bit is another one where
the processor has other instructions, and XLA's and a BLAS's sums hang on them too. What a study begins with is
therefore made here, or rounded here. Rounding leaves a difference only where the last bit decides to which side a
number is rounded; how rarely that is, each function says.

JAX is not imported before a net is asked for: contenders of `speed` do without.
"""

from collections.abc import Sequence
from decimal import Decimal, localcontext
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxgrad.types import Deep, TwoLayer

BLOCK = 1 << 20
"""Numbers drawn at a time: many float32 do not need twice their memory."""


def decimals(values: Any, digits: int = 6) -> Any:
    """`values`, each as the float64 nearest to its `digits` significant decimals; one number stays a float.

    Text does it, which Python rounds correctly both ways. Two values that differ in their last bit give the same
    number but for one chance in 10^(16 − digits), and what a person wrote in so few digits stays as it is.
    """
    if np.ndim(values) == 0:
        return float(f"{float(values):.{digits}g}")
    values = np.asarray(values, float)
    return np.array([float(f"{value:.{digits}g}") for value in values.flat]).reshape(values.shape)


def geometric(first: float, last: float, count: int, digits: int = 6) -> np.ndarray:
    """`np.geomspace(first, last, count)` to so many `decimals`: that has powers in it, and hangs on the processor."""
    return decimals(np.geomspace(first, last, count), digits)


def dyadic(values: Any, bits: int = 20) -> np.ndarray:
    """`values`, each at its nearest multiple of `2^-bits`.

    Two values that differ by `ε` give the same number but for a chance of `ε 2^bits`. Only scaling by powers of two
    and rounding to whole numbers is done, which adds no error of its own. With 20 bits, values below 16 are float32 as
    they are; and a product of two matrices of them, in float64, is a sum of multiples of 2^-40: exact, in any order, up
    to 2^13.
    """
    return np.ldexp(np.round(np.ldexp(np.asarray(values, float), bits)), -bits)


def normal(random: np.random.Generator, shape: int | tuple[int, ...], bits: int = 20, dtype: Any = float) -> np.ndarray:
    """Standard normal draws, made in float64 and then `dyadic`.

    NumPy draws whole numbers and looks them up in tables; only for one draw in a hundred does it ask for an `exp` or a
    `log`, whose last bit changes the draw in its tail (one chance in 2^(52 − bits) after rounding) or whether it is
    taken (one in 2^53). In float32 (`dtype`) take at most 20 bits: then nothing is rounded again.
    """
    drawn = np.empty(int(np.prod(shape, dtype=np.int64)), dtype)
    for at in range(0, len(drawn), BLOCK):
        part = drawn[at : at + BLOCK]
        part[:] = dyadic(random.standard_normal(len(part)), bits)
    return drawn.reshape(shape)


def sigmoid(values: Any) -> np.ndarray:
    """`1/(1 + e⁻ᶻ)` in float64, correctly rounded: decimal arithmetic of 40 digits is the same everywhere."""
    values = np.asarray(values, float)
    with localcontext() as context:
        context.prec = 40
        return np.array([float(1 / (1 + (-Decimal(z)).exp())) for z in values.flat]).reshape(values.shape)


def layers(seed: int, sizes: Sequence[int], count: int | None = None) -> "Deep":
    """A start with the law of `models.init_deep`, `W ~ N(0, 1/d_in)` and zero biases, of `normal` draws; float32.

    With `count`, so many of them: each leaf has an axis in front.
    """
    import jax.numpy as jnp

    from jaxgrad.types import Layer

    shapes, lead = list(pairwise(sizes)), () if count is None else (count,)
    ends = list(accumulate(m * n for m, n in shapes))
    drawn = normal(np.random.default_rng(seed), (*lead, ends[-1]))
    parts = np.split(drawn, ends[:-1], axis=-1)
    return tuple(
        Layer(jnp.asarray(part.reshape(*lead, m, n) / np.sqrt(m), jnp.float32), jnp.zeros((*lead, n), jnp.float32))
        for part, (m, n) in zip(parts, shapes, strict=True)
    )


def two_layer(seed: int, d: int, h: int, k: int, count: int | None = None) -> "TwoLayer":
    """A start with the law of `models.init_two_layer`, of `normal` draws: see `layers`."""
    from jaxgrad.types import TwoLayer

    (W1, b1), (W2, b2) = layers(seed, (d, h, k), count)
    return TwoLayer(W1, W2, b1, b2)


def random_keys(seed: int | Sequence[int], count: int) -> Any:
    """`count` independent JAX keys, one for each run. NumPy spreads the seed: JAX would compile a program for it."""
    import jax
    import numpy as np

    words: Any = np.random.SeedSequence(seed).generate_state(2 * count)
    return jax.random.wrap_key_data(words.reshape(count, 2))
