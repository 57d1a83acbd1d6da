"""What the processes tell each other besides the step: whether their arguments are equal, whether all can go on.

Every process must call these functions, at the same place.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.checks import checked


def is_main() -> bool:
    """Whether this process writes the results and the messages (rank 0)."""
    return jax.process_index() == 0


class Elsewhere(RuntimeError):
    """Another process could not go on; the message has its rank and its error."""


def from_all(values: np.ndarray) -> np.ndarray:
    """A small array of every process, `[processes, ...]`; every process must call it."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=False))


@checked
def together(work: Callable[[], Any]) -> Any:
    """Return `work()`, or raise an error on **all** processes if it fails on one, so that none waits forever.

    The process that failed raises its own error. The others raise `Elsewhere` with its rank and its message.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    words = f"{type(failure).__name__}: {failure}".encode()[:500] if failure else b""
    said = from_all(np.frombuffer(words.ljust(500, b"\0"), np.uint8))
    if failure is not None:
        raise failure
    for rank, message in enumerate(said):
        if message.any():
            text = bytes(message).rstrip(b"\0").decode(errors="replace")
            raise Elsewhere(f"rank {rank} could not go on: {text}")
    return result


def of_main(number: float) -> float:
    """Return rank 0's number on every process. Every process must call it."""
    return float(from_all(np.array([number]))[0, 0])


@checked
def from_main(read: Callable[[], bytes]) -> bytes:
    """Return on every process what `read()` returns on rank 0."""
    if jax.process_count() == 1:
        return read()
    from jax.experimental import multihost_utils

    own = together(lambda: read() if is_main() else b"")
    size = int(from_all(np.array([len(own)], np.int32))[0, 0])
    if size == 0:
        return b""
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(own.ljust(size, b"\0"), np.uint8))))


def agree(**things: Any) -> None:
    """Raise ValueError, naming the rank and the thing, unless the things are equal on all processes.

    Each thing is a pytree of arrays, or has a `repr` that shows its value. Every process must call it.
    """
    if jax.process_count() == 1:
        return
    own = np.stack([np.frombuffer(bytes.fromhex(digest(thing)), np.uint8) for thing in things.values()])
    everybody = from_all(own)
    for rank, theirs in enumerate(everybody):
        for name, here, first in zip(things, theirs, everybody[0], strict=True):
            if (here != first).any():
                raise ValueError(
                    f"rank {rank} was given other {name} than rank 0; all processes must be started with the same "
                    "arguments, code and data"
                )


def digest(thing: Any) -> str:
    """sha256 of a pytree: its structure, and shapes, dtypes and bytes of its arrays (the `repr` of other leaves)."""
    leaves, structure = jax.tree.flatten(thing)
    hashed = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if hasattr(leaf, "__array__"):
            array = np.ascontiguousarray(leaf)
            hashed.update(f"{array.dtype.str}{array.shape}".encode())
            hashed.update(array.reshape(-1).view(np.uint8).data)
        else:
            hashed.update(repr(leaf).encode())
    return hashed.hexdigest()
