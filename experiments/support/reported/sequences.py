"""Sequences: recurrent nets, attention, embeddings."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from experiments.support.reported.case import Case, cause, integers, normal, wrong_and_right

CASES: list[Case] = []
wrong, right = wrong_and_right(CASES)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------ recurrent nets


def last_state_loss(p, batch):
    x, y = batch
    h = jnp.zeros((x.shape[0], 5))
    for t in range(x.shape[1]):
        h = jnp.tanh(x[:, t] @ p["Wx"] + h @ p["Wh"] + p["b"])
    return jnp.mean((h @ p["v"] - y) ** 2)


def recurrent_params(seed):
    return {
        "Wx": normal(seed, 3, 5, scale=0.5),
        "Wh": normal(seed + 1, 5, 5, scale=0.5),
        "b": normal(seed + 2, 5, scale=0.25),
        "v": normal(seed + 3, 5),
    }


last_state_batch = (normal(300, 7, 4, 3), normal(301, 7))


def states(x, p):
    h = [np.zeros((x.shape[0], 5))]
    for t in range(x.shape[1]):
        h.append(np.tanh(x[:, t] @ p["Wx"] + h[-1] @ p["Wh"] + p["b"]))
    return h


@wrong(
    last_state_loss,
    recurrent_params(302),
    last_state_batch,
    cause("transposed", leaf=("Wx", "Wh", "b"), line="h = jnp.tanh(x[:, t]"),
)
def recurrent_matrix_not_transposed(p, batch, wrong=True):
    """Back in time goes Wh where its transpose belongs; it is square, so the shapes fit."""
    x, y = batch
    h = states(x, p)
    d_out = 2 * (h[-1] @ p["v"] - y) / len(y)
    g = {name: np.zeros_like(value) for name, value in p.items()}
    g["v"] = h[-1].T @ d_out
    dh = np.outer(d_out, p["v"])
    for t in reversed(range(x.shape[1])):
        dz = dh * (1 - h[t + 1] ** 2)
        g["Wx"] += x[:, t].T @ dz
        g["Wh"] += h[t].T @ dz
        g["b"] += dz.sum(0)
        dh = dz @ (p["Wh"] if wrong else p["Wh"].T)
    return g


@wrong(
    last_state_loss,
    recurrent_params(306),
    last_state_batch,
    cause("missing-term", leaf="b", line="h = jnp.tanh(x[:, t]"),
)
def bias_keeps_one_time_step(p, batch, wrong=True):
    """The weights add up their time steps; the bias is assigned, and keeps the step that comes last."""
    x, y = batch
    h = states(x, p)
    d_out = 2 * (h[-1] @ p["v"] - y) / len(y)
    dWx, dWh, db = np.zeros((3, 5)), np.zeros((5, 5)), np.zeros(5)
    dh = d_out[:, None] * p["v"]
    for t in range(x.shape[1] - 1, -1, -1):
        dz = (1 - h[t + 1] * h[t + 1]) * dh
        dWx += x[:, t].T @ dz
        dWh += h[t].T @ dz
        db = dz.sum(0) if wrong else db + dz.sum(0)
        dh = dz @ p["Wh"].T
    return {"Wx": dWx, "Wh": dWh, "b": db, "v": h[-1].T @ d_out}


@wrong(
    last_state_loss,
    recurrent_params(310),
    last_state_batch,
    cause("wrong-value", leaf="Wh", line="h = jnp.tanh(x[:, t]"),
)
def recurrent_weights_see_the_new_state(p, batch, wrong=True):
    """dWh is the product with h at t, where the state before it, at t - 1, was multiplied."""
    x, y = batch
    T = x.shape[1]
    h = {-1: np.zeros((len(x), 5))}
    for t in range(T):
        h[t] = np.tanh(np.dot(x[:, t], p["Wx"]) + np.dot(h[t - 1], p["Wh"]) + p["b"])
    dy = 2 * (np.dot(h[T - 1], p["v"]) - y) / len(x)
    grads = {"v": np.dot(h[T - 1].T, dy), "Wx": 0, "Wh": 0, "b": 0}
    dh = np.outer(dy, p["v"])
    for t in reversed(range(T)):
        draw = (1 - h[t] ** 2) * dh
        grads["b"] = grads["b"] + draw.sum(axis=0)
        grads["Wx"] = grads["Wx"] + np.dot(x[:, t].T, draw)
        grads["Wh"] = grads["Wh"] + np.dot(h[t if wrong else t - 1].T, draw)
        dh = np.dot(draw, p["Wh"].T)
    return grads


def tagger_loss(p, batch):
    x, y = batch

    def step(h, x_t):
        h = jnp.tanh(p["Wx"] @ x_t + p["Wh"] @ h + p["b"])
        return h, h @ p["v"]

    def one(sequence, target):
        _, out = lax.scan(step, jnp.zeros(5, sequence.dtype), sequence)
        return jnp.sum((out - target) ** 2)

    return jnp.mean(jax.vmap(one)(x, y))


def tagger_params(seed):
    return {name: value.T.copy() for name, value in recurrent_params(seed).items()}


tagger_batch = (normal(314, 6, 4, 3), normal(315, 6, 4))


@wrong(
    tagger_loss,
    tagger_params(316),
    tagger_batch,
    cause("missing-term", leaf=("Wx", "Wh", "b"), line=("return h, h @", "h = jnp.tanh(")),
)
def only_the_last_output_sends_back(p, batch, wrong=True):
    """Every time step has an output, and on the way back only the last one's error enters the state."""
    x, y = batch
    g = {name: np.zeros_like(value) for name, value in p.items()}
    for sequence, target in zip(x, y, strict=True):
        hs = [np.zeros(5)]
        for x_t in sequence:
            hs.append(np.tanh(p["Wx"] @ x_t + p["Wh"] @ hs[-1] + p["b"]))
        dh_next = np.zeros(5)
        for t in reversed(range(len(sequence))):
            d_out = 2 * (hs[t + 1] @ p["v"] - target[t]) / len(x)
            g["v"] += d_out * hs[t + 1]
            dh = dh_next + d_out * p["v"]
            if wrong and t < len(sequence) - 1:
                dh = dh_next
            dz = dh * (1 - hs[t + 1] ** 2)
            g["Wx"] += np.outer(dz, sequence[t])
            g["Wh"] += np.outer(dz, hs[t])
            g["b"] += dz
            dh_next = p["Wh"].T @ dz
    return g


