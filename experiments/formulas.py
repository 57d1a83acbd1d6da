"""Every formula of the lecture, as printed and as it must be, against autodiff and central differences.

Each gradient of F1–F16 is derived by hand in `jaxgrad.lecture` and compared, in float64, with autodiff of the
package's models and losses, which share no line with it, and with central differences of the same loss as a
third witness: over the models, many shapes, and three kinds of points. *Random*; *trained*, where the gradient
is what is left after its terms have cancelled; *saturated*, where sigmoids round to 0 or 1.

An error is counted in **units of rounding**: one unit is the distance by which the exact result moves, in root
mean square, when every input number and the result are rounded once (moved by a relative 2⁻⁵² up or down). A
right formula is within a few units of another right formula at every point, however ill-conditioned; a wrong
one is off by a million units or by 10¹⁸.

The sigmoid that autodiff sees is `exp(log_sigmoid(z))`: autodiff of the plain sigmoid multiplies by
`s(1 − s)`, as F14 is printed, and loses digits where F14 does, which is measured too.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import EXACT, ROUNDING, ErrorOfRounding, Found, Off
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, dyadic, geometric, normal, sigmoid
from jaxgrad import lecture, losses, models
from jaxgrad.types import Batch, Layer, Linear, TwoLayer

Shape = tuple[int, int, int, int]
Tree = Any


@dataclass(frozen=True)
class Config:
    seeds: int = 8
    """Points of each kind, per formula and shape."""
    shapes: tuple[Shape, ...] = (
        (1, 1, 1, 1),
        (1, 3, 4, 1),
        (5, 5, 5, 5),
        (64, 10, 16, 4),
        (200, 20, 12, 10),
    )
    """(n, d, h, k): examples, features, hidden units, outputs."""
    training: int = 200
    """Steps of normalised descent to a trained point of a net or a logistic regression."""
    steps: int = 12
    """Steps of the descents of F3 and F5."""
    logits: int = 120
    """Logits of each kind at which F11, F14 and F15 are evaluated one by one."""
    curve: int = 3000
    """Points of the curves of F16's error over the logit."""


