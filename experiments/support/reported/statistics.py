"""Likelihoods and latent variables: generalised linear models, survival, Gaussian processes, mixtures, factors."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy import special, stats

from experiments.support.reported.case import Case, cause, integers, normal, uniform, wrong_and_right

CASES: list[Case] = []
wrong, right = wrong_and_right(CASES)


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


# ------------------------------------------------------------------------------------------ generalised linear models


def gamma_loss(beta, batch):
    X, y = batch
    eta = X @ beta
    deviance = eta + y * jnp.exp(-eta)
    return jnp.mean(deviance)


gamma_batch = (normal(400, 15, 3), uniform(401, 15, low=0.5, high=3))


@wrong(
    gamma_loss,
    normal(402, 3, scale=0.5),
    gamma_batch,
    cause(
        "wrong-derivative", "negated-term", "wrong-argument", "wrong-value", line="deviance = eta + y * jnp.exp(-eta)"
    ),
)
def gamma_inner_minus_lost(beta, batch, wrong=True):
    """In a gamma regression with log link the minus of exp(-eta) is not differentiated."""
    X, y = batch
    mu = np.exp(X @ beta)
    score = 1 + y / mu if wrong else 1 - y / mu
    return X.T @ score / len(y)


def exposure_loss(p, batch):
    counts, exposure, X = batch
    log_mu = X @ p["beta"] + p["mu0"] + jnp.log(exposure)
    return jnp.mean(jnp.exp(log_mu) - counts * log_mu)


@wrong(
    exposure_loss,
    {"beta": normal(403, 3, scale=0.5), "mu0": np.asarray(0.25)},
    (integers(404, 5, 16).astype(float), uniform(405, 16, low=0.5, high=4), normal(406, 16, 3)),
    cause(
        "missing-factor", "missing-term", "wrong-value", "wrong-derivative", line=("log_mu = X @", "jnp.exp(log_mu)")
    ),
)
def exposure_forgotten(p, batch, wrong=True):
    """The expected count of the gradient leaves out the offset, log exposure."""
    counts, exposure, X = batch
    rate = np.exp(X @ p["beta"] + p["mu0"])
    expected = rate if wrong else exposure * rate
    return {"beta": X.T @ (expected - counts) / len(counts), "mu0": np.mean(expected - counts)}


def negative_binomial_loss(p, batch):
    X, y = batch
    r = jnp.exp(p["log_r"])
    mu = jnp.exp(X @ p["w"])
    combinations = special.gammaln(y + r) - special.gammaln(r) - special.gammaln(y + 1)
    log_likelihood = combinations + r * jnp.log(r / (r + mu)) + y * jnp.log(mu / (r + mu))
    return -jnp.mean(log_likelihood)


@wrong(
    negative_binomial_loss,
    {"w": normal(407, 3, scale=0.5), "log_r": np.asarray(0.5)},
    (normal(408, 14, 3), integers(409, 6, 14).astype(float)),
    cause("missing-derivative", "missing-factor", leaf="log_r", line='r = jnp.exp(p["log_r"])'),
)
def dispersion_not_through_its_log(p, batch, wrong=True):
    """The dispersion is exp(log_r), and the derivative returned for log_r is that by r."""
    X, y = batch
    r, mu = np.exp(p["log_r"]), np.exp(X @ p["w"])
    d_mu = y / mu - (y + r) / (r + mu)
    digamma = lambda v: np.asarray(special.digamma(v))
    d_r = digamma(y + r) - digamma(r) + np.log(r / (r + mu)) + 1 - (r + y) / (r + mu)
    d_log_r = d_r if wrong else d_r * r
    return {"w": -X.T @ (d_mu * mu) / len(y), "log_r": -np.mean(d_log_r)}


def probit_loss(w, batch):
    X, y = batch
    q = stats.norm.cdf(X @ w)
    return -jnp.mean(y * jnp.log(q) + (1 - y) * jnp.log(1 - q))


@wrong(
    probit_loss,
    normal(410, 3, scale=0.5),
    (normal(411, 15, 3), integers(412, 2, 15).astype(float)),
    cause("wrong-derivative", "wrong-value", line="q = stats.norm.cdf(X @ w)"),
)
def probit_with_the_logistic_slope(w, batch, wrong=True):
    """The derivative of the normal distribution function is taken as q (1 - q), as in a logistic regression."""
    X, y = batch
    z = X @ w
    q = np.asarray(stats.norm.cdf(z))
    density = q * (1 - q) if wrong else np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)
    return -X.T @ ((y / q - (1 - y) / (1 - q)) * density) / len(y)


def normal_likelihood_loss(p, batch):
    X, y = batch
    mean = X @ p["w"]
    sigma = jnp.exp(p["s"])
    return jnp.mean(0.5 * ((y - mean) / sigma) ** 2) + jnp.log(sigma)


@wrong(
    normal_likelihood_loss,
    {"w": normal(413, 3), "s": np.asarray(-0.25)},
    (normal(414, 13, 3), normal(415, 13)),
    cause("missing-term", leaf="s", line="+ jnp.log(sigma)"),
)
def normalising_constant_forgotten(p, batch, wrong=True):
    """The log sigma of the normal density gives a 1 in the gradient by s, which is missing."""
    X, y = batch
    residual = y - X @ p["w"]
    precision = np.exp(-2 * p["s"])
    gs = -np.mean(residual**2) * precision + (0 if wrong else 1)
    return {"w": -X.T @ residual * precision / len(y), "s": gs}


@wrong(
    normal_likelihood_loss,
    {"w": normal(416, 3), "s": np.asarray(0.25)},
    (normal(417, 13, 3), normal(418, 13)),
    cause("missing-factor", "wrong-value", "scale", leaf="w", line="((y - mean) / sigma) ** 2"),
)
def divided_by_sigma_once(p, batch, wrong=True):
    """The residual is divided by sigma where the derivative by the mean has sigma squared."""
    X, y = batch
    sigma = np.exp(p["s"])
    z = (y - X @ p["w"]) / sigma
    gw = np.zeros(3)
    for i in range(len(y)):
        gw -= z[i] * X[i] / (1 if wrong else sigma)
    return {"w": gw / len(y), "s": 1 - np.mean(z * z)}


# ------------------------------------------------------------------------------------------ survival


def cox_loss(beta, batch):
    X, times, died = batch
    eta = X @ beta
    at_risk = times[None, :] >= times[:, None]
    log_sum = jax.nn.logsumexp(jnp.where(at_risk, eta[None, :], -jnp.inf), axis=1)
    return -jnp.sum(died * (eta - log_sum)) / jnp.sum(died)


cox_batch = (normal(419, 10, 3), uniform(420, 10, low=1, high=9), np.array([1.0, 1, 0, 1, 0, 1, 1, 1, 0, 1]))


@wrong(
    cox_loss,
    normal(421, 3, scale=0.5),
    cox_batch,
    cause("wrong-value", "wrong-derivative", "missing-factor", line=("at_risk =", "log_sum = jax.nn.logsumexp(")),
)
def everybody_is_at_risk(beta, batch, wrong=True):
    """In Cox's partial likelihood the mean of the covariates is taken over all, not over those still at risk."""
    X, times, died = batch
    risk = np.exp(X @ beta)
    grad = np.zeros_like(beta)
    for i in range(len(times)):
        if died[i]:
            still = np.ones(len(times), bool) if wrong else times >= times[i]
            expected = risk[still] @ X[still] / risk[still].sum()
            grad -= X[i] - expected
    return grad / died.sum()


