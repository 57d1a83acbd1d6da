"""Hand-derived gradients with mistakes as people report them, and right ones that look unusual.

The mistakes planted in `experiments.support.zoo` and our checker have one author. These inputs are made after
mistakes that people describe in public, in forums and in issues, of many kinds of model, each written as a person
would write it. They and what is expected of a checker were written before the checker was tried on them, and stay as
they are; what is expected is corrected only where it is false as mathematics.

`wrong` marks the mistake in each gradient, and `wrong=False` leaves it out.
"""

from experiments.support.reported import linear, nets, physics, sequences, statistics
from experiments.support.reported.case import Case, Cause

CASES: tuple[Case, ...] = (*linear.CASES, *nets.CASES, *sequences.CASES, *statistics.CASES, *physics.CASES)
"""All of them, by area."""

__all__ = ["CASES", "Case", "Cause"]
