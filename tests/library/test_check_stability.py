"""stability: thresholds that theory gives to the last bit, and a truth that rounds nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.check import stability


def printed(h, y):
    p = 1 / (1 + jnp.exp(-h))
    return -(y / p - (1 - y) / (1 - p)) * p * (1 - p)


def signed(h, y):
    s = 2 * y - 1
    return -s * jax.nn.sigmoid(-s * h)


@pytest.mark.parametrize(
    ("label", "sign", "single", "double"),
    [
        # p rounds to 1 from h = 24 ln 2 on in float32 and from 53 ln 2 on in float64 ...
        (1.0, 1.0, 24 * np.log(2), 53 * np.log(2)),
        (0.0, 1.0, 24 * np.log(2), 53 * np.log(2)),
        # ... and exp(-h) overflows at ln of the largest number, or p is flushed to zero at that of the smallest
        (1.0, -1.0, 88.722839, 709.782712893384),
        (0.0, -1.0, 88.722839, 709.782712893384),
    ],
)
def test_the_lecture_s_form_fails_where_rounding_says(label, sign, single, double):
    found = stability(lambda h, y: printed(sign * h, y), 1.0, label)
    flushed = {"float32": 126 * np.log(2), "float64": 1022 * np.log(2)}
    for name, expected, rel in (("float32", single, 1e-6), ("float64", double, 1e-12)):
        options = [expected] if sign > 0 else [expected, flushed[name]]
        assert any(found.fails[name] == pytest.approx(x, rel=rel) for x in options)
    assert found.where
    assert "turns NaN or infinite from" in str(found)


def test_the_signed_form_keeps_all_digits_and_the_difference_loses_them():
    good = stability(signed, 1.0, 1.0, scales=(1.0, 10.0, 30.0, 80.0))
    assert good.half == {"float32": None, "float64": None}
    assert all(row.digits64 > 14 for row in good.rows)
    lossy = stability(lambda h, y: jax.nn.sigmoid(h) - y, 1.0, 1.0)
    assert lossy.fails == {"float32": None, "float64": None}
    assert lossy.half["float32"] == 10.0
    assert lossy.half["float64"] == 20.0


def test_the_exact_truth_is_exact():
    found = stability(signed, 1.0, 1.0, scales=(1.0, 50.0, 200.0))
    for row in found.rows:
        assert row.truth == pytest.approx(1 / (1 + np.exp(row.scale)), rel=1e-15)


def test_matrices_and_softmax_and_a_stable_form():
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(4, 3)), np.eye(2)[[0, 1, 1, 0]]
    W = rng.normal(size=(3, 2))

    def naive(W, batch):
        X, Y = batch
        e = jnp.exp(X @ W)
        return X.T @ (e / jnp.sum(e, axis=1, keepdims=True) - Y)

    def safe(W, batch):
        X, Y = batch
        return X.T @ (jax.nn.softmax(X @ W, axis=1) - Y)

    found = stability(naive, W, (X, Y))
    assert "decimals" in found.exact
    assert found.fails["float64"] is not None
    assert stability(safe, W, (X, Y)).fails["float64"] is None
    by_numpy = stability(lambda W, b: np.asarray(naive(np.asarray(W), b)), W, (X, Y), stable=safe)
    assert "stable form" in by_numpy.exact
    assert by_numpy.fails["float64"] == pytest.approx(found.fails["float64"], rel=1e-6)


def test_what_cannot_be_used_is_explained():
    with pytest.raises(ValueError, match="pass stable="):
        stability(lambda h: jax.scipy.special.bessel_jn(h, v=2)[0], 1.0)
    with pytest.raises(ValueError, match="finite"):
        stability(signed, 1.0, 1.0, scales=(np.inf,))
