"""The laws that hold wherever the rows are, and the places where they may be.

`test_placements.py` runs every law in every place. Those that need several devices run in a process of their own:

    python placements.py FOLDER DEVICES         writes what each law said in a place of that many devices, as JSON
"""

import json
import sys
import time
import traceback
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import losses, models, open_rows, parallel
from jaxgrad.descent import (
    Checkpoint,
    descend,
    keep_best,
    loss_key,
    no_improvement,
    recorded_key,
    small_gradient,
    small_step,
    target_loss,
)
from jaxgrad.rows import Rows
from jaxgrad.sampling import distinct, full_batch, reshuffled, with_replacement
from jaxgrad.types import Batch

if __name__ == "__main__":  # before the first array
    jax.config.update("jax_enable_x64", True)
    parallel.start(devices=int(sys.argv[2]))

N, D, STEPS = 43, 3, 40
ETA = 0.1
LOSS = losses.mean_loss(models.linear, losses.squared)
FULL = jax.jit(LOSS)
KEY = jax.random.key(11)


def table():
    """Rows `[43, 4]`: three features, and a target that is linear in them but for noise."""
    r = np.random.default_rng(8)
    x = r.normal(size=(N, D)) * np.array([1.0, 0.7, 0.4])
    return np.column_stack([x, x @ np.array([1.0, -2.0, 3.0]) + 0.3 * r.normal(size=N)])


ROWS = Batch(table()[:, :D], table()[:, D])
START = models.Linear(np.array([2.0, -1.0, 0.5]), np.float64(0.2))


class Place(NamedTuple):
    """Where the rows are."""

    data: Any
    how: dict[str, Any]
    """Arguments of `descend` that belong to it."""
    keys: Any
    etas: list[float]
    """The step sizes that run side by side; one alone is given as a number."""
    full: Any
    """What the full batch is called there."""


def memory(folder):
    return Place(ROWS, {}, KEY, [ETA], full_batch())


def grid(folder):
    return Place(ROWS, {}, jax.random.split(KEY, 2), [ETA, 0.05], full_batch())


def tiled(folder):
    return Place(ROWS, {"memory": 1e-9}, jax.random.split(KEY, 3), [ETA, 0.05], full_batch())


def row_blocks(folder):
    return Place(ROWS, {}, KEY, [ETA], full_batch(rows=10))


def disk(folder):
    file = folder / "rows.npy"
    if not file.exists():
        np.save(file, table())
    # Blocks of a few steps each.
    return Place(open_rows(file, target=-1, memory=1e-6), {}, KEY, [ETA], full_batch())


def one_device(folder):
    return devices(folder, 1)


def devices(folder, count=None):
    mesh = parallel.mesh(jax.devices()[:count])
    return Place(parallel.shard(ROWS, mesh), {}, KEY, [ETA], full_batch())


def many_on_devices(folder):
    return Place(parallel.shard(ROWS, parallel.mesh()), {}, jax.random.split(KEY, 2), [ETA, 0.05], full_batch())


HERE = [memory, grid, tiled, row_blocks, disk, one_device]
ON_SEVERAL = [devices, many_on_devices]

SAMPLINGS = [None, with_replacement(5), distinct(8), reshuffled(10), reshuffled(10, drop_last=False)]
"""None stands for the place's full batch."""


def run(place, loss=LOSS, *, sampling=None, steps=STEPS, **how):
    """`descend` there."""
    optimizer = place.etas if len(place.etas) > 1 else place.etas[0]
    arguments = {"optimizer": optimizer, "key": place.keys, "record": 5, **place.how, **how}
    return descend(loss, START, place.data, sampling=sampling or place.full, steps=steps, **arguments)


def each(place, tree):
    """The entries of every run, with its step size and key."""
    keys = place.keys if place.keys.ndim else place.keys[None]
    lead = [len(place.etas)] * (len(place.etas) > 1) + [len(keys)] * place.keys.ndim
    for i, eta in enumerate(place.etas):
        for j, key in enumerate(keys):
            index = tuple([i] * (len(place.etas) > 1) + [j] * place.keys.ndim)
            assert not lead or len(index) == len(lead)
            yield eta, key, jax.tree.map(lambda leaf, index=index: np.asarray(leaf)[index], tree)


