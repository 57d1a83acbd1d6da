"""Simulations, implicit functions, complex numbers, transforms, and what else has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.support.reported.case import Case, cause, integers, normal, uniform, wrong_and_right

CASES: list[Case] = []
wrong, right = wrong_and_right(CASES)


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------ without a batch


def rosenbrock(v):
    valley = v[1:] - v[:-1] ** 2
    return jnp.sum(100.0 * valley**2 + (1 - v[:-1]) ** 2)


@wrong(
    rosenbrock,
    normal(500, 4, scale=0.5),
    None,
    cause("scaled-term", "wrong-derivative", "missing-factor", line="valley = v[1:] - v[:-1] ** 2"),
)
def rosenbrock_with_200(v, wrong=True):
    """The inner derivative of -x² loses its 2: the known factor 400 becomes 200."""
    g = np.zeros_like(v)
    inner = 200 if wrong else 400
    g[:-1] = -inner * v[:-1] * (v[1:] - v[:-1] ** 2) - 2 * (1 - v[:-1])
    g[1:] += 200 * (v[1:] - v[:-1] ** 2)
    return g


def springs(positions):
    gaps = positions[1:] - positions[:-1]
    lengths = jnp.sqrt(jnp.sum(gaps**2, axis=1))
    return 0.5 * jnp.sum((lengths - 1.0) ** 2)


@wrong(
    springs,
    normal(501, 5, 2),
    None,
    cause("missing-factor", "missing-derivative", "wrong-derivative", line="lengths = jnp.sqrt("),
)
def spring_force_along_the_whole_gap(positions, wrong=True):
    """The force is (length - 1) times the gap itself, which is not divided by its length."""
    force = np.zeros_like(positions)
    for i in range(len(positions) - 1):
        gap = positions[i + 1] - positions[i]
        length = np.linalg.norm(gap)
        f = (length - 1.0) * gap / (1 if wrong else length)
        force[i] -= f
        force[i + 1] += f
    return force


@wrong(springs, normal(502, 5, 2), None, cause("missing-term", line="gaps = positions[1:] - positions[:-1]"))
def newtons_third_law_forgotten(positions, wrong=True):
    """Each spring pulls at its right end only; the left end feels nothing."""
    gaps = np.diff(positions, axis=0)
    lengths = np.sqrt((gaps**2).sum(axis=1, keepdims=True))
    pull = (lengths - 1) * gaps / lengths
    grad = np.zeros(positions.shape)
    grad[1:] += pull
    if not wrong:
        grad[:-1] -= pull
    return grad


def power_spectrum(x):
    spectrum = jnp.fft.fft(x)
    return jnp.sum(jnp.abs(spectrum) ** 2)


@wrong(
    power_spectrum, normal(503, 8), None, cause("scale", "scaled-term", factor=("1/8", "1/n"), line="jnp.fft.fft(x)")
)
def parseval_without_n(x, wrong=True):
    """The sum of the power spectrum is taken to be the sum of squares; numpy's transform has a factor n besides."""
    return 2 * x if wrong else 2 * len(x) * x


# ------------------------------------------------------------------------------------------ steps in time


def decay_chain_loss(p, batch):
    start, measured = batch
    dt = 0.125

    def step(u, _):
        u = u - dt * p["k"] * u**2
        return u, u

    _, path = lax.scan(step, start, None, length=6)
    return jnp.mean((path - measured) ** 2)


decay_chain_batch = (uniform(504, 4, low=0.5, high=2), uniform(505, 6, 4))


@wrong(
    decay_chain_loss,
    {"k": np.asarray(0.75)},
    decay_chain_batch,
    cause("scale", "scaled-term", "missing-factor", line='u = u - dt * p["k"] * u**2', factor=("8", "1/dt", "")),
)
def step_size_left_out(p, batch, wrong=True):
    """Each Euler step adds dt times the rate; in the derivative by the rate constant the dt is missing."""
    start, measured = batch
    dt, k = 0.125, p["k"]
    path = [start]
    for _ in range(6):
        path.append(path[-1] - dt * k * path[-1] ** 2)
    adjoint, dk = np.zeros_like(start), 0.0
    for t in range(6, 0, -1):
        adjoint = adjoint + 2 * (path[t] - measured[t - 1]) / measured.size
        dk -= np.sum(adjoint * path[t - 1] ** 2) * (1 if wrong else dt)
        adjoint = adjoint * (1 - 2 * dt * k * path[t - 1])
    return {"k": dk}


