"""The comparisons of the noise experiments can fail: each planted fault is caught by the one that should catch it.

The faults (1/n dropped, the sampling swapped, η off by 2 %, the γ of the other sampling) are planted in the theory
that the runs are compared with; the runs are the library's own.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import escape as escapes
from experiments import expected_path, gradient_noise, no_guarantee, samplings
from jaxgrad import data, losses, models, noise, statistics
from jaxgrad.descent import descend
from jaxgrad.sampling import distinct, full_batch, reshuffled, with_replacement
from jaxgrad.theory import escape, least_squares
from jaxgrad.types import Batch

SEEDS, B, STEPS = 30_000, 16, np.array([2, 8, 40])
LIMIT = statistics.z_limit(len(STEPS))


@pytest.fixture(scope="module")
def paths():
    """Runs of SGD on 80 real examples, two coefficients, b = 16 different examples a step."""
    few, _ = expected_path.few_features(data.load("diabetes"), 1, None)
    batch = Batch(few.x[:80], few.y[:80])
    problem, start = least_squares.problem(batch), models.init_linear(1)
    eta = float(np.float32(0.3 * least_squares.sgd_edge(problem, distinct(B))))
    keys = jax.random.split(jax.random.key(1), SEEDS)
    record = jnp.asarray(STEPS, jnp.int32)
    runs = expected_path.runs_of(keys, jnp.float32(eta), batch, record, start, sampling=distinct(B))
    gaps = least_squares.excess_loss(problem, np.asarray(runs, float).reshape(-1, 2)).reshape(SEEDS, -1)
    return SimpleNamespace(problem=problem, batch=batch, start=start, eta=eta, gaps=gaps)


def path_z(paths, *, problem=None, eta=None, sampling=None):
    """The largest deviation of the mean path from a prediction that may hold a fault."""
    seen = expected_path.compare(
        problem or paths.problem, paths.start, eta or paths.eta, sampling or distinct(B), STEPS, paths.gaps, "case"
    )
    return np.abs(expected_path.mean_z(seen, "case")).max(), np.abs(expected_path.square_z(seen, "case")).max()


class TestExpectedPath:
    def test_the_right_prediction_is_met(self, paths):
        assert max(path_z(paths)) <= LIMIT

    def test_the_sampling_swapped_is_caught(self, paths):
        """γ = 1/b in place of (n − b)/(b(n − 1)), and any other batch size."""
        for other in (with_replacement(B), distinct(B + 2), distinct(B - 2)):
            assert path_z(paths, sampling=other)[0] > LIMIT

    def test_a_step_size_two_percent_off_is_caught(self, paths):
        for factor in (0.98, 1.02):
            assert path_z(paths, eta=factor * paths.eta)[0] > LIMIT

    def test_the_mean_dropped_is_caught(self, paths):
        """Without its 1/n the loss is the sum: the same descent at n times the step size."""
        n = len(paths.batch.y)
        assert path_z(paths, eta=paths.eta * n)[0] > LIMIT

    def test_another_batch_than_the_one_descended_is_caught(self, paths):
        other = least_squares.problem(Batch(paths.batch.x, paths.batch.y[::-1]))
        assert path_z(paths, problem=other)[0] > LIMIT

    def test_the_band_has_the_mean_and_deviation_it_is_given(self):
        """At shape 1 the gamma distribution is exponential: quantiles −log(1 − q)."""
        low, high = expected_path.gamma_band(np.array([2.0]), np.array([2.0]))
        np.testing.assert_allclose([low[0], high[0]], [-2 * np.log(0.9), -2 * np.log(0.1)], rtol=1e-10)


@pytest.fixture(scope="module")
def numbers():
    """One real problem, n = 40 and b = 16, measured by the experiment's own route."""
    few = data.load("diabetes").batch
    batch = Batch(jnp.asarray(few.x[:40]), jnp.asarray(few.y[:40]))
    loss = losses.mean_loss(models.linear, losses.squared)
    problem = gradient_noise.Problem("case", "", loss, models.init_linear(10), batch, 0.05)
    config = gradient_noise.Config(batch_sizes=(B,), path=(0, 5), seeds=5000)
    measured = gradient_noise._measure(problem, 3, config)
    return {"problems": ["case"]} | {f"case/{key}": value for key, value in measured.items()}


class TestGradientNoise:
    @staticmethod
    def worst(numbers, kind):
        return np.abs(gradient_noise.deviations(numbers, kind)).max()

    def test_the_right_law_is_met(self, numbers):
        for kind in gradient_noise.KINDS:
            assert self.worst(numbers, kind) <= statistics.z_limit(6)

    def test_the_gamma_of_the_other_sampling_is_caught(self, numbers):
        law = {kind: numbers[f"case/{kind}/gamma"] for kind in ("with replacement", "distinct")}
        swapped = numbers | {
            "case/with replacement/gamma": law["distinct"],
            "case/distinct/gamma": law["with replacement"],
            "case/reshuffled/gamma": law["with replacement"],
        }
        for kind in gradient_noise.KINDS:
            assert self.worst(swapped, kind) > 10

    def test_a_covariance_with_another_divisor_is_caught(self, numbers):
        """tr Σ as a sum (1/n dropped), and as if the examples were twice as many."""
        for factor in (40, 2):
            fault = numbers | {"case/trace": factor * numbers["case/trace"]}
            assert self.worst(fault, "distinct") > 10

    def test_the_law_is_the_one_of_the_library(self, numbers):
        assert numbers["case/distinct/gamma"][0] == noise.gamma(distinct(B), 40)
        assert numbers["case/reshuffled/gamma"][0] == noise.gamma(distinct(B), 40)