@wrong(
    tagger_loss,
    tagger_params(320),
    tagger_batch,
    cause("missing-derivative", leaf=("Wx", "Wh", "b"), line="h = jnp.tanh("),
)
def tanh_slope_missing_on_the_carry(p, batch, wrong=True):
    """The error from the next time step bypasses tanh': only the output's own error is multiplied by it."""
    x, y = batch
    n, T, _ = x.shape
    h = np.zeros((T + 1, n, 5))
    for t in range(T):
        h[t + 1] = np.tanh(x[:, t] @ p["Wx"].T + h[t] @ p["Wh"].T + p["b"])
    d_out = 2 * (h[1:] @ p["v"] - y.T) / n
    grads = {"v": np.einsum("tn,tnh->h", d_out, h[1:])}
    dz = np.zeros((T + 1, n, 5))
    for t in range(T - 1, -1, -1):
        slope = 1 - h[t + 1] ** 2
        own = d_out[t][:, None] * p["v"]
        carried = dz[t + 1] @ p["Wh"]
        dz[t] = own * slope + carried * (1 if wrong else slope)
    grads["Wx"] = np.einsum("tnh,ntd->hd", dz[:-1], x)
    grads["Wh"] = np.einsum("tnh,tnk->hk", dz[:-1], h[:-1])
    grads["b"] = dz[:-1].sum(axis=(0, 1))
    return grads


