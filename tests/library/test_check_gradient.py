"""check_gradient: the verdict, and the right cause at the right line for every mistake of the zoo."""

import inspect
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import detection
from experiments.support import zoo
from jaxgrad.check import assert_gradient, check_backprop, check_gradient

SPECIES = {s.name: s for s in zoo.SPECIES}
MISTAKES = [(s.name, bug) for s in zoo.SPECIES for bug in s.bugs]


def drawn(species, seed=0, n=20):
    return species.draw(np.random.default_rng([seed, 1]), n)


@pytest.mark.parametrize(("name", "bug"), MISTAKES, ids=[f"{a}-{b}" for a, b in MISTAKES])
def test_every_mistake_of_the_zoo_is_named_and_placed(name, bug):
    species = SPECIES[name]
    params, batch = drawn(species)
    report = check_gradient(species.loss, zoo.wrong_gradient(species, bug), params, batch)
    kinds, tags = species.bugs[bug]
    assert not report.ok
    assert report.findings[0].kind in kinds, str(report)
    lines = detection._lines(species.loss)
    if tags:
        assert int(report.findings[0].where.split(":")[1]) in {lines[t] for t in tags}, str(report)
        assert report.findings[0].where.startswith("zoo.py:")
    assert report.notes == ()
    assert len(str(report).splitlines()) < 45


@pytest.mark.parametrize("name", list(SPECIES))
def test_right_gradients_pass_at_trained_and_saturated_points(name):
    species = SPECIES[name]
    config = detection.Config(train_steps=150)
    with jax.enable_x64(True):
        points = detection._points(species, 3, config)
    for point, params, batch in points[1:]:  # the zoo's mistakes are drawn at random points
        for route, gradient in zoo.right_gradients(species).items():
            report = check_gradient(species.loss, gradient, params, batch)
            assert report.ok, f"{route} at {point}\n{report}"
            if point != "saturated" and "float32" not in route:  # there digits, and points, are lost, and it says so
                assert report.notes == (), f"{route} at {point}"


@pytest.mark.parametrize("check", [check_gradient, check_backprop])
def test_a_report_counts_as_true_where_the_gradient_is_right(check):
    x = np.random.default_rng(0).normal(size=(8, 3))

    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    for factor in (2, 1):
        gradient = lambda w, x, factor=factor: factor * x.T @ (x @ w) / len(x)
        by_hand = gradient if check is check_gradient else lambda w, x, gradient=gradient: (gradient(w, x), {})
        report = check(loss, by_hand, np.ones(3), x)
        assert bool(report) is report.ok is (factor == 2)


FACTORS = {
    ("softmax", "all negated"): (("sign", None, "-1"),),
    ("softmax", "all doubled"): (("scale", None, "2"),),
    ("softmax", "1/n left out"): (("scale", None, "n"),),
    ("softmax", "1/n twice"): (("scale", None, "1/n"),),
    ("softmax", "divided by k too"): (("scale", None, "1/k"),),
    ("softmax", "bias averaged"): (("scale", "b", "1/n"),),
    ("softmax", "W negated"): (("sign", "W", "-1"),),
    ("linear", "bias summed"): (("scale", "b", "n"),),
    ("linear", "l2 added"): (("additive", "w", "0.1"),),
    ("poisson", "penalty's 2 left out"): (("scaled-term", "w", "1/2"),),
    ("poisson", "data term summed"): (("scaled-term", None, "n"),),
    ("two-layer net", "hidden bias averaged"): (("scale", "b1", "1/n"),),
    ("two-layer net", "W1 off by 1e-8"): (("scale", "W1", "1.00000001"),),
    ("two-layer net", "hidden branch doubled"): (("scaled-term", None, "2"),),
    ("two-layer net", "two mistakes"): (("missing-term", "b1", None), ("sign", "W2", "-1")),
    ("two-layer net", "sigmoid' left out, n too large"): (
        ("missing-derivative", None, None),
        ("scale", None, "n"),
    ),
}