QUICK = Config(seeds=3, shapes=((5, 3, 4, 2),), training=50, steps=4, logits=40, curve=600)
NUMBERS = {
    "seeds": EXACT, "row/form": EXACT, "row/id": EXACT, "row/kind": EXACT, "row/series": EXACT,
    "row/shape": EXACT, "row/ratio": Off(by="row/limit"), "row/limit": Found(to=1e-3),
    "row/units": ErrorOfRounding(unit=1),
    "row/*": ErrorOfRounding(unit=1e-12), "words/*": EXACT, "shapes": EXACT, "stopped": EXACT, "curve/logit": EXACT,
    "curve/*": ErrorOfRounding(unit=2.3e-16), "nan/found": Found(to=2.4e-7), "nan/*": ROUNDING, "zero/*": EXACT,
    "slopes": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
DEPTHS = 5
"""Nets of 1 to so many layers, in turn, over the shapes."""
KINDS = ("random", "trained", "saturated")
NAMES = {
    "F1": "objective", "F2": "step", "F3": "gradient descent", "F4": "linear regression", "F5": "minibatch",
    "F6": "SGD, linear", "F7": "functionals", "F8": "net of any depth", "F9": "half squared",
    "F10": "two-layer net", "F11": "chain rule", "F12": "output layer", "F13": "hidden layer",
    "F14": "sigmoid", "F15": "logloss", "F16": "logistic",
}  # fmt: skip
EPS = float(np.finfo(np.float64).eps)
LIMIT = 32
"""Units of rounding (five bits) within which two right formulas must agree."""
ROUNDINGS = 8
"""Random roundings of the inputs that measure a unit."""
DELTA = 2.0**-26
"""Their relative size: small enough to be linear, large enough not to drown in rounding itself."""


# --- What is compared ------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """What autodiff says, as a function of `(moving, fixed)`, and the loss that it is the gradient of."""

    exact: Callable[[Any, Any], Tree]
    loss: Callable[[Any, Any], Any] | None = None
    by: str = ""
    """The entry of `moving` by which the loss was differentiated."""


class Check(NamedTuple):
    """One form of one formula, a function of `(moving, fixed)`, and the reference that it should equal."""

    id: str
    form: str
    series: str
    """`must be`; `printed`; `reading` (F12, F13 for one example); `algebra` (F16's p − y); `autodiff`."""
    by_hand: Callable[[Any, Any], Tree]
    reference: str
    part: Callable[[Tree], Tree] = lambda tree: tree
    """The part of the reference that is meant."""


class Family(NamedTuple):
    """Checks that share their points: trees of arrays with a leading axis, the three kinds in turn."""

    shape: Shape
    moving: dict[str, Any]
    """Real numbers, which rounding moves."""
    fixed: dict[str, Any]
    """Labels, which are exact."""
    references: dict[str, Reference]
    checks: list[Check]


def gradient_of(loss: Callable[[Any, Any], Any], by: str) -> Reference:
    """Autodiff of `loss(moving, fixed)` by `moving[by]`."""
    return Reference(lambda m, f: jax.grad(lambda w: loss({**m, by: w}, f))(m[by]), loss, by)


def log_sigmoid_exp(z: Any) -> Any:
    """The sigmoid, in the form whose autodiff keeps its digits when it saturates."""
    return jnp.exp(jax.nn.log_sigmoid(z))


ACTIVATIONS: tuple[tuple[lecture.Activation, Callable[[Any], Any]], ...] = (
    (lecture.SIGMOID, log_sigmoid_exp),
    (lecture.TANH, lambda z: 2 * log_sigmoid_exp(2 * z) - 1),
    (lecture.RELU, jax.nn.relu),
)
"""The pairs by hand, and what autodiff differentiates."""


def linear_family(shape: Shape, config: Config) -> Family:
    """F1, F2, F4, F5, F6: `w[d]`, `X[n, d]`, `y[n]`. Trained: near the least squares solution."""
    n, d, _, _ = shape
    random = np.random.default_rng(n)
    B, eta = jnp.asarray(random.integers(0, n, size=max(1, n // 2))), 0.05
    X, noise, start, w = (normal(random, (config.seeds, *s)) for s in ((n, d), (n,), (d,), (d,)))
    y = np.einsum("snd,sd->sn", X, w) + 0.5 * noise
    trained = dyadic(np.stack([np.linalg.lstsq(a, b, rcond=None)[0] for a, b in zip(X, y, strict=True)]))
    moving = kinds({"X": X, "y": y}, w=(start, trained + 1e-4 * start, 1e3 * start))

    mean = losses.mean_loss(models.linear, losses.squared)
    loss = lambda m, _: mean(Linear(m["w"]), Batch(m["X"], m["y"]))
    batch_loss = lambda m, _: mean(Linear(m["w"]), Batch(m["X"][B], m["y"][B]))
    full = gradient_of(loss, "w")
    step = Reference(lambda m, f: m["w"] - eta * full.exact(m, f))

    def check(
        id: str, form: str, f: Callable[..., Any], *more: Any, series: str = "must be", of: str = "full"
    ) -> Check:
        return Check(id, form, series, lambda m, _: f(m["w"], m["X"], m["y"], *more), of)

    any_gradient = partial(lecture.minibatch_gradient, lecture.linear_gradient)
    checks = [
        check("F1", "mean", partial(lecture.objective_gradient, lecture.linear_gradients)),
        check("F1", "sum", partial(lecture.objective_gradient_sum, lecture.linear_gradients), series="printed"),
        check("F2", "step", lecture.linear_step, eta, of="step"),
        check("F4", "gradient", lecture.linear_gradient),
        check("F4", "1/2 for 2", lecture.linear_gradient_slide_half, series="printed"),
        check("F5", "minibatch", any_gradient, B, of="minibatch"),
        check("F6", "minibatch", lecture.linear_minibatch_gradient, B, of="minibatch"),
    ]
    return Family(shape, moving, {}, {"full": full, "step": step, "minibatch": gradient_of(batch_loss, "w")}, checks)


def functional_family(shape: Shape, config: Config) -> Family:
    """F7 and F9, by the predictions. Trained: residuals of 1e-6. Saturated: of 1e3, and p near 0 and 1."""
    n, _, _, k = shape
    random = np.random.default_rng(n)
    y, off, logits = (normal(random, (config.seeds, n)) for _ in range(3))
    Y, Off = (normal(random, (config.seeds, n, k)) for _ in range(2))
    labels = random.integers(0, 2, size=(config.seeds, n)).astype(float)
    sizes = (1.0, 1e-6, 1e3)
    moving = kinds(
        {"y": y, "Y": Y},
        y_hat=[y + size * off for size in sizes],
        Y_hat=[Y + size * Off for size in sizes],
        p=[sigmoid(spread * logits) for spread in (1.0, 3.0, 10.0)],
    )
    textbook = lambda p, y: -jnp.log(jnp.where(y == 1, p, 1 - p))

    def pair(
        id: str, form: str, by_hand: Callable[..., Any], example: Callable[..., Any], by: str, target: str
    ) -> tuple[Reference, Check]:
        mean = lambda m, f: jnp.mean(jax.vmap(example)(m[by], (m | f)[target]))
        hand = lambda m, f: by_hand(m[by], (m | f)[target])
        return gradient_of(mean, by), Check(id, form, "must be", hand, form)

    pairs = [
        pair("F7", "MSE", lecture.mean_squared_error_gradient, losses.squared, "y_hat", "y"),
        pair("F7", "MAE", lecture.mean_absolute_error_gradient, losses.absolute, "y_hat", "y"),
        pair("F7", "logloss", lecture.logloss_gradient, textbook, "p", "labels"),
        pair("F9", "half squared", lecture.half_squared_adjoint, losses.half_squared, "Y_hat", "Y"),
    ]
    references = {check.form: reference for reference, check in pairs}
    return Family(shape, moving, kinds({"labels": labels}), references, [check for _, check in pairs])


def two_layer_family(shape: Shape, config: Config, activation: int) -> Family:
    """F8, F10, F12, F13: `params = (W1[d, h], W2[h, k], b1[h], b2[k])`, `X[n, d]`, `Y[n, k]`."""
    n, d, h, k = shape
    f, same_f = ACTIVATIONS[activation]
    random = np.random.default_rng(n)
    X, Y, W1, W2, b1, b2 = (normal(random, (config.seeds, *s)) for s in ((n, d), (n, k), (d, h), (h, k), (h,), (k,)))
    params = TwoLayer(W1 / np.sqrt(d), W2 / np.sqrt(h), 0.1 * b1, 0.1 * b2)
    model = partial(models.two_layer, activation=same_f)
    mean = losses.mean_loss(model, losses.half_squared)
    loss = lambda m, _: mean(m["params"], Batch(m["X"], m["Y"]))
    rest = {"X": X, "Y": Y}
    moving = kinds(rest, params=three_points(gradient_of(loss, "params"), params, 60, rest, {}, config))
    references = {
        "prediction": Reference(lambda m, _: jax.vmap(lambda x: model(m["params"], x))(m["X"])),
        "gradient": gradient_of(loss, "params"),
    }

    def check(id: str, form: str, series: str, by_hand: Callable[..., Any], part: Callable[..., Any]) -> Check:
        return Check(id, form, series, lambda m, _: by_hand(m["params"], m["X"], m["Y"], f), "gradient", part)

    forward = lambda m, _: lecture.two_layer_forward(m["params"], m["X"], f).Y_hat
    checks = [
        Check("F8", "two layers", "must be", forward, "prediction"),
        check("F10", "backprop", "must be", lambda *a: lecture.two_layer_backprop(*a)[0], lambda g: g),
    ]
    for id, part, form, printed, reading in (
        (
            "F12",
            lambda g: g.W2,
            lecture.output_layer_gradient,
            lecture.output_layer_gradient_as_printed,
            lecture.output_layer_gradient_one_example,
        ),
        (
            "F13",
            lambda g: g.W1,
            lecture.hidden_layer_gradient,
            lecture.hidden_layer_gradient_as_printed,
            lecture.hidden_layer_gradient_one_example,
        ),
    ):
        checks.append(check(id, "any shape", "must be", form, part))
        # The printed sum, divided by n, so that only the product of the factors is judged.
        checks.append(check(id, "letter by letter", "printed", lambda *a, f=printed: f(*a) / n, part))
        if n == 1:
            first = lambda p, X, Y, f, reading=reading: reading(p, X[0], Y[0], f)
            checks.append(check(id, "one example", "reading", first, part))
    return Family(shape, moving, {}, references, checks)


def deep_family(shape: Shape, config: Config, activation: int, depth: int) -> Family:
    """F8's dots: half squared loss or softmax cross entropy, `params` one layer per matrix, `X`, `Y`."""
    n, d, h, k = shape
    f, same_f = ACTIVATIONS[activation]
    random = np.random.default_rng(n)
    sizes = (d, *[h] * (depth - 1), k)
    layer = lambda a, b: Layer(
        normal(random, (config.seeds, a, b)) / np.sqrt(a), 0.1 * normal(random, (config.seeds, b))
    )
    params = tuple(layer(a, b) for a, b in itertools.pairwise(sizes))
    X, Y = normal(random, (config.seeds, n, d)), normal(random, (config.seeds, n, k))
    Y_class = np.eye(k)[random.integers(0, k, size=(config.seeds, n))]
    model = partial(models.deep, activation=same_f)

    def loss(example: Callable[..., Any], target: str) -> Callable[[Any, Any], Any]:
        mean = losses.mean_loss(model, example)
        return lambda m, fixed: mean(m["params"], Batch(m["X"], (m | fixed)[target]))

    references = {"half squared": gradient_of(loss(losses.half_squared, "Y"), "params")}
    adjoints: dict[str, tuple[Callable[..., Any], str]] = {"half squared": (lecture.half_squared_adjoint, "Y")}
    if k > 1:
        references["softmax"] = gradient_of(loss(losses.softmax_cross_entropy, "class"), "params")
        adjoints["softmax"] = (lecture.softmax_adjoint, "class")
    rest, fixed = {"X": X, "Y": Y}, {"class": Y_class}
    moving = kinds(rest, params=three_points(references["half squared"], params, 10, rest, fixed, config))
    by_hand = lambda m, fixed, form: lecture.deep_backprop(
        m["params"], m["X"], (m | fixed)[adjoints[form][1]], f, adjoints[form][0]
    )[0]
    checks = [Check("F8", form, "must be", partial(by_hand, form=form), form) for form in references]
    return Family(shape, moving, kinds(fixed), references, checks)


def logistic_family(shape: Shape, config: Config) -> Family:
    """F16: `params = (w[d], b)`, `X[n, d]`, labels `y[n]`."""
    n, d, _, _ = shape
    random = np.random.default_rng(n)
    X, w = normal(random, (config.seeds, n, d)), normal(random, (config.seeds, d))
    p = sigmoid(np.einsum("snd,sd->sn", X, w))
    labels = (random.random(p.shape) < p).astype(float)
    mean = losses.mean_loss(models.linear, losses.logloss)
    reference = gradient_of(lambda m, f: mean(m["params"], Batch(m["X"], f["labels"])), "params")
    params, rest, fixed = Linear(w, np.full(config.seeds, 0.1)), {"X": X}, {"labels": labels}
    moving = kinds(rest, params=three_points(reference, params, 100, rest, fixed, config))
    by_hand = lambda m, f, form: form(m["params"], m["X"], f["labels"])
    checks = [
        Check("F16", "as printed", "printed", partial(by_hand, form=lecture.logistic_gradient_as_printed), "gradient"),
        Check("F16", "(p − y) x", "algebra", partial(by_hand, form=lecture.logistic_gradient), "gradient"),
        Check("F16", "signed", "must be", partial(by_hand, form=lecture.logistic_gradient_signed), "gradient"),
    ]
    return Family(shape, moving, kinds(fixed), {"gradient": reference}, checks)


def scalar_family(config: Config) -> Family:
    """F11, F14, F15 at single logits `h`: of order 1; confident, up to 20; saturated, from 20 to 300."""
    random = np.random.default_rng(0)
    count = config.logits
    sizes = [decimals(low * (high / low) ** random.random(count)) for low, high in ((0.01, 3), (2, 20), (20, 300))]
    moving = kinds({}, h=[random.choice([-1.0, 1.0], count) * size for size in sizes])
    fixed = kinds({"label": random.integers(0, 2, count).astype(float)})

    loss = lambda m, f: losses.logloss(m["h"], f["label"])
    slope, adjoint = gradient_of(lambda m, _: log_sigmoid_exp(m["h"]), "h"), gradient_of(loss, "h")
    references = {
        "s": Reference(lambda m, _: log_sigmoid_exp(m["h"])),
        "s′": slope,
        "CE": Reference(loss),
        "dCE/dh": adjoint,
        # dCE/dp = (dCE/dh) / (dp/dh)
        "dCE/dp": Reference(lambda m, f: adjoint.exact(m, f) / slope.exact(m, f)),
    }
    of_h = lambda m, _, form: form(m["h"])
    of_label_h = lambda m, f, form: form(f["label"], m["h"])
    of_label_p = lambda m, f, form: form(f["label"], lecture.sigmoid(m["h"]))
    checks = [
        Check("F14", "s", "must be", partial(of_h, form=lecture.sigmoid), "s"),
        Check("F14", "s′", "must be", partial(of_h, form=lecture.sigmoid_derivative), "s′"),
        Check("F14", "s(1 − s)", "printed", partial(of_h, form=lecture.sigmoid_derivative_as_printed), "s′"),
        Check("F14", "autodiff of s", "autodiff", partial(of_h, form=jax.grad(jax.nn.sigmoid)), "s′"),
        Check("F15", "CE from h", "must be", partial(of_label_h, form=lecture.cross_entropy), "CE"),
        Check("F15", "dCE/dh", "must be", partial(of_label_h, form=lecture.logit_adjoint_signed), "dCE/dh"),
        Check("F15", "CE(y, p)", "printed", partial(of_label_p, form=lecture.cross_entropy_as_printed), "CE"),
        Check(
            "F15",
            "dCE/dp",
            "printed",
            partial(of_label_p, form=lecture.cross_entropy_derivative_as_printed),
            "dCE/dp",
        ),
    ]
    for i, (outer, f) in enumerate(ACTIVATIONS):
        inner, g = ACTIVATIONS[(i + 1) % len(ACTIVATIONS)]
        name, derivative = f"pair {i + 1}", lecture.chain_rule(outer, inner).derivative
        references[name] = gradient_of(lambda m, _, f=f, g=g: f(g(m["h"])), "h")
        checks.append(Check("F11", name, "must be", partial(of_h, form=derivative), name))
    return Family((1, 1, 1, 1), moving, fixed, references, checks)


def kinds(same: dict[str, Any], **three: Any) -> dict[str, Any]:
    """Points of the three kinds in one leading axis: all of the first kind, then the second, then the third.

    `same` does not depend on the kind; each of `three` is a sequence of one tree per kind.
    """
    together = {name: [tree] * len(KINDS) for name, tree in same.items()} | three
    return {name: jax.tree.map(lambda *x: np.concatenate(x), *trees) for name, trees in together.items()}


def three_points(
    gradient: Reference, params: Tree, factor: float, rest: Any, fixed: Any, config: Config
) -> tuple[Tree, Tree, Tree]:
    """`params` as drawn, trained, and times `factor`, all with a leading axis of seeds.

    Trained by descent with steps of given length, `0.3 / (1 + t/5)` at step t: it needs no tuning. Where that ends is
    rounded, so that a formula's error is measured at one point on every machine.
    """
    batched = jax.jit(jax.vmap(lambda p, r, f: gradient.exact({**r, "params": p}, f)))
    w = params
    for t in range(config.training):
        g = jax.tree.map(np.asarray, batched(w, rest, fixed))
        length = 0.3 / (1 + t / 5) / np.maximum(norm(g), 1e-300)
        w = jax.tree.map(lambda a, b, c=length: a - b * over(c, b), w, g)
    return params, jax.tree.map(dyadic, w), jax.tree.map(lambda leaf: factor * leaf, params)


# --- The comparison --------------------------------------------------------------------------------------


def norm(tree: Tree) -> np.ndarray:
    """The norm of a tree whose leaves have a leading axis of points, per point, without under- or overflow."""
    flat = np.concatenate([leaf.reshape(len(leaf), -1) for leaf in jax.tree.leaves(tree)], axis=1)
    largest = np.maximum(np.max(np.abs(flat), axis=1), np.finfo(float).tiny)
    with np.errstate(invalid="ignore"):  # an infinite entry
        return largest * np.linalg.norm(flat / largest[:, None], axis=1)


def quotient(error: np.ndarray, size: np.ndarray) -> np.ndarray:
    """`error / size`, and 0 where there is no error, whatever the size."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0, error / size)


def minus(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(np.subtract, a, b)


def over(values: np.ndarray, leaf: np.ndarray) -> np.ndarray:
    """One value per point, with axes of 1 so that it multiplies the points' arrays in `leaf`."""
    return values.reshape(-1, *[1] * (leaf.ndim - 1))


def ratio(hand: Tree, right: Tree) -> np.ndarray:
    """`⟨hand, right⟩ / ⟨right, right⟩` per point."""
    size = np.maximum(norm(right), np.finfo(float).tiny)
    terms = jax.tree.map(lambda a, b: (a / over(size, a)) * (b / over(size, b)), hand, right)
    return np.sum([leaf.reshape(len(leaf), -1).sum(axis=1) for leaf in jax.tree.leaves(terms)], axis=0)


def compare(family: Family) -> list[dict[str, np.ndarray]]:
    """Every check of a family at every point: columns of a table, one row per point.

    `relative` error, error in `units` of rounding, `ratio` to the reference (of the projection on it), the `limit`
    that `LIMIT` units are for that ratio, and relative error of the `witness`. A result that has the shape of the
    reference's transpose, as F12 and F13 printed for one example have, is transposed first. Where the printed factors
    do not multiply, one row says so.
    """
    possible = [check for check in family.checks if multiplies(check, family)]
    one_point = lambda m, f: (
        {name: reference.exact(m, f) for name, reference in family.references.items()},
        [check.by_hand(m, f) for check in possible],
    )
    program = jax.jit(jax.vmap(one_point))
    evaluate = lambda moving: jax.tree.map(np.asarray, program(moving, family.fixed))
    exact, by_hand = evaluate(family.moving)
    random = np.random.default_rng(0)
    rounded = [
        evaluate(jax.tree.map(lambda x: x * (1 + DELTA * random.choice([-1.0, 1.0], x.shape)), family.moving))[0]
        for _ in range(ROUNDINGS)
    ]
    witnesses = {name: witness(r, family) for name, r in family.references.items() if r.loss}
    tables = []
    for check in family.checks:
        if check not in possible:
            tables.append(rows(check, family.shape))
            continue
        right, hand = check.part(exact[check.reference]), by_hand[possible.index(check)]
        if jax.tree.map(np.shape, hand) != jax.tree.map(np.shape, right):
            hand = np.swapaxes(hand, 1, 2)
        moves = [norm(minus(check.part(moved[check.reference]), right)) for moved in rounded]
        size, off = norm(right), norm(minus(hand, right))
        unit = EPS * norm(np.stack([size, *(move / (DELTA * ROUNDINGS**0.5) for move in moves)], axis=1))
        third = np.full(len(size), np.nan)
        if check.reference in witnesses:
            seen = check.part(witnesses[check.reference])
            there = first_kind(right)
            third[: len(size) // len(KINDS)] = quotient(norm(minus(seen, there)), norm(there))
        errors = {"relative": quotient(off, size), "units": quotient(off, unit), "witness": third}
        shares = ratio(hand, right)
        errors["limit"] = LIMIT * quotient(unit, size) * np.maximum(1, np.abs(shares))
        tables.append(rows(check, family.shape, **errors, ratio=shares))
    return tables


def multiplies(check: Check, family: Family) -> bool:
    """Whether the factors of a formula have shapes that can be multiplied."""
    try:
        jax.eval_shape(check.by_hand, *jax.tree.map(lambda leaf: leaf[0], (family.moving, family.fixed)))
    except ValueError:
        return False
    return True


def witness(reference: Reference, family: Family) -> Tree:
    """Central differences of the reference's loss at the random points, by every number it is differentiated by.

    `(L(w + h eᵢ) − L(w − h eᵢ)) / 2h` with `h = eps^⅓ max(1, |wᵢ|)`, which balances the error of the formula
    against that of the subtraction: good to about `eps^⅔ = 4·10⁻¹¹` of the loss, and no better. That is why
    they see nothing at trained or saturated points, where the gradient is small.
    """
    by = reference.by
    moving, fixed = first_kind((family.moving, family.fixed))
    program = jax.jit(jax.vmap(lambda w, m, f: reference.loss({**m, by: w}, f)))  # type: ignore[misc]
    leaves, tree = jax.tree.flatten(moving[by])
    slopes = [np.empty_like(leaf) for leaf in leaves]
    for leaf, slope in zip(leaves, slopes, strict=True):
        for i in np.ndindex(leaf.shape[1:]):
            entry = (slice(None), *i)
            middle = leaf[entry].copy()
            h = np.cbrt(EPS) * np.maximum(1, np.abs(middle))
            leaf[entry] = up = middle + h
            above = np.asarray(program(tree.unflatten(leaves), moving, fixed))
            leaf[entry] = down = middle - h
            below = np.asarray(program(tree.unflatten(leaves), moving, fixed))
            leaf[entry] = middle
            slope[entry] = (above - below) / (up - down)
    return tree.unflatten(slopes)


def first_kind(tree: Tree) -> Tree:
    """A copy of the points of the first kind, the random ones."""
    return jax.tree.map(lambda leaf: np.array(leaf[: len(leaf) // len(KINDS)]), tree)


def rows(check: Check, shape: Shape, **errors: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of one check: a row per point, or, without errors, one row for factors that do not multiply."""
    count = len(errors["units"]) if errors else 1
    points = count // len(KINDS)
    names = {"id": check.id, "form": check.form, "series": check.series}
    nothing = {name: np.full(count, np.nan) for name in ("relative", "units", "ratio", "limit", "witness")}
    return {
        **{name: np.full(count, value) for name, value in names.items()},
        "shape": np.full((count, 4), shape),
        "kind": np.repeat(KINDS, points) if errors else np.asarray(["any"]),
        **nothing,
        **errors,
    }


def compare_descents(config: Config, shape: Shape) -> tuple[list[dict[str, np.ndarray]], list[bool]]:
    """F3 and F5: the whole path, and whether the small-step rule stops each where autodiff's path says.

    The lecture's loops look at numbers to stop, so they run step by step, and are compared afterwards.
    """
    n, times = shape[0], np.arange(config.steps)
    minibatches = np.random.default_rng(n).integers(0, n, size=(config.steps, max(1, n // 4)))
    points = dict(linear_family(shape, config).moving)
    points["eta"] = decimals([0.3 / np.linalg.eigvalsh(X.T @ X / n)[-1] for X in points["X"]])
    loss = losses.mean_loss(models.linear, losses.squared)

    def path(moving: Any, _: Any, indices: np.ndarray) -> Any:
        def step(w: Any, at: Any) -> Any:
            t, B = at
            g = jax.grad(lambda w: loss(Linear(w), Batch(moving["X"][B], moving["y"][B])))(w)
            w = w - moving["eta"] / (1 + t) * g
            return w, w

        _, steps = jax.lax.scan(step, moving["w"], (jnp.asarray(times, float), jnp.asarray(indices)))
        return jnp.concatenate([moving["w"][None, :], steps])

    def descent(id: str, m: Any) -> Callable[[Any], Any]:
        etas = [m["eta"] / (1 + t) for t in times]
        if id == "F3":
            gradient = lambda w: lecture.linear_gradient(w, m["X"], m["y"])
            return lambda eps: lecture.gradient_descent(gradient, m["w"], etas, eps)
        batches, gradient = list(jnp.asarray(minibatches)), lecture.linear_gradient
        return lambda eps: lecture.stochastic_gradient_descent(gradient, m["w"], m["X"], m["y"], batches, etas, eps)

    tables, stopped = [], []
    for id, indices in (("F3", np.broadcast_to(np.arange(n), (config.steps, n))), ("F5", minibatches)):
        reference = partial(path, indices=indices)
        paths = np.asarray(jax.jit(jax.vmap(lambda m, f=reference: f(m, {})))(points))
        by_hand = []
        for i, expected in enumerate(paths):
            descend = descent(id, {name: jnp.asarray(leaf[i]) for name, leaf in points.items()})
            by_hand.append(np.asarray(descend(0.0)))
            # eps lies between two middling sizes of a step; the first step that is smaller is the last.
            sizes = np.linalg.norm(np.diff(expected, axis=0), axis=1)
            eps = np.sqrt(np.prod(np.sort(sizes)[config.steps // 2 :][:2]))
            stopped.append(len(descend(eps)) - 1 == np.argmax(sizes < eps) + 1)
        check = Check(id, "path", "must be", lambda _, f: f["path"], "path")
        family = Family(shape, points, {"path": np.stack(by_hand)}, {"path": Reference(reference)}, [check])
        tables += compare(family)
    return tables, stopped


def steepest(shape: Shape, config: Config, directions: int = 1000) -> tuple[float, float]:
    """F2: slopes of the loss along random unit directions and along the step back, in units of `‖∇L‖`.

    Returns the largest of the random ones, and that of `w₀ − w₁`.
    """
    w, X, y = (linear_family(shape, config).moving[name][0] for name in ("w", "X", "y"))
    drawn = normal(np.random.default_rng(0), (directions, shape[1]))
    loss = lambda w: losses.mean_loss(models.linear, losses.squared)(Linear(w), Batch(X, y))

    @jax.jit
    def slopes(w: Any) -> Any:
        back = w - lecture.linear_step(w, X, y)
        along = jnp.concatenate([back[None, :], drawn])
        along = along / jnp.linalg.norm(along, axis=1)[:, None]
        return jax.vmap(lambda u: jax.jvp(loss, (w,), (u,))[1])(along) / jnp.linalg.norm(jax.grad(loss)(w))

    found = np.asarray(slopes(w))
    return float(np.max(found[1:])), float(found[0])


# --- F16 in floating point, logit by logit ---------------------------------------------------------------


FORMS = {
    "printed": lecture.logit_adjoint_as_printed,
    "algebra": lecture.logit_adjoint,
    "must be": lecture.logit_adjoint_signed,
}
DTYPES = ("float64", "float32")
MODES = ("compiled", "op by op")


def logit_curves(points: int) -> dict[str, Any]:
    """Relative error of each form of `dCE/dh` in float64, compiled, over logits from −1000 to 100.

    The truth is decimal arithmetic. Where it is below the smallest normal number, a finite value has error 0.
    """
    h = np.concatenate([-geometric(1000, 0.01, points // 2), geometric(0.01, 100, points // 2)])
    exact = {0: sigmoid(h), 1: -sigmoid(-h)}
    numbers: dict[str, Any] = {"curve/logit": h}
    for series, form in FORMS.items():
        for y, truth in exact.items():
            computed = np.asarray(jax.jit(form)(jnp.full(h.shape, float(y)), jnp.asarray(h)))
            with np.errstate(divide="ignore", invalid="ignore"):
                error = np.abs(computed - truth) / np.abs(truth)
            negligible = (np.abs(truth) < np.finfo(float).tiny) & np.isfinite(computed)
            numbers[f"curve/{series}/y={y}"] = np.where(negligible, 0, error)
    return numbers


def predicted_logits(dtype: str) -> tuple[float, float, float]:
    """Where F16 as printed must fail: `p` rounds to 1; `e⁻ʰ` overflows; `p` is subnormal.

    `1 + e⁻ʰ` rounds to 1 from `e⁻ʰ = 2⁻ᵇ`, with b bits in the significand, so `h = b ln 2`. Each is the
    number of that dtype nearest to a value of 28 digits.
    """
    limits = jnp.finfo(dtype)
    rounds = (limits.nmant + 1) * Decimal(2).ln()
    overflows, subnormal = -Decimal(float(limits.max)).ln(), Decimal(float(limits.tiny)).ln()
    return tuple(float(np.asarray(float(h), dtype)) for h in (rounds, overflows, subnormal))  # type: ignore[return-value]


def first_nan(form: Callable[..., Any], y: int, dtype: str, far: float) -> float:
    """The logit nearest to 0, towards `far`, at which `form` is NaN: bisected to one unit in the last place."""
    label, good, bad = (np.asarray(value, dtype) for value in (y, 0, far))
    while True:
        middle = (good + bad) / np.asarray(2, dtype)
        if middle in (good, bad):
            return float(bad)
        good, bad = (middle, bad) if jnp.isfinite(form(label, middle)) else (good, middle)


def nan_logits() -> dict[str, Any]:
    """Where F16 as printed turns NaN, per dtype, way of running, side (h > 0, h < 0) and label; predictions."""
    ways = {"compiled": jax.jit(lecture.logit_adjoint_as_printed), "op by op": lecture.logit_adjoint_as_printed}
    found = [
        [[[first_nan(ways[mode], y, dtype, far) for y in (0, 1)] for far in (60, -1000)] for mode in MODES]
        for dtype in DTYPES
    ]
    predicted = np.asarray([predicted_logits(dtype) for dtype in DTYPES])
    # Between the two predictions for h < 0 the probability is subnormal. The truth for y = 1 is −1.
    between = predicted[:, 1:].mean(axis=1)
    values = [
        [float(ways[mode](np.asarray(1, dtype), np.asarray(h, dtype))) for mode in MODES]
        for dtype, h in zip(DTYPES, between, strict=True)
    ]
    return {
        "nan/found": np.asarray(found),
        "nan/predicted": predicted,
        "nan/between": between,
        "nan/value_between": np.asarray(values),
    }


def textbook_logloss(h: Any, y: Any) -> Any:
    """`max(h, 0) − yh + log(1 + e^−|h|)`: logloss from the logit as textbooks and libraries write it."""
    return jnp.maximum(h, 0) - y * h + jnp.log1p(jnp.exp(-jnp.abs(h)))


def slopes_at_zero() -> dict[str, Any]:
    """What autodiff makes of logloss at `h = 0`, for y = 0 and 1. The truth is `s(0) − y = ½ − y`.

    There JAX has `d|h|/dh = 1` and `d max(h, 0)/dh = ½`: each a subgradient, and together no longer one.
    """
    labels = jnp.array([0.0, 1.0])
    return {
        f"zero/{name}": np.asarray(jax.vmap(jax.grad(form), (None, 0))(0.0, labels))
        for name, form in (("textbook", textbook_logloss), ("ours", losses.logloss))
    }


# --- The experiment --------------------------------------------------------------------------------------


def run(config: Config, session: Session) -> dict[str, Any]:
    with jax.enable_x64(True):
        tables = []
        for i, shape in enumerate(config.shapes):
            session.say(f"n, d, h, k = {shape} ({i + 1} of {len(config.shapes)})")
            tables += compare(linear_family(shape, config))
            if i % 2 == 0:  # these depend on n and k only, and compile as slowly as the others
                tables += compare(functional_family(shape, config))
            tables += compare(two_layer_family(shape, config, i % len(ACTIVATIONS)))
            tables += compare(deep_family(shape, config, (i + 1) % len(ACTIVATIONS), 1 + (i + 1) % DEPTHS))
            tables += compare(logistic_family(shape, config))
        session.say("descents, step by step")
        more, stopped = compare_descents(config, config.shapes[-1])
        tables += more
        slopes = steepest(config.shapes[-1], config)
        session.say("activations and logits, one by one")
        tables += compare(scalar_family(config))
        return {
            **encoded({name: np.concatenate([table[name] for table in tables]) for name in tables[0]}),
            **logit_curves(config.curve),
            **nan_logits(),
            **slopes_at_zero(),
            "stopped": np.asarray(stopped),
            "slopes": np.asarray(slopes),
            "shapes": np.asarray(config.shapes),
            "seeds": config.seeds,
        }


def encoded(table: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A table for storage: words as numbers into their lists, and errors with the digits that mean something."""
    numbers = {}
    for name, column in table.items():
        if column.dtype.kind == "U":
            words, codes = np.unique(column, return_inverse=True)
            numbers |= {f"row/{name}": codes.astype(np.int8), f"words/{name}": words}
        else:
            numbers[f"row/{name}"] = column.astype(np.int16 if name == "shape" else np.float64)
    return numbers


def chosen(numbers: dict[str, Any], **where: str | Sequence[str]) -> dict[str, np.ndarray]:
    """The columns of the rows whose words are those given (or among them)."""
    words = ("id", "form", "series", "kind")
    table = {name: numbers[f"words/{name}"][numbers[f"row/{name}"]] for name in words}
    table |= {name: numbers[f"row/{name}"] for name in ("shape", "relative", "units", "ratio", "witness")}
    mask = np.logical_and.reduce([np.isin(table[name], value) for name, value in where.items()])
    return {name: column[mask] for name, column in table.items()}


# --- What they show --------------------------------------------------------------------------------------


def worst(numbers: dict[str, Any], id: str, series: str = "must be", **where: Any) -> float:
    """The largest error in units of rounding; infinite if any result is not finite."""
    units = chosen(numbers, id=id, series=series, **where)["units"]
    return float(np.max(np.where(np.isfinite(units), units, np.inf)))


def within(numbers: dict[str, Any], id: str) -> tuple[str, bool]:
    """In words how far the right forms of a formula are from autodiff, and whether that is rounding."""
    most = worst(numbers, id)
    return f"{most:.1f} units of rounding", most <= LIMIT


def products(numbers: dict[str, Any], id: str) -> tuple[int, int, int, bool]:
    """F12 or F13 letter by letter: at how many shapes it does not multiply, is wrong, is right.

    And whether it is right exactly where there is one example and one output (F12) or hidden unit (F13).
    """
    table = chosen(numbers, id=id, series="printed")
    none, wrong, right, as_said = 0, 0, 0, True
    for shape in np.unique(table["shape"], axis=0):
        here = np.all(table["shape"] == shape, axis=1)
        n, _, h, k = shape
        single = n == 1 == (k if id == "F12" else h)
        fits = n == (k if id == "F12" else h)
        if table["kind"][here][0] == "any":
            none, as_said = none + 1, as_said and not fits
        elif np.max(table["units"][here]) <= LIMIT:
            right, as_said = right + 1, as_said and single
        else:
            wrong, as_said = wrong + 1, as_said and fits and not single
    return none, wrong, right, bool(as_said)


def last_places(found: float, predicted: float, dtype: str) -> float:
    """The distance of two numbers in units in the last place."""
    return abs(found - predicted) / float(np.spacing(np.asarray(abs(predicted), dtype)))


def deepest(numbers: dict[str, Any]) -> int:
    """Layers of the deepest net."""
    return min(DEPTHS, len(numbers["shapes"]))


def digits(number: float, dtype: str) -> str:
    """The shortest decimal that is this number of its dtype and no other."""
    return str(np.asarray(number, dtype)[()])


def upper_logits(numbers: dict[str, Any]) -> tuple[str, str, bool]:
    """Where F16 as printed turns NaN for h > 0: found, predicted, and whether they are neighbours at most."""
    found, predicted = numbers["nan/found"][:, :, 0], numbers["nan/predicted"][:, 0]
    same = all(last_places(h, predicted[i], dtype) <= 1 for i, dtype in enumerate(DTYPES) for h in found[i].ravel())
    say = lambda values: ", ".join(f"{digits(h, d)} ({d})" for h, d in zip(values, DTYPES, strict=True))
    return say(found[:, 0, 0]), say(predicted), same


def lower_logits(numbers: dict[str, Any]) -> tuple[str, str, bool]:
    """The same for h < 0: compiled and op by op, each at one of the two predictions."""
    found, predicted = numbers["nan/found"][:, :, 1], numbers["nan/predicted"][:, 1:]
    same = all(
        min(last_places(h, p, dtype) for p in predicted[i]) <= 1
        for i, dtype in enumerate(DTYPES)
        for h in found[i].ravel()
    )
    say = lambda values: ", ".join(
        f"{digits(a, d)} or {digits(b, d)} ({d})" for (a, b), d in zip(values, DTYPES, strict=True)
    )
    return say(found[:, :, 0]), say(predicted), same


def claims(numbers: dict[str, Any]) -> list[Claim]:
    rounding = f"at most {LIMIT} units"
    simple = {
        "F5": "A minibatch gradient is the mean over its indices, one drawn twice counting twice; so is SGD's path",
        "F6": "SGD on linear regression: F4 with the sum over B and 1/b",
        "F7": "MSE, MAE and logloss have these gradients by the predictions",
        "F8": f"Forward values and backprop of nets of 1 to {deepest(numbers)} layers are autodiff's",
        "F9": "The half squared loss has the adjoint Ŷ − Y (over n, for the mean)",
        "F10": "Backprop of the two-layer net by hand is autodiff's gradient",
        "F11": "The chain rule composes derivatives by hand into autodiff's",
    }
    found = [Claim(id, text, within(numbers, id)[0], rounding, within(numbers, id)[1]) for id, text in simple.items()]

    def add(id: str, text: str, measured: str, expected: str, holds: bool) -> None:
        said, right = within(numbers, id)
        found.append(Claim(id, text, f"{said}; {measured}", f"{rounding}; {expected}", bool(right and holds)))

    table = chosen(numbers, id="F1", series="printed")
    off = float(np.max(np.abs(table["ratio"] / table["shape"][:, 0] - 1)))
    add(
        "F1",
        "The gradient of the mean is the mean of the gradients; the sum that some slides have is n times it",
        f"sum/mean is n to {off:.0e}",
        "n",
        off < 1e-12,
    )
    random, back = numbers["slopes"]
    add(
        "F2",
        "L grows fastest along its gradient; the step goes the other way",
        f"steepest of 1,000 directions has {random:.4f} of the gradient's slope",
        "below 1",
        bool(random < 1 and abs(back - 1) < 1e-12),
    )
    stopped = numbers["stopped"]
    add(
        "F3",
        "Descent takes the same path by hand and by autodiff, and stops after the same step",
        f"{stopped.sum()} of {stopped.size} stop together",
        "all",
        bool(stopped.all()),
    )
    ratio = chosen(numbers, id="F4", series="printed")["ratio"]
    add(
        "F4",
        "The factor is 2; the slide's 1/2 in its place gives a quarter of the gradient",
        f"ratio {np.median(ratio):.4g} ± {np.max(np.abs(ratio - 0.25)):.0e}",
        "1/4",
        bool(np.max(np.abs(ratio - 0.25)) < 1e-12),
    )
    for id, what, size, of in (("F12", "dL/dW2", "k", "output"), ("F13", "dL/dW1", "h", "hidden unit")):
        none, wrong, right, as_said = products(numbers, id)
        add(
            id,
            f"{what}, with its factors in the order that multiplies; as printed they need {size} = n and are "
            f"right for one example and one {of} only",
            f"as printed: no product at {none} shapes, wrong at {wrong}, right at {right}",
            f"right only where n = {size} = 1",
            as_said,
        )
    lost = np.max(chosen(numbers, id="F14", series="printed", kind="saturated")["relative"])
    auto = np.max(chosen(numbers, id="F14", series="autodiff", kind="saturated")["relative"])
    add(
        "F14",
        "s′ = s(1 − s); computed so it loses its digits as s nears 1, as does autodiff of s",
        f"so computed, wrong by up to {lost:.0%}, autodiff by {auto:.0%}",
        "100%",
        bool(lost == auto == 1),
    )
    broken = ~np.isfinite(chosen(numbers, id="F15", series="printed", kind="saturated")["relative"])
    add(
        "F15",
        "Logloss from the logit keeps its digits; from p it is NaN or infinite where p rounds to 0 or 1",
        f"from p not finite at {broken.mean():.0%} of saturated logits",
        "some",
        bool(broken.any()),
    )
    printed = chosen(numbers, id="F16", series="printed", kind="saturated")["relative"]
    algebra = chosen(numbers, id="F16", series="algebra")["relative"]
    add(
        "F16",
        "As printed one saturated example makes the gradient NaN; (p − y)x is finite, and "
        "[(1−y)s(h) − y s(−h)]x keeps its digits too",
        f"NaN at {np.mean(~np.isfinite(printed)):.0%} of saturated points; (p − y)x finite everywhere, wrong by up to "
        f"{np.max(algebra):.0%}",
        "NaN at some; finite",
        bool((~np.isfinite(printed)).any() and np.isfinite(algebra).all()),
    )
    unit = np.finfo(float).eps
    both = [[np.maximum(numbers[f"curve/{series}/y={y}"], unit) for series in ("printed", "algebra")] for y in (0, 1)]
    ratios = np.concatenate([printed / algebra for printed, algebra in both])
    ratios = ratios[np.isfinite(ratios)]
    apart = (
        f"errors, counted as a unit of rounding at least, ×{ratios.min():.2g} to ×{ratios.max():.2g} of those of p − y "
        f"at {len(ratios):,} logits"
    )
    textbook, ours = numbers["zero/textbook"], numbers["zero/ours"]
    found.append(
        Claim(
            "F15",
            "At h = 0, where parameters of 0 put every example, autodiff of the textbook's stable form "
            "max(h, 0) − yh + log(1 + e^−|h|) is wrong in JAX; of softplus((1 − 2y)h) it is right",
            f"textbook's {textbook[0]:g} (y = 0) and {textbook[1]:g} (y = 1); softplus {ours[0]:g} and {ours[1]:g}",
            "0.5 and -0.5",
            bool((ours == [0.5, -0.5]).all() and (textbook != ours).all()),
        )
    )
    for text, (measured, expected, same) in (
        (
            "As printed, where it is a number at all, the common factor is as accurate as p − y, for both labels",
            (apart, "×0.25 to ×4", bool(ratios.min() >= 0.25 and ratios.max() <= 4)),
        ),
        ("As printed: NaN for both labels from where p rounds to 1, h = 53 ln 2 or 24 ln 2", upper_logits(numbers)),
        (
            "As printed: NaN for both labels below where e⁻ʰ overflows (compiled), or p is subnormal and flushed "
            "to 0 (op by op)",
            lower_logits(numbers),
        ),
    ):
        found.append(Claim("F16", text, measured, expected, same))
    return sorted(found, key=lambda claim: int(claim.id[1:]))


MARKS = {"random": "o", "trained": "^", "saturated": "s"}
COLOURS = {"must be": plots.BLUE, "printed": plots.VERMILLION, "algebra": plots.GREEN}
EXACT, NAN, NONE = -3.4, 18.7, 21.7
"""Where the left panel, whose axis is the logarithm of the error, has 'none', 'NaN' and 'no product'."""


def draw(numbers: dict[str, Any]) -> Figure:
    figure, axes = plots.figure(2, 2, height=6.4, width_ratios=(1.3, 1), height_ratios=(1.25, 1))
    grid = axes[0].get_gridspec()
    for axis in axes[::2]:
        axis.remove()
    _draw_errors(figure.add_subplot(grid[:, 0]), numbers)
    for axis, y in zip(axes[1::2], (1, 0), strict=True):
        _draw_logits(axis, numbers, y)
    axes[3].set_xlabel("logit h")
    return figure


def _draw_errors(axis: Any, numbers: dict[str, Any]) -> None:
    """One line per formula; one mark per form, shape and kind of point: the worst of its points."""
    ids = list(NAMES)
    axis.axvspan(np.log10(LIMIT), 17.6, color=plots.VERMILLION, alpha=0.07, linewidth=0)
    lifts = {"must be": -0.22, "algebra": 0.02, "printed": 0.26}
    for (place, id), (series, lift) in itertools.product(enumerate(ids), lifts.items()):
        table = chosen(numbers, id=id, series=series)
        style: dict[str, Any] = {"color": COLOURS[series], "linestyle": "none", "alpha": 0.75, "zorder": 3}
        for i, (kind, mark) in enumerate(MARKS.items()):
            here = table["kind"] == kind
            groups = zip(table["form"][here], map(tuple, table["shape"][here]), table["units"][here], strict=True)
            largest: dict[Any, float] = {}
            for form, shape, units in groups:
                value = np.log10(max(units, 1e-99)) if np.isfinite(units) else NAN
                largest[form, shape] = max(largest.get((form, shape), EXACT), value)
            heights = np.full(len(largest), place + lift + 0.11 * (i - 1))
            axis.plot(list(largest.values()), heights, mark, markersize=4.6, markeredgewidth=0, **style)
        if (table["kind"] == "any").any():
            axis.plot(NONE, place + lift, "x", markersize=5, **style)
    axis.set_ylim(len(ids) - 0.45, -0.6)
    axis.set_yticks(range(len(ids)), [f"{name}  {id}" for id, name in NAMES.items()])
    axis.tick_params(axis="y", length=0)
    axis.set_xlim(-4.3, 23.4)
    ticks = {EXACT: "0", 0: "1", 5: "10⁵", 10: "10¹⁰", 15: "10¹⁵", NAN: "NaN", NONE: "no\nproduct"}
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xlabel("distance from autodiff, units of rounding")
    axis.set_title("Each formula against autodiff")
    axis.text(
        9.6, 4.55, f"not rounding: more than {LIMIT} units", ha="center", fontsize=9, color=plots.ink(plots.VERMILLION)
    )
    for series, text in (("must be", "as it must be"), ("printed", "as printed"), ("algebra", "F16 as (p − y) x")):
        axis.plot([], [], color=COLOURS[series], linewidth=4, label=text)
    for kind, mark in MARKS.items():
        axis.plot([], [], mark, color=plots.GREY, markersize=5, label=f"{kind} points")
    axis.legend(loc="center", bbox_to_anchor=(9.6, 7), bbox_transform=axis.transData)


def _draw_logits(axis: Any, numbers: dict[str, Any], y: int) -> None:
    """Relative error of the forms of F16's common factor over the logit, for one label."""
    h, floor, beside = numbers["curve/logit"], 1e-16, 4
    rounds, overflows, _ = numbers["nan/predicted"][0]
    for series, width in (("printed", 5.0), ("algebra", 2.4), ("must be", 1.6)):
        error = np.maximum(numbers[f"curve/{series}/y={y}"], floor)
        # Rounding errors jump about: draw the largest of a few neighbours, and nothing where it is NaN.
        padded = np.pad(np.nan_to_num(error), beside, mode="edge")
        upper = np.max(np.lib.stride_tricks.sliding_window_view(padded, 2 * beside + 1), axis=1)
        upper = np.where(np.isfinite(error), upper, np.nan)
        faint = 0.5 if series == "printed" else 1.0
        axis.plot(h[::3], upper[::3], color=COLOURS[series], linewidth=width, alpha=faint)
    red = plots.ink(plots.VERMILLION)
    for logit, end, text, side, shift in (
        (rounds, 100, f"NaN from\n53 ln 2 = {rounds:.2f}", "right", -5),
        (overflows, -1000, f"NaN below\n−{abs(overflows):.2f}", "left", 5),
    ):
        axis.axvspan(logit, end, color=plots.VERMILLION, alpha=0.16, linewidth=0)
        axis.axvline(logit, color=plots.VERMILLION, linestyle="--", linewidth=1)
        _note(axis, text, (logit, 1e5), red, (shift, 0), ha=side, va="top")
    if y == 1:
        _note(axis, "as printed, and p − y", (18, 1e-8), red, (-8, 0), ha="right")
        _note(axis, "(1−y) s(h) − y s(−h)", (-45, 2e-15), plots.ink(plots.BLUE), (0, 0), ha="center")
    axis.set_xscale("symlog", linthresh=10)
    axis.set_xlim(-1000, 100)
    axis.set_xticks([-100, -10, 0, 10], ["−100", "−10", "0", "10"])
    axis.set_yscale("log")
    axis.set_ylim(floor / 2, 2e5)
    axis.set_yticks([floor, 1e-12, 1e-8, 1e-4, 1], ["10⁻¹⁶", "10⁻¹²", "10⁻⁸", "10⁻⁴", "1"])
    axis.minorticks_off()
    axis.set_title(f"F16: dCE/dh, label y = {y}")
    axis.set_ylabel("relative error")


def _note(axis: Any, text: str, at: tuple[float, float], colour: Any, shift: tuple[float, float], **align: str) -> None:
    axis.annotate(text, at, xytext=shift, textcoords="offset points", fontsize=9, color=colour, **align)


# --- The report ------------------------------------------------------------------------------------------


FORMULAS = {
    "F1": ("`(1/n) Σ L(w, xᵢ, yᵢ)`; some slides drop the 1/n", "`(1/n) Σ ∇L(w, xᵢ, yᵢ)`"),
    "F2": ("`w₁ = w₀ − η ∇L(w₀)`", "as printed"),
    "F3": ("`wₜ = wₜ₋₁ − ηₜ gₜ`, stop if `‖wₜ − wₜ₋₁‖ < ε`", "as printed"),
    "F4": ("`−2 (1/n) Σ (yᵢ − xᵢᵀw) xᵢ`; one slide has 1/2 for the 2", "with the 2"),
    "F5": ("`(1/b) Σ_{j∈B} ∇L(w, xⱼ, yⱼ)`", "as printed"),
    "F6": ("`−2 (1/b) Σ_{j∈B} (yⱼ − xⱼᵀw) xⱼ`", "as printed"),
    "F7": ("MSE, MAE, logloss", "`−(2/n)(y − ŷ)`, `−(1/n) sign(y − ŷ)`, `(1/n) dCE/dp`"),
    "F8": ("`X → f(XW₁) → f(XW₁)W₂ → … → ŷ`", "as printed, and backprop through it"),
    "F9": ("`½ (y − ŷ)²`", "`dL/dŶ = (1/n)(Ŷ − Y)`"),
    "F10": ("`½ (y − f(XW₁)W₂)²`", "`(1/n) ½ ‖Y − f(XW₁)W₂‖²`, by backprop"),
    "F11": ("`f(g(x))′ = f′(g(x)) g′(x)`", "as printed"),
    "F12": ("`−(y − f(XW₁)W₂) f(XW₁)`", "`(1/n) f(XW₁)ᵀ(Ŷ − Y)`"),
    "F13": ("`−(y − f(XW₁)W₂) W₂ᵀ f′(XW₁) X`, as a second `dL/dW₂`", "`dL/dW₁ = (1/n) Xᵀ[((Ŷ − Y)W₂ᵀ) * f′(XW₁)]`"),
    "F14": ("`s′ = s(1 − s)`", "`s′ = e/(1 + e)²` with `e = exp(−abs(h))`"),
    "F15": ("`−[y log p + (1−y) log(1−p)]`", "`y log(1 + e⁻ʰ) + (1−y) log(1 + eʰ)`"),
    "F16": ("`−[y/p − (1−y)/(1−p)] s(h)(1−s(h)) x`", "`[(1−y) s(h) − y s(−h)] x`"),
}
"""What the lecture prints, and what is computed in its place."""


def report(numbers: dict[str, Any]) -> str:
    lines = [
        "| id | as the lecture has it | which is | as it must be | random | trained | saturated | third witness |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for id, (printed, right) in FORMULAS.items():
        errors = [f"{worst(numbers, id, kind=kind):.1f}" for kind in KINDS]
        seen = chosen(numbers, id=id, series="must be", kind="random")["witness"]
        third = f"{np.nanmedian(seen):.0e}" if np.isfinite(seen).any() else "–"
        lines.append(f"| {' | '.join([id, printed, verdict(numbers, id), right, *errors, third])} |")
    between = numbers["nan/value_between"]
    shapes = ", ".join(f"({', '.join(map(str, shape))})" for shape in numbers["shapes"])
    return "\n\n".join(
        [
            "Left: for each formula, form, shape and kind of point, its worst point. Right: F16's common factor, "
            "one logit at a time, in float64, against decimal arithmetic.",
            "\n".join(lines),
            f"The last columns: the largest distance of the right form from autodiff in units of rounding, per kind "
            f"of point, and the median relative error of central differences, the third witness, at random points. "
            f"One unit is how far the exact result moves when every input and the result are rounded once; autodiff's "
            f"own rounding counts too. "
            f"Float64; (n, d, h, k) = {shapes}; {numbers['seeds']} points of each kind; nets of 1 to "
            f"{deepest(numbers)} layers; sigmoid, tanh and ReLU.",
            "Where F16 as printed turns NaN, found by bisection to the last place, for both labels:",
            "\n".join(nan_table(numbers)),
            f"Just above the overflow, where `p` is subnormal and so rounded to 0, the truth for y = 1 is −1: there, "
            f"at h = {numbers['nan/between'][0]:.2f} in float64, the printed form gives {said(between[0, 0])} "
            f"compiled and {said(between[0, 1])} op by op.",
        ]
    )


def verdict(numbers: dict[str, Any], id: str) -> str:
    """In words what the printed form is, from its errors."""
    table = chosen(numbers, id=id, series="printed")
    if id in ("F12", "F13"):
        none, wrong, right, _ = products(numbers, id)
        return f"no product at {none} shapes, wrong at {wrong}, right at {right}"
    if id in ("F1", "F4"):
        factor = np.median(table["ratio"] / (table["shape"][:, 0] if id == "F1" else 1))
        return f"{'n' if id == 'F1' else 1} × {factor:.3g} times the gradient".replace("n × 1 ", "n ").replace(
            "1 × ", ""
        )
    if not table["units"].size:
        return "right"
    saturated = table["relative"][table["kind"] == "saturated"]
    lost, broken = np.nanmax(np.where(np.isfinite(saturated), saturated, np.nan)), np.mean(~np.isfinite(saturated))
    return f"right on paper; at saturated points wrong by up to {lost:.0%}" + (
        f", NaN or inf at {broken:.0%}" if broken else ""
    )


def nan_table(numbers: dict[str, Any]) -> list[str]:
    lines = [
        "| | h > 0 | predicted | h < 0, compiled | predicted | h < 0, op by op | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, dtype in enumerate(DTYPES):
        found, (rounds, overflows, subnormal) = numbers["nan/found"][i, :, :, 0], numbers["nan/predicted"][i]
        cells = (found[0, 0], rounds, found[0, 1], overflows, found[1, 1], subnormal)
        lines.append(f"| {dtype} | {' | '.join(digits(cell, dtype) for cell in cells)} |")
    return lines


def said(value: float) -> str:
    return "NaN" if np.isnan(value) else f"{value + 0:g}"


def headline(numbers: dict[str, Any]) -> str:
    most = max(worst(numbers, id) for id in NAMES)
    return (
        f"**The formulas.** As they must be, all {len(NAMES)} agree with autodiff to {most:.0f} units of rounding or "
        f"better. As the lecture prints them, the two gradients of the net multiply only at special shapes, one slide "
        f"has a quarter of the gradient, and logistic regression by backprop is NaN for every logit from "
        f"{numbers['nan/found'][0, 0, 0, 0]:.6g} (float64) or {numbers['nan/found'][1, 0, 0, 0]:.6g} (float32)."
    )


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
