"""The loop against closed forms and against itself run in other ways."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad import losses, models
from jaxgrad.checks import checked
from jaxgrad.descent import (
    StepSize,
    advance,
    descend,
    init,
    log_spaced,
    no_improvement,
    small_gradient,
    small_step,
    trajectory,
)
from jaxgrad.sampling import distinct, full_batch, reshuffled, with_replacement
from jaxgrad.types import Batch, Linear

LOSS = losses.mean_loss(models.linear, losses.squared)
N, D = 40, 3


@pytest.fixture(scope="module")
def problem():
    """A least-squares problem with condition number about 30, and its eigen-decomposition."""
    rng = np.random.default_rng(5)
    X = rng.normal(size=(N, D)) * np.array([1.0, 0.5, 0.2])
    y = X @ np.array([1.0, -2.0, 3.0]) + 0.3 * rng.normal(size=N)
    lam, V = np.linalg.eigh(2 / N * X.T @ X)
    w_star = np.linalg.lstsq(X, y, rcond=None)[0]
    return Batch(jnp.asarray(X), jnp.asarray(y)), lam, V, w_star


def start():
    return Linear(jnp.array([4.0, -1.0, 0.5]))


def gap_theory(problem, eta, t):
    """L(w_t) − L* = ½ Σ λ c² (1 − ηλ)^{2t}."""
    _, lam, V, w_star = problem
    c = V.T @ (np.asarray(start().w) - w_star)
    return 0.5 * np.sum(lam * c**2 * (1 - eta * lam) ** (2 * np.asarray(t)[..., None]), axis=-1)


@pytest.mark.parametrize("fraction_of_edge", [0.1, 0.5, 0.9, 1.0])
def test_gd_is_the_eigen_decomposition_path(problem, key, fraction_of_edge):
    """w_t = w* + Σ (1−ηλ)^t c v, to 1e-10 for 1,000 steps."""
    data, lam, V, w_star = problem
    eta = fraction_of_edge * 2 / lam.max()
    trace = descend(
        LOSS,
        start(),
        data,
        optimizer=eta,
        sampling=full_batch(),
        steps=1000,
        key=key,
        record=range(0, 1001, 20),
        observe=lambda p: p.w,
    )
    c = V.T @ (np.asarray(start().w) - w_star)
    path = w_star + ((1 - eta * lam) ** trace.steps[:, None] * c) @ V.T
    assert np.abs(trace.observed - path).max() < 1e-10
    residual = float(LOSS(Linear(jnp.asarray(w_star)), data))
    np.testing.assert_allclose(trace.loss - residual, gap_theory(problem, eta, trace.steps), atol=1e-10)


@pytest.mark.parametrize("eta_times_max", [0.2, 1.0, 1.9])
@pytest.mark.parametrize("target", [1e-1, 1e-4, 1e-9])
def test_gd_takes_exactly_the_predicted_number_of_steps(problem, key, eta_times_max, target):
    data, lam, _, w_star = problem
    eta = eta_times_max / lam.max()
    predicted = int(np.argmax(gap_theory(problem, eta, np.arange(5000)) <= target))
    assert predicted > 0
    # The loss never rises, so no step after the predicted one can be the first.
    steps = predicted + 2
    trace = descend(
        LOSS, start(), data, optimizer=eta, sampling=full_batch(), steps=steps, key=key, record=range(steps + 1)
    )
    residual = float(LOSS(Linear(jnp.asarray(w_star)), data))
    assert int(np.argmax(trace.loss - residual <= target)) == predicted


@pytest.mark.parametrize(("excess", "grows"), [(0.999, False), (1.001, True)])
def test_the_edge_is_two_over_lambda_max(problem, key, excess, grows):
    data, lam, _, _ = problem
    eta = excess * 2 / lam.max()
    trace = descend(LOSS, start(), data, optimizer=eta, sampling=full_batch(), steps=4000, key=key, record=[3000, 4000])
    assert (trace.loss[1] > trace.loss[0]) == grows


def reference_sgd(problem, sampling, key, eta, steps):
    """SGD in numpy, with the lecture's formula F6, on the indices that the sampling says."""
    X, y = map(np.asarray, problem[0])
    w = np.asarray(start().w)
    for t in range(steps):
        B = np.asarray(sampling.indices(key, t, N))
        w = w - eta * (-2 / len(B)) * X[B].T @ (y[B] - X[B] @ w)
    return w


@pytest.mark.parametrize("sampling", [with_replacement(4), distinct(4), reshuffled(7), reshuffled(1)])
def test_sgd_is_the_lecture_formula_on_the_sampled_examples(problem, key, sampling):
    trace = descend(LOSS, start(), problem[0], optimizer=0.05, sampling=sampling, steps=60, key=key, record=3)
    np.testing.assert_allclose(trace.params.w, reference_sgd(problem, sampling, key, 0.05, 60), rtol=1e-12)


