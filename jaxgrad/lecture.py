"""The lecture's formulas F1–F16, differentiated by hand: matrix form, `jax.numpy` and nothing else.

Nothing here asks for a derivative, and nothing here uses the package's models or losses, so that agreement
with them is agreement between two routes. Where the lecture's formula is incomplete, misprinted or unstable
it is here twice: as printed (`_as_printed`, `_slide_half`: F4's slide with 1/2, F12, F13, F14's derivative,
F15, F16) and as it must be.

Letters: n examples, d features, h hidden units, k outputs, b batch size. Rows of `X[n, d]` are examples.
**The mean over examples is the convention** (F1); a function whose name ends in `_sum` computes the sum,
whose gradient is n times larger. What the lecture states for one example is both, at n = 1. A bias is
optional everywhere: `None` in the parameters, and then `None` in the gradient.

Labels and targets have the dtype of the inputs. Every function is pure and works under `jit` and `vmap`, but
for the two loops of F3 and F5, which stop by looking at numbers.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgrad import checks
from jaxgrad.checks import Bound, Number, checked
from jaxgrad.types import Deep, Layer, Linear, TwoLayer

Adjoints = dict[str, Array]
"""`dL/dv` for each value `v` that the forward pass kept, by its name, from the loss backwards."""


# --- F1–F3: the objective, the direction, gradient descent ------------------------------------------------


@checked
def objective(losses: Callable[[Any, Any, Any], Array], w: Any, X: Any, Y: Any) -> Float[Array, ""]:
    """F1. `L(w) = (1/n) Σᵢ L(w, xᵢ, yᵢ)`, with `losses(w, X, Y) -> [n]` the terms of the sum."""
    return jnp.mean(losses(w, X, Y))


@checked
def objective_sum(losses: Callable[[Any, Any, Any], Array], w: Any, X: Any, Y: Any) -> Float[Array, ""]:
    """F1 without its 1/n, as some slides have it: `Σᵢ L(w, xᵢ, yᵢ)`. Another loss, n times larger."""
    return jnp.sum(losses(w, X, Y))


@checked
def objective_gradient(gradients: Callable[[Any, Any, Any], Array], w: Any, X: Any, Y: Any) -> Array:
    """F1, F3. `g = (1/n) Σᵢ ∇L(w, xᵢ, yᵢ)`, with `gradients(w, X, Y) -> [n, *w.shape]` the terms."""
    return jnp.mean(gradients(w, X, Y), axis=0)


@checked
def objective_gradient_sum(gradients: Callable[[Any, Any, Any], Array], w: Any, X: Any, Y: Any) -> Array:
    """F1 without its 1/n: `Σᵢ ∇L(w, xᵢ, yᵢ)`, n times the gradient of the mean."""
    return jnp.sum(gradients(w, X, Y), axis=0)


@checked
def step(w: Float[Array, "*p"], gradient: Float[Array, "*p"], eta: Number) -> Float[Array, "*p"]:
    """F2, F3. `w₁ = w₀ − η ∇L(w₀)`: `L` grows fastest along its gradient, so step the other way."""
    return w - eta * gradient


@checked
def small_step(new: Float[Array, "*p"], old: Float[Array, "*p"], eps: Bound) -> Bool[Array, ""]:
    """F3's stopping rule. `‖wₜ − wₜ₋₁‖ < ε`."""
    return jnp.sqrt(jnp.sum((new - old) ** 2)) < eps


@checked
def gradient_descent(
    gradient: Callable[[Array], Array], w: Float[Array, "*p"], etas: Iterable[Any], eps: Bound
) -> Float[Array, "steps_and_start *p"]:
    """F3. `wₜ = wₜ₋₁ − ηₜ gₜ` until `‖wₜ − wₜ₋₁‖ < ε` or the budget `etas` is spent.

    `gradient(w)` is the mean over all examples. Returns the path `w₀, w₁, …`: one row per step taken, after
    the start.
    """
    path = [w]
    for eta in etas:
        path.append(step(path[-1], gradient(path[-1]), eta))
        if small_step(path[-1], path[-2], eps):
            break
    return jnp.stack(path)


