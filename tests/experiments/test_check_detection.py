"""The detection matrix: the quick size runs, its claims hold, and they can fail."""

import numpy as np
import pytest

from experiments import detection
from experiments.engine.session import Session
from experiments.support import checkers
from experiments.support.reported import CASES
from experiments.support.zoo import SPECIES, right_gradients


@pytest.fixture(scope="module")
def numbers():
    return detection.run(detection.QUICK, Session.plain())


def test_the_quick_zoo_is_caught_and_named(numbers):
    held = {claim.id: claim.holds for claim in detection.claims(numbers)}
    assert held["detection"]
    assert held["false alarms"]
    assert held["power"]
    assert held["cause"]
    assert held["line"]
    assert numbers["planted"].sum() == 3 * len(SPECIES[1].bugs)
    assert all(held[f"reported: {what}"] for what in ("detection", "false alarms", "crashes"))
    names = numbers["reported_wrong"] + numbers["reported_right"]
    assert sorted(names) == sorted(case.name for case in CASES[:: detection.QUICK.reported])


def test_claims_and_figure_and_report_follow_the_numbers(numbers):
    worse = {**numbers, "caught": numbers["caught"].copy(), "false_alarms": numbers["false_alarms"].copy()}
    worse["caught"][0, 0] -= 1
    worse["false_alarms"][0, 1] += 1
    worse["right_cause"], worse["right_line"], worse["smallest_detectable"] = 0, 0, 1e-7
    held = {claim.id: claim.holds for claim in detection.claims(worse)}
    assert not any(held[name] for name in ("detection", "false alarms", "power", "cause", "line"))
    figure = detection.draw(worse)
    words = [t.get_text() for t in figure.axes[0].texts]
    assert "1" in words
    assert "1 false alarm" in figure.axes[0].get_yticklabels()[0].get_text()
    assert "| jaxgrad | 1 |" in detection.report(worse)
    *_, below = figure.axes
    assert below.get_title(loc="left").startswith(f"{len(numbers['reported_wrong'])} mistakes as people report them")
    assert f"| all | {len(numbers['reported_wrong'])} |" in detection.report(worse)


def test_the_full_zoo_is_as_large_as_promised():
    config = detection.Config()
    wrong = 3 * config.wrong_seeds * sum(len(s.bugs) for s in SPECIES)
    right = 3 * config.seeds * sum(len(right_gradients(s)) for s in SPECIES)
    kinds = {kinds[0] for s in SPECIES for kinds, _ in s.bugs.values()}
    assert wrong >= 300
    assert right >= 1000
    assert len(SPECIES) >= 6
    assert config.reported == 1
    assert sum(bool(case.causes) for case in CASES) >= 60
    assert len(kinds) >= 12
    assert set(config.species) == {s.name for s in SPECIES}


def test_the_others_criteria_accept_the_truth_and_refuse_a_sign():
    rng = np.random.default_rng(0)
    known = checkers.differences(lambda x: float(np.sum(x**3)), np.array([1.0, -0.5, 2.0]), rng)
    right = 3 * np.array([1.0, -0.5, 2.0]) ** 2
    assert all(checkers.accepts(known, right).values())
    assert not any(checkers.accepts(known, -right).values())