def lstm_loss(p, batch):
    x, y = batch
    n = x.shape[0]
    h, c = jnp.zeros((n, 4)), jnp.zeros((n, 4))
    for t in range(x.shape[1]):
        xh = jnp.concatenate([x[:, t], h], axis=1)
        f = jax.nn.sigmoid(xh @ p["Wf"])
        i = jax.nn.sigmoid(xh @ p["Wi"])
        o = jax.nn.sigmoid(xh @ p["Wo"])
        g = jnp.tanh(xh @ p["Wg"])
        c = f * c + i * g
        h = o * jnp.tanh(c)
    return jnp.mean((jnp.sum(h, axis=1) - y) ** 2)


def lstm_params(seed):
    return {name: normal(seed + k, 6, 4, scale=0.5) for k, name in enumerate(("Wf", "Wi", "Wo", "Wg"))}


lstm_batch = (normal(324, 6, 3, 2), normal(325, 6))


def lstm_forward(x, p):
    n = len(x)
    h, c, tape = np.zeros((n, 4)), np.zeros((n, 4)), []
    for t in range(x.shape[1]):
        xh = np.concatenate([x[:, t], h], axis=1)
        f, i, o = (sigmoid(xh @ p[name]) for name in ("Wf", "Wi", "Wo"))
        g = np.tanh(xh @ p["Wg"])
        before, c = c, f * c + i * g
        h = o * np.tanh(c)
        tape.append((xh, f, i, o, g, before, c))
    return h, tape


@wrong(
    lstm_loss,
    lstm_params(326),
    lstm_batch,
    cause("missing-factor", "missing-derivative", line="c = f * c + i * g"),
)
def cell_gradient_without_the_forget_gate(p, batch, wrong=True):
    """The gradient of the cell is handed to the step before without the forget gate."""
    x, y = batch
    h, tape = lstm_forward(x, p)
    grads = {name: np.zeros_like(value) for name, value in p.items()}
    dh = np.repeat(2 * (h.sum(axis=1) - y)[:, None] / len(y), 4, axis=1)
    dc = np.zeros_like(dh)
    for xh, f, i, o, g, before, c in reversed(tape):
        tc = np.tanh(c)
        dc = dc + dh * o * (1 - tc**2)
        back = {
            "Wf": dc * before * f * (1 - f),
            "Wi": dc * g * i * (1 - i),
            "Wo": dh * tc * o * (1 - o),
            "Wg": dc * i * (1 - g**2),
        }
        dxh = np.zeros_like(xh)
        for name, dz in back.items():
            grads[name] += xh.T @ dz
            dxh = dxh + dz @ p[name].T
        dh = dxh[:, 2:]
        dc = dc if wrong else dc * f
    return grads


@wrong(
    lstm_loss,
    lstm_params(330),
    lstm_batch,
    cause("swapped-leaves"),
)
def gate_gradients_in_another_order(p, batch, wrong=True):
    """The gradients are unpacked as (i, f, o, g) where they were packed as (f, i, o, g)."""
    x, y = batch
    h, tape = lstm_forward(x, p)
    order = ("Wf", "Wi", "Wo", "Wg")
    W = np.concatenate([p[name] for name in order], axis=1)
    dW = np.zeros_like(W)
    dh = np.ones((len(y), 4)) * (2 * (h.sum(axis=1) - y) / len(y))[:, None]
    dc = np.zeros((len(y), 4))
    for xh, f, i, o, g, before, c in tape[::-1]:
        dc += dh * o / np.cosh(c) ** 2
        dz = np.concatenate(
            [dc * before * f * (1 - f), dc * g * i * (1 - i), dh * np.tanh(c) * o * (1 - o), dc * i * (1 - g * g)],
            axis=1,
        )
        dW += xh.T @ dz
        dh = (dz @ W.T)[:, 2:]
        dc = dc * f
    first, second, third, fourth = np.split(dW, 4, axis=1)
    if wrong:
        first, second = second, first
    return {"Wf": first, "Wi": second, "Wo": third, "Wg": fourth}


