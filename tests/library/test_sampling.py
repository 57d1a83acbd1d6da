"""Samplings: the right law (inclusions, independence, orders), and the same indices however they are drawn."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgrad import sampling
from jaxgrad.sampling import _scaled, _stream, _words, distinct, full_batch, permuted, reshuffled, with_replacement

SMALL, LARGE = 12, 97  # below and beyond EXACT_UP_TO: by sorting, and by the bijection
KINDS = [with_replacement, distinct, reshuffled]
ALPHA = 1e-4  # of one test; about forty of them here: a right sampler fails once in 250 changes of the code


def draws(kind, b, n, steps, seed=0):
    """Indices `[steps, b]` of consecutive steps."""
    draw = jax.jit(jax.vmap(lambda t: kind(b).indices(jax.random.key(seed), t, n)))
    return np.asarray(draw(jnp.arange(steps)))


def assert_uniform(counts, cells=None):
    counts = np.asarray(counts).ravel()
    assert stats.chisquare(counts).pvalue > ALPHA, counts[:20]


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("kind", KINDS)
def test_every_example_is_as_likely(kind, n):
    """Single inclusion rate b/n."""
    assert_uniform(np.bincount(draws(kind, 5, n, 40_000).ravel(), minlength=n))


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("kind", [distinct, reshuffled])
def test_every_pair_is_as_likely(kind, n):
    """Pair inclusion rate b(b−1)/(n(n−1)), which sets the covariance of the minibatch gradient."""
    batches = draws(kind, 3, n, 200_000)
    pairs = np.concatenate([batches[:, [i, j]] for i, j in itertools.permutations(range(3), 2)])
    counts = np.bincount(pairs[:, 0] * n + pairs[:, 1], minlength=n * n).reshape(n, n)
    assert np.trace(counts) == 0, "an example twice in one batch"
    # Both orders of a pair are counted, and three pairs of one batch are dependent: test positions (0, 1) too.
    assert_uniform(np.triu(counts, 1)[np.triu_indices(n, 1)])
    ordered = np.bincount(batches[:, 0] * n + batches[:, 1], minlength=n * n).reshape(n, n)
    assert_uniform(ordered[~np.eye(n, dtype=bool)])


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_with_replacement_draws_are_independent_within_a_batch(n):
    batches = draws(with_replacement, 2, n, 200_000)
    assert_uniform(np.bincount(batches[:, 0] * n + batches[:, 1], minlength=n * n))


@pytest.mark.parametrize("n", [SMALL, LARGE])
@pytest.mark.parametrize("kind", [with_replacement, distinct])
def test_steps_are_independent(kind, n):
    first = draws(kind, 4, n, 200_001)[:, 0]
    assert_uniform(np.bincount(first[:-1] * n + first[1:], minlength=n * n))


@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_passes_are_independent(n):
    first = draws(reshuffled, n, n, 100_001)[:, 0]
    assert_uniform(np.bincount(first[:-1] * n + first[1:], minlength=n * n))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_all_orders_of_few_examples_are_exactly_as_likely(n):
    code = n ** np.arange(n)
    orders = [int(np.dot(order, code)) for order in itertools.permutations(range(n))]
    for kind in (distinct, reshuffled):
        drawn = draws(kind, n, n, 2_000 * math.factorial(n)) @ code
        values, counts = np.unique(drawn, return_counts=True)
        assert sorted(orders) == values.tolist()
        if n > 1:
            assert_uniform(counts)


@pytest.mark.parametrize("n", [1, 2, 5, 64, 65, 66, 97, 100, 1000, 1009, 53_917, 3 * 2**12])
def test_a_random_order_is_a_bijection(n):
    order = jax.jit(lambda i: permuted(_stream(jax.random.key(n), 0), i, n))(np.arange(n, dtype=np.int32))
    np.testing.assert_array_equal(np.sort(order), np.arange(n))


def test_a_reshuffled_pass_sees_every_example_once_and_passes_differ():
    n, b = 96, 8
    steps = draws(reshuffled, b, n, 3 * n // b).reshape(3, n)
    for one_pass in steps:
        np.testing.assert_array_equal(np.sort(one_pass), np.arange(n))
    assert (steps[0] != steps[1]).any()
    assert (steps[1] != steps[2]).any()


def test_the_incomplete_batch_of_a_pass_is_dropped():
    n, b = 100, 30
    passes = draws(reshuffled, b, n, 3 * 200).reshape(200, 3 * b)
    assert all(len(set(one.tolist())) == 3 * b for one in passes)
    # Which ones are left out changes from pass to pass.
    assert len(set(range(n)).intersection(*map(set, passes.tolist()))) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [SMALL, LARGE])
def test_the_same_indices_alone_jitted_vmapped_and_in_any_chunking(kind, n):
    s, keys, steps = kind(5), jax.random.split(jax.random.key(3), 4), 18
    one = jax.jit(lambda key, t: s.indices(key, t, n))
    alone = np.array([[one(key, t) for t in range(steps)] for key in keys])
    np.testing.assert_array_equal(s.indices(keys[0], 0, n), alone[0, 0])  # without jit
    np.testing.assert_array_equal(s.ahead(keys[0], 1, 2, n), alone[0, 1:3])
    over_steps = jax.vmap(lambda key, t: s.indices(key, t, n), (None, 0))
    over_keys = jax.jit(jax.vmap(over_steps, (0, None)))
    np.testing.assert_array_equal(over_keys(keys, jnp.arange(steps)), alone)
    resumed = np.concatenate([over_keys(keys, jnp.arange(9)), over_keys(keys, jnp.arange(9, steps))], axis=1)
    np.testing.assert_array_equal(resumed, alone)
    scanned = jax.lax.scan(lambda c, t: (c, s.indices(keys[0], t, n)), 0, jnp.arange(steps))[1]
    np.testing.assert_array_equal(scanned, alone[0])
    assert len({tuple(row) for row in alone.reshape(-1, 5).tolist()}) == 4 * steps, "keys and steps differ"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("n", "b"), [(SMALL, 1), (SMALL, 5), (SMALL, 12), (LARGE, 1), (LARGE, 5), (LARGE, 50), (10**6, 8)]
)
def test_many_steps_at_once_are_the_steps_one_by_one(kind, n, b):
    """Whatever pass they begin in, however many passes they touch, for a first step known or traced, for many keys."""
    s, keys, many = kind(b), jax.random.split(jax.random.key(3), 2), np.arange(40, dtype=np.int32)
    one_by_one = jax.jit(jax.vmap(jax.vmap(lambda key, t: s.indices(key, t, n), (None, 0)), (0, None)))
    begins = (0, 1, n // b - 1, 4, 7 * (n // b) + 3)
    expected = {first: one_by_one(keys, first + many) for first in begins}
    # A first step that is known compiles once for each.
    for steps, firsts in ((1, (4,)), (2, begins), (40, (0, begins[-1]))):
        ahead = jax.jit(jax.vmap(lambda key, first, steps=steps: s.ahead(key, first, steps, n), (0, None)))
        for first in begins:
            np.testing.assert_array_equal(ahead(keys, np.int32(first)), expected[first][:, :steps])
        known = jax.jit(lambda key, at=firsts, steps=steps: [s.ahead(key, first, steps, n) for first in at])(keys[0])
        for first, of_known in zip(firsts, known, strict=True):
            np.testing.assert_array_equal(of_known, expected[first][0, :steps])


@pytest.mark.parametrize("n", [1, 3, 65_535, 65_536, 10**7, 2**30 + 7, 2**31 - 1])
def test_random_words_are_scaled_as_python_scales_them(n):
    """32 × 31 bits in 32-bit arithmetic, and the 64-bit fraction of a draw with its carry, for every size of n."""
    words = np.r_[np.random.default_rng(n).integers(0, 2**32, 5000), 0, 1, 65_535, 65_536, 2**32 - 1].astype(np.uint32)
    assert np.asarray(_scaled(jnp.asarray(words), n)).tolist() == [int(word) * n >> 32 for word in words]
    b, key = 5000, jax.random.key(n)
    high, low = np.asarray(_words(_stream(key, 4), 2 * b)).astype(object).reshape(2, b)
    exact = [(int(h) * 2**32 + int(low)) * n >> 64 for h, low in zip(high, low, strict=True)]
    assert with_replacement(b).indices(key, 4, n).tolist() == exact


def test_full_batch_is_every_example_in_order(key):
    np.testing.assert_array_equal(full_batch().indices(key, 3, 5), np.arange(5))


def test_no_array_of_size_n_is_made_in_a_step(key):
    """O(b) whatever n: the jaxpr of a draw holds nothing larger than a few times b."""
    n, b = 10**8, 32

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in eqn.outvars)
            for value in jax.tree.leaves(list(eqn.params.values())):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    for kind in KINDS:
        jaxpr = jax.make_jaxpr(lambda t, kind=kind: kind(b).indices(key, t, n))(0)
        assert 1 <= max(sizes(jaxpr.jaxpr)) <= 4 * b


def test_a_biased_sampler_is_caught():
    """The uniformity tests can fail: a sampler that misses one example in a thousand draws does."""
    rng = np.random.default_rng(0)
    indices = rng.integers(0, LARGE, 200_000)
    biased = np.where((indices == 7) & (rng.random(200_000) < 0.1), 8, indices)
    assert_uniform(np.bincount(indices, minlength=LARGE))
    with pytest.raises(AssertionError):
        assert_uniform(np.bincount(biased, minlength=LARGE))


def test_equal_samplings_are_equal_so_programs_are_shared():
    assert distinct(8) == distinct(8)
    assert hash(distinct(8)) == hash(distinct(8))
    assert distinct(8) != distinct(9)
    assert distinct(8) != reshuffled(8)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_batch_sizes(kind, key):
    with pytest.raises(ValueError, match="b must be at least 1, got 0"):
        kind(0)
    with pytest.raises(TypeError, match="True"):
        kind(True)
    if kind is not with_replacement:
        with pytest.raises(ValueError, match="cannot draw b = 9 different examples out of n = 8"):
            kind(9).indices(key, 0, 8)
    with pytest.raises(ValueError, match="n must be from 1 to"):
        sampling.check_sizes(kind(1), 0)