def exponential_survival_loss(w, batch):
    X, t, observed = batch
    log_rate = X @ w
    return jnp.mean(t * jnp.exp(log_rate) - observed * log_rate)


@wrong(
    exponential_survival_loss,
    normal(422, 3, scale=0.5),
    (normal(423, 14, 3), uniform(424, 14, low=0.25, high=3), integers(425, 2, 14).astype(float)),
    cause("missing-factor", "wrong-value", "missing-derivative", line="observed * log_rate"),
)
def censoring_ignored(w, batch, wrong=True):
    """Censored subjects have no event, and the gradient counts one for each of them."""
    X, t, observed = batch
    events = np.ones_like(t) if wrong else observed
    return ((t * np.exp(X @ w) - events)[:, None] * X).mean(axis=0)


def weibull_loss(p, batch):
    t, event = batch
    k = jnp.exp(p["log_k"])
    z = jnp.log(t) - p["log_scale"]
    log_hazard = p["log_k"] + (k - 1) * z - p["log_scale"]
    return jnp.mean(jnp.exp(k * z) - event * log_hazard)


@wrong(
    weibull_loss,
    {"log_k": np.asarray(0.25), "log_scale": np.asarray(0.5)},
    (uniform(426, 15, low=0.5, high=4), integers(427, 2, 15).astype(float)),
    cause("missing-factor", "missing-derivative", "wrong-derivative", leaf="log_k", line="jnp.exp(k * z)"),
)
def cumulated_hazard_without_the_log(p, batch, wrong=True):
    """The derivative of exp(k z) by k lacks the factor z, the log of the scaled time."""
    t, event = batch
    k, z = np.exp(p["log_k"]), np.log(t) - p["log_scale"]
    H = np.exp(k * z)
    d_k = np.mean(H * (1 if wrong else z) - event * z)
    return {"log_k": k * d_k - np.mean(event), "log_scale": np.mean(-k * H + event * k)}