def plain(eta, key, *, sampling, steps=STEPS, loss=LOSS, random=False, state=None):
    """The loop that everybody writes: the parameters after each step, each batch's loss, each state of the loss."""
    path, seen, states = [jax.tree.map(jnp.asarray, START)], [], [state]
    evaluate, drawn = _slope(loss, state is not None), np.broadcast_to(np.arange(N), (steps, N))
    if sampling is not None:
        drawn = np.asarray(_drawn(sampling, max(steps, 1))(key))
    for t in range(steps):
        own = drawn[t, : N % 10] if sampling == SAMPLINGS[-1] and t % 5 == 4 else drawn[t]
        batch = Batch(ROWS.x[own], ROWS.y[own])
        given = ({"key": _loss_key(key, t)} if random else {}) | ({} if state is None else {"state": states[-1]})
        value, slope = evaluate(path[-1], batch, **given)
        if state is not None:
            value, new = value
            states.append(new)
        seen.append(float(value))
        path.append(jax.tree.map(lambda w, g: w - eta * g, path[-1], slope))
    return path, np.array(seen), states


_loss_key = jax.jit(loss_key)


@lru_cache
def _slope(loss, has_aux):
    return jax.jit(jax.value_and_grad(loss, has_aux=has_aux))


@lru_cache
def _drawn(sampling, steps):
    return jax.jit(lambda key: jax.vmap(lambda t: sampling.indices(key, t, N))(jnp.arange(steps)))


def near(got, want, rtol=1e-9):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=rtol, atol=1e-12)


