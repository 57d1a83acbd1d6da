"""What a study begins with is the same to the last bit whatever the processor can do."""

import ast
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy._core import _multiarray_umath as numpy_core

from experiments.support import exact

ROOT = Path(__file__).resolve().parents[2]
MAKER = Path(__file__).with_name("exact_inputs.py")


def processor(numpy: tuple[str, ...], xla: str, blas: str, libm: str) -> dict[str, str]:
    """The environment in which NumPy, XLA, OpenBLAS and libm take this processor for an older one."""
    known = [name for name in numpy_core.__cpu_dispatch__ if numpy_core.__cpu_features__[name]]
    off = " ".join(name for name in known if name.startswith(numpy))
    if platform.machine() not in ("x86_64", "AMD64"):
        return {"NPY_DISABLE_CPU_FEATURES": off}
    return {
        "NPY_DISABLE_CPU_FEATURES": off,
        "XLA_FLAGS": f"--xla_cpu_max_isa={xla}",
        "OPENBLAS_CORETYPE": blas,
        "GLIBC_TUNABLES": f"glibc.cpu.hwcaps={libm}",
    }


# The names that NumPy's dispatch levels begin with; older releases call them by the instructions.
NO_AVX512, NO_AVX = ("X86_V4", "AVX512"), ("X86_V", "AVX", "FMA", "SSE4", "ASIMD", "NEON", "SVE", "VSX", "VX", "RVV")
PROCESSORS = {
    "this one": {},
    "without AVX-512": processor(NO_AVX512, "AVX2", "Haswell", "-AVX512F"),
    "without AVX": processor(NO_AVX, "SSE4_2", "Prescott", "-AVX,-AVX2,-FMA,-AVX512F"),
}


def made_on(environment: dict[str, str]) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(MAKER)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t") for line in done.stdout.splitlines())


def test_grids_starts_data_and_settings_have_the_same_bits_on_every_processor():
    with ThreadPoolExecutor(2) as pool:
        here, *others = pool.map(made_on, PROCESSORS.values())
    assert len(here) > 80
    unrounded = [made.pop("unrounded") for made in (here, *others)]
    for name, there in zip(list(PROCESSORS)[1:], others, strict=True):
        assert [key for key in here if here[key] != there.get(key)] == [], name
        assert here.keys() == there.keys()
    if (
        platform.machine() in ("x86_64", "AMD64")
        and numpy_core.__cpu_features__["AVX2"]
        and not os.environ.get("XLA_FLAGS")
    ):
        assert unrounded[0] != unrounded[2], "the variables took no effect"


# --- nothing is made elsewhere ---------------------------------------------------------------------------------


GRIDS = {"geomspace", "logspace"}
DRAWS = {
    "normal", "standard_normal", "uniform", "exponential", "standard_exponential", "gamma", "logistic", "gumbel",
    "laplace", "lognormal", "standard_t", "multivariate_normal", "truncated_normal", "ball",
}  # fmt: skip
STARTS = {"init_two_layer", "init_deep"}
ALLOWED = {
    ("exact.py", "geometric", "geomspace"): "rounded there",
    ("exact.py", "normal", "standard_normal"): "rounded there",
    ("zoo.py", "_classes", "gumbel"): "decides only which class is the largest",
    ("descent_paths.py", "_levels", "geomspace"): "the levels that a figure's contours are drawn at",
}


def bare_calls(source: str) -> list[tuple[str, str]]:
    """(outermost function, call) for what hangs on the processor, wherever no figure is drawn."""
    out = []

    def walk(node: ast.AST, function: str) -> None:
        if isinstance(node, ast.FunctionDef) and not function:
            function = node.name
        if isinstance(node, ast.Attribute) and not (function == "draw" or function.startswith("_draw_")):
            of = ast.unparse(node.value)
            drawn = node.attr in DRAWS and of.split(".")[-1] not in ("exact", "noise", "optimum", "statistics", "stats")
            if drawn or node.attr in GRIDS | STARTS or (node.attr == "linspace" and of in ("jnp", "jax.numpy")):
                out.append((function, node.attr))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(source), "")
    return out