@pytest.fixture(scope="module")
def settled():
    """Reshuffled runs on eight examples, b = 2: four batches a pass."""
    few, _ = expected_path.few_features(data.load("diabetes"), 1, None)
    batch = Batch(few.x[:8], few.y[:8])
    problem, start = least_squares.problem(batch), models.init_linear(1)
    eta = float(np.float32(0.5 * least_squares.sgd_edge(problem, distinct(2))))
    record = 40 + np.arange(1, 5)
    keys = jax.random.split(jax.random.key(1), 20_000)
    steps = jnp.asarray(record, jnp.int32)
    runs = expected_path.runs_of(keys, jnp.float32(eta), batch, steps, start, sampling=reshuffled(2))
    return SimpleNamespace(problem=problem, start=start, eta=eta, record=record, runs=np.asarray(runs, float))


class TestSamplings:
    @staticmethod
    def z(settled, *, eta=None, sampling=None):
        sampling, eta = sampling or reshuffled(2), eta or settled.eta
        row = samplings.compare(settled.problem, settled.start, eta, sampling, settled.record, settled.runs)
        numbers = {f"case/{key}": np.array([value]) for key, value in row.items()}
        return np.abs(samplings.floor_z(numbers, "case")).max(), np.abs(samplings.bias_z(numbers, "case")).max()

    def test_the_right_prediction_is_met(self, settled):
        assert max(self.z(settled)) <= statistics.z_limit(3)

    def test_fresh_batches_in_place_of_a_pass_are_caught(self, settled):
        """In the floor, and in the bias, which fresh batches do not have."""
        floor, bias = self.z(settled, sampling=distinct(2))
        assert floor > 10
        assert bias > statistics.z_limit(3)

    def test_a_step_size_two_percent_off_is_caught(self, settled):
        for factor in (0.98, 1.02):
            assert self.z(settled, eta=factor * settled.eta)[0] > statistics.z_limit(3)


@pytest.fixture(scope="module")
def well():
    land = escape.double_well()
    batch = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), land.data)
    eta, runs = float(np.float32(0.2)), 30_000
    keys = jax.random.split(jax.random.key(2), runs)
    here = jnp.full(runs, land.bad, jnp.float32)
    crossed = escapes._crossed(keys, here, land, batch, eta, 120, with_replacement(4)).sum()
    return SimpleNamespace(land=land, eta=eta, crossed=int(crossed), runs=runs)


class TestEscape:
    @staticmethod
    def met(well, sampling, eta):
        bound = escapes.certified(well.land, sampling, eta, 120, 8192)
        return bool(escapes.overlaps(well.crossed, well.runs, bound.low[-1], bound.high[-1], 0.99))

    def test_the_right_bracket_is_met(self, well):
        assert self.met(well, with_replacement(4), well.eta)

    def test_the_sampling_swapped_is_caught(self, well):
        assert not self.met(well, distinct(4), well.eta)

    def test_a_step_size_two_percent_off_is_caught(self, well):
        assert not self.met(well, with_replacement(4), 0.98 * well.eta)
        assert not self.met(well, with_replacement(4), 1.02 * well.eta)

    def test_a_wall_where_there_is_none_is_caught(self, well):
        """Probability 0, as for GD, beside runs that did cross."""
        assert not escapes.overlaps(well.crossed, well.runs, 0.0, 0.0, 0.99)


class TestNoGuarantee:
    """C1: a start from which descent never moves, though it is no minimum."""

    @pytest.mark.parametrize("sampling", [full_batch(), distinct(16)], ids=["GD", "SGD"])
    def test_from_zero_a_net_of_tanh_keeps_all_weights_at_zero(self, sampling):
        cancer = data.load("breast_cancer").batch
        batch = Batch(jnp.asarray(cancer.x[:, :2]), jnp.asarray(cancer.y))
        loss = losses.mean_loss(no_guarantee.predict, losses.logloss)
        zero = jax.tree.map(jnp.zeros_like, models.init_two_layer(jax.random.key(0), 2, 3, 1))
        for start, stuck in ((zero, True), (zero._replace(b1=zero.b1 + 1e-3), False)):
            end = descend(loss, start, batch, optimizer=0.5, sampling=sampling, steps=50, key=jax.random.key(1)).params
            assert np.any(end.b2 != 0)
            assert (np.all(end.W1 == 0) and np.all(end.W2 == 0)) == stuck
