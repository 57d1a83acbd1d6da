"""Where in the person's own code the numbers first part from the truth.

The person's gradient is run once more, line by line (`watch`), and each array that it makes is compared with every
value and adjoint of the loss (`known`). A line is suspected when what it reads is known to be right and what it
makes is not known. A suspicion is never reported as it is. The function is run again with the right value put in
the place of what the line made: only if the gradient is right then, at several points and batch sizes, is the line
reported. Where nothing can be shown nothing is said.
"""

import ast
import copy
import linecache
import os
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.factors import name_factor
from jaxgrad.check.evaluate.problem import Kernel, Malformed, Problem, assemble, match_tree
from jaxgrad.check.evaluate.rounding import written_in_single
from jaxgrad.check.follow.helpers import helpers
from jaxgrad.check.follow.known import (
    CURVED,
    Facts,
    Found,
    Index,
    Label,
    alike,
    arrangements,
    facts_at,
    in_words,
    is_variable,
    name_of,
)
from jaxgrad.check.follow.statements import Statement
from jaxgrad.check.follow.watch import (
    RETURN,
    Event,
    Output,
    Path,
    Repair,
    Run,
    TooLong,
    as_array,
    probed,
    repaired,
    spelled_path,
    watch,
)
from jaxgrad.check.program.steps import Program
from jaxgrad.check.report import WrongLine

MOST_REPAIRS = 1000
"""How often the gradient may be run again with a repair. A count, so that every machine finds the same line."""
SECONDS = 20.0
"""Processor time after which the search gives up, besides compiling: for a gradient that is slow in itself."""
MOST_EVENTS = 20_000


def first_wrong_line(
    problem: Problem,
    store: Kernel,
    evaluations: Sequence[Evaluation],
    wrong: Sequence[int],
    noise: float = 0.0,
    seconds: float = SECONDS,
) -> WrongLine | None:
    """The first line of the person's gradient that makes a wrong value, or None where none can be shown.

    `evaluations` are points in generic position, `wrong` the leaves that are wrong there. The gradient is run
    again, a few dozen times, with what it prints thrown away; nothing that it raises is passed on.
    """
    if noise > 1e-11 or any(problem.complex) or _derived_by_jax(problem.gradient):
        return None
    try:
        return _Search(problem, store, evaluations, wrong, seconds).answer()
    except Exception:  # whatever happens in a person's code while it is followed, the verdict stands without it
        return None


def _derived_by_jax(gradient: Any) -> bool:
    """Whether it is `jax.grad` of something, compiled or not: it has no line of the person's own to follow."""
    if type(gradient).__name__ == "PjitFunction":
        gradient = gradient.__wrapped__
    code = getattr(gradient, "__code__", None)
    return code is not None and code.co_filename.startswith(os.path.dirname(jax.__file__) + os.sep)


class Status(NamedTuple):
    """What is known of an array: `known`, `constant` (the same at every point), `helper` or `unknown`."""

    kind: str
    found: tuple[Found, ...] = ()


class Site(NamedTuple):
    """One value that one statement makes, each time that it runs."""

    statement: Statement
    code: Any
    outputs: tuple[Output | None, ...]
    """One for each time that the statement runs; None where it left the value alone."""
    first: Event
    """Where the value is seen for the first time not to be known."""
    name: str


class Pattern(NamedTuple):
    """What could stand at a site: known arrays, told by their labels, so that they mean the same at every point."""

    labels: tuple[Label, ...]
    arrangement: int
    axis: int | None
    """Rows of this axis, one for each time that the statement runs."""
    backwards: bool


class Cure(NamedTuple):
    """A pattern that makes the gradient right when it stands at a site, times a factor at each point."""

    site: Site
    pattern: Pattern
    factors: tuple[float, ...]
    leaves: tuple[int, ...]
    """The wrong leaves that are right then."""


class _Point:
    """One point: the true gradient, what is known there, and the person's function run there."""

    def __init__(self, search: "_Search", evaluation: Evaluation) -> None:
        self.search = search
        self.evaluation = evaluation
        self._facts: Facts | None = None
        self._helpers: Index | None = None
        self._run: Run | None = None
        self._sites: dict[Any, list[Event]] | None = None

    @property
    def facts(self) -> Facts:
        if self._facts is None:
            point = self.evaluation.point
            started = time.thread_time()
            self._facts = facts_at(self.search.store, point.leaves, point.data, point.n)
            self.search.deadline += time.thread_time() - started
        return self._facts

    @property
    def helpers(self) -> Index:
        if self._helpers is None:
            self._helpers = Index(helpers(self.facts), self.evaluation.point.n)
        return self._helpers

    @property
    def run(self) -> Run:
        if self._run is None:
            self._run = watch(self.call, self.search.deadline)
        return self._run

    @property
    def by_statement(self) -> dict[Any, list[Event]]:
        if self._sites is None:
            self._sites = {}
            for event in self.run.events:
                self._sites.setdefault(event.statement.key, []).append(event)
        return self._sites

    def call(self) -> Any:
        problem, point = self.search.problem, self.evaluation.point
        params, arguments, keywords = assemble(problem.spec, point.leaves, point.data, numpy=True)
        with jax.disable_jit(self.search.eager):
            return params, problem.gradient(params, *arguments, **keywords)

    def leaves(self, result: Any) -> list[np.ndarray] | None:
        found = match_tree(self.search.problem, *result)
        return None if isinstance(found, Malformed) else found

    def with_repair(self, repair: Repair) -> list[np.ndarray] | None:
        """The gradient with a repair, or None if it cannot be made."""
        self.search.repairs += 1
        if self.search.repairs > MOST_REPAIRS or time.thread_time() > self.search.deadline:
            raise TooLong
        try:
            return self.leaves(repaired(self.call, repair))
        except Exception:  # another shape than the code expects
            return None

    def right(self, leaves: Sequence[np.ndarray]) -> list[bool]:
        return [_same(a, b) for a, b in zip(leaves, self.evaluation.true, strict=True)]


def _same(a: np.ndarray, b: np.ndarray, tol: float = 1e-8) -> bool:
    if a.shape != b.shape:
        return False
    with np.errstate(all="ignore"):
        return bool(np.linalg.norm(np.ravel(a - b)) <= tol * np.linalg.norm(np.ravel(b)) + 1e-300)


