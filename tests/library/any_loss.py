"""Random losses, run by `descend` wherever rows can lie, against the loop that everybody writes.

    python any_loss.py SEED COUNT [--guess]      prints what came out, as JSON

Each case draws a loss (a mean over examples, written in one of many ways, or what is none: weighted and masked
averages, ratios, batch statistics, pairs, maxima), a size near one of the thresholds at which `descend` evaluates rows
in another way, a sampling, and a place for the rows: memory, disk, or 2 or 4 devices. Rows are sorted by group, so that
the first ones are not like the others. The path and the recorded losses must be those of the loop. Only what is no mean
may be refused, and only on disk or where rows do not divide evenly over devices.

`--guess` puts a guess from the first rows in the place of the proof, as it once was: to see that this would be found.
"""

import json
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import jax

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jaxgrad.rows as files_of_rows  # noqa: E402
from jaxgrad import descend, distinct, full_batch, losses, means, open_rows, parallel, reshuffled  # noqa: E402
from jaxgrad.descent import full_pass, row_blocks  # noqa: E402
from jaxgrad.sampling import with_replacement  # noqa: E402
from jaxgrad.types import Batch  # noqa: E402

D = 4
RECORD = [0, 1, 4]
KEY = jax.random.key(11)
# Small thresholds, so that a few hundred rows cross them all: parts, blocks, blocks on all cores, blocks of a file.
SETTINGS = (
    (row_blocks, "SMALLEST_IN_PARTS", 2**12),
    (row_blocks, "BLOCK", 2**12),
    (row_blocks, "BLOCK_PER_CORE", 2**9),
    (files_of_rows, "PART", 2**13),
    (full_pass, "BLOCK", 2**12),
)
SIZES = (96, 100, 110, 400, 511, 512, 520, 1000, 1003, 2051)


# --- losses ----------------------------------------------------------------------------------------------------


def predict(params, x):
    return jnp.tanh(x @ params["V"]) @ params["w"] + params["b"]


def errors(params, x, y):
    return (predict(params, x) - y) ** 2


def huber(params, x, y):
    apart = predict(params, x) - y
    return jnp.where(jnp.abs(apart) < 1, apart**2 / 2, jnp.abs(apart) - 0.5)


def cross_entropies(params, x, y):
    return jnp.logaddexp(0.0, predict(params, x)) - (y > 0) * predict(params, x)


EACH = (errors, huber, cross_entropies)


def penalty(params):
    return 0.01 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def dot_mean(each, params, batch):
    apart = predict(params, batch.x) - batch.y
    return apart @ apart / batch.x.shape[0]


def two_columns(each, params, batch):
    both = jnp.stack([predict(params, batch.x), -predict(params, batch.x)], axis=1)
    return -jnp.mean(jax.nn.log_softmax(both)[jnp.arange(len(batch.y)), (batch.y > 0).astype(int)])


def one_by_one(each, params, batch):
    return losses.mean_of(lambda p, row: each(p, row.x, row.y))(params, batch)


MEANS = {
    "mean": lambda each, p, b: jnp.mean(each(p, b.x, b.y)),
    "sum over len": lambda each, p, b: jnp.sum(each(p, b.x, b.y)) / len(b.y),
    "1/n times sum": lambda each, p, b: (1 / b.x.shape[0]) * each(p, b.x, b.y).sum(),
    "dot": dot_mean,
    "vmap": lambda each, p, b: jax.vmap(lambda x, y: each(p, x, y))(b.x, b.y).mean(),
    "penalty": lambda each, p, b: jnp.mean(each(p, b.x, b.y)) + penalty(p),
    "half of two": lambda each, p, b: 0.5 * (jnp.mean(each(p, b.x, b.y)) + jnp.mean(errors(p, b.x, b.y))),
    "weights of rows": lambda each, p, b: jnp.mean((1 + jnp.abs(b.x[:, 0])) * each(p, b.x, b.y)),
    "own column": two_columns,
    "layer norm": lambda each, p, b: jnp.mean(each(p, b.x / (1 + jnp.linalg.norm(b.x, axis=1, keepdims=True)), b.y)),
    "mean_of": one_by_one,
    "checkpointed": lambda each, p, b: jnp.mean(jax.checkpoint(each)(p, b.x, b.y)),
}


