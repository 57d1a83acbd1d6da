"""Matrix functions: the inverse, a linear system, the determinant, Cholesky's factor."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgrad.check.faults.mistake import Array, At, Change, Mistake, OfStep, Say


def _low(m: Array) -> Array:
    """The lower triangle with half the diagonal."""
    return np.tril(m) - np.diag(np.diag(m)) / 2


def _cholesky(L: Array, d: Array, phi: Callable[[Any], Any], both: bool) -> Array:
    inverse = np.linalg.inv(L)
    middle = phi(L.T @ d)
    middle = (middle + middle.T) / 2 if both else middle
    return inverse.T @ middle @ inverse


Sent = Callable[..., tuple[Any, ...]]
"""What is sent to each operand, from the operands, the output and its adjoint d."""

# name of the library function: how: (kind, price, words, what is sent)
FORMULAS: Mapping[str, Mapping[str, tuple[str, float, str, Sent]]] = {
    "inv": {
        "untransposed": (
            "transposed",
            1.0,
            "the inverse stands on both sides where its transpose belongs",
            lambda A, B, d: (-B @ d @ B,),
        ),
        "left": ("transposed", 1.2, "the inverse on the left is not transposed", lambda A, B, d: (-B @ d @ B.T,)),
        "right": ("transposed", 1.2, "the inverse on the right is not transposed", lambda A, B, d: (-B.T @ d @ B,)),
        "sign": ("negated-term", 1.0, "the minus sign is missing", lambda A, B, d: (B.T @ d @ B.T,)),
        "sign, untransposed": (
            "transposed",
            1.6,
            "the minus sign is missing and the inverse is not transposed",
            lambda A, B, d: (B @ d @ B,),
        ),
        "one side": ("missing-factor", 1.4, "the inverse on the right is missing", lambda A, B, d: (-B.T @ d,)),
        "other side": ("missing-factor", 1.4, "the inverse on the left is missing", lambda A, B, d: (-d @ B.T,)),
        "adjoint": ("transposed", 1.5, "the adjoint must not be transposed", lambda A, B, d: (-B.T @ d.T @ B.T,)),
        "entry by entry": (
            "wrong-derivative",
            1.6,
            "you used -B^2, the derivative of 1/x, entry by entry",
            lambda A, B, d: (-d * B * B,),
        ),
        "d": ("missing-derivative", 1.5, "you passed the adjoint on unchanged", lambda A, B, d: (d,)),
        "A": (
            "wrong-value",
            1.7,
            "the matrix itself stands where its inverse belongs",
            lambda A, B, d: (-A.T @ d @ A.T,),
        ),
    },
    "solve": {
        "untransposed": (
            "transposed",
            1.0,
            "the adjoint system is solved with the matrix where its transpose belongs",
            lambda A, b, u, d: (_outer(-np.linalg.solve(A, d), u), np.linalg.solve(A, d)),
        ),
        "untransposed, b only": (
            "transposed",
            1.2,
            "the adjoint system is solved with the matrix where its transpose belongs, for the right-hand side",
            lambda A, b, u, d: (_outer(-np.linalg.solve(A.T, d), u), np.linalg.solve(A, d)),
        ),
        "untransposed, A only": (
            "transposed",
            1.2,
            "the adjoint system is solved with the matrix where its transpose belongs, for the matrix",
            lambda A, b, u, d: (_outer(-np.linalg.solve(A, d), u), np.linalg.solve(A.T, d)),
        ),
        "sign": (
            "negated-term",
            1.0,
            "the minus sign in the derivative by the matrix is missing",
            lambda A, b, u, d: (_outer(np.linalg.solve(A.T, d), u), np.linalg.solve(A.T, d)),
        ),
        "outer": (
            "transposed",
            1.1,
            "the outer product in the derivative by the matrix is the wrong way round",
            lambda A, b, u, d: (_outer(-u, np.linalg.solve(A.T, d)), np.linalg.solve(A.T, d)),
        ),
        "outer with b": (
            "wrong-value",
            1.3,
            "the right-hand side stands in the outer product where the solution belongs",
            lambda A, b, u, d: (_outer(-np.linalg.solve(A.T, d), b), np.linalg.solve(A.T, d)),
        ),
        "outer with d": (
            "missing-factor",
            1.4,
            "the adjoint itself stands in the outer product where the solution of the adjoint system belongs",
            lambda A, b, u, d: (_outer(-d, u), np.linalg.solve(A.T, d)),
        ),
        "times": (
            "wrong-value",
            1.4,
            "you multiplied the adjoint by the transposed matrix where the system must be solved",
            lambda A, b, u, d: (_outer(-(A.T @ d), u), A.T @ d),
        ),
        "d": (
            "missing-factor",
            1.4,
            "the adjoint system is not solved: you passed the adjoint on",
            lambda A, b, u, d: (_outer(-d, u), d),
        ),
        "no A": (
            "missing-term",
            1.2,
            "the derivative by the matrix is left out",
            lambda A, b, u, d: (0 * A, np.linalg.solve(A.T, d)),
        ),
    },
    "det": {
        "untransposed": (
            "transposed",
            1.0,
            "the inverse must be transposed",
            lambda A, v, d: (d * v * np.linalg.inv(A),),
        ),
        "no det": ("missing-factor", 1.1, "the factor det(A) is missing", lambda A, v, d: (d * np.linalg.inv(A).T,)),
    },
    "slogdet": {
        "untransposed": ("transposed", 1.0, "the inverse must be transposed", lambda A, v, d: (d * np.linalg.inv(A),)),
        "det": (
            "extra-derivative",
            1.2,
            "the factor det(A) does not belong there: that is the derivative of the determinant itself",
            lambda A, v, d: (d * np.linalg.det(A) * np.linalg.inv(A).T,),
        ),
        "over det": (
            "wrong-derivative",
            1.3,
            "you used 1/det(A) as in the derivative of the logarithm of a number",
            lambda A, v, d: (d / np.linalg.det(A) * np.ones_like(A),),
        ),
        "half": ("scaled-term", 1.4, "it counts half", lambda A, v, d: (d * np.linalg.inv(A).T / 2,)),
    },
    "cholesky": {
        "diagonal": (
            "scaled-term",
            1.0,
            "the diagonal is not halved",
            lambda A, L, d: (_cholesky(L, d, np.tril, True),),
        ),
        "not symmetric": (
            "missing-term",
            1.1,
            "it is not made symmetric",
            lambda A, L, d: (_cholesky(L, d, _low, False),),
        ),
        "full": (
            "missing-derivative",
            1.2,
            "the lower triangle is not taken",
            lambda A, L, d: (_cholesky(L, d, lambda m: m, True),),
        ),
        "full, plain": (
            "missing-derivative",
            1.3,
            "the lower triangle is not taken, nor is it made symmetric",
            lambda A, L, d: (_cholesky(L, d, lambda m: m, False),),
        ),
        "untransposed": (
            "transposed",
            1.3,
            "the inverses stand on the wrong sides",
            lambda A, L, d: (np.linalg.inv(L) @ (_low(L.T @ d) + _low(L.T @ d).T) / 2 @ np.linalg.inv(L).T,),
        ),
        "twice": ("scaled-term", 1.4, "the factor 1/2 is missing", lambda A, L, d: (2 * _cholesky(L, d, _low, True),)),
        "d": ("missing-derivative", 1.5, "you passed the adjoint on unchanged", lambda A, L, d: (d,)),
    },
}


def _outer(a: Array, b: Array) -> Array:
    """a bᵀ, summed over the columns where both have several."""
    return np.outer(a, b) if a.ndim == 1 else a @ b.T


@dataclass(frozen=True)
class MatrixRule(OfStep):
    """The derivative of a matrix function in a form that is nearly right."""

    step: int
    function: str
    how: str
    free: bool = False

    @property
    def kind(self) -> str:
        return FORMULAS[self.function][self.how][0]

    @property
    def cost(self) -> float:
        return FORMULAS[self.function][self.how][1]

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        out = step.outputs[-1]
        d = at.adjoint(out)
        arguments = [at.values[s] for s in step.inputs if np.ndim(at.values[s]) > 0]
        if d is None or any(np.ndim(a) > 2 for a in arguments):
            return None
        try:
            sent = FORMULAS[self.function][self.how][3](*arguments, at.values[out], d)
        except (np.linalg.LinAlgError, ValueError, TypeError):
            return None
        operands = [i for i, s in enumerate(step.inputs) if np.ndim(at.values[s]) > 0]
        changes: dict[int, Any] = {}
        for i, new in zip(operands, sent, strict=False):
            right = at.contribution(self.step, i)
            if right is None:
                continue
            if new.shape != right.shape:
                return None
            slot = step.inputs[i]
            changes[slot] = changes.get(slot, 0) + new - right
        return changes or None

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        wrong = FORMULAS[self.function][self.how][2]
        true = {
            "inv": "with B the inverse and d its adjoint it is -B^T d B^T",
            "solve": "with A u = b and d the adjoint of u it is A^-T d for b and -(A^-T d) u^T for A",
            "det": "it is d * det(A) * A^-T",
            "slogdet": "it is d * A^-T",
            "cholesky": "with L the factor it is L^-T P L^-1, P the symmetric part of the lower triangle of L^T d",
        }[self.function]
        return f"In {say.at(self.step)} the derivative of {self.function} is wrong: {wrong}; {true}"


@dataclass(frozen=True)
class OneStep(OfStep):
    """A fixed point (`while_loop`) differentiated through its last step only."""

    step: int
    kind: str = "missing-term"
    cost: float = 1.0
    free: bool = False

    def change(self, at: At) -> Change:
        import jax
        import jax.extend.core as jex
        import jax.numpy as jnp

        step = at.program.steps[self.step]
        p = step.params
        skip, held = p["cond_nconsts"], p["body_nconsts"]
        body = jex.jaxpr_as_fun(p["body_jaxpr"])
        consts = [jnp.asarray(at.values[s]) for s in step.inputs[skip : skip + held]]
        last = [jnp.asarray(at.values[o]) for o in step.outputs]
        moving = [i for i in range(held) if step.inputs[skip + i] in at.program.moving]
        outs = [j for j, o in enumerate(step.outputs) if at.adjoint(o) is not None]

        def once(*moved: Any) -> list[Any]:
            full = list(consts)
            for i, value in zip(moving, moved, strict=True):
                full[i] = value
            out = body(*full, *last)
            return [out[j] for j in outs]

        adjoints = [jnp.asarray(at.adjoint(step.outputs[j])) for j in outs]
        sent = jax.vjp(once, *(consts[i] for i in moving))[1](adjoints)
        changes: dict[int, Any] = {}
        for i, new in zip(moving, sent, strict=True):
            right = at.contribution(self.step, skip + i)
            slot = step.inputs[skip + i]
            changes[slot] = changes.get(slot, 0) + np.asarray(new) - (0 if right is None else right)
        return changes

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return (
            f"In {say.at(self.step)} the gradient goes back through the last step only: the contribution of the steps "
            "before is left out (at a fixed point z = f(z) the adjoint must be solved for with I - J^T)"
        )


def found(at: At) -> Iterator[Mistake]:
    for k, step in enumerate(at.program.steps):
        if not any(s in at.program.moving for s in step.inputs):
            continue
        if step.primitive == "while":
            yield OneStep(k)
        for how in FORMULAS.get(step.primitive, {}):
            yield MatrixRule(k, step.primitive, how)
