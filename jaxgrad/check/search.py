"""Which step of the derivation is wrong: the search.

Given gradients of the person at several points and batch sizes, find the simplest explanation whose gradient
equals theirs, to rounding, at all of them. Tried in order of simplicity: one factor on everything, a leaf
transposed or swapped, one faulty step (`faults`), one operand's contribution scaled, something added, a
few entries; then the same for a part of the leaves, with a factor in front, for examples or classes left
out, for the same fault at every similar step, and for two faults at once.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.check import clues, sentences
from jaxgrad.check import faults as catalogue_of
from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.factors import name_factor
from jaxgrad.check.evaluate.problem import Kernel, Problem, program_at, shape_key
from jaxgrad.check.evaluate.resized import is_mean, ratio_at
from jaxgrad.check.faults import Fault, Term
from jaxgrad.check.faults.mistake import At, Mistake
from jaxgrad.check.program.replay import (
    Plan,
    Replay,
    analysis,
    faulty_gradient,
    forward,
    plan,
    pull_product,
    quick_jit,
    varied,
)
from jaxgrad.check.program.source import locate
from jaxgrad.check.program.steps import Program
from jaxgrad.check.report import Finding


class Sample(NamedTuple):
    """One point of the search: everything along K directions, sorted by leaf."""

    evaluation: Evaluation
    program: Program
    todo: Plan
    replay: Replay
    faults: tuple[Fault, ...]
    directions: tuple[np.ndarray, ...]
    owner: np.ndarray
    """Which leaf each direction moves."""
    true: np.ndarray
    hand: np.ndarray
    changes: np.ndarray
    shares: np.ndarray
    at: At


class Case(NamedTuple):
    """All samples of one gradient to explain."""

    problem: Problem
    samples: tuple[Sample, ...]
    faults: tuple[Fault, ...]
    terms: tuple[Term, ...]
    noise: float
    dims: Mapping[str, int]
    wrong: tuple[int, ...]
    """The leaves that are wrong somewhere."""
    dead: tuple[bool, ...]
    memory: dict[Any, Any]
    """What was computed for this case, to be computed once."""


class Explanation(NamedTuple):
    """Findings that together give the person's numbers on `leaves`."""

    cost: float
    leaves: tuple[int, ...]
    findings: tuple[Finding, ...]


def explain(
    problem: Problem,
    store: Kernel,
    evaluations: Sequence[Evaluation],
    wrong: Sequence[int],
    noise: float = 0.0,
    dead: Sequence[bool] = (),
    origin: int | None = None,
) -> tuple[Finding, ...]:
    """The best explanation of a wrong gradient, or one `unknown` finding for each leaf left over.

    `origin`: the value of the loss whose adjoint is the first in the person's code that has a wrong factor."""
    case = _case(problem, store, evaluations, wrong, noise, dead)
    for s in case.samples[:1]:
        s.at.origin = origin
    case.memory["store"] = store
    found = _search(case, tuple(case.wrong))
    if found is not None:
        return found.findings
    return _leaf_by_leaf(case)


def sample(problem: Problem, store: Kernel, evaluation: Evaluation, rng: np.random.Generator) -> Sample:
    """Run the analysis at one point."""
    point = evaluation.point
    key = ("analysis", shape_key(point.leaves, point.data))
    if key not in store.compiled:
        program = program_at(store, point.leaves, point.data)
        todo = plan(program, point.n)
        faults = catalogue_of.catalogue(program, todo)
        store.compiled[key] = (program, todo, analysis(program, todo), faults)
    program, todo, run, faults = store.compiled[key]
    directions, owner = _directions(point.leaves, program, rng)
    replay = run(list(point.leaves), list(point.data), list(directions))
    changes = catalogue_of.changes(program, todo, faults, replay)
    shares = catalogue_of.shares(program, replay)
    true, mine = _along(directions, evaluation.true), _along(directions, evaluation.hand)
    at = At(program, todo, replay, point.leaves, point.data)
    return Sample(evaluation, program, todo, replay, faults, directions, owner, true, mine, changes, shares, at)


MOST_REPLAYS = 100
"""How many groups of similar steps are tried by a reverse pass of their own."""
MOST_TANGENTS = 3e6
"""How many numbers the tangents of all values may take at one point; of eight bytes each, at some eight points."""


def _along(directions: Sequence[Any], gradient: Sequence[Any]) -> np.ndarray:
    """A gradient along all directions."""
    count = len(directions[0])
    parts = [d.reshape(count, -1) @ np.reshape(g, -1) for d, g in zip(directions, gradient, strict=True)]
    return np.sum(parts, axis=0)