def gru_like_loss(p, batch):
    x, y = batch

    def cell(h, x_t):
        z = jax.nn.sigmoid(x_t @ p["Uz"] + h @ p["Wz"])
        h_new = jnp.tanh(x_t @ p["Uh"] + h @ p["Wh"])
        h = (1 - z) * h + z * h_new
        return h, None

    start = jnp.zeros((x.shape[0], 4), x.dtype)
    h, _ = lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
    return jnp.mean((jnp.sum(h, axis=1) - y) ** 2)


@wrong(
    gru_like_loss,
    {
        "Uz": normal(334, 2, 4),
        "Wz": normal(335, 4, 4, scale=0.5),
        "Uh": normal(336, 2, 4),
        "Wh": normal(337, 4, 4, scale=0.5),
    },
    (normal(338, 6, 4, 2), normal(339, 6)),
    cause("missing-term", line="h = (1 - z) * h + z * h_new"),
)
def update_gate_keeps_nothing(p, batch, wrong=True):
    """The direct way h -> (1 - z) h is left out of the gradient of the state."""
    x, y = batch
    h, tape = np.zeros((len(x), 4)), []
    for t in range(x.shape[1]):
        z = sigmoid(x[:, t] @ p["Uz"] + h @ p["Wz"])
        new = np.tanh(x[:, t] @ p["Uh"] + h @ p["Wh"])
        tape.append((x[:, t], h, z, new))
        h = (1 - z) * h + z * new
    g = {name: np.zeros_like(value) for name, value in p.items()}
    dh = np.tile((2 * (h.sum(1) - y) / len(y))[:, None], 4)
    for x_t, before, z, new in reversed(tape):
        da_z = dh * (new - before) * z * (1 - z)
        da_h = dh * z * (1 - new**2)
        g["Uz"] += x_t.T @ da_z
        g["Wz"] += before.T @ da_z
        g["Uh"] += x_t.T @ da_h
        g["Wh"] += before.T @ da_h
        direct = 0 if wrong else dh * (1 - z)
        dh = direct + da_z @ p["Wz"].T + da_h @ p["Wh"].T
    return g


def padded_loss(p, batch):
    x, y, lengths = batch
    valid = (jnp.arange(x.shape[1])[None, :] < lengths[:, None]).astype(x.dtype)
    out = jnp.tanh(x @ p["W"]) @ p["v"]
    per_step = valid * (out - y) ** 2
    return jnp.sum(per_step) / x.shape[0]


@wrong(
    padded_loss,
    {"W": normal(340, 3, 4), "v": normal(341, 4)},
    (normal(342, 6, 5, 3), normal(343, 6, 5), np.array([5, 3, 2, 4, 1, 5])),
    cause("missing-factor", "missing-derivative", "wrong-value", line="per_step = valid * (out - y) ** 2"),
)
def padding_learns_too(p, batch, wrong=True):
    """The loss leaves out the padded time steps, the gradient does not."""
    x, y, lengths = batch
    h = np.tanh(x @ p["W"])
    d_out = 2 * (h @ p["v"] - y) / len(x)
    if not wrong:
        for row, length in enumerate(lengths):
            d_out[row, length:] = 0
    d_h = d_out[..., None] * p["v"] * (1 - h**2)
    return {"W": np.einsum("ntd,nth->dh", x, d_h), "v": np.einsum("nth,nt->h", h, d_out)}


# ------------------------------------------------------------------------------------------ attention


def attention_loss(p, batch):
    x, y = batch
    q, k, v = x @ p["Wq"], x @ p["Wk"], x @ p["Wv"]
    scores = jnp.einsum("nid,njd->nij", q, k) / jnp.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("nij,njd->nid", weights, v)
    return jnp.mean(jnp.sum((out - y) ** 2, axis=(1, 2)))


def attention_params(seed):
    return {name: normal(seed + k, 3, 4) for k, name in enumerate(("Wq", "Wk", "Wv"))}


attention_batch = (normal(344, 5, 4, 3), normal(345, 5, 4, 4))


