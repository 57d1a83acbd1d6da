"""The verdict is right whatever the loss is made of: rounding, low precision, loops, complex numbers, custom rules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgrad.check import agreement, check_gradient

RNG = np.random.default_rng


def attention_loss(p, batch):
    x, y = batch
    q, k, v = x @ p["q"], x @ p["k"], x @ p["v"]
    weights = jax.nn.softmax(jnp.einsum("nic,njc->nij", q, k) / jnp.sqrt(2.0))
    h = x + jnp.einsum("nij,njc->nic", weights, v)
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-6)
    logits = jax.nn.gelu(h @ p["up"]) @ p["down"]
    return -jnp.mean(jnp.sum(y * jax.nn.log_softmax(logits), axis=-1))


def attention(seed):
    rng = RNG(seed)
    p = {name: rng.normal(size=(5, 5)) for name in "qkv"}
    p |= {"up": rng.normal(size=(5, 9)), "down": rng.normal(size=(9, 4))}
    return p, (rng.normal(size=(6, 3, 5)), np.eye(4)[rng.integers(0, 4, (6, 3))])


@pytest.mark.parametrize("seed", range(3))
def test_autodiff_of_a_transformer_is_right_where_it_cancels_to_zero(seed):
    p, batch = attention(seed)
    report = check_gradient(attention_loss, jax.jit(jax.grad(attention_loss)), p, batch)
    assert report.ok, str(report)
    assert report.smallest_detectable < 1e-9


@pytest.mark.parametrize("leaf", ["q", "down"])
def test_a_small_mistake_in_a_transformer_is_not_taken_for_rounding(leaf):
    p, batch = attention(3)

    def gradient(p, batch):
        g = dict(jax.grad(attention_loss)(p, batch))
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
    single = lambda p, batch: by_hand(p, batch, np.float32)  # noqa: E731
    report = check_gradient(saturated_loss, single, p, batch)
    assert report.ok, str(report)
    assert any("float32" in note or "rounding" in note for note in report.notes)
    wrong = lambda p, batch: by_hand(p, batch, np.float32, 1.01)  # noqa: E731
    assert [row.path for row in check_gradient(saturated_loss, wrong, p, batch).leaves if not row.ok] == ["W"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inside_the_loss_is_right_and_a_wrong_slope_is_seen(dtype):
    def loss(p, batch):
        x, y = batch
        h = jnp.tanh(x.astype(dtype) @ p["w"].astype(dtype)).astype(jnp.float32)
        return jnp.mean((h - y) ** 2)

    rng = RNG(6)
    p = {"w": rng.normal(size=5).astype(np.float32)}
    batch = (rng.normal(size=(24, 5)).astype(np.float32), rng.normal(size=24).astype(np.float32))
    report = check_gradient(loss, jax.grad(loss), p, batch)
    assert report.ok, str(report)
    assert any(np.dtype(dtype).name in note for note in report.notes)

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
