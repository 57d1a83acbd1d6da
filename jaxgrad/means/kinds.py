"""What an array of a loss's program is to the examples of its batch (see `jaxgrad.means`), and how kinds combine."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Same:
    degree: int


@dataclass(frozen=True)
class Zero:
    """Zeros of any kind and degree."""


@dataclass(frozen=True)
class PerRow:
    degree: int


@dataclass(frozen=True)
class Total:
    degree: int


@dataclass(frozen=True)
class Position:
    """Entry i along the axis of examples is i itself."""


@dataclass(frozen=True)
class Placed:
    """Indices per row, of which component `column` (along the last axis) is the row's own position."""

    column: int


@dataclass(frozen=True)
class Never:
    """False everywhere."""


@dataclass(frozen=True)
class Mixed:
    why: str


Kind = Same | Zero | PerRow | Total | Position | Placed | Never | Mixed


def within(kind: Kind, other: Kind) -> bool:
    """Whether all that is `kind` is `other`: zeros are anything, and nᵏ⁺¹ c = nᵏ Σᵢ c is a total."""
    if kind == other or isinstance(kind, Zero):
        return True
    if isinstance(kind, Same):
        return other in (PerRow(kind.degree), Total(kind.degree - 1))
    return False


def sum_of(kinds: Sequence[Kind]) -> Kind | None:
    """The kind of a sum, or of a choice among them that depends on no example; None where there is none."""
    found: Kind = Zero()
    for kind in kinds:
        if within(found, kind):
            found = kind
        elif not within(kind, found):
            return None
    return found if isinstance(found, Same | Zero | PerRow | Total) else None


def product_of(a: Kind, b: Kind) -> Kind | None:
    """The kind of an elementwise product, None where there is none."""
    if isinstance(a, Zero) or isinstance(b, Zero):
        return Zero()
    if isinstance(a, Same) and isinstance(b, Same | PerRow | Total):
        return type(b)(a.degree + b.degree)
    if isinstance(b, Same) and isinstance(a, PerRow | Total):
        return type(a)(a.degree + b.degree)
    if isinstance(a, PerRow) and isinstance(b, PerRow):
        return PerRow(a.degree + b.degree)
    return None


def plain(kinds: Sequence[Kind]) -> Kind | None:
    """The kind of any function, entry by entry or row by row, of what does not scale with n."""
    if any(kind not in (Same(0), PerRow(0), Zero(), Never()) for kind in kinds):
        return None
    return PerRow(0) if PerRow(0) in kinds else Same(0)