def weight(x):
    """Rows of the last group count twenty times as much."""
    return jnp.where(x[:, 0] > 2, 20.0, 1.0)


def normalised(each, params, batch):
    x = (batch.x - batch.x.mean(axis=0, keepdims=True)) / (batch.x.std(axis=0, keepdims=True) + 0.1)
    return jnp.mean(each(params, x, batch.y))


def masked(each, params, batch):
    mask = (batch.x[:, 0] > 2).astype(batch.x.dtype)
    return jnp.sum(mask * each(params, batch.x, batch.y)) / jnp.maximum(jnp.sum(mask), 1.0)


def share_of_variance(each, params, batch):
    spread = jnp.sum((batch.y - batch.y.mean()) ** 2) + 0.1
    return jnp.sum(errors(params, batch.x, batch.y)) / spread


def soft_f1(each, params, batch):
    p, y = jax.nn.sigmoid(predict(params, batch.x)), (batch.y > 0).astype(batch.x.dtype)
    return 1 - 2 * jnp.sum(p * y) / (jnp.sum(p) + jnp.sum(y) + 0.1)


def neighbours(each, params, batch):
    score = predict(params, batch.x)
    return jnp.mean(jax.nn.relu(1 - (score[1:] - score[:-1]) * jnp.sign(batch.y[1:] - batch.y[:-1])))


