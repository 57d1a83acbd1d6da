"""Every sentence of the catalogue says something: each fault, contribution and mistake, in losses of many kinds."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad.check import check_gradient, faults, search, sentences
from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import autodiff, kernel, prepare
from jaxgrad.check.faults.mistake import Mistake

RNG = np.random.default_rng(0)
BATCH = {"x": RNG.normal(size=(6, 4)), "y": RNG.normal(size=6), "ids": RNG.integers(0, 4, 6)}
BATCH["mask"] = (RNG.random(6) > 0.3) * 1.0
P = {"w": RNG.normal(size=(4, 4)), "v": RNG.normal(size=4), "s": np.array(0.7)}

LOSSES = {
    "net": lambda p, b: jnp.mean((jax.nn.sigmoid(b["x"] @ p["w"] + p["v"]) @ p["v"] - b["y"]) ** 2) * p["s"],
    "softmax": lambda p, b: -jnp.mean(jnp.sum(b["x"] ** 2 * jax.nn.log_softmax(jnp.tanh(b["x"] @ p["w"]) * p["v"]), 1)),
    "relu": lambda p, b: (
        jnp.sum(jax.nn.leaky_relu(b["x"] @ p["w"]) @ p["v"]) / jnp.sum(b["mask"]) + jnp.sum(jnp.abs(p["v"]))
    ),
    "gelu": lambda p, b: jnp.mean(jax.nn.gelu(b["x"] @ p["w"]) @ jax.nn.silu(p["v"])),
    "matrices": lambda p, b: (
        jnp.sum(jnp.linalg.inv(p["w"] @ p["w"].T + 3 * jnp.eye(4)) @ p["v"])
        + jnp.linalg.slogdet(p["w"] @ p["w"].T + jnp.eye(4))[1]
        + jnp.sum(jnp.linalg.solve(p["w"] + 5 * jnp.eye(4), p["v"]))
        + jnp.sum(jnp.linalg.cholesky(p["w"] @ p["w"].T + jnp.eye(4)))
    ),
    "gather": lambda p, b: jnp.sum((p["w"][b["ids"]] @ p["v"] - b["y"]) ** 2 * b["mask"]) / jnp.sum(b["mask"]),
    "loop": lambda p, b: jnp.sum(jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ p["w"]), b["x"]) @ p["v"]),
    "powers": lambda p, b: (
        jnp.sum(jnp.exp(p["v"]) ** p["s"]) + jnp.sum(jnp.cumsum(b["x"] @ p["w"], 0) ** 3 / jnp.sqrt(2 + p["v"] ** 2))
    ),
    "normalised": lambda p, b: jnp.mean(
        ((lambda z: (z - z.mean(0)) / jnp.sqrt(z.var(0) + 1e-3))(b["x"] @ p["w"]) @ p["v"]) ** 2
    ),
    "convolution": lambda p, b: (
        jnp.sum(
            jax.lax.conv_general_dilated(b["x"].reshape(6, 1, 2, 2), p["w"].reshape(4, 1, 2, 2), (1, 1), "SAME") ** 2
        )
        * p["s"]
    ),
    "attention": lambda p, b: jnp.sum(jax.nn.softmax(b["x"] @ p["w"] @ b["x"].T, axis=1) @ b["x"] @ p["v"]) * p["s"],
    "fixed point": lambda p, b: jnp.sum(
        jax.lax.while_loop(lambda z: jnp.sum(jnp.abs(z)) < 0, lambda z: jnp.cos(z), p["v"]) * p["s"]
    ),
    "complex": lambda p, b: jnp.sum(jnp.abs(jnp.fft.fft(b["x"] @ p["w"], axis=0) * (1 + 2j)) ** 2),
    "largest": lambda p, b: jnp.mean(jnp.max(b["x"] @ p["w"], axis=1)) + jnp.prod(p["v"]) + jnp.linalg.norm(p["w"]),
}

WITHOUT_SOURCE = """
def loss(p, b):
    z = b["x"] @ p["w"] + p["v"]
    a = jax.nn.sigmoid(z) * jax.nn.leaky_relu(z)
    q = jax.nn.softmax(a * p["s"], axis=1)
    r = 0.5 * jnp.tanh(q @ p["v"]) - b["y"]
    return jnp.mean(jnp.where(r > 0, r**2, -r) * b["mask"]) + 0.1 * jnp.sum(p["w"] ** 2)
