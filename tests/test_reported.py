"""Mistakes as people report them: the wrong gradients are wrong, the right ones right, and the truth is well formed."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.support.reported import CASES


@pytest.fixture(autouse=True)
def as_people_have_it():
    """The losses of other people rely on what JAX does by default."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


IN_SINGLE = {"vae_in_float32"}
WRONG = [case for case in CASES if case.causes]


def double(tree):
    def convert(leaf):
        leaf = np.asarray(leaf)
        kind = {"f": np.float64, "c": np.complex128}.get(leaf.dtype.kind, leaf.dtype)
        return leaf.astype(kind)

    return jax.tree.map(convert, tree)


@functools.cache
def truth(name):
    """Autodiff's gradient in float64, leaf by leaf with its path."""
    case = next(case for case in CASES if case.name == name)
    with jax.enable_x64(True):
        arguments = jax.tree.map(jnp.asarray, double(case.arguments))
        return jax.tree_util.tree_flatten_with_path(jax.jit(jax.grad(case.loss))(*arguments))[0]


def gaps(case, gradient):
    """How far each leaf of a gradient is from autodiff, relative to the whole; nan where the shapes differ."""
    true = truth(case.name)
    with jax.enable_x64(True):
        given = jax.tree_util.tree_flatten_with_path(gradient(*double(case.arguments)))[0]
    size = np.sqrt(sum(np.sum(np.abs(np.asarray(leaf)) ** 2) for _, leaf in true))
    assert [path for path, _ in given] == [path for path, _ in true]
    names = [".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in true]
    pairs = zip(given, true, strict=True)
    return {
        name: float(np.linalg.norm(np.ravel(np.asarray(g) - np.asarray(t))) / size)
        if np.shape(g) == np.shape(t)
        else np.nan
        for name, ((_, g), (_, t)) in zip(names, pairs, strict=True)
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_without_its_mistake_a_gradient_is_the_one_of_autodiff(case):
    assert max(gaps(case, case.right).values()) < (1e-6 if case.name in IN_SINGLE else 1e-12)


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_mistake_makes_exactly_the_leaves_wrong_that_it_names(case):
    wrong = {name for name, gap in gaps(case, case.gradient).items() if not gap < 1e-4}
    assert wrong
    named = [cause.leaves for cause in case.causes]
    if len(case.causes) > 1 or named != [()]:
        assert wrong == {leaf for leaves in named for leaf in leaves}


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_every_line_that_a_cause_names_is_one_line_of_the_loss(case):
    source = inspect.getsource(case.loss).splitlines()
    for cause in case.causes:
        assert cause.kinds
        for piece in cause.lines:
            assert sum(piece in line for line in source) == 1, piece


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_mistake_stands_where_the_word_wrong_stands(case):
    source = inspect.getsource(case.gradient)
    body = source[source.index('"""', source.index('"""') + 3) :]
    assert "wrong" in body


def test_there_are_many_cases_and_no_name_twice():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.what and case.what == inspect.cleandoc(case.what) for case in CASES)
