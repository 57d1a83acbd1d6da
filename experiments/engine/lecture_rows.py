"""The lecture row by row: what each formula and claim says, what became of it, and where the evidence is.

The words of a verdict are ours; whether they stand is not: they are printed only where every check of that row
held in the saved results and the row's own experiment is among them. Otherwise the row says what is amiss.
"""

from collections.abc import Sequence
from typing import NamedTuple

from experiments.engine.results import Claim

LECTURE = "tests/library/test_lecture.py"


class Row(NamedTuple):
    """A formula or claim of the lecture."""

    id: str
    says: str
    verdict: str
    """What it comes to if all its checks hold: holds, holds if …, false as stated, and the exception in a few words."""
    experiment: str
    """Where its figure and data are."""
    test: str


ROWS = (
    Row(
        "F1",
        "L is the mean of the losses of the examples",
        "holds as a mean; the sum of some slides is another loss",
        "formulas",
        LECTURE,
    ),
    Row("F2", "the gradient points where L grows fastest: step the other way", "holds", "formulas", LECTURE),
    Row(
        "F3",
        "gradient descent, until a step is shorter than ε",
        "holds; the stopping rule is false as stated: too early for GD if η is small, by luck for SGD if b = 1",
        "stopping",
        "tests/library/test_theory_stopping.py",
    ),
    Row(
        "F4",
        "linear regression: −2/n Σ (y − xᵀw) x",
        "holds; false on the slide that has 1/2 for the 2",
        "formulas",
        LECTURE,
    ),
    Row(
        "F5",
        "SGD: the mean over b indices drawn at random",
        "holds for all three ways to draw; they are not the same",
        "samplings",
        "tests/library/test_sampling.py",
    ),
    Row("F6", "SGD on linear regression", "holds", "formulas", LECTURE),
    Row(
        "F7",
        "MSE, MAE, logloss",
        "holds; one target carried away moves MSE in proportion, and MAE not at all on its side of the line",
        "losses",
        LECTURE,
    ),
    Row("F8", "forward propagation", "holds at any depth", "formulas", LECTURE),
    Row("F9", "½ (y − ŷ)²", "holds", "formulas", LECTURE),
    Row("F10", "the two-layer net", "holds", "formulas", LECTURE),
    Row("F11", "the chain rule", "holds", "formulas", LECTURE),
    Row("F12", "dL/dW2", "false as printed; holds with its factors in the order that multiplies", "formulas", LECTURE),
    Row(
        "F13",
        "the second dL/dW2",
        "false as printed: it is dL/dW1; holds with its factors in order",
        "formulas",
        LECTURE,
    ),
    Row(
        "F14",
        "s′ = s(1 − s)",
        "holds on paper; in floating point it loses its digits as s nears 1",
        "formulas",
        LECTURE,
    ),
    Row(
        "F15", "logloss of p", "holds on paper; in floating point if it is computed from the logit", "formulas", LECTURE
    ),
    Row(
        "F16",
        "logistic regression by backprop",
        "holds on paper; as printed NaN in floating point where p rounds to 0 or 1",
        "formulas",
        LECTURE,
    ),
    Row(
        "C1",
        "neither GD nor SGD is guaranteed to reach the global minimum, or to converge",
        "holds",
        "no_guarantee",
        "tests/experiments/test_noise_experiments.py",
    ),
    Row(
        "C2",
        "SGD is faster",
        "holds per second and example if b is chosen well (larger for finer targets); false per update",
        "speed_of_convergence",
        "tests/library/test_theory_least_squares.py",
    ),
    Row(
        "C3",
        "SGD's descent is noisier",
        "holds: the gradient's variance is exactly γ tr Σ; except for b = n different examples, which are GD",
        "gradient_noise",
        "tests/library/test_noise.py",
    ),
    Row(
        "C4",
        "a GD step costs O(n), an SGD step O(b)",
        "holds if the indices are drawn in O(b); shuffling all n for them costs O(n)",
        "step_cost",
        "tests/library/test_sampling.py",
    ),
    Row(
        "C5",
        "noise helps to jump out of local optima",
        "holds if a batch can reach over the wall; false if none can; of two nets it helps one and harms one",
        "escape",
        "tests/library/test_theory_escape.py",
    ),
    Row(
        "C6",
        "too large a step size bounces, too small a one crawls",
        "holds: too small crawls, beyond 2/λmax GD diverges; SGD bounces at a floor that its η sets",
        "learning_rate",
        "tests/library/test_descent.py",
    ),
    Row(
        "C7",
        "all parameters share one step size, though some arrive sooner",
        "holds; step sizes of their own repair it if the valley lies along an axis",
        "conditioning",
        "tests/library/test_theory_conditioning.py",
    ),
    Row(
        "C8",
        "derivatives one by one look for the same thing twice; backprop shares the work",
        "holds; in JAX if parameters are not indexed out of one array",
        "backprop_cost",
        "tests/library/test_theory_cost.py",
    ),
)


def settled(row: Row, claims: Sequence[tuple[str, str, Claim]]) -> tuple[str, int, int]:
    """The verdict on a row, how many of its checks held, and of how many: `(experiment, device, claim)` of all."""
    checks = [(name, claim) for name, _, claim in claims if claim.id == row.id]
    failed = sorted({name for name, claim in checks if not claim.holds})
    words = f"**not settled**: a check of {', '.join(failed)} fails" if failed else row.verdict
    if not failed and row.experiment not in {name for name, _ in checks}:
        words = f"not settled: {row.experiment} was not run"
    return words, sum(claim.holds for _, claim in checks), len(checks)


def evidence(row: Row, claims: Sequence[tuple[str, str, Claim]]) -> str:
    """What was measured for the row's first check in its own experiment."""
    return next((claim.measured for name, _, claim in claims if (claim.id, name) == (row.id, row.experiment)), "")