# ------------------------------------------------------------------------------------------ Gaussian processes, normals


def rbf_evidence_loss(p, batch):
    x, y = batch
    distance = (x[:, None] - x[None, :]) ** 2
    K = jnp.exp(-0.5 * distance / jnp.exp(p["log_l"]) ** 2) + jnp.exp(2 * p["log_noise"]) * jnp.eye(len(x))
    alpha = jnp.linalg.solve(K, y)
    return 0.5 * y @ alpha + 0.5 * jnp.linalg.slogdet(K)[1]


evidence_params = {"log_l": np.asarray(0.25), "log_noise": np.asarray(-0.5)}
evidence_batch = (uniform(428, 8, low=-2, high=2), normal(429, 8))


@wrong(
    rbf_evidence_loss,
    evidence_params,
    evidence_batch,
    cause("missing-term", line=("jnp.linalg.slogdet(K)[1]",)),
)
def evidence_without_its_determinant(p, batch, wrong=True):
    """The gradient of the evidence has the fit to the data and not the determinant."""
    x, y = batch
    D = (x[:, None] - x[None, :]) ** 2
    ell, noise = np.exp(p["log_l"]), np.exp(p["log_noise"])
    signal = np.exp(-0.5 * D / ell**2)
    K = signal + noise**2 * np.eye(len(x))
    alpha = np.linalg.solve(K, y)
    inner = np.outer(alpha, alpha) - (0 if wrong else np.linalg.inv(K))
    return {
        "log_l": -0.5 * np.sum(inner * signal * D / ell**2),
        "log_noise": -0.5 * np.trace(inner) * 2 * noise**2,
    }


@wrong(
    rbf_evidence_loss,
    evidence_params,
    evidence_batch,
    cause("scale", "scaled-term", "missing-derivative", leaf="log_noise", line="K = jnp.exp(", factor=("1/2", "")),
)
def noise_variance_for_its_deviation(p, batch, wrong=True):
    """The derivative by the log of the noise is that by the log of its variance, half as large."""
    x, y = batch
    D = np.subtract.outer(x, x) ** 2
    length2, noise2 = np.exp(2 * p["log_l"]), np.exp(2 * p["log_noise"])
    S = np.exp(-D / (2 * length2))
    K_inv = np.linalg.inv(S + noise2 * np.identity(len(y)))
    a = K_inv @ y
    by_length = S * D / length2
    by_noise = (1 if wrong else 2) * noise2 * np.identity(len(y))
    half = lambda dK: 0.5 * (np.trace(K_inv @ dK) - a @ dK @ a)
    return {"log_l": half(by_length), "log_noise": half(by_noise)}