@wrong(
    attention_loss,
    attention_params(346),
    attention_batch,
    cause(
        "missing-factor", "scale", "scaled-term", "missing-derivative", leaf=("Wq", "Wk"), line="scores = jnp.einsum("
    ),
)
def scale_of_the_scores_forgotten(p, batch, wrong=True):
    """The division of the scores by the root of d is not repeated on the way back."""
    x, y = batch
    q, k, v = x @ p["Wq"], x @ p["Wk"], x @ p["Wv"]
    d = q.shape[-1]
    a = softmax(q @ k.transpose(0, 2, 1) / np.sqrt(d))
    dout = 2 * (a @ v - y) / len(x)
    dv = a.transpose(0, 2, 1) @ dout
    da = dout @ v.transpose(0, 2, 1)
    ds = a * (da - (a * da).sum(-1, keepdims=True))
    if not wrong:
        ds /= np.sqrt(d)
    dq, dk = ds @ k, ds.transpose(0, 2, 1) @ q
    return {name: np.einsum("nti,ntj->ij", x, g) for name, g in (("Wq", dq), ("Wk", dk), ("Wv", dv))}


@wrong(
    attention_loss,
    attention_params(349),
    attention_batch,
    cause("wrong-derivative", "missing-term", leaf=("Wq", "Wk"), line="weights = jax.nn.softmax("),
)
def row_sum_of_the_softmax_forgotten(p, batch, wrong=True):
    """The softmax of attention goes back as P * dP, without the sum over the row."""
    x, y = batch
    grads = {name: np.zeros_like(value) for name, value in p.items()}
    for tokens, target in zip(x, y, strict=True):
        Q, K, V = tokens @ p["Wq"], tokens @ p["Wk"], tokens @ p["Wv"]
        P = softmax(Q @ K.T / np.sqrt(K.shape[1]))
        dO = 2 * (P @ V - target) / len(x)
        dP = dO @ V.T
        dS = P * dP
        if not wrong:
            dS = dS - P * np.sum(P * dP, axis=1, keepdims=True)
        dS = dS / np.sqrt(K.shape[1])
        grads["Wv"] += tokens.T @ P.T @ dO
        grads["Wq"] += tokens.T @ dS @ K
        grads["Wk"] += tokens.T @ dS.T @ Q
    return grads


@wrong(
    attention_loss,
    attention_params(352),
    attention_batch,
    cause("transposed", leaf="Wv", line="out = jnp.einsum("),
)
def attention_weights_not_transposed(p, batch, wrong=True):
    """The gradient of the values is P dO where P' dO belongs; P is square."""
    x, y = batch
    q, k, v = (np.einsum("ntd,dh->nth", x, p[name]) for name in ("Wq", "Wk", "Wv"))
    P = softmax(np.einsum("nid,njd->nij", q, k) / 2)
    dO = (2 / len(x)) * (np.einsum("nij,njd->nid", P, v) - y)
    dV = np.einsum("nij,njd->nid" if wrong else "nji,njd->nid", P, dO)
    dP = np.einsum("nid,njd->nij", dO, v)
    dS = P * (dP - np.einsum("nij,nij->ni", P, dP)[..., None]) / 2
    dQ = np.einsum("nij,njd->nid", dS, k)
    dK = np.einsum("nij,nid->njd", dS, q)
    return {
        "Wq": np.tensordot(x, dQ, ((0, 1), (0, 1))),
        "Wk": np.tensordot(x, dK, ((0, 1), (0, 1))),
        "Wv": np.tensordot(x, dV, ((0, 1), (0, 1))),
    }


