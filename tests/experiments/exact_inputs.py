"""Makes what each study begins with and prints its hashes by name, one a line: for `test_exact_inputs`."""

import dataclasses
import hashlib
import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import (
    conditioning,
    detection,
    escape,
    expected_path,
    formulas,
    gd_vs_sgd,
    gradient_noise,
    losses,
    no_guarantee,
    speed,
    step_cost,
)
from experiments.engine.catalogue import catalogue
from experiments.engine.session import Session
from experiments.recorded import large_file
from experiments.support import contenders, exact, reported, step_parts, zoo
from experiments.support.loading import few_features, load
from jaxgrad import data
from jaxgrad.descent import log_spaced
from jaxgrad.theory import escape as landscapes


def settings() -> Iterator[tuple[str, Any]]:
    """What every study is run with, at both sizes."""
    for name in catalogue():
        study = importlib.import_module(f"experiments.{name}")
        for size, config in (("full", study.Config()), ("quick", study.QUICK)):
            yield f"{name}/{size}", {key: repr(value) for key, value in dataclasses.asdict(config).items()}


def parts() -> Iterator[tuple[str, Any]]:
    """The functions of `exact`, and what NumPy is trusted with."""
    random = np.random.default_rng(0)
    yield "exact/normal", exact.normal(random, (300, 1000))
    yield "exact/normal float32", exact.normal(random, 300_000, bits=16, dtype=np.float32)
    yield "exact/geometric", [exact.geometric(1e-3, last, 600) for last in (1, 2, 3e4, 1e6)]
    yield "exact/sigmoid", exact.sigmoid(np.linspace(-800, 800, 500))
    yield "exact/log_spaced", [log_spaced(steps, 60) for steps in (300, 2000, 3000, 20_000, 123_456)]
    yield "exact/linspace", [np.linspace(0.1, last, 997) for last in (0.7, 3.3, 1e5)]
    drawn = random.integers(0, 1000, 100_000) / 7
    yield "exact/moments", [drawn.mean(), drawn.std(), drawn.reshape(-1, 10).mean(axis=0)]


def sets() -> Iterator[tuple[str, Any]]:
    """The data sets of the studies, as loaded and standardised."""
    for name in ("diamonds", "diabetes", "breast_cancer", "digits"):
        for standardise in (True, False):
            yield f"data/{name}/{standardise}", data.load(name, standardise=standardise).batch


def inputs() -> Iterator[tuple[str, Any]]:
    """Draws, starts, grids and step sizes."""
    with jax.enable_x64(True):
        shape, config = (5, 3, 4, 2), dataclasses.replace(formulas.QUICK, seeds=2, training=3)
        for name, family in {
            "linear": formulas.linear_family(shape, config),
            "functional": formulas.functional_family(shape, config),
            "two layers": formulas.two_layer_family(shape, config, 0),
            "deep": formulas.deep_family(shape, config, 1, 3),
            "logistic": formulas.logistic_family(shape, config),
            "scalar": formulas.scalar_family(config),
        }.items():
            yield f"formulas/{name}", (family.moving, family.fixed)
        for seed in range(3):
            for species in zoo.SPECIES:
                random = np.random.default_rng(seed)
                yield f"detection/{species.name} {seed}", species.draw(random, 200)
        points = detection._points(zoo.SPECIES[0], 0, detection.QUICK)
        yield "detection/reported", [case.arguments for case in reported.CASES]
        yield "detection/points", [(p, batch) for _, p, batch in points]
    for name in ("diamonds", "digits"):
        problem = gd_vs_sgd._problem(name, dataclasses.replace(gd_vs_sgd.QUICK, data=name), Session.plain())
        yield f"gd_vs_sgd/{name}", (problem.start, problem.batch, problem.largest)
        noisy = gradient_noise._problem(name, dataclasses.replace(gradient_noise.QUICK, data=name))
        yield f"gradient_noise/{name}", (noisy.start, noisy.batch, noisy.eta)
    yield "step_cost", [step_cost._data(1000, d) for d in (8, 64)]
    few = few_features(load(expected_path.QUICK), 3, 4000)
    yield "expected_path, samplings, escape", few[0]
    yield "speed_of_convergence", exact.geometric(0.1, 1e6, 4000)
    for land in (landscapes.double_well(), landscapes.frequency()):
        yield f"escape/{land.smoothness:.6g}", escape._rounded(land)._replace(loss=None)
    yield "escape/starts", exact.two_layer(1, 10, 3, 1, count=120)
    yield "no_guarantee", no_guarantee._starts(2, no_guarantee.Config())
    kappas = np.array(conditioning.Config.kappas)
    yield "conditioning/quadratics", conditioning._hessians(np.stack([np.ones(len(kappas)), 1 / kappas], axis=1))
    yield "conditioning/step sizes", [conditioning._etas(method, 48) for method in conditioning.METHODS]
    yield "losses", losses._targets(losses.Config())
    yield "backprop_cost", [exact.layers(depth, (64, *[32] * (depth - 1), 10)) for depth in (1, 2, 8)]
    yield "scaling", step_parts.problem("net", np.zeros((1, 784)), 128)[1]
    yield "speed/data", speed._data("synthetic", speed.QUICK)
    yield "speed/start", contenders.first_point(contenders.Case("two-layer", "synthetic", 100, 64, 10, 0.1, 10))
    with tempfile.TemporaryDirectory() as folder:
        large_file._generate(Path(folder) / "rows.npy", 20_000)
        yield "heavy", np.load(Path(folder) / "rows.npy")


def bits(tree: Any) -> str:
    found = hashlib.sha256(str(jax.tree.structure(tree)).encode())
    for leaf in jax.tree.leaves(tree):
        array = np.asarray(leaf)
        found.update(f"{array.dtype}{array.shape}".encode())
        found.update(array.tobytes() if array.dtype.kind in "fiubc" else str(leaf).encode())
    return found.hexdigest()[:16]


def unrounded() -> Iterator[tuple[str, Any]]:
    """What does hang on the processor, to see that this is another one."""
    yield "unrounded", (jax.random.normal(jax.random.key(0), (5000,)), np.geomspace(1e-3, 1e6, 4000))


if __name__ == "__main__":
    for make in (settings, parts, sets, inputs, unrounded):
        for name, tree in make():
            print(name, bits(tree), sep="\t")
