"""The first wrong line of a person's own gradient: found where it can be shown, and else nothing said."""

import concurrent.futures
import gc
import linecache
import re
import sys
import types
import warnings

import follow_cases
import jax
import numpy as np
import pytest
from jax._src import compilation_cache
from jax._src.compilation_cache_interface import CacheInterface

from jaxgrad.check import check_gradient
from jaxgrad.check.evaluate import agreement, points
from jaxgrad.check.evaluate.problem import Malformed, autodiff, kernel, prepare
from jaxgrad.check.follow import repairs
from jaxgrad.check.follow.known import Index, alike
from jaxgrad.check.follow.statements import peek, reads, statements_of
from jaxgrad.check.follow.watch import Repair, TooLong, repaired, spelled_path, watch
from jaxgrad.check.gradient import trace_given
from jaxgrad.check.report import WrongLine, place, text


@pytest.fixture(autouse=True)
def as_people_write():
    """People add a bias to a batch without `[None, :]`, which the other tests forbid."""
    with jax.numpy_rank_promotion("allow"):
        yield


BY_NAME = {case.name: case for case in follow_cases.CASES}


def first_wrong_line(loss, gradient, params, batch, seconds=60.0) -> WrongLine | None:
    """The line that is found with points like those of a check, without the rest of the check."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        problem = prepare(loss, gradient, params, (batch,), {}, False)
        store = kernel(problem)
        trace_given(problem, store)
        shapes = [np.shape(a) for a in (*problem.leaves, *problem.data)]
        rng = np.random.default_rng(4)
        drawn = [
            point
            for size, count in zip(points.batch_sizes(problem.n, shapes), (3, 2), strict=True)
            for point in points.generic(problem, store, rng, size, autodiff, count)
        ]
        found = [agreement.evaluate(problem, store, point) for point in drawn]
        evaluations = [e for e in found if not isinstance(e, Malformed)]
        wrong = sorted(
            {
                i
                for e in evaluations
                for i in agreement.wrong_leaves(e, agreement.tolerance(agreement.scales(evaluations)))
            }
        )
        return repairs.first_wrong_line(problem, store, evaluations, wrong, 0.0, seconds)


@pytest.mark.parametrize("name", [case.name for case in follow_cases.CASES if not case.silent])
def test_the_line_with_the_mistake_is_found(name):
    case = BY_NAME[name]
    line = first_wrong_line(case.loss, case.gradient, case.params, case.batch)
    assert line is not None
    assert (line.line, line.certain) == (case.lines[0], name not in follow_cases.ONE_OF_TWO), line.sentence


class _Dropped:
    """Garbage that only the collector finds, and that runs a line when it is found."""

    def __init__(self):
        self.me = self

    def __del__(self):
        key = jax.random.key(0)
        del key


def test_what_the_collector_runs_is_not_taken_for_a_part_of_the_gradient(monkeypatch):
    case = BY_NAME["jitted_mask_of_output_weights"]
    watched = repairs.watch

    def with_garbage(call, deadline):
        for _ in range(3):
            _Dropped()
        return watched(call, deadline)

    real = jax.numpy.where
    monkeypatch.setattr(repairs, "watch", with_garbage)
    monkeypatch.setattr(jax.numpy, "where", lambda *args: (gc.isenabled() and gc.collect(), real(*args))[1])
    thresholds = gc.get_threshold()
    gc.set_threshold(10**9)  # it collects where `where` is called, and nowhere else
    try:
        line = first_wrong_line(case.loss, case.gradient, case.params, case.batch)
    finally:
        gc.set_threshold(*thresholds)
    assert line is not None
    assert (line.line, line.certain) == (case.lines[0], True), line.sentence


def test_the_search_is_bounded_by_a_count_of_runs(monkeypatch):
    case = BY_NAME["jitted_mask_of_output_weights"]
    monkeypatch.setattr(repairs, "MOST_REPAIRS", 5)
    assert first_wrong_line(case.loss, case.gradient, case.params, case.batch) is None


@pytest.mark.parametrize("name", [case.name for case in follow_cases.CASES if case.silent])
def test_nothing_is_said_where_nothing_can_be_shown(name):
    case = BY_NAME[name]
    assert first_wrong_line(case.loss, case.gradient, case.params, case.batch) is None


def test_who_is_told_of_compilations_is_not_followed():
    """JAX tells listeners of each compilation, in the midst of the gradient; what they do is not part of it."""
    told = []

    def listen(event, seconds, **_):
        spent = seconds * 1000.0
        told.append(spent)

    case = BY_NAME["jitted_mask_of_output_weights"]
    gradient = types.FunctionType(case.gradient.__wrapped__.__code__, case.gradient.__wrapped__.__globals__)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.clear_caches()
        run = watch(lambda: gradient(case.params, case.batch), 1e9)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert told
    assert run.events
    assert not [e for e in run.events if e.code is listen.__code__]


def test_who_keeps_compiled_programs_is_not_followed(monkeypatch, tmp_path):
    """JAX asks a cache for each program, in the midst of the gradient; the cache may be anybody's."""
    asked = []

    class Cache(CacheInterface):
        _path = tmp_path

        def get(self, key):
            rate = float(len(key))
            asked.append(rate)

        def put(self, key, value):
            pass

    case = BY_NAME["jitted_mask_of_output_weights"]
    gradient = types.FunctionType(case.gradient.__wrapped__.__code__, case.gradient.__wrapped__.__globals__)
    monkeypatch.setattr(compilation_cache, "get_file_cache", lambda path: (Cache(), path))
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        compilation_cache.reset_cache()
        jax.clear_caches()
        run = watch(lambda: gradient(case.params, case.batch), 1e9)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        monkeypatch.undo()
        compilation_cache.reset_cache()
    assert asked
    assert run.events
    assert not [e for e in run.events if e.code is Cache.get.__code__]


