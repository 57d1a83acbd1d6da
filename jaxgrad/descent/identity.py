"""The fingerprint of a run in its checkpoint: data, loss, start, optimizer, sampling, key and stopping rules."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxgrad import parallel
from jaxgrad.descent import optimizers
from jaxgrad.descent.objective import Objective
from jaxgrad.descent.stopping import Stop
from jaxgrad.fingerprints import fingerprint as program
from jaxgrad.fingerprints import short
from jaxgrad.parallel import digest
from jaxgrad.types import Params, Sampling


def fingerprint(
    objective: Objective,
    params: Params,
    model: Any,
    data: Any,
    n: int,
    optimizer: Any,
    settings: Any,
    sampling: Sampling,
    key: Any,
    rules: Sequence[Stop],
    rows: str,
) -> dict[str, str]:
    """Short hashes by name, the same on however many devices and processes.

    `rows` is a hash of the n rows (`checkpoint.rows_hash`); of `data` only shapes and dtypes count.
    """
    data = data.batch if isinstance(data, parallel.Weighted) else data
    two = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((2, *leaf.shape[1:]), leaf.dtype), data)
    one = _shapes(params)
    program_of_optimizer = _of_optimizer(optimizer, one)
    return {
        "data": short(f"{n} {rows}"),
        "loss": _of_loss(objective, optimizers.trained(one), _shapes(model), two),
        "start": digest(jax.tree.map(np.asarray, params if model is None else (params, model)))[:16],
        "optimizer": (
            program_of_optimizer if isinstance(settings, tuple) else digest((program_of_optimizer, settings))[:16]
        ),
        "sampling": _of_sampling(sampling),
        "key": digest(key)[:16],
        "stop": _of_rules(rules, optimizers.trained(one)),
    }


def _of_loss(objective: Objective, params: Params, model: Any, data: Any) -> str:
    if objective.plain and objective.evaluate is None:
        return program(objective.loss, params, data)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return short(
        program(objective.of_batch, params, model, data, key) + program(objective.recorded, params, model, data, key)
    )


def _of_optimizer(optimizer: Any, params: Params) -> str:
    state = jax.eval_shape(optimizer.init, params)
    at = optimizers.trained(params)
    if optimizers.asked(optimizer, params, state).needed:
        return program(optimizers.with_placeholders(optimizer), at, state, params)
    return program(optimizer.update, at, state, params)


def _of_sampling(sampling: Sampling) -> str:
    shares = parallel.shares_of(sampling)
    last = "" if sampling.drop_last else " to the last"
    return f"{sampling.name} {sampling.batch_size} {'' if shares is None else shares}{last}"


def _of_rules(rules: Sequence[Stop], params: Params) -> str:
    """Kind and numbers of each rule; of a metric, its program."""
    words = []
    for rule in rules:
        numbers = {name: value for name, value in rule._asdict().items() if not callable(value)}
        metric = getattr(rule, "metric", None)
        words.append(f"{type(rule).__name__} {numbers} {'' if metric is None else program(metric, params)}")
    return short(" ".join(words))


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
