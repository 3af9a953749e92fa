"""A small figure for notebooks, as SVG: a line with its interval, or heat maps, without a script."""

import html
import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from vlm_mech.results.roles import Roles

WIDTH, HEIGHT, LEFT, TOP, BELOW = 300, 120, 74, 18, 30
"""Pixels: of a panel, left of it for names, above and below it."""
SIDE = 22
"""Height of a row of a heat map at most, in pixels."""
MOST_CELLS = 1500
BLUE, GREY = "#0072b2", "#888888"


def thumbnail(table: pd.DataFrame, roles: Roles, *, quantity: str, diverging: bool) -> str:
    """The figure; empty where there are too many cells, or nothing to draw.

    Args:
        table: a row a cell, with its axes and `value`, and for a line `low`, `high` and `baseline`.
        quantity: what the value is, with its unit.
        diverging: whether colours are drawn around 0.
    """
    values = table["value"].dropna()
    if values.empty or len(table) > MOST_CELLS:
        return ""
    panels = [("", table)]
    if roles.facet is not None:
        panels = [
            (f"{roles.facet} {each}", rows) for each, rows in table.groupby(roles.facet, sort=False, observed=True)
        ]
    draw = _line if roles.y is None else _heat
    drawn = [draw(rows, roles, values, diverging) for _, rows in panels]
    tall = max(height for _, height in drawn)
    pieces = []
    for number, ((name, _), (inside, _)) in enumerate(zip(panels, drawn, strict=True)):
        title = _text(LEFT, 12, name or quantity, "start")
        pieces.append(f"<g transform='translate({number * (LEFT + WIDTH + 12)},0)'>{title}{inside}</g>")
    legend = "" if roles.y is None else _legend(values, diverging, tall - 4, quantity if roles.facet else "")
    size = f"width='{len(panels) * (LEFT + WIDTH + 12)}' height='{tall + 14}'"
    label = html.escape(f"{quantity} by {', '.join(filter(None, (roles.x, roles.y, roles.facet)))}", quote=True)
    return f"<svg role='img' aria-label='{label}' {size} style='background:#fff'>{''.join(pieces)}{legend}</svg>"


def _text(x: float, y: float, text: Any, anchor: str = "middle") -> str:
    look = "font-size='10' font-family='sans-serif' fill='#333'"
    return f"<text x='{x:.1f}' y='{y:.1f}' {look} text-anchor='{anchor}'>{html.escape(str(text))}</text>"


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3g}"


def _ends(values: pd.Series, diverging: bool) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if diverging:
        reach = max(abs(low), abs(high), 1e-9)
        return -reach, reach
    return min(low, 0.0), max(high, 1e-9)


def _colour(value: float, low: float, high: float) -> str:
    """White at 0, towards red above it and blue below, both as strong as they are far from it."""
    if math.isnan(value):
        return "#ffffff"
    strength = min(1.0, abs(value) / max(abs(low), abs(high)))
    end = (178, 24, 43) if value >= 0 else (33, 102, 172)
    return "#" + "".join(f"{round(255 + (each - 255) * strength):02x}" for each in end)


def _listed(rows: pd.DataFrame, axis: str) -> list[Any]:
    found = rows[axis].drop_duplicates()
    return list(found.sort_values() if found.dtype.kind in "iuf" else found)


def _heat(rows: pd.DataFrame, roles: Roles, values: pd.Series, diverging: bool) -> tuple[str, int]:
    across, down = _listed(rows, roles.x), _listed(rows, str(roles.y))
    wide, high = WIDTH / len(across), min(SIDE, 400 / len(down))
    low, top = _ends(values, diverging)
    found = {(row[roles.x], row[str(roles.y)]): row["value"] for _, row in rows.iterrows()}
    pieces = []
    for y, other in enumerate(down):
        for x, one in enumerate(across):
            value = found.get((one, other), math.nan)
            said = html.escape(f"{roles.x} {one}, {roles.y} {other}: {_number(value)}")
            place = f"x='{LEFT + x * wide:.1f}' y='{TOP + y * high:.1f}' width='{wide:.2f}' height='{high:.2f}'"
            pieces.append(f"<rect {place} fill='{_colour(value, low, top)}' stroke='#eee'><title>{said}</title></rect>")
    end = TOP + high * len(down)
    every = max(1, math.ceil(12 / high))
    names = [_text(LEFT - 4, TOP + (at + 0.5) * high + 3, str(each)[:12], "end") for at, each in enumerate(down)][
        ::every
    ]
    return "".join([*pieces, *names, *_below(across, wide, end, roles.x)]), round(end) + BELOW


def _below(across: Sequence[Any], wide: float, end: float, axis: str) -> list[str]:
    longest = max(len(str(each)) for each in across)
    every = max(1, math.ceil(7 * longest / wide))
    ticks = [_text(LEFT + (at + 0.5) * wide, end + 11, each) for at, each in enumerate(across)][::every]
    return [*ticks, _text(LEFT + WIDTH / 2, end + 23, axis)]


def _legend(values: pd.Series, diverging: bool, y: float, quantity: str) -> str:
    low, high = _ends(values, diverging)
    steps = [low + (high - low) * at / 19 for at in range(20)]
    bar = "".join(
        f"<rect x='{LEFT + 40 + 5 * at}' y='{y}' width='5' height='8' fill='{_colour(each, low, high)}'/>"
        for at, each in enumerate(steps)
    )
    ends = _text(LEFT + 36, y + 8, _number(low), "end") + _text(
        LEFT + 144, y + 8, f"{_number(high)}  {quantity}", "start"
    )
    return bar + ends


def _line(rows: pd.DataFrame, roles: Roles, values: pd.Series, diverging: bool) -> tuple[str, int]:
    across = _listed(rows, roles.x)
    rows = rows.set_index(roles.x).loc[across]
    every = pd.concat([rows[name] for name in ("value", "low", "high", "baseline")]).dropna()
    low, high = float(every.min()), float(every.max())
    high = high if high > low else low + 1
    wide = WIDTH / len(across)

    def place(at: int, value: float) -> str:
        return f"{LEFT + (at + 0.5) * wide:.1f},{TOP + HEIGHT * (high - value) / (high - low):.1f}"

    def path(name: str) -> list[str]:
        return [place(at, value) for at, value in enumerate(rows[name]) if not math.isnan(value)]

    band = " ".join([*path("high"), *reversed(path("low"))])
    dots = "".join(
        "<circle cx='{}' cy='{}' r='3' fill='{}'><title>{}</title></circle>".format(
            *place(at, value).split(","), BLUE, html.escape(f"{roles.x} {each}: {_number(value)}")
        )
        for at, (each, value) in enumerate(zip(across, rows["value"], strict=True))
        if not math.isnan(value)
    )
    drawn = (
        f"<polygon points='{band}' fill='{BLUE}' fill-opacity='0.18'/>"
        f"<polyline points='{' '.join(path('baseline'))}' fill='none' stroke='{GREY}' stroke-dasharray='2 3'/>"
        f"<polyline points='{' '.join(path('value'))}' fill='none' stroke='{BLUE}' stroke-width='2'/>{dots}"
    )
    ends = [_text(LEFT - 4, TOP + 6, _number(high), "end"), _text(LEFT - 4, TOP + HEIGHT, _number(low), "end")]
    return "".join([drawn, *ends, *_below(across, wide, TOP + HEIGHT, roles.x)]), TOP + HEIGHT + BELOW