@pytest.mark.parametrize("sampling", [reshuffled(N), distinct(N)])
def test_all_examples_in_another_order_give_gradient_descent(problem, key, sampling):
    one = descend(LOSS, start(), problem[0], optimizer=0.1, sampling=sampling, steps=50, key=key)
    gd = descend(LOSS, start(), problem[0], optimizer=0.1, sampling=full_batch(), steps=50, key=key)
    np.testing.assert_allclose(one.params.w, gd.params.w, rtol=1e-13)


@pytest.mark.parametrize("sampling", [with_replacement(4), distinct(4)])
def test_runs_side_by_side_equal_single_runs(problem, key, sampling):
    keys = jax.random.split(key, 3)
    run = lambda key: descend(
        LOSS,
        start(),
        problem[0],
        optimizer=optax.sgd(0.05, momentum=0.9),
        sampling=sampling,
        steps=50,
        key=key,
    )
    together = run(keys)
    for i in range(3):
        alone = run(keys[i])
        np.testing.assert_allclose(together.params.w[i], alone.params.w, rtol=1e-13)
        np.testing.assert_allclose(together.loss[i], alone.loss, rtol=1e-13)
        np.testing.assert_allclose(together.step_norm[i], alone.step_norm, rtol=1e-10)


@pytest.mark.parametrize("sampling", [full_batch(), distinct(4), reshuffled(7)])
def test_the_result_does_not_depend_on_how_a_run_is_cut(problem, key, sampling):
    run = lambda record, params=None, steps=2500: descend(
        LOSS,
        params or start(),
        problem[0],
        optimizer=optax.sgd(0.01, momentum=0.5),
        sampling=sampling,
        steps=steps,
        key=key,
        record=record,
    )
    whole = run(2)
    np.testing.assert_array_equal(run(97).params.w, whole.params.w)
    half = run(5, steps=1203)
    resumed = run(5, half.state)
    np.testing.assert_array_equal(resumed.params.w, whole.params.w)
    assert resumed.steps[0] == 1203
    np.testing.assert_array_equal(resumed.state.optimizer[0].trace.w, whole.state.optimizer[0].trace.w)


def test_runs_side_by_side_resume(problem, key):
    keys = jax.random.split(key, 3)
    run = lambda params, steps: descend(
        LOSS, params, problem[0], optimizer=0.01, sampling=distinct(4), steps=steps, key=keys
    )
    np.testing.assert_array_equal(run(run(start(), 30).state, 80).params.w, run(start(), 80).params.w)


def test_schedules_give_eta_t(problem, key):
    """w_t = w_{t−1} − η_t g_t with η_t = 0.1/t, by hand."""
    data = problem[0]
    trace = descend(
        LOSS,
        start(),
        data,
        optimizer=optax.sgd(lambda t: 0.1 / (1.0 + t.astype(float))),
        sampling=full_batch(),
        steps=20,
        key=key,
    )
    params = start()
    for t in range(1, 21):
        params = jax.tree.map(lambda w, g, t=t: w - 0.1 / t * g, params, jax.grad(LOSS)(params, data))
    np.testing.assert_allclose(trace.params.w, params.w, rtol=1e-12)


def test_other_optimizers_run(problem, key):
    with jax.numpy_dtype_promotion("standard"):  # optax.adam mixes float and int32
        trace = descend(LOSS, start(), problem[0], optimizer=optax.adam(0.1), sampling=distinct(8), steps=300, key=key)
    assert trace.loss[-1] < 0.01 * trace.loss[0]


def test_trace_records_steps_examples_seconds_and_step_sizes(problem, key):
    trace = descend(
        LOSS,
        start(),
        problem[0],
        optimizer=0.05,
        sampling=distinct(4),
        steps=10,
        key=key,
        record=range(11),
        observe=lambda p: {"w": p.w, "first": p.w[0]},
    )
    np.testing.assert_array_equal(trace.steps, np.arange(11))
    np.testing.assert_array_equal(trace.examples, 4 * np.arange(11))
    assert (np.diff(trace.seconds) > 0).all()
    assert trace.status == "finished"
    assert trace.observed["w"].shape == (11, D)
    sizes = np.linalg.norm(np.diff(trace.observed["w"], axis=0), axis=1)
    np.testing.assert_allclose(trace.step_norm, np.r_[0, sizes], rtol=1e-9)
    losses_here = [float(LOSS(Linear(jnp.asarray(w)), problem[0])) for w in trace.observed["w"]]
    np.testing.assert_allclose(trace.loss, losses_here, rtol=1e-13)
    gd = descend(LOSS, start(), problem[0], optimizer=0.05, sampling=full_batch(), steps=10, key=key)
    assert gd.examples[-1] == 10 * N


