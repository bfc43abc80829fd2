"""Curves of a run as inline SVG that takes its colours and fonts from the page around it."""

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from krrst_fast.evaluate.paired import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = NDArray[np.float64]

# Placeholders of CSS variables, which matplotlib cannot draw with; `_inline` replaces them.
INK, MUTED, GRID, ACCENT, RIVAL_BLUE = "#000001", "#000002", "#000003", "#000004", "#000005"
ROLES = {INK: "ink", MUTED: "muted", GRID: "line", ACCENT: "accent", RIVAL_BLUE: "rival"}

WIDTH, HEIGHT = 5.4, 3.3
DRAWN_POINTS = 600
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One drawn figure: inline SVG, its title, and what it shows in words."""

    title: str
    svg: str
    caption: str


def column(rows: Sequence[dict[str, Any]], key: str) -> Series:
    """Return the values of `key` as floats [len(rows)]; NaN where a row has none."""
    values = [row.get(key) for row in rows]
    return np.array([np.nan if v is None else float(v) for v in values], dtype=np.float64)


def has_data(values: Series, *, positive: bool = False) -> bool:
    """Return whether there are two values to draw a line through."""
    usable = np.isfinite(values) & ((values > 0) | (not positive))
    return int(usable.sum()) >= 2


def running_median(x: Series, y: Series, *, share: float = 0.06) -> tuple[Series, Series]:
    """Compute medians of `y` in windows of a `share` of the points, at no more than 300 places."""
    half = max(4, round(len(y) * share / 2))
    centres = np.unique(np.linspace(0, len(y) - 1, min(len(y), 300)).round().astype(int))
    medians = [np.median(y[max(0, c - half) : c + half + 1]) for c in centres]
    return x[centres], np.array(medians)


def thinned(x: Series, y: Series) -> tuple[Series, Series]:
    """Keep at most `DRAWN_POINTS` points: the lowest and the highest of each stretch."""
    if len(y) <= DRAWN_POINTS:
        return x, y
    stretches = np.array_split(np.arange(len(y)), DRAWN_POINTS // 2)
    kept = np.unique([s[pick(y[s])] for s in stretches for pick in (np.argmin, np.argmax)])
    return x[kept], y[kept]


def age_bins(age: Series, loss: Series) -> list[tuple[str, Series]]:
    """Group losses by slot age in doubling bins: 0, 1, 2-3, 4-7, ..., without empty bins."""
    bins, low, high = [], 0, 1
    while low <= age.max():
        inside = loss[(age >= low) & (age < high)]
        if len(inside):
            last = min(high - 1, int(age.max()))
            bins.append((str(low) if last == low else f"{low}\u2013{last}", inside))
        low, high = high, high * 2
    return bins


def outer_loss(step: Series, loss: Series) -> Curve:
    """Plot the outer loss on a log scale."""

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        _raw_and_median(axes, step, loss)
        axes.set_yscale("log")
        _readable_log(axes)
        axes.set_xlabel("outer step")
        axes.set_ylabel("loss (mean squared error)")

    x, y = _finite(step, loss, positive=True)
    median = running_median(x, y)[1]
    behind = "every logged loss stands"
    if len(y) > DRAWN_POINTS:
        behind = "of the logged losses the lowest and the highest of each stretch stand"
    caption = (
        f"Running median {number(median[0])} at step {x[0]:,.0f}, {number(median[-1])} at "
        f"step {x[-1]:,.0f}; {behind} faint behind it. It says that the run is sound, not that the "
        "images are worth anything: a target that is easy to predict has a low one from the start."
    )
    return _curve("Outer loss", draw, caption)


def held_out(
    step: Series, ours: Series, real: Series, attainable: Series, caption: str
) -> Curve | None:
    """Plot the held-out R2 of the synthetic set, of real images, and what is attainable."""
    if not has_data(ours):
        return None

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for values, label, colour, style in (
            (attainable, "attainable", INK, "s--"),
            (ours, "distilled", ACCENT, "o-"),
            (real, "as many real images", RIVAL_BLUE, "o-"),
        ):
            if np.isfinite(values).any():
                axes.plot(*_finite(step, values), style, color=colour, label=label, markersize=4)
        axes.axhline(0, color=MUTED, linewidth=0.8)
        axes.margins(x=0.02)
        _readable_steps(axes)
        axes.legend(frameon=False, labelcolor=INK)
        axes.set_xlabel("outer step")
        axes.set_ylabel("held-out R2")

    return _curve("Held-out R2", draw, caption)


def loss_by_age(step: Series, loss: Series, age: Series) -> Curve | None:
    """Plot the loss against the age of its pool network, in the run's second half."""
    late = (step >= np.nanmax(step) / 2) & np.isfinite(loss) & np.isfinite(age)
    bins = age_bins(age[late], loss[late]) if late.any() else []
    if len(bins) < 2:
        return None
    labels = [label for label, _ in bins]
    low, middle, high = np.array([np.quantile(v, (0.25, 0.5, 0.75)) for _, v in bins]).T

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        places = np.arange(len(bins))
        axes.vlines(places, low, high, color=ACCENT, linewidth=5, alpha=0.3)
        axes.plot(places, middle, "o", color=ACCENT, markersize=6)
        axes.set_xticks(places, labels, **_slanted(labels))
        axes.set_xlim(-0.6, len(bins) - 0.4)
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="y", nbins=6)
        axes.grid(False, axis="x")
        axes.set_xlabel("age of the pool network (own training steps)")
        axes.set_ylabel("loss (mean squared error)")

    caption = (
        f"Median (dot) and middle half (bar) of {int(late.sum()):,} logged losses, second half of "
        f"the run. Networks of age {labels[0]}: median {number(middle[0])}; of age {labels[-1]}: "
        f"{number(middle[-1])}. A slot that starts afresh throws the loss back to the left end."
    )
    return _curve("Loss by age of the pool network", draw, caption)