@wrong(
    decay_chain_loss,
    {"k": np.asarray(0.5)},
    decay_chain_batch,
    cause("missing-term", line=('u = u - dt * p["k"] * u**2', "lax.scan(step")),
)
def adjoint_forgets_the_old_state(p, batch, wrong=True):
    """The adjoint of u_t is passed on through the rate only; the u that stands alone is not differentiated."""
    start, measured = batch
    dt = 0.125
    us = [start]
    for t in range(len(measured)):
        us.append(us[t] - dt * p["k"] * us[t] * us[t])
    lam = np.zeros(len(start))
    total = 0.0
    for t in reversed(range(len(measured))):
        lam = lam + 2 * (us[t + 1] - measured[t]) / np.size(measured)
        total += np.dot(lam, -dt * us[t] ** 2)
        through_rate = -2 * dt * p["k"] * us[t] * lam
        lam = through_rate if wrong else lam + through_rate
    return {"k": total}


def oscillator_loss(p, batch):
    x0, v0, seen = batch
    dt = 0.25

    def kick_drift(state, _):
        x, v = state
        v = v - dt * jnp.exp(p["log_k"]) * jnp.sin(x)
        x = x + dt * v
        return (x, v), x

    _, xs = lax.scan(kick_drift, (x0 + p["shift"], v0), None, length=5)
    return jnp.mean((xs - seen) ** 2)


@wrong(
    oscillator_loss,
    {"log_k": np.asarray(0.25), "shift": np.asarray(0.125)},
    (normal(506, 3), normal(507, 3), normal(508, 5, 3)),
    cause("wrong-derivative", "missing-derivative", "wrong-value", line='jnp.exp(p["log_k"]) * jnp.sin(x)'),
)
def pendulum_linearised_on_the_way_back(p, batch, wrong=True):
    """The force of a pendulum is sin x; its slope is taken as 1, as for small angles, and not as cos x."""
    x0, v0, seen = batch
    dt, k = 0.25, np.exp(p["log_k"])
    x, v, tape = x0 + p["shift"], v0, []
    for _ in range(5):
        tape.append(x)
        v = v - dt * k * np.sin(x)
        x = x + dt * v
    ends = [*tape[1:], x]
    ax, av, gk = np.zeros(3), np.zeros(3), 0.0
    for t in reversed(range(5)):
        ax = ax + 2 * (ends[t] - seen[t]) / seen.size
        av = av + dt * ax
        gk -= np.sum(av * dt * k * np.sin(tape[t]))
        slope = np.ones(3) if wrong else np.cos(tape[t])
        ax = ax - av * dt * k * slope
    return {"log_k": gk, "shift": ax.sum()}


def heat_loss(p, batch):
    u0, target = batch

    def body(i, u):
        lap = jnp.roll(u, 1) + jnp.roll(u, -1) - 2 * u
        return u + 0.25 * jax.nn.sigmoid(p["d"]) * lap

    u = lax.fori_loop(0, 5, body, u0 + p["source"])
    return 0.5 * jnp.sum((u - target) ** 2)