# ------------------------------------------------------------------------------------------ in a check


def check(name):
    case = BY_NAME[name]
    return check_gradient(case.loss, case.gradient, case.params, case.batch)


def test_a_report_shows_the_line_and_the_findings_stay_as_they_are(monkeypatch):
    report = check("slope_left_out")
    said = text(report)
    assert report.first_wrong_line is not None
    assert f"follow_cases.py:{BY_NAME['slope_left_out'].lines[0]}:  dz1 = da1" in said
    assert "`dz1` is dL/da1" in said
    assert "needs dL/dz1" in said
    monkeypatch.setattr(repairs, "first_wrong_line", lambda *_: None)
    without = check("slope_left_out")
    assert without.first_wrong_line is None
    assert without.findings == report.findings
    assert "In your code" not in text(without)


def test_a_right_gradient_is_not_followed(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(repairs, "first_wrong_line", refuse)
    case = BY_NAME["penalty_left_out"]
    assert check_gradient(case.loss, jax.grad(case.loss), case.params, case.batch).ok


def test_what_the_gradient_raises_while_it_is_followed_is_not_passed_on(monkeypatch):
    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(repairs, "watch", broken)
    assert not check("penalty_left_out").ok
    assert check("penalty_left_out").first_wrong_line is None


def test_a_gradient_that_rounds_is_not_followed():
    case = BY_NAME["penalty_left_out"]

    def single(w, batch):
        return np.float32(case.gradient(w, batch)).astype(float)

    report = check_gradient(case.loss, single, case.params, case.batch)
    assert not report.ok
    assert report.first_wrong_line is None


# ------------------------------------------------------------------------------------------ the person's state


def test_the_tracer_of_a_debugger_is_put_back_and_prints_are_kept_away(capsys):
    def tracer(*_):
        return None

    def function():
        print("seen")
        return 1.0

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        watch(function, 1e9)
        left = sys.gettrace()
    finally:
        sys.settrace(before)
    assert left is tracer
    assert capsys.readouterr().out == ""


def test_a_function_that_runs_too_long_is_let_go_with_its_tracer_put_back():
    def function():
        return sum(k for k in range(3))

    before = sys.gettrace()
    with pytest.raises(TooLong):
        watch(function, -1.0)
    assert sys.gettrace() is before


def test_threads_and_generators_are_no_obstacle():
    case = BY_NAME["square_without_two"]

    def rows(batch):
        yield from zip(*batch, strict=True)

    def gradient(w, batch):
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            parts = list(pool.map(lambda row: (row[0] @ w - row[1]) * row[0], rows(batch)))
        fit = sum(parts) / len(parts)
        return fit + 0.2 * w

    line = first_wrong_line(case.loss, gradient, case.params, case.batch)
    assert line is not None
    assert line.text == "fit = sum(parts) / len(parts)"


def test_reading_a_value_runs_no_code_of_the_person():
    class Noisy:
        @property
        def value(self):
            raise AssertionError

    source = "y = noisy.value + cache['x'][1:] * noisy.other\n"
    linecache.cache["<reads>"] = (len(source), None, source.splitlines(True), "<reads>")
    found = dict(reads(statements_of("<reads>")[1], {"noisy": Noisy(), "cache": {"x": np.arange(3.0)}}))
    assert [k for k in found if k != "noisy"] == ["cache['x'][1:]", "cache['x']"]
    assert peek(statements_of("<reads>")[1].node.targets[0], {"y": 2}) == 2


# ------------------------------------------------------------------------------------------ notebooks


def test_a_cell_of_a_notebook_is_named_as_the_notebook_names_it(monkeypatch):
    source = "def gradient(w, batch):\n    x, y = batch\n    r = x @ w + y\n    return 2 * x.T @ r / len(y) + 0.2 * w\n"
    file = "/nowhere/ipykernel_1/123.py"
    monkeypatch.setitem(linecache.cache, file, (len(source), None, source.splitlines(True), file))
    made: dict = {}
    exec(compile(source, file, "exec"), made)
    case = BY_NAME["penalty_left_out"]
    line = first_wrong_line(case.loss, made["gradient"], case.params, case.batch)
    assert line is not None
    assert line.text == "r = x @ w + y"
    assert line.where == "123.py:3"
    shell = types.SimpleNamespace(
        compile=types.SimpleNamespace(format_code_name=lambda name: ("Cell", "In[6]") if name == file else None)
    )
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))  # type: ignore
    assert line.where == "Cell In[6], line 3"
    assert place("/somewhere/file.py", 3) == "file.py:3"


