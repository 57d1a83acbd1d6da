"""The experiment `formulas`: its ruler measures what it says, and a fault in the lecture does not pass."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import formulas
from jaxgrad import lecture

SMALL = formulas.Config(seeds=2, shapes=((5, 5, 5, 5),), training=5, steps=4, logits=10)


def worst_units(family, id, series="must be"):
    table = formulas.compare(family)
    return max(
        float(np.max(column["units"])) for column in table if column["id"][0] == id and column["series"][0] == series
    )


def one_number(by_hand, exact, x):
    """A family of one formula of one number, at three points."""
    check = formulas.Check("F0", "form", "must be", lambda m, _: by_hand(m["x"]), "exact")
    reference = formulas.Reference(lambda m, _: exact(m["x"]))
    return formulas.Family((1, 1, 1, 1), {"x": np.full(3, x)}, {}, {"exact": reference}, [check])


def test_a_unit_is_a_rounding_times_the_condition():
    # x − 1 at x = 1 + 1/64: its condition number is x/(x − 1) = 65, and 65² + 1 = 4226.
    error = 2.0**-45
    shifted = one_number(lambda x: (x - 1) + error, lambda x: x - 1, 1 + 1 / 64)
    assert worst_units(shifted, "F0") == pytest.approx(error * 64 / formulas.EPS / 4226**0.5, rel=1e-6)
    assert worst_units(one_number(lambda x: x, lambda x: x, 3.0), "F0") == 0


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_norms_do_not_overflow(size):
    tree = (np.full((1, 3), size), np.full((1, 2, 3), size))
    assert formulas.norm(tree) == pytest.approx(size * 3)
    assert formulas.ratio(jax.tree.map(lambda leaf: 0.5 * leaf, tree), tree) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "id", "family"),
    [
        ("linear_gradient", "F4", formulas.linear_family),
        ("objective_gradient", "F1", formulas.linear_family),
        ("half_squared_adjoint", "F9", formulas.functional_family),
        ("output_layer_gradient", "F12", lambda shape, config: formulas.two_layer_family(shape, config, 0)),
        ("hidden_layer_gradient", "F13", lambda shape, config: formulas.two_layer_family(shape, config, 1)),
        ("logistic_gradient_signed", "F16", formulas.logistic_family),
    ],
)
def test_a_fault_of_1e_12_is_many_units(monkeypatch, name, id, family):
    right = getattr(lecture, name)
    shape = SMALL.shapes[0]
    assert worst_units(family(shape, SMALL), id) <= formulas.LIMIT
    wrong = lambda *a: jax.tree.map(lambda leaf: (1 + 1e-12) * leaf, right(*a))
    monkeypatch.setattr(lecture, name, wrong)
    assert worst_units(family(shape, SMALL), id) > formulas.LIMIT


def test_first_nan_is_exact_to_the_last_place():
    for dtype in formulas.DTYPES:
        edge = np.asarray(16.25, dtype)
        form = lambda y, h, edge=edge: jnp.where(jnp.asarray(h) >= edge, jnp.nan, jnp.asarray(y))
        assert formulas.first_nan(form, 1, dtype, 60) == 16.25


def test_the_predicted_logits():
    """53 ln 2, −log(largest), log(smallest normal), to the last place; and 24 ln 2 in float32."""
    assert formulas.predicted_logits("float64") == (36.7368005696771, -709.782712893384, -708.3964185322641)
    assert formulas.predicted_logits("float32")[0] == float(np.float32(16.635532333))


def test_the_logits_of_the_error_curve_are_the_same_on_every_machine():
    """Rounded: NumPy's `geomspace` itself has another last bit on another processor, and so had the errors."""
    code = "from experiments import formulas; print(formulas.logit_curves(200)['curve/logit'].tobytes().hex())"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NPY_DISABLE_CPU_FEATURES": features},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for features in ("", "X86_V3 X86_V4 AVX512_ICL AVX512_SPR")
    }
    assert len(said) == 1