@wrong(
    heat_loss,
    {"d": np.asarray(0.5), "source": normal(509, 6)},
    (normal(510, 6), normal(511, 6)),
    cause("missing-term", leaf="d", line=("return u + 0.25", "lax.fori_loop(")),
)
def diffusivity_from_the_last_step(p, batch, wrong=True):
    """The diffusivity acts in each of five steps, and only the last one's part is returned."""
    u0, target = batch
    s = 1 / (1 + np.exp(-p["d"]))
    laplacian = lambda u: np.roll(u, 1) + np.roll(u, -1) - 2 * u
    us = [u0 + p["source"]]
    for _ in range(5):
        us.append(us[-1] + 0.25 * s * laplacian(us[-1]))
    adjoint = us[-1] - target
    parts = []
    for u in reversed(us[:-1]):
        parts.append(0.25 * adjoint @ laplacian(u))
        adjoint = adjoint + 0.25 * s * laplacian(adjoint)
    total = parts[0] if wrong else sum(parts)
    return {"d": total * s * (1 - s), "source": adjoint}


# ------------------------------------------------------------------------------------------ implicit functions


def resistor_loss(p, batch):
    current, measured = batch
    g = jnp.exp(p["log_g"])
    laplacian = jnp.diag(g) + jnp.eye(4) - 0.25 * jnp.ones((4, 4))
    voltage = jnp.linalg.solve(laplacian, current)
    return jnp.sum((voltage - measured) ** 2)


resistor_batch = (normal(512, 4), normal(513, 4))


@wrong(
    resistor_loss,
    {"log_g": normal(514, 4, scale=0.5)},
    resistor_batch,
    cause("sign", "negated-term", line=("voltage = jnp.linalg.solve(",), factor=("-1", "")),
)
def derivative_of_the_inverse_without_minus(p, batch, wrong=True):
    """d(A⁻¹) = -A⁻¹ dA A⁻¹, and the minus is forgotten."""
    current, measured = batch
    g = np.exp(p["log_g"])
    A = np.diag(g) + np.eye(4) - 0.25 * np.ones((4, 4))
    v = np.linalg.solve(A, current)
    adjoint = np.linalg.solve(A.T, 2 * (v - measured))
    sign = 1 if wrong else -1
    return {"log_g": sign * adjoint * v * g}


def kepler_loss(p, batch):
    M, seen = batch
    e = 0.75 * jax.nn.sigmoid(p["a"])

    def newton(E, _):
        E = E - (E - e * jnp.sin(E) - M) / (1 - e * jnp.cos(E))
        return E, None

    E, _ = lax.scan(newton, M, None, length=30)
    return jnp.mean((jnp.cos(E) - seen) ** 2)


@wrong(
    kepler_loss,
    {"a": np.asarray(-0.5)},
    (uniform(515, 6, low=0.5, high=2.5), normal(516, 6, scale=0.5)),
    cause(
        "missing-factor",
        "missing-derivative",
        "missing-term",
        "wrong-derivative",
        line=("E = E - (", "lax.scan(newton"),
    ),
)
def implicit_function_without_its_denominator(p, batch, wrong=True):
    """E - e sin E = M gives dE/de = sin E / (1 - e cos E); only the numerator is taken."""
    M, seen = batch
    s = 1 / (1 + np.exp(-p["a"]))
    e = 0.75 * s
    E = M.copy()
    for _ in range(60):
        E = E - (E - e * np.sin(E) - M) / (1 - e * np.cos(E))
    dE_de = np.sin(E) if wrong else np.sin(E) / (1 - e * np.cos(E))
    dE = 2 * (np.cos(E) - seen) * -np.sin(E) / len(M)
    return {"a": np.sum(dE * dE_de) * 0.75 * s * (1 - s)}


def whitening_loss(p, batch):
    (X,) = batch
    S = p["A"] @ p["A"].T + jnp.eye(3)
    L = jnp.linalg.cholesky(S)
    z = jax.scipy.linalg.solve_triangular(L, X.T, lower=True)
    return 0.5 * jnp.mean(jnp.sum(z**2, axis=0)) + jnp.sum(jnp.log(jnp.diagonal(L)))


@wrong(
    whitening_loss,
    {"A": normal(517, 3, 2)},
    (normal(518, 12, 3),),
    cause("scale", "scaled-term", "missing-term", line='S = p["A"] @ p["A"].T', factor=("1/2", "")),
)
def symmetric_product_counted_once(p, batch, wrong=True):
    """The covariance AA' + I contains A twice, and the 2 that follows is missing."""
    (X,) = batch
    S = p["A"] @ p["A"].T + np.eye(3)
    P = np.linalg.inv(S)
    G = 0.5 * (P - P @ (X.T @ X / len(X)) @ P)
    return {"A": G @ p["A"] if wrong else (G + G.T) @ p["A"]}


