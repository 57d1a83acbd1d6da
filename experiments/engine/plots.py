"""The house style of figures: one look, colours for colour-blind readers, and files that do not change.

Figures are drawn without a display, with defaults that no local configuration changes, and saved without dates. So
the same numbers give the same bytes. The background is white, so a figure reads the same on a dark page. Each figure
keeps a strip free at its lower edge; `save` writes there from which data it was drawn.

    figure, (left, right) = plots.figure(2)
    left.plot(steps, gap, color=plots.batch_colour(8), label="b = 8")
    plots.band(left, steps, low, high, plots.batch_colour(8))
    plots.log_scale(left, "xy")
    plots.label_ends(left)
    plots.save(figure, folder)
"""

import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import matplotlib.patheffects
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image

from jaxgrad import atomic

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#767676"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, BLACK)
"""Okabe and Ito's colours, in the order for unrelated lines. Yellow is too faint for lines."""

WIDTH = 9.0
"""Inches: a README shows the figure about 800 pixels wide, where 10 points are 12 pixels."""
CAPTION = 0.22
"""Inches kept free at the lower edge, for a line on the data."""
DPI = 120

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#444444",
    "axes.grid": True,
    "axes.labelsize": 10,
    "axes.prop_cycle": cycler(color=CYCLE),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.constrained_layout.h_pad": 0.06,
    "figure.constrained_layout.w_pad": 0.06,
    "figure.dpi": DPI,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "image.cmap": "cividis",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "mathtext.fontset": "dejavusans",
    "savefig.dpi": DPI,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",
    "svg.hashsalt": "jaxgrad",
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
}
"""The SVG has glyphs as paths, so it looks the same without our font."""

matplotlib.rcdefaults()
matplotlib.use("Agg")
matplotlib.rcParams.update(STYLE)


def batch_colour(b: int | None) -> str:
    """The colour of a batch size, the same in every figure; `None` is the full batch (black)."""
    if b is None:
        return BLACK
    scale = ((1, VERMILLION), (7, PURPLE), (15, ORANGE), (63, SKY), (255, GREEN))
    return next((colour for last, colour in scale if b <= last), BLUE)


def sampling_colour(name: str) -> str:
    """The colour of a sampling, by its name in `jaxgrad.sampling`."""
    words = name.replace("_", " ").replace("-", " ")
    kinds = (("full", BLACK), ("with replacement", VERMILLION), ("distinct", BLUE), ("reshuffled", GREEN))
    return next((colour for kind, colour in kinds if words.startswith(kind)), GREY)


def ink(colour: Any) -> tuple[float, ...]:
    """A darker tone of a colour, for text: letters are thinner than lines."""
    return tuple(0.75 * channel for channel in to_rgb(colour))


def figure(
    ncols: int = 1,
    nrows: int = 1,
    *,
    height: float | None = None,
    width_ratios: Sequence[float] | None = None,
    height_ratios: Sequence[float] | None = None,
    sharex: bool | Literal["none", "all", "row", "col"] = False,
    sharey: bool | Literal["none", "all", "row", "col"] = False,
) -> tuple[Figure, Any]:
    """A figure as wide as a README, and its axes as a flat array in reading order.

    `height` is in inches. By default, the height of a row depends on the number of columns.
    """
    rows = height or nrows * {1: 4.2, 2: 3.6, 3: 3.1}.get(ncols, 2.7) + CAPTION
    drawing = Figure(figsize=(WIDTH, rows), layout="constrained")
    engine = drawing.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, CAPTION / rows, 1, 1 - CAPTION / rows))  # type: ignore[call-arg]
    axes = drawing.subplots(
        nrows,
        ncols,
        squeeze=False,
        sharex=sharex,
        sharey=sharey,
        width_ratios=width_ratios,
        height_ratios=height_ratios,
    )
    return drawing, axes.ravel()


def band(axis: Axes, x: Any, low: Any, high: Any, colour: str, *, label: str | None = None) -> None:
    """Fill the region between two curves, in the colour of its line."""
    axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label=label, zorder=1)