def test_one_program_serves_every_chunk_and_every_run(problem, key):
    loss = losses.mean_loss(models.linear, losses.squared)  # a new function: compiled nowhere yet
    run = lambda steps: descend(
        loss,
        start(),
        problem[0],
        optimizer=0.0125,
        sampling=distinct(4),
        steps=steps,
        key=key,
        record=steps // 3,
    )
    first, second = run(30), run(90)
    assert first.compile_seconds > 20 * second.compile_seconds


def test_the_core_is_pure(problem, key):
    """`advance` and `trajectory` under jit and vmap, over step sizes too, without the driver."""
    data, etas = problem[0], jnp.array([0.01, 0.05, 0.1])
    grid = jax.jit(
        jax.vmap(
            lambda eta: trajectory(
                LOSS,
                start(),
                data,
                optimizer=optax.sgd(eta),
                sampling=distinct(4),
                key=key,
                record=jnp.array([0, 10, 40]),
            )
        )
    )
    params, curves = grid(etas)
    for i, eta in enumerate(etas.tolist()):
        trace = descend(LOSS, start(), data, optimizer=eta, sampling=distinct(4), steps=40, key=key, record=[0, 10, 40])
        np.testing.assert_allclose(curves[i], trace.loss, rtol=1e-12)
        np.testing.assert_allclose(params.w[i], trace.params.w, rtol=1e-12)
    optimizer = optax.sgd(0.05)
    state = advance(init(start(), optimizer), key, data, 40, loss=LOSS, optimizer=optimizer, sampling=distinct(4))
    np.testing.assert_allclose(state.params.w, params.w[1], rtol=1e-12)


def test_starts_may_differ_per_run(problem, key):
    starts = Linear(jnp.stack([start().w, -start().w]))
    keys = jax.random.split(key, 2)
    trace = descend(LOSS, starts, problem[0], optimizer=0.05, sampling=distinct(4), steps=20, key=keys, params_axis=0)
    alone = descend(LOSS, Linear(starts.w[1]), problem[0], optimizer=0.05, sampling=distinct(4), steps=20, key=keys[1])
    np.testing.assert_allclose(trace.params.w[1], alone.params.w, rtol=1e-13)


# --- many step sizes ---------------------------------------------------------------------------------------------

ETAS = (0.02, 0.05, 0.1)
COMPARED = ("steps", "examples", "loss", "step_norm", "observed", "params", "state", "status", "stopped_at")


def grid(problem, keys, optimizer=ETAS, **changes):
    options = dict(params=start(), sampling=distinct(4), steps=40, record=[0, 7, 40], observe=lambda p: p.w[0])
    options |= changes
    return descend(LOSS, options.pop("params"), problem[0], optimizer=optimizer, key=keys, **options)


def assert_is(trace, place, alone, rtol=1e-12):
    """Run `place` of many equals the run alone."""
    for name in ("loss", "step_norm", "observed"):
        np.testing.assert_allclose(getattr(trace, name)[place], getattr(alone, name), rtol=rtol, err_msg=name)
    np.testing.assert_allclose(trace.params.w[place], alone.params.w, rtol=rtol)
    np.testing.assert_array_equal(trace.stopped_at[place], alone.stopped_at)
    np.testing.assert_array_equal(trace.steps, alone.steps)


