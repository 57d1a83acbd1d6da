"""The noise of the minibatch gradient: exact, estimated, and watched along a run."""

from jaxgrad.sampling import check_sizes
from jaxgrad.types import Sampling


def gamma(sampling: Sampling, n: int) -> float:
    """The sampling factor γ: `Cov[g_B] = γ Σ`, with Σ the 1/n-normalised covariance of the n example gradients.

        full batch        0
        with replacement  1/b
        distinct          (n − b) / (b (n − 1))

    The mean over a batch of *any* per-example quantity has γ times its population covariance (Cochran 1977,
    theorem 2.2): γ is all that the first two moments of a step know of the sampling.

    Raises ValueError if `b > n` for distinct indices, and for a reshuffled pass: its batches depend on
    each other, so no factor describes it over several steps (`jaxgrad.theory.reshuffling` does).
    """
    check_sizes(sampling, n)
    b = sampling.batch_size
    if sampling.name == "full batch" or b is None:
        return 0.0
    if sampling.name == "with replacement":
        return 1 / b
    if sampling.name == "distinct":
        return (n - b) / (b * (n - 1)) if n > 1 else 0.0
    raise ValueError(
        f"no sampling factor describes {sampling.name!r} batches: within a pass they are not independent. "
        "One of its batches by itself has the law of distinct(b); for a whole path use "
        "jaxgrad.theory.reshuffling"
    )
