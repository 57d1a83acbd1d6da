"""`python -m experiments verify`: it names planted mistakes, finds sound re-runs sound, and a killed study is whole.

The 50 kills of `test_fifty_kills` take minutes:
JAXGRAD_KILLS=50 python -m pytest tests/experiments/test_verify.py -k kills
"""

import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import experiments
from experiments.engine import (
    altered,
    arguments,
    echoes,
    environments,
    kinds,
    machine,
    proof,
    results,
    tolerance,
    verified,
    verify,
    workers,
)
from experiments.engine import commands as command
from experiments.engine.catalogue import catalogue
from experiments.engine.kinds import (
    COUNT,
    EXACT,
    RANDOM,
    RATIO,
    ROUNDING,
    SAME_JAX,
    SECONDS,
    Chaotic,
    Chosen,
    CountOf,
    ErrorOfRounding,
    Found,
    Mean,
    Off,
    Runs,
    Seconds,
)
from experiments.engine.session import Session
from jaxgrad import data

ROOT = Path(experiments.__file__).parent.parent
PLANTED = '''
"""GD and SGD on a hundred rows of diabetes."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, Mean, Runs
from experiments.engine.results import Claim
from jaxgrad import data, models
from jaxgrad.descent import trajectory
from jaxgrad.sampling import distinct, full_batch, with_replacement
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch

@dataclasses.dataclass(frozen=True)
class Config:
    seeds: int = 60

QUICK = Config(seeds=30)
NUMBERS = {
    "n": EXACT, "minimum": ROUNDING, "gd": ROUNDING, "sgd": Runs(axis=0), "mean": Mean(error="error"), "error": RANDOM,
}
ETA, SEED, B = 0.2, 1, 90

def run(config, session):
    x, y = (np.asarray(leaf[:100], np.float32) for leaf in data.load("diabetes").batch)
    x = x[:, [2, 8]]
    geometry = theory.problem(Batch(x.astype(float), y.astype(float)))
    batch = Batch(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    start = models.init_linear(x.shape[1], dtype=jnp.float32)

    def loss(params, batch):
        return jnp.mean((batch.x @ params.w + params.b - batch.y) ** 2)

    def go(sampling, keys):
        one = lambda key: trajectory(
            loss, start, batch, optimizer=optax.sgd(ETA), sampling=sampling, key=key, record=np.arange(41)
        )[1]
        return np.asarray(jax.jit(jax.vmap(one))(keys), float)

    keys = jax.random.split(jax.random.key(SEED), config.seeds)
    sgd = go(distinct(B), keys)
    return {
        "n": len(y), "minimum": geometry.value, "gd": go(full_batch(), keys[:1])[0], "sgd": sgd,
        "mean": sgd[:, -1].mean(), "error": sgd[:, -1].std(ddof=1) / np.sqrt(len(sgd)),
    }

def claims(numbers):
    end = numbers["gd"][-1]
    return [Claim("C6", "GD goes down", f"{end:.3f}", "below the start", bool(end < numbers["gd"][0]))]
'''