def assert_same(one, other, names=COMPARED):
    """To the bit."""
    for name in names:
        jax.tree.map(np.testing.assert_array_equal, getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("sampling", [full_batch(), reshuffled(7)])
def test_every_step_size_with_every_key_is_its_run_alone(problem, key, sampling):
    keys = jax.random.split(key, 4)
    trace = grid(problem, keys, sampling=sampling)
    assert trace.loss.shape == trace.step_norm.shape == trace.observed.shape == (3, 4, 3)
    assert trace.params.w.shape == (3, 4, D)
    assert trace.status == (("finished",) * 4,) * 3
    for i, j in ((0, 3), (2, 0), (2, 3)):
        assert_is(trace, (i, j), grid(problem, keys[j], ETAS[i], sampling=sampling))
    one_key = grid(problem, keys[2], jnp.asarray(ETAS), sampling=sampling)
    assert one_key.loss.shape == (3, 3)
    assert one_key.status == ("finished",) * 3
    for i in range(3):
        np.testing.assert_allclose(one_key.loss[i], trace.loss[i, 2], rtol=1e-12)


def test_each_run_of_a_grid_stops_and_diverges_by_itself(problem, key):
    """20.0 is so far beyond the edge that nothing is finite after a while; those beside it go on."""
    etas, keys = (0.02, 20.0, 0.1), jax.random.split(key, 2)
    many = dict(sampling=distinct(12), steps=400, record=[0, 300], stop=small_gradient(0.3, every=3))
    trace = grid(problem, keys, etas, **many)
    for i, j in np.ndindex(3, 2):
        alone = grid(problem, keys[j], etas[i], **many)
        assert trace.status[i][j] == alone.status
        assert trace.stopped_at[i, j] == alone.stopped_at
        if i == 1:
            assert alone.status.startswith("diverged")
            assert np.isnan(trace.loss[i, j, -1])
        else:
            np.testing.assert_allclose(trace.params.w[i, j], alone.params.w, rtol=1e-12)
    assert sum(status.startswith("stopped") for row in trace.status for status in row) >= 2
    assert len(np.unique(trace.stopped_at)) > 3


def test_a_grid_goes_on_from_its_state(problem, key):
    keys = jax.random.split(key, 3)
    whole, half = grid(problem, keys, steps=80, record=[80]), grid(problem, keys)
    assert_same(grid(problem, keys, params=half.state, steps=80, record=[80]), whole)
    # With other step sizes: those that are given are taken.
    less = grid(problem, keys, (0.01, 0.02, 0.03), params=half.state, steps=80, record=[80])
    first = grid(problem, keys[1], ETAS[2])
    assert_is(less, (2, 1), grid(problem, keys[1], 0.03, params=first.state, steps=80, record=[80]))


@pytest.mark.parametrize("stop", [None, small_step(0.1)])
def test_no_bit_depends_on_the_tiles(problem, key, stop):
    """Seven keys in tiles of four or two: the last tile overlaps its neighbour. All that a trace says is the same."""
    keys, starts = jax.random.split(key, 7), Linear(jnp.arange(7.0 * D).reshape(7, D))
    options = dict(params=starts, params_axis=0, steps=60, record=[0, 11, 35], stop=stop)
    whole = grid(problem, keys, **options)
    assert isinstance(whole.params.w, jax.Array)
    for memory in (4e-6, 1e-9):
        tiled = grid(problem, keys, memory=memory, **options)
        assert isinstance(tiled.params.w, np.ndarray)  # there were tiles
        assert_same(tiled, whole)
    if stop is None:
        alone = {"params": Linear(starts.w[5]), "params_axis": None}  # the start of key 5, for each step size
        assert_is(whole, (2, 5), grid(problem, keys[5], ETAS[2], **options | alone))
        # On from one tile in many, and back.
        on = dict(steps=90, record=[90])
        back = grid(problem, keys, params=tiled.state, **on)
        assert_same(grid(problem, keys, params=whole.state, memory=1e-9, **on), back)
    else:
        assert len(np.unique(whole.stopped_at)) > 3


# --- stopping and diverging ------------------------------------------------------------------------------------


def test_small_step_is_the_lecture_rule(problem, key):
    """It fires at the first t with η‖∇L(w_{t−1})‖ < ε, computed here from the eigen-decomposition."""
    data, lam, V, w_star = problem
    eta, eps = 0.3, 1e-4
    c = V.T @ (np.asarray(start().w) - w_star)
    t = np.arange(1, 5000)
    size = eta * np.sqrt(np.sum(lam**2 * c**2 * (1 - eta * lam) ** (2 * (t[:, None] - 1)), axis=1))
    expected = int(t[np.argmax(size < eps)])
    trace = descend(
        LOSS, start(), data, optimizer=eta, sampling=full_batch(), steps=5000, key=key, stop=small_step(eps)
    )
    assert trace.status == "stopped: small step"
    assert trace.stopped_at == expected == trace.steps[-1] == int(trace.state.step)
    assert trace.step_norm[-1] < eps


def test_small_step_stops_each_run_by_itself(problem, key):
    keys, etas = jax.random.split(key, 2), [0.04, 0.05]
    run = lambda key, eta, params=None, steps=2000: descend(
        LOSS,
        params or start(),
        problem[0],
        optimizer=eta,
        sampling=distinct(4),
        steps=steps,
        key=key,
        stop=small_step(2e-3),
    )
    together = run(keys, etas)
    alone = [[run(k, eta) for k in keys] for eta in etas]
    assert together.stopped_at.tolist() == [[int(a.stopped_at) for a in row] for row in alone]
    assert len(np.unique(together.stopped_at)) == 4
    assert together.steps[-1] == together.stopped_at.max()
    np.testing.assert_allclose(together.params.w, [[a.params.w for a in row] for row in alone], rtol=1e-12)
    with pytest.raises(ValueError, match="ended at different steps"):
        run(keys, etas, together.state, 9000)


def test_a_run_stopped_by_the_rule_can_go_on(problem, key):
    run = lambda params, stop=None: descend(
        LOSS, params, problem[0], optimizer=0.3, sampling=full_batch(), steps=400, key=key, stop=stop
    )
    stopped = run(start(), small_step(1e-3))
    assert stopped.stopped_at < 400
    np.testing.assert_array_equal(run(stopped.state).params.w, run(start()).params.w)


def test_small_gradient(problem, key):
    trace = descend(
        LOSS,
        start(),
        problem[0],
        optimizer=0.3,
        sampling=full_batch(),
        steps=5000,
        key=key,
        stop=small_gradient(1e-5, every=10),
    )
    assert trace.status == "stopped: small gradient"
    assert trace.stopped_at % 10 == 0
    norm = lambda params: float(optax.tree.norm(jax.grad(LOSS)(params, problem[0])))
    assert norm(trace.params) < 1e-5
    before = descend(
        LOSS,
        start(),
        problem[0],
        optimizer=0.3,
        sampling=full_batch(),
        steps=int(trace.stopped_at) - 10,
        key=key,
    )
    assert norm(before.params) >= 1e-5


def test_validation_with_patience(problem, key):
    """The metric falls until w[0] passes 2, then rises: four checks later the run ends."""
    metric = lambda params: jnp.abs(params.w[0] - 2.0)
    trace = descend(
        LOSS,
        start(),
        problem[0],
        optimizer=0.02,
        sampling=full_batch(),
        steps=500,
        key=key,
        record=range(501),
        observe=metric,
        stop=no_improvement(metric, patience=4, every=5),
    )
    assert trace.status == "stopped: validation"
    checks = trace.observed[::5]
    assert trace.stopped_at == 5 * (int(np.argmin(checks)) + 4)


def test_budget(problem, key):
    trace = descend(
        LOSS,
        start(),
        problem[0],
        optimizer=0.3,
        sampling=full_batch(),
        steps=7,
        key=key,
        stop=small_step(1e-30),
    )
    assert trace.status == "finished"
    assert trace.stopped_at == 7


def test_a_diverging_run_is_marked_and_the_others_are_right(problem, key):
    starts = Linear(jnp.broadcast_to(start().w, (20, D)).at[7].set(1e70))  # the loss there is 1e280
    quartic = losses.mean_loss(models.linear, lambda p, y: (p - y) ** 4)  # explodes from far away only
    keys = jax.random.split(key, 20)
    options = dict(optimizer=1e-4, sampling=distinct(4), steps=50, record=range(0, 51, 5))
    trace = descend(quartic, starts, problem[0], key=keys, params_axis=0, **options)
    alone = descend(quartic, Linear(starts.w[7]), problem[0], key=keys[7], **options)
    by_hand, step = Linear(starts.w[7]), 0
    while np.isfinite(by_hand.w).all():
        chosen = distinct(4).indices(keys[7], step, N)
        batch = jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], problem[0])
        by_hand = jax.tree.map(lambda w, g: w - 1e-4 * g, by_hand, jax.grad(quartic)(by_hand, batch))
        step += 1
    assert trace.status[7] == alone.status == f"diverged at step {step}"
    assert np.isnan(trace.loss[7, 1:]).all()
    others = [i for i in range(20) if i != 7]
    assert [trace.status[i] for i in others] == ["finished"] * 19
    np.testing.assert_allclose(
        trace.loss[3], descend(quartic, start(), problem[0], key=keys[3], **options).loss, rtol=1e-12
    )


