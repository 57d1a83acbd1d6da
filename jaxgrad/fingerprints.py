"""A traced program as text, the same in every process: what it computes, without names and addresses.

text = written_out(jax.make_jaxpr(loss)(params, batch))
"""

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.parallel import digest

_AROUND = {"compiler_options_kvs", "ctx_mesh", "in_layouts", "in_shardings", "inline", "keep_unused", "name",
           "out_layouts", "out_shardings"}  # fmt: skip
"""Settings of a call that hang on where a process stands, not on what is computed."""
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def fingerprint(function: Callable[..., Any], *args: Any) -> str:
    """A short hash of what a function does: its operations and the numbers in them, without names and addresses."""
    return short(_ADDRESS.sub("", written_out(jax.make_jaxpr(function)(*args))))


def identity(closed: Any) -> str | None:
    """A hash that only equal programs share; None where the text names a Python object by its address.

    Rules for derivatives are left out: it tells programs apart that are run, not differentiated.
    """
    text = written_out(closed, without=("jvp_jaxpr_fun", "jvp_jaxpr_thunk", "fwd_jaxpr_thunk", "bwd"))
    return None if _ADDRESS.search(text) else hashlib.sha256(text.encode()).hexdigest()


def short(text: str) -> str:
    """The first 16 digits of the sha256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def written_out(value: Any, without: tuple[str, ...] = ()) -> str:
    """The text of a jaxpr with all that it calls in place; settings named in `without` are left out.

    As JAX prints it, a function that is called twice is written once or twice, depending on what else the process has
    traced: another process would take the same loss for another one.
    """
    if type(value).__name__ == "PRNGImpl":  # a tuple of functions, each printed with its address
        return f"{value.name} {value.key_shape}"
    if isinstance(value, tuple | list):
        return f"({', '.join(written_out(each, without) for each in value)})"
    jaxpr = getattr(value, "jaxpr", value)
    if not hasattr(jaxpr, "eqns"):
        return str(value)
    numbers: dict[Any, int] = {}

    def name(variable: Any) -> str:
        if hasattr(variable, "val"):
            # Printed, a number loses digits; and JAX holds it as this type or that.
            return f"{np.asarray(variable.val).tobytes().hex()}:{variable.aval}"
        return f"{numbers.setdefault(variable, len(numbers))}:{variable.aval}"

    lines = [f"{[*map(name, [*jaxpr.constvars, *jaxpr.invars])]}"]
    for equation in jaxpr.eqns:
        kept = [key for key in sorted(equation.params) if key not in _AROUND and key not in without]
        settings = {key: written_out(equation.params[key], without) for key in kept}
        named = [[*map(name, variables)] for variables in (equation.invars, equation.outvars)]
        lines.append(f"{equation.primitive} {named} {settings}")
    constants = digest([_plain(constant) for constant in getattr(value, "consts", ())])
    return "\n".join([*lines, f"{[*map(name, jaxpr.outvars)]}", constants])


def _plain(constant: Any) -> Any:
    typed = hasattr(constant, "dtype") and jnp.issubdtype(constant.dtype, jax.dtypes.prng_key)
    return jax.random.key_data(constant) if typed else np.asarray(constant)
