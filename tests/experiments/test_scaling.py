"""The pure parts of `experiments.scaling`: the model, its limits, what it predicts, what a program is seen to send."""

import json

import numpy as np
import pytest

from experiments import scaling
from experiments.recorded import launchers, tables
from experiments.scaling import Point
from experiments.support.step_parts import sent, split

CORES = 2
PLANTED = scaling.Model("ring", {"linear": 2e-6, "net": 4e-5}, 3e-6, 2e-4, 1e-9)


def steps(model):
    """What that model says of cases as they are measured."""
    cases = [
        ("net/GD", 4992, 4, 203_560),
        ("net/stratified b = 96", 96, 4, 203_560),
        ("net/global b = 1536", 1536, 2, 4_823_040),
        ("linear/stratified b = 24", 24, 2, 40),
    ]
    found = [
        Point(name, P, rows / (1 if "global" in name else P), arrays * (P > 1), size * (P > 1), 1.0)
        for P in (1, 2, 4)
        for name, rows, arrays, size in cases
    ]
    return [point._replace(seconds=model.seconds(point, CORES)) for point in found]


@pytest.mark.parametrize("shape", ["ring", "tree"])
def test_a_fit_finds_what_was_planted(shape):
    planted = PLANTED._replace(shape=shape)
    found = scaling.fit(steps(planted), shape, CORES)
    assert found.fixed == pytest.approx(planted.fixed, rel=1e-9)
    assert found[2:] == pytest.approx(planted[2:], rel=1e-9)


def test_the_other_shape_fits_worse():
    points = steps(PLANTED)
    errors = [
        np.abs(np.log(scaling._ratios(scaling.fit(points, s, CORES), points, CORES))).max() for s in ("ring", "tree")
    ]
    assert errors[0] < 1e-9
    assert errors[1] > 0.1


def test_messages_and_bytes_of_an_all_reduce():
    P = np.array([1, 2, 3, 4, 1024])
    assert scaling.messages("ring", P).tolist() == [0, 2, 4, 6, 2046]
    assert scaling.messages("tree", P).tolist() == [0, 2, 4, 4, 20]
    assert scaling.passed(P)[[0, 1, 3]].tolist() == [0, 1, 1.5]
    alone = Point("net/GD", 1, 100, 4, 1000, 0.0)
    assert PLANTED.seconds(alone, CORES) == pytest.approx(4e-5 + 100 * 3e-6)
    # Four processes on two cores take turns: twice the arithmetic and twice the messages, not twice the bytes.
    four = alone._replace(P=4)
    once, twice = PLANTED.seconds(four, 4), PLANTED.seconds(four, 2)
    assert twice - once == pytest.approx(4e-5 + 100 * 3e-6 + 4 * 6 * 2e-4)


def test_the_best_batch_is_the_best_of_all():
    a, row, B = 1e-3, 3e-6, 5000.0
    b = np.logspace(0, 7, 20_001)
    for P in (1, 30, 1000):
        best = scaling.best_batch(P, a, row, B)
        allowed = b[b >= P]
        by_search = allowed[np.argmin(scaling.to_the_goal(P, allowed, a, row, B))]
        assert best == pytest.approx(by_search, rel=2e-3)
        # Its time is (√a + √(c₁B/P))².
        assert scaling.to_the_goal(P, best, a, row, B) == pytest.approx((a**0.5 + (row * B / P) ** 0.5) ** 2)
    assert scaling.best_batch(10_000, 1e-9, row, B) == 10_000


def numbers(B):
    """As little as a prediction needs: a net's steps on one device, 40 µs and 3 µs a row."""
    rows = {"net/GD": 960, "net/stratified b = 48": 48}
    whole = np.array([[[4e-5 + 3e-6 * n] * 6 for n in rows.values()]])
    return {
        "processes": np.zeros(0, int),
        "devices": np.array([1]),
        "cases": list(rows),
        "rows": 960,
        "cores": CORES,
        "devices/whole": whole,
        "devices/arrays": np.zeros((1, 2), int),
        "devices/bytes": np.zeros((1, 2), int),
        "noise/scale": np.array([B]),
        "parameters": 50_890,
    }


def test_predictions_have_the_limits_they_must_have():
    fast, slow = reversed(scaling.NETWORKS)
    for network in (fast, slow):
        tree, ring = (scaling.predict(numbers(7000.0), network, shape) for shape in ("tree", "ring"))
        assert tree.times[0] == 1
        assert (tree.times <= tree.P).all()
        assert tree.times[-1] > ring.times[-1]
        assert ring.times[-1] < 1  # 20,000 messages one after the other
        assert 0 < ring.stop < tree.stop
    # More noise is worth more hosts, and so is a better network.
    stops = {
        (B, network): scaling.predict(numbers(B), network, "tree") for B in (300.0, 7000.0) for network in (fast, slow)
    }
    hosts = {key: p.P[p.stop] for key, p in stops.items()}
    assert hosts[300.0, slow] < hosts[7000.0, slow] < hosts[7000.0, fast]


def test_the_host_of_a_prediction_is_the_one_that_was_measured():
    assert scaling._one_host(numbers(100.0)) == pytest.approx((4e-5, 3e-6), rel=1e-9)


def test_compute_all_reduce_and_waiting_add_up():
    # Two ranks, one step: the second computes 3 s longer, so the first waits 3 s for it.
    apart = np.array([[[[1.0, 5.0, 0.5]]], [[[4.0, 2.0, 0.5]]]])
    found = split(apart)
    assert found[:, 0, 0].tolist() == [[1.5, 2.0, 3.0], [4.5, 2.0, 0.0]]
    assert (found.sum(axis=-1) == apart.sum(axis=-1)).all()


def test_what_a_program_sends_is_read_from_its_text():
    program = """
      %all-reduce.1 = (f32[784,64]{1,0}, f32[10]{0}) all-reduce(%a, %b), channel_id=1
      %x = bf16[3]{0} all-gather-start(%c), channel_id=2
      ROOT %y = f32[784]{0} add(%all-reduce.1, %x)
    """
    assert sent(program) == (3, 784 * 64 * 4 + 10 * 4 + 3 * 2)
    assert sent("%y = f32[784]{0} add(%a, %b)") == (0, 0)


def test_what_is_recorded_meets_its_bars_and_names_no_place():
    failures, under = tables.read("failures"), tables.read("engines")
    assert failures is not None
    assert under is not None
    for case in failures["cases"]:
        assert case["seconds_until_all_are_gone"] <= failures["bar_seconds"] == 30
        other = 1 - case["rank"] if case["what"] == "never joins" and case["rank"] == 0 else case["rank"]
        assert f"rank {other}" in case["said"]
        assert case["statuses"][case["rank"]] != 0
    assert len(failures["cases"]) == 12
    assert len(under["engines"]) == 2
    for engine in under["engines"].values():
        assert launchers.agrees(engine["agreement_with_one_process"])
    text = json.dumps([failures, under]) + "".join(tables.sections())
    assert "/tmp" not in text
    assert "/root" not in text


def test_engines_that_disagree_are_seen():
    one = {"problems": ["p"], "p/labels": ["b = 8"], "p/start": 2.0, "p/b = 8/eta": 0.1, "p/b = 8/excess": np.ones(5)}
    assert launchers.agrees(launchers.compare(one, one))
    assert not launchers.agrees(launchers.compare(one, one | {"p/b = 8/eta": 0.2}))
    assert not launchers.agrees(launchers.compare(one, one | {"p/b = 8/excess": np.ones(5) + 1e-4}))
    assert not launchers.agrees(launchers.compare(one, one | {"p/b = 8/excess": np.ones(4)}))