FAULTS = {
    "a changed seed": ("SEED, B = 0.2, 1", "SEED, B = 0.2, 2", "seed:", 0),
    "eta off by 1 %": ("ETA, SEED, B = 0.2", "ETA, SEED, B = 0.202", "step size: its first change is 1.00", 1),
    "float16": ("jnp.float32", "jnp.float16", "dtype: every value of gd is a float16 number", 1),
    "bfloat16": ("jnp.float32", "jnp.bfloat16", "dtype: every value of gd is a bfloat16 number", 1),
    "a float16 product": (
        "(batch.x @ params.w +",
        "((batch.x.astype(jnp.float16) @ params.w.astype(jnp.float16)).astype(jnp.float32) +",
        "dtype:",
        1,
    ),
    "a sum for the mean": ("jnp.mean(", "jnp.sum(", "mean against sum: it starts 100 times as large", 1),
    "a sum for the mean in the gradient": (
        "optax.sgd(ETA)",
        "optax.sgd(ETA * 100)",
        "mean against sum: its first change is",
        1,
    ),
    "another sampling": ("go(distinct(B)", "go(with_replacement(B)", "sampling:", 1),
    "one example dropped": ("leaf[:100]", "leaf[:99]", "data or sizes: n was 100, is 99", 1),
    "one example left out of the loss": ("batch.y) ** 2", "batch.y)[:-1] ** 2", "data:", 1),
}
"""What to write for what in PLANTED, how the hint begins, and the exit status of verify."""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An empty package of experiments, whose own results are in `tmp_path / "results"`."""
    machine.start_jax("cpu")
    folder = tmp_path / "package"
    folder.mkdir()
    monkeypatch.setattr(experiments, "__path__", [str(folder)])
    monkeypatch.setattr(arguments, "RESULTS", tmp_path / "results")
    yield folder
    forget("planted")


def forget(name):
    sys.modules.pop(f"experiments.{name}", None)
    experiments.__dict__.pop(name, None)
    importlib.invalidate_caches()


def ran(package, out, source=PLANTED, **changes):
    """Run the source as the experiment `planted`, save its numbers under `out`, and give back module and result."""
    (package / "planted.py").write_text(source)
    forget("planted")
    module = importlib.import_module("experiments.planted")
    config = dataclasses.replace(module.QUICK, **changes)
    numbers = results.as_saved(module.run(config, Session.plain()))
    results.write(out, "planted", "cpu", config, numbers, module.claims(numbers), {"seconds": 1.0})
    return module, results.read(out, "planted", "cpu")


def committed(package, folder, monkeypatch):
    """The committed result of PLANTED with the spread of four echoes."""
    module, old = ran(package, folder)
    load, heard = data.load, {}
    for seed in (1, 2, 3, 4):
        monkeypatch.setattr(data, "load", altered.nudged(load, seed))
        heard[str(seed)] = ran(package, folder.parent / f"echo{seed}")[1]
    monkeypatch.setattr(data, "load", load)
    echoes.write(folder, old, echoes.measure(old, heard, module.NUMBERS))
    return module, old


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.fixture
def heeds_ctrl_c():
    """Ctrl-C interrupts, as in a terminal: a script's shell starts what it runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class TestPlanted:
    def test_every_planted_fault_is_named(self, package, tmp_path, monkeypatch, capsys, knows_float16):
        folder = tmp_path / "committed"
        module, _ = committed(package, folder, monkeypatch)
        before = contents(folder)

        def verified(source=PLANTED):
            ran(package, tmp_path / "again", source)
            capsys.readouterr()
            status = command.main(["verify", "planted", "--out", str(folder), "--rerun", str(tmp_path / "again")])
            return status, capsys.readouterr().out

        status, said = verified()
        assert status == 0, said
        found = verify.study(folder, tmp_path / "again", "planted", "cpu", module.NUMBERS)
        assert [finding.verdict for finding in found.findings] == 7 * ["identical"]
        assert not found.remarks
        for fault, (was, now, hint, expected) in FAULTS.items():
            assert was in PLANTED, fault
            if "jnp.float16" in now and not knows_float16:
                continue
            status, said = verified(PLANTED.replace(was, now))
            assert status == expected, (fault, said)
            assert f"hint: {hint}" in said, (fault, said)
            assert "The code is newer than the results of planted (stale)" in said, fault
            if expected:
                assert re.search(r"differs: \S+: .* there, .* here", said), (fault, said)
        # A nudge that was not recorded is a sound re-run on another machine, and agrees.
        monkeypatch.setattr(data, "load", altered.nudged(data.load, 7))
        status, said = verified()
        assert (status, "hint" in said) == (0, False), said
        assert contents(folder) == before

    def test_a_stale_file_is_named(self, package, tmp_path, monkeypatch):
        module, old = committed(package, tmp_path / "committed", monkeypatch)
        assert next(iter(old.provenance["code"])) == "experiments.planted"
        assert {"jaxgrad.descent", "jaxgrad.data", "jaxgrad.data.dataset"} <= set(old.provenance["code"])
        ran(package, tmp_path / "again", PLANTED + "\n# one comment more\n")
        found = verify.study(tmp_path / "committed", tmp_path / "again", "planted", "cpu", module.NUMBERS)
        assert found.remarks == ("stale: experiments.planted changed since it was recorded",)
        assert found.count("differs") == 0

    @pytest.mark.parametrize(
        ("was", "now", "hint"),
        [
            ('"n": 100', '"n": 101', "edited number: n"),
            ('"measured": "0.', '"measured": "9.', "edited number: none of those"),
            ('"seeds": 30', '"seeds": 31', "edited number: none of those"),
        ],
    )
    def test_an_edited_number_is_named(self, package, tmp_path, was, now, hint):
        folder = tmp_path / "committed"
        module, _ = ran(package, folder)
        path = folder / "planted" / "cpu.json"
        assert was in path.read_text()
        path.write_text(path.read_text().replace(was, now))
        ran(package, tmp_path / "again")
        found = verify.study(folder, tmp_path / "again", "planted", "cpu", module.NUMBERS)
        assert found.hint.startswith(hint)
        assert ("seal", "differs") in [(finding.part, finding.verdict) for finding in found.findings]

    def test_an_edited_array_is_named(self, package, tmp_path):
        folder = tmp_path / "committed"
        module, old = ran(package, folder)
        ran(package, tmp_path / "again")
        arrays = {key: value for key, value in old.numbers.items() if isinstance(value, np.ndarray)}
        (folder / "planted" / "cpu.npz").write_bytes(results.npz(arrays | {"gd": arrays["gd"] * 1.001}))
        found = verify.study(folder, tmp_path / "again", "planted", "cpu", module.NUMBERS)
        assert found.hint.startswith("edited")
        assert found.count("differs") == 1

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda old: old._replace(device="gpu"), "it ran on gpu, this on cpu: run with --device gpu"),
            (lambda old: old._replace(config=old.config | {"seeds": 7}), "seeds = 7 there, 30 here"),
            (
                lambda old: old._replace(provenance=old.provenance | {"precision": {"x64": False}}),
                "other precision (run with this): {'x64': False} there",
            ),
        ],
    )
    def test_what_cannot_be_compared_says_what_would_help(self, package, tmp_path, change, words):
        module, old = ran(package, tmp_path / "committed")
        found = verify.compare(change(old), old, module.NUMBERS, None)
        assert {finding.verdict for finding in found.findings} == {"not comparable"}
        assert words in verify.text([found])
        assert all(words in finding.note for finding in found.findings)


# --- rules, on made-up numbers -----------------------------------------------------------------------------------


def result(tmp_path, numbers, claims=()):
    results.write(tmp_path, "made_up", "cpu", {"seeds": 20}, numbers, claims, {})
    return results.read(tmp_path, "made_up", "cpu")


def verdicts(tmp_path, declared, old, new, numbers_heard=(), **options):
    """The verdict and note on each part of made-up numbers."""
    before, after = (result(tmp_path / str(i), numbers) for i, numbers in enumerate((old, new)))
    known = None
    if numbers_heard:
        heard = {str(i): result(tmp_path / f"echo{i}", numbers) for i, numbers in enumerate(numbers_heard)}
        echoes.write(tmp_path / "0", before, echoes.measure(before, heard, declared, [*heard]))
        known = echoes.read(tmp_path / "0", before)
    found = verify.compare(before, after, declared, known, **options)
    return {finding.part: (finding.verdict, finding.note) for finding in found.findings}