class _Search:
    def __init__(
        self,
        problem: Problem,
        store: Kernel,
        evaluations: Sequence[Evaluation],
        wrong: Sequence[int],
        seconds: float,
    ) -> None:
        self.problem, self.store = problem, store
        self.deadline = time.thread_time() + seconds
        self.eager = False
        self.repairs = 0
        first = evaluations[0]
        twin = next(e for e in evaluations[1:] if e.point.n == first.point.n)
        other = [e for e in evaluations if e.point.n != first.point.n][:1]
        self.points = [_Point(self, e) for e in (first, twin, *other)]
        ok = self.points[0].right(first.hand)
        self.wrong = tuple(i for i in wrong if not ok[i])
        self.fine = tuple(i for i in range(len(ok)) if ok[i])

    # -------------------------------------------------------------------------------- following

    def answer(self) -> WrongLine | None:
        if not self.wrong or not self.follow():
            return None
        scaled = self.by_factor()
        if scaled is not None:
            return scaled
        try:
            return self.by_repair()
        except TooLong:
            return None

    def follow(self) -> bool:
        """Run the function at the first two points; whether it gives there what it gave before."""
        a = self.points[0]
        if a.run.traced or not a.run.events:
            self.eager = True
            for point in self.points:
                point._run = None
        if not a.run.events or len(a.run.events) > MOST_EVENTS:
            return False
        # Rounding to single precision would look like a mistake.
        if a.run.coarse or _is_coarse(a.facts.program):
            return False
        if any(written_in_single([p.evaluation.hand[i] for p in self.points]) for i in self.wrong):
            return False
        for point in self.points[:2]:
            leaves = point.leaves(point.run.result)
            if leaves is None or not all(map(_same, leaves, point.evaluation.hand)):
                return False
        self.twins = {(e.statement.key, e.occurrence): e for e in self.points[1].run.events}
        self.statuses: dict[Any, Status] = {}
        return True

    # -------------------------------------------------------------------------------- what an array is

    def status(self, array: np.ndarray, twin: np.ndarray | None) -> Status:
        """What an array of the first point is, given the same one at the second point."""
        key = (array.shape, array.tobytes(), None if twin is None else twin.tobytes())
        if key not in self.statuses:
            self.statuses[key] = self._status(array, twin)
        return self.statuses[key]

    def _status(self, array: np.ndarray, twin: np.ndarray | None) -> Status:
        a, b = self.points[:2]
        paired = twin is not None and twin.shape == array.shape
        if twin is not None and paired and np.array_equal(array, twin, equal_nan=True):
            return Status("constant")
        for kind in ("known", "helper"):
            here, there = (a.facts.index, b.facts.index) if kind == "known" else (a.helpers, b.helpers)
            found = here.find(array)
            if found and paired:
                confirmed = {(f.label, f.axis, f.row) for f in there.find(twin)}  # type: ignore[arg-type]
                kept = tuple(f for f in found if (f.label, f.axis, f.row) in confirmed)
                found = kept or (found if array.size >= 8 and kind == "known" else ())
            elif array.size < 8:
                found = ()
            if found:
                return Status(kind, found)
        return Status("unknown")

    def input_status(self, event: Event, text: str, array: np.ndarray) -> Status:
        twin = self.twins.get((event.statement.key, event.occurrence))
        other = next((v for t, v in twin.inputs if t == text), None) if twin is not None else None
        return self.status(array, other)

    def output_status(self, event: Event, output: Output) -> Status:
        twin = self.twins.get((event.statement.key, event.occurrence))
        other = next((o for o in twin.outputs if o.path == output.path), None) if twin is not None else None
        found = self.status(output.value, None if other is None else other.value)
        if found.kind in ("unknown", "helper") and output.before is not None:
            added = output.value - output.before
            paired = other is not None and other.before is not None
            change = self.status(added, other.value - other.before if paired else None)  # type: ignore[union-attr]
            if change.kind == "known":
                return change
            piece = self._piece(added)
            if piece is not None:
                return Status("known", (piece,))
        return found

    def _piece(self, added: np.ndarray) -> Found | None:
        """The known array that agrees with a change wherever there is one."""
        changed = added != 0
        if not 2 <= int(changed.sum()) < added.size:
            return None
        for label, known in self.points[0].facts.by_label.items():
            if known.shape == added.shape and np.any(known[changed]):
                part, mine = known[changed], added[changed]
                c = float(part @ mine) / float(part @ part)
                if c != 0 and _same(c * part, mine):
                    return Found(label, c, None, 0, True)
        return None

    def trusted(self, event: Event, tried: set[bytes], without: str = "", part: Any = None) -> bool:
        """Whether everything that a statement (or one `part` of it) reads is known to be right, or is a constant."""
        if event.opaque:
            return False
        for inside in self.inner(event):
            returned = [o for o in inside.outputs if o.path[0] == RETURN[0]]
            if inside.opaque or any(self.output_status(inside, o).kind == "unknown" for o in returned):
                return False
        return not self.doubtful(event, tried, without, part)

    def doubtful(
        self, event: Event, tried: set[bytes], without: str = "", part: Any = None, masks: bool = False
    ) -> list[str]:
        """What a statement reads that is not known to be right; with `masks`, of the conditions that it reads."""
        within = None if part is None else {ast.unparse(n) for n in ast.walk(part) if isinstance(n, ast.expr)}
        sound: list[str] = []
        doubt: list[str] = []
        for text, array in event.inputs:
            if text == without or (within is not None and text not in within) or (masks and text not in event.masks):
                continue
            right = self.sound(self.input_status(event, text, array), array, tried, text in event.masks)
            (sound if right else doubt).append(text)
        # A part of an array that is right is right: which part is taken is for this statement to answer.
        return [text for text in doubt if not any(text.startswith(f"{whole}[") for whole in sound)]

    def sound(self, status: Status, array: np.ndarray, tried: set[bytes], mask: bool = False) -> bool:
        """Whether a value that a statement reads may be taken to be right."""
        if status.kind == "helper":
            return array.tobytes() in tried
        if mask and status.kind == "constant":
            # `p > 0` is true at every point: that tells nothing of whether it is the right condition.
            return self.points[0].facts.holds(array)
        if status.kind != "known":
            return status.kind == "constant"
        # A value of the loss times a number is right as nothing that one could name.
        return any(f.label[0] != "value" or abs(abs(f.factor) - 1) < 1e-9 for f in status.found)

    # -------------------------------------------------------------------------------- one factor

    def by_factor(self) -> WrongLine | None:
        """The line that brings in a factor, where every wrong leaf is right but for one."""
        blamed: list[tuple[int, int, WrongLine]] = []
        factors: dict[int, str | None] = {}
        for i in self.wrong:
            values = self.factor_of(i)
            if values is None:
                return None
            line = self.line_of_factor(i, values)
            if line is None:
                return None
            factors[i] = self.named(values)
            blamed.append((line[0], i, line[1]))
        order, leaf, line = min(blamed, key=lambda b: b[:2])
        del order
        # One line may have made two mistakes: the leaves with its factor are right once it is, and no others.
        alike = lambda i, other: other[:4] == line[:4] and factors[i] == factors[leaf]
        same = [self.leaf_name(i) for _, i, other in blamed if alike(i, other)]
        others = [(i, other) for _, i, other in blamed if not alike(i, other)]
        found = line._replace(leaves=tuple(same))
        for i, other in others if any(factors[i] != factors[leaf] for i, _ in others) else ():
            text = f" {self.leaf_name(i)} is {_times(factors[i])} the true one: see line {other.line}."
            found = found._replace(sentence=found.sentence + text.replace("  ", " "))
        at = ", ".join(sorted({f"line {other.line}" for _, other in others if other.line != line.line}))
        if at and all(factors[i] == factors[leaf] for i, _ in others):
            found = found._replace(sentence=f"{found.sentence} The same kind of mistake is in {at}.")
        return found

    def factor_of(self, leaf: int) -> tuple[float, ...] | None:
        """The factor on a leaf at each point, if it is one number times the true leaf at every point."""
        values = []
        for point in self.points:
            true, hand = point.evaluation.true[leaf], point.evaluation.hand[leaf]
            c = float(np.vdot(true, hand)) / max(float(np.vdot(true, true)), 1e-300)
            if c == 0 or not _same(hand, c * true):
                return None
            values.append(c)
        steady = abs(values[0] - values[1]) < 1e-7 * abs(values[0])
        return tuple(values) if steady and self.named(values) is not None else None

    def named(self, values: Sequence[float]) -> str | None:
        pairs = [(p.evaluation.point.n, v) for p, v in zip(self.points, values, strict=False)]
        return name_factor(pairs, {}, 1e-7)

    def line_of_factor(self, leaf: int, values: Sequence[float]) -> tuple[int, WrongLine] | None:
        facts, factor = self.points[0].facts, values[0]
        chain = self.chain(leaf, factor)
        if not chain:
            return None
        n = self.points[0].evaluation.point.n
        ratios = [link.factor / before for link, before in zip(chain, [1.0, *[c.factor for c in chain]], strict=False)]
        # The line without whose share of the factor what is left is simplest.
        gains = [_plainness(r / factor, n) - _plainness(r, n) for r in ratios]
        able = [j for j, link in enumerate(chain) if j == len(chain) - 1 or not self.feeds(link.slot, self.fine)]
        best = min(able, key=lambda j: (gains[j], j))
        link = chain[best]
        if link.event.opaque:
            return None
        name = name_of(self.problem, facts.program, link.slot)
        target = f"dL/d{name}" if is_variable(name) else f"the adjoint of {name}"
        how = _times(self.named(values))
        variable = spelled_path(link.output.path)
        if best == len(chain) - 1:
            source = f" `{chain[best - 1].text}`, from which it is made, is not what is wrong." if best else ""
            sentence = f"What this line makes of {name} is {how} the gradient of {name}.{source}"
        else:
            made = self.factors(link)
            mine = _times(None if made is None else self.named(made)) if abs(link.factor - 1) > 1e-9 else ""
            sentence = (
                f"`{variable}` is {mine} {target}. Of that, {_word(self.named(values))} is never taken back, "
                "and every gradient that is made from it has it."
            ).replace("  ", " ")
        line, text = self.place(link.event, link.output.path, leaf)
        file = link.event.statement.file
        return link.order, WrongLine(file, line, text, variable, target, (), sentence, True, link.slot)

    def chain(self, leaf: int, factor: float) -> list["_Link"]:
        """The adjoints from which a leaf is made, each with its factor, the first one first."""
        facts = self.points[0].facts
        slot = facts.program.leaves[leaf]
        links: list[_Link] = []
        for order, event in enumerate(self.points[0].run.events):
            for output in event.outputs:
                whole = output.path[0] != RETURN[0] or event.frame == 0
                shaped = output.value.size == facts.by_label["value", slot].size
                if not (whole and shaped):
                    continue
                if output.path[0] == RETURN[0] and not self.is_leaf_path(output, leaf):
                    continue
                link = _Link(order, event, output, slot, 0.0, spelled_path(output.path))
                made = self.factors(link)
                c = None if made is None else made[0]
                if c is not None and (not links or abs(links[-1].factor - c) > 1e-9 * abs(c)):
                    links.append(link._replace(factor=c))
        if not links or abs(links[-1].factor - factor) > 1e-7 * abs(factor):
            return []
        above = links[0]
        while len(links) < 50:
            before = self.above(above)
            if before is None:
                return links
            links.insert(0, before)
            above = before
        return links

    def factors(self, link: "_Link") -> tuple[float, ...] | None:
        """By what the value of a link is its adjoint times at each point; None where it is no such multiple.

        A single number is a multiple of any other: it must be the same multiple at two points.
        """
        found: list[float] = []
        key = link.event.statement.key
        # In a loop over the examples: as far from its end at another number of them.
        left = len(self.points[0].by_statement[key]) - link.event.occurrence
        for point in self.points:
            event = next(iter(point.by_statement.get(key, [])[-left:]), None)
            outputs = [] if event is None else [o for o in event.outputs if o.path == link.output.path]
            c = _ratio(outputs[0].value, point.facts.by_label.get(("adjoint", link.slot))) if outputs else None
            if c is None:
                return None
            found.append(c)
        return tuple(found) if abs(found[0] - found[1]) <= 1e-7 * abs(found[0]) else None

    def above(self, link: "_Link") -> "_Link | None":
        """The adjoint that a statement reads, where it was made."""
        events = self.points[0].run.events
        for text, array in link.event.inputs:
            status = self.input_status(link.event, text, array)
            if status.kind != "known" or spelled_path(link.output.path) == text:
                continue
            found = [f for f in status.found if f.label[0] == "adjoint" and f.axis is None]
            if not found or found[0].label[1] in self.points[0].facts.program.leaves:
                continue
            named = _bare(text) in [self.bare_name(f.label[1]) for f in found if abs(f.factor - 1) > 1e-9]
            if abs(link.factor - 1) > 1e-9 and any(abs(f.factor - 1) < 1e-9 for f in found) and not named:
                continue  # it is right as the adjoint of something: the factor comes in behind it
            plain = any(f.label[0] == "value" and abs(abs(f.factor) - 1) < 1e-9 for f in status.found)
            if plain and not _is_derivative(text):
                continue
            for order in range(link.order - 1, -1, -1):
                for output in events[order].outputs:
                    if spelled_path(output.path) == text and output.value.tobytes() == array.tobytes():
                        best = self.nicest(found)
                        return _Link(order, events[order], output, int(best.label[1]), best.factor, text)
        return None

    def bare_name(self, slot: int) -> str:
        """How a value of the loss is called, as `_bare` gives it."""
        return name_of(self.problem, self.points[0].facts.program, slot).lower().replace("_", "")

    def nicest(self, found: Sequence[Found]) -> Found:
        program = self.points[0].facts.program
        return max(found, key=lambda f: (f.axis is None, is_variable(name_of(self.problem, program, f.label[1]))))

    def is_leaf_path(self, output: Output, leaf: int) -> bool:
        keys = [str(k) for _, k in output.path[1:]]
        return ".".join(keys) == self.problem.paths[leaf] or (not keys and len(self.problem.paths) == 1)

    def feeds(self, slot: int, leaves: Sequence[int]) -> bool:
        """Whether any of these leaves goes into a value."""
        program = self.points[0].facts.program
        return any(program.leaves[i] in self.sources(slot) for i in leaves)

    def sources(self, slot: int) -> frozenset[int]:
        """The leaves that go into a value, as slots."""
        if not hasattr(self, "_sources"):
            program = self.points[0].facts.program
            self._sources: dict[int, frozenset[int]] = {s: frozenset([s]) for s in program.leaves}
            for step in program.steps:
                made = frozenset().union(*(self._sources.get(s, frozenset()) for s in step.inputs))
                for out in step.outputs:
                    self._sources[out] = made
        return self._sources.get(slot, frozenset())

    def place(self, event: Event, path: Path, leaf: int | None) -> tuple[int, str]:
        """The line of a statement, or of the part of a `return` that makes one leaf."""
        node = _part_of_return(event.statement, path) if path[0] == RETURN[0] else None
        if node is None or node.lineno == event.statement.line:
            return event.statement.line, event.statement.text
        return node.lineno, _tidy(event.statement, node)

    # -------------------------------------------------------------------------------- repairs

    def by_repair(self) -> WrongLine | None:
        """The first line that makes the gradient right when what it makes is put right."""
        tried: set[bytes] = set()
        late: list[Site] = []
        unsure: list[Site] = []
        for site, status, trusted in self.sites(tried):
            if not trusted:
                late.append(site)
                continue
            if status.kind == "helper":
                tried.add(_bytes_of(site))
            leaf = self.leaf_made_by(site) if status.kind == "unknown" else None
            cure = None if leaf is not None else self.cure_anywhere(site)
            found = self.wrong_input(site, cure is not None) if status.kind == "unknown" else None
            if found is None and cure is not None:
                found = self.cured(cure, status)
            if found is None and leaf is not None and self.tells(site, leaf):
                found = self.leaf_line(site, leaf)
            if found is not None:
                # What came before and could not be trusted may be where it begins.
                return self.doubted(late, tried) or found
            if status.kind == "unknown":
                unsure.append(site)
        return self.doubted(late, tried) or self.overwritten() or self.one_of_two(late, unsure, tried)

    def doubted(self, late: Sequence[Site], tried: set[bytes]) -> WrongLine | None:
        """The first line that cures, of those that read something of which nothing is known."""
        for site in late[:8]:
            cure = None if self.leaf_made_by(site) is not None else self.cure_anywhere(site)
            if cure is not None:
                doubt = self.doubtful(site.first, tried)
                return self.helper_line(cure) or self.cured(cure, Status("unknown"), True, doubt)
        return None

    def cure_anywhere(self, site: Site) -> Cure | None:
        """A cure of all that a statement makes, or of what it makes where that is seen first not to be known."""
        cure = self.cure(site)
        if cure is None and sum(o is not None for o in site.outputs) > 1:
            cure = self.cure(_only(site, site.first.occurrence))
        return cure

    def one_of_two(self, late: Sequence[Site], unsure: Sequence[Site], tried: set[bytes]) -> WrongLine | None:
        """A leaf is wrong, and all but one of what it is made from is right: that one's line, or the leaf's."""
        for site in late:
            leaf = self.leaf_made_by(site)
            doubt = {text for text in self.doubtful(site.first, tried, site.name)} if leaf is not None else set()
            makers = [s for s in unsure if s.name in doubt]
            if leaf is None or len(doubt) != 1 or len(makers) != 1 or site.first.opaque or not self.tells(site, leaf):
                continue
            first, path = makers[0], self.leaf_name(leaf)
            here = first.statement
            sentence = (
                f"What this line reads is right. Line {site.statement.line}, `{site.statement.text}`, uses it and does "
                f"not give the gradient of {path}: the mistake is in one of the two."
            )
            target = f"the gradient of {path}"
            return WrongLine(here.file, here.line, here.text, first.name, target, (path,), sentence, False)
        return None

    def tells(self, site: Site, leaf: int) -> bool:
        """Whether that nothing is known of what a site makes shows that it is wrong: of a sum in a loop only if it
        adds whole terms, and those that belong there are known."""
        made = [o for o in site.outputs if o is not None]
        reads_itself = any(text == site.name for text, _ in site.first.inputs)
        if len(made) == 1 or not (_is_sum(site) or reads_itself):
            return True
        program = self.points[0].facts.program
        known = [k for k in self.points[0].facts.by_label if k[0] in ("part", "rows")]
        terms = [k for k in known if program.steps[k[1]].inputs[k[2]] == program.leaves[leaf]]
        size = sum(len(self.points[0].facts.by_label[k]) if k[0] == "rows" else 1 for k in terms)
        whole = all(o.before is not None and np.all(o.value != o.before) for o in made)
        single = all(o.value.size == 1 for o in made)
        return bool(terms) and whole and not single and len(made) <= size

    def overwritten(self) -> WrongLine | None:
        """A line in a loop that sets a leaf's gradient anew where it should add to it."""
        for event in reversed(self.points[0].run.events):
            again = len(self.points[0].by_statement[event.statement.key]) > 1
            if not again or not isinstance(event.statement.node, ast.Assign):
                continue
            for output in event.outputs:
                whole = [i for i in self.wrong if _ratio(output.value, self.points[0].evaluation.hand[i]) is not None]
                found = [f for f in self.output_status(event, output).found if f.label[0] == "adjoint"]
                if whole and found and found[0].axis is not None:
                    path = self.leaf_name(whole[0])
                    name = spelled_path(output.path)
                    sentence = (
                        f"`{name}` is set anew each time that this line runs, so only what it made last is left. "
                        f"The gradient of {path} is the sum of all of them."
                    )
                    here = event.statement
                    return WrongLine(
                        here.file, here.line, here.text, name, f"the gradient of {path}", (path,), sentence
                    )
        return None

    def inner(self, event: Event) -> list[Event]:
        """What ran in the person's own functions that a statement called."""
        events = self.points[0].run.events
        at = next(k for k, e in enumerate(events) if e is event)
        first = at
        while first > 0 and events[first - 1].frame > event.frame:
            first -= 1
        return list(events[first:at])

    def helper_line(self, cure: Cure) -> WrongLine | None:
        """The `return` of a helper, where its value is what is wrong in the statement that calls it."""
        site, event = cure.site, cure.site.first
        suspects = []
        for inside in self.inner(event):
            for output in inside.outputs:
                if output.path == RETURN and self.output_status(inside, output).kind == "unknown":
                    suspects.append((inside, output))
        if len(suspects) != 1 or not self.trusted(suspects[0][0], set()):
            return None
        inside, output = suspects[0]
        labels: set[Label] | None = None
        for point in self.points[:2]:
            there = self.site_at(point, site)
            values = None if there is None else self.values(cure.pattern, point, there)
            if there is None or values is None or values[event.occurrence] is None:
                return None
            factor = cure.factors[self.points.index(point)]
            wanted = factor * values[event.occurrence]  # type: ignore[operator]
            right = self.stand_ins(point, there.first, inside.code.co_name, output.value.shape, wanted)
            labels = right if labels is None else labels & right
        if not labels:
            return None
        target = self.described([min(labels, key=lambda label: (label[0] != "slope", str(label)))], (1.0, 1.0, 1.0))
        names = [self.leaf_name(i) for i in cure.leaves]
        here = inside.statement
        sentence = (
            f"`{inside.code.co_name}` should return {target}. With that, line {site.statement.line}, "
            f"`{site.statement.text}`, is right, and {_right(names, len(self.wrong))}."
        )
        return WrongLine(here.file, here.line, here.text, "return", target, tuple(names), sentence)

    def stand_ins(
        self, point: "_Point", event: Event, called: str, shape: tuple[int, ...], wanted: np.ndarray
    ) -> set[Label]:
        """What is known that a call in a statement could have returned so that the statement had made `wanted`."""
        expression = event.statement.node.value
        if isinstance(event.statement.node, ast.AugAssign):
            target = ast.parse(ast.unparse(event.statement.node.target), mode="eval").body
            expression = ast.BinOp(target, event.statement.node.op, expression)
        swap = _Swap(called)
        tree = ast.fix_missing_locations(ast.Expression(swap.visit(copy.deepcopy(expression))))
        if swap.count != 1:
            return set()
        code = compile(tree, "<expression>", "eval")

        def look(variables: dict[str, Any]) -> set[Label]:
            right: set[Label] = set()
            for label, known in point.facts.by_label.items():
                for value, _ in arrangements(known, shape):
                    try:
                        made = as_array(eval(code, {**variables, _Swap.NAME: value}))
                    except Exception:  # shapes that do not go together
                        continue
                    if made is not None and made.shape == wanted.shape and _same(made, wanted):
                        right.add(label)
            return right

        return probed(point.call, event, look) or set()

    def sites(self, tried: set[bytes]) -> Iterator[tuple[Site, Status, bool]]:
        """What statements make that is not known, in the order in which they make it."""
        seen: set[Any] = set()
        for event in self.points[0].run.events:
            for output in event.outputs:
                if output.value.size == 0 or (output.path[0] == RETURN[0] and event.frame != 0):
                    continue
                if output.path[0] == RETURN[0] and not any(self.is_leaf_path(output, i) for i in self.wrong):
                    continue
                group = (event.statement.key, _group(output.path))
                if group in seen:
                    continue
                status = self.output_status(event, output)
                accumulates = output.before is not None and isinstance(event.statement.node, ast.AugAssign)
                part = _is_part(status) and not accumulates
                once = len(self.points[0].by_statement[event.statement.key]) == 1
                if status.kind == "known" and once and self.is_wrong_leaf(event, output):
                    status = Status("unknown")
                if status.kind == "constant" or (status.kind == "known" and not part):
                    continue
                seen.add(group)
                if any(self.own_leaf(output, i) for i in self.fine):
                    continue
                without = spelled_path(output.path) if accumulates and not once else ""
                written = _part_of_return(event.statement, output.path) if output.path[0] == RETURN[0] else None
                trusted = self.trusted(event, tried, without, written)
                yield self.site(event, output), status, trusted

    def is_wrong_leaf(self, event: Event, output: Output) -> bool:
        """Whether an output is returned as a wrong leaf, and is nothing known but that leaf turned around."""
        for i in self.wrong:
            if _same(output.value, self.points[0].evaluation.hand[i]):
                twin = self.twins.get((event.statement.key, event.occurrence))
                other = next((o for o in twin.outputs if o.path == output.path), None) if twin is not None else None
                whole = self.status(output.value, None if other is None else other.value)
                own = ("adjoint", self.points[0].facts.program.leaves[i])
                if whole.kind != "known" or any(f.label == own and not f.same for f in whole.found):
                    return True
        return False

    def own_leaf(self, output: Output, leaf: int) -> bool:
        """Whether an output is what is returned for a leaf, but for a factor: of a single number, a simple one."""
        evaluation = self.points[0].evaluation
        c = _ratio(output.value, evaluation.hand[leaf])
        return c is not None and (output.value.size > 1 or _plainness(c, evaluation.point.n) < UNKNOWN)

    def site(self, event: Event, output: Output, point: "_Point | None" = None) -> Site:
        outputs = []
        group = _group(output.path)
        for other in (point or self.points[0]).by_statement.get(event.statement.key, []):
            same = [o for o in other.outputs if o.path == output.path]
            same = same or [o for o in other.outputs if _group(o.path) == group]
            outputs.append(same[0] if same else None)
        return Site(event.statement, event.code, tuple(outputs), event, spelled_path(output.path))

    def leaf_made_by(self, site: Site) -> int | None:
        """The wrong leaf whose returned value, but for a factor, a site makes."""
        last = next((o for o in reversed(site.outputs) if o is not None), None)
        for i in self.wrong:
            if last is not None and self.own_leaf(last, i):
                return i
        return None

    def cure(
        self,
        site: Site,
        factor: Sequence[float] = (),
        other_than: Sequence[Label] = (),
        only: Sequence[Label] = (),
    ) -> Cure | None:
        """What makes wrong leaves right when it stands at a site: something known, times a factor."""
        made = [o for o in site.outputs if o is not None]
        if any(o.path[0] == RETURN[0] for o in made) or (len(made) > 1 and _is_sum(site)):
            return None
        a = self.points[0]
        baseline = a.with_repair(self.zeros(site))
        if baseline is None:
            return None
        moved = [i for i in self.wrong if not _same(baseline[i], a.evaluation.hand[i], 1e-12)]
        broken = [i for i in self.fine if not _same(baseline[i], a.evaluation.hand[i], 1e-12)]
        if not moved:
            return None
        seen: list[np.ndarray] = []
        for pattern in self.patterns(site, moved + broken):
            if any(label in other_than for label in pattern.labels) or (only and pattern.labels[0] not in only):
                continue
            values = self.values(pattern, a, site)
            if values is None:
                continue
            flat = np.concatenate([v.reshape(-1) for v in values if v is not None])
            size = float(np.linalg.norm(flat))
            if size == 0 or any(f.size == flat.size and abs(abs(f @ flat) - size) < 1e-9 * size for f in seen):
                continue
            fixed = self.fixes(a, site, values, baseline, moved)
            if fixed is None:
                seen.append(flat / size)
                continue
            s, leaves = fixed
            if factor and not any(abs(s - f) <= 1e-6 * abs(f) for f in factor):
                continue
            confirmed = self.confirm(pattern, site, s, leaves)
            if confirmed is not None:
                return Cure(site, pattern, confirmed, leaves)
        return None

    def fixes(
        self, point: "_Point", site: Site, values: Sequence[Any], baseline: Sequence[Any], moved: Sequence[int]
    ) -> tuple[float, tuple[int, ...]] | None:
        """The factor with which these values make the leaves right that they move, all of them or the most."""
        with_it = point.with_repair(self.repair(site, values))
        if with_it is None:
            return None
        true = point.evaluation.true
        s = 1.0
        right = point.right(with_it)
        if not all(right[i] for i in moved):
            change = [with_it[i] - baseline[i] for i in moved]
            need = [true[i] - baseline[i] for i in moved]
            top = sum(float(np.vdot(c, d)) for c, d in zip(change, need, strict=True))
            bottom = sum(float(np.vdot(c, c)) for c in change)
            if not (np.isfinite(bottom) and bottom > 0 and top != 0):
                return None
            s = top / bottom
            if not all(_same(baseline[i] + s * c, true[i], 1e-7) for i, c in zip(moved, change, strict=True)):
                return None
            with_it = point.with_repair(self.repair(site, [None if v is None else s * v for v in values]))
            if with_it is None:
                return None
            right = point.right(with_it)
        if not all(right[i] for i in (*moved, *self.fine)):
            return None
        return s, tuple(moved)

    def confirm(self, pattern: Pattern, site: Site, s: float, leaves: tuple[int, ...]) -> tuple[float, ...] | None:
        """The factors at every point, if the pattern cures there too and they are one simple number."""
        factors = [s]
        for point in self.points[1:]:
            there = self.site_at(point, site)
            values = None if there is None else self.values(pattern, point, there)
            if there is None or values is None:
                return None
            baseline = point.with_repair(self.zeros(there))
            fixed = None if baseline is None else self.fixes(point, there, values, baseline, leaves)
            if fixed is None:
                return None
            factors.append(fixed[0])
        name = self.named(factors)
        return tuple(factors) if name is not None and _is_exact(name) else None

    def site_at(self, point: "_Point", site: Site) -> Site | None:
        """The same site where the function was run at another point."""
        made = [k for k, o in enumerate(site.outputs) if o is not None]
        wanted = site.outputs[made[0]]
        assert wanted is not None
        for event in point.by_statement.get(site.statement.key, []):
            for output in event.outputs:
                if _group(output.path) == _group(wanted.path):
                    there = self.site(event, output, point)
                    single = len(made) == 1 and sum(o is not None for o in there.outputs) > 1
                    return _only(there, made[0]) if single else there
        return None

    def repair(self, site: Site, values: Sequence[np.ndarray | None]) -> Repair:
        placed = [None if o is None or v is None else (o.path, v) for o, v in zip(site.outputs, values, strict=True)]
        return Repair(site.statement, site.code, tuple(placed))

    def zeros(self, site: Site) -> Repair:
        return self.repair(site, [None if o is None else np.zeros(o.value.shape) for o in site.outputs])

    def patterns(self, site: Site, moved: Sequence[int]) -> Iterator[Pattern]:
        """What might belong at a site, the likely first."""
        facts = self.points[0].facts
        made = [o for o in site.outputs if o is not None]
        shapes = {o.value.shape for o in made}
        slots = frozenset(facts.program.leaves[i] for i in moved)

        def rank(label: Label) -> tuple[int, int]:
            kind = label[0]
            exact = kind == "adjoint" and self.sources(int(label[1])) == slots
            order = 0 if exact else {"slope": 1, "value": 2, "part": 3, "adjoint": 4, "helper": 5, "rows": 6}[kind]
            named = kind in ("adjoint", "value") and is_variable(name_of(self.problem, facts.program, int(label[1])))
            return order, 0 if named else 1

        ranked = sorted(facts.by_label, key=rank)
        if len(made) == 1:
            size = made[0].value.size
            for label in ranked:
                known = facts.by_label[label]
                if known.size == size:
                    for number in range(len(arrangements(known, made[0].value.shape))):
                        yield Pattern((label,), number, None, False)
            for label, known in self.points[0].helpers.arrays.items():
                if str(label[1]).startswith("softmax") and known.size == size:
                    yield Pattern((label,), 0, None, False)
            return
        if len(shapes) == 1:
            (shape,) = shapes
            size = int(np.prod(shape))
            for label in ranked:
                known = facts.by_label[label]
                for axis in range(known.ndim):
                    if known.shape[axis] == len(made) and known.size == size * len(made):
                        yield Pattern((label,), 0, axis, False)
                        yield Pattern((label,), 0, axis, True)
            for label in ranked:
                if facts.by_label[label].size == size:
                    yield Pattern((label,), 0, None, False)
        for family in self.families():
            for kind in ("adjoint", "slope", "value"):
                labels = [(kind, s) for s in family if (kind, s) in facts.by_label]
                for some in dict.fromkeys((tuple(labels), tuple(labels[1:]), tuple(labels[:-1]))):
                    # One fewer: the state before the first is a constant, and has no adjoint.
                    if len(some) > 1 and len(made) - len(some) in (0, 1):
                        yield Pattern(some[::-1], 0, None, False)
                        yield Pattern(some, 0, None, False)

    def families(self) -> list[tuple[int, ...]]:
        """Values that one line of the loss makes several times, as in a loop over layers or time steps."""
        program = self.points[0].facts.program
        groups: dict[Any, list[int]] = {}
        for step in program.steps:
            for out in step.outputs:
                if out in program.moving:
                    if step.frames:
                        place = step.frames[0]
                        groups.setdefault((place.file, place.line, place.column, step.primitive), []).append(out)
                    if step.primitive in CURVED or step.primitive.startswith("custom_j"):
                        groups.setdefault(step.primitive, []).append(out)
                        groups.setdefault((step.primitive, "in"), []).append(step.inputs[0])
        return list(dict.fromkeys(tuple(g) for g in groups.values() if len(g) > 1))

    def values(self, pattern: Pattern, point: "_Point", site: Site) -> list[np.ndarray | None] | None:
        """The arrays of a pattern at a point, one for each time that the site is made."""
        facts = point.facts
        made = [k for k, o in enumerate(site.outputs) if o is not None]
        out: list[np.ndarray | None] = [None] * len(site.outputs)
        for number, k in enumerate(made):
            shape = site.outputs[k].value.shape  # type: ignore[union-attr]
            if len(pattern.labels) > 1 and number >= len(pattern.labels):
                if number == len(made) - 1:
                    continue
                return None
            label = pattern.labels[number if len(pattern.labels) > 1 else 0]
            known = point.helpers.arrays.get(label) if label[0] == "helper" else facts.by_label.get(label)
            if known is None:
                return None
            if pattern.axis is not None:
                if known.shape[pattern.axis] != len(made):
                    return None
                known = np.take(known, len(made) - 1 - number if pattern.backwards else number, axis=pattern.axis)
            ways = arrangements(known, shape)
            if pattern.arrangement >= len(ways):
                return None
            out[k] = ways[pattern.arrangement][0]
        return out

    # -------------------------------------------------------------------------------- what is said

    def cured(self, cure: Cure, status: Status, late: bool = False, doubt: Sequence[str] = ()) -> WrongLine:
        site = cure.site
        target = self.described(cure.pattern.labels, cure.factors)
        names = [self.leaf_name(i) for i in cure.leaves]
        if status.kind == "known":
            now = self.described([self.nicest_label(status.found)], [self.nicest_found(status.found).factor])
            sentence = f"`{site.name}` is only {now}; it should be {target}. With that in its place "
            sentence += f"{_right(names, len(self.wrong))}."
            certain = True
        elif status.kind == "unknown":
            sentence = f"`{site.name}` should be {target} here, and is not. {self.made_from(site, doubt)}"
            sentence += f"With {'it' if len(target) < 40 else 'that'} in its place {_right(names, len(self.wrong))}."
            certain = not (doubt or late)
        else:
            sentence = f"What is made from `{site.name}` needs {target}: with that in its place "
            sentence += f"{_right(names, len(self.wrong))}."
            certain = False
        return WrongLine(
            site.statement.file,
            site.statement.line,
            site.statement.text,
            site.name,
            target,
            tuple(names),
            sentence,
            certain,
        )

    def made_from(self, site: Site, doubt: Sequence[str] = ()) -> str:
        """What a statement reads, in words; `doubt` is what is not known to be right."""
        if doubt:
            return _doubted(doubt)
        said: dict[str, str] = {}
        for text, array in site.first.inputs:
            status = self.input_status(site.first, text, array)
            if status.kind == "known" and array.size > 1 and text not in said and text != site.name:
                said[text] = self.described([self.nicest_label(status.found)], [self.nicest_found(status.found).factor])
        parts = [f"`{text}` is {what}" for text, what in said.items() if what != text]
        if not parts:
            return "What it is made from is right. "
        listed = parts[0] if len(parts) == 1 else ", ".join(parts[:3][:-1]) + " and " + parts[:3][-1]
        return f"What it is made from is right: {listed}. "

    def nicest_found(self, found: Sequence[Found]) -> Found:
        program = self.points[0].facts.program

        def rank(f: Found) -> tuple[Any, ...]:
            slot = f.label[-1] if f.label[0] == "helper" else f.label[1]
            named = f.label[0] in ("value", "adjoint") and is_variable(name_of(self.problem, program, int(slot)))
            value = f.label[0] == "value" and abs(f.factor - 1) < 1e-9
            return value, f.axis is None, f.label[0] in ("value", "adjoint"), named, abs(f.factor - 1) < 1e-9

        return max(found, key=rank)

    def nicest_label(self, found: Sequence[Found]) -> Label:
        return self.nicest_found(found).label

    def described(self, labels: Sequence[Label], factors: Sequence[float]) -> str:
        """A known array in words: `dL/dz1`, `n times dL/dz1`, `z1`."""
        program = self.points[0].facts.program
        label = labels[0]
        kind = label[0]
        if kind == "slope":
            step = program.steps[int(label[1])]
            inner = name_of(self.problem, program, step.inputs[0])
            name = f"the derivative of {step.name} at {inner}"
        elif kind in ("part", "rows"):
            step = program.steps[int(label[1])]
            slot = step.inputs[int(label[2])]
            through = name_of(self.problem, program, step.outputs[0])
            inner = name_of(self.problem, program, slot)
            name = f"what {inner} gets through {through}" if inner != through else f"a part of what {inner} sends back"
        else:
            slot = int(label[-1] if kind == "helper" else label[1])
            inner = name_of(self.problem, program, slot)
            named = is_variable(inner)
            name = {
                "value": inner,
                "adjoint": f"dL/d{inner}" if named else f"the derivative of the loss by {inner}",
                "helper": f"the {label[1].split()[0]} of {inner}" if "softmax" in str(label[1]) else f"made of {inner}",
            }[kind]
        if len(labels) > 1:
            name += " of its pass"
        factor = self.named(list(factors))
        return name if factor in (None, "1") else f"{_times(factor)} {name}"

    def wrong_input(self, site: Site, cured: bool) -> WrongLine | None:
        """A value that is right as what it is, and is not what the statement needs.

        If the statement can be `cured` itself, a name must tell that it is the value that is wrong.
        """
        program = self.points[0].facts.program
        for text, array in site.first.inputs:
            status = self.input_status(site.first, text, array)
            if status.kind != "known" or array.size < 2:
                continue
            maker = self.maker(site.first, text, array)
            if maker is None or maker.statement.key == site.statement.key:
                continue
            found = status.found
            if cured and not (_is_derivative(text) and any(f.label[0] == "adjoint" for f in found)):
                continue
            backward = [f.factor for f in found if f.label[0] in ("adjoint", "part")]
            parts = [f.label for f in found if f.label[0] == "part" and f.axis is None]
            parts = [p for p in parts if program.steps[p[1]].inputs[p[2]] in program.leaves]
            forward = self.nicest_found(found).label[0] == "value" and not _is_derivative(text)
            cure = self.cure(maker, backward, [f.label for f in found])
            if cure is not None and forward and cure.pattern.labels[0][0] not in ("value", "slope"):
                continue  # a value of the loss is no place for an adjoint
            if cure is None and parts and not cured:
                cure = self.cure(maker, (), [], parts)
                found = tuple(f for f in found if f.label in parts)
            if cure is None:
                continue
            if cured:
                wanted = [name_of(self.problem, program, int(k[1])) for k in cure.pattern.labels if k[0] == "adjoint"]
                if _bare(text) not in [w.lower().replace("_", "") for w in wanted]:
                    continue
            best = self.nicest_found(found)
            now = self.described([best.label], [best.factor])
            if best.axis is not None and len(maker.outputs) == 1:
                now = f"a part of {now}"
            target = self.described(cure.pattern.labels, cure.factors)
            names = [self.leaf_name(i) for i in cure.leaves]
            here, there = site.statement, maker.statement
            meant = name_of(self.problem, program, int(best.label[1])) if best.label[0] in ("adjoint", "value") else ""
            as_named = bool(meant) and best.axis is None and _bare(text) == meant.lower().replace("_", "")
            if as_named or (best.label[0] == "value" and not _is_derivative(text)):
                sentence = (
                    f"`{text}` is {now}, which is right (line {there.line}); this line needs {target}. With that "
                    f"in its place {_right(names, len(self.wrong))}."
                )
                return WrongLine(here.file, here.line, here.text, site.name, target, tuple(names), sentence, True)
            ran = [*self.inner(maker.first), maker.first]
            masks = [text for event in ran for text in self.doubtful(event, set(), masks=True)]
            sentence = (
                f"`{text}` is {now}; line {here.line}, `{here.text}`, needs {target}. {_doubted(masks)}With that in "
                f"its place {_right(names, len(self.wrong))}."
            )
            return WrongLine(there.file, there.line, there.text, text, target, tuple(names), sentence, not masks)
        return None

    def leaf_name(self, leaf: int) -> str:
        return in_words(self.problem.paths[leaf])

    def maker(self, event: Event, text: str, array: np.ndarray) -> Site | None:
        """The site that made what a statement reads."""
        events = self.points[0].run.events
        at = next(k for k, e in enumerate(events) if e is event)
        for order in range(at - 1, -1, -1):
            for output in events[order].outputs:
                if spelled_path(output.path) == text and np.array_equal(output.value, array):
                    return self.site(events[order], output)
        return None

    def leaf_line(self, site: Site, leaf: int) -> WrongLine:
        path = self.leaf_name(leaf)
        output = next(o for o in site.outputs if o is not None)
        line, text = self.place(site.first, output.path, leaf)
        what = "This is" if site.name.startswith("return") else f"`{site.name}` is"
        sentence = f"{what} not the gradient of {path}. {self.made_from(site)}".strip()
        return WrongLine(site.statement.file, line, text, site.name, f"the gradient of {path}", (path,), sentence, True)


