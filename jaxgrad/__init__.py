"""Gradient descent, minibatch SGD and backprop in JAX: derivations checked, runs compared, noise predicted.

jaxgrad.check       is my hand-derived gradient right, and if not, which step is wrong?
jaxgrad.descent     the loop; `jaxgrad.sampling` is what separates GD from SGD
jaxgrad.noise       how noisy a minibatch gradient is, exactly and estimated
jaxgrad.theory      what descent must do, exactly, on these very data
jaxgrad.models, losses, lecture, optimum, statistics, data, timing: what those stand on
"""

from jaxgrad.descent import descend
from jaxgrad.sampling import distinct, full_batch, reshuffled, with_replacement
from jaxgrad.types import Batch

__all__ = ["Batch", "descend", "distinct", "full_batch", "reshuffled", "with_replacement"]
