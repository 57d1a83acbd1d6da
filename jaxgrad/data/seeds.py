"""From a key to numpy's randomness: data are made and split on the host, once, in float64."""

from typing import Any

import numpy as np

from jaxgrad import checks


def entropy(key: Any) -> list[int]:
    """The whole numbers that seed numpy: the words of one JAX key, or the number itself.

    Raises ValueError for a negative number, several keys, or anything else.
    """
    if isinstance(key, int | np.integer) and not isinstance(key, bool):
        if key < 0:
            raise ValueError(f"key must be a JAX key or a whole number from 0; got {checks.shown(key)}")
        return [int(key)]
    import jax

    try:
        words = np.asarray(jax.random.key_data(checks.key("key", key)))
    except (TypeError, ValueError):
        raise ValueError(
            f"key must be one JAX key (jax.random.key(0)) or a whole number from 0; got {checks.shown(key)}"
        ) from None
    return [int(word) for word in words]


def permutation(n: int, key: Any) -> np.ndarray:
    """A uniformly random order of 0..n-1: the ranks of n random 64-bit words.

    The raw words of a bit generator are the one part of `numpy.random` that is promised never to change,
    so the order is the same on every platform and version.
    """
    return np.argsort(np.random.Philox(entropy(key)).random_raw(n), kind="stable")
