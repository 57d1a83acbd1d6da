"""The race: contenders that take the same steps, one that does not, one that is not there, one that dies."""

import sys

import numpy as np
import pytest

from experiments import speed
from experiments.engine import plots, results
from experiments.engine.session import Session
from experiments.support import contenders
from experiments.support.contenders import CONTENDERS, Case

ROWS = 400


def case_of(problem, b, steps=200, d=3):
    return Case(problem, "made", ROWS, d, b, speed.HORIZON[problem] / steps, steps)


def made_data(case):
    rng = np.random.default_rng(3)
    x = rng.standard_normal((case.n, case.d), np.float32)
    y = x @ np.arange(1, case.d + 1, dtype=np.float32) / np.float32(2)
    return x, (y > 0).astype(np.float32) if case.problem == "logistic" else y


def final_loss(name, case, eta=None):
    x, y = made_data(case)
    ways = contenders.prepare(name, case if eta is None else case._replace(eta=eta), x, y, "cpu")
    return [contenders.choose([way], case, x, y, 0.0).loss for way in ways]


def made(seconds=None, losses=None, cases=None, absent=None):
    """The numbers of a race that was not run: `seconds[name]` and `losses[name]` hold in every case."""
    every = "linear", "logistic", "two-layer"
    cases = cases or [
        Case(problem, data, n, d, b, 0.1, 10)
        for problem in every
        for data, n, d in (("diamonds", 1000, 9), ("synthetic", 1000, 64), ("mnist5k", 1000, 784))
        for b in speed.EVERY_BATCH
    ] + [Case("linear", "beyond cache", 100_000, 64, 0, 0.1, 10)]
    seconds, losses, absent = seconds or {}, losses or {}, absent or {}
    count, rounds = len(cases), 6
    numbers = {field: np.array([getattr(case, field) for case in cases]) for field in Case._fields}
    for name in CONTENDERS:
        there = np.array([contenders.takes(name, case, "cpu") and name not in absent for case in cases])
        spread = np.linspace(0.9, 1.1, rounds)
        numbers |= {
            f"seconds/{name}": np.where(there[:, None], seconds.get(name, 2e-6) * spread, np.nan),
            f"loss/{name}": np.where(there & (name != "floor"), losses.get(name, 0.5), np.nan),
            f"first_call/{name}": np.where(there, 0.25, np.nan),
            f"way/{name}": np.array([""] * count),
            f"fault/{name}": np.array([""] * count),
            f"absent/{name}": absent.get(name, ""),
        }
    numbers |= {
        "contenders": list(CONTENDERS),
        "packages": ["numpy 1"],
        "cache": 2**20,
        "cores": 2,
        "peak": 1e11,
        "start_loss": np.ones(count),
        "operations": np.array([contenders.operations(case) for case in cases]),
        "bytes": np.array([contenders.bytes_moved(case) for case in cases]),
        "together": np.full(rounds, 0.1),
        "one_by_one": np.full(rounds, 0.5),
        "runs_together": 256,
        "run_steps": 200,
        "import_ours": np.full(rounds, 0.55),
        "import_theirs": np.full(rounds, 0.5),
        "starts": np.array([[4.0, 1.0]]),
        "started": ["descent_paths"],
        "profile_n": 1000,
        "profiled": [1, 32, 0],
    }
    for b in (1, 32, 0):
        numbers[f"profile/{b}"] = np.outer([0 if b == 0 else 1e-6, 0, 6e-6, 1e-6, 2e-6], np.ones(rounds))
    return numbers