# ------------------------------------------------------------------------------------------ following and matching


def test_each_statement_shows_what_it_reads_and_makes():
    def function(x):
        total = np.zeros(2)
        for row in x:
            total += row
        return total

    run = watch(lambda: function(np.array([[1.0, 2.0], [3.0, 4.0]])), 1e9)
    added = [e for e in run.events if e.statement.text == "total += row"]
    assert [e.occurrence for e in added] == [0, 1]
    assert [dict(e.inputs)["row"].tolist() for e in added] == [[1.0, 2.0], [3.0, 4.0]]
    assert [(spelled_path(o.path), o.value.tolist()) for e in added for o in e.outputs] == [
        ("total", [1.0, 2.0]),
        ("total", [4.0, 6.0]),
    ]


def test_a_repair_puts_values_in_place_each_time_that_the_statement_runs():
    def function():
        seen = []
        for k in range(3):
            value = np.full(2, float(k))
            seen.append(value.sum())
        return seen

    run = watch(function, 1e9)
    made = next(e for e in run.events if e.statement.text.startswith("value ="))
    repair = Repair(made.statement, made.code, tuple((("value",), np.full(2, 10.0 + k)) for k in range(3)))
    assert repaired(function, repair) == [20.0, 22.0, 24.0]
    assert function() == [0.0, 2.0, 4.0]


