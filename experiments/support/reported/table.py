"""The second table of the study `detection`: how checkers do on mistakes as people report them."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes

from experiments.engine import plots
from experiments.engine.kinds import COUNT, EXACT, SECONDS
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support import checkers
from experiments.support.reported import CASES, Case
from experiments.support.reported.score import RIGHT_OUTCOMES, WRONG_OUTCOMES, outcome
from jaxgrad.check import check_gradient

OTHERS = (*checkers.BY_JAX, *checkers.BY_CRITERION)
VERDICTS = ("refused", "accepted", "cannot take it")
NUMBERS = {"reported_seconds": SECONDS, "reported_others_*": COUNT, "reported_*": EXACT}


def judge(every: int, session: Session) -> dict[str, Any]:
    """The numbers of the table, by every `every`-th case.

    reported_wrong, reported_right          the names of the cases
    reported_words, reported_right_words    the outcome of each, by `score.outcome`
    reported_areas                          the area of each wrong case
    reported_others_wrong, _others_right    how many each other checker refuses, accepts and cannot take:
                                            (checkers, verdicts)
    reported_seconds                        the median of the seconds of a check, compile included
    """
    cases = CASES[::every]
    words, seconds, verdicts = [], [], []
    with ExitStack() as settings:
        # The losses of other people rely on what JAX does by default.
        for setting in (jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"), jax.enable_x64(True)):
            settings.enter_context(setting)
        for case in cases:
            if not words or case.area != cases[len(words) - 1].area:
                session.say(f"as people report them: {case.area}")
            word, spent = ours(case, session)
            words.append(word)
            seconds.append(spent)
            verdicts.append(others(case))
    wrong = np.array([bool(case.causes) for case in cases])
    table = np.array([[[v[name] == verdict for verdict in VERDICTS] for name in OTHERS] for v in verdicts])
    return {
        "reported_wrong": [case.name for case in cases if case.causes],
        "reported_right": [case.name for case in cases if not case.causes],
        "reported_areas": [case.area for case in cases if case.causes],
        "reported_words": [word for word, is_wrong in zip(words, wrong, strict=True) if is_wrong],
        "reported_right_words": [word for word, is_wrong in zip(words, wrong, strict=True) if not is_wrong],
        "reported_others": list(OTHERS),
        "reported_others_wrong": table[wrong].sum(axis=0),
        "reported_others_right": table[~wrong].sum(axis=0),
        "reported_seconds": float(np.median(seconds)),
    }


def ours(case: Case, session: Session) -> tuple[str, float]:
    """The outcome of our checker, and the seconds that it took."""
    with session.alone():
        start = time.perf_counter()
        try:
            report = check_gradient(case.loss, case.gradient, *case.arguments)
        except Exception:  # whatever it raises on a loss and a gradient that run is a crash
            report = None
        seconds = time.perf_counter() - start
    return outcome(case, report), seconds


def others(case: Case) -> dict[str, str]:
    """Refused, accepted, or `cannot take it`: the checker raises, and not because the gradient is malformed."""
    value = jax.jit(case.loss)
    batch = tuple(checkers.cast(case.arguments[1:], np.float64))
    flat, rebuild = _flatten(case.params)
    known = checkers.differences(lambda x: float(value(rebuild(x), *batch)), flat, np.random.default_rng(0))

    def by_jax(dtype: Any, gradient: Any) -> bool:
        return checkers.jax_accepts(value, gradient, case.params, case.arguments[1:], dtype)

    def by_criterion(name: str, gradient: Any) -> bool:
        if name.startswith("scipy") and any(map(np.iscomplexobj, jax.tree.leaves(case.params))):
            raise TypeError("scipy.optimize.check_grad takes real parameters")
        return checkers.accepts(known, _flat_gradient(case, gradient))[name]

    return {
        **{name: _verdict(partial(by_jax, dtype), case) for name, dtype in checkers.BY_JAX.items()},
        **{name: _verdict(partial(by_criterion, name), case) for name in checkers.BY_CRITERION},
    }


def _verdict(accepts: Callable[[Any], bool], case: Case) -> str:
    try:
        with np.errstate(all="ignore"):
            return "accepted" if accepts(case.gradient) else "refused"
    except Exception:  # of any kind: they are other people's programs
        pass
    try:
        with np.errstate(all="ignore"):
            accepts(case.right)
    except Exception:
        return "cannot take it"
    return "refused"


def _flatten(params: Any) -> tuple[np.ndarray, Callable[[np.ndarray], Any]]:
    """The parameters as one vector of real numbers, a complex one as its two parts, and the way back."""
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, params))
    parts = [part for leaf in leaves for part in _real_parts(leaf)]
    ends = np.cumsum([part.size for part in parts])[:-1]

    def rebuild(x: np.ndarray) -> Any:
        pieces = iter(np.split(x, ends))
        out = []
        for leaf in leaves:
            values = next(pieces)
            if np.iscomplexobj(leaf):
                values = values + 1j * next(pieces)
            out.append(jnp.asarray(values.reshape(leaf.shape)))
        return jax.tree.unflatten(tree, out)

    return np.concatenate([part.ravel() for part in parts]), rebuild


def _flat_gradient(case: Case, gradient: Any) -> np.ndarray:
    """The gradient as one vector, like the parameters; JAX's convention for a complex a + ib is da - i db."""
    given = jax.tree.leaves(gradient(*jax.tree.map(np.asarray, case.arguments)))
    leaves = jax.tree.leaves(case.params)
    out = []
    for g, leaf in zip(given, leaves, strict=True):
        if np.shape(g) != np.shape(leaf):
            raise ValueError("the gradient has another shape than the parameter")
        out += _real_parts(np.conj(g) if np.iscomplexobj(leaf) else np.asarray(g, float))
    return np.concatenate([part.ravel() for part in out])


