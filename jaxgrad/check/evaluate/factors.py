"""What a number is: 2, 1/n, sqrt(d), 1/log(2), ... told apart by varying n."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

_CONSTANTS = {
    "log(2)": math.log(2.0),
    "log(10)": math.log(10.0),
    "pi": math.pi,
    "sqrt(2)": math.sqrt(2.0),
    "sqrt(pi)": math.sqrt(math.pi),
    "sqrt(2 pi)": math.sqrt(2 * math.pi),
}


def name_factor(samples: Sequence[tuple[int | None, float]], dims: Mapping[str, int], tol: float = 1e-6) -> str | None:
    """The exact form of a factor seen as `(batch size, value)` pairs, or None if it is not one number.

    A factor that is 1 but for a small error is given as a decimal with all its digits.

    Forms: ±a/b, times a power of n, times or over one of `dims` (or its root), log(2), log(10), pi, sqrt(2);
    n/(n-1) and (n-1)/n; else a decimal when it does not change with n. The power of n comes from the
    values at different n, so that n is told from a number that happens to be equal to it.
    """
    values = np.asarray([v for _, v in samples], dtype=float)
    if not np.all(np.isfinite(values)) or np.any(values == 0) or len(set(np.sign(values))) > 1:
        return "0" if np.all(np.abs(values) <= tol) else None
    sizes = [n for n, _ in samples]
    by_size: dict[int | None, list[float]] = {}
    for n, v in samples:
        by_size.setdefault(n, []).append(float(v))
    means = {n: float(np.mean(v)) for n, v in by_size.items()}
    if any(abs(v - means[n]) > tol * abs(means[n]) for n, v in samples):
        return None
    if np.all(np.abs(np.abs(values) - 1) <= tol) and np.all(np.abs(np.abs(values) - 1) > 1e-10):
        return f"{float(np.mean(values)):.12g}"
    forms = [_power(p) for p in (0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0)]
    forms += [("n-1", "", lambda n: n - 1.0), ("n", "(n-1)", lambda n: n / (n - 1.0))]
    forms += [("(n-1)", "n", lambda n: (n - 1.0) / n), ("", "(n-1)", lambda n: 1.0 / (n - 1.0))]
    forms += [("(n+1)", "n", lambda n: (n + 1.0) / n), ("n", "(n+1)", lambda n: n / (n + 1.0))]
    known = [n for n in means if n is not None]
    single = len(known) < 2
    if not known:
        forms = forms[:1]
    best: tuple[float, str] | None = None
    for number, (top, bottom, function) in enumerate(forms):
        if single and number > 6 and "n" not in (top, bottom):
            continue  # seen at one n alone, n - 1 is any number
        if any(n is None or (n < 2 and number > 6) for n in sizes) and number > 0:
            continue
        rest = np.asarray([v / function(n) if number else v for n, v in samples])
        base = float(np.mean(rest))
        if np.any(np.abs(rest - base) > tol * abs(base)):
            continue
        named = _name_constant(base, dims, tol, hard=known[0] if single and known and number == 0 else None)
        if named is None:
            if not single:
                return f"{base:.6g}" if number == 0 else _with_n(base, top, bottom)
            continue
        cost, sign, tops, bottoms = named
        if number > 6 and (set(tops) | set(bottoms)) & set(dims):
            continue  # n - 1 and a dimension at once: a number that happens to be equal to it
        text = sign + _join([t for t in (*tops, top) if t], [b for b in (*bottoms, bottom) if b])
        total = cost + (0.0 if number == 0 else 0.5 + 0.5 * number if single else 0.1)
        if best is None or total < best[0]:
            best = (total, text)
        if not single:
            break
    if best is not None:
        return best[1]
    first = next(iter(means.values()))
    if len(means) == 1 or max(means.values()) - min(means.values()) <= tol * abs(first):
        return f"{first:.6g}"
    return None


def _with_n(base: float, top: str, bottom: str) -> str | None:
    """A decimal times a power of n; a whole number m as in n/m is one written into the code."""
    inverse = 1 / abs(base)
    sign = "-" if base < 0 else ""
    if top == "n" and abs(inverse - round(inverse)) <= 1e-6 * inverse:
        return f"{sign}n/{round(inverse)}"
    if bottom == "n" and abs(abs(base) - round(abs(base))) <= 1e-6 * abs(base):
        return f"{sign}{round(abs(base))}/n"
    text = f"{abs(base):.6g}"
    return sign + (f"{text} {top}" if top else text) + (f"/{bottom}" if bottom else "")


def _power(p: float):
    text = {0.5: "sqrt(n)", 1.0: "n", 2.0: "n^2"}.get(abs(p), "")
    return (text if p > 0 else "", text if p < 0 else "", lambda n: float(n) ** p)


def _name_constant(
    value: float, dims: Mapping[str, int], tol: float, hard: int | None = None
) -> tuple[float, str, tuple[str, ...], tuple[str, ...]] | None:
    sign, size = ("-" if value < 0 else ""), abs(value)
    options: list[tuple[float, tuple[str, ...], tuple[str, ...]]] = []

    def fraction(x: float) -> Fraction | None:
        guess = Fraction(x).limit_denominator(12)
        if guess.denominator % 5 == 0 or (guess.numerator > 12 or guess <= 0):
            return None  # tenths read better as decimals
        return guess if abs(float(guess) - x) <= tol * x else None

    def tokens(f: Fraction) -> tuple[tuple[str, ...], tuple[str, ...]]:
        top = (str(f.numerator),) if f.numerator != 1 else ()
        return top, (str(f.denominator),) if f.denominator != 1 else ()

    def weight(f: Fraction) -> float:
        return {Fraction(1): 0.0, Fraction(2): 0.2, Fraction(1, 2): 0.2}.get(
            f, 1.0 + 0.1 * (f.numerator + f.denominator)
        )

    plain = fraction(size)
    if plain is not None:
        options.append((weight(plain), *tokens(plain)))
    atoms = [(name, float(d)) for name, d in dims.items() if d > 2]
    atoms += [(f"sqrt({name})", math.sqrt(d)) for name, d in dims.items() if d > 1]
    for number, (name, atom) in enumerate(atoms + list(_CONSTANTS.items())):
        for over in (False, True):
            rest = fraction(size * atom if over else size / atom)
            if rest is None or weight(rest) > 0.2:
                continue
            top, bottom = tokens(rest)
            cost = 0.4 + 0.01 * number + weight(rest)
            options.append((cost, (*top, *(() if over else (name,))), (*bottom, *((name,) if over else ()))))
    if hard is not None and hard > 2:
        for over in (False, True):
            rest = fraction(size * hard if over else size / hard)
            if rest is not None and weight(rest) <= 0.2:
                top, bottom = tokens(rest)
                cost = 0.3 + weight(rest)
                options.append((cost, (*top, *(() if over else ("n",))), (*bottom, *(("n",) if over else ()))))
    if not options:
        return None
    cost, top, bottom = min(options, key=lambda o: o[0])
    return cost, sign, top, bottom


def _join(top: Sequence[str], bottom: Sequence[str]) -> str:
    order = lambda t: (not t[0].isdigit(), t != "n", t)
    top, bottom = sorted(top, key=order), sorted(bottom, key=order)
    upper = "".join(top) if all(len(t) == 1 or t.isdigit() for t in top) else " ".join(top)
    lower = "".join(bottom) if len(bottom) == 1 else "(" + " ".join(bottom) + ")" if bottom else ""
    if not lower:
        return upper or "1"
    return f"{upper or '1'}/{lower}"