# ------------------------------------------------------------------------------------------ complex, transforms


def complex_gain_loss(p, batch):
    x, y = batch
    error = x * p["gain"] + p["offset"] - y
    return jnp.mean(jnp.abs(error) ** 2)


complex_params = {"gain": np.asarray(0.75 - 0.5j), "offset": np.asarray(0.25 + 1.0j)}
complex_batch = (normal(519, 9) + 1j * normal(520, 9), normal(521, 9) + 1j * normal(522, 9))


@wrong(
    complex_gain_loss,
    complex_params,
    complex_batch,
    cause("conjugated", "wrong-value", "wrong-derivative", leaf="gain", line='error = x * p["gain"]'),
)
def input_not_conjugated(p, batch, wrong=True):
    """2 mean(conj(error) x), in JAX's convention; the error is not conjugated for the gain."""
    x, y = batch
    error = x * p["gain"] + p["offset"] - y
    bar = error if wrong else np.conj(error)
    return {"gain": 2 * np.mean(bar * x), "offset": 2 * np.mean(np.conj(error))}


def filter_loss(h, batch):
    x, y = batch
    filtered = jnp.real(jnp.fft.ifft(jnp.fft.fft(h)[None, :] * jnp.fft.fft(x)))
    out = jnp.tanh(filtered)
    return jnp.mean(jnp.sum((out - y) ** 2, axis=1))


filter_batch = (normal(523, 5, 6), normal(524, 5, 6))


@wrong(
    filter_loss,
    normal(525, 6),
    filter_batch,
    cause("flipped", "conjugated", "wrong-value", "wrong-derivative", "transposed", line="filtered = jnp.real("),
)
def circular_convolution_for_correlation(h, batch, wrong=True):
    """Back through a circular convolution goes a correlation, with the conjugate spectrum; here it is convolved."""
    x, y = batch
    X = np.fft.fft(x)
    out = np.tanh(np.real(np.fft.ifft(np.fft.fft(h) * X)))
    d = 2 * (out - y) * (1 - out**2) / len(x)
    back = X if wrong else np.conj(X)
    return np.real(np.fft.ifft(np.fft.fft(d) * back)).sum(axis=0)


def rotation_loss(p, batch):
    src, dst = batch
    c, s = jnp.cos(p["angle"]), jnp.sin(p["angle"])
    x = c * src[:, 0] - s * src[:, 1] + p["shift"][0]
    y = s * src[:, 0] + c * src[:, 1] + p["shift"][1]
    return jnp.mean((x - dst[:, 0]) ** 2 + (y - dst[:, 1]) ** 2)


@wrong(
    rotation_loss,
    {"angle": np.asarray(0.625), "shift": normal(526, 2)},
    (normal(527, 11, 2), normal(528, 11, 2)),
    cause("negated-term", "wrong-derivative", leaf="angle", line="c, s = jnp.cos("),
)
def cosine_derived_without_minus(p, batch, wrong=True):
    """The derivative of the rotation matrix has +sin where -sin belongs."""
    src, dst = batch
    c, s = np.cos(p["angle"]), np.sin(p["angle"])
    R = np.array([[c, -s], [s, c]])
    dc = s if wrong else -s
    dR = np.array([[dc, -c], [c, dc]])
    E = 2 * (src @ R.T + p["shift"] - dst) / len(src)
    return {"angle": np.sum(E * (src @ dR.T)), "shift": E.sum(axis=0)}


# ------------------------------------------------------------------------------------------ branches, rewards, others


def clipped_loss(w, batch):
    X, y = batch
    out = jnp.clip(X @ w, -1.0, 1.0)
    return jnp.mean((out - y) ** 2)


