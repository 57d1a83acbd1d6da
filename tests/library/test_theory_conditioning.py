"""Conditioning: axis-aligned remedies against optax's own optimizers, and what a rotation does to them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad.theory import conditioning as cd
from jaxgrad.theory import least_squares as ls
from jaxgrad.types import Batch

START = np.array([1.3, -0.7])


def run(optimizer, H: np.ndarray, steps: int, start: np.ndarray = START) -> np.ndarray:
    """The path of an optax optimizer on ½ dᵀHd."""
    H = jnp.asarray(H)

    def step(carry, _):
        d, state = carry
        update, state = optimizer.update(H @ d, state, d)
        d = optax.apply_updates(d, update)
        return (d, state), d

    d = jnp.asarray(start)
    with jax.numpy_dtype_promotion("standard"):
        _, path = jax.jit(lambda d: jax.lax.scan(step, (d, optimizer.init(d)), length=steps))(d)
    return np.concatenate([start[None, :], np.asarray(path)])


ADAPTIVE = {
    "adagrad": (lambda eta, eps: optax.adagrad(eta, initial_accumulator_value=0.0, eps=eps), cd.adagrad_path),
    "rmsprop": (lambda eta, eps: optax.rmsprop(eta, decay=0.9, eps=eps), cd.rmsprop_path),
    "adam": (lambda eta, eps: optax.adam(eta, eps=eps), cd.adam_path),
}


def test_gd_contracts_each_eigen_direction():
    H = cd.rotated([3.0, 0.05], 0.4)
    lam, V = np.linalg.eigh(H)
    t = np.arange(0, 101, 20)
    path = run(optax.sgd(0.5), H, 100)[t] @ V
    np.testing.assert_allclose(path, (START @ V)[None, :] * cd.contraction(lam, 0.5, t), atol=1e-12)
    faulty = (START @ V)[None, :] * cd.contraction(lam, 0.51, t)
    assert np.abs(path - faulty).max() > 1e-3


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("curvatures", [(1.0, 1.0), (4.0, 0.25), (1e3, 1.0)])
def test_adaptive_methods_do_not_see_the_curvature_of_the_axes(name, curvatures):
    make, predict = ADAPTIVE[name]
    path = run(make(0.05, 0.0), np.diag(curvatures), 60)
    np.testing.assert_allclose(path, predict(START, 0.05, 60), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_rotation_or_an_epsilon_breaks_that(name):
    make, predict = ADAPTIVE[name]
    turned = run(make(0.05, 0.0), cd.rotated([1e3, 1.0], math.pi / 4), 60)
    assert np.abs(turned - predict(START, 0.05, 60)).max() > 0.05
    eps = run(make(0.05, 1e-8), np.diag([1e-8, 1e-8]), 60)
    assert np.abs(eps - predict(START, 0.05, 60)).max() > 0.01


def test_first_steps():
    sign = np.sign(START)
    np.testing.assert_allclose(cd.adagrad_path(START, 0.1, 1)[1], START - 0.1 * sign)
    np.testing.assert_allclose(cd.adam_path(START, 0.1, 1)[1], START - 0.1 * sign)
    np.testing.assert_allclose(cd.rmsprop_path(START, 0.1, 1)[1], START - 0.1 / math.sqrt(0.1) * sign)
    assert np.all(cd.rmsprop_path([0.0, 1.0], 0.1, 5)[:, 0] == 0)


@pytest.mark.parametrize("eta", [0.1, 0.01])
def test_rmsprop_ends_in_a_cycle_of_half_a_step(eta):
    path = run(optax.rmsprop(eta, decay=0.9, eps=1e-30), np.diag([10.0, 0.1]), 3000)
    np.testing.assert_allclose(np.abs(path[-2:]), cd.rmsprop_cycle(eta), rtol=1e-6)
    np.testing.assert_allclose(path[-1], -path[-2], rtol=1e-6)


def test_jacobi_is_feature_scaling():
    rng = np.random.default_rng(0)
    batch = Batch(rng.normal(size=(40, 3)) * [1.0, 30.0, 0.1] + [0.0, 5.0, 0.0], rng.normal(size=40))
    original, (scaled, scale) = ls.problem(batch), cd.rescaled(batch)
    H = 2 / 40 * original.X.T @ original.X
    w, eta = np.zeros(4), 0.3
    for _ in range(50):
        gradient = -2 / 40 * original.X.T @ (original.y - original.X @ w)
        w = w - 2 * eta * gradient / np.diag(H)
    np.testing.assert_allclose(ls.gd_path(scaled, np.zeros(4), eta, [50])[0] / scale, w, rtol=1e-10)
    np.testing.assert_allclose(scaled.value, original.value, rtol=1e-12)
    assert ls.condition_number(scaled) == pytest.approx(cd.jacobi_condition_number(H), rel=1e-9)
    assert ls.condition_number(scaled) < 1e-3 * ls.condition_number(original)


def test_centring_matters_as_much_as_scaling():
    x = 10 + np.random.default_rng(1).normal(size=(500, 2)) * [1.0, 20.0]
    y = np.zeros(500)
    raw = ls.condition_number(ls.problem(Batch(x, y)))
    scaled = ls.condition_number(cd.rescaled(Batch(x, y)).problem)
    centred = ls.condition_number(cd.rescaled(Batch(x - x.mean(axis=0), y)).problem)
    assert raw > 10 * scaled > 100 * centred


def test_jacobi_undoes_axes_and_nothing_at_45_degrees():
    for kappa in (10.0, 1e4):
        aligned, turned = cd.rotated([kappa, 1.0], 0.0), cd.rotated([kappa, 1.0], math.pi / 4)
        assert cd.condition_number(turned) == pytest.approx(kappa, rel=1e-9)
        assert cd.jacobi_condition_number(aligned) == pytest.approx(1)
        assert cd.jacobi_condition_number(turned) == pytest.approx(kappa, rel=1e-8)
    # A little rotation is enough: two correlated features.
    H = cd.rotated([1e4, 1.0], 0.1)
    rho = H[0, 1] / math.sqrt(H[0, 0] * H[1, 1])
    assert cd.jacobi_condition_number(H) == pytest.approx((1 + abs(rho)) / (1 - abs(rho)), rel=1e-9)
    assert cd.jacobi_condition_number(H) == pytest.approx(397, rel=0.01)
    assert cd.jacobi_condition_number(cd.rotated([1e4, 1.0], 0.01)) == pytest.approx(5.8, rel=0.01)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: cd.condition_number(np.diag([1.0, -1.0])), "positive definite"),
        (lambda: cd.condition_number(np.ones((2, 3))), "symmetric"),
        (lambda: cd.rotated([1.0, 2.0, 3.0], 0.1), "two eigenvalues"),
        (lambda: cd.rescaled(Batch(np.array([[1.0, 0.0], [2.0, 0.0]]), np.ones(2))), "column 1"),
    ],
)
def test_refuses_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