def test_no_study_makes_a_grid_a_draw_or_a_start_by_itself():
    found = {
        (file.name, *call)
        for file in (ROOT / "experiments").rglob("*.py")
        if file.parent.name != "derivations"
        for call in bare_calls(file.read_text("utf-8"))
    }
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "line",
    [
        "eta = np.geomspace(1e-3, 1, 9)",
        "w = jax.random.normal(key, (3,))",
        "x = rng.standard_normal(4)",
        "make = np.logspace",
        "start = models.init_two_layer(key, 2, 3, 1)",
        "w = jnp.linspace(0, 1, 9)",
    ],
)
def test_a_bare_grid_draw_or_start_is_seen(line):
    assert len(bare_calls(f"def run(config):\n    def inner():\n        {line}")) == 1
    assert bare_calls(f"def draw(numbers):\n    {line}") == []


# --- the roundings ---------------------------------------------------------------------------------------------


def test_a_grid_is_what_a_person_would_have_written():
    assert exact.geometric(1, 1000, 4).tolist() == [1, 10, 100, 1000]
    assert exact.geometric(0.003, 1.3, 20)[[0, -1]].tolist() == [0.003, 1.3]
    assert exact.decimals(2 / 3) == 0.666667
    assert exact.decimals([[1e-12 / 3], [np.inf]]).tolist() == [[3.33333e-13], [np.inf]]


def test_the_last_bit_of_what_is_rounded_does_not_matter():
    values = np.random.default_rng(0).normal(size=10_000)
    for nudged in (np.nextafter(values, -np.inf), np.nextafter(values, np.inf)):
        assert np.array_equal(exact.decimals(values), exact.decimals(nudged))
        assert np.array_equal(exact.dyadic(values), exact.dyadic(nudged))


def test_normal_draws_are_those_of_numpy_rounded_and_whole_in_float32():
    drawn, plain = exact.normal(np.random.default_rng(3), (50, 70)), np.random.default_rng(3).standard_normal((50, 70))
    assert np.abs(drawn - plain).max() <= 2.0**-21
    assert np.array_equal(drawn, drawn.astype(np.float32))
    narrow = exact.normal(np.random.default_rng(3), (50, 70), dtype=np.float32)
    assert narrow.dtype == np.float32
    assert np.array_equal(narrow, drawn)
    many = exact.normal(np.random.default_rng(3), exact.BLOCK + 9)[-9:]
    assert np.array_equal(many, exact.dyadic(np.random.default_rng(3).standard_normal(exact.BLOCK + 9)[-9:]))


def test_products_of_drawn_matrices_are_the_same_in_any_order():
    random = np.random.default_rng(1)
    x, w = exact.normal(random, (100, 300)), exact.normal(random, 300)
    order = random.permutation(300)
    assert np.array_equal(x @ w, x[:, order] @ w[order])
    assert np.array_equal(x @ w, np.einsum("ij,j->i", x[:, ::-1], w[::-1]))


def test_the_sigmoid_is_correctly_rounded_far_out_too():
    z = np.array([-700.0, -40.0, -1.0, 0.0, 1.0, 40.0, 700.0])
    assert np.allclose(exact.sigmoid(z), 1 / (1 + np.exp(-z)), rtol=4e-16, atol=0)
    assert exact.sigmoid(z)[3] == 0.5


def test_a_start_has_the_shapes_dtype_and_law_of_the_models():
    import jax

    from jaxgrad import models

    of = lambda net: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, type(leaf)), net)
    assert of(exact.two_layer(0, 6, 5, 3)) == of(models.init_two_layer(jax.random.key(0), 6, 5, 3))
    assert of(exact.layers(0, (6, 5, 4, 3))) == of(models.init_deep(jax.random.key(0), (6, 5, 4, 3)))
    net = exact.two_layer(0, 400, 300, 10)
    assert abs(float(net.W1.std()) * 20 - 1) < 0.01
    assert abs(float(net.W2.std()) * 300**0.5 - 1) < 0.05
    assert not net.b1.any()
    many = exact.two_layer(0, 6, 5, 3, count=4)
    assert [leaf.shape for leaf in many] == [(4, 6, 5), (4, 5, 3), (4, 5), (4, 3)]
