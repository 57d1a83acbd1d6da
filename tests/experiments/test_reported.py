"""Mistakes as people report them: the wrong gradients are wrong, the right ones right, and the truth is well formed."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.engine import plots
from experiments.support.reported import CASES, table
from experiments.support.reported.score import outcome
from jaxgrad.check.report import Finding, Leaf, Report


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


# --- what a report is worth ------------------------------------------------------------------------------------


def case_named(name):
    return next(case for case in CASES if case.name == name)


def line_of(case, piece):
    source, first = inspect.getsourcelines(case.loss)
    file = inspect.getfile(case.loss).rpartition("/")[2]
    return f"{file}:{next(first + i for i, line in enumerate(source) if piece in line)}"


def said(case, *findings, ok=False, off=()):
    leaves = tuple(Leaf(path, (), False, 1.0, 0.0, 0.0, (), 0.0, 0.0, "") for path in off)
    return outcome(case, Report(ok, leaves, findings, 1e-12, ()))


def finding(kind, leaf=None, factor=None, where=""):
    return Finding(kind, leaf, factor, where, "", "")


def test_a_report_is_worth_what_its_findings_name():
    case = case_named("decay_without_its_two")
    line, other = line_of(case, "jnp.vdot"), line_of(case, "scores = X @")
    assert said(case, finding("scaled-term", "W", "1/2", line), off=("W",)) == "cause and line"
    assert said(case, finding("scaled-term", "W", "1/2", other), off=("W",)) == "cause"
    assert said(case, finding("scaled-term", "W", "1/3", line), off=("W",)) == "misleading"
    assert said(case, finding("scaled-term", "b", "1/2", line), off=("W",)) == "misleading"
    assert said(case, finding("sign", "W", "-1", line), off=("W",)) == "misleading"
    assert said(case, finding("unknown", "W"), off=("W",)) == "unknown"
    assert said(case, finding("entries", "W"), off=("W",)) == "entries"
    assert said(case, ok=True) == "missed"
    assert outcome(case, None) == "crash"


def test_every_cause_and_every_leaf_must_be_named():
    case = case_named("delta_rule_twice_wrong")
    line = line_of(case, "jax.nn.sigmoid(")
    first, second = finding("missing-derivative", "w", None, line), finding("scale", "b", "n", line)
    assert said(case, first, second, off=("w", "b")) == "cause and line"
    assert said(case, first, finding("unknown", "b"), off=("w", "b")) == "half"
    assert said(case, first, finding("sign", "b", "-1"), off=("w", "b")) == "misleading"
    case = case_named("relu_backward_times_relu")
    line = line_of(case, "jnp.maximum")
    assert said(case, finding("wrong-derivative", "W1", None, line), off=("W1", "b1")) == "half"
    assert said(case, finding("wrong-derivative", None, None, line), off=("W1", "b1")) == "cause and line"


def test_the_line_may_be_that_of_the_mistake_in_the_persons_own_code():
    case = case_named("house_prices_not_divided_by_m")
    source, first = inspect.getsourcelines(case.gradient)
    own = next(first + i for i, line in enumerate(source) if "if wrong else" in line)
    assert said(case, finding("scale", None, "n", f"linear.py:{own}")) == "cause and line"
    assert said(case, finding("scale", None, "n", f"linear.py:{own - 1}")) == "cause"
    assert said(case, finding("scale", None, "n", f"nets.py:{own}")) == "cause"


def test_a_right_gradient_is_right_or_a_false_alarm():
    case = case_named("normal_equations")
    assert said(case, ok=True) == "right"
    assert said(case, finding("unknown")) == "false alarm"


@pytest.mark.parametrize("case", WRONG, ids=lambda case: case.name)
def test_a_finding_that_names_the_causes_in_full_is_worth_the_most(case):
    findings = [
        finding(
            sorted(cause.kinds)[0],
            leaf,
            next(iter(cause.factors), None),
            line_of(case, cause.lines[0]) if cause.lines else "",
        )
        for cause in case.causes
        for leaf in (cause.leaves or (None,))
    ]
    assert said(case, *findings, off=[f.leaf for f in findings if f.leaf]) == "cause and line"


def test_the_claims_on_reported_mistakes_can_fail_and_the_table_and_figure_follow_the_numbers():
    numbers = {
        "reported_wrong": ["a", "b", "c"],
        "reported_areas": ["linear", "linear", "nets"],
        "reported_words": ["cause and line", "missed", "crash"],
        "reported_right": ["d", "e"],
        "reported_right_words": ["right", "false alarm"],
        "reported_others": list(table.OTHERS),
        "reported_others_wrong": np.array([[3, 0, 0], [2, 1, 0], [1, 1, 1], [0, 3, 0], [0, 0, 3]]),
        "reported_others_right": np.array([[0, 2, 0], [0, 2, 0], [1, 1, 0], [0, 2, 0], [0, 0, 2]]),
    }
    assert [claim.holds for claim in table.claims(numbers)] == [False, False, False]
    better = {**numbers, "reported_words": ["unknown"] * 3, "reported_right_words": ["right"] * 2}
    assert all(claim.holds for claim in table.claims(better))
    text = "\n".join(table.report(numbers))
    assert "| linear | 2 | 1 | 0 | 1 | 0 |" in text
    assert "| jaxgrad | 1 of 3 | 1 | 1 | 1 of 2 | 0 |" in text
    assert f"| {table.OTHERS[2]} | 1 of 3 | 1 | 1 | 1 of 2 | 0 |" in text
    assert "False alarm: e." in text
    figure, (axis,) = plots.figure()
    table.draw(axis, numbers)
    assert [label.get_text() for label in axis.get_legend().get_texts()] == [
        "cause and line (1)",
        "missed (1)",
        "crash (1)",
    ]
    assert figure.axes


@pytest.mark.parametrize("name", ["complex_by_real_parts", "springs_by_a_matrix", "bias_summed_to_one_number"])
def test_other_checkers_judge_complex_nested_and_malformed_gradients(name):
    with jax.enable_x64(True):
        verdicts = table.others(case_named(name))
    expected = "refused" if case_named(name).causes else "accepted"
    unable = {"scipy check_grad < 1e-6"} if name.startswith("complex") else set()
    assert verdicts == {judge: "cannot take it" if judge in unable else expected for judge in table.OTHERS}
