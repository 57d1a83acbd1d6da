"""What people train: losses of every form, optimizers that ask for more, settings side by side, traces to look at."""

import functools

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import pytest

from jaxgrad import losses, models, open_rows
from jaxgrad.descent import (
    Checkpoint,
    descend,
    keep_best,
    loss_key,
    no_improvement,
    small_gradient,
    small_step,
    target_loss,
    time_limit,
)
from jaxgrad.descent.runs import strong
from jaxgrad.sampling import distinct, full_batch, reshuffled
from jaxgrad.types import Batch, Linear

matplotlib.use("agg")

LOSS = losses.mean_loss(models.linear, losses.squared)
N, D, STEPS = 60, 3, 25
KEY = jax.random.key(5)
KEYS = jax.random.split(KEY, 3)
START = Linear(jnp.array([1.0, -1.0, 0.5]), jnp.array(0.2))


def rows():
    r = np.random.default_rng(2)
    x = r.normal(size=(N, D))
    return Batch(jnp.asarray(x), jnp.asarray(x @ np.array([2.0, 1.0, -1.0]) + 0.2 * r.normal(size=N)))


DATA = rows()


def run(loss=LOSS, params=START, **how):
    given = {"optimizer": 0.05, "sampling": distinct(10), "steps": STEPS, "key": KEY, "record": 4}
    return descend(loss, params, DATA, **given | how)


def _fast(params):
    return params.fast


def plain(optimizer, key=KEY, sampling=None, steps=STEPS, at=None, params=START, extras=True):
    """The loop of optax's documentation."""
    sampling = sampling or distinct(10)
    # Of numbers with a weak dtype the step would be compiled three times.
    params, state, step = strong(params), strong(optimizer.init(params)), _step(optimizer, at, extras)
    for t in range(steps):
        indices = sampling.indices(key, t, N)
        params, state = step(params, state, Batch(DATA.x[indices], DATA.y[indices]))
    return params, state


@functools.cache
def _step(optimizer, at, extras):
    update = optax.with_extra_args_support(optimizer).update

    @jax.jit
    def step(params, state, batch):
        value, grad = jax.value_and_grad(LOSS)(at(params) if at else params, batch)
        given = {"value": value, "grad": grad, "value_fn": lambda w: LOSS(w, batch)} if extras else {}
        updates, state = update(grad, state, params, **given)
        return optax.apply_updates(params, updates), state

    return step


def near(got, want, rtol=1e-8):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=1e-10)


def of(tree, *index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


ASKING = {
    "lbfgs": optax.lbfgs,
    "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(10)),
    "polyak": optax.polyak_sgd,
    "momo": lambda: optax.contrib.momo(0.1),
    "plateau": lambda: optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau(patience=2)),
}