def test_an_array_is_recognised_turned_and_scaled_and_as_a_row_and_nothing_else_is():
    rng = np.random.default_rng(0)
    known = {("value", 0): rng.normal(size=(4, 6)), ("adjoint", 1): rng.normal(size=(3, 5))}
    index = Index(known, 7)
    turned = index.find(-7 * known["value", 0].T)
    assert [(f.label, f.axis, f.same) for f in turned] == [(("value", 0), None, False)]
    assert turned[0].factor == pytest.approx(-7.0)
    row = index.find(2 * known["adjoint", 1][:, 2])
    assert [(f.label, f.axis, f.row) for f in row] == [(("adjoint", 1), 1, 2)]
    assert index.find(known["value", 0] + 1e-6 * rng.normal(size=(4, 6))) == ()
    assert index.find(rng.normal(size=(3, 5))) == ()
    assert alike(np.sort(known["value", 0], axis=None), known["value", 0]) is None


def test_every_mistake_of_the_cases_is_marked_once():
    for case in follow_cases.CASES:
        assert len(case.lines) == (0 if case.silent else 1), case.name
        assert re.fullmatch(r"\w+", case.name)


def masked_loss(p, b):
    z = b["x"] @ p["w"]
    a = jax.numpy.maximum(z, 0)
    return jax.numpy.mean((a @ p["v"] - b["y"]) ** 2)


def always_true(z, da):
    mask = np.exp(z) > 0
    dz = da * mask
    return dz


def always_true_where(z, da):
    mask = np.abs(z) >= 0
    dz = np.where(mask, da, 0.0)
    return dz


def entry_by_entry(z, da):
    dz = np.zeros_like(da)
    for i in range(len(z)):
        for j in range(z.shape[1]):
            on = np.exp(z[i, j]) > 0
            dz[i, j] = da[i, j] * on
    return dz


def another_entry(z, da):
    off = np.argmin(z, axis=1)
    dz = da * (z > 0)
    dz[np.arange(len(z)), off] = 1.0
    return dz


def right_mask(z, da):
    mask = z > 0
    dz = da * da * mask
    return dz


@pytest.mark.parametrize("slope", [always_true, always_true_where, entry_by_entry, another_entry])
def test_a_line_is_not_certain_that_reads_a_condition_of_which_nothing_is_known(slope):
    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(9, 4)), "y": rng.normal(size=9)}
    params = {"w": rng.normal(size=(4, 5)), "v": rng.normal(size=5)}

    def gradient(p, b):
        z = b["x"] @ p["w"]
        a = np.maximum(z, 0)
        e = 2 * (a @ p["v"] - b["y"]) / len(z)
        dz = slope(z, np.outer(e, p["v"]))
        return {"w": b["x"].T @ dz, "v": a.T @ e}

    line = first_wrong_line(masked_loss, gradient, params, batch)
    assert line is None or (not line.certain and "is right: " not in line.sentence)
    if slope in (always_true, always_true_where):
        assert line is not None
        assert "`mask`, of which nothing can be said" in line.sentence


def test_a_condition_of_the_loss_is_known():
    rng = np.random.default_rng(0)
    keep = np.tril(np.ones((4, 4))) > 0
    batch, params = rng.normal(size=(9, 4)), rng.normal(size=(4, 4))

    def loss(w, x):
        return jax.numpy.sum(jax.numpy.where(keep, (x.T @ x) * w, 0.0) ** 2)

    def gradient(w, x):
        k = x.T @ x
        mask = np.tril(np.ones((4, 4))) > 0
        ds = 2 * np.where(mask, k * w, 0.0)
        dw = np.where(mask, k * k * ds, 0.0)
        return dw

    line = first_wrong_line(loss, gradient, params, batch)
    assert line is not None
    assert line.certain
    assert "k * k * ds" in line.text