def halves(each, params, batch):
    """Pairs of rows that follow each other, by a reshape that hides them."""
    score = predict(params, batch.x)[: batch.x.shape[0] // 2 * 2].reshape(-1, 2)
    return jnp.mean((score[:, 0] - score[:, 1] - 1) ** 2)


OTHERS = {
    "sum": lambda each, p, b: 1e-3 * jnp.sum(each(p, b.x, b.y)),
    "weighted average": lambda each, p, b: jnp.sum(weight(b.x) * each(p, b.x, b.y)) / jnp.sum(weight(b.x)),
    "masked average": masked,
    "variance penalty": lambda each, p, b: jnp.mean(each(p, b.x, b.y)) + jnp.var(predict(p, b.x)),
    "normalised by the batch": normalised,
    "share of variance": share_of_variance,
    "soft F1": soft_f1,
    "maximum": lambda each, p, b: jnp.max(each(p, b.x, b.y)),
    "tilted": lambda each, p, b: jax.nn.logsumexp(each(p, b.x, b.y)) - jnp.log(float(len(b.y))),
    "root": lambda each, p, b: jnp.sqrt(jnp.mean(each(p, b.x, b.y)) + 0.1),
    "trimmed": lambda each, p, b: jnp.mean(jnp.sort(each(p, b.x, b.y))[: 9 * len(b.y) // 10]),
    "neighbours": neighbours,
    "pairs by reshape": halves,
    "against the first row": lambda each, p, b: jnp.mean(each(p, b.x - b.x[:1], b.y)),
    "unbiased": lambda each, p, b: jnp.sum(each(p, b.x, b.y)) / (len(b.y) - 1),
    "all of n": lambda each, p, b: jnp.sum(each(p, b.x, b.y)) / 512,
    "group gap": lambda each, p, b: (
        jnp.mean(each(p, b.x, b.y))
        + jnp.abs(jnp.sum(predict(p, b.x) * (b.x[:, 0] > 2)) / (jnp.sum(b.x[:, 0] > 2) + 1.0) - predict(p, b.x).mean())
    ),
    "position": lambda each, p, b: jnp.mean(jnp.linspace(0.5, 1.5, len(b.y)) * each(p, b.x, b.y)),
}


# --- cases -----------------------------------------------------------------------------------------------------


def rows(n):
    """Three quarters of one group, then a quarter of another, far away and with another law."""
    r = np.random.default_rng(n)
    x = r.normal(size=(n, D))
    other = np.arange(n) >= 3 * n // 4
    x[other, 0] += 4
    return Batch(x, np.where(other, -1.0, 1.0) * x[:, 1] + 0.3 * other + 0.1 * r.normal(size=n))


def start():
    r = np.random.default_rng(0)
    return {"V": jnp.asarray(0.5 * r.normal(size=(D, 3))), "b": jnp.zeros(()), "w": jnp.asarray(r.normal(size=3))}


def loop(loss, batch, sampling, eta):
    """Plain descent, over the examples that the sampling draws: parameters, and the loss of all rows, as recorded."""
    params, n, seen = start(), len(batch.y), []
    loss, slope = jax.jit(loss), jax.jit(jax.grad(loss))
    for step in range(RECORD[-1] + 1):
        if step in RECORD:
            seen.append(float(loss(params, batch)))
        drawn = slice(None) if sampling.batch_size is None else sampling.indices(KEY, step, n)
        gradient = slope(params, jax.tree.map(lambda leaf, drawn=drawn: leaf[drawn], batch))
        last, params = params, jax.tree.map(lambda w, g: w - eta * g, params, gradient)
    return last, seen


def laid(batch, place, folder):
    if place == "memory":
        return batch
    if place == "disk":
        path = Path(folder) / "rows.npy"
        np.save(path, np.column_stack([batch.x, batch.y]))
        return open_rows(path, target=-1)
    return parallel.shard(batch, parallel.mesh(jax.devices()[: int(place[0])]))


def case(random, folder):
    mean = random.random() < 0.4
    table = MEANS if mean else OTHERS
    form = list(table)[random.integers(len(table))]
    each = EACH[random.integers(len(EACH))]
    n = int(SIZES[random.integers(len(SIZES))])
    kinds = (full_batch(), full_batch(), distinct(20), reshuffled(32), with_replacement(7))
    sampling = kinds[random.integers(len(kinds))]
    place = ("memory", "memory", "disk", "2 devices", "4 devices")[random.integers(5)]
    loss = partial(table[form], each)
    name = f"{form} of {each.__name__}, n = {n}, {sampling.name} {sampling.batch_size or ''}, {place}"
    batch = jax.tree.map(jnp.asarray, rows(n))
    last, seen = loop(loss, batch, sampling, eta=0.05)
    parted = place == "disk" or (place[0] in "24" and n % int(place[0]) != 0)
    try:
        trace = descend(
            loss,
            start(),
            laid(batch, place, folder),
            optimizer=0.05,
            sampling=sampling,
            steps=RECORD[-1],
            key=KEY,
            record=RECORD,
        )
    except ValueError as error:
        told = "mean over the examples" in str(error) and "mean_of" in str(error)
        return ("refused" if told and parted and not mean else "refused wrongly"), f"{name}: {error}"
    pairs = zip(jax.tree.leaves((last, seen)), jax.tree.leaves((trace.params, trace.loss.tolist())), strict=True)
    apart = max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)) / (1e-3 + np.abs(a)))) for a, b in pairs)
    return ("right" if apart < 1e-9 else "wrong"), f"{name}: {apart:.1e} apart"


def guess(loss, params, data, sizes):
    """Whether the loss of 128 rows is the mean of that of their halves, as it was once guessed."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) for leaf in jax.tree.leaves((params, data))):
        return ""
    half = min(64, jax.tree.leaves(data)[0].shape[0] // 2)
    both = jax.value_and_grad(loss)
    cut = [jax.tree.map(lambda leaf, part=part: leaf[part], data) for part in np.s_[:half, half : 2 * half, : 2 * half]]
    first, second, whole = (jax.tree.leaves(both(params, part)) for part in cut)
    apart = max(float(jnp.linalg.norm((a + b) / 2 - c)) for a, b, c in zip(first, second, whole, strict=True))
    return "" if apart < 1e-9 * max(float(jnp.linalg.norm(c)) for c in whole) else "it was not for the first rows"


def main():
    seed, count = int(sys.argv[1]), int(sys.argv[2])
    for module, name, value in SETTINGS:
        setattr(module, name, value)
    if "--guess" in sys.argv:
        means.doubt = guess
    random, found, bad = np.random.default_rng(seed), Counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(count):
            outcome, words = case(random, folder)
            found[outcome] += 1
            if outcome not in ("right", "refused"):
                bad.append(f"{outcome}: {words}")
    print(json.dumps({"found": found, "bad": bad}))


if __name__ == "__main__":
    main()