def _is_coarse(program: Program) -> bool:
    """Whether a loss computes in less than double precision somewhere."""
    kinds = [getattr(aval, "dtype", None) for aval in program.avals]
    return any(kind is not None and jnp.issubdtype(kind, np.floating) and kind.itemsize < 8 for kind in kinds)


def _only(site: Site, occurrence: int) -> Site:
    """A site with what it makes once only."""
    outputs = tuple(o if k == occurrence else None for k, o in enumerate(site.outputs))
    return site._replace(outputs=outputs) if any(o is not None for o in outputs) else site


def _is_sum(site: Site) -> bool:
    """Whether a statement adds to what was there: what belongs there depends on how far the sum has come."""
    node = site.statement.node
    return isinstance(node, ast.AugAssign) and isinstance(node.op, (ast.Add, ast.Sub))


def _is_part(status: Status) -> bool:
    """Whether a value is only a part of what an adjoint is made of."""
    return bool(status.found) and all(f.label[0] == "part" for f in status.found)


class _Swap(ast.NodeTransformer):
    """Puts a name in the place of the call of one function."""

    NAME = "value_that_stands_in"

    def __init__(self, called: str) -> None:
        self.called = called
        self.count = 0

    def visit_Call(self, node: ast.Call) -> Any:
        if getattr(node.func, "id", getattr(node.func, "attr", None)) == self.called:
            self.count += 1
            return ast.Name(self.NAME, ast.Load())
        return self.generic_visit(node)


