"""Whose code raised an error: a note on it that starts with `jaxgrad:`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from jax.core import Tracer

from jaxgrad.check.evaluate.held import arrays_in


@contextlib.contextmanager
def raised_by(whose: str, function: Callable[..., Any] | None = None, where: str = "") -> Iterator[None]:
    """Note on an error that `whose` code raised it, once, and that it reads what the loss left behind, if it does."""
    try:
        yield
    except Exception as error:
        if not any(note.startswith("jaxgrad:") for note in getattr(error, "__notes__", ())):
            error.add_note(f"jaxgrad: your {whose} raised this{where}.{_left_behind(function)}")
        raise


def read_by(function: Any) -> dict[str, Any]:
    """What a function reads besides its arguments: globals, what it closes over, the object that it belongs to."""
    code = getattr(function, "__code__", None)
    if code is None:
        return {}
    known = getattr(function, "__globals__", {})
    seen = {name: known[name] for name in code.co_names if name in known}
    for name, cell in zip(code.co_freevars, getattr(function, "__closure__", None) or (), strict=True):
        with contextlib.suppress(ValueError):  # a cell that is still empty
            seen[name] = cell.cell_contents
    if code.co_varnames and hasattr(function, "__self__"):
        seen[code.co_varnames[0]] = function.__self__
    return seen


def _left_behind(function: Callable[..., Any] | None) -> str:
    """That a function reads a value which JAX only traced, in a global or an attribute, if it does."""
    seen = read_by(function).items()
    held = [name for name, value in seen if any(isinstance(v, Tracer) for _, v in arrays_in((name,), value))]
    if not held:
        return ""
    return (
        f" It reads `{held[0]}`, where your loss has left a value that JAX only traced: let the gradient compute it "
        "anew from its arguments."
    )