"""


def without_source():
    """A loss as it is typed into an interpreter: its lines have numbers and no text."""
    held = {"jax": jax, "jnp": jnp}
    exec(compile(WITHOUT_SOURCE, "<typed>", "exec"), held)
    return held["loss"]


LOSSES["typed"] = without_source()


@pytest.fixture(autouse=True)
def people_let_shapes_spread():
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def sample(loss):
    problem = prepare(loss, lambda p, b: p, P, (BATCH,), {}, False)
    store = kernel(problem)
    value, true = autodiff(store, problem.leaves, problem.data)
    at = Point("here", 6, problem.leaves, problem.data)
    evaluation = Evaluation(at, value, tuple(true), tuple(true))
    return problem, search.sample(problem, store, evaluation, np.random.default_rng(0))


def faults_of(sentence):
    """What is wrong with a sentence: an empty name, a hole between two words, no end."""
    bare = re.sub(r"`[^`]+`", "it", sentence)  # what is quoted is the person's code
    found = ["an empty name"] if "``" in sentence or re.search(r"\(\)", bare) else []
    if re.search(r"  | [,.:;)](?!\w)|\( |None", bare):
        found.append("a hole")
    if len(bare.split()) < 4 or not bare.endswith(".") or re.search(r"\b(of|by|in|the|to|where)\.$", bare):
        found.append("no end")
    return found


@pytest.mark.parametrize(
    "sentence",
    ["", "A wrong adjoint of .", "They are the `` of it all.", "The factor is None times that.", "In () it is wrong."],
)
def test_an_empty_sentence_is_seen(sentence):
    assert faults_of(sentence)


@pytest.mark.parametrize("name", LOSSES)
def test_every_finding_says_something(name):
    problem, s = sample(LOSSES[name])
    terms = faults.terms(s.program)
    leaves = (0, 2)
    findings = []
    for restricted in (False, True):
        findings += [sentences.fault(problem, s, f, leaves, restricted) for f in s.faults]
        for m in faults.rarer(s.at):
            assert isinstance(m, Mistake)
            findings.append(sentences.mistake(problem, s, m, "-1/2" if m.free else None, leaves, restricted))
        for factor in ("0", "-1", "2", "n"):
            findings += [sentences.term(problem, s, t, factor, leaves, restricted) for t in terms]
    for factor in (
        "-1",
        "2",
        "1/2",
        "n",
        "1/n",
        "n/2",
        "2/n",
        "n/12",
        "log(2)",
        "1/log(2)",
        "d",
        "1/k",
        "0.3",
        "n/(n-1)",
    ):
        findings += [sentences.scale(problem, s, factor, leaf, (leaf,)) for leaf in range(3)]
        findings.append(sentences.scale(problem, s, factor, None, (0, 1, 2)))
        findings.append(sentences.same_factor(problem, s, factor, (0, 2)))
    for leaf in range(3):
        findings += [sentences.zero(problem, s, leaf, (leaf,)), sentences.unknown(problem, leaf)]
        findings += [sentences.moved(problem, s, leaf, how) for how in ("transposed", "mirrored")]
    for slot in sorted(s.program.moving - {*s.program.leaves, s.program.output}):
        clue, _ = sentences.parted(problem, s, slot, leaves)
        findings.append(sentences.unknown(problem, None, [clue]))
    findings.append(sentences.unknown(problem, None))
    assert len(findings) > 100
    wrong = [(faults_of(f.sentence), f.sentence) for f in findings if faults_of(f.sentence)]
    assert max(len(f.sentence) for f in findings) < 1000
    assert not wrong, "\n".join(f"{what}: {sentence}" for what, sentence in wrong[:20])


def test_a_report_on_a_loss_without_source_has_no_empty_quotes():
    gradient = lambda p, b: jax.tree.map(lambda g: g * jnp.cos(g), jax.grad(LOSSES["typed"])(p, b))
    for wrong in (gradient, lambda p, b: jax.tree.map(lambda g: 0.5 * g, jax.grad(LOSSES["typed"])(p, b))):
        report = check_gradient(LOSSES["typed"], wrong, P, BATCH)
        assert not report.ok
        assert "``" not in str(report)
        assert not re.search(r"<typed>:\d+:\s*$", str(report), re.MULTILINE)
