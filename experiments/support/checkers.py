"""Other gradient checkers: JAX's own as it is, and the published criteria of those that are not installed."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from experiments.support.exact import normal

BY_CRITERION = ("scipy check_grad < 1e-6", "torch gradcheck's criterion", "HIPS autograd's criterion")
BY_JAX = {"jax check_grads, float32": np.float32, "jax check_grads, float64": np.float64}


def differences(value: Callable[[np.ndarray], float], flat: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """What the criteria of other checkers need at one point, whatever gradient is judged there."""
    size = len(flat)
    central = np.empty(size)
    forward = np.empty(size)
    start = value(flat)
    step = float(np.sqrt(np.finfo(float).eps))
    for i in range(size):
        e = np.zeros(size)
        e[i] = 1
        central[i] = (value(flat + 1e-6 * e) - value(flat - 1e-6 * e)) / 2e-6
        forward[i] = (value(flat + step * e) - start) / step
    u = normal(rng, size)
    return {
        "central": central,
        "forward": forward,
        "u": u,
        "along": (value(flat + 5e-7 * u) - value(flat - 5e-7 * u)) / 1e-6,
    }


def accepts(known: dict[str, Any], g: np.ndarray) -> dict[str, bool]:
    """Whether each checker of `BY_CRITERION` accepts the gradient g."""
    torch_like = bool(np.all(np.abs(g - known["central"]) <= 1e-5 + 1e-3 * np.abs(known["central"])))
    a, b = float(g @ known["u"]), float(known["along"])
    hips = abs(a - b) < 1e-6 or abs(a - b) / (abs(a) + abs(b)) < 1e-6
    return {
        "scipy check_grad < 1e-6": bool(np.linalg.norm(g - known["forward"]) < 1e-6),
        "torch gradcheck's criterion": torch_like,
        "HIPS autograd's criterion": bool(hips),
    }


def jax_accepts(value: Any, gradient: Any, params: Any, batch: Any, dtype: Any) -> bool:
    """Whether `jax.test_util.check_grads` accepts the gradient, with its default tolerances.

    `value(params, *batch)` and `gradient(params, *batch)`; what is not of floating point stays as it is.
    """
    p0, data = cast(params, dtype), cast(batch, dtype)
    as_numpy = jax.tree.map(np.asarray, data)

    @jax.custom_vjp
    def f(p: Any) -> Any:
        return value(p, *data)

    def fwd(p: Any) -> Any:
        with np.errstate(all="ignore"):
            g = gradient(jax.tree.map(np.asarray, p), *as_numpy)
        return value(p, *data), jax.tree.map(lambda v, at: jnp.asarray(np.asarray(v), at.dtype), g, p)

    f.defvjp(fwd, lambda g, ct: (jax.tree.map(lambda v: ct * v, g),))
    try:
        check_grads(f, (p0,), order=1, modes=["rev"])
    except AssertionError:
        return False
    return True


def cast(tree: Any, dtype: Any) -> Any:
    """The arrays of floating point in `dtype`, complex ones in the complex type of that width."""
    kinds = {"f": dtype, "c": np.result_type(dtype, np.complex64)}
    return jax.tree.map(lambda a: jnp.asarray(a, kinds.get(np.asarray(a).dtype.kind)), tree)