def plain(value: float, _position: Any = None) -> str:
    """The number of a tick, as people write it: 0.01, 1, 1,000, 10⁶, 2·10⁷."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.10g}"
    mantissa, exponent = f"{value:.10e}".split("e")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    mantissa = f"{float(mantissa):g}"
    return power if mantissa == "1" else f"{mantissa}·{power}"


def log_scale(axis: Axes, which: str = "y") -> None:
    """Make axes logarithmic (`"x"`, `"y"` or `"xy"`), with plain tick labels; also at 2 and 5 on short axes."""
    for side in which:
        ruler = {"x": axis.xaxis, "y": axis.yaxis}[side]
        {"x": axis.set_xscale, "y": axis.set_yscale}[side]("log")
        ruler.set_major_locator(LogLocator(numticks=8))
        ruler.set_major_formatter(FuncFormatter(plain))
        ruler.set_minor_formatter(FuncFormatter(partial(_between_decades, ruler)))


def _between_decades(ruler: Axis, value: float, _position: Any = None) -> str:
    """The label of a minor tick: only 2 and 5 have one, and only on an axis that shows few decades."""
    low, high = sorted(ruler.get_view_interval())
    leading = round(value / 10 ** np.floor(np.log10(value) + 1e-9))
    return plain(value) if high / low < 40 and leading in (2, 5) else ""


def label_ends(axis: Axes, *, fontsize: float = 9, lines: Sequence[Any] | None = None) -> None:
    """Write each line's label at its last point, in its colour. Labels move up or down so that they do not overlap.

    Call it last: it reads the final limits and scales. It labels the lines of the axis, or the given `lines`.
    """
    ends = []
    axis.autoscale_view()  # limits are settled late, and the transforms below need them
    for line in axis.get_lines() if lines is None else lines:
        x, y = (np.asarray(values, float) for values in line.get_data())
        # A logarithmic axis cannot show these points, so no label can stand there.
        shown = np.isfinite(x) & np.isfinite(y)
        shown &= (x > 0) | (axis.get_xscale() != "log")
        shown &= (y > 0) | (axis.get_yscale() != "log")
        if not str(line.get_label()).startswith("_") and shown.any():
            last = np.flatnonzero(shown)[-1]
            place = axis.transAxes.inverted().transform(axis.transData.transform((x[last], y[last])))
            ends.append((float(place[1]), float(place[0]), line))
    ends.sort(key=lambda end: end[0])
    points = axis.get_position().height * axis.figure.get_figheight() * 72  # type: ignore[union-attr]
    heights = _spread([np.clip(end[0], 0, 1) for end in ends], 1.25 * fontsize / points)
    halo = [matplotlib.patheffects.withStroke(linewidth=2.5, foreground="white")]
    for height, (_, x_end, line) in zip(heights, ends, strict=True):
        axis.annotate(
            str(line.get_label()),
            (min(x_end, 1), height),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=fontsize,
            color=ink(line.get_color()),
            path_effects=halo,
            annotation_clip=False,
        )


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights at least `gap` apart. A group that would overlap keeps its centre.

    If a group would reach below the axis, where the tick labels are, it stacks up from the lower edge.
    """
    groups: list[list[float]] = []
    for height in heights:
        groups.append([float(height)])
        while len(groups) > 1 and _bottom(groups[-1], gap) - _top(groups[-2], gap) < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    spread = [_bottom(group, gap) + i * gap for group in groups for i in range(len(group))]
    return [max(height, gap * (i + 0.5)) for i, height in enumerate(spread)]


def _bottom(group: list[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _top(group: list[float], gap: float) -> float:
    return _bottom(group, gap) + gap * (len(group) - 1)


def save(drawing: Figure, folder: str | Path, stem: str = "figure", *, margin: str = "") -> tuple[Path, ...]:
    """Write `<stem>.svg` and `<stem>.png` into `folder`, each whole or not at all. Return their paths."""
    return write(render(drawing, margin=margin), folder, stem)


def render(drawing: Figure, *, margin: str = "") -> dict[str, bytes]:
    """Return the contents of the figure's files by kind, `svg` and `png`. Nothing is written to disk.

    `margin` says from which data the figure was drawn. It stands small at the lower right, in the strip that `figure`
    keeps free. The same figure gives the same bytes: no date, no version of matplotlib, fixed ids.
    """
    svg, png = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(STYLE):
        # The layout is solved once. Each further draw would move things by a fraction of a point.
        if engine := drawing.get_layout_engine():
            engine.execute(drawing)
        drawing.set_layout_engine("none")
        for axis in drawing.axes:
            # The solver's last bits depend on memory addresses, and they reach the ids of the SVG.
            axis.set_position(np.round(axis.get_position().bounds, 6))  # type: ignore[arg-type]
        width, height = drawing.get_size_inches()
        note = drawing.text(1 - 0.06 / width, 0.06 / height, margin, fontsize=6.5, color=GREY, ha="right", va="bottom")
        # As `savefig` does, but without its extra draw, which would solve the layout.
        FigureCanvasSVG(drawing).print_svg(svg, metadata={"Date": None, "Creator": None})
        drawing.set_dpi(DPI)  # an SVG's is 72
        canvas = FigureCanvasAgg(drawing)
        canvas.draw()
        # The picture is opaque, and without an alpha channel a tenth smaller.
        opaque = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
        opaque.save(png, "png", dpi=(DPI, DPI), optimize=True)
        note.remove()
    return {"svg": _compact(svg.getvalue()), "png": png.getvalue()}


def _compact(svg: bytes) -> bytes:
    """The same picture in fewer bytes: coordinates to a hundredth of a point, no indentation."""

    def places(attribute: re.Match[bytes]) -> bytes:
        return re.sub(rb"-?\d+\.\d{3,}", lambda number: _shortest(float(number[0])), attribute[0])

    return re.sub(rb" *\n *", b"\n", re.sub(rb'\b(?:d|x|y)="[^"]*"', places, svg))


def _shortest(number: float) -> bytes:
    """Two decimals, and none that are zero."""
    return (b"%.2f" % (number + 0.0)).rstrip(b"0").rstrip(b".") if abs(number) >= 0.005 else b"0"


def write(rendered: dict[str, bytes], folder: str | Path, stem: str = "figure") -> tuple[Path, ...]:
    """Write the contents from `render` as `<stem>.<kind>` into `folder`, each whole or not at all. Return the paths."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    paths = {place / f"{stem}.{kind}": content for kind, content in rendered.items()}
    for path, content in paths.items():
        atomic.write(path, content)
    return tuple(paths)