@pytest.fixture(autouse=True)
def settings_of_a_user():
    """Optax mixes dtypes and ranks, which the other tests forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


# --- optimizers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKING)
def test_an_optimizer_that_asks_for_the_loss_gets_that_of_its_batch(name):
    optimizer = ASKING[name]()
    near(run(optimizer=optimizer).params, plain(optimizer)[0], rtol=1e-6)
    near(of(run(optimizer=optimizer, key=KEYS).params, 1), plain(optimizer, KEYS[1])[0], rtol=1e-6)
    full = run(optimizer=optimizer, sampling=full_batch(), steps=8)
    near(full.params, plain(optimizer, sampling=full_batch(), steps=8)[0], rtol=1e-6)


def test_lookahead_is_run_as_its_documentation_says():
    optimizer = optax.lookahead(optax.sgd(0.1), 5, 0.5)
    pair = optax.LookaheadParams.init_synced(START)
    want, _ = plain(optimizer, params=pair, at=_fast, extras=False)
    for params in (START, pair):
        trace = run(optimizer=optimizer, params=params)
        near(trace.params, want)
        near(trace.loss[-1], LOSS(want.slow, DATA))
    half = run(optimizer=optimizer, steps=12)
    near(run(optimizer=optimizer, params=half.state).params, want)


@pytest.mark.parametrize("memory", [1.0, 1e-9])
def test_each_run_has_noise_of_its_own_and_is_its_run_alone(memory):
    optimizer = optax.noisy_sgd(0.05, 0.5, 0.1, key=0)
    many = run(optimizer=optimizer, sampling=full_batch(), key=KEYS, memory=memory)
    assert len(set(many.loss[:, -1].tolist())) == 3
    near(many.loss[2], run(optimizer=optimizer, sampling=full_batch(), key=KEYS[2]).loss)


def test_updates_and_averages_wider_than_the_parameters():
    wide = optax.stateless(lambda updates, params: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates))
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), START)
    loss = lambda params, batch: LOSS(jax.tree.map(lambda w: w.astype(jnp.float64), params), batch)
    trace = run(loss, start, optimizer=optax.chain(wide, optax.sgd(0.1, momentum=0.5)), key=KEYS)
    assert trace.params.w.dtype == jnp.bfloat16
    momentum = [leaf for leaf in jax.tree.leaves(trace.state.optimizer) if leaf.shape == (3, D)]
    assert {str(leaf.dtype) for leaf in momentum} == {"float32"}
    assert (trace.loss[:, -1] < 0.5 * trace.loss[:, 0]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda: optax.adam(1e-2),
        lambda: optax.chain(optax.clip(1.0), optax.sgd(optax.cosine_decay_schedule(0.1, 30), momentum=0.9)),
        lambda: optax.MultiSteps(optax.sgd(0.1), 2),
        lambda: optax.noisy_sgd(0.1, 0.1, 0.5, key=1),
    ],
)
def test_an_equal_optimizer_does_not_compile_again(make):
    first = run(optimizer=make())
    again = run(optimizer=make())
    assert again.compile_seconds < 0.2 * max(first.compile_seconds, 0.25)
    near(again.params, first.params, rtol=0)


@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "many"])
@pytest.mark.parametrize("name", ["sgd", *ASKING])
def test_the_steps_of_a_run_are_compiled_once_and_off_the_clock(name, key, caplog):
    """Also where the parameters or the optimizer's first state are made of Python numbers, whose dtype is weak."""
    optimizer = ASKING.get(name, lambda: optax.sgd(0.05, momentum=0.5))()
    start = Linear(jnp.array([1.0, -1.0, 0.5]), jnp.asarray(0.25))
    with jax.log_compiles():
        run(optimizer=optimizer, params=start, key=key, record=[0, 2, 5, 7], steps=7)
    compiled = [line for line in caplog.messages if line.startswith("Compiling jit(advance)")]
    assert len(compiled) <= 1


def test_a_state_of_python_numbers_is_compiled_once(caplog):
    def loss(params, batch, state):
        return LOSS(params, batch), {"seen": state["seen"] + jnp.sum(batch.y)}

    with jax.log_compiles():
        run(loss, loss_state={"seen": 0.5}, evaluate=lambda params, batch, state: LOSS(params, batch), record=[0, 2, 5])
    assert len([line for line in caplog.messages if line.startswith("Compiling jit(advance)")]) == 1


@pytest.mark.parametrize("rates", [[1e-3, 1e-2], np.array([1e-3, 1e-2])])
def test_an_optimizer_of_several_numbers_is_told_how_to_run_them_side_by_side(rates):
    with pytest.raises(TypeError, match=r"sweep=\{'learning_rate'"):
        run(optimizer=optax.adam(rates))


def test_an_optimizer_that_changes_the_shape_of_a_parameter_is_refused():
    """Three step sizes for three weights and a bias fit the weights; the steps then failed on the bias."""
    words = r"would change the shape of the parameter b: from \[\] to \[3\] in one step; .* sweep=\{'learning_rate'"
    with pytest.raises(TypeError, match=words):
        run(optimizer=optax.adam(jnp.array([1e-3, 1e-2, 1e-1])))


def test_settings_that_there_are_not_are_answered_with_those_that_there_are():
    with pytest.raises(TypeError, match="it has learning_rate, b1"):
        run(optimizer=optax.adam, sweep={"foo": [0.1, 0.2]})


def test_a_metric_that_cannot_be_evaluated_is_refused_before_the_first_step(tmp_path):
    np.save(tmp_path / "rows.npy", np.column_stack([DATA.x, DATA.y]))
    rows = open_rows(tmp_path / "rows.npy", target=-1)
    with pytest.raises(TypeError, match="not rows on disk"):
        run(stop=keep_best(lambda params: LOSS(params, rows)))
    with pytest.raises(TypeError, match="must return one number, and returns an array of shape"):
        run(stop=keep_best(lambda params: params.w))
    with pytest.raises(TypeError, match=r"metric must be a function metric\(params\) -> number, got 'loss'"):
        keep_best("loss")