def cholesky_normal_loss(p, batch):
    (X,) = batch
    L = jnp.tril(p["L"])
    z = (X - p["mu"]) @ L
    return 0.5 * jnp.mean(jnp.sum(z**2, axis=1)) - jnp.sum(jnp.log(jnp.abs(jnp.diagonal(L))))


@wrong(
    cholesky_normal_loss,
    {"L": np.eye(3) + normal(430, 3, 3, scale=0.25), "mu": normal(431, 3)},
    (normal(432, 13, 3),),
    cause(
        "entries",
        "missing-factor",
        "missing-derivative",
        "wrong-derivative",
        "additive",
        leaf="L",
        line="L = jnp.tril(",
    ),
)
def upper_triangle_gets_a_gradient(p, batch, wrong=True):
    """Only the lower triangle of L is used; the gradient is not cut to it."""
    (X,) = batch
    L = np.tril(p["L"])
    centred = X - p["mu"]
    dz = centred @ L / len(X)
    dL = centred.T @ dz
    if not wrong:
        dL = np.tril(dL)
    dL[np.diag_indices(3)] -= 1 / np.diag(L)
    return {"L": dL, "mu": -(dz @ L.T).sum(axis=0)}


def log_det_loss(A, batch):
    (X,) = batch
    s = X @ A.T
    sources = jnp.sum(jnp.log(jnp.cosh(s)), axis=1)
    return jnp.mean(sources) - jnp.linalg.slogdet(A)[1]


@wrong(
    log_det_loss,
    np.eye(3) + normal(433, 3, 3, scale=0.5),
    (normal(434, 14, 3),),
    cause("transposed", "wrong-derivative", line="- jnp.linalg.slogdet(A)[1]"),
)
def inverse_for_its_transpose(A, batch, wrong=True):
    """In independent component analysis the derivative of log det A is inv(A)', and inv(A) is used."""
    (X,) = batch
    inverse = np.linalg.inv(A)
    return np.tanh(X @ A.T).T @ X / len(X) - (inverse if wrong else inverse.T)


# ------------------------------------------------------------------------------------------ latent variables, factors


def mixture_loss(p, batch):
    (x,) = batch
    log_pi = jax.nn.log_softmax(p["logits"])
    precision = jnp.exp(-p["log_var"])
    log_normal = -0.5 * (x[:, None] - p["mu"]) ** 2 * precision - 0.5 * p["log_var"]
    return -jnp.mean(jax.nn.logsumexp(log_pi + log_normal, axis=1))


mixture_params = {"logits": normal(435, 3), "mu": normal(436, 3, scale=2), "log_var": normal(437, 3, scale=0.25)}
mixture_batch = (normal(438, 14, scale=2),)


@wrong(
    mixture_loss,
    mixture_params,
    mixture_batch,
    cause("missing-term", "wrong-derivative", leaf="logits", line="log_pi = jax.nn.log_softmax("),
)
def mixture_weights_not_normalised(p, batch, wrong=True):
    """The gradient by the logits is minus the mean responsibility; the weights themselves are not added."""
    (x,) = batch
    pi = softmax(p["logits"])
    d = x[:, None] - p["mu"]
    log_joint = np.log(pi) - 0.5 * d**2 * np.exp(-p["log_var"]) - 0.5 * p["log_var"]
    r = softmax(log_joint)
    return {
        "logits": -r.mean(axis=0) + (0 if wrong else pi),
        "mu": -(r * d * np.exp(-p["log_var"])).mean(axis=0),
        "log_var": -(r * (0.5 * d**2 * np.exp(-p["log_var"]) - 0.5)).mean(axis=0),
    }