class TestContenders:
    @pytest.mark.parametrize("problem", speed.HORIZON)
    @pytest.mark.parametrize("b", [1, 8, 0])
    def test_another_step_size_is_found_out(self, problem, b):
        """By the final loss alone, in either direction; and the ways of one contender agree."""
        case = case_of(problem, b, steps=20 if b == 0 else ROWS // b)
        right = final_loss("NumPy loop", case)
        others = [final_loss("NumPy loop", case, eta=factor * case.eta)[0] for factor in (0.5, 2)]
        x, y = made_data(case)
        for other in others:
            numbers = made(losses={"optax loop": other, "jaxgrad": right[-1]} | {"NumPy loop": right[0]}, cases=[case])
            for name in ("scikit-learn", "PyTorch eager", "torch.compile", "optimistix"):
                numbers[f"loss/{name}"][:] = np.nan
            numbers["start_loss"] = np.array([contenders.full_loss(case, contenders.first_point(case), x, y)])
            assert all(speed.comparable(numbers, 0, name) for name in ("jaxgrad", "NumPy loop"))
            assert not speed.comparable(numbers, 0, "optax loop")
            assert speed.over(numbers, 0, "NumPy loop") is not None
            assert speed.over(numbers, 0, "optax loop") is None
            last = speed.claims(numbers)[-1]
            assert not last.holds
            assert "not compared: optax loop in" in last.measured
            assert "another loss" in speed.report(numbers)

    @pytest.mark.parametrize("problem", ["linear", "logistic"])
    @pytest.mark.parametrize("steps", [ROWS, 250])
    def test_scikit_learn_takes_the_steps_of_a_loop(self, problem, steps):
        case = case_of(problem, 1, steps=steps)
        loop, theirs = final_loss("NumPy loop", case)[0], final_loss("scikit-learn", case)[0]
        x, y = made_data(case)
        fallen = contenders.full_loss(case, contenders.first_point(case), x, y) - loop
        assert abs(theirs - loop) < 0.05 * fallen

    def test_a_hiccup_does_not_shorten_the_rounds(self):
        """The machine stands still during the first run: so many steps are taken as without it."""
        calls = []

        def run(steps):
            calls.append(steps)
            return 1.0 if len(calls) == 1 else 1e-6 * steps

        steps, each = contenders._enough(contenders.Entrant(run, None, lambda: None), 0.01)
        assert steps >= 10_000
        assert each == pytest.approx(1e-6)

    def test_a_pass_sees_each_example_once(self):
        """Reading the rows that the loop is given, without a step."""
        case = case_of("linear", 7)
        batches = list(contenders._batches(np.random.default_rng(0).permutation(case.n), case.b))
        assert [len(rows) for rows in batches] == [7] * (ROWS // 7)
        assert len(np.unique(np.concatenate(batches))) == 7 * (ROWS // 7)

    def test_operations_are_those_of_the_products(self):
        case = Case("two-layer", "made", 100, 10, 0, 0.1, 1)
        products = [(100, 10, 128), (100, 128, 1), (100, 1, 128), (128, 100, 1), (10, 100, 128)]
        assert contenders.operations(case) == sum(2 * m * k * n for m, k, n in products)
        assert contenders.operations(Case("linear", "made", 100, 10, 8, 0.1, 1)) == 4 * 8 * 10
        assert contenders.bytes_moved(Case("linear", "made", 100, 10, 8, 0.1, 1)) == 4 * (8 * 10 + 8)

    @pytest.mark.parametrize(("name", "module"), [("PyTorch eager", "torch"), ("optimistix", "optimistix")])
    def test_a_missing_peer_says_how_to_get_it(self, monkeypatch, name, module):
        monkeypatch.setitem(sys.modules, module, None)
        case = case_of("linear", 0)
        with pytest.raises(contenders.Absent, match=rf"{module} is not installed: .*\[study,peers\]"):
            CONTENDERS[name](case, *made_data(case), "cpu")


class TestProcesses:
    def test_all_who_are_there_end_at_the_same_loss(self, tmp_path):
        """Each in a process of its own, on the three problems, with batches of one, of some and of all."""
        config = speed.Config(
            race=(("linear", "synthetic", (1,)), ("logistic", "synthetic", (8,)), ("two-layer", "synthetic", (0,))),
            compiled=(),
            rows=600,
            full_steps=5,
            rounds=2,
            min_seconds=1e-4,
        )
        said = []
        cases = speed._cases(config, tmp_path, Session.plain(said.append))
        numbers = results.as_saved(speed._race(config, cases, tmp_path, "cpu", Session.plain(said.append)))
        assert len(said) == 3
        for name in CONTENDERS:
            absent, took = numbers[f"absent/{name}"], numbers[f"seconds/{name}"]
            assert list(numbers[f"fault/{name}"]) == [""] * 3
            for i, case in enumerate(cases):
                raced = contenders.takes(name, case, "cpu") and name != "torch.compile" and not absent
                assert np.isfinite(took[i]).all() == raced, name
                assert not raced or (took[i] > 0).all()
                if raced and name != "floor":
                    assert speed.comparable(numbers, i, name), (name, case, speed.off_by(numbers, i, name))
            assert name not in ("jaxgrad", "NumPy loop", "scikit-learn", "optax loop", "floor") or not absent

    def test_data_beyond_cache_are_left_out_where_they_do_not_fit(self, tmp_path, monkeypatch):
        """A processor whose last-level cache is large beside the memory, as those of servers are."""
        config = speed.Config(race=(("linear", "beyond cache", (0,)), ("linear", "synthetic", (1,))), rows=100)
        monkeypatch.setattr(speed, "last_level_cache", lambda: 2**14)
        for free, expected in ((2**30, ["beyond cache", "synthetic"]), (2**20, ["synthetic"])):
            said = []
            monkeypatch.setattr(speed.machine, "free_memory", lambda free=free: free)
            assert [case.data for case in speed._cases(config, tmp_path, Session.plain(said.append))] == expected
            assert len(said) == 2 - len(expected)

    def test_a_fault_is_an_answer_and_a_death_is_told(self, tmp_path):
        with speed.contender("NumPy loop", "cpu", tmp_path, patience=60) as process:
            answer = speed.ask(process, {"prepare": case_of("linear", 8)})
            assert answer["failed"].startswith("FileNotFoundError")
            assert "no way was chosen" in speed.ask(process, {"round": 0})["failed"]
            process.handle.kill()
            with pytest.raises(speed.Lost, match="ended with status -9"):
                speed.ask(process, {"round": 0})
        with (
            speed.contender("NumPy loop", "cpu", tmp_path, patience=0.01) as process,
            pytest.raises(speed.Lost, match=r"no answer within 0\.01 s"),
        ):
            speed.ask(process, {"round": 0})

    def test_what_a_dying_process_said_is_the_reason(self, tmp_path):
        with speed.contender("NumPy loop", "cpu", tmp_path, patience=60) as process:
            assert process.handle.stdin is not None
            process.handle.stdin.write("this is no request\n")
            with pytest.raises(speed.Lost, match=r"status 1: json.*JSONDecodeError"):
                speed.ask(process, {"round": 0})

    def test_when_the_asker_is_gone_the_process_ends_and_takes_the_data_along(self, tmp_path):
        (tmp_path / "data").mkdir()
        with speed.contender("NumPy loop", "cpu", tmp_path / "data", patience=60) as process:
            assert process.handle.stdin is not None
            process.handle.stdin.close()
            assert process.handle.wait(timeout=60) == 0
        assert not (tmp_path / "data").exists()


class TestTable:
    BARS = ("1", "0.9", "0.4", "1/3", "1/20", "1/8", "1/6", "1/1.5", "1", "1.5", "1/3", "1/2", "1.15")

    def test_every_row_is_measured_and_judged(self):
        numbers = made(seconds={"jaxgrad": 1e-6, "NumPy loop": 4e-6, "optax loop": 7e-6, "floor": 1e-6})
        found = speed.rows(numbers)
        assert tuple(row.bar for row in found) == self.BARS
        assert all(row.found for row in found)
        ratios = [row.found.median for row in found]
        one = 0.5
        beyond = 64 / 65
        assert ratios == pytest.approx(
            [one, one, one, 1 / 4, one, 1 / 7, one, 1 / 7, one, beyond, 1 / 5, 1 / 4, 1.1], rel=1e-6
        )
        held = [claim.holds for claim in speed.claims(numbers)]
        assert held == [True, True, False, True, False, False, False, True, True, True, True, True, True, True]
        assert speed.report(numbers).count("**not met**") == 4

    def test_the_worst_case_is_the_one_that_is_told(self):
        numbers = made(seconds={"jaxgrad": 1e-6})
        numbers["seconds/PyTorch eager"][17] = 0.8e-6
        row = next(row for row in speed.rows(numbers) if row.text.startswith("any case"))
        assert row.found.median == pytest.approx(1.25, rel=0.1)
        assert row.where == f"{speed._case(numbers, 17)}, against PyTorch eager"
        assert not speed._holds(row)

    def test_who_is_missing_is_told_in_the_table_and_claims_nothing(self):
        gone = {name: f"{name} is not installed: pip" for name in ("PyTorch eager", "torch.compile", "optimistix")}
        numbers = made(absent=gone)
        report = speed.report(numbers)
        assert report.count("not measured: PyTorch eager is not installed: pip") == 2
        assert "- optimistix did not race: optimistix is not installed" in report
        assert len(speed.claims(numbers)) == len(self.BARS) - 2 + 1
        assert "PyTorch" not in speed.headline(numbers)

    def test_a_quick_run_tells_what_it_left_out(self):
        numbers = made(cases=[case_of("linear", 8)])
        numbers |= {"starts": np.zeros((0, 2)), "import_ours": np.zeros(0), "import_theirs": np.zeros(0)}
        assert speed.report(numbers).count("not measured: ") == 11
        assert speed.report(numbers).count("not part of this run") == 2

    def test_a_fault_is_told_where_it_happened(self):
        numbers = made()
        fault = numbers["fault/optax loop"].astype("<U20")
        fault[2], numbers["fault/optax loop"] = "its process ended", fault
        numbers["seconds/optax loop"][2] = np.nan
        numbers["loss/optax loop"][2] = np.nan
        report = speed.report(numbers)
        assert f"- optax loop failed in {speed._case(numbers, 2)}: its process ended." in report

    def test_the_floor_is_the_larger_of_bytes_and_operations(self):
        cases = [Case("linear", "made", 1000, 9, 0, 0.1, 1), Case("two-layer", "made", 1000, 9, 0, 0.1, 1)]
        numbers = made(seconds={"floor": 2e-6}, cases=cases)
        assert speed.floor_seconds(numbers, 0) == pytest.approx(2e-6 * 10 / 9)
        assert speed.floor_seconds(numbers, 1) == pytest.approx((4 * 1000 * 9 * 128 + 6 * 1000 * 128) / 1e11)

    def test_the_profile_is_told_in_shares(self):
        assert "b = 1: 10 µs a step, gradient 60%, loop 20%, update 10%, drawing indices 10%." in speed.report(made())

    def test_it_can_be_drawn_saved_and_read(self, tmp_path):
        numbers = results.as_saved(made(absent={"PyTorch eager": "gone"}))
        plots.save(speed.draw(numbers), tmp_path)
        assert (tmp_path / "figure.png").stat().st_size > 10_000
