"""The checker itself with a fault planted in it: the cases below, which pass, must then fail."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.check import check_gradient, faults, gradient, search
from jaxgrad.check.evaluate import agreement
from jaxgrad.check.program import replay


def loss(p, batch):
    X, y = batch
    z = X @ p["W"] + p["b"][None, :]
    a = jax.nn.sigmoid(z)
    return jnp.mean((a @ p["v"] - y) ** 2)


def derivation(bug):
    def run(p, batch):
        X, y = batch
        n = len(y)
        a = 1 / (1 + np.exp(-(X @ p["W"] + p["b"])))
        r = 2 * (a @ p["v"] - y) / n
        da = np.outer(r, np.ones_like(p["v"]) if bug == "factor" else p["v"])
        s = 1 / (1 + np.exp(-a))
        slope = {"left out": np.ones_like(a), "at output": s * (1 - s), "twice": (a * (1 - a)) ** 2}.get(
            bug, a * (1 - a)
        )
        dz = da * slope
        g = {"W": X.T @ dz, "b": dz.sum(axis=0), "v": a.T @ r}
        scale = {"n": n, "24": 24.0, "all": 1 + 1e-7, "sign": -1.0}.get(bug, 1.0)
        g = {k: scale * v for k, v in g.items()}
        if bug in ("W", "b", "v"):
            g[bug] = g[bug] * (1 + 1e-6)
        if bug == "branch":
            g["W"], g["b"] = -g["W"], -g["b"]
        return g

    return run


rng = np.random.default_rng(0)
P = {"W": rng.normal(size=(3, 4)), "b": rng.normal(size=4), "v": rng.normal(size=4)}
BATCH = (rng.normal(size=(24, 3)), rng.normal(size=24))


def ask(bug):
    return check_gradient(loss, derivation(bug), P, BATCH)


def test_right():
    report = ask(None)
    assert report.ok
    assert 1e-11 < report.smallest_detectable < 1e-9


def test_every_leaf():
    for leaf in ("W", "b", "v"):
        report = ask(leaf)
        assert [row.path for row in report.leaves if not row.ok] == [leaf]


def test_small_error():
    assert not ask("all").ok


def test_factor_of_n():
    assert ask("n").findings[0].factor == "n"
    assert ask("24").findings[0].factor == "24"


def test_causes():
    expected = {
        "left out": "missing-derivative",
        "at output": "wrong-argument",
        "twice": "extra-derivative",
        "factor": "missing-factor",
        "branch": "negated-term",
        "sign": "sign",
    }
    for bug, kind in expected.items():
        report = ask(bug)
        assert not report.ok
        assert report.findings[0].kind == kind, bug
        assert report.findings[0].where.startswith("test_check_mutations.py:")


CASES = (test_right, test_every_leaf, test_small_error, test_factor_of_n, test_causes)


def skip_first_leaf(original):
    return lambda evaluation, tol: [i for i in original(evaluation, tol) if i != 0]


def skip_last_leaf(original):
    return lambda evaluation, tol: [i for i in original(evaluation, tol) if i != len(evaluation.true) - 1]


def no_other_batch(original):
    return lambda *args, **kwargs: False


def absolute_tolerance(original):
    return lambda sizes, *rest: original(sizes, *rest)._replace(absolute=tuple(1e-3 for _ in sizes))


def no_changes(original):
    return lambda *args: 0 * original(*args)


def reverse_sign(original):
    return lambda *args: -original(*args)


def first_fault_only(original):
    return lambda case, hits: (0.0, int(hits[-1]), [])


def no_exact_factor(original):
    return lambda *args, **kwargs: "2"


MUTATIONS = {
    "a leaf is skipped": (agreement, "wrong_leaves", skip_first_leaf),
    "the last leaf is skipped": (agreement, "wrong_leaves", skip_last_leaf),
    "the tolerance is 1e-3": (agreement, "RELATIVE", lambda original: 1e-3),
    "the tolerance is absolute": (agreement, "tolerance", absolute_tolerance),
    "right gradients must agree to the last bit": (agreement, "RELATIVE", lambda original: 1e-17),
    "the batch size is not varied": (gradient, "resamples", no_other_batch),
    "faults change nothing": (faults, "changes", no_changes),
    "faults change the wrong way": (faults, "changes", reverse_sign),
    "contributions have the wrong sign": (faults, "shares", reverse_sign),
    "the least plausible fault is reported": (search, "_ranked", first_fault_only),
    "every factor is called 2": (search, "name_factor", no_exact_factor),
    "no piece of the loss is a function": (replay, "_pieces", lambda original: lambda *args: ()),
    "no step is a product": (replay, "_products", lambda original: lambda *args: ()),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_in_the_checker_is_seen(name, monkeypatch):
    module, attribute, mutate = MUTATIONS[name]
    gradient.forget()
    monkeypatch.setattr(module, attribute, mutate(getattr(module, attribute)))
    if attribute == "RELATIVE" and mutate(0) < 1e-16:
        monkeypatch.setattr(agreement, "FLOOR", 0.0)
    failed = []
    for case in CASES:
        try:
            case()
        except Exception:
            failed.append(case.__name__)
    gradient.forget()
    assert failed, f"{name}: all cases still pass"