class TestRules:
    def test_a_tolerance_follows_the_echoes_entry_by_entry(self, tmp_path):
        """A curve whose end is chaotic: the echoes scatter there, and only there is much allowed."""
        curve = np.geomspace(1, 1e-6, 25)
        loud = np.where(np.arange(25) < 20, 1e-7, 0.2)
        heard = [{"curve": curve * (1 + sign * loud)} for sign in (1, -1, 1)]
        declared = {"curve": ROUNDING}
        small = verdicts(tmp_path, declared, {"curve": curve}, {"curve": curve * (1 + 0.5 * loud)}, heard)
        assert small["curve"][0] == "agrees"
        early = np.where(np.arange(25) == 3, 1.01, 1)
        verdict, note = verdicts(tmp_path, declared, {"curve": curve}, {"curve": curve * early}, heard)["curve"]
        assert verdict == "differs"
        assert "first at [3] (1 of 25 entries): 0.177827941 there, 0.17960622 here, tolerance" in note

    def test_what_no_echo_moved_may_lose_a_sum_in_another_order(self, tmp_path):
        old = {"n": 10_000, "sum": 1.0}
        for ulps, verdict in ((50, "agrees"), (500, "differs")):
            new = {"n": 10_000, "sum": 1 + ulps * 2.0**-52}
            found = verdicts(tmp_path, {"n": EXACT, "sum": ROUNDING}, old, new, [old])
            assert found["sum"][0] == verdict

    def test_the_bound_is_that_of_students_distribution(self):
        from scipy import stats

        def bound(deviations, runs, level):
            return tolerance.bound(echoes._moments(np.asarray(deviations)), runs, level)

        def of_echoes(*sizes):
            one, *more = (echoes._moments(np.array([size])) for size in sizes)
            for other in more:
                one = one.plus(other)
            return tolerance.bound(one, 1, 0.01)

        assert of_echoes(2.0, -2.0, 2.0) == pytest.approx(2 * stats.t.isf(0.005, 3))
        # Two echoes that hardly move anything are none: one is left, and Student's t is wide.
        assert of_echoes(2.0, 1e-9, 1e-9) == pytest.approx(2 / np.sqrt(3) * stats.t.isf(0.005, 1))
        # One large deviation among many small ones is worth few degrees of freedom.
        spiked = np.r_[np.full(99, 0.01), 10.0]
        assert bound(spiked, 100, 1e-4) > 5 * stats.t.isf(5e-5, 100) * np.sqrt(np.mean(spiked**2))
        assert bound(np.zeros(5), 5, 0.01) == 0

    @pytest.mark.parametrize("zero", [0.0, 1e-300, 1e-17])
    def test_nothing_that_is_computed_has_the_tolerance_0(self, tmp_path, zero):
        """An entry that no echo moved, a 0 too, has the tolerance of its array; an array that none moved, its kin's."""
        curve = np.r_[zero, np.linspace(1, 2, 20)]
        moved = curve * (1 + 1e-15 * (np.arange(21) > 10))
        old, heard = {"curve": curve, "kin": 0.1}, [{"curve": moved, "kin": 0.1}] * 3
        new = {"curve": curve + 4e-16 * (np.arange(21) < 5), "kin": 0.1 * (1 + 1e-15)}
        found = verdicts(tmp_path, {"*": ROUNDING}, old, new, heard)
        assert [found[part][0] for part in ("curve", "kin")] == 2 * ["agrees"], found
        found = verdicts(tmp_path, {"*": ROUNDING}, old, {"curve": curve + 1e-6, "kin": 0.1001}, heard)
        assert [found[part][0] for part in ("curve", "kin")] == 2 * ["differs"]

    def test_a_step_that_is_computed_may_move_by_one(self, tmp_path):
        steps = np.array([10, 200, 3000])
        for by, verdict in ((1, "agrees"), (2, "differs")):
            new = {"steps": steps + np.array([0, by, 0])}
            assert verdicts(tmp_path, {"steps": ROUNDING}, {"steps": steps}, new)["steps"][0] == verdict

    def test_an_error_of_rounding_may_be_another_of_its_size(self, tmp_path):
        old = {"units": np.array([0.0, 0.3, 2.0, 1e8]), "eps": 1e-16, "curve": np.array([0.0, 3e-16, 0.1])}
        declared = {"units": ErrorOfRounding(unit=1), "eps": EXACT, "curve": ErrorOfRounding(unit="eps")}
        sound = {"units": np.array([1.7, 0.0, 3.1, 3e8]), "curve": np.array([2e-16, 0.0, 0.2])}
        found = verdicts(tmp_path, declared, old, old | sound)
        assert [found[part][0] for part in ("units", "curve")] == 2 * ["agrees"]
        for part, at in (("units", 0), ("units", 2), ("curve", 0)):
            wrong = np.array(old[part])
            wrong[at] = 100 * max(wrong[at], 1e-16 if part == "curve" else 1)
            assert verdicts(tmp_path, declared, old, old | {part: wrong})[part][0] == "differs"

    def test_what_a_search_found_is_held_to_its_resolution(self, tmp_path):
        old = {"eta": np.array([0.0128187698, 0.5])}
        for by, verdict in ((1.0026, "agrees"), (1.01, "differs")):
            new = {"eta": old["eta"] * np.array([by, 1])}
            assert verdicts(tmp_path, {"eta": Found(to=0.003)}, old, new)["eta"][0] == verdict

    def test_what_may_be_off_by_a_number_is_held_to_that_number(self, tmp_path):
        declared = {"path/*": Off(by="jump/*"), "jump/*": ROUNDING}
        old = {"path/MAE": np.array([0.5, 0.7]), "jump/MAE": np.array([1e-3, 1e-5])}
        for away, verdict in (((9e-4, 9e-6), "agrees"), ((9e-4, 1.1e-5), "differs"), ((1.1e-3, 0), "differs")):
            new = old | {"path/MAE": old["path/MAE"] + np.array(away)}
            assert verdicts(tmp_path, declared, old, new)["path/MAE"][0] == verdict

    def test_late_steps_of_chaotic_runs_are_compared_by_their_size(self, tmp_path):
        """One run stands still but for rounding, one wanders over two decades."""
        draw = np.random.default_rng(0)

        def numbers(by):
            return {"late": np.stack([3e-7 * draw.uniform(1, 2, 32), by * np.exp(draw.normal(4, 2, 32))])}

        declared = {"late": Chaotic(axis=1)}
        old = numbers(1)
        for by, verdict in ((1, "agrees"), (1e6, "differs"), (np.nan, "differs")):
            assert verdicts(tmp_path, declared, old, numbers(by))["late"][0] == verdict

    def test_what_moved_as_float32_moves_has_its_unit(self, tmp_path):
        """An excess: a float32 loss less a float64 minimum, so it hops by units of the loss, or not at all."""
        curve = np.full(50, 0.123604951)
        heard = [{"a": curve * (1 + 1e-8 * (np.arange(50) == i))} for i in range(4)]
        new = {"a": curve * (1 + 2.4e-7 * (np.arange(50) == 7))}
        assert verdicts(tmp_path, {"a": ROUNDING}, {"a": curve}, new, heard)["a"][0] == "agrees"

    def test_counts_at_a_threshold_are_held_to_all_counts_of_the_experiment(self, tmp_path):
        declared = {"alarms": COUNT, "caught": COUNT}
        old = {"alarms": np.array([178, 0, 252]), "caught": 312}
        for new, verdict in ((177, "agrees"), (170, "differs")):
            assert verdicts(tmp_path, declared, old, old | {"alarms": np.array([new, 0, 252])})["alarms"][0] == verdict
        heard = [old | {"alarms": np.array([178 + by, 0, 252])} for by in (-3, 2, 4, -2)]
        found = verdicts(tmp_path, declared, old, {"alarms": np.array([174, 0, 252]), "caught": 310}, heard)
        assert [found[part][0] for part in declared] == 2 * ["agrees"]
        found = verdicts(tmp_path, declared, old, old | {"alarms": np.array([78, 0, 252])}, heard)
        assert found["alarms"][0] == "differs"

    def test_sound_reruns_with_other_seeds_agree_and_shifted_ones_do_not(self, tmp_path):
        """40 pairs of independent runs of every form: no false alarm; a shift by 10 standard errors is seen."""
        declared = {
            "runs": Runs(axis=0),
            "mean": Mean(error="error"),
            "error": RANDOM,
            "scattered": Mean(deviation="deviation"),
            "deviation": ROUNDING,
            "k": EXACT,
            "count": CountOf("k"),
        }
        draw = np.random.default_rng(0)

        def numbers(shift):
            runs = draw.gamma(2.0, size=(20, 10)) + shift * np.sqrt(2 / 10)
            return {
                "runs": runs,
                "mean": draw.normal(shift * 0.1 * np.sqrt(2), 0.1, 5),
                "error": np.full(5, 0.1),
                "scattered": draw.normal(shift * np.sqrt(2 / 20), 1 / np.sqrt(20)),
                "deviation": 1.0,
                "count": int(draw.binomial(1000, 0.3 + shift * np.sqrt(2 * 0.21 / 1000))),
                "k": 1000,
            }

        kept = ("runs", "mean", "scattered", "count")
        for i in range(40):
            found = verdicts(tmp_path / str(i), declared, numbers(0), numbers(0))
            assert {found[part][0] for part in kept} <= {"agrees", "identical"}, i
            assert found["runs"][1] == verify.OTHER_DRAWS
        shifted = verdicts(tmp_path, declared, numbers(0), numbers(10))
        assert {shifted[part][0] for part in kept} == {"differs"}

    def test_the_same_draws_computed_otherwise_differ_within_the_interval(self, tmp_path):
        runs = np.random.default_rng(0).gamma(2.0, size=(20, 10))
        old, new = {"runs": runs}, {"runs": 1.01 * runs}
        verdict, note = verdicts(tmp_path, {"runs": Runs(axis=0)}, old, new)["runs"]
        assert verdict == "differs"
        assert "the same random numbers, another computation" in note

    def test_single_runs_that_part_are_chaos(self, tmp_path):
        runs = np.random.default_rng(0).gamma(2.0, size=(20, 10))
        parted = runs.copy()
        parted[3] *= 1.5
        verdict, note = verdicts(tmp_path, {"runs": Runs(axis=0)}, {"runs": runs}, {"runs": parted})["runs"]
        assert (verdict, note) == ("agrees", f"1 of 20 {verify.CHAOS}")

    def test_a_tie_that_rounding_decides_is_not_comparable(self, tmp_path):
        declared = {"eta": Chosen(by="tuning", of="etas"), "tuning": ROUNDING, "etas": EXACT}
        old = {"eta": 0.5, "tuning": np.array([3.0, 1.0, 1.0 + 1e-15, 2.0]), "etas": np.array([1.0, 0.5, 0.25, 0.125])}
        for eta, verdict in ((0.25, "not comparable"), (0.125, "differs")):
            assert verdicts(tmp_path, declared, old, old | {"eta": eta})["eta"][0] == verdict

    def test_times_are_compared_as_ratios_of_one_run(self, tmp_path):
        declared = {"a": SECONDS, "b": SECONDS, "c": SECONDS, "runs": Seconds(axis=-1), "r": RATIO}
        old = {"a": 1.0, "b": 2e-3, "c": np.array([1e-6, 2e-6]), "runs": np.array([1.0, 1.1, 9.0]), "r": 3.0}
        draw = np.random.default_rng(0)

        def slower(by, **more):
            scatter = {key: value * by * np.exp(0.1 * draw.normal(size=np.shape(value))) for key, value in old.items()}
            return scatter | {"r": 3.0 * np.exp(0.1 * draw.normal())} | more

        heard = [slower(by) for by in (1.0, 2.0, 1.5)]
        found = verdicts(tmp_path, declared, old, slower(3.0), heard)
        assert {verdict for verdict, _ in found.values()} == {"agrees"}
        found = verdicts(tmp_path, declared, old, slower(3.0, b=3.0 * 2e-3 * 30), heard)
        assert found["b"][0] == "differs"
        assert "×2" in found["b"][1] or "×3" in found["b"][1]
        assert [found[key][0] for key in ("a", "c", "runs", "r")] == 4 * ["agrees"]
        found = verdicts(tmp_path, declared, old, slower(3.0), heard, timed=False)
        assert {verdict for verdict, _ in found.values()} == {"not comparable"}

    def test_what_a_compiler_counts_is_compared_on_one_version_only(self, tmp_path):
        declared = {"count": SAME_JAX}
        old, new = (result(tmp_path / str(i), {"count": i}) for i in range(2))
        assert verify.compare(old, new, declared, None).findings[0].verdict == "differs"
        versions = old.provenance["versions"] | {"jax": "0.0.1"}
        other = old._replace(provenance=old.provenance | {"versions": versions})
        finding = verify.compare(other, new, declared, None).findings[0]
        assert finding.verdict == "not comparable"
        assert "jax 0.0.1 counted it" in finding.note

    def test_a_claim_that_no_longer_holds_differs(self, tmp_path):
        claim = results.Claim("C1", "it is so", "1", "1", True)
        for changed, verdict in (
            (claim, "identical"),
            (claim._replace(measured="1.0"), "agrees"),
            (claim._replace(holds=False), "differs"),
            (claim._replace(text="it is thus"), "not comparable"),
        ):
            old, new = (result(tmp_path / str(i), {"a": 1}, [c]) for i, c in enumerate((claim, changed)))
            assert verify.compare(old, new, {"a": EXACT}, None).findings[-1].verdict == verdict

    def test_claims_are_judged_one_by_one_by_what_they_stand_on(self, tmp_path):
        """One flips because of seconds, one because of a table with a column of seconds, one because of a loss."""
        declared = {"seconds": SECONDS, "table[1]": SECONDS, "table[*]": ROUNDING, "loss": ROUNDING}

        def claims(numbers):
            told = (numbers["seconds"] < 2, numbers["table"][0, 1] < 2, numbers["loss"] < 2)
            return [results.Claim("C1", f"number {i}", "1", "1", bool(holds)) for i, holds in enumerate(told)]

        both = (
            {"seconds": 1.0, "table": np.ones((1, 2)), "loss": 1.0},
            {"seconds": 3.0, "table": np.array([[1.0, 3.0]]), "loss": 3.0},
        )
        old, new = (result(tmp_path / str(i), numbers, claims(numbers)) for i, numbers in enumerate(both))
        found = verify.compare(old, new, declared, None, claims=claims).findings[-3:]
        assert [finding.verdict for finding in found] == ["not comparable", "not comparable", "differs"]
        assert "it stands on seconds" in found[0].note

    def test_what_stays_where_it_is_has_no_course(self, tmp_path, recwarn):
        """No 'nan times as large', and no warning of NumPy's."""
        old, new = ({"curve": np.r_[first, np.linspace(1, 2, 9)]} for first in ([0.0, 0.0], [0.0, 0.0]))
        new["curve"] = new["curve"] * 1.001
        flat = {"curve": np.zeros(9)}
        for a, b in ((old, new), (flat, {"curve": np.full(9, 1e-3)}), ({"curve": np.ones(9)}, {"curve": np.zeros(9)})):
            before, after = (result(tmp_path / str(i), numbers) for i, numbers in enumerate((a, b)))
            found = verify.compare(before, after, {"curve": ROUNDING}, None)
            assert "nan" not in found.hint
            assert "inf" not in found.hint
        assert not recwarn.list

    def test_a_spread_of_other_numbers_is_not_used(self, tmp_path):
        declared = {"a": ROUNDING}
        old = result(tmp_path, {"a": 1.0})
        echoes.write(tmp_path, old, echoes.measure(old, {"one": result(tmp_path / "echo", {"a": 1.1})}, declared))
        assert echoes.read(tmp_path, old).parts["a"]["relative"].squares == pytest.approx(0.01, rel=1e-3)
        assert echoes.read(tmp_path, result(tmp_path, {"a": 2.0})) is None


