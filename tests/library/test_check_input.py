"""check_gradient on input that cannot be used: a sentence for people, never a traceback of ours."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name

from jaxgrad.check import check_backprop, check_gradient

X = np.random.default_rng(0).normal(size=(8, 3))
W = np.ones(3)


def loss(w, X):
    return jnp.mean((X @ w) ** 2)


def right(w, X):
    return 2 * X.T @ (X @ w) / len(X)


@pytest.mark.parametrize(
    ("gradient", "words"),
    [
        (lambda w, X: None, "returned None"),
        (lambda w, X: [right(w, X), 1.0], "a list"),
        (lambda w, X: {"w": right(w, X)}, "a dict"),
        (lambda w, X: right(w, X)[:2], "shape (2,)"),
        (lambda w, X: right(w, X)[:, None], "(3, 1)"),
        (lambda w, X: 2 * X * (X @ w)[:, None], "one axis too many"),
        (lambda w, X: right(w, X).sum(), "Everything was summed"),
        (lambda w, X: "2 X^T X w", "str"),
        (lambda w, X: right(w, X) * 1j, "complex"),
        (lambda w, X: (x for x in right(w, X)), "generator"),
    ],
)
def test_a_gradient_of_another_form_is_a_structure_finding(gradient, words):
    report = check_gradient(loss, gradient, W, X)
    assert not report.ok
    assert report.findings[-1].kind == "structure"
    assert words in str(report)


def test_integers_and_nan_in_the_gradient_are_compared_as_numbers():
    rounded = check_gradient(loss, lambda w, X: np.rint(right(w, X)).astype(int), W, X)
    assert not rounded.ok
    assert check_gradient(lambda w: jnp.sum(w), lambda w: np.ones(3, int), W).ok
    nan = check_gradient(loss, lambda w, X: right(w, X) * np.nan, W, X)
    assert nan.findings[0].kind == "unstable"
    assert "NaN" in str(nan)


def test_a_python_float_is_accepted_for_a_leaf_without_axes():
    p = {"a": 2.0, "b": np.asarray(1.0)}
    loss = lambda p: p["a"] ** 2 * p["b"]
    assert check_gradient(loss, lambda p: {"a": float(2 * p["a"] * p["b"]), "b": float(p["a"] ** 2)}, p).ok
    assert not check_gradient(loss, lambda p: {"a": float(p["a"] * p["b"]), "b": float(p["a"] ** 2)}, p).ok


def test_an_exception_of_the_gradient_is_passed_on_with_one_line_of_ours():
    def gradient(w, X):
        raise KeyError("W7")

    with pytest.raises(KeyError, match="W7") as caught:
        check_gradient(loss, gradient, W, X)
    assert len(caught.value.__notes__) == 1
    assert caught.value.__notes__[0].startswith("jaxgrad: your gradient raised this")


def impure(w, X):
    return loss(w, X) * (1 + random.random())


def by_value(w, X):
    return loss(w, X) if float(w[0]) > 0 else 0.0 * loss(w, X)


def by_numpy(w, X):
    return np.mean((X @ np.asarray(w)) ** 2)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((lambda w, X: (X @ w) ** 2, right, W, X), ValueError, "array of shape (8,)"),
        ((lambda w, X: (loss(w, X), 1.0), right, W, X), ValueError, "has_aux"),
        ((lambda w, X: None, right, W, X), ValueError, "return statement"),
        ((lambda w, X: {"loss": loss(w, X)}, right, W, X), ValueError, "a dict"),
        ((lambda w, X: jnp.sum(w > 0), right, W, X), ValueError, "floating-point"),
        ((impure, right, W, X), ValueError, "random"),
        ((loss, lambda w, X: right(w, X) * (1 + random.random()), W, X), ValueError, "gradient is random"),
        ((loss, right, W, np.ones((0, 3))), ValueError, "empty"),
        ((loss, right, np.array([1, 2, 3]), X), TypeError, "floating-point leaf"),
        ((loss, right, {}, X), TypeError, "no floating-point leaf"),
        ((loss, right, W * np.nan, X), ValueError, "holds nan at [0]"),
        ((loss, right, W, np.where(X[2, 1] == X, np.inf, X)), ValueError, "inf in X at [2, 1]"),
        ((loss, right(W, X), W, X), TypeError, "must be a function"),
        ((loss(W, X), right, W, X), TypeError, "must be a function"),
        ((lambda w, X: jnp.log(-jnp.sum(w**2)), right, W, X), ValueError, "not finite"),
    ],
)
def test_a_loss_or_input_that_cannot_be_used_is_explained(arguments, error, words):
    with pytest.raises(error) as caught:
        check_gradient(*arguments)
    text = str(caught.value)
    if words == "not finite":
        assert "NaN or infinite" in text
    else:
        assert words in text
    assert text[0].isalpha()


@pytest.mark.parametrize(
    ("untraceable", "right"), [(by_numpy, right), (by_value, lambda w, X: right(w, X) * (float(w[0]) > 0))]
)
def test_a_loss_that_jax_cannot_trace_is_compared_with_differences_of_its_values(untraceable, right):
    report = check_gradient(untraceable, right, W, X)
    assert report
    assert report.truth in ("central differences", "complex steps")
    assert any("cannot trace" in note for note in report.notes)
    assert not check_gradient(untraceable, lambda w, X: right(w, X) * (1 + 1e-6), W, X)


def test_an_error_inside_the_loss_is_passed_on():
    with pytest.raises((TypeError, ValueError)) as caught:
        check_gradient(lambda w, X: jnp.mean(X @ w[:2]), right, W, X)
    assert any("your loss raised" in note for note in caught.value.__notes__)


def test_a_leaf_that_the_loss_does_not_use_is_noted():
    p = {"used": W, "idle": np.ones(2)}
    gradient = lambda p, X: {"used": right(p["used"], X), "idle": np.zeros(2)}
    report = check_gradient(lambda p, X: loss(p["used"], X), gradient, p, X)
    assert report.ok
    assert any("does not depend on idle" in note for note in report.notes)
    wrong = lambda p, X: {"used": right(p["used"], X), "idle": np.ones(2)}
    report = check_gradient(lambda p, X: loss(p["used"], X), wrong, p, X)
    assert not report.ok
    assert report.findings[0].kind == "additive"


def test_a_loss_that_reads_a_global_is_checked_as_it_is_now():
    settings = {"strength": 0.1}

    def penalised(w, X):
        return loss(w, X) + settings["strength"] * jnp.sum(w**2)

    gradient = lambda w, X: right(w, X) + 2 * settings["strength"] * w
    assert check_gradient(penalised, gradient, W, X).ok
    settings["strength"] = 0.2
    assert check_gradient(penalised, gradient, W, X).ok


def test_the_callers_arrays_and_settings_are_left_alone():
    import jax

    def gradient(w, X):
        g = right(w, X)
        w *= 0
        X *= 0
        return g

    w, data = W.copy(), X.copy()
    before = jax.config.jax_enable_x64
    assert check_gradient(loss, gradient, w, data).ok
    np.testing.assert_array_equal(w, W)
    np.testing.assert_array_equal(data, X)
    assert jax.config.jax_enable_x64 == before


@pytest.mark.parametrize("w", [np.ones(3, complex), jnp.ones(3, jnp.complex64), 1 + 0j])
def test_a_complex_leaf_is_checked_not_left_out(w):
    """A gradient of 0 by a leaf that nobody looks at would pass for right."""

    def loss(params, X):
        return jnp.mean((X @ params["a"]) ** 2) + jnp.sum(jnp.abs(params["w"]) ** 2)

    def zeroed(params, X):
        return {"a": right(params["a"], X), "w": np.zeros_like(params["w"])}

    report = check_gradient(loss, zeroed, {"a": W, "w": w}, X)
    assert [leaf.path for leaf in report.leaves if not leaf.ok] == ["w"]
    conjugate = lambda params, X: {"a": right(params["a"], X), "w": 2 * np.conj(params["w"])}
    assert check_gradient(loss, conjugate, {"a": W, "w": w}, X)


def test_a_bfloat16_leaf_of_numpy_is_checked_not_left_out():
    w = {"a": W, "w": np.ones(3, jnp.bfloat16)}

    def both(params, X):
        return loss(params["a"], X) + jnp.sum(params["w"] ** 2)

    def zeroed(params, X):
        return {"a": right(params["a"], X), "w": np.zeros(3)}

    report = check_gradient(both, zeroed, w, X)
    assert not report.ok
    assert [leaf.path for leaf in report.leaves if not leaf.ok] == ["w"]


def raises(*_):
    raise ZeroDivisionError("nothing")


def in_numpy(w, X):
    return float(np.mean((np.asarray(X) @ np.asarray(w)) ** 2))


class Tape:
    def loss(self, w, X):
        self.z = X @ w
        return jnp.mean(self.z**2)

    def gradient(self, w, X):
        return 2 * X.T @ self.z / len(X)


tape = {}


def taped(w, X):
    tape["z"] = X @ w
    return jnp.mean(tape["z"] ** 2)


@pytest.mark.parametrize(
    ("loss", "gradient", "keywords", "words"),
    [
        (loss, raises, {}, "your gradient raised this at the given point"),
        (in_numpy, raises, {}, "your gradient raised this at the given point"),
        (raises, right, {}, "your loss raised this"),
        (loss, right, {"points": raises}, "your points raised this"),
        (taped, lambda w, X: 2 * X.T @ tape["z"] / len(X), {}, "It reads `tape`, where your loss has left"),
        (Tape.loss, Tape.gradient, {}, "It reads `self`, where your loss has left"),
    ],
)
def test_an_error_says_whose_code_raised_it(loss, gradient, keywords, words):
    if loss is Tape.loss:
        held = Tape()
        loss, gradient = held.loss, held.gradient
    with pytest.raises(Exception) as caught:  # noqa: PT011 - whatever their code raises
        check_gradient(loss, gradient, W, X, **keywords)
    assert any(note.startswith("jaxgrad:") and words in note for note in caught.value.__notes__)


def test_a_gradient_that_raises_only_the_second_time_says_so():
    calls = []

    def gradient(w, X):
        calls.append(1)
        return right(w, X) if len(calls) < 3 else raises()  # it is called once for its form

    with pytest.raises(ZeroDivisionError) as caught:
        check_gradient(loss, gradient, W, X)
    assert any("your gradient raised this when it was called again" in note for note in caught.value.__notes__)


@dataclasses.dataclass
class Plain:
    w: object
    size: int = 3


@dataclasses.dataclass(slots=True)
class Slotted:
    w: object


class Custom:
    def __init__(self, w):
        self.w = w


@pytest.mark.parametrize("kind", [Plain, Slotted, Custom])
@pytest.mark.parametrize("inside", [False, True])
def test_parameters_that_jax_does_not_take_apart_are_named_with_the_way_to_register_them(kind, inside):
    params = {"layer": kind(W)} if inside else kind(W)
    with pytest.raises(TypeError) as caught:
        check_gradient(loss, right, params, X)
    way = "register_pytree_node(Custom" if kind is Custom else f"register_dataclass({kind.__name__})"
    assert f"jax.tree_util.{way}" in str(caught.value)
    assert ("leaf layer" in str(caught.value)) == inside


def test_a_registered_dataclass_is_taken_apart():
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Registered:
        w: object

    assert check_gradient(lambda p, X: loss(p.w, X), lambda p, X: Registered(right(p.w, X)), Registered(W), X).ok


def test_numbers_that_jax_does_not_see_are_noted():
    params = {"w": W, "more": Plain(W)}
    report = check_gradient(lambda p, X: loss(p["w"], X), lambda p, X: {"w": right(p["w"], X)}, params, X)
    assert report.ok
    assert any("Plain" in note and "not checked" in note for note in report.notes)
    params["more"] = Plain("no array")
    assert not check_gradient(lambda p, X: loss(p["w"], X), lambda p, X: {"w": right(p["w"], X)}, params, X).notes


DATA = np.random.default_rng(1).normal(size=(8, 3))


def noted(report):
    return [note for note in report.notes if "a mistake in a factor of n cannot be told" in note]


def test_data_that_cannot_be_resampled_are_noted():
    by_closure = lambda w: jnp.mean((DATA @ w) ** 2)
    assert noted(check_gradient(by_closure, lambda w: 2 * DATA.T @ (DATA @ w) / 8, W))
    assert noted(check_gradient(by_closure, lambda w: 2 * DATA.T @ (DATA @ w), W))
    in_numpy = lambda w: float(np.mean((DATA @ np.asarray(w)) ** 2))
    assert noted(check_gradient(in_numpy, lambda w: 2 * DATA.T @ (DATA @ w), W))

    as_object = check_gradient(lambda w, b: loss(w, b.w), lambda w, b: 8 * right(w, b.w), W, Plain(X))
    assert "register_dataclass(Plain)" in noted(as_object)[0]
    assert as_object.findings[0].factor == "8"

    tagged = lambda w: jnp.mean(checkpoint_name(DATA @ w, "z") ** 2)
    backward = lambda w: (2 * DATA.T @ (DATA @ w) / 8, {"z": 2 * (DATA @ w) / 8})
    report = check_backprop(tagged, backward, W)
    assert noted(report)
    assert "Note: " in str(report)


def test_nothing_is_noted_where_the_sizes_were_tried_or_there_are_no_data():
    assert not noted(check_gradient(loss, right, W, X))
    assert not noted(check_gradient(lambda w: jnp.sum(w**2), lambda w: 2 * w, W))


MIXED = {"cfg": None, "name": "text", "w": W, "inner": {"off": None, "v": W}}


def mixed_loss(p, X):
    return loss(p["w"], X) + jnp.sum(jnp.sin(p["inner"]["v"]))


@pytest.mark.parametrize(
    "rest",
    [
        {"cfg": None, "name": "text"},
        {"cfg": None, "name": None},
        {"cfg": None},
        {"name": "text"},
        {},
    ],
)
@pytest.mark.parametrize("off", [{"off": None}, {}])
def test_a_none_in_params_may_be_there_or_not_in_the_gradient(rest, off):
    gradient = lambda p, X: {**rest, "w": right(p["w"], X), "inner": {**off, "v": np.cos(p["inner"]["v"])}}
    report = check_gradient(mixed_loss, gradient, MIXED, X)
    assert report.ok, str(report)
    only = check_gradient(mixed_loss, lambda p, X: {**gradient(p, X), "inner": None}, MIXED, X, only="w")
    assert only.ok, str(only)


def test_numbers_where_params_have_none_are_told_apart():
    gradient = lambda p, X: {"cfg": 1.0, "w": right(p["w"], X), "inner": {"v": np.cos(p["inner"]["v"])}}
    assert "cfg (None in params) besides" in str(check_gradient(mixed_loss, gradient, MIXED, X))
