"""Operations counted: by hand for small programs, against formulas for chains and nets, beside the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import models
from jaxgrad.losses import half_squared, mean_loss, squared
from jaxgrad.theory import cost
from jaxgrad.types import Batch


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float64)


@pytest.mark.parametrize(
    ("function", "arguments", "expected"),
    [
        (lambda a, b: a @ b, (shape(3, 4), shape(4, 5)), 2 * 3 * 4 * 5),
        (lambda a, b: a @ b, (shape(7), shape(7)), 2 * 7),
        (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (shape(6, 3, 4), shape(6, 4, 5)), 6 * 2 * 3 * 4 * 5),
        (lambda a: jnp.exp(a) + 1.0, (shape(10),), 20),
        (lambda a: jnp.sum(a * a), (shape(10),), 10 + 9),
        (lambda a: jnp.sum(a, axis=1), (shape(4, 5),), 4 * 4),
        (lambda a: jnp.cumsum(a), (shape(10),), 9),
        (lambda a: -a.T.reshape(-1)[::2], (shape(4, 5),), 0),
        (lambda a: jnp.where(a > 0, a, -a), (shape(4),), 0),
        (lambda a: jax.jit(jax.jit(lambda x: x * x))(a) + a, (shape(3),), 6),
        (lambda a: jax.vmap(lambda row: row @ row)(a), (shape(4, 5),), 4 * 2 * 5),
        (lambda a: jax.jit(lambda x: (jnp.arange(3) + 1, x * x))(a), (shape(3),), 3),
        (lambda a: jax.checkpoint(lambda x: x * x)(a), (shape(3),), 3),
        (lambda a: a.at[jnp.array([0, 0, 1])].add(1.0), (shape(5),), 3),
        (lambda a: jax.lax.scan(lambda c, x: (c * x, c + x), 1.0, a), (shape(100),), 200),
        (lambda a: jax.lax.fori_loop(0, 50, lambda i, c: c * a, a), (shape(2),), 100),
        (lambda a: jax.lax.cond(a[0] > 0, lambda x: x * x, lambda x: jnp.exp(x * x), a), (shape(8),), 16),
        (
            lambda a, k: jax.lax.conv_general_dilated(a, k, (1, 1), "VALID"),
            (shape(1, 3, 8, 8), shape(4, 3, 3, 3)),
            2 * (4 * 6 * 6) * (3 * 3 * 3),
        ),
    ],
)
def test_counts_by_hand(function, arguments, expected):
    counted = cost.count(function, *arguments)
    assert counted.total == expected
    assert counted.uncounted == ()
    assert counted.total == counted.matmul + counted.elementwise + counted.reduction


def test_what_the_output_does_not_need_is_not_counted():
    def wasteful(a):
        _ = jnp.exp(a) @ jnp.exp(a)
        used, _ = jax.jit(lambda x: (x * x, jnp.sin(x)))(a)
        return used

    assert cost.count(wasteful, shape(10)).total == 10


def test_what_is_not_understood_is_named():
    assert cost.count(jnp.sort, shape(10)).uncounted == ("sort",)
    with pytest.raises(ValueError, match="any number of times"):
        cost.count(lambda a: jax.lax.while_loop(lambda x: jnp.sum(x) < 1, lambda x: x * x, a), shape(3))


def test_scan_bodies_are_counted_as_often_as_they_run_unlike_the_compilers_figure():
    def power(a, length):
        return jax.lax.scan(lambda c, _: (c @ a, None), a, length=length)[0]

    ours = [cost.count(lambda a, n=n: power(a, n), shape(16, 16)).total for n in (1, 10, 100)]
    assert ours == [2 * 16**3 * n for n in (1, 10, 100)]
    compiled = jax.jit(lambda a: power(a, 100)).lower(shape(16, 16)).compile().cost_analysis()
    assert compiled["flops"] < 0.05 * ours[2]


def test_matrix_products_agree_with_the_compiler():
    sizes = (64, 128, 32, 8)
    params = models.init_deep(jax.random.key(0), sizes, dtype=jnp.float64)
    batch = Batch(jnp.ones((256, 64)), jnp.ones((256, 8)))
    gradient = jax.grad(mean_loss(models.deep, half_squared))
    compiled = jax.jit(gradient).lower(params, batch).compile().cost_analysis()["flops"]
    assert cost.count(gradient, params, batch).total == pytest.approx(compiled, rel=0.05)


@pytest.mark.parametrize("sizes", [(50, 1), (50, 20, 3), (10, 30, 30, 30, 5)])
def test_dense_nets_cost_what_the_ratio_says(sizes):
    params = models.init_deep(jax.random.key(0), sizes)
    batch = Batch(jnp.ones((40, sizes[0]), jnp.float32), jnp.ones((40, sizes[-1]), jnp.float32))
    loss = mean_loss(models.deep, squared)
    forward = cost.count(loss, params, batch)
    both = cost.count(jax.value_and_grad(loss), params, batch)
    assert both.matmul / forward.matmul == pytest.approx(cost.dense_ratio(sizes), rel=1e-12)
    # The cheap gradient: all operations, at most five times those of the value (Griewank & Walther 2008).
    assert both.total <= 5 * forward.total
    # Forward mode: one tangent per parameter.
    tangents = sum(leaf.size for leaf in jax.tree.leaves(params))
    forward_mode = cost.count(jax.jacfwd(loss), params, batch)
    assert forward_mode.total > tangents * forward.total


def test_dense_ratio_ends():
    assert cost.dense_ratio((100, 1)) == 2
    assert cost.dense_ratio((10,) * 50) == pytest.approx(3, abs=0.03)
    with pytest.raises(ValueError, match="input and an output"):
        cost.dense_ratio((3,))


# --- the chain of scalar layers --------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [1, 2, 3, 8, 32])
def test_the_chain_costs_exactly_what_the_formulas_say(L):
    counted = cost.chain_operations(L)
    assert counted == cost.ChainOperations(
        forward=2 * L + 2,
        backprop=5 * L + 1,
        separate_shared=L**2 + 5 * L,
        separate=2 * L**2 + 4 * L,
        forward_mode=4 * L**2 + 5 * L,
        finite_differences=(L + 1) * (2 * L + 2) + 3 * L,
    )
    # Linear beside quadratic: a formula one operation a layer off would not pass.
    assert counted.backprop != 5 * L + 1 + L


@pytest.mark.parametrize("L", [1, 2, 7])
def test_all_ways_compute_the_same_derivatives(L):
    w, x, y = [float(v) for v in np.linspace(-1.2, 1.5, L)], 0.7, 0.3
    loss, h, error = cost.chain_forward(w, x, y)
    expected = jax.grad(lambda w: cost.chain_forward(w, x, y)[0])(w)
    for gradient in (
        cost.chain_backprop(w, h, error),
        cost.chain_separate(w, h, y, share_slopes=True),
        cost.chain_separate(w, h, y, share_slopes=False),
        cost.chain_forward_mode(w, x, y),
    ):
        np.testing.assert_allclose(gradient, expected, rtol=1e-13, atol=1e-16)
    np.testing.assert_allclose(cost.chain_finite_differences(w, x, y), expected, atol=1e-5)
    assert float(loss) == pytest.approx(float(error) ** 2)


def test_indexing_one_array_makes_backprop_quadratic():
    """Each w[i] becomes a vector of zeros with one entry in the backward pass, and L of them are added."""

    def indexed(w):
        h = 0.7
        for i in range(w.shape[0]):
            h = jnp.tanh(w[i] * h)
        return (h - 0.3) ** 2

    def listed(w):
        h = 0.7
        for weight in w:
            h = jnp.tanh(weight * h)
        return (h - 0.3) ** 2

    def scanned(w):
        h = jax.lax.scan(lambda h, v: (jnp.tanh(v * h), None), jnp.asarray(0.7), w)[0]
        return (h - 0.3) ** 2

    def total(function, L, as_list=False):
        w = jnp.ones(L)
        counted = cost.count(jax.grad(function), list(w) if as_list else w)
        assert counted.uncounted == ()
        return counted.total

    lengths = (16, 32, 64)
    by_index = [total(indexed, L) for L in lengths]
    by_list = [total(listed, L, as_list=True) for L in lengths]
    by_scan = [total(scanned, L) for L in lengths]
    # Reference counts of the list: 8L + 2, or 7L + 2 where JAX has 1 − h² as one primitive.
    assert all(t in (8 * L + 2, 7 * L + 2) for t, L in zip(by_list, lengths, strict=True))
    assert np.ptp(np.diff(by_list) / np.diff(lengths)) == 0
    assert np.ptp(np.diff(by_scan) / np.diff(lengths)) == 0
    assert [i - l for i, l in zip(by_index, by_list, strict=True)] == [L * (L - 1) for L in lengths]


def test_a_chain_needs_a_layer():
    with pytest.raises(ValueError, match="layers must be at least 1"):
        cost.chain_operations(0)