@pytest.mark.parametrize("case", FACTORS, ids=["-".join(c) for c in FACTORS])
def test_leaf_and_factor_are_exact(case):
    species = SPECIES[case[0]]
    params, batch = drawn(species)
    report = check_gradient(species.loss, zoo.wrong_gradient(species, case[1]), params, batch)
    assert {f[:3] for f in report.findings} == set(FACTORS[case]), str(report)


# ------------------------------------------------------------------------------------ the verdict


Net = namedtuple("Net", ["W1", "W2"])


def net_loss(p, batch):
    X, y = batch
    a = jnp.tanh(X @ p.W1)
    return jnp.mean((a @ p.W2 - y) ** 2)


def net_gradient(p, batch):
    X, y = batch
    a = np.tanh(X @ p.W1)
    d = 2 * (a @ p.W2 - y) / len(y)
    return Net(X.T @ (np.outer(d, p.W2) * (1 - a**2)), a.T @ d)


def net_point(n=30, seed=0):
    rng = np.random.default_rng(seed)
    return Net(rng.normal(size=(4, 5)), rng.normal(size=5)), (rng.normal(size=(n, 4)), rng.normal(size=n))


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_a_factor_in_front_of_the_loss_changes_nothing(scale):
    p, batch = net_point()
    loss = lambda p, b: scale * net_loss(p, b)
    right = lambda p, b: jax.tree.map(lambda g: scale * g, net_gradient(p, b))
    wrong = lambda p, b: Net(*(scale * g for g in (net_gradient(p, b).W1, -net_gradient(p, b).W2)))
    good = check_gradient(loss, right, p, batch)
    assert good.ok
    assert 1e-11 < good.smallest_detectable < 1e-8
    bad = check_gradient(loss, wrong, p, batch)
    assert (bad.findings[0].kind, bad.findings[0].leaf) == ("sign", "W2")


@pytest.mark.parametrize("leaf", ["W1", "W2"])
@pytest.mark.parametrize("size", [1e-8, 1e-9])
def test_errors_down_to_1e_8_of_a_leaf_are_seen(leaf, size):
    p, batch = net_point()
    rng = np.random.default_rng(5)
    noise = rng.normal(size=getattr(p, leaf).shape)

    def gradient(p, batch):
        g = net_gradient(p, batch)
        part = getattr(g, leaf)
        return g._replace(**{leaf: part + size * np.linalg.norm(part) * noise / np.linalg.norm(noise)})

    report = check_gradient(net_loss, gradient, p, batch)
    assert not report.ok
    assert [leaf_.path for leaf_ in report.leaves if not leaf_.ok] == [leaf]


def test_what_is_called_detectable_is_detected_and_a_tenth_of_rounding_is_not():
    p, batch = net_point()
    smallest = check_gradient(net_loss, net_gradient, p, batch).smallest_detectable
    grown = lambda f: lambda p, b: jax.tree.map(lambda g: g * (1 + f * smallest), net_gradient(p, b))
    assert not check_gradient(net_loss, grown(2.0), p, batch).ok
    assert check_gradient(net_loss, grown(0.01), p, batch).ok


def test_float32_code_is_right_to_its_own_precision_and_wrong_beyond_it():
    p, batch = net_point()

    def single(p, batch):
        low = lambda a: np.asarray(a, np.float32)
        return net_gradient(Net(low(p.W1), low(p.W2)), (low(batch[0]), low(batch[1])))

    report = check_gradient(net_loss, single, p, batch)
    assert report.ok
    assert 1e-6 < report.smallest_detectable < 1e-3
    off = lambda p, b: single(p, b)._replace(W1=single(p, b).W1 * np.float32(1.01))
    assert not check_gradient(net_loss, off, p, batch).ok
    as_jax = lambda p, b: jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), jax.grad(net_loss)(p, b))
    assert check_gradient(net_loss, as_jax, p, batch).ok


def test_float32_inputs_are_checked_in_float64():
    p, batch = net_point()
    low = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, batch))
    assert check_gradient(net_loss, jax.grad(net_loss), *low).ok
    off = lambda p, b: jax.tree.map(lambda g: g * (1 + 1e-8), jax.grad(net_loss)(p, b))
    assert not check_gradient(net_loss, off, *low).ok