@wrong(
    mixture_loss,
    mixture_params,
    mixture_batch,
    cause("missing-factor", leaf="mu", line="log_normal = -0.5 * (x[:, None]"),
)
def component_means_without_the_variance(p, batch, wrong=True):
    """The gradient by the means is not divided by the variance of the component."""
    (x,) = batch
    n, k = len(x), len(p["mu"])
    pi, var = softmax(p["logits"]), np.exp(p["log_var"])
    g = {name: np.zeros(k) for name in p}
    for i in range(n):
        joint = np.log(pi) - 0.5 * (x[i] - p["mu"]) ** 2 / var - 0.5 * np.log(var)
        r = softmax(joint)
        g["logits"] += (pi - r) / n
        g["mu"] -= r * (x[i] - p["mu"]) / (1 if wrong else var) / n
        g["log_var"] -= r * 0.5 * ((x[i] - p["mu"]) ** 2 / var - 1) / n
    return g


def vae_loss(p, batch):
    x, noise = batch
    mu = x @ p["Wm"]
    log_var = x @ p["Wv"]
    z = mu + jnp.exp(0.5 * log_var) * noise
    rebuilt = z @ p["D"]
    error = 0.5 * jnp.sum((rebuilt - x) ** 2, axis=1)
    kl = -0.5 * jnp.sum(1 + log_var - mu**2 - jnp.exp(log_var), axis=1)
    return jnp.mean(error + kl)


vae_params = {"Wm": normal(439, 4, 2, scale=0.5), "Wv": normal(440, 4, 2, scale=0.25), "D": normal(441, 2, 4)}
vae_batch = (normal(442, 11, 4), normal(443, 11, 2))


@wrong(
    vae_loss,
    vae_params,
    vae_batch,
    cause("missing-term", leaf="Wv", line="z = mu + jnp.exp(0.5 * log_var) * noise"),
)
def reparametrised_noise_without_gradient(p, batch, wrong=True):
    """The gradient of the log variance has the divergence only; the way through z is forgotten."""
    x, noise = batch
    n = len(x)
    mu, log_var = x @ p["Wm"], x @ p["Wv"]
    std = np.exp(0.5 * log_var)
    z = mu + std * noise
    d_rebuilt = (z @ p["D"] - x) / n
    dz = d_rebuilt @ p["D"].T
    d_mu = dz + mu / n
    d_log_var = 0.5 * (np.exp(log_var) - 1) / n
    if not wrong:
        d_log_var = d_log_var + dz * noise * 0.5 * std
    return {"Wm": x.T @ d_mu, "Wv": x.T @ d_log_var, "D": z.T @ d_rebuilt}


@wrong(
    vae_loss,
    vae_params,
    vae_batch,
    cause(
        "scaled-term", "negated-term", "wrong-derivative", leaf="Wm", line="kl = -0.5 * jnp.sum(", factor=("1/2", "")
    ),
)
def divergence_by_the_mean_is_halved(p, batch, wrong=True):
    """The half of the divergence cancels the 2 of mu²; here it stays."""
    x, noise = batch
    mu, log_var = x @ p["Wm"], x @ p["Wv"]
    std = np.exp(log_var / 2)
    z = mu + std * noise
    back = z @ p["D"] - x
    dz = back @ p["D"].T
    dkl_dmu = 0.5 * mu if wrong else mu
    dkl_dlog_var = 0.5 * (np.exp(log_var) - 1)
    N = x.shape[0]
    return {
        "Wm": np.dot(x.T, dz + dkl_dmu) / N,
        "Wv": np.dot(x.T, 0.5 * dz * noise * std + dkl_dlog_var) / N,
        "D": np.dot(z.T, back) / N,
    }


def pca_loss(W, batch):
    (X,) = batch
    projected = X @ W @ W.T
    return jnp.mean(jnp.sum((X - projected) ** 2, axis=1))