def _real_parts(leaf: Any) -> list[np.ndarray]:
    leaf = np.asarray(leaf)
    return [leaf.real, leaf.imag] if np.iscomplexobj(leaf) else [leaf]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    """What must hold on other people's gradients too.

    The bars are those of a verdict, and none is a matter of degree: a checker that accepts a wrong gradient, refuses a
    right one or fails on either cannot be relied on. How often the cause is named is published without a bar, since
    no number of it follows from anything.
    """
    words, right = list(numbers["reported_words"]), list(numbers["reported_right_words"])
    crashes = words.count("crash") + right.count("crash")
    return [
        Claim(
            "reported: detection",
            f"Of {len(words)} gradients with mistakes as people report them our checker accepts none.",
            f"{words.count('missed')} accepted",
            "0",
            words.count("missed") == 0,
        ),
        Claim(
            "reported: false alarms",
            f"Of {len(right)} right gradients that look unusual it refuses none.",
            f"{right.count('false alarm')} refused",
            "0",
            right.count("false alarm") == 0,
        ),
        Claim(
            "reported: crashes",
            f"It crashes on none of these {len(words) + len(right)}.",
            f"{crashes} crashed",
            "0",
            crashes == 0,
        ),
    ]


COLOURS = {
    "cause and line": plots.BLUE,
    "cause": plots.SKY,
    "half": plots.GREEN,
    "entries": "#d9d9d9",
    "unknown": "#b0b0b0",
    "misleading": plots.ORANGE,
    "missed": plots.VERMILLION,
    "crash": plots.BLACK,
}


def draw(axis: Axes, numbers: dict[str, Any]) -> None:
    """What our checker says, area by area: one bar each, in counts."""
    words, areas = np.array(numbers["reported_words"]), np.array(numbers["reported_areas"])
    names = sorted(set(areas), key=list(areas).index)
    left = np.zeros(len(names))
    for word, colour in COLOURS.items():
        count = np.array([np.sum((areas == name) & (words == word)) for name in names])
        if not count.any():
            continue
        axis.barh(names, count, 0.7, left=left, color=colour, label=f"{word} ({count.sum()})")
        for y, (start, width) in enumerate(zip(left, count, strict=True)):
            if width:
                dark = colour in (plots.BLUE, plots.VERMILLION, plots.BLACK)
                axis.text(
                    start + width / 2,
                    y,
                    f"{width}",
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color="white" if dark else plots.BLACK,
                )
        left += count
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("wrong gradients")
    axis.set_title(f"{len(words)} mistakes as people report them: what our checker says")
    axis.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.01, 0.5))


def report(numbers: dict[str, Any]) -> list[str]:
    """The table in Markdown, and the cases whose cause is not named with its line."""
    names, words = list(numbers["reported_wrong"]), list(numbers["reported_words"])
    right, right_words = list(numbers["reported_right"]), list(numbers["reported_right_words"])
    areas = list(numbers["reported_areas"])
    n, caught = len(words), len(words) - words.count("missed") - words.count("crash")
    used = [word for word in WRONG_OUTCOMES if word in words or word in ("misleading", "missed", "crash")]
    lines = [
        f"Mistakes as people report them: {n} wrong gradients of other kinds of model, written as a person would, and "
        f"{len(right)} right ones that look unusual. They were written before the checker was mended (6f562bb), not by "
        "what it finds. When it was first tried on them, three more answers were accepted and one right case was "
        "withdrawn (bd9d169 has the reasons); then it was mended with them in view. So the table shows which of them "
        "it understands, not how it will do on others.",
        "",
        "| area | wrong | " + " | ".join(used) + " |",
        "|---|---:|" + "---:|" * len(used),
    ]
    for area in sorted(set(areas), key=areas.index):
        mine = [word for word, where in zip(words, areas, strict=True) if where == area]
        lines.append(f"| {area} | {len(mine)} | " + " | ".join(str(mine.count(word)) for word in used) + " |")
    lines += [
        f"| all | {n} | " + " | ".join(str(words.count(word)) for word in used) + " |",
        "| share | | " + " | ".join(f"{words.count(word) / n:.0%}" for word in used) + " |",
        "",
        "| checker | caught | missed | cannot take it | false alarms | cannot take it, right ones |",
        "|---|---:|---:|---:|---:|---:|",
        f"| jaxgrad | {caught} of {n} | {words.count('missed')} | {words.count('crash')} "
        f"| {right_words.count('false alarm')} of {len(right)} | {right_words.count('crash')} |",
    ]
    on_wrong, on_right = (np.asarray(numbers[f"reported_others_{side}"]) for side in ("wrong", "right"))
    for name, (refused, accepted, cannot), (alarms, _, unable) in zip(
        numbers["reported_others"], on_wrong, on_right, strict=True
    ):
        lines.append(f"| {name} | {refused} of {n} | {accepted} | {cannot} | {alarms} of {len(right)} | {unable} |")
    for word in dict.fromkeys((*WRONG_OUTCOMES[1:], *RIGHT_OUTCOMES[1:])):
        found = _named(word, names, words) + _named(word, right, right_words)
        if found:
            lines += ["", f"{word.capitalize()}: " + ", ".join(found) + "."]
    return lines


def _named(word: str, names: Sequence[str], words: Sequence[str]) -> list[str]:
    return [name for name, said in zip(names, words, strict=True) if said == word]