# --- bad input -------------------------------------------------------------------------------------------------


def bad(match, error=ValueError, **changes):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(8, 2)), rng.normal(size=8)
    options = dict(
        loss=LOSS,
        params=Linear(jnp.zeros(2)),
        data=Batch(X, y),
        optimizer=0.1,
        sampling=distinct(2),
        steps=5,
        key=jax.random.key(0),
    )
    options.update(changes)
    with pytest.raises(error, match=match):
        # Without the tests' type hook: users get the library's own messages.
        checked(inspect.unwrap(descend))(options.pop("loss"), options.pop("params"), options.pop("data"), **options)


def test_bad_data():
    X, y = np.ones((8, 2)), np.ones(8)
    holed = X.copy()
    holed[5, 1] = np.nan
    bad(r"x\[5, 1\] is nan \(row 5, column 1", data=Batch(holed, y))
    bad(r"y\[2\] is inf", data=Batch(X, np.r_[1, 1, np.inf, np.ones(5)]))
    bad(r"x has 8 examples .* y has 7", data=Batch(X, np.ones(7)))
    bad("there are no examples", data=Batch(np.ones((0, 2)), np.ones(0)))
    bad("hold no arrays", data=())
    bad("y is a single value", data=Batch(X, np.float64(1.0)))


def test_bad_sampling_and_step_sizes():
    bad("cannot draw b = 9 different examples out of n = 8", sampling=distinct(9))
    for eta in (0.0, -0.1, float("nan"), float("inf")):
        bad(r"the step size \(optimizer\) must be a positive finite number", optimizer=eta)
    for wrong in ("adam", [0.1, "0.2"], [[0.1], [0.2, 0.3]], [True, False]):
        bad("optimizer must be an optax transformation", TypeError, optimizer=wrong)
    for eta in (0.0, -0.1, float("nan"), float("inf")):
        bad(rf"the step size must be finite and positive: number 2 of 3 .*is {eta}", optimizer=[0.1, 0.2, eta])
    bad(r"one-dimensional array of at least one, got shape \(0,\)", optimizer=[])
    bad(r"one-dimensional array of at least one, got shape \(2, 2\)", optimizer=np.full((2, 2), 0.1))
    bad("memory must be a positive finite number", optimizer=[0.1, 0.2], memory=0.0)