def _directions(
    leaves: Sequence[Any], program: Program, rng: np.random.Generator
) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
    """Every coordinate if there are few, else random directions, each within one leaf."""
    sizes = [int(np.prod(program.avals[s].shape)) for s in program.moving]
    # Every direction is carried through every value: together they take at most so many numbers at a point.
    room = max(1, int(min(2e7 // max([*sizes, 1]), MOST_TANGENTS // max(sum(sizes), 1)) // max(1, len(leaves))))
    most = min(room, 400 // max(1, len(leaves)) + 40)
    blocks, owner = [], []
    for i, leaf in enumerate(leaves):
        if leaf.size <= most:
            block = np.eye(leaf.size)
        else:
            count = min(room, 24)
            block = rng.standard_normal((count, leaf.size)) / np.sqrt(leaf.size)
        blocks.append(block.reshape(-1, *leaf.shape))
        owner += [i] * len(block)
    total, at, out = len(owner), 0, []
    for leaf, block in zip(leaves, blocks, strict=True):
        full = np.zeros((total, *leaf.shape))
        full[at : at + len(block)] = block
        at += len(block)
        out.append(full)
    return tuple(out), np.array(owner)


def _case(
    problem: Problem,
    store: Kernel,
    evaluations: Sequence[Evaluation],
    wrong: Sequence[int],
    noise: float,
    dead: Sequence[bool],
) -> Case:
    rng = np.random.default_rng(11)
    samples = [sample(problem, store, e, rng) for e in evaluations]
    first = samples[0]
    faults = first.faults
    terms = catalogue_of.terms(first.program)
    # A loss with a Python loop over examples has other steps at another batch size: keep those that match.
    names = [step.name for step in first.program.steps]
    same = [s for s in samples if [step.name for step in s.program.steps] == names]
    same = [s for s in same if len(s.changes) == len(faults) and len(s.shares) == len(terms)]
    return Case(
        problem,
        tuple(same),
        faults,
        terms,
        noise,
        _dims(problem),
        tuple(wrong),
        tuple(dead) or (False,) * len(problem.leaves),
        {},
    )


def _dims(problem: Problem) -> dict[str, int]:
    """Names for the sizes of the problem: d features, k outputs, h hidden units. Whole numbers index something, and
    have no features; without data there are neither features nor outputs."""
    dims: dict[str, int] = {}
    wide = [
        [s for i, s in enumerate(a.shape) if i != (0 if axis is None else axis)]
        for a, axis in zip(problem.data, problem.axes, strict=True)
        if a.ndim > 1 and a.dtype.kind not in "iub"
    ]
    if not problem.data:
        return dims
    if wide:
        dims["d"] = wide[0][-1]
    if len(wide) > 1:
        dims["k"] = wide[1][-1]
    shapes = [leaf.shape for leaf in problem.leaves if leaf.ndim > 0]
    if "k" not in dims and shapes and len(shapes[-1]) > 0 and shapes[-1][-1] not in dims.values():
        dims["k"] = shapes[-1][-1]
    rest = sorted({d for shape in shapes for d in shape} - set(dims.values()))
    for name, size in zip("hmpqr", rest, strict=False):
        dims[name] = size
    return dims


# ---------------------------------------------------------------------------------------------- matching


def _by_leaf(s: Sample, numbers: np.ndarray) -> np.ndarray:
    """Norms over the directions of each leaf: [..., direction] -> [..., leaf]."""
    starts = np.searchsorted(s.owner, np.arange(len(s.evaluation.true)))
    with np.errstate(all="ignore"):
        return np.sqrt(np.add.reduceat(np.square(numbers), starts, axis=-1))


def _limits(case: Case, s: Sample) -> np.ndarray:
    """How far an explanation may be from the person's numbers, by leaf: a millionth of the error, or rounding."""
    size = np.maximum(_by_leaf(s, s.hand), _by_leaf(s, s.true))
    part = 1e-6 if case.noise < 1e-11 else min(3e-2, 1e-6 + 1e4 * case.noise)
    floor = max(1e-11, 100 * case.noise)
    return part * _by_leaf(s, s.hand - s.true) + floor * size + 1e-13 * float(np.linalg.norm(s.true))


def _allowed(case: Case, s: Sample, leaf: int) -> float:
    return float(_limits(case, s)[leaf])


def _misfit(case: Case, s: Sample, guess: np.ndarray) -> np.ndarray:
    """[fault, leaf]: distance of guesses [fault, direction] from the person's gradient, 1 = as allowed."""
    limit = _limits(case, s)
    with np.errstate(all="ignore"):
        gap = _by_leaf(s, guess - s.hand)
        return np.where(np.isfinite(gap), np.where(limit > 0, gap / limit, np.where(gap == 0, 0.0, np.inf)), np.inf)


def _worst_misfit(case: Case, guesses: Callable[[Sample], np.ndarray]) -> np.ndarray:
    return np.max([_misfit(case, s, guesses(s)) for s in case.samples], axis=0)


def _fit(case: Case, leaves: Sequence[int], guesses: Callable[[Sample], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """For each guess the factor c [guess, sample] that fits best on `leaves`, and the misfit of c × guess."""
    cs, misfits = [], []
    for s in case.samples:
        guess = guesses(s)
        top, bottom = np.zeros(len(guess)), np.zeros(len(guess))
        for leaf in leaves:
            mask = s.owner == leaf
            weight = 1.0 / max(float(np.sum(s.hand[mask] ** 2)), 1e-300)
            with np.errstate(all="ignore"):
                top += weight * (guess[:, mask] @ s.hand[mask])
                bottom += weight * np.sum(guess[:, mask] ** 2, axis=1)
        with np.errstate(all="ignore"):
            c = np.where(bottom > 0, top / bottom, 0.0)
        cs.append(c)
        misfits.append(_misfit(case, s, c[:, None] * guess)[:, list(leaves)].max(axis=1))
    return np.stack(cs, axis=1), np.max(misfits, axis=0)


def _named(case: Case, c: np.ndarray, tol: float | None = None) -> str | None:
    """The exact form of a factor, one value per sample."""
    pairs = [(s.evaluation.point.n, float(v)) for s, v in zip(case.samples, c, strict=True)]
    tol = tol if tol is not None else max(1e-7, 1e3 * case.noise)
    return name_factor(pairs, case.dims, tol)


def _number_or_dimension(case: Case, leaves: Sequence[int], c: np.ndarray, factor: str | None) -> str | None:
    """The factor's exact form where it may be a dimension or a number equal to one: the dimension is changed."""
    values = {abs(float(x)) for x in c}
    if factor is None or max(values) == 0 or max(values) - min(values) > 1e-7 * max(values):
        return factor
    value = max(values)
    number = _named(case._replace(dims={}), c)
    store = case.memory.get("store")
    for name, length in case.dims.items():
        powers = [p for p in (1.0, -1.0, 0.5, -0.5) for k in (0.5, 1.0, 2.0) if abs(k * length**p / value - 1) < 1e-7]
        spelt = re.search(rf"\b{name}\b", factor) is not None
        if not powers or store is None or (not spelt and length == 2 and factor in ("2", "1/2", "-2", "-1/2")):
            continue
        found = ratio_at(case.problem, store, leaves, length)
        if found is None:
            continue
        again, other = found
        if abs(abs(again) / value - 1) < 1e-6:
            return number
        if not spelt and any(abs(abs(again) / value / (other / length) ** p - 1) < 1e-6 for p in powers):
            return _named(case._replace(dims={name: length}), c)
    return factor


def _exact(factor: str | None) -> bool:
    """Whether a factor is a form, not merely a decimal."""
    return factor is not None and "." not in factor and "e" not in factor.replace("e+", "")


# ------------------------------------------------------------------------------------------------ search


def _search(case: Case, leaves: tuple[int, ...], pairs: bool = True) -> Explanation | None:
    """The cheapest explanation of the person's numbers on `leaves`."""
    everything = leaves == case.wrong
    best: list[Explanation] = []
    for attempt in (_kept_part, _scaled_all, _moved_leaves):
        if everything or attempt is not _moved_leaves:
            best += attempt(case, leaves)
    if best:
        return min(best, key=lambda e: e.cost)
    for attempt in (_one_fault, _one_term, _added, _same_factor, _of_leaf, _in_some_entries, _entries):
        best += attempt(case, leaves)
    # An explanation that needs no restriction to some leaves is better than one that does.
    if not best or min(e.cost for e in best) >= 18:
        best += _rarer(case, leaves)
    if best:
        return min(best, key=lambda e: e.cost)
    for attempt in (_fault_and_factor, _each_leaf, _term_and_factor):
        best += attempt(case, leaves)
    if best:
        return min(best, key=lambda e: e.cost)
    for attempt in (_slices, _repeated, _similar_faults):
        best += attempt(case, leaves)
        if best and min(e.cost for e in best) < 30:
            return min(best, key=lambda e: e.cost)
    if pairs and everything:
        split = _split(case)
        if split is not None:
            return min([split, *best], key=lambda e: e.cost)
    if pairs:
        best += _two_faults(case, leaves)
    return min(best, key=lambda e: e.cost) if best else None


def _of_one_leaf(case: Case, leaf: int) -> Explanation | None:
    """The cheapest explanation of one leaf, looked for once."""
    key = ("search", leaf)
    if key not in case.memory:
        case.memory[key] = _search(case, (leaf,), pairs=False)
    return case.memory[key]


def _leaf_by_leaf(case: Case) -> tuple[Finding, ...]:
    findings: list[Finding] = []
    for leaf in case.wrong:
        found = _of_one_leaf(case, leaf)
        if found is not None:
            findings += [f for f in found.findings if f not in findings]
        else:
            findings.append(clues.unknown(case, (leaf,), sample))
    if all(f.kind == "unknown" for f in findings):
        return (clues.unknown(case, case.wrong, sample),)
    return tuple(findings)


def _split(case: Case) -> Explanation | None:
    """Different mistakes in different leaves, each explained on its own."""
    if len(case.wrong) < 2:
        return None
    found: dict[int, Explanation] = {}
    for leaf in case.wrong:
        one = _of_one_leaf(case, leaf)
        if one is None:
            return None
        found[leaf] = one
    findings: list[Finding] = []
    scaled: dict[tuple[str, str | None], list[int]] = {}
    for leaf, one in found.items():
        for f in one.findings:
            if f.kind in ("scale", "sign") and len(one.findings) == 1:
                scaled.setdefault((f.kind, f.factor), []).append(leaf)
            elif not any(f[:3] == g[:3] and f.where == g.where for g in findings):
                findings.append(f)
    # A factor that all leaves without a mistake of their own share is an overall one.
    sole = scaled and len(scaled) == 1
    for leaves in scaled.values():
        if sole and len(leaves) > 1 and len(leaves) + len(findings) >= len(case.problem.leaves):
            whole = _scaled_all(case, tuple(leaves))
            if whole:
                findings.append(whole[0].findings[0]._replace(leaf=None))
                continue
        for leaf in leaves:
            findings += list(found[leaf].findings)
    return Explanation(50.0 + sum(f.cost for f in found.values()), tuple(case.wrong), tuple(findings))


def _kept_part(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """Of a parameter that is used three times or more, in every time step say, one contribution only is kept."""
    program = case.samples[0].program
    findings = []
    for leaf in leaves:
        uses = [m for m, term in enumerate(case.terms) if _feeds(program, term, leaf)]
        kept = [
            m
            for m in uses
            if all(
                np.any(s.shares[m][s.owner == leaf]) and _misfit(case, s, s.shares[m][None, :])[0, leaf] <= 1
                for s in case.samples
            )
        ]
        if len(uses) < 3 or not kept:
            return []
        first, last = uses[0] in kept, uses[-1] in kept
        m = uses[-1] if last else kept[0]
        which = "last" if last else "first" if first else f"number {uses.index(m) + 1}"
        findings.append(sentences.kept(case.problem, case.samples[0], case.terms[m], leaf, which, len(uses)))
    # Where all contributions are the same this is also a factor, and says less as one.
    return [Explanation(-0.5, leaves, tuple(findings))]


def _feeds(program: Program, term: Term, leaf: int) -> bool:
    """Whether a step takes a leaf as it is."""
    return program.steps[term.step].inputs[term.operand] == program.leaves[leaf]


def _scaled_all(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """One factor on all of these leaves."""
    c, misfit = _fit(case, leaves, lambda s: s.true[None, :])
    if misfit[0] > 1:
        return []
    factor = _number_or_dimension(case, leaves, c[0], _named(case, c[0]))
    if factor is None:
        return []
    whole = len(leaves) == len(case.problem.leaves) or all(
        case.dead[i] for i in range(len(case.problem.leaves)) if i not in leaves
    )
    s = case.samples[0]
    if "n" in factor and "store" in case.memory:
        s.at.mean = is_mean(case.problem, case.memory["store"])
    if factor == "0":
        if not whole and len(leaves) > 1:
            return []
        leaf = leaves[0] if len(leaves) == 1 else None
        return [Explanation(12.0, leaves, (sentences.zero(case.problem, s, leaf, leaves),))]
    if whole:
        return [Explanation(0.0, leaves, (sentences.scale(case.problem, s, factor, None, leaves),))]
    if len(leaves) == 1:
        return [Explanation(1.0, leaves, (sentences.scale(case.problem, s, factor, leaves[0], leaves),))]
    return []


def _each_leaf(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """Every wrong leaf by a factor of its own."""
    if len(leaves) == 1:
        return []
    found: list[Finding] = []
    cost = 0.0
    for leaf in leaves:
        c, misfit = _fit(case, (leaf,), lambda s: s.true[None, :])
        factor = _number_or_dimension(case, (leaf,), c[0], _named(case, c[0])) if misfit[0] <= 1 else None
        if factor is None or not (_exact(factor) or factor == "0"):
            return []
        s = case.samples[0]
        if factor == "0":
            found.append(sentences.zero(case.problem, s, leaf, (leaf,)))
        else:
            found.append(sentences.scale(case.problem, s, factor, leaf, (leaf,)))
        # A number written where n belongs is one mistake.
        cost += 2.0 + (0.0 if _for_n(factor) else _complexity(factor))
    return [Explanation(26.0 + cost, leaves, tuple(found))]


def _for_n(factor: str) -> bool:
    """Whether a factor is n over a number, as where that number stands in the place of n."""
    return re.fullmatch(r"-?(n/\d{2,}|\d{2,}/n)", factor) is not None


def _complexity(factor: str | None) -> float:
    """How many mistakes a factor stands for, roughly."""
    if factor is None:
        return 9.0
    if factor in ("0", "-1", "2", "1/2", "n", "1/n"):
        return 0.0
    return 2.0 + (0.0 if _exact(factor) else 4.0)


def _equal(case: Case, a: Any, b: Any, e: Evaluation) -> bool:
    total = float(np.sqrt(sum(float(np.sum(g**2)) for g in e.true)))
    limit = (1e-9 + 1e3 * case.noise) * float(np.linalg.norm(b)) + 1e-12 * total
    return np.shape(a) == np.shape(b) and float(np.linalg.norm(a - b)) <= limit


def _moved_leaves(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """Transposed or flipped leaves, leaves swapped with each other."""
    evaluations = [s.evaluation for s in case.samples]

    equal = lambda a, b, e: _equal(case, a, b, e)
    moves: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
        ("transposed", lambda g: np.swapaxes(g, -1, -2)),
        ("column order", lambda g: g.reshape(g.shape, order="C").reshape(-1).reshape(g.shape, order="F")),
        ("row order", lambda g: g.reshape(-1, order="F").reshape(g.shape)),
        ("upside down", lambda g: np.flip(g, 0)),
        ("mirrored", lambda g: np.flip(g, -1)),
    ]
    out: list[Explanation] = []
    per_leaf: list[Finding] = []
    for leaf in leaves:
        for name, move in moves:
            if evaluations[0].true[leaf].ndim < (1 if name == "upside down" else 2):
                continue
            if all(equal(e.hand[leaf], move(e.true[leaf]), e) for e in evaluations):
                per_leaf.append(sentences.moved(case.problem, case.samples[0], leaf, name))
                break
    if len(per_leaf) == len(leaves):
        out.append(Explanation(2.0, leaves, tuple(per_leaf)))
    if 2 <= len(leaves) <= 6:
        for order in itertools.permutations(leaves):
            if any(a == b for a, b in zip(order, leaves, strict=True)):
                continue
            if all(
                all(equal(e.hand[a], e.true[b], e) for a, b in zip(leaves, order, strict=True)) for e in evaluations
            ):
                out.append(Explanation(2.5, leaves, (sentences.swapped(case.problem, case.samples[0], leaves, order),)))
                break
    if len(leaves) == 1:
        for other in range(len(case.problem.leaves)):
            if other != leaves[0] and all(equal(e.hand[leaves[0]], e.true[other], e) for e in evaluations):
                out.append(
                    Explanation(3.0, leaves, (sentences.swapped(case.problem, case.samples[0], leaves, (other,)),))
                )
    return out


def _same_factor(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """One factor on several leaves, each used at a place of its own."""
    if not 1 < len(leaves) < len(case.problem.leaves):
        return []
    c, misfit = _fit(case, leaves, lambda s: s.true[None, :])
    factor = _number_or_dimension(case, leaves, c[0], _named(case, c[0])) if misfit[0] <= 1 else None
    if factor is None or factor == "0" or not _exact(factor):
        return []
    return [Explanation(13.2, leaves, (sentences.same_factor(case.problem, case.samples[0], factor, leaves),))]


_OF_LEAF: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "theta": (
        lambda p: p,
        "extra-derivative",
        "times {0} itself: that is the derivative by log({0}), or one power of {0} too many",
    ),
    "1/theta": (lambda p: 1 / p, "missing-factor", "over {0}: the factor {0} of the chain rule is missing"),
    "exp": (np.exp, "extra-derivative", "times exp({0}): a derivative of exp too many"),
    "exp(-)": (lambda p: np.exp(-p), "missing-derivative", "over exp({0}): the derivative exp({0}) is missing"),
    "square": (lambda p: p**2, "extra-derivative", "times {0}^2"),
    "1/square": (lambda p: 1 / p**2, "missing-factor", "over {0}^2: that factor of the chain rule is missing"),
    "softplus": (
        lambda p: 1 + np.exp(-p),
        "missing-derivative",
        "over sigmoid({0}): the derivative of softplus({0}) is missing",
    ),
    "sigmoid": (
        lambda p: (1 + np.exp(-p)) ** 2 / np.exp(-p),
        "missing-derivative",
        "over sigmoid({0}) (1 - sigmoid({0})): the derivative of sigmoid({0}) is missing",
    ),
}
"""What a leaf's gradient may be multiplied with, entry by entry: the kind, and the words."""


def _of_leaf(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """The gradient of a leaf, entry by entry, times a function of the leaf: the derivative by log(θ), say."""
    evaluations = [s.evaluation for s in case.samples]
    if any(e.point.leaves[i].size == 0 for e in evaluations for i in leaves):
        return []
    for function, kind, how in _OF_LEAF.values():
        with np.errstate(all="ignore"):
            fits = all(
                _equal(case, e.hand[i], e.true[i] * function(e.point.leaves[i]), e) for e in evaluations for i in leaves
            )
        if fits:
            found = [sentences.of_leaf(case.problem, case.samples[0], i, kind, how) for i in leaves]
            return [Explanation(13.0, leaves, tuple(found))]
    return []


def _in_some_entries(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """A contribution left out, negated or scaled in some entries of one leaf only: a penalty on the bias, say."""
    if len(leaves) != 1:
        return []
    leaf = leaves[0]
    s = case.samples[0]
    size = case.problem.leaves[leaf].size
    # A larger batch may leave room for fewer directions than there are entries.
    if size < 2 or any(int(np.sum(t.owner == leaf)) != size for t in case.samples):
        return []
    hits = []
    gaps = [(t.hand - t.true)[t.owner == leaf] for t in case.samples]
    limits = [
        max(1e-7 * float(np.max(np.abs(g))), 10 * _allowed(case, t, leaf))
        for g, t in zip(gaps, case.samples, strict=True)
    ]
    wrong = np.any([np.abs(g) > limit for g, limit in zip(gaps, limits, strict=True)], axis=0)
    if wrong.all():
        return []
    for m in range(len(case.terms)):
        alphas, rest = [], 0.0
        for t, gap in zip(case.samples, gaps, strict=True):
            share, true = t.shares[m][t.owner == leaf], t.true[t.owner == leaf]
            size = float(share[wrong] @ share[wrong])
            if not size > 0 or np.allclose(share[wrong], true[wrong], rtol=1e-9, atol=0):
                break  # nothing there, or all there is: then these entries are wrong, and no contribution
            alpha = float(gap[wrong] @ share[wrong]) / size
            if np.max(np.abs(gap[wrong] - alpha * share[wrong])) > 1e-6 * np.max(np.abs(gap)):
                break
            alphas.append(alpha)
            rest = max(rest, float(np.max(np.abs(share[~wrong]))))
        if len(alphas) < len(case.samples) or rest == 0:
            continue
        alpha = np.array(alphas)
        factor = "0" if np.all(np.abs(1 + alpha) <= 1e-5) else _named(case, 1 + alpha, 1e-5)
        if _exact(factor):
            assert factor is not None
            hits.append((_term_cost(case, m, factor, True), m, factor))
    where = np.argwhere(wrong.reshape(case.problem.leaves[leaf].shape))
    if hits:
        cost, m, factor = min(hits)
        found = sentences.term(case.problem, s, case.terms[m], factor, leaves, restricted=True)
        spots = sentences.spots(case.problem, leaf, where)
        sentence = found.sentence.rstrip(".") + f", and that in {spots} only: everything else is right."
        return [Explanation(13.4 + 0.1 * cost, leaves, (found._replace(sentence=sentence),))]
    return _added_in_entries(case, leaf, wrong.reshape(case.problem.leaves[leaf].shape), where)


def _added_in_entries(case: Case, leaf: int, wrong: np.ndarray, where: np.ndarray) -> list[Explanation]:
    """A multiple of the parameters added in some entries only: a penalty that the loss leaves out there."""
    cs = []
    for s in case.samples:
        e = s.evaluation
        gap, values = (e.hand[leaf] - e.true[leaf])[wrong], e.point.leaves[leaf][wrong]
        size = float(values @ values)
        if size == 0:
            return []
        c = float(gap @ values) / size
        if np.max(np.abs(gap - c * values)) > 1e-6 * np.max(np.abs(gap)):
            return []
        cs.append(c)
    factor = _named(case._replace(dims={}), np.array(cs), 1e-5)
    if factor is None or factor == "0":
        return []
    found = sentences.added(case.problem, case.samples[0], {leaf: factor}, "params")[0]
    spots = sentences.spots(case.problem, leaf, where)
    sentence = (
        f"Your gradient of {case.problem.paths[leaf]} has {factor} times {case.problem.paths[leaf]} added in {spots}"
    )
    penalty = _penalty(case, leaf, cs)
    if penalty is None:
        sentence += ", which is not in this loss."
        return [Explanation(13.6, (leaf,), (found._replace(sentence=sentence),))]
    place = locate(case.samples[0].program, [case.terms[penalty].step])
    inside = f", {place.whole}," if place.where else ""
    sentence += f": the penalty of this loss{inside} does not reach there."
    found = found._replace(sentence=sentence, where=place.where, expression=place.expression)
    return [Explanation(13.6, (leaf,), (found,))]


def _penalty(case: Case, leaf: int, sizes: Sequence[float]) -> int | None:
    """The contribution that is this multiple of the leaf, at each point, in some of its entries and not in all."""
    for m in range(len(case.terms)):
        for s, c in zip(case.samples, sizes, strict=True):
            part = s.shares[m][s.owner == leaf]
            theta = s.evaluation.point.leaves[leaf].reshape(-1)
            on = np.abs(part) > 1e-12
            if part.size != theta.size or not on.any() or on.all():
                break
            if np.max(np.abs(part[on] - c * theta[on])) > 1e-6 * np.max(np.abs(part)):
                break
        else:
            return m
    return None


def _cost(case: Case, m: int) -> float:
    s = case.samples[0]
    return case.faults[m].cost + catalogue_of.implausibility(case.faults[m], s.program, s.todo, s.replay)


def _ranked(case: Case, hits: Sequence[int]) -> tuple[float, int, list[int]]:
    """The most plausible fault with its cost, and the others."""
    order = sorted((_cost(case, int(m)), int(m)) for m in hits)
    return order[0][0], order[0][1], [m for _, m in order[1:]]


def _others(case: Case, best: Fault, rest: Sequence[int]) -> tuple[str, ...]:
    """Equivalent faults in words, one for each kind and line."""
    s = case.samples[0]
    mine = sentences.place_of(s, best).where
    seen = {mine}
    out: list[str] = []
    for m in rest:
        fault = case.faults[m]
        if fault.cost > best.cost + 3:
            continue
        key = sentences.place_of(s, fault).where
        if key not in seen:
            seen.add(key)
            out.append(sentences.short(s, fault))
    return tuple(out[:3])


def _one_fault(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """One faulty step that gives all leaves, or at least those that are wrong."""
    misfit = _worst_misfit(case, lambda s: s.true[None, :] + s.changes)
    moves = np.max([np.linalg.norm(s.changes, axis=1) for s in case.samples], axis=0)
    on_all = np.nonzero((misfit[:, _untouched(case, leaves)].max(axis=1) <= 1) & (moves > 0))[0]
    if len(on_all):
        cost, best, rest = _ranked(case, [int(m) for m in on_all])
        found = sentences.fault(case.problem, case.samples[0], case.faults[best], leaves, restricted=False)
        found = found._replace(equivalents=_others(case, case.faults[best], rest))
        return [Explanation(10 + cost, leaves, (found,))]
    on_wrong = np.nonzero((misfit[:, list(leaves)].max(axis=1) <= 1) & (moves > 0))[0]
    if len(on_wrong):
        cost, best, rest = _ranked(case, [int(m) for m in on_wrong])
        found = sentences.fault(case.problem, case.samples[0], case.faults[best], leaves, restricted=True)
        found = found._replace(equivalents=_others(case, case.faults[best], rest))
        return [Explanation(20 + 0.1 * cost, leaves, (found,))]
    return []


def _rarer(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """One of the mistakes that are classes of their own, alone or with a factor in front of everything.

    Each is computed at the first point, and at the others only if it fits there.
    """
    s = case.samples[0]
    everything = leaves == case.wrong
    out: list[Explanation] = []
    if "rarer" not in case.memory:
        case.memory["rarer"] = catalogue_of.rarer(s.at)
    for m in case.memory["rarer"]:
        if out and m.cost > min(e.cost for e in out) - 11:
            break
        first = _row(case, m, s)
        if first is None or not np.any(first) or not _near(case, s, first, m.free, leaves):
            continue
        rows = [first, *(_row(case, m, t) for t in case.samples[1:])]
        if any(row is None for row in rows):
            continue
        for fit in (_as_it_is, _with_factor):
            found = fit(case, m, rows, leaves)
            if found is None:
                continue
            inner, outer, clean = found
            restricted = not clean
            findings = [sentences.mistake(case.problem, s, m, inner, leaves, restricted)]
            cost = 11 + m.cost + (8 if restricted else 0)
            if outer is not None:
                whole = everything and len(leaves) == len(case.problem.leaves)
                leaf = None if whole or len(leaves) > 1 else next(iter(leaves))
                findings.append(sentences.scale(case.problem, s, outer, leaf, leaves))
                cost += 12 + _complexity(outer)
            out.append(Explanation(cost, leaves, tuple(findings)))
            break
    return out


def _row(case: Case, m: Mistake, s: Sample) -> np.ndarray | None:
    """What a mistake adds to the gradient along the directions of a sample."""
    key = (m, id(s))
    if key not in case.memory:
        with np.errstate(all="ignore"):
            change = m.change(s.at)
            row = None
            if change is not None:
                row = np.sum(
                    [
                        catalogue_of.project(s.replay, slot, np.broadcast_to(d, s.at.shape(slot)))
                        for slot, d in change.items()
                    ],
                    axis=0,
                )
                row = row if np.all(np.isfinite(row)) else None
        case.memory[key] = row
    return case.memory[key]


def _near(case: Case, s: Sample, row: np.ndarray, free: bool, leaves: Sequence[int]) -> bool:
    """Whether the person's numbers on `leaves` lie in the span of the truth and the change, at one point."""
    mask = np.isin(s.owner, leaves)
    scale = np.ones(len(s.owner))
    for leaf in leaves:
        scale[s.owner == leaf] = max(float(np.linalg.norm(s.hand[s.owner == leaf])), 1e-300)
    basis = np.stack([s.true, row] if free else [s.true + row], axis=1)[mask] / scale[mask, None]
    target = s.hand[mask] / scale[mask]
    x, *_ = np.linalg.lstsq(basis, target, rcond=None)
    allowed = 1e-5 + 1e4 * case.noise
    return bool(np.linalg.norm(basis @ x - target) <= allowed * np.linalg.norm(target))


def _as_it_is(
    case: Case, m: Mistake, rows: Sequence[Any], leaves: Sequence[int]
) -> tuple[str | None, str | None, bool] | None:
    """The mistake alone: (the unknown number in it, None, whether all leaves come out)."""
    coefficients = [1.0] * len(rows)
    if m.free:
        fitted = []
        for s, row in zip(case.samples, rows, strict=True):
            mask = np.isin(s.owner, leaves)
            size = float(row[mask] @ row[mask])
            fitted.append(float((s.hand - s.true)[mask] @ row[mask]) / size if size > 0 else float("nan"))
        known = np.array([c for c in fitted if not np.isnan(c)])
        if len(known) == 0:
            return None
        coefficients = [float(known.mean()) if np.isnan(c) else c for c in fitted]
    misfit = np.max(
        [
            _misfit(case, s, (s.true + c * row)[None, :])[0]
            for s, row, c in zip(case.samples, rows, coefficients, strict=True)
        ],
        axis=0,
    )
    if misfit[list(leaves)].max() > 1:
        return None
    factor = None
    if m.free:
        shown = np.array(coefficients) + (1.0 if _relative(m) else 0.0)
        factor = name_factor([(None, float(c)) for c in shown], {}, 1e-5 if case.noise < 1e-11 else 3e-2)
        if factor is None:
            return None
    return factor, None, bool(misfit[_untouched(case, leaves)].max() <= 1)


def _untouched(case: Case, leaves: Sequence[int]) -> list[int]:
    """These leaves, and those that are right: a mistake in the former must leave the latter as they are."""
    return [i for i in range(len(case.problem.leaves)) if i in leaves or i not in case.wrong]


def _relative(m: Mistake) -> bool:
    """Whether the unknown number is a part of what is there, so that 1 + c is the factor."""
    return m.kind == "wrong-derivative"


def _with_factor(
    case: Case, m: Mistake, rows: Sequence[Any], leaves: Sequence[int]
) -> tuple[str | None, str | None, bool] | None:
    """The mistake and one factor in front of everything."""
    if m.free:
        return None
    table = {id(s): row for s, row in zip(case.samples, rows, strict=True)}
    c, misfit = _fit(case, leaves, lambda s: (s.true + table[id(s)])[None, :])
    if misfit[0] > 1:
        return None
    factor = _named(case, c[0])
    if factor in ("0", "1") or not _exact(factor):
        return None
    return None, factor, True


def _one_term(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """One operand's contribution left out, negated or scaled."""
    hits: list[tuple[float, int, str, bool]] = []
    residual = [s.hand - s.true for s in case.samples]
    for m in range(len(case.terms)):
        alphas = []
        for s, r in zip(case.samples, residual, strict=True):
            mask = np.isin(s.owner, leaves)
            share = s.shares[m][mask]
            size = float(share @ share)
            if not np.isfinite(size):
                break
            alphas.append(float(r[mask] @ share) / size if size > 0 else float("nan"))
        known = ~np.isnan(alphas)
        if len(alphas) < len(case.samples) or not known.any():
            continue
        # Where the step contributes nothing (no example takes that branch) the numbers must agree as they are.
        alpha = np.where(known, alphas, float(np.mean(np.array(alphas)[known])) if known.any() else 0.0)
        misfit = np.max(
            [
                _misfit(case, s, (s.true + a * s.shares[m])[None, :])[0]
                for s, a in zip(case.samples, alpha, strict=True)
            ],
            axis=0,
        )
        if misfit[list(leaves)].max() > 1:
            continue
        loose = 1e-5 if case.noise < 1e-11 else 3e-2
        factor = "0" if np.all(np.abs(1 + alpha) <= loose) else _named(case, 1 + alpha, loose)
        if factor is None:
            continue
        clean = bool(misfit[_untouched(case, leaves)].max() <= 1)
        # Of a chain, the step whose own constant is the factor.
        bonus = 0.3 if sentences.is_constant_step(case.samples[0], case.terms[m].step, factor) else 0.0
        hits.append((_term_cost(case, m, factor, clean) - bonus, m, factor, clean))
    if not hits:
        return []
    cost, m, factor, clean = min(hits)
    found = sentences.term(case.problem, case.samples[0], case.terms[m], factor, leaves, restricted=not clean)
    # A clean omission says more than a derivative of 1 that happens to contribute nothing.
    base = 9.5 if factor == "0" and clean else 12.3
    return [Explanation(base + cost, leaves, (found,))]


def _term_cost(case: Case, m: int, factor: str, clean: bool) -> float:
    """Prefer exact factors, and of one chain the step where it leaves the rest: the last in forward order."""
    s = case.samples[0]
    term = case.terms[m]
    step = s.program.steps[term.step]
    cost = 0.0 if factor in ("0", "-1") else 0.5 if _exact(factor) else 3.0
    cost += 0.0 if clean else 6.0
    if step.primitive in (
        "add",
        "sub",
        "add_any",
        "dot_general",
        "mul",
        "concatenate",
        "select_n",
        "conv_general_dilated",
    ):
        cost -= 0.2
    if not step.frames:
        cost += 0.5
    return cost - 0.001 * term.step


def _added(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """Something that is not in the loss was added: a multiple of the parameters, of their signs, a constant."""
    shapes: list[tuple[str, Callable[[np.ndarray], np.ndarray]]] = [
        ("params", lambda p: p),
        ("sign", np.sign),
        ("one", np.ones_like),
        ("square", np.square),
    ]
    out: list[Explanation] = []
    for name, shape in shapes:
        factors: dict[int, str] = {}
        for leaf in leaves:
            cs = []
            for s in case.samples:
                mask = s.owner == leaf
                values = shape(s.evaluation.point.leaves[leaf])
                extra = s.directions[leaf].reshape(len(s.owner), -1)[mask] @ values.reshape(-1)
                r = (s.hand - s.true)[mask]
                size = float(extra @ extra)
                if size == 0:
                    break
                c = float(r @ extra) / size
                guess = s.true.copy()
                guess[mask] += c * extra
                if _misfit(case, s, guess[None, :])[0, leaf] > 1:
                    break
                cs.append(c)
            if len(cs) < len(case.samples):
                break
            factor = _named(case._replace(dims={}), np.array(cs), 1e-5 if case.noise < 1e-11 else 3e-2)
            if factor in (None, "0"):
                break
            factors[leaf] = factor
        if len(factors) == len(leaves):
            found = sentences.added(case.problem, case.samples[0], factors, name)
            cost = 13.5 if name == "params" else 15.0
            out.append(Explanation(cost, leaves, found))
            break
    return out


def _entries(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """Right but for a few entries of each leaf."""
    findings = []
    masks: list[tuple[int, np.ndarray, str | None]] = []
    for leaf in leaves:
        bad = None
        same = [s for s in case.samples if s.evaluation.true[leaf].shape == case.samples[0].evaluation.true[leaf].shape]
        for s in same:
            e = s.evaluation
            gap = np.asarray(np.abs(e.hand[leaf] - e.true[leaf]))
            limit = max(1e-9, 1e3 * case.noise) * float(np.max(np.abs(e.true[leaf])) or 1.0)
            limit = min(limit, 1e-5 * float(np.max(gap)) + 1e-12 * float(np.max(np.abs(e.true[leaf]))))
            limit = max(limit, 1e3 * case.noise * float(np.max(np.abs(e.true[leaf]))))
            here = np.asarray(gap > limit)
            bad = here if bad is None else np.asarray(bad | here)
        assert bad is not None
        count, size = int(bad.sum()), bad.size
        column = _slice_of(bad)
        if size < 2 or count == 0 or (column is None and count > max(1, min(8, size // 3))):
            return []
        ratios = []
        for s in same:
            with np.errstate(all="ignore"):
                ratios.append(s.evaluation.hand[leaf][bad] / s.evaluation.true[leaf][bad])
        ratio = np.concatenate(ratios)
        factor = None
        if np.all(np.isfinite(ratio)) and np.ptp(ratio) <= 1e-6 * np.max(np.abs(ratio)) + 1e-12:
            factor = name_factor([(None, float(np.mean(ratio)))], {}, 1e-6)
        masks.append((leaf, bad, factor))
        findings.append(sentences.entries(case.problem, case.samples[0], leaf, np.argwhere(bad), factor))
    slices = {_slice_of(bad) for _, bad, _ in masks if bad.ndim > 1}
    factors = {factor or "" for _, _, factor in masks}
    if len(slices) == 1 and None not in slices and factors <= {"0", "-1"} and len(factors) == 1:
        axis, index = next(iter(slices))  # type: ignore[misc]
        if all(bad.ndim > 1 or (axis == 1 and bad[index]) for _, bad, _ in masks):
            found = sentences.class_slice(case.problem, case.samples[0], leaves, axis, index, next(iter(factors)))
            return [Explanation(14.8, leaves, (found,))]
    return [Explanation(15.0, leaves, tuple(findings))]


def _slice_of(bad: np.ndarray) -> tuple[int, int] | None:
    """(axis, index) if exactly one row or column of a matrix is marked (an entry of a vector counts)."""
    if bad.ndim == 1:
        return (1, int(np.argmax(bad))) if bad.sum() == 1 else None
    if bad.ndim != 2:
        return None
    for axis in (1, 0):
        hit = np.nonzero(bad.any(axis=1 - axis))[0]
        if len(hit) == 1 and bad.shape[axis] > 1 and np.take(bad, hit[0], axis=axis).all():
            return axis, int(hit[0])
    return None


def _similar_faults(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """The same fault at every similar step, e.g. the activation's derivative left out in all layers."""
    groups: dict[Any, list[int]] = {}
    s = case.samples[0]
    for m, fault in enumerate(case.faults):
        if fault.kind not in ("missing-derivative", "wrong-argument", "transposed", "missing-factor") and not (
            fault.kind in ("extra-derivative", "wrong-derivative")
            and fault.detail[0] in ("twice", "sigmoid", "tanh", "relu")
        ):
            continue
        names = tuple(s.program.steps[k].name for k in fault.members)
        by_place = sentences.place_of(s, fault)
        detail = fault.detail[:1] + fault.detail[2:] if fault.product >= 0 else fault.detail
        for key in ((names, fault.kind, detail), (names, fault.kind, detail, by_place.where, by_place.expression)):
            groups.setdefault(key, []).append(m)
    # Another value in the factor's place, the same in every time step: as far back in the program each time.
    makers = {o: k for k, step in enumerate(s.program.steps) for o in step.outputs}
    for m, fault in enumerate(case.faults):
        if fault.product >= 0 and fault.detail[0] in ("value", "value^T") and fault.detail[1] in makers:
            step = s.program.steps[fault.members[-1]]
            key = (
                step.frames,
                step.primitive,
                fault.detail[0],
                fault.detail[2],
                makers[fault.detail[1]] - fault.members[-1],
            )
            groups.setdefault(key, []).append(m)
    # Functions that have a name come first: each try is a reverse pass of its own.
    order = sorted(groups.values(), key=lambda ms: (not _is_named(case, ms[0]), case.faults[ms[0]].cost))
    hits = []
    tried: set[tuple[int, ...]] = set()
    replays = 0
    for members in order:
        # Pieces that overlap describe one step twice: keep disjoint ones.
        chosen: list[int] = []
        used: set[int] = set()
        for m in members:
            if not used & set(case.faults[m].members):
                chosen.append(m)
                used |= set(case.faults[m].members)
        if len(chosen) < 2 or len(chosen) > 64 or tuple(chosen) in tried:
            continue
        tried.add(tuple(chosen))
        linear = max(
            _misfit(case, t, (t.true + t.changes[chosen].sum(axis=0))[None, :])[0, list(leaves)].max()
            for t in case.samples
        )
        if linear > 1:
            replays += 1
            if replays > MOST_REPLAYS or not _replayed(case, chosen, leaves):
                continue
        hits.append((case.faults[chosen[0]].cost - 0.1 * len(chosen), chosen))
        break
    if not hits:
        return []
    _, chosen = min(hits)
    findings = tuple(sentences.fault(case.problem, s, case.faults[m], leaves, restricted=False) for m in chosen)
    return [Explanation(21.0, leaves, _in_line_order(findings))]


def _repeated(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """A contribution left out or negated wherever the step comes: in every time step, in every call of a helper."""
    s = case.samples[0]
    groups: dict[Any, list[int]] = {}
    for m, term in enumerate(case.terms):
        step = s.program.steps[term.step]
        if step.frames:
            groups.setdefault((step.frames, step.primitive, term.operand), []).append(m)
    hits = []
    for members in groups.values():
        if len(members) < 2:
            continue
        # The operands of a step in a loop that do not depend on the parameters at first send nothing.
        for factor, weight in (("0", 0.0), ("-1", -1.0), ("2", 2.0), ("1/2", 0.5)):
            if _weighted(case, members, weight, leaves):
                hits.append((_term_cost(case, members[-1], factor, True), members, factor, ""))
                break
        else:
            for but, some in (("last", members[:-1]), ("first", members[1:])) if len(members) > 2 else ():
                if _weighted(case, some, 0.0, leaves):
                    hits.append((1.0 + _term_cost(case, members[-1], "0", True), some, "0", but))
                    break
    if not hits:
        return []
    cost, members, factor, but = min(hits)
    found = sentences.repeated(case.problem, s, [case.terms[m] for m in members], factor, leaves, but)
    return [Explanation(14.0 + cost, leaves, (found,))]


def _weighted(case: Case, members: Sequence[int], weight: float, leaves: Sequence[int]) -> bool:
    """Whether the person's numbers come out when all these contributions are multiplied by a weight."""
    for s in case.samples:
        guess = _reweighted(case, s, tuple(members), weight)
        if _misfit(case, s, guess[None, :])[0, list(leaves)].max() > 1:
            return False
    return True


def _reweighted(case: Case, s: Sample, members: tuple[int, ...], weight: float) -> np.ndarray:
    """The gradient with all these contributions multiplied by a weight; the same for every leaf that is asked about."""
    key = ("weighted", id(s), members, weight)
    if key not in case.memory:
        edges = {}
        for m in members:
            step, operand = case.terms[m]
            slot = s.program.steps[step].inputs[operand]
            edges.update({(step, i): weight for i, x in enumerate(s.program.steps[step].inputs) if x == slot})
        case.memory[key] = _along(s.directions, _varied(case, s, edges, {}, {}))
    return case.memory[key]


def _in_line_order(findings: tuple[Finding, ...]) -> tuple[Finding, ...]:
    seen: list[Finding] = []
    for f in findings:
        if f not in seen:
            seen.append(f)
    return tuple(seen)


def _is_named(case: Case, m: int) -> bool:
    s = case.samples[0]
    fault = case.faults[m]
    if fault.piece < 0:
        return True
    piece = s.todo.pieces[fault.piece]
    return piece.elementwise and catalogue_of.known_function(piece, s.replay) is not None


def _replayed(case: Case, chosen: Sequence[int], leaves: Sequence[int]) -> bool:
    """Whether a full reverse pass with all these faults gives the person's numbers."""
    for s in case.samples:
        guess = _with_faults(case, s, tuple(chosen))
        if guess is None or _misfit(case, s, guess[None, :])[0, list(leaves)].max() > 1:
            return False
    return True


def _with_faults(case: Case, s: Sample, chosen: tuple[int, ...]) -> np.ndarray | None:
    """The gradient with all these faults at one point; None where one of them puts no other value in a place."""
    key = ("replayed", id(s), chosen)
    if key not in case.memory:
        faults = [case.faults[m] for m in chosen]
        of_products = [f for f in faults if f.product >= 0]
        if any(f.label < 0 or s.todo.products[f.product].labels[f.label][0] == "adjoint" for f in of_products):
            return None
        ratios = {f.piece: catalogue_of.local_change(s.todo, s.replay, f) for f in faults if f.piece >= 0}
        partners = {
            f.product: catalogue_of.stand_in(s.todo.products[f.product], f.label, s.at.values, s.program)
            for f in of_products
        }
        case.memory[key] = _along(s.directions, _varied(case, s, {}, ratios, partners))
    return case.memory[key]


def _varied(
    case: Case, s: Sample, weights: Mapping[tuple[int, int], float], ratios: Mapping[int, Any], partners: Any
) -> list[Any]:
    """The gradient with these weights, derivatives and factors in the place of the right ones (`replay.varied`)."""
    key = ("varied", id(s.program))
    if key not in case.memory:
        pieces = [i for i, p in enumerate(s.todo.pieces) if p.elementwise]
        products = list(range(len(s.todo.products)))
        case.memory[key] = (pieces, products, varied(s.program, s.todo, pieces, products))
    pieces, products, run = case.memory[key]
    values = {slot: value for slot, value in s.at.values.items()}
    held = np.ones((len(s.program.steps), max((len(k.inputs) for k in s.program.steps), default=1)))
    for edge, weight in weights.items():
        held[edge] = weight
    with np.errstate(all="ignore"):
        all_ratios = {i: ratios.get(i, np.zeros(s.at.shape(s.todo.pieces[i].start))) for i in pieces}
    slots = {i: s.program.steps[s.todo.products[i].step].inputs[s.todo.products[i].partner] for i in products}
    all_partners = {i: partners.get(i, values[slots[i]]) for i in products}
    return [np.asarray(g) for g in run(values, held, all_ratios, all_partners)]


def replayed(case: Case, s: Sample, chosen: Sequence[int]) -> list[Any]:
    """The gradient of the derivation with the faults `chosen`, by a full reverse pass."""
    point = s.evaluation.point
    values = forward(s.program, point.leaves, point.data)
    at_step: dict[int, Any] = {}
    at_value: dict[int, Any] = {}
    with np.errstate(all="ignore"):
        for m in chosen:
            fault = case.faults[m]
            if fault.piece >= 0:
                piece = s.todo.pieces[fault.piece]
                # Δ / ā is the change of the local derivative, which no other fault alters.
                ratio = catalogue_of.local_change(s.todo, s.replay, fault)
                at_value.setdefault(piece.end, []).append((piece.start, ratio))
            elif fault.product >= 0:
                at_step.setdefault(fault.members[-1], []).append(fault)
            else:
                slot = s.program.steps[fault.members[-1]].outputs[0]
                at_value.setdefault(slot, []).append((slot, catalogue_of.extra_factor(s.replay, slot, fault)))

    def step_fault(k: int, which: list[Fault]):
        def change(sent: dict[int, Any], outs: dict[int, Any]) -> dict[int, Any]:
            sent = dict(sent)
            for fault in which:
                product = s.todo.products[fault.product]
                adjoint = outs[s.program.steps[k].outputs[0]]
                if fault.label == catalogue_of.PASSED:
                    sent[product.operand] = adjoint
                else:
                    other = catalogue_of.stand_in(product, fault.label, values, s.program)
                    if product.labels[fault.label][0] == "adjoint":
                        adjoint = adjoint.swapaxes(-1, -2)
                    sent[product.operand] = pull_product(s.program, product, values, other, adjoint)
            return sent

        return change

    def value_fault(pairs: list[tuple[int, Any]]):
        return lambda adjoint: [(slot, adjoint * ratio) for slot, ratio in pairs]

    return quick_jit(
        lambda held: faulty_gradient(
            s.program,
            held,
            {k: step_fault(k, which) for k, which in at_step.items()},
            {slot: value_fault(pairs) for slot, pairs in at_value.items()},
        )
    )(values)


def _fault_and_factor(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """One faulty step and a factor in front of everything."""
    everything = leaves == case.wrong
    c, misfit = _fit(case, leaves, lambda s: s.true[None, :] + s.changes)
    moves = np.max([np.linalg.norm(s.changes, axis=1) for s in case.samples], axis=0)
    hits = []
    for m in np.nonzero((misfit <= 1) & (moves > 0))[0]:
        factor = _named(case, c[m])
        if factor is None or factor in ("0", "1"):
            continue
        hits.append((_cost(case, int(m)) + (0 if _exact(factor) else 10), int(m), factor))
    if not hits:
        return []
    cost, m, factor = min(hits)
    s = case.samples[0]
    first = sentences.fault(case.problem, s, case.faults[m], leaves, restricted=not everything)
    leaf = None if everything and len(leaves) == len(case.problem.leaves) else leaves[0] if len(leaves) == 1 else None
    second = sentences.scale(case.problem, s, factor, leaf, leaves)
    return [Explanation(25 + 0.5 * cost + _complexity(factor), leaves, (first, second))]


def _term_and_factor(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """hand = c (true + α term)."""
    hits = []
    for m in range(len(case.terms)):
        cs, factors, good = [], [], True
        for s in case.samples:
            mask = np.isin(s.owner, leaves)
            basis = np.stack([s.true[mask], s.shares[m][mask]], axis=1)
            norms = np.linalg.norm(basis, axis=0)
            if not np.all(np.isfinite(norms)) or np.any(norms == 0):
                good = False
                break
            x, _, rank, _ = np.linalg.lstsq(basis / norms, s.hand[mask], rcond=1e-9)
            if rank < 2:
                good = False
                break
            x = x / norms
            guess = x[0] * s.true + x[1] * s.shares[m]
            if _misfit(case, s, guess[None, :])[0, list(leaves)].max() > 1:
                good = False
                break
            cs.append(x[0])
            factors.append((x[0] + x[1]) / x[0] if x[0] else np.inf)
        if not good:
            continue
        factor = _named(case, np.array(cs), 1e-6)
        inner = "0" if np.all(np.abs(factors) < 1e-6) else _named(case, np.array(factors), 1e-5)
        if not (_exact(factor) and _exact(inner)) or factor in ("0", "1"):
            continue
        assert factor is not None
        assert inner is not None
        cost = _term_cost(case, m, inner, True) + _complexity(factor) + _complexity(inner)
        cost += 0.0 if len(leaves) in (1, len(case.problem.leaves)) else 3.0  # half of an overall factor
        cost += 4.0 if _for_n(inner) else 0.0  # each leaf has a factor of its own then
        hits.append((cost, m, factor, inner))
    if not hits:
        return []
    cost, m, factor, inner = min(hits)
    s = case.samples[0]
    first = sentences.term(case.problem, s, case.terms[m], inner, leaves, restricted=False)
    leaf = leaves[0] if len(leaves) == 1 and len(case.problem.leaves) > 1 else None
    return [Explanation(29.0 + cost, leaves, (first, sentences.scale(case.problem, s, factor, leaf, leaves)))]


def _slices(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """Some examples or classes left out or counted twice: weights on slices of one adjoint."""
    hits = []
    seen: set[tuple[int, ...]] = set()
    for m, term in enumerate(case.terms):
        slot = case.samples[0].program.steps[term.step].inputs[term.operand]
        shape = tuple(case.samples[0].program.avals[slot].shape)
        for axis, length in enumerate(shape):
            if not 2 <= length <= 64:
                continue
            found = _slice_weights(case, m, axis, leaves)
            if found is None:
                continue
            weights, overall = found
            strange = _reaches_others(case, m, leaves)
            key = (strange, axis, *(round(10 * w) for w in weights[0]))
            if key in seen:
                continue
            seen.add(key)
            hits.append((strange, -term.step, m, axis, weights, overall))
    if not hits:
        return []
    # Weights at a step that also feeds leaves which are right are a strange mistake.
    strange, _, m, axis, weights, overall = min(hits, key=lambda h: h[:2])
    s = case.samples[0]
    n_axis = [
        t.program.avals[t.program.steps[case.terms[m].step].inputs[case.terms[m].operand]].shape[axis]
        for t in case.samples
    ]
    by_rows = len(set(n_axis)) > 1 or n_axis[0] == s.evaluation.point.n
    partial = not strange and len(leaves) < len(case.problem.leaves)
    findings = [sentences.sliced(case.problem, s, case.terms[m], weights, by_rows, leaves, partial)]
    if overall not in (None, "1"):
        findings.append(sentences.scale(case.problem, s, overall, None, leaves))
    cost = 28.0 if not strange else 32.0 if by_rows else 200.0
    return [Explanation(cost, leaves, tuple(findings))]


def _reaches_others(case: Case, m: int, leaves: Sequence[int]) -> bool:
    """Whether a contribution also reaches leaves that are not among these."""
    return any(
        np.linalg.norm(t.shares[m][t.owner == i]) > 1e-9 * np.linalg.norm(t.true)
        for t in case.samples
        for i in range(len(case.problem.leaves))
        if i not in leaves
    )


def _slice_weights(
    case: Case, m: int, axis: int, leaves: tuple[int, ...]
) -> tuple[list[np.ndarray], str | None] | None:
    term = case.terms[m]
    all_weights, overall = [], []
    groups: dict[int, list[Sample]] = {}
    for s in case.samples:
        groups.setdefault(id(s.program), []).append(s)
    for group in groups.values():
        blocks, targets = [], []
        for s in group:
            slot = s.program.steps[term.step].inputs[term.operand]
            delta = catalogue_of.sent(s.program, s.replay, term)
            if delta is None or delta.ndim <= axis:
                return None
            product = np.real(s.replay.tangents[slot] * delta[None])
            rest = tuple(i for i in range(1, product.ndim) if i != axis + 1)
            parts = product.sum(axis=rest)
            mask = np.isin(s.owner, leaves)
            outside = (s.true - s.shares[m])[mask]
            scale = max(float(np.linalg.norm(s.hand[mask])), 1e-300)
            blocks.append(parts[mask] / scale)
            targets.append((s.hand[mask] - outside) / scale)
        a, b = np.concatenate(blocks), np.concatenate(targets)
        if not np.all(np.isfinite(a)):
            return None
        if a.shape[0] < a.shape[1] + 2:
            continue
        w, _, rank, _ = np.linalg.lstsq(a, b, rcond=1e-10)
        if rank < a.shape[1]:
            continue
        if np.linalg.norm(a @ w - b) > 1e-7 + 1e3 * case.noise:
            return None
        values, counts = np.unique(np.round(w, 6), return_counts=True)
        usual = float(values[np.argmax(counts)])
        if usual == 0:
            usual = float(values[np.argmax(np.where(values != 0, counts, 0))])
        if usual == 0:
            return None
        relative = w / usual
        if np.all(np.abs(relative - 1) < 1e-5) or len(np.unique(np.round(relative, 5))) > 2:
            return None
        overall += [(s.evaluation.point.n, usual) for s in group]
        all_weights.append(relative)
    if not all_weights:
        return None
    name = name_factor(overall, case.dims, 1e-5)
    if name is None or name == "0":
        return None
    return all_weights, name


def _two_faults(case: Case, leaves: tuple[int, ...]) -> list[Explanation]:
    """Two faults on separate paths: their changes add."""
    rows, labels = [], []
    for m, fault in enumerate(case.faults):
        if fault.cost <= 4.0 and fault.kind != "wrong-value":
            rows.append([s.changes[m] for s in case.samples])
            labels.append(("fault", m, 0.0, fault.cost + 0.5))
    for m in range(len(case.terms)):
        for alpha, extra in ((-1.0, 0.2), (-2.0, 2.2), (1.0, 3.0), (-0.5, 3.0)):
            rows.append([alpha * s.shares[m] for s in case.samples])
            labels.append(("term", m, alpha, extra - 0.001 * case.terms[m].step))
    weights = []
    for s in case.samples:
        w = np.zeros(len(s.owner))
        for leaf in leaves:
            mask = s.owner == leaf
            w[mask] = 1.0 / max(float(np.linalg.norm((s.hand - s.true)[mask])), 1e-300)
        weights.append(w)
    r = np.concatenate([w * (s.hand - s.true) for w, s in zip(weights, case.samples, strict=True)])
    with np.errstate(all="ignore"):
        table = np.stack([np.concatenate([w * x for w, x in zip(weights, row, strict=True)]) for row in rows])
    good = np.all(np.isfinite(table), axis=1) & (np.linalg.norm(table, axis=1) > 1e-9)
    index = np.nonzero(good)[0]
    if len(index) == 0 or len(index) > 4000:
        return []
    table = table[index]
    gram = table @ table.T
    norms, cross = np.diag(gram), table @ r
    # |r − a − b|² for all pairs; exact confirmation follows
    distance = r @ r + norms[:, None] + norms[None, :] - 2 * cross[:, None] - 2 * cross[None, :] + 2 * gram
    scale = r @ r + norms[:, None] + norms[None, :]
    candidates = np.argwhere(np.triu(distance <= 1e-10 * scale, 1))
    hits = []
    for i, j in candidates[:2000]:
        a, b = labels[index[i]], labels[index[j]]
        if all(
            _misfit(case, s, (s.true + rows[index[i]][n] + rows[index[j]][n])[None, :])[0, list(leaves)].max() <= 1
            for n, s in enumerate(case.samples)
        ):
            hits.append((a[3] + b[3], int(index[i]), int(index[j])))
    if not hits:
        return []
    cost, i, j = min(hits)
    s = case.samples[0]
    findings = []
    for label in (labels[i], labels[j]):
        if label[0] == "fault":
            findings.append(sentences.fault(case.problem, s, case.faults[label[1]], leaves, restricted=False))
        else:
            factor = {-1.0: "0", -2.0: "-1", 1.0: "2", -0.5: "1/2"}[label[2]]
            findings.append(sentences.term(case.problem, s, case.terms[label[1]], factor, leaves, restricted=False))
    return [Explanation(40 + cost, leaves, tuple(findings))]