@wrong(
    attention_loss,
    attention_params(355),
    attention_batch,
    cause("swapped-leaves"),
)
def query_and_key_gradients_swapped(p, batch, wrong=True):
    """The gradients of the query and the key matrix are returned for each other; written in JAX with vmap."""
    x, y = batch

    def one(tokens, target):
        q, k, v = tokens @ p["Wq"], tokens @ p["Wk"], tokens @ p["Wv"]
        a = jax.nn.softmax(q @ k.T / 2.0, axis=-1)
        dout = 2 * (a @ v - target)
        da = dout @ v.T
        ds = a * (da - jnp.sum(da * a, axis=-1, keepdims=True)) / 2.0
        return tokens.T @ (ds @ k), tokens.T @ (ds.T @ q), tokens.T @ (a.T @ dout)

    dq, dk, dv = (g.mean(axis=0) for g in jax.vmap(one)(x, y))
    return {"Wq": dk, "Wk": dq, "Wv": dv} if wrong else {"Wq": dq, "Wk": dk, "Wv": dv}


def rms_block_loss(p, batch):
    x, y = batch
    rms = jnp.sqrt(jnp.mean(x @ p["W"] * (x @ p["W"]), axis=-1, keepdims=True) + 1e-4)
    normed = p["g"] * (x @ p["W"]) / rms
    return jnp.mean(jnp.sum((jax.nn.relu(normed) - y) ** 2, axis=-1))


@wrong(
    rms_block_loss,
    {"W": normal(358, 3, 5), "g": normal(359, 5)},
    (normal(360, 11, 3), normal(361, 11, 5)),
    cause("missing-term", leaf="W", line=("rms = jnp.sqrt(", "normed = p[")),
)
def root_mean_square_as_a_constant(p, batch, wrong=True):
    """In RMS norm the root mean square is held fixed in the backward pass."""
    x, y = batch
    z = x @ p["W"]
    r = np.sqrt(np.mean(z * z, axis=-1, keepdims=True) + 1e-4)
    normed = p["g"] * z / r
    d_normed = 2 * (np.maximum(normed, 0) - y) * (normed > 0) / len(x)
    dz = d_normed * p["g"] / r
    if not wrong:
        dz = dz - z * np.mean(d_normed * p["g"] * z, axis=-1, keepdims=True) / r**3
    return {"W": x.T @ dz, "g": np.sum(d_normed * z / r, axis=0)}


# ------------------------------------------------------------------------------------------ embeddings


def cbow_loss(p, batch):
    context, target = batch
    h = p["E"][context].mean(axis=1)
    logits = h @ p["U"]
    log_p = logits - jax.nn.logsumexp(logits, axis=1, keepdims=True)
    return -jnp.mean(jnp.take_along_axis(log_p, target[:, None], axis=1))


cbow_params = {"E": normal(362, 6, 3), "U": normal(363, 3, 6)}
cbow_batch = (integers(364, 6, 11, 4), integers(365, 6, 11))


@wrong(
    cbow_loss,
    cbow_params,
    cbow_batch,
    cause("scale", "scaled-term", "missing-factor", leaf="E", line='h = p["E"][context].mean(axis=1)', factor="4"),
)
def context_words_not_averaged(p, batch, wrong=True):
    """The hidden vector is the mean of four context words, and each gets its gradient undivided."""
    context, target = batch
    dE = np.zeros_like(p["E"])
    dU = np.zeros_like(p["U"])
    for words, t in zip(context, target, strict=True):
        h = np.mean([p["E"][w] for w in words], axis=0)
        e = softmax(h @ p["U"])
        e[t] -= 1
        dU += np.outer(h, e) / len(target)
        dh = p["U"] @ e / len(target)
        for w in words:
            dE[w] += dh if wrong else dh / len(words)
    return {"E": dE, "U": dU}


@wrong(
    cbow_loss,
    cbow_params,
    cbow_batch,
    cause("missing-term", "wrong-value", leaf="E", line='h = p["E"][context].mean(axis=1)'),
)
def fancy_indexing_adds_once(p, batch, wrong=True):
    """`dE[context] += ...` adds once where a word occurs several times; np.add.at is meant."""
    context, target = batch
    n, width = context.shape
    h = p["E"][context].mean(axis=1)
    dlogits = (softmax(h @ p["U"]) - np.eye(6)[target]) / n
    dh = dlogits @ p["U"].T
    dE = np.zeros(p["E"].shape)
    spread = np.repeat(dh[:, None, :], width, axis=1) / width
    if wrong:
        dE[context] += spread
    else:
        np.add.at(dE, context, spread)
    return {"E": dE, "U": h.T @ dlogits}


