"""What counts the examples: found by changing their number, wherever they stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.check import check_gradient

rng = np.random.default_rng(3)
X, Y = rng.normal(size=(15, 3)), rng.normal(size=(15, 2))
W = rng.normal(size=(3, 2))


def of_rows(w, batch):
    x, y = batch[-2:]
    return jnp.mean(jnp.sum((x @ w - y) ** 2, axis=1))


def of_columns(w, batch):
    x, y = batch
    return jnp.sum((w.T @ x - y) ** 2) / x.shape[1]


def weighted(w, batch):
    per_class, x, label = batch
    logp = jax.nn.log_softmax(x @ w)
    return -jnp.mean(per_class[label] * logp[jnp.arange(len(label)), label])


def standardised(w, batch):
    mean, scale, x, y = batch
    return jnp.mean(jnp.sum(((x - mean[None]) / scale[None] @ w - y) ** 2, axis=1))


def dropped(w, batch):
    key, x, y = batch
    kept = jax.random.bernoulli(key, 0.8, x.shape)
    return jnp.mean(jnp.sum(((x * kept) @ w - y) ** 2, axis=1))


def in_time(w, batch):
    x, y = batch
    state = jnp.zeros((x.shape[0], 2))
    total = 0.0
    for t in range(x.shape[1]):
        state = jnp.tanh(state + x[:, t] @ w)
        total += jnp.mean(jnp.sum((state - y) ** 2, axis=1))
    return total


LABELS = rng.integers(0, 2, 15)
BATCHES = {
    "rows": (of_rows, (X, Y)),
    "columns": (of_columns, (X.T, Y.T)),
    "class weights first": (weighted, (np.array([0.5, 2.0]), X, LABELS)),
    "statistics first": (standardised, (X.mean(axis=0), X.std(axis=0), X, Y)),
    "a raw key first": (dropped, (jax.random.PRNGKey(1), X, Y)),
    "as many examples as features": (of_rows, (X[:3], Y[:3])),
    "columns, as many as features": (of_columns, (X[:3].T, Y[:3].T)),
    "time steps inside": (in_time, (rng.normal(size=(9, 4, 3)), rng.normal(size=(9, 2)))),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_sum_for_the_mean_is_a_factor_of_n(name):
    loss, batch = BATCHES[name]
    axis = 1 if name.startswith("columns") else 0
    wrong = lambda w, batch: batch[-1].shape[axis] * jax.grad(loss)(w, batch)
    report = check_gradient(loss, wrong, W, batch)
    assert [(f.kind, f.factor) for f in report.findings] == [("scale", "n")], str(report)
    assert len({p.n for p in report.points}) > 1
    assert check_gradient(loss, jax.grad(loss), W, batch).ok
