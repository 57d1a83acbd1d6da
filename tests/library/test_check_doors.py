"""The other doors: some parameters, separate arguments, a NumPy loss, backward passes, rules, update steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.check import assert_gradient, check_gradient, check_rule, check_vjp

RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def people_let_shapes_spread():
    with jax.numpy_rank_promotion("allow"):
        yield


def net_loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["W"] + p["c"]) @ p["v"] - y) ** 2)


def net_by_hand(p, batch):
    x, y = batch
    a = np.tanh(x @ p["W"] + p["c"])
    e = 2 * (a @ p["v"] - y) / len(y)
    d = np.outer(e, p["v"]) * (1 - a**2)
    return {"W": x.T @ d, "c": d.sum(axis=0), "v": a.T @ e}


def net():
    rng = RNG(0)
    p = {"W": rng.normal(size=(3, 5)), "c": rng.normal(size=5), "v": rng.normal(size=5)}
    return p, (rng.normal(size=(16, 3)), rng.normal(size=16))


# ------------------------------------------------------------------------------------ some parameters


@pytest.mark.parametrize(
    "returned",
    [
        lambda g: {"v": g["v"]},
        lambda g: {"W": None, "c": None, "v": g["v"]},
        lambda g: {**g, "W": 7 * g["W"]},
        lambda g: g["v"],
        lambda g: [g["v"]],
    ],
)
def test_only_some_parameters_are_checked_in_whatever_form_they_are_returned(returned):
    p, batch = net()
    report = check_gradient(net_loss, lambda p, b: returned(net_by_hand(p, b)), p, batch, only=["v"])
    assert report.ok, str(report)
    assert [row.path for row in report.leaves] == ["v"]

    def negated(p, b):
        g = net_by_hand(p, b)
        return returned({**g, "v": -g["v"]})

    report = check_gradient(net_loss, negated, p, batch, only=["v"])
    assert [(f.kind, f.leaf) for f in report.findings] == [("sign", "v")]


def test_only_takes_the_first_part_of_a_path_and_several_in_order():
    p, batch = net()
    tree = {"first": {"W": p["W"], "c": p["c"]}, "last": [p["v"]]}
    flat = lambda q: {"W": q["first"]["W"], "c": q["first"]["c"], "v": q["last"][0]}
    loss = lambda q, b: net_loss(flat(q), b)

    def first(q, b):
        g = net_by_hand(flat(q), b)
        return g["W"], g["c"]

    assert check_gradient(loss, first, tree, batch, only="first")
    assert not check_gradient(loss, lambda q, b: first(q, b)[::-1], tree, batch, only="first")


@pytest.mark.parametrize(("only", "words"), [(["w"], "no parameter: there are W, c, v"), ([], "only is empty")])
def test_only_names_what_there_is(only, words):
    p, batch = net()
    with pytest.raises(ValueError, match=words):
        check_gradient(net_loss, net_by_hand, p, batch, only=only)


# ---------------------------------------------------------------------------------- separate arguments


def separate_loss(W, c, v, x, y):
    return net_loss({"W": W, "c": c, "v": v}, (x, y))


def separate_by_hand(W, c, v, x, y):
    g = net_by_hand({"W": W, "c": c, "v": v}, (x, y))
    return g["W"], g["c"], g["v"]


@pytest.mark.parametrize("options", [{}, {"argnums": (0, 1, 2)}])
def test_parameters_that_are_passed_one_by_one_are_checked(options):
    p, batch = net()
    arguments = (p["W"], p["c"], p["v"], *batch)
    report = check_gradient(separate_loss, separate_by_hand, *arguments, **options)
    assert report.ok, str(report)
    assert [row.path for row in report.leaves] == ["W", "c", "v"]
    named = lambda *a: dict(zip(("dW", "dc", "dv"), separate_by_hand(*a), strict=True))
    assert check_gradient(separate_loss, named, *arguments, **options)

    def wrong(*a):
        W, c, v = separate_by_hand(*a)
        return W, c / len(a[-1]), v

    report = check_gradient(separate_loss, wrong, *arguments, **options)
    assert [(f.leaf, f.factor) for f in report.findings] == [("c", "1/n")]
    assert report.findings[0].where.startswith("test_check_doors.py:")


def test_argnums_picks_arguments_as_in_jax_grad():
    p, batch = net()
    arguments = (p["W"], p["c"], p["v"], *batch)
    assert check_gradient(separate_loss, jax.grad(separate_loss, argnums=2), *arguments, argnums=2)
    assert check_gradient(separate_loss, jax.grad(separate_loss, argnums=(2, 0)), *arguments, argnums=(2, 0))
    assert_gradient(separate_loss, jax.grad(separate_loss, argnums=(0, 1)), *arguments, argnums=(0, 1))
    with pytest.raises(ValueError, match="there are 5 arguments"):
        check_gradient(separate_loss, separate_by_hand, *arguments, argnums=(0, 7))
    with pytest.raises(TypeError, match="argnums must be"):
        check_gradient(separate_loss, separate_by_hand, *arguments, argnums="W")


# --------------------------------------------------------------------------------------- a NumPy loss


def numpy_loss(p, batch):
    x, y = batch
    z = np.array(x, copy=True) @ np.asarray(p["w"])
    q = 1 / (1 + np.exp(-z))
    return -np.mean(y * np.log(q) + (1 - y) * np.log(1 - q))


def rough_numpy_loss(p, batch):
    x, y = batch
    return float(np.mean(np.abs(np.asarray(x) @ np.asarray(p["w"]) - y) ** 1.5))


def of_numpy_loss(p, batch):
    x, y = batch
    return {"w": x.T @ (1 / (1 + np.exp(-x @ p["w"])) - y) / len(y)}


def of_rough_numpy_loss(p, batch):
    x, y = batch
    r = x @ p["w"] - y
    return {"w": x.T @ (1.5 * np.sqrt(np.abs(r)) * np.sign(r)) / len(y)}


NUMPY = {"complex steps": (numpy_loss, of_numpy_loss), "central differences": (rough_numpy_loss, of_rough_numpy_loss)}


@pytest.mark.parametrize("method", NUMPY)
def test_a_numpy_loss_gets_a_numerical_verdict_and_it_is_said(method):
    loss, gradient = NUMPY[method]
    rng = RNG(1)
    p, batch = {"w": rng.normal(size=4)}, (rng.normal(size=(13, 4)), (rng.random(13) < 0.5).astype(float))
    report = check_gradient(loss, gradient, p, batch)
    assert report.ok, str(report)
    assert report.truth == method
    assert method in str(report)
    assert report.smallest_detectable < 1e-6
    for wrong, kind, factor in (
        (lambda g, n: -g, "sign", "-1"),
        (lambda g, n: n * g, "scale", "n"),
        (lambda g, n: g / 2, "scale", "1/2"),
        (lambda g, n: 0 * g, "missing-term", "0"),
    ):
        found = check_gradient(loss, lambda p, b, w=wrong: {"w": w(gradient(p, b)["w"], len(b[1]))}, p, batch)
        assert [(f.kind, f.factor) for f in found.findings] == [(kind, factor)]
    small = check_gradient(loss, lambda p, b: {"w": gradient(p, b)["w"] * (1 + 1e-6 * np.arange(4))}, p, batch)
    assert not small


def test_a_large_numpy_loss_is_tried_on_a_sample_and_it_is_said():
    def loss(W, batch):
        x, y = batch
        return np.mean((np.maximum(np.asarray(x) @ np.asarray(W), 0).sum(axis=1) - y) ** 2)

    def gradient(W, batch, factor=1.0):
        x, y = batch
        h = x @ W
        return factor * x.T @ ((h > 0) * (2 * (np.maximum(h, 0).sum(axis=1) - y) / len(y))[:, None])

    rng = RNG(2)
    W, batch = rng.normal(size=(80, 40)) / 9, (rng.normal(size=(20, 80)), rng.normal(size=20))
    report = check_gradient(loss, gradient, W, batch)
    assert report.ok, str(report)
    assert any("entries of params" in note for note in report.notes)
    assert check_gradient(loss, lambda W, b: gradient(W, b, 2.0), W, batch).findings[0].factor == "2"


def test_a_loss_that_calls_back_to_python_is_compared_with_differences():
    def loss(w, x):
        z = jax.pure_callback(lambda a: np.tanh(a), jax.ShapeDtypeStruct(x[:, 0].shape, x.dtype), x @ w)
        return jnp.mean(z**2)

    def gradient(w, x):
        z = np.tanh(x @ w)
        return x.T @ (2 * z * (1 - z**2)) / len(x)

    rng = RNG(3)
    report = check_gradient(loss, gradient, rng.normal(size=2), rng.normal(size=(9, 2)))
    assert report.ok, str(report)
    assert report.truth == "central differences"


# --------------------------------------------------------------------------------------- update steps


@pytest.mark.parametrize(
    ("step", "leaf"),
    [
        (lambda p, g: {k: p[k] - 0.1 * g[k] for k in p}, None),
        (lambda p, g: {k: -0.1 * g[k] for k in p}, None),
        (lambda p, g: {k: p[k] - (0.2 if k == "c" else 0.1) * g[k] for k in p}, "c"),
        (lambda p, g: {k: -(0.02 if k == "c" else 0.01) * g[k] for k in p}, "c"),
    ],
)
def test_a_step_of_descent_is_recognised_as_one(step, leaf):
    p, batch = net()
    report = check_gradient(net_loss, lambda p, b: step(p, net_by_hand(p, b)), p, batch)
    assert [(f.kind, f.leaf) for f in report.findings] == [("update-step", leaf)]
    assert report.findings[0].factor in ("-0.1", "-0.01")
    assert ("twice" in report.findings[0].sentence) == (leaf is not None)


def test_a_sign_and_a_half_are_no_step_of_descent():
    p, batch = net()
    for factor, kind in ((-1.0, "sign"), (-0.5, "scale")):
        scaled = lambda p, b, f=factor: {k: f * v for k, v in net_by_hand(p, b).items()}
        assert check_gradient(net_loss, scaled, p, batch).findings[0].kind == kind


# ------------------------------------------------------------------------------------ backward passes


def layer(x, w, b):
    return jax.nn.sigmoid(x @ w + b)


def layer_backward(cotangent, x, w, b, slope=True):
    a = 1 / (1 + np.exp(-(x @ w + b)))
    d = cotangent * (a * (1 - a) if slope else 1)
    return d @ w.T, x.T @ d, d.sum(axis=0)


def layer_arguments():
    rng = RNG(4)
    return rng.normal(size=(6, 3)), rng.normal(size=(3, 4)), rng.normal(size=4)


def test_a_right_backward_pass_of_a_layer():
    arguments = layer_arguments()
    report = check_vjp(layer, layer_backward, *arguments)
    assert report.ok, str(report)
    assert [row.path for row in report.leaves] == ["x", "w", "b"]
    assert check_vjp(layer, lambda x, w, b, dout: layer_backward(dout, x, w, b), *arguments)
    named = lambda dout, x, w, b: dict(zip("xwb", layer_backward(dout, x, w, b), strict=True))
    assert check_vjp(layer, named, *arguments)


def test_a_wrong_backward_pass_names_the_step_and_its_line():
    report = check_vjp(layer, lambda *a: layer_backward(*a, slope=False), *layer_arguments())
    assert report.findings[0].kind == "missing-derivative"
    assert report.findings[0].where.startswith("test_check_doors.py:")
    one = lambda c, x, w, b: (*layer_backward(c, x, w, b)[:2], c.sum(axis=0))
    report = check_vjp(layer, one, *layer_arguments())
    assert [row.path for row in report.leaves if not row.ok] == ["b"]


def test_a_mistake_that_a_uniform_cotangent_hides_is_seen():
    rng = RNG(5)
    x = rng.normal(size=(5, 4))
    centred = lambda x: x - x.mean(axis=1, keepdims=True)
    zero = lambda g, x: np.zeros_like(g) * x + (g - g) + 0 * g
    assert not check_vjp(centred, zero, x)
    assert check_vjp(centred, lambda g, x: g - g.mean(axis=1, keepdims=True), x)


def test_integers_strides_trees_and_complex_outputs():
    rng = RNG(6)
    table, rows = rng.normal(size=(7, 3)), np.array([0, 3, 3, 6])

    def scatter(g, table, rows):
        out = np.zeros_like(table)
        np.add.at(out, rows, g)
        return out, None

    def assigned(g, table, rows):
        out = np.zeros_like(table)
        out[rows] = g
        return out, None

    assert check_vjp(lambda table, rows: table[rows], scatter, table, rows)
    assert not check_vjp(lambda table, rows: table[rows], assigned, table, rows)

    def strided(x, step):
        return {"kept": x[::step], "sum": jnp.sum(x)}

    def strided_back(g, x, step):
        out = np.full_like(x, g["sum"])
        out[::step] += g["kept"]
        return out, None

    assert check_vjp(strided, strided_back, rng.normal(size=9), 2)
    spectrum = lambda x: jnp.fft.rfft(x)
    back = lambda g, x: np.asarray(jax.vjp(jnp.fft.rfft, jnp.asarray(x))[1](jnp.asarray(g))[0])
    assert check_vjp(spectrum, back, rng.normal(size=8))


def test_what_check_vjp_cannot_use_is_explained():
    with pytest.raises(TypeError, match="backward must be a function"):
        check_vjp(layer, 3.0, *layer_arguments())
    with pytest.raises(TypeError, match="at least one argument"):
        check_vjp(layer, layer_backward)
    with pytest.raises(TypeError, match="floating-point"):
        check_vjp(lambda x: x > 0, lambda g, x: g, np.ones(3))
    short = check_vjp(layer, lambda c, x, w, b: layer_backward(c, x, w, b)[:2], *layer_arguments())
    assert short.findings[0].kind == "structure"


# -------------------------------------------------------------------------------------- rules of functions


@jax.custom_vjp
def soft_sign(x, sharpness):
    return x * sharpness / (1 + jnp.abs(x * sharpness))


def _soft_sign_forth(x, sharpness):
    return soft_sign(x, sharpness), (x, sharpness)


def _soft_sign_back(kept, g):
    x, sharpness = kept
    slope = 1 / (1 + jnp.abs(x * sharpness)) ** 2
    return g * sharpness * slope, jnp.sum(g * x * slope)


soft_sign.defvjp(_soft_sign_forth, _soft_sign_back)


@jax.custom_jvp
def log_cosh(x):
    return jnp.log(jnp.cosh(x))


log_cosh.defjvp(lambda p, t: (log_cosh(*p), t[0] * (1 - jnp.tanh(p[0]) ** 2)))


def test_a_right_rule_of_a_function_is_right_and_a_wrong_one_is_diagnosed():
    x = RNG(7).normal(size=6)
    assert check_rule(soft_sign, x, 1.3)
    assert check_rule(jax.jit(soft_sign), x, 1.3)
    report = check_rule(log_cosh, x)
    assert not report
    assert "log_cosh" in str(report)


def test_arguments_that_a_rule_does_not_differentiate_are_held():
    import functools

    @functools.partial(jax.custom_vjp, nondiff_argnums=(0, 2))
    def power(name, x, k):
        return x**k if name == "power" else x

    power.defvjp(lambda name, x, k: (x**k, x), lambda name, k, x, g: (g * k * x ** (k - 1),))
    assert check_rule(power, "power", np.array([0.5, 2.0]), 3)

    @functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
    def wrong(x, k):
        return x**k

    wrong.defvjp(lambda x, k: (x**k, x), lambda k, x, g: (g * x ** (k - 1),))
    report = check_rule(wrong, np.array([0.5, 2.0, 1.5]), 3)
    assert not report


def test_a_function_without_a_rule_is_refused_in_words():
    with pytest.raises(TypeError, match="no derivative rule of its own"):
        check_rule(layer, *layer_arguments())