def tied_language_model_loss(p, batch):
    words, following = batch
    h = jnp.tanh(p["E"][words] + p["b"])
    logits = h @ p["E"].T
    picked = jax.nn.log_softmax(logits)[jnp.arange(len(words)), following]
    return -picked.mean()


@wrong(
    tied_language_model_loss,
    {"E": normal(366, 6, 4), "b": normal(367, 4)},
    (integers(368, 6, 13), integers(369, 6, 13)),
    cause("missing-term", leaf="E", line='h = jnp.tanh(p["E"][words]'),
)
def tied_embedding_output_side_only(p, batch, wrong=True):
    """Input and output share the embedding; its gradient is that of the output layer alone."""
    words, following = batch
    h = np.tanh(p["E"][words] + p["b"])
    probs = softmax(h @ p["E"].T)
    probs[np.arange(len(words)), following] -= 1
    probs /= len(words)
    dE = probs.T @ h
    dz = probs @ p["E"] * (1 - h**2)
    if not wrong:
        for row, w in enumerate(words):
            dE[w] += dz[row]
    return {"E": dE, "b": dz.sum(axis=0)}


def skip_gram_loss(p, batch):
    centre, outside, negatives = batch
    v = p["V"][centre]
    good = jnp.sum(v * p["U"][outside], axis=-1)
    bad = jnp.einsum("nd,nkd->nk", v, p["U"][negatives])
    return -jnp.mean(jax.nn.log_sigmoid(good) + jnp.sum(jax.nn.log_sigmoid(-bad), axis=1))


skip_gram_params = {"V": normal(370, 5, 3), "U": normal(371, 5, 3)}
skip_gram_batch = (integers(372, 5, 9), integers(373, 5, 9), integers(374, 5, 9, 2))


@wrong(
    skip_gram_loss,
    skip_gram_params,
    skip_gram_batch,
    cause("missing-term", leaf="V", line="bad = jnp.einsum("),
)
def negatives_do_not_move_the_centre(p, batch, wrong=True):
    """The negative samples get a gradient, and give none to the centre word."""
    centre, outside, negatives = batch
    N = len(centre)
    dV, dU = np.zeros_like(p["V"]), np.zeros_like(p["U"])
    for c, o, negative in zip(centre, outside, negatives, strict=True):
        v = p["V"][c]
        pull = sigmoid(v @ p["U"][o]) - 1
        dV[c] += pull * p["U"][o] / N
        dU[o] += pull * v / N
        for k in negative:
            push = sigmoid(v @ p["U"][k])
            dU[k] += push * v / N
            if not wrong:
                dV[c] += push * p["U"][k] / N
    return {"V": dV, "U": dU}


# ------------------------------------------------------------------------------------------ right, but unusual


@right(last_state_loss, recurrent_params(375), last_state_batch)
def real_time_recurrent_learning(p, batch):
    """Forward in time: the derivative of the state by every weight is carried along, nothing goes back."""
    x, y = batch
    n, T, d = x.shape
    h = np.zeros((n, 5))
    by = {"Wx": np.zeros((n, 5, d, 5)), "Wh": np.zeros((n, 5, 5, 5)), "b": np.zeros((n, 5, 5))}
    for t in range(T):
        new = np.tanh(x[:, t] @ p["Wx"] + h @ p["Wh"] + p["b"])
        slope = 1 - new**2
        carried = {name: np.tensordot(p["Wh"].T, j, (1, 1)).swapaxes(0, 1) for name, j in by.items()}
        for u in range(5):
            carried["Wx"][:, u, :, u] += x[:, t]
            carried["Wh"][:, u, :, u] += h
            carried["b"][:, u, u] += 1
        by = {name: np.einsum("nu,nu...->nu...", slope, j) for name, j in carried.items()}
        h = new
    d_out = 2 * (h @ p["v"] - y) / n
    g = {name: np.einsum("n,u,nu...->...", d_out, p["v"], j) for name, j in by.items()}
    return {**g, "v": h.T @ d_out}


