"""Parameters that are passed one by one, `loss(W1, b1, X, y)`, made one tuple, as everything else here expects."""

import collections
import inspect
import keyword
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Separate(NamedTuple):
    """The same loss and gradient as functions of `(params, *rest)`."""

    loss: Callable[..., Any]
    gradient: Callable[..., Any]
    params: Any
    """A named tuple of the arguments that are differentiated."""
    rest: tuple[Any, ...]
    names: tuple[str, ...]
    """What the other arguments are called."""


def separate(
    loss: Callable[..., Any], gradient: Callable[..., Any], arguments: Sequence[Any], argnums: Sequence[int]
) -> Separate:
    """Take the arguments at `argnums` as the parameters; the gradient may return a tuple or a dict by name."""
    names = argument_names(loss, len(arguments))
    chosen = [names[i] for i in argnums]
    Parameters = collections.namedtuple("Parameters", chosen)
    others = [i for i in range(len(arguments)) if i not in argnums]

    def complete(params: Any, rest: Sequence[Any]) -> list[Any]:
        full: list[Any] = [None] * len(arguments)
        for i, value in zip(argnums, params, strict=True):
            full[i] = value
        for i, value in zip(others, rest, strict=True):
            full[i] = value
        return full

    def joined_loss(params: Any, *rest: Any, **keywords: Any) -> Any:
        return loss(*complete(params, rest), **keywords)

    def joined_gradient(params: Any, *rest: Any, **keywords: Any) -> Any:
        result = gradient(*complete(params, rest), **keywords)
        if isinstance(result, dict):
            return _by_name(result, chosen, Parameters) or result
        if len(chosen) == 1 and not isinstance(result, (tuple, list, dict)):
            return Parameters(result)
        if isinstance(result, (tuple, list)) and len(chosen) <= len(result) <= len(arguments):
            return Parameters(*result[: len(chosen)])
        return result

    vars(joined_gradient)["__wrapped__"] = gradient
    params = Parameters(*(arguments[i] for i in argnums))
    return Separate(
        joined_loss, joined_gradient, params, tuple(arguments[i] for i in others), tuple(names[i] for i in others)
    )


def separated(loss: Callable[..., Any], result: Any, arguments: Sequence[Any]) -> tuple[int, ...] | None:
    """Which arguments a returned gradient belongs to, where it holds several arrays for one array `params`.

    A tuple of arrays that have the shapes of the first arguments, or a dict with the names of some.
    """
    if len(arguments) < 2 or not _is_leaf(arguments[0]):
        return None
    if isinstance(result, dict):
        names = argument_names(loss, len(arguments))
        found = [i for i, name in enumerate(names) if _key(result, name) is not None]
        return tuple(found) if len(found) > 1 and len(found) == len(result) else None
    if not isinstance(result, (tuple, list)) or not 2 <= len(result) <= len(arguments):
        return None
    for mine, argument in zip(result, arguments, strict=False):
        if not (_is_leaf(mine) and _is_leaf(argument) and np.shape(mine) == np.shape(argument)):
            return None
    return tuple(range(len(result)))


def argument_names(function: Callable[..., Any], count: int) -> list[str]:
    """The names of the first `count` arguments of a function, fit to be fields of a tuple."""
    try:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names = [n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds]
    except (TypeError, ValueError):
        names = []
    names = [n if not keyword.iskeyword(n) and n[0] != "_" else f"arg{i}" for i, n in enumerate(names)]
    return [*names, *(f"arg{i}" for i in range(len(names), count))][:count]


def _by_name(result: dict[Any, Any], names: Sequence[str], form: Any) -> Any:
    keys = [_key(result, name) for name in names]
    return None if None in keys else form(*(result[k] for k in keys))


def _key(result: dict[Any, Any], name: str) -> str | None:
    """The key of a dict of gradients that means this argument: `W1`, or `dW1`, `d_W1`, `grad_W1`."""
    return next((k for k in (name, f"d{name}", f"d_{name}", f"grad_{name}") if k in result), None)


def _is_leaf(value: Any) -> bool:
    return isinstance(value, (float, int, np.ndarray, np.generic, jax.Array)) and not isinstance(value, bool)
