"""Our own reverse mode against jax.grad, and every single-fault gradient against a full faulty replay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.check import check_gradient, faults, search
from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.factors import name_factor
from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import autodiff, kernel, prepare
from jaxgrad.check.program import replay, steps


def deep(p, batch):
    X, y = batch
    z = X @ p["W1"] + p["b"][None, :]
    a = jax.nn.sigmoid(z)
    q = jax.nn.softmax(a @ p["W2"], axis=1)
    r = jnp.sum(q * jnp.tanh(z), axis=1) - y
    return jnp.mean(jnp.where(r > 0, r**2, -r)) + 0.1 * jnp.sum(p["W2"] ** 2)


def point(n=6, seed=0):
    rng = np.random.default_rng(seed)
    p = {"W1": rng.normal(size=(3, 4)), "W2": rng.normal(size=(4, 4)), "b": rng.normal(size=4)}
    return p, (rng.normal(size=(n, 3)), rng.normal(size=n))


def sample(p, batch):
    problem = prepare(deep, lambda p, b: p, p, (batch,), {}, False)
    store = kernel(problem)
    at = Point("here", len(batch[1]), problem.leaves, problem.data)
    value, true = autodiff(store, problem.leaves, problem.data)
    evaluation = Evaluation(at, value, tuple(true), tuple(true))
    return problem, search.sample(problem, store, evaluation, np.random.default_rng(0))


def test_reverse_mode_step_by_step_is_jax_grad():
    p, batch = point()
    _, s = sample(p, batch)
    expected = jax.grad(deep)(p, batch)
    for slot, leaf in zip(s.program.leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(s.replay.adjoints[slot], leaf, rtol=1e-13, atol=1e-15)
    values = replay.forward(s.program, jax.tree.leaves(p), list(batch))
    for ours, leaf in zip(replay.faulty_gradient(s.program, values, {}, {}), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, leaf, rtol=1e-13, atol=1e-15)


def test_the_tangents_are_the_jacobian():
    p, batch = point()
    _, s = sample(p, batch)
    # <v̄, J_v u> is the same number at every cut that the whole gradient flows through: at the output too.
    along_output = s.replay.tangents[s.program.output]
    np.testing.assert_allclose(along_output, s.true, rtol=1e-12, atol=1e-14)


def test_every_single_fault_is_what_a_full_faulty_replay_gives():
    p, batch = point()
    problem, s = sample(p, batch)
    case = search.Case(problem, (s,), s.faults, faults.terms(s.program), 0.0, {}, (0, 1, 2), (False, False, False), {})
    rng = np.random.default_rng(1)
    usable = [
        m
        for m, f in enumerate(s.faults)
        if np.all(np.isfinite(s.changes[m])) and not (f.piece >= 0 and not s.todo.pieces[f.piece].elementwise)
    ]
    kinds = {s.faults[m].kind for m in usable}
    assert {"missing-derivative", "wrong-argument", "transposed", "missing-factor", "wrong-value"} <= kinds
    # all kinds, a few of each: every replay is a program of its own
    chosen = [m for kind in sorted(kinds) for m in rng.permutation([u for u in usable if s.faults[u].kind == kind])[:3]]
    for m in chosen:
        gradient = search.replayed(case, s, [int(m)])
        got = search._along(s.directions, [np.asarray(g) for g in gradient])
        np.testing.assert_allclose(got, s.true + s.changes[m], rtol=1e-9, atol=1e-11, err_msg=str(s.faults[m]))


def test_a_dropped_contribution_is_what_stop_gradient_gives():
    p, batch = point()

    def without(p, batch):
        X, y = batch
        z = X @ p["W1"] + p["b"][None, :]
        a = jax.nn.sigmoid(z)
        q = jax.nn.softmax(a @ p["W2"], axis=1)
        r = jnp.sum(q * jax.lax.stop_gradient(jnp.tanh(z)), axis=1) - y
        return jnp.mean(jnp.where(r > 0, r**2, -r)) + 0.1 * jnp.sum(p["W2"] ** 2)

    problem, s = sample(p, batch)
    del problem
    expected = search._along(s.directions, jax.tree.leaves(jax.grad(without)(p, batch)))
    gaps = [np.linalg.norm(s.true - share - expected) for share in s.shares]
    best = faults.terms(s.program)[int(np.argmin(gaps))]
    assert min(gaps) < 1e-13
    assert s.program.steps[best.step].name in ("tanh", "mul")


def test_steps_know_their_lines_and_jit_is_opened():
    p, batch = point()
    _, s = sample(p, batch)
    first = deep.__code__.co_firstlineno
    lines = {step.name: step.frames[0].line - first for step in s.program.steps if step.frames}
    assert lines["logistic"] == 3
    assert lines["tanh"] == 5
    assert not any(step.primitive in ("jit", "pjit") for step in s.program.steps)
    assert all(step.frames[0].file.endswith("test_check_replay.py") for step in s.program.steps if step.frames)


@pytest.mark.parametrize("opened", [True, False])
def test_a_scan_is_written_out_or_one_step_and_is_differentiated_right(opened):
    def rnn(W, x):
        step = lambda h, xt: (jnp.tanh(W @ h + xt), None)
        return jnp.sum(jax.lax.scan(step, jnp.zeros(3), x)[0] ** 2)

    rng = np.random.default_rng(0)
    W, x = rng.normal(size=(3, 3)), rng.normal(size=(5, 3))
    program = steps.flatten(steps.jaxpr_of(lambda ls, ds: rnn(ls[0], ds[0]), [W], [x]), 1, opened)
    assert [s.name for s in program.steps].count("scan") == (0 if opened else 1)
    assert [s.moment for s in program.steps if s.name == "tanh"] == ([(t,) for t in range(5)] if opened else [])
    values = replay.forward(program, [jnp.asarray(W)], [jnp.asarray(x)])
    (ours,) = replay.faulty_gradient(program, values, {}, {})
    np.testing.assert_allclose(ours, jax.grad(rnn)(W, x), rtol=1e-12)


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (lambda n: 2.0, "2"),
        (lambda n: -1.0, "-1"),
        (lambda n: 0.5, "1/2"),
        (lambda n: n, "n"),
        (lambda n: 1 / n, "1/n"),
        (lambda n: -2 / n, "-2/n"),
        (lambda n: n / 2, "n/2"),
        (lambda n: n**2, "n^2"),
        (lambda n: np.sqrt(n), "sqrt(n)"),
        (lambda n: (n - 1) / n, "(n-1)/n"),
        (lambda n: 5.0, "d"),
        (lambda n: 0.2, "1/d"),
        (lambda n: 3 * n, "nk"),
        (lambda n: np.log(2), "log(2)"),
        (lambda n: 1 / np.log(10), "1/log(10)"),
        (lambda n: np.sqrt(5), "sqrt(d)"),
        (lambda n: n / 40, "n/40"),
        (lambda n: 17 / n, "17/n"),
        (lambda n: 0.3, "0.3"),
        (lambda n: 0.123456, "0.123456"),
        (lambda n: 1 + 1e-9, "1.000000001"),
        (lambda n: np.exp(n), None),
    ],
)
def test_factors_are_named(value, name):
    samples = [(n, float(value(n))) for n in (7, 7, 11, 24)]
    assert name_factor(samples, {"d": 5, "k": 3}) == name


def test_without_other_batch_sizes_a_factor_equal_to_n_is_n():
    assert name_factor([(24, 24.0)], {"d": 5}) == "n"
    assert name_factor([(24, 2.0)], {"d": 5}) == "2"
    assert name_factor([(24, 2.0), (24, 3.0)], {"d": 5}) is None


def test_what_does_not_depend_on_the_leaf_is_computed_once(monkeypatch):
    """Several leaves that nothing explains: the reverse passes of one serve all."""
    counts = {"varied": 0, "sample": 0}
    vary, analyse = search._varied, search.sample
    monkeypatch.setattr(search, "_varied", lambda *a: [vary(*a), counts.update(varied=counts["varied"] + 1)][0])
    monkeypatch.setattr(search, "sample", lambda *a: [analyse(*a), counts.update(sample=counts["sample"] + 1)][0])

    def loss(p, x):
        h = x
        for _ in range(3):
            h = jnp.tanh(h @ p["U"] + x @ p["W"] + x @ p["V"])
        return jnp.mean(h**2)

    def gradient(names):
        def run(p, x):
            g = jax.grad(loss)(p, x)
            return {k: np.asarray(v * jnp.cos(7 * v) if k in names else v) for k, v in g.items()}

        return run

    rng = np.random.default_rng(0)
    params = {k: rng.normal(size=(4, 4)) for k in "UVW"}
    x = rng.normal(size=(9, 4))
    spent = []
    for names in ("U", "UVW"):
        counts.update(varied=0, sample=0)
        assert not check_gradient(loss, gradient(names), params, x).ok
        spent.append(dict(counts))
    assert spent[1]["sample"] == spent[0]["sample"]
    assert spent[1]["varied"] <= spent[0]["varied"]