@pytest.mark.parametrize("how", ["sign", "zero", "double"])
def test_wrong_gradients_are_seen_at_a_minimum(how):
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(30, 3)), rng.normal(size=30)
    w = np.linalg.lstsq(X, y, rcond=None)[0]
    loss = lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    factor = {"sign": -1.0, "zero": 0.0, "double": 2.0}[how]
    right = lambda w, b: 2 * b[0].T @ (b[0] @ w - b[1]) / len(b[1])
    assert np.linalg.norm(right(w, (X, y))) < 1e-14
    assert check_gradient(loss, right, w, (X, y)).ok
    assert not check_gradient(loss, lambda w, b: factor * right(w, b), w, (X, y)).ok


def test_a_leaf_whose_gradient_is_rounding_only_is_no_error():
    # A shift of all logits changes nothing in a softmax: the true gradient of c is zero up to rounding.
    def loss(p, batch):
        X, labels = batch
        z = X @ p["W"] + p["c"]
        return -jnp.mean(jax.nn.log_softmax(z)[jnp.arange(len(labels)), labels])

    def gradient(p, batch):
        X, labels = batch
        z = X @ p["W"]
        e = np.exp(z - z.max(axis=1, keepdims=True))
        q = e / e.sum(axis=1, keepdims=True)
        d = (q - np.eye(3)[labels]) / len(labels)
        return {"W": X.T @ d, "c": d.sum()}

    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(20, 4)), rng.integers(0, 3, 20))
    p = {"W": rng.normal(size=(4, 3)), "c": np.asarray(0.5)}
    report = check_gradient(loss, gradient, p, batch)
    assert report.ok
    assert max(point.error for point in report.points) < 1e-14
    wrong = lambda p, b: {**gradient(p, b), "c": np.asarray(0.1)}
    assert not check_gradient(loss, wrong, p, batch).ok


def test_n_is_told_from_a_number_that_is_equal():
    p, batch = net_point(n=24)
    times = lambda f: lambda p, b: jax.tree.map(lambda g: f(len(b[1])) * g, net_gradient(p, b))
    assert check_gradient(net_loss, times(lambda n: n), p, batch).findings[0].factor == "n"
    assert check_gradient(net_loss, times(lambda n: 24.0), p, batch).findings[0].factor == "24"
    assert check_gradient(net_loss, times(lambda n: n / 24), p, batch).findings[0].factor == "n/24"
    assert check_gradient(net_loss, times(lambda n: n / (n - 1)), p, batch).findings[0].factor == "n/(n-1)"
    assert check_gradient(net_loss, times(lambda n: 1 / np.log(2)), p, batch).findings[0].factor == "1/log(2)"
    assert check_gradient(net_loss, times(lambda n: -0.5), p, batch).findings[0].factor == "-1/2"
    # 4 features, and a 4 that is written down: changing the number of features tells them apart
    assert check_gradient(net_loss, times(lambda n: 4.0), p, batch).findings[0].factor == "4"
    by_width = lambda p, b: jax.tree.map(lambda g: b[0].shape[1] * g, net_gradient(p, b))
    assert check_gradient(net_loss, by_width, p, batch).findings[0].factor == "d"


# -------------------------------------------------------------------------------------- forms of input