class TestProof:
    """That tolerances hold where they were not made, and how small a mistake is seen."""

    def test_each_environment_is_judged_by_the_others(self, package, tmp_path, monkeypatch):
        module, old = ran(package, tmp_path / "committed")
        load, heard = data.load, {}
        for seed in range(5):
            monkeypatch.setattr(data, "load", altered.nudged(load, seed))
            heard[f"nudge {seed}"] = ran(package, tmp_path / f"echo{seed}")[1]
        monkeypatch.setattr(data, "load", load)
        found = proof.left_out(old, heard, module)
        assert list(found) == list(heard)
        assert sum(one.count("agrees") for one in found.values()) > 10
        assert [one.count("differs") for one in found.values()] == 5 * [0]
        # One that is no rounding stands out where it is left out; where it is kept it may widen the tolerance.
        heard["eta off by 1 %"] = ran(package, tmp_path / "wrong", PLANTED.replace("B = 0.2", "B = 0.202"))[1]
        assert proof.left_out(old, heard, module)["eta off by 1 %"].count("differs") > 0

    def test_the_power_is_the_smallest_change_that_is_seen(self):
        sees = {"sharp": 1e-5, "dull": 1e-2, "blind": np.inf, "all": 0.0}
        asked = []

        def differs(level, names):
            asked.append((level, tuple(names)))
            return {name: level >= sees[name] for name in names}

        assert proof.power(list(sees), differs) == {"sharp": 1e-5, "dull": 1e-2, "blind": None, "all": 1e-6}
        assert asked[1] == (1e-3, ("sharp", "dull", "all"))
        assert asked[-1] == (1e-6, ("sharp", "all"))

    def test_what_was_proved_is_shown_until_the_results_change(self, package, tmp_path):
        folder = tmp_path / "results"
        ran(package, folder)
        assert proof.tables(folder) == ""
        counts = dict(zip(verify.VERDICTS, (3, 4, 0, 1), strict=True))
        proof.note(folder, "left out", "cpu", {"planted": {"SSE4.2": counts, "nudged": counts}})
        proof.note(folder, "eta", "cpu", {"planted": 1e-4})
        proof.note(folder, "target", "cpu", {"planted": None})
        lines = proof.tables(folder).splitlines()
        assert "| SSE4.2 | 1 | 3 | 4 | 0 | 1 |" in lines
        assert "| planted | 0.0001 | not seen |" in lines
        assert results.saved(folder) == [("planted", "cpu")]
        ran(package, folder, seeds=29)
        assert proof.tables(folder) == ""

    def test_a_change_of_every_step_size_is_one(self, monkeypatch):
        import jax
        import optax

        from jaxgrad import descend, full_batch, losses, models

        batch = data.load("diabetes").batch
        loss = losses.mean_loss(models.linear, losses.squared)

        def last(eta):
            start = models.init_linear(batch.x.shape[1], dtype=batch.x.dtype)
            return descend(
                loss, start, batch, optimizer=eta, sampling=full_batch(), steps=5, key=jax.random.key(0)
            ).loss[-1]

        expected = last(0.1 * 1.01)
        monkeypatch.setattr(optax, "apply_updates", altered.scaled(optax.apply_updates, 1.01))
        jax.clear_caches()
        assert last(0.1) == pytest.approx(float(expected), rel=1e-5)
        jax.clear_caches()

    @pytest.mark.parametrize("name", ["diabetes", "breast_cancer"])
    def test_one_target_is_changed_and_no_more(self, name):
        before = np.asarray(data.load(name).batch.y)
        for by in (1e-2, 1e-4):
            after = np.asarray(altered.one_target_changed(data.load, by)(name).batch.y)
            changed = np.flatnonzero(before != after)
            assert len(changed) == (0 if name == "breast_cancer" and by < 1e-2 else 1)
            if name == "diabetes":
                assert after[changed] / before[changed] == pytest.approx(1 + by, rel=1e-5)

    def test_environments_are_many_and_no_two_alike(self):
        found = environments.ENVIRONMENTS["cpu"]
        assert len({(tuple(one.variables.items()), one.nudge, one.other_python) for one in found.values()}) >= 9
        assert len({one.nudge for one in found.values()} - {None}) >= 4
        varied = {name for one in found.values() for name in one.variables}
        assert {"XLA_FLAGS", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES", "GLIBC_TUNABLES"} < varied

    def test_a_result_names_processor_and_instructions(self, monkeypatch):
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        assert machine.processor()
        assert machine.instructions() in ("unknown", *(name for name, _ in machine.LEVELS))
        monkeypatch.setenv("XLA_FLAGS", "--xla_something=1 --xla_cpu_max_isa=SSE4_2 --xla_more=2")
        assert machine.instructions() == "SSE4.2 by XLA_FLAGS"


class TestDeclarations:
    @pytest.mark.parametrize("name", catalogue())
    def test_every_number_is_declared_and_nothing_else(self, name):
        module = importlib.import_module(f"experiments.{name}")
        used = set()
        for folder in (ROOT / "results", ROOT / "results" / "quick"):
            for saved, device in results.saved(folder):
                if saved == name:
                    numbers = results.read(folder, name, device).numbers
                    found = kinds.parts(name, numbers, module.NUMBERS)
                    used |= {part.pattern for part in found.values()}
                    for part in found.values():
                        for other in vars(part.kind).values():
                            if isinstance(other, str) and other:
                                kinds.look_up(numbers, other)
        assert set(module.NUMBERS) == used

    def test_a_number_without_a_declaration_says_what_to_write(self, package, tmp_path, capsys):
        (package / "planted.py").write_text(PLANTED.replace('"n": EXACT, ', ""))
        assert command.main(["planted", "--quick"]) == 1
        said = capsys.readouterr().err
        assert "planted does not say what kind of number 'n' is; write in experiments/planted.py, below QUICK" in said
        assert not results.saved(tmp_path / "results-quick")
        (package / "planted.py").write_text(re.sub(r"NUMBERS = \{.*?\n\}", "", PLANTED, flags=re.DOTALL))
        forget("planted")
        assert command.main(["planted", "--quick"]) == 1
        assert "NUMBERS = {" in capsys.readouterr().err

    @pytest.mark.parametrize("declared", ["exact", "rounding, found to 1e-3", "", None, Runs, Found])
    def test_what_is_no_kind_is_refused(self, declared):
        with pytest.raises(TypeError, match="which is no kind of number"):
            kinds.parts("made_up", {"a": 1.0}, {"a": declared})

    @pytest.mark.parametrize("names", [{}, {"error": "a", "deviation": "b"}])
    def test_a_mean_has_an_error_or_a_deviation(self, names):
        with pytest.raises(TypeError, match="either error= or deviation="):
            Mean(**names)

    def test_stars_stand_for_what_they_stood_for(self):
        numbers = {"x 1/mean": 0.0, "x 1/error": 1.0, "table": np.zeros((3, 2)), "scatter[0]": 1.0}
        declared = {
            "* */mean": Mean(error="* */error"),
            "*/error": ROUNDING,
            "table[1]": Mean(deviation="table[0]"),
            "table[*]": ROUNDING,
            "scatter[0]": EXACT,
        }
        found = kinds.parts("made_up", numbers, declared)
        assert found["x 1/mean"].kind == Mean(error="x 1/error")
        assert found["table[1]"].kind == Mean(deviation="table[0]")
        assert found["table[0]"].kind == ROUNDING
        assert kinds.look_up(numbers, "table[1]").shape == (3,)


# --- interrupted and concurrent runs -----------------------------------------------------------------------------

COUNTING = '''
"""Experiment number {k} of a study that is killed."""
import dataclasses
import time
import numpy as np
from experiments.engine import plots
from experiments.engine.kinds import EXACT, ROUNDING
from experiments.engine.results import Claim

@dataclasses.dataclass(frozen=True)
class Config:
    n: int = 20_000

QUICK = Config(n=10)
NUMBERS = {{"x": EXACT, "total": ROUNDING}}

def run(config, session):
    time.sleep(0.05)
    x = np.random.default_rng({k}).normal(size=config.n)
    return {{"x": x, "total": x.sum()}}

def claims(numbers):
    return [Claim("C1", "it counts", f"{{numbers['total']:.3f}}", "a number", True)]

def draw(numbers):
    figure, (axis,) = plots.figure()
    axis.plot(numbers["x"][:50])
    return figure
'''


def study_of(folder, count):
    package = folder / "experiments"
    package.mkdir(parents=True)
    for name in ("__init__.py", "__main__.py"):
        shutil.copy(ROOT / "experiments" / name, package)
    for name in ("engine", "support", "recorded"):
        shutil.copytree(ROOT / "experiments" / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
    for k in range(count):
        (package / f"part{k}.py").write_text(COUNTING.format(k=k))
    return [sys.executable, "-m", "experiments"]


def bits(folder):
    """All that a run makes, less what it measures in seconds and what follows from that."""
    found = contents(folder)
    for path, content in found.items():
        if path.suffix == ".json":
            document = json.loads(content)
            del document["times"], document["sha256"]["results"]
            found[path] = json.dumps(document).encode()
        if path.name in ("README.md", "report.html"):
            found[path] = re.sub(rb"took [^<]*? s of compiling", b"", content)
    return found


def kills(tmp_path, times, seed, count=6):
    """Kill a study again and again, each time resuming it after a look at its files; all must come out the same."""
    run = study_of(tmp_path, count)
    start = time.perf_counter()
    subprocess.run([*run, "--out", "whole"], cwd=tmp_path, capture_output=True, check=True)
    whole, expected, draw = time.perf_counter() - start, bits(tmp_path / "whole"), random.Random(seed)
    broken = unequal = killed = 0
    for i in range(times):
        out = tmp_path / f"killed{i}"
        process = subprocess.Popen(
            [*run, "--out", str(out)], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(draw.uniform(0.3, 1.0) * whole)
        if process.poll() is None:
            killed += 1
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for name, device in results.saved(out):
            try:
                results.read(out, name, device)
                broken += bool(results.edited(out, name, device))
            except (ValueError, OSError):
                broken += 1
        for picture in out.glob("*/figure.*"):
            broken += picture.read_bytes() != expected[picture.relative_to(out)]
        again = subprocess.run(
            [*run, "--resume", "--out", str(out)], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert again.returncode == 0, again.stderr
        unequal += bits(out) != expected
        shutil.rmtree(out)
    return killed, broken, unequal


class TestInterrupted:
    def test_a_few_kills(self, tmp_path):
        _, broken, unequal = kills(tmp_path, 2, seed=1, count=3)
        assert (broken, unequal) == (0, 0)

    @pytest.mark.skipif("JAXGRAD_KILLS" not in os.environ, reason="minutes long: JAXGRAD_KILLS=50 runs it")
    def test_fifty_kills(self, tmp_path):
        times = int(os.environ["JAXGRAD_KILLS"])
        killed, broken, unequal = kills(tmp_path, times, seed=int(os.environ.get("JAXGRAD_KILLS_SEED", 0)))
        print(
            f"{killed} of {times} were killed before they ended; {broken} broken files, {unequal} unequal resumptions"
        )
        assert killed > times / 2
        assert (broken, unequal) == (0, 0)


class TestResume:
    def test_only_what_is_missing_or_stale_is_run(self, tmp_path):
        run = study_of(tmp_path, 3)

        def ran_by(*arguments):
            done = subprocess.run([*run, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
            return re.findall(r"^(part\d): .* s, compiling", done.stderr, re.MULTILINE), done.stderr

        assert sorted(ran_by("part0", "part1")[0]) == ["part0", "part1"]
        before = contents(tmp_path / "results")
        file = tmp_path / "experiments" / "part1.py"
        file.write_text(file.read_text() + "\n# otherwise\n")
        (tmp_path / "results" / "part0" / "figure.svg").write_text("of older numbers")
        again, said = ran_by("--resume")
        assert sorted(again) == ["part1", "part2"]
        assert "finished before, by this very code: part0\n" in said
        after = contents(tmp_path / "results")
        kept = [path for path in before if path.parts[0] == "part0"]
        assert [after[path] for path in kept] == [before[path] for path in kept]
        assert ran_by("--resume")[0] == []

    def test_a_second_study_says_so_and_ends(self, tmp_path):
        run = study_of(tmp_path, 1)
        with results.lock(tmp_path / "results"):
            for arguments in ([], ["report"]):
                if arguments:
                    results.write(tmp_path / "results", "part0", "cpu", {}, {}, [], {})
                before = contents(tmp_path / "results")
                done = subprocess.run([*run, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
                assert done.returncode == 2
                last = done.stderr.splitlines()[-1]
                assert re.fullmatch(
                    "error: another study is writing to .*results; wait for it to end, or .* --out", last
                )
                assert contents(tmp_path / "results") == before

    def test_a_lock_dies_with_its_holder(self, tmp_path):
        code = f"""if True:
            import os, signal
            from experiments.engine import results
            with results.lock({str(tmp_path)!r}):
                os.kill(os.getpid(), signal.SIGKILL)
        """
        killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
        assert killed.returncode == -signal.SIGKILL
        with results.lock(tmp_path), pytest.raises(BlockingIOError), results.lock(tmp_path):
            pass
        assert not contents(tmp_path)


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["verify", "--seeds", "3"], "'verify' runs what is committed, as it is: --seeds has no meaning for it"),
            (["verify", "nobody"], "there is no experiment 'nobody'"),
            (["verify"], "there are no results in"),
            (["planted", "verify"], "'verify' comes first"),
            (["planted", "--all"], "--all is for verify"),
            (["spread", "--rerun", "x"], "--rerun, --all and --note are for verify"),
            (["planted", "--python", "python3"], "--python is for spread"),
            (["verify", "--python", "python3"], "--python is for spread"),
            (["spread", "--python", "no-such-python"], "there is no such program"),
            (["spread", "planted"], "run `python -m experiments planted`"),
        ],
    )
    def test_what_cannot_be_done_is_one_clear_line(self, package, capsys, arguments, message):
        (package / "planted.py").write_text(PLANTED)
        assert command.main(arguments) == 2
        out, err = capsys.readouterr()
        assert message in err.splitlines()[-1]
        assert out == ""

    @pytest.mark.parametrize(
        "line",
        [
            "verify losses --quick",
            "verify --quick losses",
            "--quick verify losses",
            "verify --rerun x --quick losses",
            "verify --rerun=x --quick losses",
            "verify --all losses --quick --rerun x",
        ],
    )
    def test_names_may_stand_behind_options(self, line):
        found = arguments.parse(line.split())
        assert (found.names, found.quick) == (("verify", "losses"), True)
        assert found.rerun == (Path("x") if "rerun" in line else None)
        assert found.every == ("--all" in line)

    @pytest.mark.parametrize("name", ["verify", "spread", "power"])
    def test_help_is_a_screen_that_says_what_the_words_mean(self, name, capsys):
        assert command.main([name, "--help"]) == 0
        out, _ = capsys.readouterr()
        assert len(out.splitlines()) < 30
        assert all(len(line) <= 120 for line in out.splitlines())
        assert all(re.search(rf"^  {word} +\w", out, re.MULTILINE) for word in verify.VERDICTS) == (name == "verify")

    def test_verify_runs_again_and_touches_nothing(self, package, tmp_path, capsys):
        ran(package, tmp_path / "results" / "quick")
        before = contents(tmp_path / "results")
        assert command.main(["verify", "--quick", "--all"]) == 0
        out, _ = capsys.readouterr()
        assert out.splitlines()[:3] == [
            "planted  identical       7 identical",
            "",
            "1 identical to the last bit; nothing differs.",
        ]
        assert "identical: sgd" in out
        assert "no spread is recorded" in out
        assert contents(tmp_path / "results") == before

    def test_spread_goes_on_from_the_echoes_that_it_kept(self, package, tmp_path, monkeypatch, capsys):
        ran(package, tmp_path / "results" / "quick")
        nudges = {f"nudge {i}": environments.Environment(nudge=i) for i in (1, 2, 3, 4)}
        monkeypatch.setattr(environments, "ENVIRONMENTS", {"cpu": nudges})
        asked = []

        def run(change, arguments, variables, python):
            asked.append(change.nudge)
            if len(asked) == 4:
                return 1  # as if it was killed in the last one
            with monkeypatch.context() as patched:
                patched.setattr(data, "load", altered.nudged(data.load, change.nudge))
                ran(package, Path(arguments[arguments.index("--out") + 1]))
            return 0

        monkeypatch.setattr(altered, "run", run)
        kept = ["spread", "--quick", "--echoes", str(tmp_path / "kept")]
        assert (command.main(kept), asked) == (1, [1, 2, 3, 4])
        assert (command.main(kept), asked) == (0, [1, 2, 3, 4, 4])
        capsys.readouterr()
        folder = tmp_path / "results" / "quick"
        assert echoes.read(folder, results.read(folder, "planted", "cpu")).echoes == tuple(nudges)
        found = json.loads((folder / "proof.json").read_text())["cpu"]["left out"]["planted"]["found"]
        assert [one["differs"] for one in found.values()] == [0, 0, 0, 0]

    def test_spread_takes_older_code_only_where_it_gives_the_same_bits(self, package, tmp_path, monkeypatch, capsys):
        ran(package, tmp_path / "results" / "quick")
        monkeypatch.setattr(environments, "ENVIRONMENTS", {"cpu": {}})
        for source, status in ((PLANTED + "# a word more", 0), (PLANTED.replace("0.2, 1, 90", "0.201, 1, 90"), 2)):
            (package / "planted.py").write_text(source)
            forget("planted")
            assert command.main(["spread", "--quick"]) == status
            _, err = capsys.readouterr()
            assert "recorded by older code, or elsewhere, so first run as it is: planted" in err
        assert "run `python -m experiments planted --quick --bare --out" in err

    def test_what_was_verified_is_noted_until_the_results_change(self, package, tmp_path, capsys):
        folder = tmp_path / "results"
        ran(package, folder)
        (folder / "again").mkdir()
        ran(package, tmp_path / "again")
        arguments = ["verify", "--rerun", str(tmp_path / "again")]
        assert verified.table(folder).startswith("Nothing has been verified")
        for more in ([], ["--note"], ["--note"]):
            assert command.main([*arguments, *more]) == 0
            assert (folder / "verified.json").is_file() == bool(more)
        *_, row = verified.table(folder).splitlines()
        assert re.fullmatch(r"\| Python [\d.]+, jax [\d.]+, .+, \d+ cores, [^|]+ \| 1 \| 7 \| 0 \| 0 \| 0 \|", row), row
        ran(package, folder, seeds=29)
        assert verified.table(folder).startswith("Nothing has been verified")

    @pytest.mark.parametrize(
        ("trouble", "status"),
        [
            ("np.zeros(3) + np.zeros(4)", 1),  # NumPy's ValueError: the experiment's own
            ("open('/nowhere/at/all')", 1),
            ("raise ValueError('planted needs a regression data set')", 2),
            ("data.load('/nowhere/at/all.csv')", 2),
        ],
    )
    def test_an_error_is_the_persons_only_if_it_is_about_their_data(self, package, capsys, trouble, status):
        changed = PLANTED.replace("seeds: int = 60", 'seeds: int = 60\n    data: str = "diabetes"')
        (package / "planted.py").write_text(changed.replace("x = x[:, [2, 8]]", trouble))
        assert command.main(["planted", "--data", "diabetes"]) == status
        said = capsys.readouterr().err
        assert ("planted failed: " in said) == (status == 1)
        assert ("error: planted: " in said) == (status == 2)

    @pytest.mark.parametrize(
        ("where", "words"),
        [
            ("before", "interrupted before any experiment began"),
            ("within", "interrupted during planted, whose earlier results are untouched"),
            ("writing", "interrupted between two experiments; planted finished"),
        ],
    )
    @pytest.mark.usefixtures("heeds_ctrl_c")
    def test_the_interrupt_names_what_was_cut_off(self, package, tmp_path, monkeypatch, capsys, where, words):
        """Ctrl-C before the first experiment, within one, and while its files are written: then they are finished."""
        source = PLANTED.replace("x = x[:, [2, 8]]", "raise KeyboardInterrupt") if where == "within" else PLANTED
        (package / "planted.py").write_text(source)
        if where == "before":

            def outcomes(*_):
                raise KeyboardInterrupt

            monkeypatch.setattr(workers, "outcomes", outcomes)
        if where == "writing":
            write = results.write
            monkeypatch.setattr(results, "write", lambda *a: (os.kill(os.getpid(), signal.SIGINT), write(*a)))
        assert command.main(["planted", "--quick", "--bare"]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == words
        assert bool(results.saved(tmp_path / "results-quick")) == (where == "writing")
