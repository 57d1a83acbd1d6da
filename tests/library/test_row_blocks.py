"""Means over all examples in blocks of rows: equal to the plain ones, only for means, and in bounded memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import TypeCheckError

from jaxgrad import losses, means, models
from jaxgrad.descent import descend, row_blocks, small_gradient, small_step
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
@pytest.mark.parametrize(
    ("form", "count"),
    [
        *((row_blocks.mean, rows) for rows in (1, 7, 250, 999, 1000)),
        *((row_blocks.in_parts, k) for k in (1, 8, 500, 1000)),
    ],
)
def test_blocks_and_parts_add_up_to_the_whole(loss, net, form, count):
    batch, start = problem(net=net, dtype=jnp.float64)
    both = jax.value_and_grad(loss)
    plain, pieces = jax.jit(both)(start, batch), jax.jit(form(both, count))(start, batch)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(pieces), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("loss", "n", "least", "expected"),
    [
        (LINEAR, 1000, 2**10, 10),
        (LOGISTIC, 1000, 2**10, 10),
        (LINEAR, 5 * 11 * 13, 2**10, 11),  # 5, 11 and 13 divide it: the one nearest to 10
        (LINEAR, 997, 2**10, 1),  # a prime
        (LINEAR, 1000, 2**20, 1),  # too small to gain
        (total, 1000, 2**10, 1),
        (centred, 1000, 2**10, 1),
        (NET, 1000, 2**10, 1),  # products of two matrices
    ],
)
def test_parts_are_for_means_with_products_of_vectors(loss, n, least, expected, monkeypatch):
    monkeypatch.setattr(row_blocks, "SMALLEST_IN_PARTS", least)
    batch, start = problem(n, net=loss is NET)
    assert row_blocks.parts_for(loss, start, batch) == expected
    monkeypatch.setattr(row_blocks, "BLOCK", 512)  # beyond the cache rows go in blocks, or all at once
    assert row_blocks.parts_for(loss, start, batch) == 1


@pytest.mark.parametrize("stop", [None, small_gradient(0.3, every=5)])
def test_descend_takes_the_full_gradient_in_parts_and_finds_the_same(stop, monkeypatch):
    batch, start = problem()
    run = partial(descend, LINEAR, start, batch, optimizer=0.05, steps=40, stop=stop)
    whole = run(sampling=full_batch(), key=jax.random.key(0))
    monkeypatch.setattr(row_blocks, "SMALLEST_IN_PARTS", 2**10)
    seen = []
    own = row_blocks.in_parts
    monkeypatch.setattr(row_blocks, "in_parts", lambda function, parts: seen.append(parts) or own(function, parts))
    jax.clear_caches()
    parted = run(sampling=full_batch(), key=jax.random.key(0))
    assert set(seen) == {10}
    assert parted.status == whole.status
    np.testing.assert_allclose(parted.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(parted.params.w, whole.params.w, rtol=1e-4, atol=1e-6)
    seen.clear()
    jax.clear_caches()
    run(sampling=distinct(10), key=jax.random.key(0))  # a batch is small
    run(sampling=full_batch(rows=100), key=jax.random.key(0))  # as it was asked for
    run(sampling=full_batch(), key=jax.random.split(jax.random.key(0), 2))  # two runs are products of matrices
    assert not seen


@pytest.mark.parametrize("loss", [LINEAR, LOGISTIC])
@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize(("small", "group"), [(1, 256), (7 * 40, 4), (2**15, 2)])
def test_shares_of_the_cores_add_up_to_the_whole(loss, cores, small, group, monkeypatch):
    batch, start = problem(dtype=jnp.float64)  # 40 bytes an example: blocks of 1, of 7, and of 819 of 1000
    monkeypatch.setattr(row_blocks, "_cores", lambda: cores)
    monkeypatch.setattr(row_blocks, "BLOCK_PER_CORE", small)
    monkeypatch.setattr(row_blocks, "GROUP", group)
    jax.clear_caches()
    slope = row_blocks.on_all_cores(loss, start, batch)
    assert slope is not None
    plain = jax.grad(loss)(start, batch)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(slope(start, batch)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-12, atol=1e-14)


def test_one_core_and_products_of_matrices_take_large_blocks(monkeypatch):
    batch, start = problem()
    monkeypatch.setattr(row_blocks, "_cores", lambda: 1)
    assert row_blocks.on_all_cores(LINEAR, start, batch) is None
    monkeypatch.setattr(row_blocks, "_cores", lambda: 2)
    batch, start = problem(net=True)
    assert row_blocks.on_all_cores(NET, start, batch) is None


@pytest.mark.parametrize(("loss", "expected"), [(LINEAR, True), (LOGISTIC, True), (total, False), (centred, False)])
def test_only_a_mean_over_examples_is_taken_in_blocks(loss, expected, monkeypatch):
    batch, start = problem()
    assert (not means.doubt(loss, start, batch, [1000, 64])) is expected
    assert row_blocks.rows_for(loss, start, batch) is None  # it fits the cache
    monkeypatch.setattr(row_blocks, "BLOCK", 2048)
    rows = row_blocks.rows_for(loss, start, batch)
    assert rows == (2048 // batch.x[0].nbytes if expected else None)


def test_blocks_are_sized_by_what_a_net_keeps(monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK", 2048)
    batch, start = problem(net=True)
    assert row_blocks.rows_for(NET, start, batch) == 2048 // (8 * batch.x.dtype.itemsize)


@pytest.mark.parametrize("stop", [None, small_gradient(0.3, every=5)])
@pytest.mark.parametrize("sampling", [full_batch(), distinct(10)])
def test_descend_chooses_blocks_and_finds_the_same(sampling, stop, monkeypatch):
    batch, start = problem()
    run = partial(
        descend, LINEAR, start, batch, optimizer=0.05, sampling=sampling, steps=40, key=jax.random.key(0), stop=stop
    )
    plain = run()
    monkeypatch.setattr(row_blocks, "BLOCK", 2048)
    seen = []
    mean = row_blocks.mean
    monkeypatch.setattr(row_blocks, "mean", lambda function, rows: seen.append(rows) or mean(function, rows))
    jax.clear_caches()
    blocked = run()
    assert seen  # the gradient of `sampling`, of the rule, and the loss that is recorded
    assert set(seen) == {2048 // batch.x[0].nbytes}
    assert blocked.status == plain.status
    np.testing.assert_allclose(blocked.loss, plain.loss, rtol=1e-5)
    np.testing.assert_allclose(blocked.params.w, plain.params.w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stop", [None, small_step(0.05)])
def test_descend_takes_the_full_gradient_on_all_cores_and_finds_the_same(stop, monkeypatch):
    batch, start = problem()
    optimizer, key = optax.sgd(0.05, momentum=0.5), jax.random.key(0)
    run = partial(descend, LINEAR, data=batch, optimizer=optimizer, sampling=full_batch(), key=key)
    plain = run(params=start, steps=60, stop=stop)
    monkeypatch.setattr(row_blocks, "BLOCK", 2048)
    monkeypatch.setattr(row_blocks, "_cores", lambda: 2)
    asked = []
    own = row_blocks._share
    monkeypatch.setattr(row_blocks, "_share", lambda *args, **options: asked.append(args[2:]) or own(*args, **options))
    shared = run(params=start, steps=60, stop=stop)
    assert shared.status == plain.status
    assert shared.stopped_at == plain.stopped_at
    assert len(asked) == 2 * (shared.stopped_at + 1)  # once to compile, then once a step and core
    np.testing.assert_allclose(shared.loss, plain.loss, rtol=1e-4)
    gone_on = run(params=run(params=start, steps=10).state, steps=20)
    np.testing.assert_array_equal(gone_on.params.w, run(params=start, steps=20).params.w)


def test_on_all_cores_a_run_that_diverges_says_at_which_step(monkeypatch):
    batch, start = problem()
    run = partial(descend, LINEAR, start, batch, optimizer=10.0, sampling=full_batch(), steps=60, key=jax.random.key(0))
    plain = run()
    monkeypatch.setattr(row_blocks, "BLOCK", 2048)
    monkeypatch.setattr(row_blocks, "_cores", lambda: 2)
    assert plain.status.startswith("diverged at step")
    assert run().status == plain.status


def test_a_sum_is_left_as_it_is_and_refused_where_blocks_were_asked_for(monkeypatch):
    batch, start = problem()
    run = partial(descend, total, start, batch, optimizer=1e-5, steps=10, key=jax.random.key(0))
    plain = run(sampling=full_batch())
    monkeypatch.setattr(row_blocks, "BLOCK", 2048)
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
    rows = row_blocks.BLOCK // (128 * 4)
    blocked = jax.jit(row_blocks.mean(gradient, rows)).lower(start, batch).compile().memory_analysis()
    assert blocked.temp_size_in_bytes < 64e6 < 1e9 < plain.temp_size_in_bytes
