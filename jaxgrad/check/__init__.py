"""Which step of a hand derivation is wrong.

`check_gradient(loss, gradient, params, batch)` compares a gradient derived by hand with autodiff and, where
they differ, replays reverse mode with one step done wrong until the person's numbers come out.
`assert_gradient` is the same for tests, `check_backprop` goes adjoint by adjoint, `stability` shows where a
formula that is right on paper fails in floating point.
`python -m jaxgrad.check FILE` checks a file that defines `loss`, `gradient`, `params`, `batch`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgrad.check.backprop import check_backprop
    from jaxgrad.check.gradient import assert_gradient, check_gradient
    from jaxgrad.check.precision import stability
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
    "stability": "precision",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    # Loaded on first use, so that the command line can parse its arguments before JAX is imported.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
