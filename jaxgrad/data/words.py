"""Small helpers for error messages: the nearest names, and values as a person would write them."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np

INSTALL = 'python -m pip install "jaxgrad[study]"'
"""How to install what the library needs beyond its own dependencies."""


def nearest(name: str, there: Sequence[str]) -> str:
    """` (did you mean 'a' or 'b'?)`, or nothing if no name is close."""
    close = difflib.get_close_matches(name, there, 3, 0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


def show(value: Any, quote: bool = True) -> str:
    """A label or number as a table would have it: `3`, not `np.float64(3.0)`."""
    if isinstance(value, str):
        return repr(str(value)) if quote else str(value)
    return f"{value:.10g}"


def few(values: Sequence[Any] | Any) -> str:
    """The first three values."""
    return ", ".join(show(v) for v in values[:3]) + (", ..." if len(values) > 3 else "")


def count(number: int | np.integer, noun: str, plural: str = "") -> str:
    """`1 row`, `2,000 rows`."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