def test_any_tree_aux_extra_arguments_and_pairs():
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(12, 3)), rng.normal(size=12)
    w = rng.normal(size=3)
    right = lambda w, X, y, l2: 2 * X.T @ (X @ w - y) / len(y) + l2 * w

    def loss(p, X, y, l2=0.1):
        w = jax.tree.leaves(p)[0]
        return jnp.mean((X @ w - y) ** 2) + 0.5 * l2 * jnp.sum(w**2)

    for params in (w, [w], (w,), {"a": {"b": w}}, Net(w, None)):
        gradient = lambda p, X, y, l2=0.1: jax.tree.map(lambda w: right(w, X, y, l2), p)
        assert check_gradient(loss, gradient, params, X, y).ok
        assert check_gradient(loss, gradient, params, X, y, l2=0.3).ok
        assert check_gradient(loss, gradient, params, X, y, 0.3).ok
        forgot = lambda p, X, y, l2=0.1: jax.tree.map(lambda w: right(w, X, y, 0.0), p)
        assert check_gradient(loss, forgot, params, X, y, l2=0.3).findings[0].kind == "missing-term"
    aux = lambda p, X, y: (loss(p, X, y), {"norm": 1.0})
    assert check_gradient(aux, lambda p, X, y: right(p, X, y, 0.1), w, X, y, has_aux=True).ok
    assert check_gradient(aux, lambda p, X, y: (right(p, X, y, 0.1), 3.0), w, X, y, has_aux=True).ok
    assert check_gradient(loss, lambda p, X, y: (loss(p, X, y), right(p, X, y, 0.1)), w, X, y).ok
    assert check_gradient(lambda p: jnp.sum(p**2), lambda p: 2 * p, w).ok
    assert check_gradient(lambda p: p**2, lambda p: 2 * p, 1.5).ok


def test_leaves_that_are_no_floats_stay_as_they_are():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(9, 3))
    p = {"W": rng.normal(size=(3, 2)), "act": jnp.tanh, "name": "first", "steps": np.arange(3)}
    loss = lambda p, X: jnp.mean(p["act"](X @ p["W"]) ** 2)

    def gradient(p, X):
        a = np.tanh(X @ p["W"])
        return {"W": 2 * X.T @ (a * (1 - a**2)) / a.size, "act": None, "name": None, "steps": None}

    assert check_gradient(loss, gradient, p, X).ok
    assert check_gradient(loss, lambda p, X: {"W": gradient(p, X)["W"]}, p, X).ok


def test_assert_gradient_raises_the_report():
    p, batch = net_point()
    assert_gradient(net_loss, net_gradient, p, batch)
    with pytest.raises(AssertionError, match="W2 has the wrong sign") as caught:
        assert_gradient(net_loss, lambda p, b: net_gradient(p, b)._replace(W2=-net_gradient(p, b).W2), p, batch)
    assert "sign in leaf W2" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_person_s_own_test_fails_with_the_report(tmp_path):
    import os
    import subprocess
    import sys

    file = tmp_path / "test_mine.py"
    file.write_text(
        "import jax.numpy as jnp, numpy as np\n"
        "from jaxgrad.check import assert_gradient\n"
        "def loss(w, X):\n"
        "    return jnp.mean((X @ w) ** 2)\n"
        "def test_mine():\n"
        "    X = np.arange(12.0).reshape(4, 3) ** 0.5\n"
        "    assert_gradient(loss, lambda w, X: X.T @ (X @ w) / len(X), np.ones(3), X)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTEST_ADDOPTS": ""},  # those of this run are not the person's
        check=False,
    )
    assert done.returncode == 1
    assert "scale, factor 1/2" in done.stdout
    assert "test_mine.py:4:  (X @ w) ** 2" in done.stdout


# --------------------------------------------------------------------------- kinks, floating point, rules


def test_a_kink_is_told_and_is_no_error():
    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(12, 3)), rng.normal(size=12))

    def loss(p, batch):
        X, y = batch
        a = jax.nn.relu(X @ p["W"])
        return jnp.mean((a @ p["v"] - y) ** 2)

    def gradient(p, batch):
        X, y = batch
        z = X @ p["W"]
        d = 2 * (np.maximum(z, 0) @ p["v"] - y) / len(y)
        return {"W": X.T @ (np.outer(d, p["v"]) * (z >= 0)), "v": np.maximum(z, 0).T @ d}

    p = {"W": np.zeros((3, 4)), "v": rng.normal(size=4)}
    report = check_gradient(loss, gradient, p, batch)
    assert report.ok
    assert report.findings[0].kind == "kink"
    assert report.findings[0].leaf == "W"
    assert "relu" in report.findings[0].expression
    assert check_gradient(loss, gradient, {**p, "W": rng.normal(size=(3, 4))}, batch).findings == ()


