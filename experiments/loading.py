"""The data of an experiment: loaded as its settings say, with names that are safe to show, and rows drawn at random."""

import re
from collections.abc import Callable
from typing import Any

from jaxgrad import data

ROWS_KEY = 2021
"""Draws the rows of a smaller size, the same ones each time."""


def load(config: Any, name: str | None = None, **more: Any) -> data.Dataset:
    """`config.data`, read as its target and options say, or the data set `name` where the settings name no data.

    Names are as `plain` leaves them: they end up in tables, figures and file names.
    """
    own = {"target": config.target, **(config.options or {})} if config.data else {}
    dataset = data.load(config.data or name or "", **own, **more)
    return dataset._replace(name=plain(dataset.name), names=tuple(map(plain, dataset.names)))


def some_rows(dataset: data.Dataset, rows: int | None, progress: Callable[[str], None]) -> data.Dataset:
    """At most so many rows, drawn at random with every class among them; says so where some are left out."""
    some = data.sample(dataset, rows, ROWS_KEY)
    if some is not dataset:
        progress(f"{dataset.name}: {some.notes[-1]}")
    return some


def plain(text: str) -> str:
    """A name without signs that mean something in Markdown, HTML or a figure's formulas; each becomes a dot."""
    words = " ".join(text.split())[:80]
    return re.sub(r"[^\w .,;:+\-=()%@'/°²³€£]|:(?=/)|(?<![^\W_])_|_(?![^\W_])", "·", words) or "data"
