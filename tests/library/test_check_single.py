"""A NumPy loss that rounds to float32: its differences are bounded by that rounding."""

import numpy as np

from jaxgrad.check import check_gradient
from jaxgrad.check.numerics.central import central


def test_the_bound_on_a_slope_covers_the_rounding_of_float32() -> None:
    for seed in range(200):
        a, b, c = np.random.default_rng(seed).standard_normal(3)
        slope, bound = central(lambda h, a=a, b=b, c=c: float(np.float32(3 + a * h + b * h**2 + c * h**3)))
        assert abs(slope - a) <= bound


def test_the_bound_stays_narrow_in_float64() -> None:
    slope, bound = central(lambda h: 3 + 0.7 * h + h**2)
    assert abs(slope - 0.7) <= bound < 1e-9


def test_a_wrong_factor_is_still_found_in_float32() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((10, 3)).astype(np.float32), rng.standard_normal(10).astype(np.float32)
    report = check_gradient(
        lambda w, b: np.float32(np.mean((b[0] @ w.astype(np.float32) - b[1]) ** 2)),
        lambda w, b: b[0].T @ (b[0] @ w - b[1]) / len(b[1]),
        np.ones(3, np.float32),
        (x, y),
    )
    assert not report.ok