def stacked(
    title: str,
    step: Series,
    panels: Sequence[tuple[str, Series, bool]],
    caption: str,
    *,
    xlabel: str = "outer step",
    colour: str = ACCENT,
) -> Curve | None:
    """Plot series over the same steps in panels, given as (label, values, log scale)."""
    shown = [panel for panel in panels if has_data(panel[1], positive=panel[2])]
    if not shown:
        return None

    def draw(figure: "Figure") -> None:
        grid = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, values, log) in zip(grid, shown):
            _raw_and_median(axes, step, values, positive=log, colour=colour)
            if log:
                axes.set_yscale("log")
                _readable_log(axes, low_panel=len(shown) > 1)
            axes.set_title(label, loc="left", fontsize=10.5, color=MUTED)
        grid[-1].set_xlabel(xlabel)

    return _curve(title, draw, caption)


def _raw_and_median(
    axes: "Axes", step: Series, values: Series, *, positive: bool = False, colour: str = ACCENT
) -> None:
    x, y = _finite(step, values, positive=positive)
    smooth = len(y) < 20 or float(np.abs(np.diff(y)).sum()) <= 1.5 * float(np.ptp(y))
    if smooth:
        axes.plot(*thinned(x, y), color=colour)
    else:
        alpha = 0.3 if len(y) > 300 else 0.5
        axes.plot(*thinned(x, y), color=colour, linewidth=0.7, alpha=alpha)
        axes.plot(*running_median(x, y), color=colour)
    axes.margins(x=0.02)
    _readable_steps(axes)


def _finite(x: Series, y: Series, *, positive: bool = False) -> tuple[Series, Series]:
    usable = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not positive))
    return x[usable], y[usable]


def _readable_steps(axes: "Axes") -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if abs(value) >= 1e4 else f"{value:g}")
    )


