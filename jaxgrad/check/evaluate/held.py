"""Arrays and numbers that a value holds, inside dictionaries, lists, tuples and objects."""

import types
from typing import Any

import jax
import numpy as np

Path = tuple[Any, ...]
"""How a value is reached in a frame: a name, then `("item", key)` or `("attr", name)`; `("return",)` is special."""

_EMPTY = (
    str,
    bytes,
    type,
    range,
    slice,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinMethodType,
)


def arrays_in(path: Path, value: Any, depth: int = 3, most: int = 200) -> list[tuple[Path, Any]]:
    """Arrays and numbers in a value, with how they are reached."""
    if isinstance(value, (np.ndarray, jax.Array, np.generic, float, int)):
        return [(path, value)]
    if depth == 0 or value is None or isinstance(value, _EMPTY):
        return []
    items: list[tuple[Path, Any]] = []
    if isinstance(value, dict):
        items = [((*path, ("item", k)), v) for k, v in value.items() if isinstance(k, (str, int, tuple))]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = [((*path, ("attr", k)), getattr(value, k)) for k in value._fields]  # type: ignore[attr-defined]
    elif isinstance(value, (list, tuple)):
        items = [((*path, ("item", k)), v) for k, v in enumerate(value)]
    elif hasattr(value, "__dict__") and not type(value).__module__.startswith(("jax", "numpy")):
        items = [((*path, ("attr", k)), v) for k, v in vars(value).items()]
    found: list[tuple[Path, Any]] = []
    for inner, held in items[:most]:
        found += arrays_in(inner, held, depth - 1, most)
        if len(found) > most:
            break
    return found[:most]