@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one", "many"])
def test_a_metric_is_tried_at_the_parameters_that_it_will_get(key):
    """With lookahead these are the slow ones of a pair; with `evaluate_at`, what that returns."""
    metric = keep_best(lambda params: jnp.sum(params.w))
    for how in ({"optimizer": optax.lookahead(optax.sgd(0.1), 5, 0.5)}, {"evaluate_at": lambda state: state.params}):
        run(key=key, stop=metric, **how)
    first = lambda tree, batch: jnp.sum(jax.tree.leaves(tree)[0])
    with pytest.raises(TypeError, match=r"metric\(params\) cannot be evaluated"):
        run(key=key, stop=metric, evaluate_at=lambda state: state.params.w, evaluate=first)


def test_an_optimizer_with_one_other_number_is_another():
    a, b = (run(optimizer=optax.adam(rate)) for rate in (0.01, 0.010001))
    assert (np.asarray(a.params.w) != np.asarray(b.params.w)).all()
    near(b.params, plain(optax.adam(0.010001))[0])


@pytest.mark.parametrize("key", [KEY, KEYS])
def test_settings_of_any_optimizer_go_side_by_side(key):
    sweep = {"learning_rate": [0.1, 0.03], "b1": [0.9, 0.5]}
    trace = run(optimizer=optax.adam, sweep=sweep, key=key)
    for i in range(2):
        for j, own in enumerate(key if key.ndim else [key]):
            index = (i, j) if key.ndim else (i,)
            want, _ = plain(optax.adam(sweep["learning_rate"][i], b1=sweep["b1"][i]), own)
            near(of(trace.params, *index), want, rtol=1e-6)
    half = run(optimizer=optax.adam, sweep=sweep, key=key, steps=11)
    near(run(params=half.state, optimizer=optax.adam, sweep=sweep, key=key).params, trace.params)
    other = run(optimizer=optax.adam, sweep={"learning_rate": [0.2, 0.02], "b1": [0.8, 0.4]}, key=key)
    assert other.compile_seconds < 0.2


def test_settings_that_are_injected_are_swept_too():
    optimizer = optax.chain(optax.clip(1.0), optax.inject_hyperparams(optax.adamw)(learning_rate=0.1))
    trace = run(optimizer=optimizer, sweep={"weight_decay": [0.1, 0.0]}, key=KEYS)
    want, _ = plain(optax.chain(optax.clip(1.0), optax.adamw(0.1, weight_decay=0.1)), KEYS[1])
    near(of(trace.params, 0, 1), want, rtol=1e-6)
    scheduled = optax.inject_hyperparams(optax.sgd)(learning_rate=optax.linear_schedule(0.1, 0.0, 9))
    with pytest.raises(ValueError, match=r"follows a schedule"):
        run(optimizer=scheduled, sweep={"learning_rate": [0.1, 0.2]})


# --- the forms of a loss ----------------------------------------------------------------------------------------


def noisy(params, batch, key):
    return LOSS(params, batch) + 0.1 * jnp.sum(params.w) * jax.random.normal(key)


def test_a_loss_that_draws_is_the_same_after_a_resume(tmp_path):
    file, how = tmp_path / "run.npz", {"random": True, "key": KEYS, "optimizer": [0.05, 0.1]}
    run(noisy, steps=10, checkpoint=Checkpoint(file, every=5), **how)
    on = run(noisy, checkpoint=Checkpoint(file, every=5, resume=True), **how)
    whole = run(noisy, **how)
    near((on.params, on.loss[..., -1]), (whole.params, whole.loss[..., -1]), rtol=0)
    assert len({str(jax.random.key_data(loss_key(KEY, t))) for t in range(50)}) == 50


def test_other_numbers_come_back_beside_the_loss_and_are_recorded():
    def loss(params, batch):
        errors = models.linear(params, batch.x[0]) * 0 + batch.x @ params.w + params.b - batch.y
        return jnp.mean(errors**2), {"mae": jnp.mean(jnp.abs(errors))}

    trace = run(loss, has_aux=True, key=KEYS)
    near(trace.aux["mae"][1, -1], loss(of(trace.params, 1), DATA)[1]["mae"])
    near(trace.params, run(key=KEYS).params)
    assert "mae" in trace.to_frame().columns


def test_a_state_may_have_more_beside_it():
    def loss(params, batch, key, state):
        value = noisy(params, batch, key)
        return value, ({"last": value}, jnp.max(batch.y))

    trace = run(loss, random=True, has_aux=True, loss_state={"last": jnp.zeros(())}, batch_losses=True, key=KEYS)
    near(trace.state.model["last"], trace.batch_loss[:, -1])
    near(trace.aux, np.full((3, 4), DATA.y.max()))