@right(lstm_loss, lstm_params(379), lstm_batch)
def lstm_backwards_with_a_scan(p, batch):
    """The backward pass of an LSTM as a scan in JAX over the stored gates."""
    x, y = batch
    h, tape = lstm_forward(x, p)
    stacked = [jnp.stack(values) for values in zip(*tape, strict=True)]

    def back(carry, now):
        dh, dc = carry
        xh, f, i, o, g, before, c = now
        dc = dc + dh * o * (1 - jnp.tanh(c) ** 2)
        dz = (dc * before * f * (1 - f), dc * g * i * (1 - i), dh * jnp.tanh(c) * o * (1 - o), dc * i * (1 - g**2))
        dxh = dz[0] @ p["Wf"].T + dz[1] @ p["Wi"].T + dz[2] @ p["Wo"].T + dz[3] @ p["Wg"].T
        return (dxh[:, 2:], dc * f), tuple(xh.T @ d for d in dz)

    dh = jnp.broadcast_to((2 * (h.sum(axis=1) - y) / len(y))[:, None], h.shape)
    _, parts = lax.scan(back, (dh, jnp.zeros_like(dh)), stacked, reverse=True)
    return {name: g.sum(axis=0) for name, g in zip(("Wf", "Wi", "Wo", "Wg"), parts, strict=True)}


@right(attention_loss, attention_params(383), attention_batch)
def attention_by_its_delta(p, batch):
    """The row sum of P * dP is computed from the output, as flash attention does."""
    x, y = batch
    q, k, v = x @ p["Wq"], x @ p["Wk"], x @ p["Wv"]
    P = softmax(q @ k.swapaxes(1, 2) / np.sqrt(4))
    out = P @ v
    dO = 2 * (out - y) / len(x)
    delta = np.sum(dO * out, axis=-1, keepdims=True)
    dS = P * (dO @ v.swapaxes(1, 2) - delta) / np.sqrt(4)
    flat = x.reshape(-1, 3)
    parts = (dS @ k, dS.swapaxes(1, 2) @ q, P.swapaxes(1, 2) @ dO)
    return {name: flat.T @ g.reshape(-1, 4) for name, g in zip(("Wq", "Wk", "Wv"), parts, strict=True)}


@right(skip_gram_loss, skip_gram_params, skip_gram_batch)
def word_vectors_by_one_hot_matrices(p, batch):
    """Look-ups are products with one-hot matrices, so that nothing is scattered."""
    centre, outside, negatives = batch
    C, O, N = np.eye(5)[centre], np.eye(5)[outside], np.eye(5)[negatives]
    v, u, w = C @ p["V"], O @ p["U"], N @ p["U"]
    a = (sigmoid((v * u).sum(1)) - 1)[:, None] / len(centre)
    b = sigmoid(np.einsum("nd,nkd->nk", v, w)) / len(centre)
    dv = a * u + np.einsum("nk,nkd->nd", b, w)
    return {"V": C.T @ dv, "U": O.T @ (a * v) + np.einsum("nkw,nk,nd->wd", N, b, v)}


@right(
    padded_loss,
    {"W": normal(387, 3, 4), "v": normal(388, 4)},
    (normal(389, 4, 5, 3), normal(390, 4, 5), np.array([2, 5, 4, 1])),
)
def ragged_sequences_one_by_one(p, batch):
    """Padded sequences are cut to their lengths first and taken one by one."""
    x, y, lengths = batch
    dW, dv = np.zeros((3, 4)), np.zeros(4)
    for sequence, target, length in zip(x, y, lengths, strict=True):
        s, t = sequence[: int(length)], target[: int(length)]
        h = np.tanh(s @ p["W"])
        e = 2 * (h @ p["v"] - t) / len(x)
        dv += e @ h
        dW += s.T @ (np.outer(e, p["v"]) * (1 - h**2))
    return {"W": dW, "v": dv}