@wrong(pca_loss, normal(444, 4, 2), (normal(445, 13, 4),), cause("missing-term", line="projected = X @ W @ W.T"))
def projector_differentiated_on_one_side(W, batch, wrong=True):
    """W stands twice in X W W'; only one of the two is differentiated."""
    (X,) = batch
    E = X @ W @ W.T - X
    grad = 2 * E.T @ X @ W / len(X)
    if not wrong:
        grad = grad + 2 * X.T @ E @ W / len(X)
    return grad


def ratings_loss(p, batch):
    R, seen = batch
    error = seen * (p["U"] @ p["V"].T - R)
    return 0.5 * jnp.sum(error**2) + 0.0625 * (jnp.sum(p["U"] ** 2) + jnp.sum(p["V"] ** 2))


ratings_batch = (normal(446, 6, 6), integers(447, 2, 6, 6).astype(float))


@wrong(
    ratings_loss,
    {"U": normal(448, 6, 2), "V": normal(449, 6, 2)},
    ratings_batch,
    cause("missing-factor", "missing-derivative", leaf="V", line='error = seen * (p["U"] @ p["V"].T - R)'),
)
def unseen_ratings_pull_the_items(p, batch, wrong=True):
    """The gradient by the users keeps to the ratings that were given, the one by the items does not."""
    R, seen = batch
    difference = p["U"] @ p["V"].T - R
    dU = (seen * difference) @ p["V"] + 0.125 * p["U"]
    dV = (difference if wrong else seen * difference).T @ p["U"] + 0.125 * p["V"]
    return {"U": dU, "V": dV}


@wrong(
    ratings_loss,
    {"U": normal(450, 6, 2), "V": normal(451, 6, 2)},
    ratings_batch,
    cause("transposed", leaf="V", line='error = seen * (p["U"] @ p["V"].T - R)'),
)
def error_matrix_not_transposed_for_the_items(p, batch, wrong=True):
    """As many users as items, and the error matrix multiplies the users without a transpose."""
    R, seen = batch
    E = seen * (np.dot(p["U"], p["V"].T) - R)
    return {
        "U": np.dot(E, p["V"]) + 2 * 0.0625 * p["U"],
        "V": np.dot(E if wrong else E.T, p["U"]) + 2 * 0.0625 * p["V"],
    }


def user_bias_loss(p, batch):
    user, item, rating = batch
    guess = p["mean"] + p["user"][user] + p["item"][item]
    return jnp.mean((guess - rating) ** 2)


@wrong(
    user_bias_loss,
    {"mean": np.asarray(0.5), "user": normal(452, 5), "item": normal(453, 4)},
    (integers(454, 5, 14), integers(455, 4, 14), normal(456, 14)),
    cause("missing-term", "wrong-value", leaf="user", line='p["user"][user]'),
)
def user_keeps_the_last_rating(p, batch, wrong=True):
    """The gradient of a user's bias is assigned at each rating, so that only the last one is left."""
    user, item, rating = batch
    n = len(rating)
    g = {"mean": 0.0, "user": np.zeros(5), "item": np.zeros(4)}
    for u, i, r in zip(user, item, rating, strict=True):
        d = 2 * (p["mean"] + p["user"][u] + p["item"][i] - r) / n
        g["mean"] += d
        g["user"][u] = d if wrong else g["user"][u] + d
        g["item"][i] += d
    return g


# ------------------------------------------------------------------------------------------ distances, comparisons


def contrastive_loss(W, batch):
    a, b, same = batch
    difference = a @ W - b @ W
    distance = jnp.sqrt(jnp.sum(difference**2, axis=1) + 1e-6)
    far = jnp.maximum(0.0, 2.0 - distance)
    return jnp.mean(same * distance**2 + (1 - same) * far**2)


contrastive_batch = (normal(457, 14, 3), normal(458, 14, 3), integers(459, 2, 14).astype(float))