@wrong(
    clipped_loss,
    normal(529, 3),
    (normal(530, 16, 3), normal(531, 16)),
    cause("missing-derivative", line="out = jnp.clip("),
)
def clipped_outputs_still_learn(w, batch, wrong=True):
    """Where the output is clipped its derivative is 0; the gradient passes through it all the same."""
    X, y = batch
    z = X @ w
    d = 2 * (np.clip(z, -1, 1) - y) / len(y)
    if not wrong:
        d[np.abs(z) > 1] = 0
    return X.T @ d


def switch_loss(p, batch):
    X, y, cubic = batch
    z = X @ p["w"]
    shape = lambda v: lax.cond(cubic, lambda u: u + u**3, lambda u: jnp.sin(u), v)
    out = shape(z)
    return jnp.mean((out - y) ** 2)


@wrong(
    switch_loss,
    {"w": normal(532, 3, scale=0.5)},
    (normal(533, 12, 3), normal(534, 12), np.asarray(True)),
    cause("missing-term", "wrong-derivative", line="shape = lambda v: lax.cond("),
)
def cubic_branch_without_its_linear_part(p, batch, wrong=True):
    """In the branch u + u³ the derivative is 3u², without the 1."""
    X, y, cubic = batch
    z = X @ p["w"]
    if cubic:
        out = z + z**3
        slope = 3 * z**2 + (0 if wrong else 1)
    else:
        out, slope = np.sin(z), np.cos(z)
    return {"w": X.T @ (2 * (out - y) * slope) / len(y)}


def reinforce_loss(theta, batch):
    states, actions, rewards = batch
    returns = jnp.cumsum(rewards[::-1])[::-1]
    log_policy = jax.nn.log_softmax(states @ theta)
    chosen = log_policy[jnp.arange(len(actions)), actions]
    return -jnp.sum(chosen * returns)


reinforce_batch = (normal(535, 9, 3), integers(536, 2, 9), normal(537, 9))


@wrong(
    reinforce_loss,
    normal(538, 3, 2),
    reinforce_batch,
    cause("wrong-value", "missing-derivative", line=("returns = jnp.cumsum(", "chosen * returns")),
)
def rewards_for_returns(theta, batch, wrong=True):
    """Each action is weighted by the reward at its step, not by the return from there on."""
    states, actions, rewards = batch
    weights = rewards if wrong else np.cumsum(rewards[::-1])[::-1]
    grad = np.zeros_like(theta)
    for s, a, w in zip(states, actions, weights, strict=True):
        probs = softmax(s @ theta)
        probs[a] -= 1
        grad += w * np.outer(s, probs)
    return grad


@wrong(
    reinforce_loss,
    normal(539, 3, 2),
    reinforce_batch,
    cause("sign", "negated-term", line=("return -jnp.sum(chosen * returns)",), factor="-1"),
)
def ascent_direction_of_the_policy(theta, batch, wrong=True):
    """The gradient of the expected return is given; the loss is its negative."""
    states, actions, rewards = batch
    returns = np.array([rewards[t:].sum() for t in range(len(rewards))])
    score = np.eye(2)[actions] - softmax(states @ theta)
    ascent = states.T @ (score * returns[:, None])
    return ascent if wrong else -ascent


# ------------------------------------------------------------------------------------------ right, but unusual


@right(springs, normal(540, 5, 2), None)
def springs_by_a_matrix(positions):
    """Springs as a Laplacian whose weights hang on the positions."""
    gaps = np.diff(positions, axis=0)
    k = 1 - 1 / np.sqrt((gaps**2).sum(axis=1))
    D = np.diff(np.eye(len(positions)), axis=0)
    return D.T @ (k[:, None] * (D @ positions))


@right(resistor_loss, {"log_g": normal(541, 4, scale=0.5)}, resistor_batch)
def direct_sensitivities(p, batch):
    """The sensitivity of every voltage to every conductance, column by column, instead of an adjoint."""
    current, measured = batch
    g = np.exp(p["log_g"])
    inverse = np.linalg.inv(np.diag(g) + np.eye(4) - np.full((4, 4), 0.25))
    v = inverse @ current
    sensitivity = np.stack([-inverse[:, k] * v[k] * g[k] for k in range(4)], axis=1)
    return {"log_g": 2 * (v - measured) @ sensitivity}


