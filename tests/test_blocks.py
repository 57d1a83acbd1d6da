"""Means over all examples in blocks of rows: equal to the plain ones, only for means, and in bounded memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jaxgrad import blocks, losses, models
from jaxgrad.descent import descend, small_gradient
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.types import Batch

LINEAR = losses.mean_loss(models.linear, losses.squared)
LOGISTIC = losses.mean_loss(models.linear, losses.logloss, l2=0.1)
NET = losses.mean_loss(partial(models.two_layer, activation=jnp.tanh), losses.half_squared)


def total(params, batch):
    return LINEAR(params, batch) * float(batch.x.shape[0])


def centred(params, batch):
    """Its examples see each other: the mean of the batch is taken off."""
    return LINEAR(params, batch._replace(x=batch.x - batch.x.mean(axis=0, keepdims=True)))


def problem(n=1000, d=4, net=False, dtype=jnp.float32):
    random = np.random.default_rng(1)
    x = random.standard_normal(size=(n, d))
    y = (x @ np.arange(1, d + 1) + random.standard_normal(n) > 0).astype(float)
    start = models.init_two_layer(jax.random.key(0), d, 8, 1) if net else models.init_linear(d)
    start = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype) + jnp.asarray(0.1, dtype), start)
    return Batch(jnp.asarray(x, dtype), jnp.asarray(y[:, None] if net else y, dtype)), start


@pytest.mark.parametrize(("loss", "net"), [(LINEAR, False), (LOGISTIC, False), (NET, True)])
@pytest.mark.parametrize("rows", [1, 7, 250, 999, 1000])
def test_blocks_add_up_to_the_whole(loss, net, rows):
    batch, start = problem(net=net, dtype=jnp.float64)
    both = jax.value_and_grad(loss)
    plain, blocked = jax.jit(both)(start, batch), jax.jit(blocks.mean(both, rows))(start, batch)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(blocked), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("loss", "expected"), [(LINEAR, True), (LOGISTIC, True), (total, False), (centred, False)])
def test_only_a_mean_over_examples_is_taken_in_blocks(loss, expected, monkeypatch):
    batch, start = problem()
    assert blocks.is_mean(loss, start, batch) is expected
    assert blocks.rows_for(loss, start, batch) is None  # it fits the cache
    monkeypatch.setattr(blocks, "BLOCK", 2048)
    rows = blocks.rows_for(loss, start, batch)
    assert rows == (2048 // batch.x[0].nbytes if expected else None)


def test_blocks_are_sized_by_what_a_net_keeps(monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 2048)
    batch, start = problem(net=True)
    assert blocks.rows_for(NET, start, batch) == 2048 // (8 * batch.x.dtype.itemsize)


@pytest.mark.parametrize("stop", [None, small_gradient(0.3, every=5)])
@pytest.mark.parametrize("sampling", [full_batch(), distinct(10)])
def test_descend_chooses_blocks_and_finds_the_same(sampling, stop, monkeypatch):
    batch, start = problem()
    run = partial(
        descend, LINEAR, start, batch, optimizer=0.05, sampling=sampling, steps=40, key=jax.random.key(0), stop=stop
    )
    plain = run()
    monkeypatch.setattr(blocks, "BLOCK", 2048)
    seen = []
    mean = blocks.mean
    monkeypatch.setattr(blocks, "mean", lambda function, rows: seen.append(rows) or mean(function, rows))
    jax.clear_caches()
    blocked = run()
    assert seen
    assert set(seen) == {2048 // batch.x[0].nbytes}
    assert blocked.status == plain.status
    np.testing.assert_allclose(blocked.loss, plain.loss, rtol=1e-5)
    np.testing.assert_allclose(blocked.params.w, plain.params.w, rtol=1e-4, atol=1e-6)


def test_a_sum_is_left_as_it_is_and_refused_where_blocks_were_asked_for(monkeypatch):
    batch, start = problem()
    run = partial(descend, total, start, batch, optimizer=1e-5, steps=10, key=jax.random.key(0))
    plain = run(sampling=full_batch())
    monkeypatch.setattr(blocks, "BLOCK", 2048)
    np.testing.assert_array_equal(run(sampling=full_batch()).loss, plain.loss)
    with pytest.raises(ValueError, match="needs a loss that is a mean over the examples"):
        run(sampling=full_batch(rows=100))


@pytest.mark.parametrize(("rows", "error"), [(0, ValueError), (2.5, TypeError), (True, TypeError)])
def test_rows_must_be_a_whole_number_from_1(rows, error):
    with pytest.raises((error, TypeCheckError), match="rows"):
        full_batch(rows=rows)


def test_memory_is_bounded():
    """The gradient of a net with 128 hidden units over 10⁶ rows of 64, as compiled: 256 MB of data come on top."""
    shape = jax.ShapeDtypeStruct
    batch = Batch(shape((10**6, 64), jnp.float32), shape((10**6, 1), jnp.float32))
    start = models.init_two_layer(jax.random.key(0), 64, 128, 1, dtype=jnp.float32)
    gradient = jax.grad(NET)
    plain = jax.jit(gradient).lower(start, batch).compile().memory_analysis()
    rows = blocks.BLOCK // (128 * 4)
    blocked = jax.jit(blocks.mean(gradient, rows)).lower(start, batch).compile().memory_analysis()
    assert blocked.temp_size_in_bytes < 64e6 < 1e9 < plain.temp_size_in_bytes