class _Link(NamedTuple):
    """An adjoint in the chain that leads to a leaf, with the factor that it has in the person's code."""

    order: int
    event: Event
    output: Output
    slot: int
    factor: float
    text: str


def _ratio(array: np.ndarray, known: np.ndarray | None) -> float | None:
    if known is None:
        return None
    fit = alike(array, known)
    return fit[0] if fit is not None and fit[1] else None


def _bytes_of(site: Site) -> bytes:
    return next(o for o in site.outputs if o is not None).value.tobytes()


def _group(path: Path) -> tuple[Any, ...]:
    return (path[0], *(kind for kind, _ in path[1:]))


def _is_exact(name: str) -> bool:
    return "." not in name and "e" not in name


UNKNOWN = 9.0
"""The plainness of a factor that is no simple number."""


def _plainness(x: float, n: int | None) -> float:
    """How much there is to say about a factor: 0 for 1, 1 for -1, 2 or n, 2 for -n, ..."""
    best = UNKNOWN
    for power in (0, 1, -1, 2, -2) if n else (0,):
        rest = abs(x) / float(n or 1) ** power
        for number, cost in ((1.0, 0.0), (2.0, 1.0), (0.5, 1.0), (4.0, 1.5), (0.25, 1.5), (3.0, 2.0), (1 / 3, 2.0)):
            if abs(rest - number) <= 1e-8 * number:
                best = min(best, abs(power) + cost)
    return best + (x < 0)