def test_the_whole_state_is_observed_and_the_loss_is_recorded_where_it_is_asked_for():
    optimizer = optax.contrib.schedule_free_sgd(0.05)
    average = lambda state: optax.contrib.schedule_free_eval_params(state.optimizer, state.params)
    trace = run(
        optimizer=optimizer,
        key=KEYS,
        evaluate_at=average,
        observe=lambda params, state: {"step": state.step, "size": optax.tree.norm(state.update), "at": params.w},
        stop=keep_best(lambda params: LOSS(params, DATA), every=5),
    )
    assert trace.observed["step"].tolist() == [trace.steps.tolist()] * 3
    near(trace.observed["size"], trace.step_norm)
    params, state = plain(optimizer, KEYS[1])
    at = optax.contrib.schedule_free_eval_params(state, params)
    near((trace.loss[1, -1], trace.observed["at"][1, -1]), (LOSS(at, DATA), at.w), rtol=1e-6)
    assert trace.best is not None
    near(trace.best.value[1], LOSS(of(trace.best.params, 1), DATA))


def test_each_row_is_seen_in_each_pass_also_where_b_does_not_divide_n():
    sampling = reshuffled(7, drop_last=False)
    for start in (0, 9, 18):
        seen = np.concatenate([sampling.indices(KEY, t, N) for t in range(start, start + 9)])
        assert sorted(seen.tolist()) == list(range(N))
    assert len(sampling.indices(KEY, 8, N)) == 4
    trace = run(sampling=sampling, steps=20, record=[0, 8, 9, 18, 20])
    assert trace.examples.tolist() == [0, 56, 60, 120, 134]
    near(run(sampling=sampling, key=KEYS, stop=small_step(1e-12)).params, run(sampling=sampling, key=KEYS).params)


def _metric(params):
    return LOSS(params, DATA)


def test_the_end_of_a_run_may_be_its_best():
    """A check that is due later than the end never came: the start was called the best."""
    trace = run(steps=15, stop=keep_best(_metric, every=20))
    assert trace.best.step == 15
    near((trace.best.params, trace.best.value), (trace.params, trace.loss[-1]))


def test_the_best_is_the_same_in_whichever_order_the_rules_are_given():
    target, best = target_loss(1.0, every=4), keep_best(_metric, every=4)
    one, other = (run(steps=200, key=KEYS, stop=rules) for rules in ([target, best], [best, target]))
    assert set(one.status) == {"stopped: target loss"}
    near((one.best, one.stopped_at), (other.best, other.stopped_at))
    near(one.best.value, np.minimum(one.best.value, [_metric(of(one.params, i)) for i in range(3)]))
    for i in range(3):  # others that go on change nothing
        near(of(one.best, i), run(steps=200, key=KEYS[i], stop=[target, best]).best)


# --- when to stop -----------------------------------------------------------------------------------------------


def test_the_first_of_several_rules_ends_a_run():
    rules = [small_gradient(1e-9), target_loss(0.5, every=2), no_improvement(lambda p: p.b * 0, patience=20)]
    trace = run(stop=rules, steps=200, key=KEYS, optimizer=[0.05, 0.1])
    assert {word for row in trace.status for word in row} == {"stopped: target loss"}
    assert (trace.loss[..., -1] <= 0.5).all()
    assert len(np.unique(trace.stopped_at)) > 1


def test_an_improvement_too_small_to_matter_does_not_keep_a_run_going():
    metric = lambda params: LOSS(params, DATA)
    keen, lazy = (
        run(steps=400, sampling=full_batch(), stop=no_improvement(metric, patience=3, min_delta=delta))
        for delta in (0.0, 1e-3)
    )
    assert lazy.stopped_at < keen.stopped_at
    assert lazy.best.step >= lazy.stopped_at - 1  # a smaller improvement is one all the same


def test_a_limit_of_time_ends_all_runs_within_a_tenth():
    trace = run(steps=2**31 - 1, stop=time_limit(0.3), record=2, key=KEYS)
    assert 0.3 <= trace.seconds[-1] < 1.0
    assert set(trace.status) == {"stopped: time limit"}
    assert (trace.stopped_at == trace.steps[-1]).all()
    assert run(stop=time_limit(60.0)).status == "finished"