def two_leaves(weight, bias):
    """A gradient whose two leaves have these factors, as functions of n, and are made on lines of their own."""

    def loss(p, b):
        return jax.numpy.mean(jax.numpy.sum((b["x"] @ p["w"] + p["b"] - b["y"]) ** 2, axis=1))

    def gradient(p, b):
        n = len(b["y"])
        e = 2 * (b["x"] @ p["w"] + p["b"] - b["y"]) / n
        dw = weight(n) * b["x"].T @ e
        db = bias(n) * e.sum(axis=0)
        return {"w": dw, "b": db}

    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(12, 4)), "y": rng.normal(size=(12, 3))}
    return loss, gradient, {"w": rng.normal(size=(4, 3)), "b": rng.normal(size=3)}, batch


@pytest.mark.parametrize(
    ("weight", "bias", "factors"),
    [
        (lambda n: n, lambda n: n / 12, {"w": "n", "b": "n/12"}),
        (lambda n: n, lambda n: 12, {"w": "n", "b": "12"}),
        (lambda n: 1 / n, lambda n: 1 / 12, {"w": "1/n", "b": "1/12"}),
    ],
)
def test_two_leaves_with_different_factors_of_n_are_two_mistakes(weight, bias, factors):
    report = check_gradient(*two_leaves(weight, bias))
    assert {f.leaf: f.factor for f in report.findings} == factors
    line = report.first_wrong_line
    assert line is not None
    assert line.leaves == ("w",)
    assert "The same kind" not in line.sentence
    assert f"b is {factors['b']} times the true one" in line.sentence


def test_the_factor_of_a_line_is_named_by_all_batch_sizes():
    line = check_gradient(*two_leaves(lambda n: 1, lambda n: n / 12)).first_wrong_line
    assert line is not None
    assert "n/12 times" in line.sentence


def test_a_single_number_is_not_taken_for_a_multiple_of_another():
    def loss(p, b):
        return jax.numpy.mean((b["x"] @ p["w"] + p["b"] - b["y"]) ** 2)

    def gradient(p, b):
        n = len(b["y"])
        half = n / 12
        e = 2 * (b["x"] @ p["w"] + p["b"] - b["y"]) / n
        return {"w": b["x"].T @ e, "b": e.sum() * half}

    rng = np.random.default_rng(0)
    batch = {"x": rng.normal(size=(12, 4)), "y": rng.normal(size=12)}
    line = check_gradient(loss, gradient, {"w": rng.normal(size=4), "b": np.array(0.3)}, batch).first_wrong_line
    assert line is not None
    assert line.variable == 'return["b"]'


def test_a_single_number_is_not_taken_for_the_gradient_of_another_that_is_right():
    def loss(p, x):
        scale = jax.numpy.exp(jax.numpy.mean(x @ p["w"]))
        return scale**3 + jax.numpy.sum(x) * p["c"] ** 2

    def gradient(p, x):
        scale = np.exp(np.mean(x @ p["w"]))
        dscale = 3 * np.cos(scale)
        dw = dscale * scale * x.mean(axis=0)
        return {"w": dw, "c": 2 * p["c"] * np.sum(x)}

    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=4), "c": np.array(0.3)}
    line = first_wrong_line(loss, gradient, params, rng.normal(size=(9, 4)))
    assert line is not None
    assert line.text == "dscale = 3 * np.cos(scale)"


def test_a_factor_in_a_loop_over_the_examples_is_found_at_its_line():
    def loss(w, x):
        return jax.numpy.mean(jax.numpy.tanh(x @ w) ** 2) / 2

    def gradient(w, x):
        total = np.zeros_like(w)
        for row in x:
            a = np.tanh(row @ w)
            total += 2 * a * (1 - a**2) * row
        return total / len(x)

    rng = np.random.default_rng(0)
    line = first_wrong_line(loss, gradient, rng.normal(size=4), rng.normal(size=(9, 4)))
    assert line is not None
    assert line.text == "total += 2 * a * (1 - a**2) * row"