@wrong(
    contrastive_loss,
    normal(460, 3, 2),
    contrastive_batch,
    cause("wrong-derivative", "missing-derivative", "wrong-value", line="far = jnp.maximum(0.0, 2.0 - distance)"),
)
def margin_pushes_for_ever(W, batch, wrong=True):
    """Pairs of different classes are pushed apart even where they are beyond the margin already."""
    a, b, same = batch
    u = a @ W - b @ W
    d = np.sqrt((u**2).sum(axis=1) + 1e-6)
    gap = 2.0 - d if wrong else np.maximum(0, 2.0 - d)
    d_distance = (same * 2 * d - (1 - same) * 2 * gap) / len(d)
    du = (d_distance / d)[:, None] * u
    return a.T @ du - b.T @ du


@wrong(
    contrastive_loss,
    normal(461, 3, 2),
    contrastive_batch,
    cause("missing-term", line="difference = a @ W - b @ W"),
)
def one_twin_of_the_siamese_net(W, batch, wrong=True):
    """Both inputs pass through the same W, and only the first one's gradient is returned."""
    a, b, same = batch
    grad = np.zeros_like(W)
    for x1, x2, s in zip(a, b, same, strict=True):
        u = (x1 - x2) @ W
        d = np.sqrt(u @ u + 1e-6)
        by_d = 2 * d if s else -2 * max(0.0, 2.0 - d)
        grad += np.outer(x1, by_d * u / d)
        if not wrong:
            grad -= np.outer(x2, by_d * u / d)
    return grad / len(same)


def mahalanobis_loss(L, batch):
    x, y, target = batch
    moved = (x - y) @ L
    squared = jnp.sum(moved * moved, axis=1)
    return jnp.mean((squared - target) ** 2)


@wrong(
    mahalanobis_loss,
    normal(462, 3, 3),
    (normal(463, 12, 3), normal(464, 12, 3), uniform(465, 12, low=1, high=4)),
    cause(
        "scale",
        "scaled-term",
        "missing-term",
        line=("squared = jnp.sum(moved * moved", "(squared - target) ** 2"),
        factor=("1/2", ""),
    ),
)
def square_of_the_metric_without_its_two(L, batch, wrong=True):
    """The derivative of the squared distance by L is (x - y)(x - y)'L; its 2 is missing."""
    x, y, target = batch
    d = x - y
    moved = d @ L
    outer = 2 * ((moved**2).sum(1) - target) / len(target)
    return (1 if wrong else 2) * np.einsum("n,ni,nj->ij", outer, d, moved)


def bradley_terry_loss(strength, batch):
    winner, loser = batch
    edge = strength[winner] - strength[loser]
    return -jnp.mean(jax.nn.log_sigmoid(edge))


@wrong(
    bradley_terry_loss,
    normal(466, 5),
    (np.array([0, 1, 2, 3, 4, 0, 2, 1, 3, 0, 4]), np.array([1, 2, 0, 0, 3, 4, 1, 3, 2, 2, 1])),
    cause("missing-term", line="edge = strength[winner] - strength[loser]"),
)
def losers_lose_nothing(strength, batch, wrong=True):
    """The winner's strength gets its gradient, the loser's gets none."""
    winner, loser = batch
    upset = sigmoid(strength[loser] - strength[winner]) / len(winner)
    grad = np.zeros_like(strength)
    np.add.at(grad, winner, -upset)
    if not wrong:
        np.add.at(grad, loser, upset)
    return grad


def tsne_loss(Y, batch):
    (P,) = batch
    d2 = jnp.sum((Y[:, None] - Y[None]) ** 2, axis=-1)
    kernel = (1 - jnp.eye(len(Y))) / (1 + d2)
    Q = kernel / jnp.sum(kernel)
    return -jnp.sum(P * jnp.log(Q + jnp.eye(len(Y))))


tsne_P = uniform(467, 6, 6) * (1 - np.eye(6))
tsne_P = (tsne_P + tsne_P.T) / np.sum(2 * tsne_P)