# --- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"loss": noisy}, "random=True"),
        ({"random": True}, "no argument named 'key'"),
        ({"loss": lambda p, b: (LOSS(p, b), 1.0)}, "has_aux=True"),
        ({"loss": lambda p, b: LOSS(p, b), "has_aux": True}, "must return \\(value, aux\\)"),
        ({"loss": lambda p, b, state: (LOSS(p, b), jnp.ones(2)), "loss_state": jnp.ones(3)}, "has shape \\(2,\\)"),
        ({"evaluate": lambda p, b: p.w}, "evaluate must return one"),
        ({"observe": lambda a, b, c: a}, "observe\\(params, state\\)"),
        ({"stop": "validation"}, "no_improvement"),
        ({"stop": [small_step(1.0), small_step(2.0)]}, "at most one small_step"),
        ({"optimizer": [optax.adam(0.1), optax.adam(0.2)]}, "sweep="),
        ({"optimizer": optax.adam, "sweep": {"lr": [0.1]}}, "no setting"),
        ({"optimizer": 0.1, "sweep": {"learning_rate": [0.1]}}, "with sweep the optimizer must be a function"),
        ({"optimizer": optax.adam, "sweep": {"b1": [0.1, 0.2], "b2": [0.1, 0.2, 0.3]}}, "one length"),
        ({"params": {"w": jnp.ones(2, complex)}}, "real and the imaginary part"),
        ({"params": {"w": jnp.ones(2), "activation": jax.nn.relu}}, "activation.*partition"),
        ({"sampling": full_batch(rows=7), "loss": noisy, "random": True}, "leave rows out"),
    ],
)
def test_what_a_step_cannot_take_is_refused_with_what_works_instead(how, words):
    with pytest.raises((TypeError, ValueError), match=words):
        run(**how)


# --- the trace --------------------------------------------------------------------------------------------------


def test_a_trace_is_a_tidy_table():
    trace = run(optimizer=[0.05, 0.1], key=KEYS, observe=lambda params: {"b": params.b, "w": params.w})
    frame = trace.to_frame()
    first = ["run", "step_size", "seed", "step", "examples", "seconds", "loss"]
    assert frame.columns[:7].tolist() == first
    assert "b" in frame
    assert "w" not in frame
    assert len(frame) == 2 * 3 * 4
    own = frame[(frame.step_size == 0.1) & (frame.seed == 2)]
    assert own.run.unique().tolist() == [5]
    np.testing.assert_array_equal(own.loss, trace.loss[1, 2])
    np.testing.assert_array_equal(own.b, trace.observed["b"][1, 2])
    np.testing.assert_array_equal(own.examples, trace.examples)
    assert run(optimizer=optax.adam(0.1)).to_frame().step_size.isna().all()
    ended = run(optimizer=[0.0001, 0.2], steps=100, stop=target_loss(1.0))
    frame = ended.to_frame()
    assert frame[frame.run == 1].stopped_at.unique().tolist() == [ended.stopped_at[1]]
    assert frame.groupby("run").status.first().tolist() == list(ended.status)
    assert run(key=KEYS).to_frame().seed.max() == 2


@pytest.mark.parametrize("x", ["steps", "examples", "seconds"])
def test_a_trace_is_drawn_as_medians_with_bands(x):
    trace = run(optimizer=[0.05, 0.1], key=KEYS, batch_losses=True)
    axes = trace.plot(x)
    assert len(axes.lines) == 2
    assert len(axes.collections) == 2
    np.testing.assert_allclose(axes.lines[1].get_ydata(), np.median(trace.loss[1], axis=0))
    np.testing.assert_allclose(axes.lines[1].get_xdata(), getattr(trace, x))
    assert trace.plot(x, of="batch_loss", axes=axes) is axes
    matplotlib.pyplot.close("all")
    with pytest.raises(ValueError, match="x must be"):
        trace.plot("time")


def test_a_trace_prints_on_one_screen():
    lost = run(optimizer=[0.05] * 30 + [50.0], key=KEYS, steps=300)
    for trace in (run(), lost, run(stop=keep_best(lambda params: params.b))):
        text = repr(trace)
        assert text.count("\n") < 22
        assert max(map(len, text.split("\n"))) < 140
        assert "Array(" not in text
    assert "3 diverged" in repr(lost)


@pytest.mark.parametrize(("package", "call"), [("pandas", "to_frame"), ("matplotlib", "plot")])
def test_without_its_package_a_trace_says_what_to_install(package, call, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        getattr(run(), call)()
