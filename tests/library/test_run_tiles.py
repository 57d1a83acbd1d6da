"""Tiles: all runs are in one, none is too large, and what a program needs is what it says."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrad.descent import run_tiles

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=2).map(tuple)


@given(SIZES, st.integers(0, 2000))
def test_tiles_fit_and_cover_all_runs(shape, fit):
    tile = run_tiles.tile_of(shape, fit)
    assert all(min(2, n) <= own <= n for own, n in zip(tile, shape, strict=True))
    assert np.prod(tile) <= max(fit, 2 ** len(shape))
    if fit >= np.prod(shape):
        assert tile == shape
    if len(shape) == 2 and tile[0] < shape[0]:
        assert tile[1] == min(2, shape[1])  # the seeds are cut first
    times = np.zeros(shape, int)
    places = run_tiles.places(shape, tile)
    for place in places:
        assert times[place].shape == tile
        times[place] += 1
    assert times.min() == 1
    assert len(places) == np.prod([-(-n // own) for n, own in zip(shape, tile, strict=True)])


@pytest.mark.parametrize("shape", [(30,), (6, 5)])
def test_a_tile_takes_no_more_memory_than_it_may(shape):
    """Per run, the product of a matrix and a vector: 32 KiB that are in none of the arguments."""
    traced = []

    @partial(jax.jit, static_argnames=("power",))
    def program(w, shared, x, *, power):
        traced.append(w.shape)
        return {"sum": jnp.sin(jnp.sort(w @ x.T)).sum(axis=-1) * shared, "step": jnp.int32(power)}

    x, w = np.linspace(0, 1, 8192)[:, None], np.arange(30.0).reshape(*shape, 1)
    every = tuple(range(len(shape)))
    run = lambda memory: run_tiles.in_tiles(partial(program), shape, (every, (), ()), memory)(w, 2.0, x, power=3)
    whole = run(1.0)
    assert traced == [w.shape]
    assert isinstance(whole["sum"], jax.Array)
    last = 30
    for memory in (1e-3, 5e-4, 3e-4):
        traced.clear()
        tiled = run(memory)
        assert len(traced) <= 2  # all runs to be measured, once, and one program for all tiles
        own = traced[-1]
        assert np.prod(own) < last
        last = np.prod(own)
        usage = program.lower(np.ones(own), 2.0, x, power=3).compile().memory_analysis()
        assert usage.temp_size_in_bytes + usage.output_size_in_bytes <= memory * 2**30
        assert usage.temp_size_in_bytes > 0.4 * memory * 2**30  # not smaller than need be
        assert isinstance(tiled["sum"], np.ndarray)
        np.testing.assert_array_equal(tiled["sum"], whole["sum"])
        assert tiled["step"] == 3