@wrong(
    tsne_loss,
    normal(468, 6, 2),
    (tsne_P,),
    cause("missing-derivative", "missing-factor", "wrong-derivative", line="kernel = (1 - jnp.eye(len(Y))) / (1 + d2)"),
)
def tsne_with_the_gaussian_gradient(Y, batch, wrong=True):
    """The gradient of t-SNE is written as that of SNE: the factor 1/(1 + d²) of each pair is missing."""
    (P,) = batch
    diff = Y[:, None] - Y[None]
    kernel = 1 / (1 + (diff**2).sum(-1))
    np.fill_diagonal(kernel, 0)
    Q = kernel / kernel.sum()
    force = (P - Q) * (1 if wrong else kernel)
    return 4 * np.einsum("ij,ijd->id", force, diff)


# ------------------------------------------------------------------------------------------ right, but unusual


@right(pca_loss, normal(469, 4, 2), (normal(470, 13, 4),))
def pca_by_the_scatter_matrix(W, batch):
    """The gradient is written with the scatter matrix S alone, the data do not appear."""
    (X,) = batch
    S = X.T @ X / len(X)
    return -4 * S @ W + 2 * S @ W @ (W.T @ W) + 2 * W @ (W.T @ S @ W)


@right(mixture_loss, mixture_params, mixture_batch)
def responsibilities_as_in_em(p, batch):
    """The gradient of a mixture through the sufficient statistics of EM."""
    (x,) = batch
    pi, var = softmax(p["logits"]), np.exp(p["log_var"])
    r = softmax(np.log(pi) - 0.5 * (x[:, None] - p["mu"]) ** 2 / var - 0.5 * np.log(var))
    count, first, second = r.sum(axis=0), r.T @ x, r.T @ x**2
    n = len(x)
    spread = second - 2 * p["mu"] * first + count * p["mu"] ** 2
    return {
        "logits": pi - count / n,
        "mu": (count * p["mu"] - first) / (n * var),
        "log_var": 0.5 * (count - spread / var) / n,
    }


@right(rbf_evidence_loss, evidence_params, evidence_batch)
def evidence_by_eigenvectors(p, batch):
    """The evidence of a Gaussian process through the eigenvectors of its kernel matrix."""
    x, y = batch
    D = np.subtract.outer(x, x) ** 2
    l2, s2 = np.exp(2 * p["log_l"]), np.exp(2 * p["log_noise"])
    S = np.exp(-0.5 * D / l2)
    values, vectors = np.linalg.eigh(S + s2 * np.eye(len(x)))
    a = vectors @ ((vectors.T @ y) / values)
    inverse = (vectors / values) @ vectors.T
    G = 0.5 * (inverse - np.outer(a, a))
    return {"log_l": np.sum(G * S * D) / l2, "log_noise": 2 * s2 * np.trace(G)}


@right(bradley_terry_loss, normal(472, 5), (integers(473, 5, 12), integers(474, 5, 12)))
def games_as_an_incidence_matrix(strength, batch):
    """Winners and losers as a matrix of +1 and -1; some play against themselves."""
    winner, loser = batch
    A = np.eye(5)[winner] - np.eye(5)[loser]
    return -A.T @ sigmoid(-A @ strength) / len(winner)


@right(vae_loss, vae_params, vae_batch)
def vae_in_float32(p, batch):
    """A right derivation that computes in single precision."""
    x, noise = (np.asarray(v, np.float32) for v in batch)
    Wm, Wv, D = (np.asarray(p[name], np.float32) for name in ("Wm", "Wv", "D"))
    mu, log_var = x @ Wm, x @ Wv
    std = np.exp(np.float32(0.5) * log_var)
    z = mu + std * noise
    back = (z @ D - x) / np.float32(len(x))
    dz = back @ D.T
    n = np.float32(len(x))
    return {
        "Wm": x.T @ (dz + mu / n),
        "Wv": x.T @ (np.float32(0.5) * dz * noise * std + np.float32(0.5) * (np.exp(log_var) - 1) / n),
        "D": z.T @ back,
    }
