"""The verdict is right whatever the loss is made of: rounding, low precision, loops, complex numbers, custom rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgrad.check import check_gradient
from jaxgrad.check.evaluate import agreement

RNG = np.random.default_rng


@pytest.fixture(autouse=True)
def people_let_shapes_spread():
    with jax.numpy_rank_promotion("allow"):
        yield


def attention_loss(p, batch):
    x, y = batch
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    weights = jax.nn.softmax(jnp.einsum("nic,njc->nij", q, k) / jnp.sqrt(2.0))
    h = x + jnp.einsum("nij,njc->nic", weights, v)
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    logits = jax.nn.gelu(h @ p["up"]) @ p["down"]
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=-1))


attention_gradient = jax.jit(jax.grad(attention_loss))


def attention(seed):
    rng = RNG(seed)
    p = {name: rng.normal(size=(5, 5)) for name in "qkv"}
    p |= {"up": rng.normal(size=(5, 9)), "down": rng.normal(size=(9, 4))}
    return p, (rng.normal(size=(6, 3, 5)), np.eye(4)[rng.integers(0, 4, (6, 3))])


@pytest.mark.parametrize("seed", range(3))
def test_autodiff_of_a_transformer_is_right_where_it_cancels_to_zero(seed):
    p, batch = attention(seed)
    report = check_gradient(attention_loss, attention_gradient, p, batch)
    assert report.ok, str(report)
    assert report.smallest_detectable < 1e-9


@pytest.mark.parametrize("leaf", ["q", "down"])
def test_a_small_mistake_in_a_transformer_is_not_taken_for_rounding(leaf):
    p, batch = attention(3)

    def gradient(p, batch):
        g = attention_gradient(p, batch)
        return g | {leaf: g[leaf] * (1 + 1e-7)}

    report = check_gradient(attention_loss, gradient, p, batch)
    assert [row.path for row in report.leaves if not row.ok] == [leaf]


def saturated_net():
    rng = RNG(5)
    p = {"W": 9 * rng.normal(size=(4, 6)), "V": 9 * rng.normal(size=(6, 6)), "u": 9 * rng.normal(size=6)}
    return p, (rng.normal(size=(20, 4)), rng.normal(size=20))


def saturated_loss(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(jnp.tanh(x @ p["W"]) @ p["V"]) @ p["u"] - y) ** 2)


def by_hand(p, batch, dtype, scale=1.0):
    (x, y), p = (np.asarray(v, dtype) for v in batch), {k: np.asarray(v, dtype) for k, v in p.items()}
    a = np.tanh(x @ p["W"])
    b = np.tanh(a @ p["V"])
    e = 2 * (b @ p["u"] - y) / dtype(len(y))
    db = np.outer(e, p["u"]) * (1 - b**2)
    return {"W": dtype(scale) * x.T @ (db @ p["V"].T * (1 - a**2)), "V": a.T @ db, "u": b.T @ e}


def test_the_tolerance_of_float32_code_does_not_hang_on_how_it_happened_to_round(monkeypatch):
    """Noise that was measured to be next to nothing says nothing about the next point, or the next machine."""
    monkeypatch.setattr(agreement, "noise_of", lambda problem, store, points: (2e-11, [0.0] * len(problem.paths)))
    p, batch = saturated_net()
    single = lambda p, batch: by_hand(p, batch, np.float32)
    report = check_gradient(saturated_loss, single, p, batch)
    assert report.ok, str(report)
    assert any("float32" in note or "rounding" in note for note in report.notes)
    wrong = lambda p, batch: by_hand(p, batch, np.float32, 1.01)
    assert [row.path for row in check_gradient(saturated_loss, wrong, p, batch).leaves if not row.ok] == ["W"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inside_the_loss_is_right_and_a_wrong_slope_is_seen(dtype, knows_float16):
    if dtype == jnp.float16 and not knows_float16:
        with pytest.raises(RuntimeError, match="JAX cannot compile or run the gradient of this loss on this machine"):
            check_gradient(lambda p, x: jnp.sum(jnp.tanh(x.astype(dtype))) * p, lambda p, x: x, 1.0, np.ones(40))
        return

    def loss(p, batch):
        x, y = batch
        h = jnp.tanh(x.astype(dtype) @ p["w"].astype(dtype)).astype(jnp.float32)
        return jnp.mean((h - y) ** 2)

    rng = RNG(6)
    p = {"w": rng.normal(size=5).astype(np.float32)}
    batch = (rng.normal(size=(24, 5)).astype(np.float32), rng.normal(size=24).astype(np.float32))
    for right in (jax.grad(loss), jax.jit(jax.grad(loss))):  # the second may agree to the last bit
        report = check_gradient(loss, right, p, batch)
        assert report.ok, str(report)
        assert any(np.dtype(dtype).name in note for note in report.notes)
        assert report.smallest_detectable > 1e-4

    def no_slope(p, batch):
        x, y = batch
        return {"w": x.T @ (2 * (np.tanh(x @ p["w"]) - y)) / len(y)}

    assert not check_gradient(loss, no_slope, p, batch)


def relaxed(p, x, body, steps):
    """A fixed point z = tanh(A z + x) by so many sweeps."""
    u = x @ p["B"]
    return body(lambda z: jnp.tanh(z @ p["A"] + u), jnp.zeros_like(u), steps)


def by_while(step, start, steps):
    return lax.while_loop(lambda s: s[1] < steps, lambda s: (step(s[0]), s[1] + 1), (start, 0))[0]


def by_fori(step, start, steps):
    return lax.fori_loop(0, steps, lambda _, z: step(z), start)


def by_scan(step, start, steps):
    return lax.scan(lambda z, _: (step(z), None), start, None, length=steps)[0]


def by_python(step, start, steps):
    for _ in range(steps):
        start = step(start)
    return start


LOOPS = {"while": by_while, "fori": by_fori, "scan": by_scan, "python": by_python}


def loop_problem(body, steps):
    def loss(p, batch):
        x, y = batch
        return jnp.mean(jnp.sum((relaxed(p, x, body, steps) - y) ** 2, axis=1))

    rng = RNG(7)
    p = {"A": 0.2 * rng.normal(size=(3, 3)), "B": rng.normal(size=(4, 3))}
    return loss, p, (rng.normal(size=(10, 4)), rng.normal(size=(10, 3)))


@pytest.mark.parametrize("kind", LOOPS)
def test_every_kind_of_loop_is_checked(kind):
    loss, p, batch = loop_problem(LOOPS[kind], 3)

    def gradient(p, batch, factor=1.0):
        x, y = batch
        zs = [np.zeros((len(x), 3))]
        for _ in range(3):
            zs.append(np.tanh(zs[-1] @ p["A"] + x @ p["B"]))
        dz, dA, dB = 2 * (zs[-1] - y) / len(x), np.zeros((3, 3)), np.zeros((4, 3))
        for before, after in zip(zs[-2::-1], zs[:0:-1], strict=True):
            d = dz * (1 - after**2)
            dA, dB, dz = dA + before.T @ d, dB + x.T @ d, d @ p["A"].T
        return {"A": dA, "B": factor * dB}

    assert check_gradient(loss, gradient, p, batch)
    report = check_gradient(loss, lambda p, b: gradient(p, b, -1.0), p, batch)
    assert [(f.kind, f.leaf) for f in report.findings] == [("sign", "B")]


def test_a_chain_that_changes_its_dtype_on_the_way_is_diagnosed():
    def loss(w, batch):
        x, y = batch
        a = jax.nn.sigmoid((x @ w).astype(jnp.float32)).astype(jnp.float64)
        return jnp.mean((a - y) ** 2)

    def no_slope(w, batch):
        x, y = batch
        return x.T @ (2 * (1 / (1 + np.exp(-(x @ w))) - y)) / len(y)

    rng = RNG(8)
    report = check_gradient(loss, no_slope, rng.normal(size=3), (rng.normal(size=(15, 3)), rng.normal(size=15)))
    assert report.findings[0].kind == "missing-derivative"


# ------------------------------------------------------------------------------------- complex numbers


def wave_loss(p, batch):
    x, y = batch
    field = jnp.exp(1j * x * p["phase"]) @ p["c"]
    return jnp.mean(jnp.abs(field - y) ** 2)


def wave(dtype=complex):
    rng = RNG(9)
    p = {"phase": rng.normal(size=3), "c": (rng.normal(size=3) + 1j * rng.normal(size=3)).astype(dtype)}
    return p, (rng.normal(size=(14, 3)), rng.normal(size=14) + 1j * rng.normal(size=14))


def wave_by_hand(p, batch):
    x, y = batch
    e = np.exp(1j * x * p["phase"])
    r = 2 * (e @ p["c"] - y) / len(y)
    return {"phase": np.real(np.conj(r) @ (1j * x * e * p["c"])), "c": e.T @ np.conj(r)}


@pytest.mark.parametrize("dtype", [np.complex128, np.complex64])
def test_complex_leaves_and_complex_data_are_checked_by_the_convention_of_jax(dtype):
    p, batch = wave(dtype)
    assert check_gradient(wave_loss, wave_by_hand, p, batch)
    on_device = {k: jnp.asarray(v) for k, v in p.items()}
    assert check_gradient(wave_loss, lambda p, b: jax.grad(wave_loss)(p, b), on_device, batch)


def test_the_conjugate_of_a_complex_gradient_is_recognised():
    p, batch = wave()
    report = check_gradient(
        wave_loss, lambda p, b: wave_by_hand(p, b) | {"c": np.conj(wave_by_hand(p, b)["c"])}, p, batch
    )
    assert [(f.kind, f.leaf) for f in report.findings] == [("conjugated", "c")]
    row = next(row for row in report.leaves if row.path == "c")
    assert isinstance(row.true, complex)
    assert row.shape == (3,)


@pytest.mark.parametrize("part", ["real", "imag"])
def test_one_part_of_a_complex_gradient_left_out_is_seen(part):
    p, batch = wave()

    def half(p, b):
        c = wave_by_hand(p, b)["c"]
        return wave_by_hand(p, b) | {"c": c.real + 0j if part == "real" else 1j * c.imag}

    report = check_gradient(wave_loss, half, p, batch)
    assert [row.path for row in report.leaves if not row.ok] == ["c"]


# ------------------------------------------------------------------------------- where a loss has meaning


@pytest.mark.parametrize("kind", LOOPS)
def test_the_gradient_of_a_fixed_point_is_judged_where_the_iteration_settles(kind):
    """By the implicit function theorem, which is right only where the sweeps converge."""
    loss, p, batch = loop_problem(LOOPS[kind], 60)
    p["A"] *= 2  # drawn matrices of this shape often do not contract

    def gradient(p, batch, solved=True):
        x, y = batch
        z = np.zeros((len(x), 3))
        for _ in range(60):
            z = np.tanh(z @ p["A"] + x @ p["B"])
        slope, dz = 1 - z**2, 2 * (z - y) / len(x)
        if solved:
            dz = np.stack([np.linalg.solve(np.eye(3) - p["A"] * s, g) for s, g in zip(slope, dz, strict=True)])
        d = dz * slope
        return {"A": z.T @ d, "B": x.T @ d}

    report = check_gradient(loss, gradient, p, batch)
    assert report.ok, str(report)
    if kind == "while":  # a diagnosis of 60 sweeps that are steps of a program takes half a minute
        assert not check_gradient(loss, lambda p, b: gradient(p, b, solved=False), p, batch)


def covariance_loss(p, x):
    factor = jnp.linalg.cholesky(p["S"])
    white = jax.scipy.linalg.solve_triangular(factor, x.T, lower=True)
    return jnp.mean(jnp.sum(white**2, axis=0)) / 2 + jnp.sum(jnp.log(jnp.diagonal(factor)))


def covariance_by_hand(p, x, factor=1.0):
    inverse = np.linalg.inv(p["S"])
    return {"S": factor * (inverse - inverse @ (x.T @ x / len(x)) @ inverse) / 2}


def test_a_matrix_that_must_be_positive_definite_is_drawn_so():
    rng = RNG(10)
    root = rng.normal(size=(3, 5))
    p, x = {"S": root @ root.T + np.eye(3)}, rng.normal(size=(30, 3))
    report = check_gradient(covariance_loss, covariance_by_hand, p, x)
    assert report.ok, str(report)
    assert not check_gradient(covariance_loss, lambda p, x: covariance_by_hand(p, x, 1 + 1e-5), p, x)


def gamma_loss(theta, y):
    """Half of its parameters must be positive, and the root is real only inside the unit disc."""
    return jnp.mean(theta[0] * y - theta[1] * jnp.log(theta[0])) + jnp.sqrt(1 - theta[2] ** 2)


def gamma_by_hand(theta, y):
    return np.array([y.mean() - theta[1] / theta[0], -np.log(theta[0]), -theta[2] / np.sqrt(1 - theta[2] ** 2)])


def test_points_can_be_given_as_a_list_or_as_a_function_that_draws_them():
    start, y = np.array([1.5, 0.7, 0.3]), RNG(11).gamma(2.0, size=20)
    assert check_gradient(gamma_loss, gamma_by_hand, start, y)
    others = [np.array([0.2, 3.0, -0.9]), np.array([4.0, 1.0, 0.5])]
    draw = lambda rng: np.append(rng.uniform(0.1, 3, 2), rng.uniform(-0.9, 0.9))
    by_key = lambda key: jnp.append(jax.random.uniform(key, (2,), minval=0.1), 0.5)
    halved = lambda theta, y: gamma_by_hand(theta, y) * np.array([1, 1, 0.5])
    for points in (others, draw, by_key):
        report = check_gradient(gamma_loss, gamma_by_hand, start, y, points=points)
        assert report.ok, str(report)
        assert any(p.name.startswith("points[") for p in report.points)
        report = check_gradient(gamma_loss, halved, start, y, points=points)
        assert not report
    only_there = lambda theta, y: gamma_by_hand(theta, y) + (theta[0] > 3.5)
    assert check_gradient(gamma_loss, only_there, start, y, points=[start * 1.1])
    assert not check_gradient(gamma_loss, only_there, start, y, points=others)


@pytest.mark.parametrize(
    ("points", "error", "words"),
    [
        ([], TypeError, "list of parameters"),
        (3.0, TypeError, "list of parameters"),
        ([np.ones(2)], ValueError, r"points\[0\]: leaf params has shape \(2,\)"),
        ([{"w": np.ones(3)}], ValueError, r"points\[0\] is a dict"),
        (lambda rng: np.full(3, np.nan), ValueError, "not finite"),
    ],
)
def test_points_that_cannot_be_used_are_explained(points, error, words):
    with pytest.raises(error, match=words):
        check_gradient(gamma_loss, gamma_by_hand, np.array([1.5, 0.7, 0.3]), np.ones(5), points=points)


# ------------------------------------------------------------------------- rules, tolerances, the loss itself


@jax.custom_vjp
def clipped(x):
    return x**2


clipped.defvjp(lambda x: (x**2, x), lambda x, g: (jnp.clip(2 * x * g, -0.1, 0.1),))


def clipped_loss(w, batch):
    x, y = batch
    return jnp.mean(clipped(x @ w - y))


def test_a_rule_that_is_meant_is_accepted_on_request_and_said():
    rng = RNG(12)
    w, batch = rng.normal(size=3), (rng.normal(size=(10, 3)), rng.normal(size=10))

    def gradient(w, batch):
        x, y = batch
        return x.T @ np.clip(2 * (x @ w - y) / len(y), -0.1, 0.1)

    refused = check_gradient(clipped_loss, gradient, w, batch)
    assert not refused
    assert "accept_rules=True" in refused.findings[0].sentence
    accepted = check_gradient(clipped_loss, gradient, w, batch, accept_rules=True)
    assert accepted.ok, str(accepted)
    assert any("accept_rules" in note and "test_check_verdict.py" in note for note in accepted.notes)
    assert not check_gradient(clipped_loss, lambda w, b: 2 * gradient(w, b), w, batch, accept_rules=True)


def entropy_loss(p, batch):
    x, y = batch
    q = jax.nn.sigmoid(x @ p["w"])
    return -jnp.mean(y * jnp.log(q) + (1 - y) * jnp.log(1 - q)) / jnp.log(2.0)


LOG2 = float(np.log(2.0))


def entropy_by_hand(p, batch, guard=0.0, log2=LOG2):
    x, y = batch
    q = 1 / (1 + np.exp(-(x @ p["w"])))
    d = (q - y) / (q * (1 - q) + guard) * q * (1 - q)
    return {"w": x.T @ d / len(y) / log2}


def entropy():
    rng = RNG(13)
    return {"w": rng.normal(size=4)}, (rng.normal(size=(18, 4)), (rng.random(18) < 0.5).astype(float))


@pytest.mark.parametrize("wrong", [{"guard": 1e-8}, {"log2": 0.6931472}])
def test_numbers_that_are_nearly_right_are_said_to_be_and_accepted_on_request(wrong):
    p, batch = entropy()
    gradient = lambda p, b: entropy_by_hand(p, b, **wrong)
    report = check_gradient(entropy_loss, gradient, p, batch)
    assert not report
    assert report.findings[0].kind in ("inexact", "scale", "scaled-term")
    assert (
        "digits" in report.findings[0].sentence
        or "0.99999" in report.findings[0].factor
        or "1.00000" in report.findings[0].factor
    )
    accepted = check_gradient(entropy_loss, gradient, p, batch, tolerance=1e-6)
    assert accepted.ok, str(accepted)
    assert any("digits everywhere" in note for note in accepted.notes)
    assert not check_gradient(entropy_loss, lambda p, b: entropy_by_hand(p, b, log2=0.69314), p, batch, tolerance=1e-6)


@pytest.mark.parametrize("tolerance", [0, 1.0, -1e-6, "small", True])
def test_a_tolerance_that_cannot_be_used_is_explained(tolerance):
    p, batch = entropy()
    with pytest.raises(ValueError, match="tolerance must be a number between 0 and 1"):
        check_gradient(entropy_loss, entropy_by_hand, p, batch, tolerance=tolerance)


def pairing_loss(p, batch):
    x, y = batch
    prediction = x @ p["w"] + p["b"]
    return 0.5 * jnp.mean((prediction - y) ** 2)


def pairing():
    rng = RNG(14)
    return {"w": rng.normal(size=(3, 1)), "b": np.array([0.3])}, (rng.normal(size=(11, 3)), rng.normal(size=11))


def test_a_loss_that_pairs_all_examples_is_named_with_its_line():
    p, batch = pairing()

    def meant(p, batch):
        x, y = batch
        e = (x @ p["w"] + p["b"] - y[:, None]) / len(y)
        return {"w": x.T @ e, "b": e.sum(axis=0)}

    report = check_gradient(pairing_loss, meant, p, batch)
    assert report.findings[0].kind == "broadcast"
    assert "prediction - y" in report.findings[0].expression
    right = check_gradient(pairing_loss, jax.grad(pairing_loss), p, batch)
    assert right.ok
    assert any("(11, 11)" in note for note in right.notes)


def test_pairs_that_are_written_out_are_no_news():
    def distances(p, x):
        z = x @ p
        return jnp.mean(jnp.exp(-((z[:, None] - z[None, :]) ** 2)) + jnp.abs(z[:, None] - z))

    report = check_gradient(distances, jax.grad(distances), np.ones(2), RNG(15).normal(size=(7, 2)))
    assert report.ok
    assert report.notes == ()


def test_a_mean_over_outputs_too_is_noted():
    def loss(p, batch):
        x, y = batch
        return jnp.mean((x @ p - y) ** 2)

    rng = RNG(16)
    p, batch = rng.normal(size=(3, 4)), (rng.normal(size=(10, 3)), rng.normal(size=(10, 4)))
    by_examples = lambda p, b: 2 * b[0].T @ (b[0] @ p - b[1]) / len(b[0])
    report = check_gradient(loss, by_examples, p, batch)
    assert not report
    assert any("divides by 40, not by 10" in note for note in report.notes)


def test_a_mistake_comes_before_what_floating_point_does_to_it():
    """The sign is wrong, and it also turns NaN for large parameters: it is not called right on paper."""
    x = np.array([[0.5, -1.0], [1.5, 0.25], [-0.75, 2.0], [0.1, 0.9]])
    y = np.array([1.0, 0.0, 1.0, 0.0])

    def loss(w, batch):
        h = batch[0] @ w
        return jnp.mean(jnp.logaddexp(0.0, h) - batch[1] * h)

    def by_hand(sign):
        def gradient(w, batch):
            with np.errstate(all="ignore"):
                grown = np.exp(batch[0] @ w)
                return sign * batch[0].T @ (grown / (1 + grown) - batch[1]) / len(batch[1])

        return gradient

    wrong, right = (check_gradient(loss, by_hand(sign), np.array([0.1, 0.2]), (x, y)) for sign in (-1, 1))
    assert [finding.kind for finding in wrong.findings] == ["sign"]
    assert [finding.kind for finding in right.findings] == ["unstable"]
    assert not wrong.ok
    assert not right.ok
