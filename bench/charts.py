"""Figures of the page as inline SVG: colours and fonts are those of the page around them."""

import html
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

DECADE = (1.0, 2.0, 5.0)
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Dot(NamedTuple):
    """A value, what it is of, and the CSS class that gives it a colour."""

    value: float
    told: str
    tone: str


class Point(NamedTuple):
    """Two errors, what they are of, and the CSS class that gives them a colour."""

    x: float
    y: float
    told: str
    tone: str


def digits(value: float, count: int = 3) -> str:
    """Significant digits, with a power of ten only where plain digits would not be read."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    if 1e-3 <= abs(value) < 1e5:
        places = max(0, count - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{places}f}"
    mantissa, _, exponent = f"{value:.{count - 1}e}".partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(SUPERSCRIPT)}"


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones: 1, 2, 5 of each decade, or its start where many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = DECADE if last - first <= 3 else DECADE[:1]
    ticks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A position on a log axis, to a tenth of a pixel."""
    a, b = math.log(low), math.log(high)
    return lambda value: round(start + (end - start) * (math.log(value) - a) / (b - a), 1)


def speed_strip(rows: Sequence[tuple[str, Sequence[Dot]]]) -> str:
    """A line a suite: a dot a row, at how many times as fast it is; the median in words."""
    left, right, top, pitch = 196.0, 690.0, 8.0, 27.0
    bottom = top + pitch * len(rows)
    values = [dot.value for _, dots in rows for dot in dots]
    low, high = min(0.8, *values) * 0.93, max(1.25, *values) * 1.07
    at = _scale(low, high, left, right)
    parts = [f'<svg viewBox="0 0 760 {bottom + 42}" role="img" aria-label="Speed by suite">']
    for tick in log_ticks(low, high):
        strong = " zero" if tick == 1 else ""
        parts.append(f'<path class="rule{strong}" d="M{at(tick)} {top}V{bottom}"/>')
        parts.append(f'<text class="tick" x="{at(tick)}" y="{bottom + 15}">{tick:g}×</text>')
    parts.append(
        f'<text class="tick" x="{(left + right) / 2}" y="{bottom + 34}">'
        "times as fast as what it is compared with (log scale)</text>"
    )
    for number, (name, dots) in enumerate(rows):
        parts += _strip_row(name, dots, top + pitch * (number + 0.5), at)
    return "\n".join([*parts, "</svg>"])


def _strip_row(
    name: str, dots: Sequence[Dot], y: float, at: Callable[[float], float]
) -> Iterator[str]:
    ordered = sorted(dot.value for dot in dots)
    middle = (ordered[(len(ordered) - 1) // 2] * ordered[len(ordered) // 2]) ** 0.5
    yield f'<g class="row"><text class="name" x="0" y="{y + 4}">{html.escape(name)}</text>'
    ends = f"M{at(ordered[0])} {y}H{at(ordered[-1])}"
    yield f'<path class="span" d="{ends}"/>'
    for dot in dots:
        told = html.escape(dot.told)
        yield (
            f'<circle class="{dot.tone}" cx="{at(dot.value)}" cy="{y}" r="4.5">'
            f"<title>{told}</title></circle>"
        )
    yield f'<text class="value" x="760" y="{y + 4}">{digits(middle, 2)}×</text></g>'


def error_scatter(points: Sequence[Point]) -> str:
    """Our error over that of the reference, both on log scales, with the lines 1 and 2."""
    left, right, top, bottom = 62.0, 500.0, 10.0, 330.0
    values = [value for point in points for value in (point.x, point.y)]
    low, high = min(values) / 2, max(values) * 2
    x, y = _scale(low, high, left, right), _scale(low, high, bottom, top)
    parts = ['<svg viewBox="0 0 520 376" role="img" aria-label="Errors, ours over the reference">']
    for power in range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1):
        tick = 10.0**power
        label = f"10{str(power).translate(SUPERSCRIPT)}"
        parts.append(f'<path class="rule" d="M{x(tick)} {top}V{bottom}M{left} {y(tick)}H{right}"/>')
        parts.append(f'<text class="tick" x="{x(tick)}" y="{bottom + 16}">{label}</text>')
        parts.append(f'<text class="tick side" x="{left - 7}" y="{y(tick) + 4}">{label}</text>')
    parts.append(f'<path class="even" d="M{x(low)} {y(low)}L{x(high)} {y(high)}"/>')
    parts.append(f'<path class="twice" d="M{x(low)} {y(2 * low)}L{x(high / 2)} {y(high)}"/>')
    parts.append(
        f'<text class="tick" x="{(left + right) / 2}" y="{bottom + 36}">'
        "error of the reference</text>"
        f'<text class="tick" transform="translate(13 {(top + bottom) / 2}) rotate(-90)">'
        "error of krrst_fast</text>"
    )
    for point in points:
        told = html.escape(point.told)
        parts.append(
            f'<circle class="{point.tone}" cx="{x(point.x)}" cy="{y(point.y)}" r="4">'
            f"<title>{told}</title></circle>"
        )
    return "\n".join([*parts, "</svg>"])


def sparkline(values: Sequence[tuple[str, float]]) -> str:
    """Values over commits on a log scale, the last one with a dot; "" for fewer than two."""
    if len(values) < 2:
        return ""
    numbers = [value for _, value in values]
    # A change of a few per cent is no story: the axis spans a factor of 1.5 at least.
    middle = math.sqrt(min(numbers) * max(numbers))
    low, high = min(*numbers, middle / 1.22), max(*numbers, middle * 1.22)
    y = _scale(low, high, 17, 3)
    step = 66 / (len(values) - 1)
    places = [(round(3 + step * number, 1), y(value)) for number, value in enumerate(numbers)]
    told = html.escape(", ".join(f"{commit[:8]}: {digits(value)}" for commit, value in values))
    line = " ".join(f"{a},{b}" for a, b in places)
    return (
        f'<svg class="spark" viewBox="0 0 72 20" role="img" aria-label="{told}">'
        f'<title>{told}</title><polyline points="{line}"/>'
        f'<circle cx="{places[-1][0]}" cy="{places[-1][1]}" r="2.4"/></svg>'
    )