def test_states_that_do_not_fit(problem, key):
    keys = jax.random.split(key, 3)
    alone = init(start(), optax.sgd(0.1))
    many = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (3, 3, *leaf.shape)), alone)
    of_grid = many._replace(optimizer=StepSize(jnp.full((3, 3), 0.1)))
    goes_on = lambda words, state, **how: bad(words, loss=LOSS, params=state, data=problem[0], **how)
    goes_on(r"of runs \[3, 3\], but optimizer and key ask for runs \[2, 3\]", of_grid, optimizer=ETAS[:2], key=keys)
    goes_on(r"runs \[3, 3\], but .* a single run", of_grid)
    goes_on(r"this state is of a single run, but", alone, optimizer=ETAS)
    goes_on("comes from a run with one optimizer; it cannot go on with an array of", many, optimizer=ETAS, key=keys)
    one_axis = jax.tree.map(lambda leaf: leaf[0], of_grid)
    goes_on("comes from a run with an array of step sizes; it cannot go on with one", one_axis, key=keys)


def test_bad_losses_and_parameters():
    bad(
        r"one floating-point number, got float64\[8\]: take the mean",
        loss=lambda p, b: (b.y - b.x @ p.w) ** 2,
    )
    bad("must return one number, got a tuple", TypeError, loss=lambda p, b: (p.w.sum(), 1))
    bad("loss must be a function", TypeError, loss=3)
    bad("params must be floating point: w is int64", TypeError, params=Linear(jnp.zeros(2, int)))
    bad("nothing to learn", params=())
    bad("leading axis of as many starts", params_axis=0)


def test_bad_budgets_records_keys_and_rules():
    bad("steps must be a whole number", TypeError, steps=5.0)
    bad("steps must be at least 0", steps=-1)
    bad("record must be at least 2", record=1)
    bad("whole numbers of steps from 0 to 5", record=[0, 9])
    bad("key must be a JAX key", TypeError, key=0)
    bad("one-dimensional array of keys", key=jax.random.split(jax.random.key(0), (2, 2)))
    for rule in (small_step, small_gradient):
        with pytest.raises(ValueError, match="below must be a positive finite number"):
            rule(0.0)
    with pytest.raises(ValueError, match="patience must be at least 1"):
        no_improvement(lambda p: p, patience=0)


def test_log_spaced():
    points = log_spaced(1000, 20)
    assert points[0] == 0
    assert points[1] == 1
    assert points[-1] == 1000
    assert (np.diff(points) > 0).all()


def test_progress_goes_to_stderr(problem, key, capsys):
    seen = []
    options = dict(optimizer=0.1, sampling=full_batch(), steps=4, key=key, record=3)
    descend(LOSS, start(), problem[0], progress=lambda step, steps: seen.append((step, steps)), **options)
    assert seen == [(0, 4), (2, 4), (4, 4)]
    descend(LOSS, start(), problem[0], progress=True, **options)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "step 4 of 4" in captured.err


# --- what a run says of itself ---------------------------------------------------------------------------------


def skipping(name):
    return {
        "accumulated over four batches": optax.MultiSteps(optax.sgd(0.05), 4).gradient_transformation(),
        "warmed up from 0": optax.sgd(lambda t: jnp.minimum(0.1, 0.005 * t)),
        "only if finite": optax.apply_if_finite(optax.sgd(0.05), 5),
    }[name]


