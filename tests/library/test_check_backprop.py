"""check_backprop: the first wrong adjoint, what it is, and what is only inherited."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxgrad.check import check_backprop


def loss(p, batch):
    X, y = batch
    z1 = checkpoint_name(X @ p["W1"], "z1")
    a1 = checkpoint_name(jnp.tanh(z1), "a1")
    z2 = checkpoint_name(a1 @ p["W2"], "z2")
    a2 = checkpoint_name(jnp.tanh(z2), "a2")
    return jnp.mean((a2 @ p["w3"] - y) ** 2)


def backprop(bug):
    def run(p, batch):
        X, y = batch
        a1 = np.tanh(X @ p["W1"])
        z2 = a1 @ p["W2"]
        a2 = np.tanh(z2)
        r = 2 * (a2 @ p["w3"] - y) / len(y)
        da2 = np.outer(r, p["w3"])
        dz2 = da2 * (1 - (z2 if bug == "z2" else a2) ** 2)
        da1 = dz2 @ (p["W2"] if bug == "a1" else p["W2"].T)
        dz1 = da1 * (1 - a1**2) * (-1 if bug in ("z1", "z1 and z2") else 1)
        if bug == "z1 and z2":
            dz2 = 2 * dz2
        g = {"W1": X.T @ dz1, "W2": (X @ p["W1"] if bug == "W2" else a1).T @ dz2, "w3": a2.T @ r}
        return g, {"z1": dz1, "a1": da1, "z2": dz2, "a2": da2}

    return run


def point():
    rng = np.random.default_rng(0)
    p = {"W1": rng.normal(size=(3, 4)), "W2": rng.normal(size=(4, 4)), "w3": rng.normal(size=4)}
    return p, (rng.normal(size=(15, 3)), rng.normal(size=15))


def test_a_right_backward_pass():
    report = check_backprop(loss, backprop(None), *point())
    assert report.ok
    assert [a.name for a in report.adjoints] == ["w3", "a2", "z2", "W2", "a1", "z1", "W1"]
    assert {a.status for a in report.adjoints} == {"right"}


@pytest.mark.parametrize(
    ("bug", "kind", "inherited"),
    [
        ("z2", "wrong-value", {"W2", "a1", "z1", "W1"}),
        ("a1", "transposed", {"z1", "W1"}),
        ("z1", "negated-term", {"W1"}),
        ("W2", "wrong-value", set()),
    ],
)
def test_the_first_mistake_is_marked_and_named(bug, kind, inherited):
    report = check_backprop(loss, backprop(bug), *point())
    status = {a.name: a.status for a in report.adjoints}
    assert not report.ok
    assert [n for n, s in status.items() if s == "wrong"] == [bug]
    assert {n for n, s in status.items() if s == "inherited"} == inherited
    assert report.findings[0].kind == kind
    assert f"first mistake is in {bug}" in str(report)


def test_two_mistakes_are_both_marked():
    report = check_backprop(loss, backprop("z1 and z2"), *point())
    status = {a.name: a.status for a in report.adjoints}
    assert (status["z2"], status["z1"]) == ("wrong", "wrong")
    assert report.findings[0].factor == "2"


def test_a_subset_of_the_adjoints_is_enough():
    def run(p, batch):
        g, adjoints = backprop("a1")(p, batch)
        return g, {"z1": adjoints["z1"]}

    report = check_backprop(loss, run, *point())
    assert {a.name: a.status for a in report.adjoints}["z1"] == "wrong"
    assert report.findings[0].kind == "transposed"


@pytest.mark.parametrize(
    ("run", "error", "words"),
    [
        (lambda p, b: backprop(None)(p, b)[0], TypeError, "must return (gradient"),
        (lambda p, b: (backprop(None)(p, b)[0], {"z9": np.zeros(3)}), ValueError, "the loss tags a2, z2, a1, z1"),
        (lambda p, b: (backprop(None)(p, b)[0], {"z1": np.zeros(3)}), ValueError, "has shape (3,)"),
        (lambda p, b: (None, {}), ValueError, "None"),
    ],
)
def test_what_cannot_be_used_is_explained(run, error, words):
    with pytest.raises(error) as caught:
        check_backprop(loss, run, *point())
    assert words in str(caught.value)


def test_jax_grad_passes_with_adjoints_from_vjp():
    def run(p, batch):
        return jax.grad(loss)(p, batch), {}

    assert check_backprop(loss, run, *point()).ok