def same(got, want):
    """To the last bit."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# --- the laws ---------------------------------------------------------------------------------------------------


def steps_are_those_of_the_plain_loop(place, folder):
    """The same examples in the same order, and so the same parameters, losses, step sizes and counts."""
    for sampling in SAMPLINGS:
        trace = run(place, sampling=sampling, batch_losses=True)
        shape = np.shape(trace.stopped_at)
        assert trace.loss.shape == (*shape, 5)
        for eta, key, (params, loss, norm, batch_loss) in each(
            place, (trace.params, trace.loss, trace.step_norm, trace.batch_loss)
        ):
            path, seen, _ = plain(eta, key, sampling=sampling)
            near(params, path[-1])
            near(loss, np.array([FULL(path[t], ROWS) for t in trace.steps]))
            near(batch_loss, seen)
            steps = [optax.tree.norm(jax.tree.map(jnp.subtract, path[t], path[t - 1])) for t in trace.steps[1:]]
            near(norm[1:], np.array(steps), rtol=1e-6)
        sizes = [N if sampling is None else len(sampling.indices(KEY, t, N)) for t in range(STEPS)]
        assert trace.examples.tolist() == [sum(sizes[:t]) for t in trace.steps]


def it_does_not_matter_where_a_run_is_cut(place, folder):
    for sampling in (None, reshuffled(10, drop_last=False)):
        whole = run(place, sampling=sampling, record=2)
        same(run(place, sampling=sampling, record=range(STEPS + 1)).params, whole.params)
        half = run(place, sampling=sampling, steps=17, record=2)
        how = {"optimizer": place.etas if len(place.etas) > 1 else place.etas[0], "key": place.keys, **place.how}
        on = descend(LOSS, half.state, place.data, sampling=sampling or place.full, steps=STEPS, **how)
        same(on.params, whole.params)
        assert on.examples[-1] == whole.examples[-1]


def a_run_goes_on_from_its_checkpoint(place, folder):
    file = Path(folder) / "run.npz"
    file.unlink(missing_ok=True)
    how = {"sampling": distinct(8), "batch_losses": True, "stop": [keep_best(_metric, every=3), target_loss(-1.0)]}
    how["optimizer"] = optax.noisy_sgd(0.05, 0.1, 0.5, 3) if len(place.etas) == 1 else place.etas
    first = run(place, steps=20, record=[7, 20], checkpoint=Checkpoint(file, every=10), **how)
    on = run(place, record=[7, 20, 33], checkpoint=Checkpoint(file, every=10, resume=True), **how)
    whole = run(place, record=[7, 20, 33], **how)
    assert first.steps.tolist() == [7, 20]
    wanted = ("steps", "params", "loss", "step_norm", "batch_loss", "stopped_at", "best", "examples")
    for name in wanted:
        same(getattr(on, name), getattr(whole, name))
    assert on.status == whole.status


def divergence_is_dated_to_the_step(place, folder):
    place = place._replace(etas=[eta * 400 for eta in place.etas])
    trace = run(place, sampling=distinct(8), steps=300, record=4)
    for eta, key, at in each(place, trace.stopped_at):
        path, _, _ = plain(eta, key, sampling=distinct(8), steps=int(at))
        finite = [all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params)) for params in path]
        assert at < 300
        assert finite == [True] * int(at) + [False]
    assert all("diverged at step" in word for word in _flat(trace.status))


def each_rule_ends_a_run_where_the_plain_loop_meets_it(place, folder):
    slope = jax.jit(jax.grad(LOSS))
    rules = {
        "small step": (small_step(0.02), lambda path, t: _norm(path[t], path[t - 1]) < 0.02 if t else False),
        "small gradient": (small_gradient(0.2, every=3), lambda path, t: optax.tree.norm(slope(path[t], ROWS)) < 0.2),
        "target loss": (target_loss(0.3, every=3), lambda path, t: FULL(path[t], ROWS) <= 0.3),
    }
    for reason, (rule, met) in rules.items():
        every = getattr(rule, "every", 1)
        for sampling in (None, distinct(8)):
            trace = run(place, sampling=sampling, stop=rule, record=3)
            statuses = np.array(trace.status, object)
            for eta, key, (at, status) in each(place, (trace.stopped_at, statuses)):
                path, _, _ = plain(eta, key, sampling=sampling)
                first = next((t for t in range(0, STEPS, every) if met(path, t)), None)
                assert at == (STEPS if first is None else first), (reason, at, first)
                assert str(status) == ("finished" if first is None else f"stopped: {reason}")


def the_best_parameters_are_those_of_the_lowest_metric(place, folder):
    rule = no_improvement(_metric, patience=3, every=2, min_delta=1e-3)
    trace = run(place, sampling=distinct(4), stop=rule)
    for eta, key, (best, at) in each(place, (trace.best, trace.stopped_at)):
        path, _, _ = plain(eta, key, sampling=distinct(4))
        values, last, waited, stopped = {}, np.inf, 0, STEPS
        for t in range(0, STEPS, 2):
            values[t] = float(_metric(path[t]))
            last, waited = (values[t], 0) if values[t] < last - 1e-3 else (last, waited + 1)
            if waited >= 3:
                stopped = t
                break
        values[stopped] = float(_metric(path[stopped]))  # the end counts, though no check is due there
        assert at == stopped
        assert best.step == min(values, key=values.get)
        near((best.params, best.value), (path[int(best.step)], min(values.values())))


def what_observes_is_off_the_clock_and_changes_nothing(place, folder):
    slept = []

    def sleeps(params, state):
        def wait(step):
            began = time.perf_counter()
            time.sleep(0.1)
            slept.append(time.perf_counter() - began)
            return step

        like = jax.ShapeDtypeStruct((), jnp.int32)
        return jax.pure_callback(wait, like, state.step, vmap_method="sequential"), state.update

    how = {"sampling": distinct(8), "record": [0, 20, STEPS]}
    run(place, observe=sleeps, **how)  # compiled
    slept.clear()
    began = time.perf_counter()
    slow = run(place, observe=sleeps, **how)
    assert slow.seconds[-1] <= time.perf_counter() - began - sum(slept)
    assert len(slept) >= 3
    fast = run(place, **how)
    same((slow.params, slow.loss), (fast.params, fast.loss))
    for _, _, step in each(place, slow.observed[0]):
        assert step.tolist() == [0, 20, STEPS]


def a_loss_that_draws_gets_the_key_of_its_step(place, folder):
    def loss(params, batch, key):
        kept = jax.random.bernoulli(key, 0.7, batch.x.shape)
        return LOSS(params, Batch(jnp.where(kept, batch.x / 0.7, 0.0), batch.y))

    for sampling in (distinct(8), reshuffled(10, drop_last=False)):
        trace = run(place, loss, sampling=sampling, random=True, evaluate=LOSS, batch_losses=True)
        for eta, key, (params, seen, recorded) in each(place, (trace.params, trace.batch_loss, trace.loss)):
            path, values, _ = plain(eta, key, sampling=sampling, loss=loss, random=True)
            near(params, path[-1])
            near(seen, values)
            near(recorded[-1], LOSS(path[-1], ROWS))
    if isinstance(place.data, Rows):
        return
    trace = run(place, loss, sampling=distinct(8), random=True)
    for eta, key, recorded in each(place, trace.loss):
        path, _, _ = plain(eta, key, sampling=distinct(8), loss=loss, random=True)
        near(recorded[-1], loss(path[-1], ROWS, recorded_key(key)))
    full = place.full._replace(rows=None)
    trace = run(place, loss, sampling=full, random=True)
    for eta, key, params in each(place, trace.params):
        near(params, plain(eta, key, sampling=None, loss=loss, random=True)[0][-1])


def a_state_of_the_loss_goes_along(place, folder):
    def loss(params, batch, state):
        mean = batch.x.mean(axis=0)
        new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "steps": state["steps"] + 1}
        return LOSS(params, Batch(batch.x - mean[None, :], batch.y)), new

    def evaluate(params, batch, state):
        return LOSS(params, Batch(batch.x - state["mean"][None, :], batch.y))

    first = {"mean": jnp.zeros(D), "steps": jnp.zeros(())}
    file = Path(folder) / "state.npz"
    file.unlink(missing_ok=True)
    how = {"sampling": distinct(8), "loss_state": first, "evaluate": evaluate}
    run(place, loss, steps=20, checkpoint=Checkpoint(file, every=10), **how)
    trace = run(place, loss, checkpoint=Checkpoint(file, every=10, resume=True), **how)
    whole = run(place, loss, **how)
    same((trace.params, trace.state.model), (whole.params, whole.state.model))
    for eta, key, (params, model, recorded) in each(place, (trace.params, trace.state.model, trace.loss)):
        path, _, states = plain(eta, key, sampling=distinct(8), loss=loss, state=first)
        near((params, model), (path[-1], states[-1]))
        assert model["steps"] == STEPS
        near(recorded[-1], evaluate(path[-1], ROWS, states[-1]))


LAWS = [
    steps_are_those_of_the_plain_loop,
    it_does_not_matter_where_a_run_is_cut,
    a_run_goes_on_from_its_checkpoint,
    divergence_is_dated_to_the_step,
    each_rule_ends_a_run_where_the_plain_loop_meets_it,
    the_best_parameters_are_those_of_the_lowest_metric,
    what_observes_is_off_the_clock_and_changes_nothing,
    a_loss_that_draws_gets_the_key_of_its_step,
    a_state_of_the_loss_goes_along,
]


def _metric(params):
    return jnp.sum((params.w - jnp.array([1.0, -2.0, 3.0])) ** 2)


def _norm(a, b):
    return optax.tree.norm(jax.tree.map(jnp.subtract, a, b))


def _flat(status):
    return [status] if isinstance(status, str) else [word for each in status for word in _flat(each)]


def main(folder: Path) -> None:
    found = {}
    for make in ON_SEVERAL if jax.device_count() == 2 else [devices]:
        for law in LAWS:
            try:
                law(make(folder), folder)
                found[f"{make.__name__} {law.__name__}"] = ""
            except Exception:
                found[f"{make.__name__} {law.__name__}"] = traceback.format_exc()
    (folder / "laws.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