@right(complex_gain_loss, complex_params, complex_batch)
def complex_by_real_parts(p, batch):
    """The derivative by a complex number from those by its real and its imaginary part: a - ib."""
    x, y = batch
    error = x * p["gain"] + p["offset"] - y
    by_real = 2 * np.mean(error.real * x.real + error.imag * x.imag)
    by_imag = 2 * np.mean(-error.real * x.imag + error.imag * x.real)
    return {"gain": by_real - 1j * by_imag, "offset": 2 * np.mean(error.real) - 2j * np.mean(error.imag)}


@right(kepler_loss, {"a": np.asarray(0.5)}, (uniform(542, 6, low=0.5, high=2.5), normal(543, 6, scale=0.5)))
def kepler_by_the_implicit_function(p, batch):
    """Newton's steps are not differentiated: the implicit function theorem gives the derivative at once."""
    M, seen = batch
    s = 1 / (1 + np.exp(-p["a"]))
    e = 0.75 * s
    E = M.copy()
    for _ in range(60):
        E = E - (E - e * np.sin(E) - M) / (1 - e * np.cos(E))
    dE_de = np.sin(E) / (1 - e * np.cos(E))
    return {"a": np.mean(-2 * (np.cos(E) - seen) * np.sin(E) * dE_de) * 0.75 * s * (1 - s)}


@right(decay_chain_loss, {"k": np.asarray(0.625)}, decay_chain_batch)
def tangent_along_the_path(p, batch):
    """The derivative by the one parameter is carried forward with the state."""
    start, measured = batch
    dt, k = 0.125, float(p["k"])
    u, du, total = start, np.zeros_like(start), 0.0
    for target in measured:
        u, du = u - dt * k * u**2, du - dt * (u**2 + 2 * k * u * du)
        total += np.sum(2 * (u - target) * du)
    return {"k": total / measured.size}


@right(filter_loss, normal(544, 6), filter_batch)
def filter_as_a_circulant_matrix(h, batch):
    """The circular convolution as shifted copies of the signal, and no transform."""
    x, y = batch
    shifts = np.stack([np.roll(x, k, axis=1) for k in range(6)], axis=2)
    out = np.tanh(shifts @ h)
    return np.einsum("nt,ntk->k", 2 * (out - y) * (1 - out**2), shifts) / len(x)


@right(heat_loss, {"d": np.asarray(-0.5), "source": normal(545, 6)}, (normal(546, 6), normal(547, 6)))
def heat_in_fourier_modes(p, batch):
    """Five explicit heat steps at once in the eigenbasis of the circulant Laplacian."""
    u0, target = batch
    s = 1 / (1 + np.exp(-p["d"]))
    eigen = 2 * np.cos(2 * np.pi * np.arange(6) / 6) - 2
    start = np.fft.fft(u0 + p["source"])
    error = np.fft.fft(np.real(np.fft.ifft(start * (1 + 0.25 * s * eigen) ** 5)) - target)
    by_s = np.sum(np.real(np.conj(error) * start * 5 * (1 + 0.25 * s * eigen) ** 4 * 0.25 * eigen)) / 6
    return {"d": by_s * s * (1 - s), "source": np.real(np.fft.ifft(error * (1 + 0.25 * s * eigen) ** 5))}


@right(reinforce_loss, normal(548, 3, 2), reinforce_batch)
def policy_with_two_actions_as_a_logit(theta, batch):
    """With two actions the softmax is the logistic function of the difference of their scores."""
    states, actions, rewards = batch
    returns = np.cumsum(rewards[::-1])[::-1]
    second = 0.5 * (1 + np.tanh(states @ (theta[:, 1] - theta[:, 0]) / 2))
    d = states.T @ (returns * (second - actions))
    return np.stack([-d, d], axis=1)