def _readable_log(axes: "Axes", *, low_panel: bool = False) -> None:
    """Set ticks within a decade, in plain digits: most runs span less than one decade."""
    from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullLocator

    low, high = axes.get_ylim()
    decades = np.log10(high / low)
    locator: Locator
    if decades < 0.35:
        locator = MaxNLocator(3 if low_panel else 5)
    elif decades < (0.4 if low_panel else 0.8):
        locator = LogLocator(subs=[1.0, 1.5, 2.0, 3.0, 5.0, 7.0], numticks=12)
    elif decades < (1.4 if low_panel else 2.5):
        locator = LogLocator(subs=[1.0, 3.0] if low_panel else [1.0, 2.0, 5.0], numticks=12)
    else:
        locator = LogLocator(subs=[1.0], numticks=4 if low_panel else 8)
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def _slanted(labels: Sequence[str]) -> dict[str, Any]:
    crowded = sum(len(label) + 2 for label in labels) > 48
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}


def number(value: float) -> str:
    """Format three significant digits, with a power of ten for very large and small values."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".")
    power = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == "1" else f"{mantissa}×{power}"


def _curve(
    title: str, draw: Callable[["Figure"], None], caption: str, height: float = HEIGHT
) -> Curve:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with _style(title):
        figure = Figure(figsize=(WIDTH, height))
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return Curve(title=title, svg=_inline(text.getvalue(), title), caption=caption)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    import matplotlib

    # The salt makes ids that are the same in every run and differ between figures of a page.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        yield


def _inline(svg: str, title: str) -> str:
    """Return the bare <svg> element: no prolog, no metadata, no address, colours by role."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = svg.replace("xlink:href", "href")
    head = f'<svg viewBox="\\1" role="img" aria-label="{html.escape(title)}">'
    svg = re.sub(r'<svg[^>]*?viewBox="([^"]*)"[^>]*>', head, svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" font-family: [^;\"]*;", "", svg)
    for colour, role in ROLES.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r' d="[^"]*"', lambda d: re.sub(r"(\.\d\d)\d+", r"\1", d.group()), svg)
    return re.sub(r"\s*\n\s*", "\n", svg).strip()


class DotRow(NamedTuple):
    """One line of a dot plot: its values by seed, and the half-width of the bar at their mean."""

    label: str
    values: Sample
    spread: float | None
    colour: str


def dot_plot(
    rows: Sequence[DotRow],
    *,
    title: str,
    unit: str,
    caption: str,
    zero: bool = False,
    linked: tuple[str, str] | None = None,
) -> Curve:
    """Plot a dot for each seed, and above the dots a diamond at their mean with a bar.

    Args:
        rows: Lines of the plot, from top to bottom.
        title: Title of the figure.
        unit: Label of the axis.
        caption: Text below the figure.
        zero: Draw a line at 0.
        linked: Labels of two rows whose dots of the same seed are joined.
    """

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        if zero:
            axes.axvline(0, color=INK, linewidth=1)
        place = {row.label: i for i, row in enumerate(rows)}
        if linked and all(label in place for label in linked):
            first, second = (rows[place[label]].values.by_seed for label in linked)
            below = [place[label] + 0.2 for label in linked]
            for seed in first.keys() & second.keys():
                axes.plot([first[seed], second[seed]], below, color=MUTED, linewidth=0.6)
        for i, (_, values, spread, colour) in enumerate(rows):
            dots = list(values.by_seed.values())
            axes.plot(dots, [i + 0.2] * len(dots), "o", color=colour, alpha=0.45)
            axes.errorbar(values.mean, i - 0.15, xerr=spread, fmt="D", color=colour, linewidth=1.4)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.tick_params(axis="y", labelcolor=INK)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(False, axis="y")
        axes.set_xlabel(unit)

    return _curve(title, draw, caption, height=0.8 + 0.45 * len(rows))