def _times(factor: str | None) -> str:
    if factor is None:
        return "a multiple of"
    return {"1": "", "-1": "minus", "2": "twice", "1/2": "half"}.get(factor, f"{factor} times")


def _word(factor: str | None) -> str:
    return "the minus" if factor == "-1" else f"the factor {factor}"


def _right(names: Sequence[str], count: int) -> str:
    listed = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    if len(names) == count:
        return f"everything is right ({listed} now {'has' if len(names) == 1 else 'have'} the mistake)"
    return f"{listed} {'is' if len(names) == 1 else 'are'} right (another mistake is elsewhere)"


def _doubted(doubt: Sequence[str]) -> str:
    """That nothing can be said of what a statement reads."""
    named = " and ".join(f"`{text}`" for text in list(dict.fromkeys(doubt))[:3])
    return f"It is made from {named}, of which nothing can be said: the mistake is here or there. " if doubt else ""


def _is_derivative(text: str) -> bool:
    return re.match(r"(d|delta|grad|g)[\W_A-Z0-9]*", text) is not None and text not in ("data", "diff", "dist")


def _bare(text: str) -> str:
    """The value whose derivative a variable is named after: `z1` of `dz1`, `d_z1`, `grads["z1"]`."""
    word = re.findall(r"\w+", text)[-1].lower().replace("_", "") if re.findall(r"\w+", text) else ""
    for start in ("grad", "delta", "d", "g"):
        if word.startswith(start) and len(word) > len(start):
            return word[len(start) :]
    return word


def _part_of_return(statement: Statement, path: Path) -> Any:
    """The expression in a `return` that makes one leaf, if it is written there."""
    node = getattr(statement.node, "value", None)
    for kind, key in path[1:]:
        if isinstance(node, ast.Dict):
            named = [
                v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant) and k.value == key
            ]
            node = named[0] if named else None
        elif isinstance(node, (ast.Tuple, ast.List)) and isinstance(key, int) and key < len(node.elts):
            node = node.elts[key]
        elif isinstance(node, ast.Call):
            named = [k.value for k in node.keywords if k.arg == key]
            node = named[0] if named else None
        else:
            node = None
        del kind
        if node is None:
            return None
    return node if path[1:] else None


def _tidy(statement: Statement, node: Any) -> str:
    lines = linecache.getlines(statement.file)[node.lineno - 1 : node.end_lineno]
    return " ".join(line.strip() for line in lines)
