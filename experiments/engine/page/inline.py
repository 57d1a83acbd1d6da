"""Figures that share one page: Matplotlib's SVG files made small, without ids or rules that could clash.

An SVG file stands alone: it brings its own glyphs, ids and styles, and seven digits for each coordinate. In one
page, glyphs and styles are shared by all figures, every other id bears its figure's name, and a coordinate is as
fine as a hundredth of a point. Nothing else of the picture changes.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

ROOT = "stroke-linejoin:round;stroke-linecap:butt"
"""What Matplotlib says of every element; in a page the drawing says it once, and its parts inherit it."""
GRID = "scale(0.015625)"
"""What Matplotlib scales a glyph by, and nothing else: 64 units of its shape are one of the hundred to an em."""
PARAMETERS = {"M": 1, "L": 1, "Q": 2, "C": 3, "Z": 0}
"""Points that follow each command of a path; Matplotlib writes no others."""
REFERENCE = re.compile(r"url\(#([^)]+)\)")
NUMBER = re.compile(r"-?\d*\.?\d+(?:e[-+]?\d+)?")


class Inlined(NamedTuple):
    """What a page needs to show the figures."""

    figures: dict[str, str]
    """An `<svg>` element for each, which names the classes and glyphs below."""
    glyphs: str
    """An invisible `<svg>` with the glyphs of all of them."""
    css: str
    """The rules of the classes."""


def inline(figures: Mapping[str, str], labels: Mapping[str, str]) -> Inlined:
    """Prepare the SVG documents `figures` (by name) for one page; `labels` say what each shows, for screen readers.

    Raises ValueError, naming the figure, for what is not an SVG as Matplotlib writes it.
    """
    glyphs: dict[str, int] = {}
    styles = {ROOT: 0}
    out = {}
    for name, text in figures.items():
        try:
            root = ElementTree.fromstring(text)
            out[name] = _figure(root, name, labels[name], glyphs, styles)
        except (ElementTree.ParseError, KeyError, IndexError) as error:
            raise ValueError(f"the figure of {name} is not an SVG of ours ({error!r}); draw it again") from None
    shapes = "".join(f'<path id="g{i}" transform="{GRID}" d="{d}"/>' for d, i in glyphs.items())
    css = "\n".join(f".s{i}{{{style}}}" for style, i in styles.items())
    return Inlined(out, f'<svg class="glyphs" aria-hidden="true"><defs>{shapes}</defs></svg>', css)


def _figure(root: Element, name: str, label: str, glyphs: dict[str, int], styles: dict[str, int]) -> str:
    for element in root.iter():
        element.tag = _local(element.tag)
        element.attrib = {_local(key): value for key, value in element.attrib.items()}
    _prune(root)
    wanted = {element.get("href", "")[1:] for element in root.iter()}
    wanted |= {match for element in root.iter() for match in REFERENCE.findall(" ".join(element.attrib.values()))}
    # A glyph is one that is scaled to its font's grid; its shape is its identity, in whichever figure it occurs.
    ids: dict[str, str] = {}
    for parent in list(root.iter("defs")):
        for shape in list(parent):
            id = shape.get("id", "")
            if shape.tag == "path" and shape.get("transform") == GRID:
                d = small_path(shape.get("d", ""), 0)
                ids[id] = f"g{glyphs.setdefault(d, len(glyphs))}"
                parent.remove(shape)
    for element in root.iter():
        if (id := element.attrib.pop("id", None)) in wanted and id is not None:
            ids[id] = element.attrib["id"] = f"{name}-{len(ids)}"
    _unwrap(root)
    for element in root.iter():
        _shorten(element, ids, styles)
    root.attrib = {"class": "s0", "viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def _shorten(element: Element, ids: Mapping[str, str], styles: dict[str, int]) -> None:
    """One element's attributes, in fewer bytes and with the page's ids."""
    for key, value in list(element.attrib.items()):
        if key == "href" and value.startswith("#"):
            element.set(key, f"#{ids[value[1:]]}")
        elif key == "d":
            element.set(key, small_path(value, 2))
        elif key in ("x", "y", "width", "height"):
            element.set(key, _round(value, 2))
        elif key == "transform":
            # The grid of the glyphs has 100 units to the em: whole ones are fine enough.
            digits = 0 if element.get("href", "").startswith("#g") else 2
            element.set(key, re.sub(r"translate\([^)]*\)", lambda m: _round(m[0], digits), value))  # noqa: B023
        elif key == "style":
            tidy = re.sub(r"\s*([:;])\s*", r"\1", value.strip())
            del element.attrib[key]
            element.set("class", f"s{styles.setdefault(tidy, len(styles))}")
        if key in element.attrib and REFERENCE.search(element.attrib[key]):
            element.set(key, REFERENCE.sub(lambda m: f"url(#{ids[m[1]]})", element.attrib[key]))
    # The same place in half the bytes.
    if element.tag == "use" and (match := re.fullmatch(r"translate\((\S+) 0\)", element.get("transform", ""))):
        del element.attrib["transform"]
        element.set("x", match[1])


def small_path(d: str, digits: int) -> str:
    """A path of absolute commands M, L, Q, C and Z in relative ones, on a grid of `digits` decimals.

    Points are rounded, not differences: errors do not add up.
    """
    tokens = re.findall(r"[A-Za-z]|" + NUMBER.pattern, d)
    scale, out, last, i = 10**digits, [], "", 0
    here = begin = (0, 0)
    while i < len(tokens):
        command = tokens[i].upper()
        count = PARAMETERS[command]
        numbers = [round(float(token) * scale) for token in tokens[i + 1 : i + 1 + 2 * count]]
        points = list(zip(numbers[::2], numbers[1::2], strict=True))
        i += 1 + 2 * count
        relative = [_decimal(v, digits) for x, y in points for v in (x - here[0], y - here[1])]
        letter = command.lower()
        out.append(_joined(relative, "" if letter == last else letter))
        last = {"m": "", "z": ""}.get(letter, letter)
        here = points[-1] if points else begin
        begin = here if command == "M" else begin
    return "".join(out)


def _joined(numbers: list[str], letter: str) -> str:
    """Numbers behind a command's letter, or behind the number before if it goes on; a minus sign parts them too."""
    text = letter
    for k, number in enumerate(numbers):
        text += number if number.startswith("-") or (letter and k == 0) else f" {number}"
    return text


def _decimal(value: int, digits: int) -> str:
    """An integer in units of the last decimal: 1250 is 12.5 for two digits."""
    sign, whole = "-" if value < 0 else "", str(abs(value)).rjust(digits + 1, "0")
    if digits == 0:
        return sign + whole
    fraction = whole[-digits:].rstrip("0")
    return (sign + whole[:-digits].lstrip("0") + ("." + fraction if fraction else "")) or "0"


def _round(text: str, digits: int) -> str:
    return NUMBER.sub(lambda m: _decimal(round(float(m[0]) * 10**digits), digits), text).replace("-0)", "0)")


def _prune(root: Element) -> None:
    """Drop what is not drawn: metadata, the style that `ROOT` stands for, and the white space between elements."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
        if not (parent.text or "").strip():
            parent.text = None
        for child in parent:
            child.tail = None


def _unwrap(root: Element) -> None:
    """Put the children of a group that says nothing in its place; drop definitions of nothing."""
    for parent in list(root.iter())[::-1]:
        children: list[Element] = []
        for child in parent:
            plain = child.tag == "g" and not child.attrib
            children += list(child) if plain else [] if child.tag == "defs" and not len(child) else [child]
        parent[:] = children


def _local(name: str) -> str:
    return name.rpartition("}")[2]
