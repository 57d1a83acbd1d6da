"""The data of an experiment: loaded as its settings say, with names that are safe to show, and rows drawn at random."""

import re
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgrad import data
from jaxgrad.types import Batch

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


def few_features(dataset: data.Dataset, features: int, rows: int | None) -> tuple[Batch, tuple[str, ...]]:
    """The features most correlated with the target, in their order, and their names; of `rows` rows at random."""
    x, y = (np.asarray(leaf, np.float32) for leaf in data.sample(dataset, rows, ROWS_KEY).batch)
    deviation = x.std(axis=0)
    correlation = np.abs((x - x.mean(axis=0)[None, :]).T @ (y - y.mean())) / np.where(deviation > 0, deviation, np.inf)
    chosen = np.sort(np.argsort(-correlation, kind="stable")[:features])
    return Batch(jnp.asarray(x[:, chosen]), jnp.asarray(y)), tuple(dataset.names[i] for i in chosen)


def plain(text: str) -> str:
    """A name without signs that mean something in Markdown, HTML or a figure's formulas; each becomes a dot."""
    words = " ".join(text.split())[:80]
    return re.sub(r"[^\w .,;:+\-=()%@'/°²³€£]|:(?=/)|(?<![^\W_])_|_(?![^\W_])", "·", words) or "data"