# --- F4: linear regression --------------------------------------------------------------------------------


@checked
def linear_losses(w: Float[Array, " d"], X: Float[Array, "n d"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    """F4, one term per example. `(yᵢ − xᵢᵀw)²`."""
    return (y - X @ w) ** 2


@checked
def linear_gradients(w: Float[Array, " d"], X: Float[Array, "n d"], y: Float[Array, " n"]) -> Float[Array, "n d"]:
    """F4, one row per example. `−2 (yᵢ − xᵢᵀw) xᵢ`."""
    return -2 * (y - X @ w)[:, None] * X


@checked
def linear_loss(w: Float[Array, " d"], X: Float[Array, "n d"], y: Float[Array, " n"]) -> Float[Array, ""]:
    """F4. `L(w) = (1/n) Σᵢ (yᵢ − xᵢᵀw)²`. A bias is a column of ones in `X`."""
    return jnp.mean(linear_losses(w, X, y))


@checked
def linear_gradient(w: Float[Array, " d"], X: Float[Array, "n d"], y: Float[Array, " n"]) -> Float[Array, " d"]:
    """F4. `∇L(w) = −2 (1/n) Σᵢ (yᵢ − xᵢᵀw) xᵢ = −(2/n) Xᵀ(y − Xw)`, the mean over examples."""
    return -2 / X.shape[0] * (X.T @ (y - X @ w))


@checked
def linear_gradient_slide_half(
    w: Float[Array, " d"], X: Float[Array, "n d"], y: Float[Array, " n"]
) -> Float[Array, " d"]:
    """F4 as one slide prints it: `−½ (1/n) Σᵢ (yᵢ − xᵢᵀw) xᵢ`, with 1/2 in the place of the 2.

    Not the gradient of F4's loss: a quarter of it, exactly.
    """
    return -1 / 2 / X.shape[0] * (X.T @ (y - X @ w))


@checked
def linear_step(
    w: Float[Array, " d"], X: Float[Array, "n d"], y: Float[Array, " n"], eta: Number = 0.001
) -> Float[Array, " d"]:
    """F4's step, with the lecture's `η = 0.001`. `w + 2η (1/n) Σᵢ (yᵢ − xᵢᵀw) xᵢ`."""
    return step(w, linear_gradient(w, X, y), eta)


# --- F5, F6: stochastic gradient descent ------------------------------------------------------------------


@checked
def minibatch_gradient(
    gradient: Callable[[Any, Any, Any], Any], w: Any, X: Float[Array, "n d"], Y: Any, B: Int[Array, " b"]
) -> Any:
    """F5. `g = (1/b) Σ_{j∈B} ∇L(w, xⱼ, yⱼ)`, the mean over the batch: an index drawn twice counts twice.

    `gradient(w, X, Y)` is the mean over the examples it is given, like every gradient of this module.
    Raises ValueError if `B` is empty.
    """
    if B.shape[0] == 0:
        raise ValueError("B is empty: a minibatch needs at least one index (F5 has 1 <= b < n)")
    checks.inside("B", B, X.shape[0])
    return gradient(w, X[B], Y[B])


@checked
def stochastic_gradient_descent(
    gradient: Callable[[Any, Any, Any], Array],
    w: Float[Array, "*p"],
    X: Float[Array, "n d"],
    Y: Any,
    batches: Iterable[Int[Array, " _"]],
    etas: Iterable[Any],
    eps: Bound,
) -> Float[Array, "steps_and_start *p"]:
    """F5. F3 with `gₜ = (1/b) Σ_{j∈Bₜ} ∇L(w, xⱼ, yⱼ)`: the same step and the same stop.

    How the indices `Bₜ` are drawn the lecture leaves open; they are given, one array per `ηₜ`.
    Returns the path as `gradient_descent` does.
    """
    path = [w]
    for B, eta in zip(batches, etas, strict=True):
        path.append(step(path[-1], minibatch_gradient(gradient, path[-1], X, Y, B), eta))
        if small_step(path[-1], path[-2], eps):
            break
    return jnp.stack(path)


@checked
def linear_minibatch_gradient(
    w: Float[Array, " d"], X: Float[Array, "n d"], y: Float[Array, " n"], B: Int[Array, " b"]
) -> Float[Array, " d"]:
    """F6. `−2 (1/b) Σ_{j∈B} (yⱼ − xⱼᵀw) xⱼ`: F4 with the sum over `B` and 1/b."""
    return minibatch_gradient(linear_gradient, w, X, y, B)


@checked
def linear_minibatch_step(
    w: Float[Array, " d"],
    X: Float[Array, "n d"],
    y: Float[Array, " n"],
    B: Int[Array, " b"],
    eta: Number = 0.001,
) -> Float[Array, " d"]:
    """F6's step. `w + 2η (1/b) Σ_{j∈B} (yⱼ − xⱼᵀw) xⱼ`."""
    return step(w, linear_minibatch_gradient(w, X, y, B), eta)


# --- F7: functionals, with the gradient by the predictions ------------------------------------------------


@checked
def mean_squared_error(y_hat: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, ""]:
    """F7, MSE. `(1/n) Σᵢ (yᵢ − ŷᵢ)²`."""
    return jnp.mean((y - y_hat) ** 2)


@checked
def mean_squared_error_gradient(y_hat: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    """F7, MSE. `∂/∂ŷᵢ = −(2/n)(yᵢ − ŷᵢ)`."""
    return -2 / y.shape[0] * (y - y_hat)


@checked
def mean_absolute_error(y_hat: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, ""]:
    """F7, MAE. `(1/n) Σᵢ |yᵢ − ŷᵢ|`."""
    return jnp.mean(jnp.abs(y - y_hat))


@checked
def mean_absolute_error_gradient(y_hat: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    """F7, MAE. `∂/∂ŷᵢ = −(1/n) sign(yᵢ − ŷᵢ)`: where `ŷᵢ = yᵢ` there is no derivative, and the subgradient
    of least size, 0, stands for it."""
    return -1 / y.shape[0] * jnp.sign(y - y_hat)


@checked
def logloss(p: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, ""]:
    """F7, logloss. `(1/n) Σᵢ CE(yᵢ, pᵢ)` with F15's CE, from probabilities `0 < p < 1`."""
    return jnp.mean(cross_entropy_as_printed(y, p))


@checked
def logloss_gradient(p: Float[Array, " n"], y: Float[Array, " n"]) -> Float[Array, " n"]:
    """F7, logloss. `∂/∂pᵢ = (1/n) dCE/dp(yᵢ, pᵢ)` with F15's derivative."""
    return cross_entropy_derivative_as_printed(y, p) / y.shape[0]


# --- F11, F14: the chain rule and activations as pairs (f, f') --------------------------------------------


class Activation(NamedTuple):
    """A function of one number, applied elementwise, with its derivative: both `[*s] -> [*s]`."""

    f: Callable[[Any], Array]
    derivative: Callable[[Any], Array]


@checked
def chain_rule(outer: Activation, inner: Activation) -> Activation:
    """F11. `f(g(x))′ = f′(g(x)) g′(x)`, for `f = outer` and `g = inner`."""
    return Activation(
        lambda x: outer.f(inner.f(x)),
        lambda x: outer.derivative(inner.f(x)) * inner.derivative(x),
    )


@checked
def sigmoid_as_printed(h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F14. `s(h) = 1/(1 + e⁻ʰ)`. Right to rounding, until `e⁻ʰ` overflows (h < −709.78 in float64)."""
    return 1 / (1 + jnp.exp(-h))


@checked
def sigmoid_derivative_as_printed(h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F14. `s′(h) = s(h)(1 − s(h))`.

    For large `h > 0` the subtraction cancels: the relative error is about `eps·eʰ`, and from
    `h = 53 ln 2 = 36.74` (float64; `24 ln 2 = 16.64` in float32) the value is 0.
    """
    s = sigmoid_as_printed(h)
    return s * (1 - s)


@checked
def sigmoid(h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F14 as it must be. `s(h) = 1/(1 + e⁻ʰ)` for `h ≥ 0` and `eʰ/(1 + eʰ)` below: nothing overflows."""
    e = jnp.exp(-_magnitude(h))
    return jnp.where(h >= 0, 1, e) / (1 + e)


@checked
def sigmoid_derivative(h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F14 as it must be. `s′(h) = e⁻|ʰ|/(1 + e⁻|ʰ|)²`: equal to `s(h)(1 − s(h))`, with nothing to cancel."""
    e = jnp.exp(-_magnitude(h))
    return e / (1 + e) ** 2


@checked
def tanh_derivative(z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`tanh′(z) = 1 − tanh²(z) = 4e⁻²|ᶻ|/(1 + e⁻²|ᶻ|)²`, the latter without cancellation."""
    return 4 * sigmoid_derivative(2 * z)


@checked
def relu(z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`max(z, 0)`."""
    return jnp.where(z > 0, z, 0)


@checked
def relu_derivative(z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """1 for `z > 0`, else 0; at the kink `z = 0` the subgradient 0."""
    return (z > 0).astype(z.dtype)


def _magnitude(h: Array) -> Array:
    """`|h|`, in a form that differentiates to 1 at 0, where `sigmoid` then has its derivative 1/4 too."""
    return jnp.where(h >= 0, h, -h)


SIGMOID = Activation(sigmoid, sigmoid_derivative)
TANH = Activation(jnp.tanh, tanh_derivative)
RELU = Activation(relu, relu_derivative)


# --- F8–F10: the net and its loss -------------------------------------------------------------------------


class Forward(NamedTuple):
    """What the forward pass of a net of m layers keeps, and the backward pass needs."""

    A: tuple[Array, ...]
    """`A₀ = X, A₁ = f(Z₁), …, Aₘ₋₁`: what each layer received, `[n, d_l]`."""
    Z: tuple[Array, ...]
    """`Z₁, …, Zₘ`, what each layer made before its activation, `[n, d_{l+1}]`; `Zₘ` is the prediction `Ŷ`."""

    @property
    def Y_hat(self) -> Array:
        """The prediction `Ŷ[n, k]`."""
        return self.Z[-1]


@checked
def forward(layers: Deep, X: Float[Array, "n d"], f: Activation = SIGMOID) -> Forward:
    """F8. `X → XW₁ → f(XW₁) → f(XW₁)W₂ → … → Ŷ`, any depth, the last layer without an activation.

    With biases `Zₗ = Aₗ₋₁Wₗ + 1bₗᵀ`.
    """
    A, Z = [X], [_affine(X, layers[0])]
    for layer in layers[1:]:
        A.append(f.f(Z[-1]))
        Z.append(_affine(A[-1], layer))
    return Forward(tuple(A), tuple(Z))


@checked
def two_layer_forward(params: TwoLayer, X: Float[Array, "n d"], f: Activation = SIGMOID) -> Forward:
    """F8 with two layers. `Ŷ = f(XW₁)W₂`: keeps `A = (X, f(XW₁))` and `Z = (XW₁, Ŷ)`."""
    return forward(_layers(params), X, f)


@checked
def half_squared_errors(Y_hat: Float[Array, "n k"], Y: Float[Array, "n k"]) -> Float[Array, " n"]:
    """F9, one term per example. `½ ‖yᵢ − ŷᵢ‖²`, the sum over the k outputs."""
    return jnp.sum((Y - Y_hat) ** 2, axis=1) / 2


@checked
def half_squared_adjoint(Y_hat: Float[Array, "n k"], Y: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """F9. `dL/dŶ = (1/n)(Ŷ − Y)` for the mean over examples."""
    return (Y_hat - Y) / Y.shape[0]


@checked
def half_squared_adjoint_sum(Y_hat: Float[Array, "n k"], Y: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """F9. `dL/dŶ = Ŷ − Y` for the sum over examples, which is the lecture's loss of one example at n = 1."""
    return Y_hat - Y


@checked
def two_layer_loss(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, ""]:
    """F10. `L(W₁, W₂) = (1/n) ½ ‖Y − f(XW₁)W₂‖²`, the mean over examples."""
    return jnp.mean(half_squared_errors(two_layer_forward(params, X, f).Y_hat, Y))


@checked
def two_layer_loss_sum(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, ""]:
    """F10 as printed. `L(W₁, W₂) = ½ ‖Y − f(XW₁)W₂‖²`: one example, or the sum over several."""
    return jnp.sum(half_squared_errors(two_layer_forward(params, X, f).Y_hat, Y))


# --- F12, F13: the gradients of the two-layer net ---------------------------------------------------------


@checked
def output_layer_gradient_as_printed(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, "k h"]:
    """F12 letter by letter. `dL/dW₂ = −(y − f(XW₁)W₂) f(XW₁)`: a matrix `[n, k]` times a matrix `[n, h]`.

    The factors multiply only when k = n. For one example with one output (n = k = 1) the entries are those of
    `dL/dW₂`, as a row instead of a column; for k = n > 1 they are not, whatever their shape.
    Raises ValueError when k ≠ n.
    """
    values = two_layer_forward(params, X, f)
    (n, k), h = Y.shape, values.A[1].shape[1]
    if k != n:
        raise ValueError(
            f"F12 as printed does not multiply: (y − f(XW1)W2) is [n, k] = [{n}, {k}] and f(XW1) is "
            f"[n, h] = [{n}, {h}], so k must equal n; output_layer_gradient is the form for any shape"
        )
    return -(Y - values.Y_hat) @ values.A[1]


@checked
def output_layer_gradient_one_example(
    params: TwoLayer, x: Float[Array, " d"], y: Float[Array, " k"], f: Activation = SIGMOID
) -> Float[Array, "k h"]:
    """F12 read for one example. `−(y − f(xW₁)W₂) ⊗ f(xW₁)`: the printed factors in the printed order.

    The product that makes sense of them is the outer one, and gives the **transpose** of `dL/dW₂[h, k]`.
    """
    values = two_layer_forward(params, x[None, :], f)
    return jnp.outer(-(y - values.Y_hat[0]), values.A[1][0])


@checked
def output_layer_gradient(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, "h k"]:
    """F12 as it must be. `dL/dW₂ = (1/n) f(XW₁)ᵀ(Ŷ − Y)`, the mean over examples."""
    return output_layer_gradient_sum(params, X, Y, f) / X.shape[0]


@checked
def output_layer_gradient_sum(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, "h k"]:
    """F12 as it must be, for F10 as printed. `dL/dW₂ = f(XW₁)ᵀ(Ŷ − Y)`, the sum over examples."""
    values = two_layer_forward(params, X, f)
    return values.A[1].T @ (values.Y_hat - Y)


@checked
def hidden_layer_gradient_as_printed(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, "n d"]:
    """F13 letter by letter. `−(y − f(XW₁)W₂) W₂ᵀ f′(XW₁) X`, printed as a second `dL/dW₂`; it is `dL/dW₁`.

    As matrices `[n, k][k, h][n, h][n, d]`: they multiply only when h = n. For one example with one hidden
    unit (n = h = 1) the entries are those of `dL/dW₁`, as a row instead of a column; for h = n > 1 they are
    not, whatever their shape.
    Raises ValueError when h ≠ n.
    """
    values = two_layer_forward(params, X, f)
    n, h = values.Z[0].shape
    if h != n:
        raise ValueError(
            f"F13 as printed does not multiply: (y − f(XW1)W2)W2ᵀ is [n, h] = [{n}, {h}] and so is f'(XW1), "
            "so h must equal n; hidden_layer_gradient is the form for any shape"
        )
    return -(Y - values.Y_hat) @ params.W2.T @ f.derivative(values.Z[0]) @ X


@checked
def hidden_layer_gradient_one_example(
    params: TwoLayer, x: Float[Array, " d"], y: Float[Array, " k"], f: Activation = SIGMOID
) -> Float[Array, "h d"]:
    """F13 read for one example. `[−(y − f(xW₁)W₂) W₂ᵀ * f′(xW₁)] ⊗ x`: the printed factors in order.

    `f′` multiplies elementwise (it is the diagonal of the Jacobian of `f`) and `x` by the outer product. The
    result is the **transpose** of `dL/dW₁[d, h]`.
    """
    values = two_layer_forward(params, x[None, :], f)
    return jnp.outer((-(y - values.Y_hat[0]) @ params.W2.T) * f.derivative(values.Z[0][0]), x)


@checked
def hidden_layer_gradient(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, "d h"]:
    """F13 as it must be. `dL/dW₁ = (1/n) Xᵀ[((Ŷ − Y) W₂ᵀ) * f′(XW₁)]`, the mean over examples."""
    return hidden_layer_gradient_sum(params, X, Y, f) / X.shape[0]


@checked
def hidden_layer_gradient_sum(
    params: TwoLayer, X: Float[Array, "n d"], Y: Float[Array, "n k"], f: Activation = SIGMOID
) -> Float[Array, "d h"]:
    """F13 as it must be, for F10 as printed. `dL/dW₁ = Xᵀ[((Ŷ − Y) W₂ᵀ) * f′(XW₁)]`, the sum."""
    values = two_layer_forward(params, X, f)
    return X.T @ (((values.Y_hat - Y) @ params.W2.T) * f.derivative(values.Z[0]))


@checked
def two_layer_backprop(
    params: TwoLayer,
    X: Float[Array, "n d"],
    Y: Float[Array, "n k"],
    f: Activation = SIGMOID,
    output_adjoint: Callable[[Array, Array], Array] = half_squared_adjoint,
) -> tuple[TwoLayer, Adjoints]:
    """F12 and F13 by backprop: `(gradient, adjoints)`, with the shared work done once.

        dŶ  = dL/dŶ                              [n, k]   output_adjoint(Ŷ, Y)
        dW₂ = f(XW₁)ᵀ dŶ,   db₂ = Σᵢ dŶᵢ         [h, k], [k]
        dA₁ = dŶ W₂ᵀ                             [n, h]
        dZ₁ = dA₁ * f′(Z₁)                       [n, h]
        dW₁ = Xᵀ dZ₁,       db₁ = Σᵢ dZ₁ᵢ        [d, h], [h]

    The convention (mean, or the lecture's sum) and the loss enter through `output_adjoint` alone: the default
    is the mean of F9; `half_squared_adjoint_sum`, `softmax_adjoint` and `logistic_adjoint` are others.
    The adjoints are those of `Y_hat`, `A1` and `Z1`, from the loss backwards.
    """
    (layer_1, layer_2), adjoints = deep_backprop(_layers(params), X, Y, f, output_adjoint)
    return TwoLayer(layer_1.W, layer_2.W, layer_1.b, layer_2.b), adjoints


@checked
def deep_backprop(
    layers: Deep,
    X: Float[Array, "n d"],
    Y: Float[Array, "n k"],
    f: Activation = SIGMOID,
    output_adjoint: Callable[[Array, Array], Array] = half_squared_adjoint,
) -> tuple[Deep, Adjoints]:
    """F8's dots, differentiated: `(gradient, adjoints)` of a net of any depth m.

        dZₘ = dL/dŶ                              output_adjoint(Ŷ, Y), with Ŷ = Zₘ
        dWₗ = Aₗ₋₁ᵀ dZₗ,    dbₗ = Σᵢ dZₗᵢ        l = m, …, 1
        dAₗ₋₁ = dZₗ Wₗᵀ,    dZₗ₋₁ = dAₗ₋₁ * f′(Zₗ₋₁)

    The forward values are kept, then each adjoint is made from the one after it: work in proportion to m.
    The adjoints are those of `Y_hat`, then `A{l}` and `Z{l}` down to `Z1`.
    """
    values = forward(layers, X, f)
    dZ = output_adjoint(values.Y_hat, Y)
    gradient, adjoints = [], {"Y_hat": dZ}
    for l in range(len(layers), 0, -1):
        layer = layers[l - 1]
        gradient.append(Layer(values.A[l - 1].T @ dZ, None if layer.b is None else jnp.sum(dZ, axis=0)))
        if l > 1:
            dA = dZ @ layer.W.T
            dZ = dA * f.derivative(values.Z[l - 2])
            adjoints |= {f"A{l - 1}": dA, f"Z{l - 1}": dZ}
    return tuple(reversed(gradient)), adjoints


def _layers(params: TwoLayer) -> Deep:
    return Layer(params.W1, params.b1), Layer(params.W2, params.b2)


def _affine(A: Array, layer: Layer) -> Array:
    return A @ layer.W if layer.b is None else A @ layer.W + layer.b[None, :]


# --- F15, F16: logloss and logistic regression ------------------------------------------------------------


@checked
def cross_entropy_as_printed(y: Float[Array, "*s"], p: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F15, per example. `CE(y, p) = −[y log p + (1−y) log(1−p)]`: NaN or inf once p rounds to 0 or 1."""
    return -(y * jnp.log(p) + (1 - y) * jnp.log(1 - p))


@checked
def cross_entropy_derivative_as_printed(y: Float[Array, "*s"], p: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F15, per example. `dCE/dp = −[y/p − (1−y)/(1−p)]`: NaN or inf once p rounds to 0 or 1."""
    return -(y / p - (1 - y) / (1 - p))


@checked
def cross_entropy(y: Float[Array, "*s"], h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F15 as it must be, from the logit. `CE(y, s(h)) = y log(1 + e⁻ʰ) + (1−y) log(1 + eʰ)`, per example.

    Two terms of one sign and `log(1 + eᵃ)` without overflow: full relative accuracy at every finite logit.
    """
    return y * jnp.logaddexp(0, -h) + (1 - y) * jnp.logaddexp(0, h)


@checked
def logit_adjoint_as_printed(y: Float[Array, "*s"], h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F16's common factor as printed, per example. `dCE/dh = −[y/p − (1−y)/(1−p)] s(h)(1−s(h))`, `p = s(h)`.

    Right on paper. In floating point NaN for both labels from the logit at which `p` rounds to 1
    (`h = 53 ln 2 = 36.74` in float64, `24 ln 2 = 16.64` in float32), and for `h < 0` from the logit at which
    `p` is 0: `e⁻ʰ` overflows at −709.78 (−88.72). A device that rounds subnormal numbers to 0 fails from
    −708.40 (−87.34): with NaN, or, compiled, with 0 in the place of −1 for y = 1.
    """
    s = sigmoid_as_printed(h)
    return cross_entropy_derivative_as_printed(y, s) * (s * (1 - s))


@checked
def logit_adjoint(y: Float[Array, "*s"], h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F16's common factor after algebra, per example. `dCE/dh = p − y`, `p = s(h)`.

    Finite everywhere, with an absolute error of one rounding of 1. For y = 1 and `h > 0` the subtraction
    cancels: the relative error grows like `eps·eʰ`, to 100 % from `h = 37` (float64) or 17 (float32).
    """
    return sigmoid(h) - y


@checked
def logit_adjoint_signed(y: Float[Array, "*s"], h: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """F16's common factor to full relative accuracy, per example. `dCE/dh = (1−y) s(h) − y s(−h)`.

    Equal to `s(h) − y`, since `s(h) + s(−h) = 1`. For the labels 0 and 1 one of the terms vanishes, so that
    nothing cancels, at any logit whose `e⁻|ʰ|` is a normal number (|h| < 708.4, or 87.3 in float32).
    """
    return (1 - y) * sigmoid(h) - y * sigmoid(-h)


@checked
def logistic_adjoint(H: Float[Array, "n k"], Y: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """F16 as the `output_adjoint` of a net whose outputs are logits.

    `dL/dH = (1/n)[(1−Y) s(H) − Y s(−H)]`, the mean over examples, each of the k outputs its own label.
    """
    return logit_adjoint_signed(Y, H) / Y.shape[0]


@checked
def logistic_loss(params: Linear, X: Float[Array, "n d"], y: Float[Array, " n"]) -> Float[Array, ""]:
    """F16's loss. `(1/n) Σᵢ CE(yᵢ, s(hᵢ))` with `h = Xw + b`, the mean over examples."""
    return jnp.mean(cross_entropy(y, _logits(params, X)))


@checked
def logistic_gradient_as_printed(params: Linear, X: Float[Array, "n d"], y: Float[Array, " n"]) -> Linear:
    """F16 as printed, the mean over examples (the lecture: one example, d = 2).

    `dL/db = −[y/p − (1−y)/(1−p)] s(h)(1−s(h))`, `dL/dwⱼ = (the same) xⱼ`, with `h = Xw + b` and `p = s(h)`.
    One example whose `p` rounds to 0 or 1 makes every entry NaN.
    """
    return _logistic_gradient(params, X, logit_adjoint_as_printed(y, _logits(params, X)))


@checked
def logistic_gradient(params: Linear, X: Float[Array, "n d"], y: Float[Array, " n"]) -> Linear:
    """F16 as it must be, the mean over examples. `dL/db = p − y`, `dL/dwⱼ = (p − y) xⱼ`: never NaN."""
    return _logistic_gradient(params, X, logit_adjoint(y, _logits(params, X)))


@checked
def logistic_gradient_signed(params: Linear, X: Float[Array, "n d"], y: Float[Array, " n"]) -> Linear:
    """F16 to full relative accuracy, the mean over examples.

    `dL/db = (1−y) s(h) − y s(−h)`, `dL/dwⱼ = (the same) xⱼ`: `p − y` without its cancellation.
    """
    return _logistic_gradient(params, X, logit_adjoint_signed(y, _logits(params, X)))


def _logits(params: Linear, X: Array) -> Array:
    return X @ params.w if params.b is None else X @ params.w + params.b


def _logistic_gradient(params: Linear, X: Array, dh: Array) -> Linear:
    """The mean over examples, from the adjoints `dh[n]` of the logits."""
    return Linear(X.T @ dh / X.shape[0], None if params.b is None else jnp.mean(dh))


# --- Beyond the slides: k classes -------------------------------------------------------------------------


@checked
def softmax_cross_entropies(Z: Float[Array, "n k"], Y: Float[Array, "n k"]) -> Float[Array, " n"]:
    """F15 for k classes, per example. `−Σⱼ yⱼ log softmax(z)ⱼ`, for one-hot (or probability) rows `Y`."""
    shifted = Z - jnp.max(Z, axis=1, keepdims=True)
    return -jnp.sum(Y * (shifted - jnp.log(jnp.sum(jnp.exp(shifted), axis=1, keepdims=True))), axis=1)


@checked
def softmax_adjoint(Z: Float[Array, "n k"], Y: Float[Array, "n k"]) -> Float[Array, "n k"]:
    """F16 for k classes, an `output_adjoint`. `dL/dZ = (1/n)(P − Y)` with `P = softmax(Z)`, the mean.

    Written as `(1−Y) P − Y (1−P)`, where `1 − pⱼ` is the sum of the other classes' probabilities: nothing
    cancels when the right class is almost certain, as in F16.
    """
    E = jnp.exp(Z - jnp.max(Z, axis=1, keepdims=True))
    others = E @ (1 - jnp.eye(Z.shape[1], dtype=Z.dtype))
    return ((1 - Y) * E - Y * others) / (jnp.sum(E, axis=1, keepdims=True) * Z.shape[0])
