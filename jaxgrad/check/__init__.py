"""Which step of a hand derivation is wrong.

`check_gradient(loss, gradient, params, batch)` compares a gradient derived by hand with autodiff and, where
they differ, replays reverse mode with one step done wrong until the person's numbers come out.
`assert_gradient` is the same for tests, `check_backprop` goes adjoint by adjoint, `stability` shows where a
formula that is right on paper fails in floating point.
`python -m jaxgrad.check FILE` checks a file that defines `loss`, `gradient`, `params`, `batch`.

The rooms, each of which uses those before it:

    report       the values that a check returns, and how they read
    program      the loss as a program of steps; their replay, with one of them done wrong; the lines of its source
    evaluate     both gradients at a point: which points are tried, what they give, whether they agree
    patterns     what a wrong gradient is, from its numbers alone
    faults       the mistakes, a class each; here a new one goes
    numerics     where a right formula fails in floating point; verdicts from differences of values
    follow       the first wrong line of the person's own code
    sentences    findings in the words of a derivation
    clues        what is known of a gradient whose cause is not
    search       which mistake gives these numbers
    gradient, backprop, vjp, __main__    the doors: what people call
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgrad.check.backprop import check_backprop
    from jaxgrad.check.gradient import assert_gradient, check_gradient
    from jaxgrad.check.numerics.stability import stability
    from jaxgrad.check.report import Finding, Report
    from jaxgrad.check.vjp import check_rule, check_vjp

__all__ = [
    "Finding",
    "Report",
    "assert_gradient",
    "check_backprop",
    "check_gradient",
    "check_rule",
    "check_vjp",
    "stability",
]

_HOMES = {
    "Finding": "report",
    "Report": "report",
    "assert_gradient": "gradient",
    "check_backprop": "backprop",
    "check_rule": "vjp",
    "check_vjp": "vjp",
    "check_gradient": "gradient",
    "stability": "numerics.stability",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that the command line can parse its arguments before JAX is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