def test_overflow_is_told_with_its_line_and_the_stable_form():
    loss = lambda w, b: jnp.mean(jax.nn.softplus(b[0] @ w) - b[1] * (b[0] @ w))

    def printed(w, b):
        X, y = b
        p = 1 / (1 + np.exp(-X @ w))
        return X.T @ (-(y / p - (1 - y) / (1 - p)) * p * (1 - p)) / len(y)

    def printed_jax(w, b):
        X, y = b
        p = 1 / (1 + jnp.exp(-X @ w))
        return X.T @ (-(y / p - (1 - y) / (1 - p)) * p * (1 - p)) / len(y)

    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(20, 3)), (rng.random(20) < 0.5) * 1.0)
    for gradient in (printed, printed_jax):
        report = check_gradient(loss, gradient, rng.normal(size=3), batch)
        assert not report.ok
        (finding,) = report.findings
        source, first = inspect.getsourcelines(gradient)
        assert finding.kind == "unstable"
        assert int(finding.where.split(":")[1]) in range(first, first + len(source))
        assert "p - y" in finding.sentence
        assert "about 36.7" in finding.sentence
    stable = lambda w, b: b[0].T @ (jax.nn.sigmoid(b[0] @ w) - b[1]) / len(b[1])
    assert check_gradient(loss, stable, rng.normal(size=3), batch).findings == ()


def test_a_softmax_without_its_maximum_overflows():
    def loss(W, batch):
        X, Y = batch
        return -jnp.mean(jnp.sum(Y * jax.nn.log_softmax(X @ W), axis=1))

    def gradient(W, batch):
        X, Y = batch
        e = np.exp(X @ W)
        q = e / e.sum(axis=1, keepdims=True)
        return X.T @ (q - Y) / len(Y)

    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(10, 3)), np.eye(4)[rng.integers(0, 4, 10)])
    report = check_gradient(loss, gradient, rng.normal(size=(3, 4)), batch)
    assert report.findings[0].kind == "unstable"
    assert "Subtract the largest logit" in report.findings[0].sentence


def test_a_poisson_rate_that_is_really_too_large_is_no_instability():
    loss = lambda w, b: jnp.mean(jnp.exp(b[0] @ w) - b[1] * (b[0] @ w))
    gradient = lambda w, b: b[0].T @ (np.exp(b[0] @ w) - b[1]) / len(b[1])
    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(20, 3)), rng.poisson(2.0, 20) * 1.0)
    report = check_gradient(loss, gradient, 0.2 * rng.normal(size=3), batch)
    assert report.ok
    assert report.findings == ()


def test_a_wrong_custom_derivative_of_the_loss_is_found_by_central_differences():
    @jax.custom_vjp
    def cube(x):
        return x**3

    cube.defvjp(lambda x: (x**3, x), lambda x, g: (2 * g * x**2,))
    loss = lambda w, X: jnp.mean(cube(X @ w))
    right = lambda w, X: X.T @ (3 * (X @ w) ** 2) / len(X)
    rng = np.random.default_rng(0)
    X, w = rng.normal(size=(9, 3)), rng.normal(size=3)
    for gradient, words in ((right, "agrees with central"), (jax.grad(loss), "has the same mistake")):
        report = check_gradient(loss, gradient, w, X)
        assert not report.ok
        (finding,) = report.findings
        assert finding.kind == "wrong-derivative"
        assert "custom derivative" in finding.sentence
        assert words in finding.sentence
        assert finding.expression.startswith("cube(")


def test_a_right_custom_derivative_passes():
    @jax.custom_jvp
    def f(x):
        return jnp.sin(x)

    f.defjvp(lambda primals, tangents: (jnp.sin(primals[0]), jnp.cos(primals[0]) * tangents[0]))
    loss = lambda w, X: jnp.mean(f(X @ w))
    X = np.random.default_rng(0).normal(size=(9, 3))
    assert check_gradient(loss, jax.grad(loss), np.ones(3), X).ok