@pytest.mark.parametrize("runs", [None, 2])
@pytest.mark.parametrize("name", ["accumulated over four batches", "warmed up from 0", "only if finite"])
def test_a_step_that_the_optimizer_skipped_is_no_small_step(name, runs, problem, key):
    def sometimes_nan(params, batch):
        """Its gradient is NaN at the start only."""
        return LOSS(params, batch) + jnp.where(jnp.all(params.w == start().w), jnp.nan, 0.0) * jnp.sum(params.w)

    data, loss = problem[0], sometimes_nan if name == "only if finite" else LOSS
    keys = key if runs is None else jax.random.split(key, runs)
    how = dict(optimizer=skipping(name), sampling=full_batch(), steps=3000, key=keys, stop=small_step(1e-3))
    with jax.numpy_dtype_promotion("standard"):
        trace = descend(loss, start(), data, **how | ({} if loss is LOSS else {"steps": 4}))
    if loss is LOSS:
        assert np.all(trace.stopped_at > 10)
        assert np.all(trace.loss[..., -1] < 0.2 * trace.loss[..., 0])
    else:  # it never leaves the start, which is no convergence
        assert np.all(trace.stopped_at == 4)


def test_a_gradient_of_exactly_zero_is_a_small_step(problem, key):
    data, _, _, w_star = problem
    flat = lambda params, batch: jnp.mean(jnp.maximum(batch.x @ params.w, 0.0)) * 0.0
    trace = descend(
        flat,
        Linear(jnp.asarray(w_star)),
        data,
        optimizer=0.1,
        sampling=full_batch(),
        steps=9,
        key=key,
        stop=small_step(1e-6),
    )
    assert (trace.status, trace.stopped_at) == ("stopped: small step", 1)


@pytest.mark.parametrize("runs", [None, 2])
def test_examples_are_counted_through_a_change_of_the_batch_size(runs, problem, key):
    run = lambda params, sampling, steps: descend(
        LOSS,
        params,
        problem[0],
        optimizer=0.01,
        sampling=sampling,
        steps=steps,
        key=key if runs is None else jax.random.split(key, runs),
        record=3,
    )
    first = run(start(), distinct(4), 10)
    second = run(first.state, distinct(20), 30)
    third = run(second.state, full_batch(), 31)
    assert second.examples.tolist() == [40, 40 + 10 * 20, 40 + 20 * 20]
    assert third.examples[-1] == third.state.examples == 40 + 400 + N
    np.testing.assert_array_equal(run(run(start(), distinct(4), 10).state, distinct(4), 20).examples, [40, 60, 80])


def test_a_state_of_advance_goes_on_and_a_state_of_descend_goes_into_advance(problem, key):
    data, how = problem[0], dict(loss=LOSS, optimizer=optax.sgd(0.01), sampling=distinct(4))
    by_hand = advance(init(start(), how["optimizer"]), key, data, 10, **how)
    run = lambda state, b: descend(
        LOSS, state, data, optimizer=how["optimizer"], sampling=distinct(b), steps=20, key=key
    )
    with pytest.raises(ValueError, match=r"does not count the gradients .* state\._replace\(examples=\.\.\.\)"):
        run(by_hand, 20)
    assert run(by_hand._replace(examples=40), 20).examples[[0, -1]].tolist() == [40, 240]
    trace = run(by_hand._replace(examples=40), 4)
    on = jax.jit(lambda state: advance(state, key, data, 30, **how))(trace.state)
    whole = descend(LOSS, start(), data, optimizer=how["optimizer"], sampling=distinct(4), steps=30, key=key)
    np.testing.assert_allclose(on.params.w, whole.params.w, rtol=1e-12)


def test_a_gradient_that_is_not_finite_at_the_start_is_not_called_divergence(problem, key):
    norm = lambda params, batch: LOSS(params, batch) + jnp.linalg.norm(params.w)
    run = lambda start, **how: descend(
        norm, start, problem[0], sampling=full_batch(), steps=9, **{"key": key, "optimizer": 0.01} | how
    )
    zero = Linear(jnp.zeros(D))
    said = run(zero).status
    assert said.startswith("not finite at the start: the loss is ")
    assert said.endswith("but its gradient is not finite in w")
    assert np.isnan(run(zero).loss[1:]).all()
    assert run(zero, optimizer=[0.01, 0.02]).status == (said, said)
    keys = jax.random.split(key, 2)
    both = run(Linear(jnp.stack([start().w, zero.w])), key=keys, params_axis=0)
    assert both.status == ("finished", said)
    assert both.stopped_at.tolist() == [9, 0]


