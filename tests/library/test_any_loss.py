"""`descend` takes any loss: the path and the recorded losses of the loop that everybody writes, or a sentence."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import descend, distinct, full_batch, models
from jaxgrad.types import Linear

FUZZ = Path(__file__).with_name("any_loss.py")


def fuzz(*arguments):
    done = subprocess.run(
        [sys.executable, str(FUZZ), *map(str, arguments)], capture_output=True, text=True, timeout=550
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("seed", [101, 102])
def test_random_losses_at_every_threshold_and_place_give_what_the_plain_loop_gives(seed):
    """15 losses a seed, two seconds each; JAXGRAD_LOSSES=100 tries more."""
    count = int(os.environ.get("JAXGRAD_LOSSES", 15))
    said = fuzz(seed, count)
    assert said["bad"] == []
    assert sum(said["found"].values()) == count
    assert said["found"]["right"] > count / 2


def test_a_guess_from_the_first_rows_would_be_found_out():
    """What stood in the place of the proof once."""
    assert fuzz(2, 12, "--guess")["found"]["wrong"] >= 2


@pytest.mark.parametrize("steps", [1, 20])
def test_class_weights_on_sorted_rows_at_the_real_thresholds(steps):
    """20,000 x 20 rows in float32: enough for `descend` to think of parts."""
    r = np.random.default_rng(1)
    x = r.normal(size=(20_000, 20)).astype(np.float32)
    rare = np.arange(20_000) >= 15_000
    y = (x @ r.normal(size=20) * np.where(rare, -1, 1) + 2 * rare).astype(np.float32)
    rows = tuple(map(jnp.asarray, (x, y, np.where(rare, 20, 1).astype(np.float32))))

    def loss(params, rows):
        x, y, weight = rows
        return jnp.sum(weight * (x @ params.w + params.b - y) ** 2) / jnp.sum(weight)

    start = models.init_linear(20, dtype=jnp.float32)
    trace = descend(loss, start, rows, optimizer=0.05, sampling=full_batch(), steps=steps, key=jax.random.key(0))
    params = start
    slope = jax.jit(jax.grad(loss))
    for _ in range(steps):
        params = jax.tree.map(lambda w, g: w - jnp.float32(0.05) * g, params, slope(params, rows))
    np.testing.assert_allclose(trace.params.w, params.w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(trace.loss[-1], loss(params, rows), rtol=1e-4)


def test_the_recorded_loss_of_minibatches_beyond_cache_is_that_of_all_rows():
    """32 MiB of rows sorted by class, at the real threshold."""
    n = 400_000
    x = np.random.default_rng(1).normal(size=(n, 20)).astype(np.float32)
    rare = np.arange(n) >= 300_000
    rows = tuple(map(jnp.asarray, (x, (2 * x[:, 0] + 3 * rare).astype(np.float32), 1 + 19 * rare.astype(np.float32))))

    def loss(params, rows):
        x, y, weight = rows
        return jnp.sum(weight * (x @ params.w - y) ** 2) / jnp.sum(weight)

    start = Linear(jnp.zeros(20, jnp.float32))
    trace = descend(
        loss, start, rows, optimizer=0.05, sampling=distinct(256), steps=10, key=jax.random.key(0), record=[0, 10]
    )
    np.testing.assert_allclose(trace.loss, [loss(start, rows), loss(trace.params, rows)], rtol=1e-4)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_losses_that_are_no_means_of_very_few_rows(n):
    rows = (jnp.arange(1.0, n + 1)[:, None], jnp.ones(n))
    loss = lambda params, rows: jnp.sum((rows[0] @ params.w - rows[1]) ** 2) / jnp.sum(rows[0])
    run = partial(descend, loss, optimizer=0.01, sampling=full_batch(), steps=1, key=jax.random.key(0))
    start = Linear(jnp.zeros(1))
    expected = start.w - 0.01 * jax.grad(loss)(start, rows).w
    np.testing.assert_allclose(run(start, rows).params.w, expected, rtol=1e-12)