def test_helpers_loops_and_jit_keep_their_lines():
    @jax.jit
    def act(z):
        return 1 / (1 + jnp.exp(-z))

    def loss(p, batch):
        X, y = batch
        h = X
        for W in p:
            h = act(h @ W)  # here
        return jnp.mean((jnp.sum(h, axis=1) - y) ** 2)

    def gradient(p, batch):
        X, y = batch
        hs = [X]
        for W in p:
            hs.append(1 / (1 + np.exp(-hs[-1] @ W)))
        d = np.outer(2 * (hs[-1].sum(axis=1) - y) / len(y), np.ones(hs[-1].shape[1]))
        out = []
        for W, h, a in zip(p[::-1], hs[-2::-1], hs[:0:-1], strict=True):
            dz = d  # the derivative of act is missing in all three layers
            del a
            out.append(h.T @ dz)
            d = dz @ W.T
        return out[::-1]

    rng = np.random.default_rng(0)
    batch = (rng.normal(size=(15, 4)), rng.normal(size=15))
    p = [rng.normal(size=(4, 4)) for _ in range(3)]
    report = check_gradient(loss, gradient, p, batch)
    source, first = inspect.getsourcelines(loss)
    here = first + next(i for i, line in enumerate(source) if "# here" in line)
    assert {f.kind for f in report.findings} == {"missing-derivative"}, str(report)
    assert {f.where for f in report.findings} == {f"test_check_gradient.py:{here}"}
    assert report.findings[0].expression == "act(h @ W)"


def test_a_gradient_that_knows_its_batch_size_is_still_diagnosed():
    def gradient(p, batch):
        X, _ = batch
        assert X.shape == (30, 4)
        return Net(*(-g for g in net_gradient(p, batch)))

    p, batch = net_point()
    report = check_gradient(net_loss, gradient, p, batch)
    assert report.findings[0].kind == "sign"
    assert any("only works for batches of 30" in note for note in report.notes)


def test_a_square_matrix_used_untransposed_is_found_at_the_given_size_only():
    # X is square at this batch size only: X @ d has no shape at another one.
    loss = lambda w, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    gradient = lambda w, b: b[0] @ (2 * (b[0] @ w - b[1])) / len(b[1])
    rng = np.random.default_rng(0)
    report = check_gradient(loss, gradient, rng.normal(size=6), (rng.normal(size=(6, 6)), rng.normal(size=6)))
    assert report.findings[0].kind == "transposed"
    assert "b[0].T" in str(report) or "b[0]^T" in str(report)


def test_the_lecture_s_own_slides_are_diagnosed():
    from jaxgrad import lecture
    from jaxgrad.types import TwoLayer

    rng = np.random.default_rng(0)
    X, y = jnp.asarray(rng.normal(size=(20, 3))), jnp.asarray(rng.normal(size=20))
    w = jnp.asarray(rng.normal(size=3))
    half = check_gradient(
        lambda w, b: lecture.linear_loss(w, *b), lambda w, b: lecture.linear_gradient_slide_half(w, *b), w, (X, y)
    )
    assert (half.findings[0].kind, half.findings[0].factor) in {("scale", "1/4"), ("scale", "1/2")}
    Y = jnp.asarray(rng.normal(size=(20, 2)))
    params = TwoLayer(jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=(4, 2))))

    def summed(p, b):
        return p._replace(W1=lecture.hidden_layer_gradient_sum(p, *b), W2=lecture.output_layer_gradient_sum(p, *b))

    report = check_gradient(lambda p, b: lecture.two_layer_loss(p, *b), summed, params, (X, Y))
    assert report.findings[0].kind == "scale"
    assert "n" in (report.findings[0].factor or "")
    labels = jnp.asarray((rng.random(20) < 0.5) * 1.0)
    from jaxgrad.types import Linear

    printed = check_gradient(
        lambda p, b: lecture.logistic_loss(p, *b),
        lambda p, b: lecture.logistic_gradient_as_printed(p, *b),
        Linear(w, jnp.asarray(0.1)),
        (X, labels),
    )
    assert printed.findings[0].kind == "unstable"