def test_the_first_row_that_has_no_finite_loss_is_named(problem, key):
    data = problem[0]._replace(y=problem[0].y.at[17].set(-1e3))
    log = lambda params, batch: jnp.mean(jnp.log(batch.y + 10 + 0 * (batch.x @ params.w)))
    trace = descend(log, start(), data, optimizer=0.1, sampling=full_batch(), steps=3, key=key)
    assert trace.status == "not finite at the start: the loss is nan; the first such example is row 17 (from 0)"


def test_a_loss_that_grew_is_not_said_to_have_finished(problem, key):
    lam = problem[1]
    run = lambda steps: descend(
        LOSS, start(), problem[0], optimizer=8 / lam.max(), sampling=full_batch(), steps=steps, key=key
    )
    trace = run(12)
    assert trace.status == f"grew: the loss went from {trace.loss[0]:.3g} to {trace.loss[-1]:.3g}"
    assert run(1).status == "finished"


@pytest.mark.parametrize("record", [[12], [11, 12], 50])
@pytest.mark.parametrize("offset", [0.0, -40.0])
def test_that_a_loss_grew_does_not_hang_on_what_is_recorded_or_on_its_sign(record, offset, problem, key):
    loss = lambda params, batch: LOSS(params, batch) + offset
    run = lambda w: descend(
        loss,
        Linear(w),
        problem[0],
        optimizer=8 / problem[1].max(),
        sampling=full_batch(),
        steps=12,
        key=key,
        record=record,
    )
    assert run(start().w).status.startswith("grew: the loss went from ")


def test_blocks_that_were_asked_for_are_refused_inside_a_program_too(problem, key):
    ratio = lambda p, b: jnp.sum(b.y**2 * (b.x @ p.w - b.y) ** 2) / jnp.sum(b.y**2)
    how = dict(optimizer=optax.sgd(0.01), sampling=full_batch(rows=7))
    with pytest.raises(ValueError, match="needs a loss that is a mean over the examples"):
        trajectory(ratio, start(), problem[0], key=key, record=[0, 5], **how)
    with pytest.raises(ValueError, match="needs a loss that is a mean over the examples"):
        advance(init(start(), how["optimizer"]), key, problem[0], 3, loss=ratio, **how)


def test_an_accumulated_batch_without_a_gradient_of_its_own_is_no_small_step(key):
    """Examples 5 have a margin: alone they move nothing, and in between nothing is applied."""
    batch = Batch(jnp.ones(8), jnp.array([1.0, 1, 1, 1, 5, 5, 5, 5]))
    hinge = lambda w, b: jnp.mean(jnp.maximum(b.y - w * b.x, 0.0))
    optimizer = optax.MultiSteps(optax.sgd(0.05), 4).gradient_transformation()
    for number in range(3):
        with jax.numpy_dtype_promotion("standard"):
            trace = descend(
                hinge,
                jnp.asarray(2.0),
                batch,
                optimizer=optimizer,
                sampling=distinct(1),
                steps=200,
                key=jax.random.fold_in(key, number),
                stop=small_step(1e-6),
            )
        assert trace.stopped_at % 4 == 0
        assert trace.status == "finished" or trace.stopped_at >= 4


def test_a_rule_of_ones_own_is_judged_at_every_step(problem, key):
    optimizer = optax.MultiSteps(optax.sgd(0.05), 4).gradient_transformation()
    with jax.numpy_dtype_promotion("standard"):
        state = advance(
            init(start(), optimizer),
            key,
            problem[0],
            20,
            loss=LOSS,
            optimizer=optimizer,
            sampling=full_batch(),
            halt=lambda state: state.step >= 6,
        )
    assert state.step == 6


def test_a_bad_row_that_a_minibatch_meets_late_is_found_at_the_start_all_the_same(problem, key):
    data = problem[0]._replace(y=problem[0].y.at[17].set(-1e3))
    root = lambda p, b: jnp.mean(jnp.sqrt(b.y + 10) * (b.x @ p.w) ** 2)
    for number in range(4):
        trace = descend(
            root, start(), data, optimizer=0.01, sampling=distinct(2), steps=60, key=jax.random.fold_in(key, number)
        )
        if trace.status != "finished":
            assert trace.status.endswith("the first such example is row 17 (from 0)")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [full_batch(), distinct(4)])
def test_parameters_that_are_not_finite_at_the_start_are_named(bad, sampling, problem, key):
    loss = lambda p, b: jnp.mean((b.x @ p["w"] + p["b"] - b.y) ** 2)
    params = {"w": jnp.zeros(D), "b": jnp.asarray(bad)}
    trace = descend(loss, params, problem[0], optimizer=0.1, sampling=sampling, steps=5, key=key)
    assert trace.status == "not finite at the start: the parameters have NaN or infinite entries in ['b']"
