"""Scenes as pictures, and which pixels belong to which part of which thing."""

import functools
import random

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageChops, ImageDraw

from vlm_mech.data.scenes import BEETLE, CLASSES, COLOURS, SIZE, Scene, Thing

SCALE = 4
"""Pictures are drawn this much larger and reduced, so that edges are smooth."""
NOISE = 5
"""Standard deviation of the grain, in grey levels."""

# Outlines in a square from -1 to 1, x to the right and y downwards. Each part is a list of strokes, drawn in order;
# a stroke is an outline of points, or a centre with two radii; `-` before its name cuts a hole.
Number = int | float
Stroke = tuple[str, tuple[Number, ...]]


def _polygon(*points: Number) -> Stroke:
    return "polygon", points


def _ellipse(x: Number, y: Number, rx: Number, ry: Number) -> Stroke:
    return "ellipse", (x, y, rx, ry)


def _hole(x: Number, y: Number, rx: Number, ry: Number) -> Stroke:
    return "-ellipse", (x, y, rx, ry)


def _star() -> Stroke:
    points: list[Number] = []
    for corner in range(10):
        angle, radius = np.pi * (corner / 5 - 0.5), 1.0 if corner % 2 == 0 else 0.42
        points += [radius * np.cos(angle), radius * np.sin(angle)]
    return _polygon(*points)


OUTLINES: dict[str, dict[str, list[Stroke]]] = {
    "circle": {"circle": [_ellipse(0, 0, 0.92, 0.92)]},
    "square": {"square": [_polygon(-0.85, -0.85, 0.85, -0.85, 0.85, 0.85, -0.85, 0.85)]},
    "triangle": {"triangle": [_polygon(0, -0.95, 0.95, 0.85, -0.95, 0.85)]},
    "star": {"star": [_star()]},
    "cross": {"cross": [_polygon(-0.3, -1, 0.3, -1, 0.3, 1, -0.3, 1), _polygon(-1, -0.3, 1, -0.3, 1, 0.3, -1, 0.3)]},
    "ring": {"ring": [_ellipse(0, 0, 0.97, 0.97), _hole(0, 0, 0.55, 0.55)]},
    "diamond": {"diamond": [_polygon(0, -1, 0.72, 0, 0, 1, -0.72, 0)]},
    "heart": {
        "heart": [
            _ellipse(-0.47, -0.42, 0.5, 0.5),
            _ellipse(0.47, -0.42, 0.5, 0.5),
            _polygon(-0.93, -0.22, 0.93, -0.22, 0, 0.98),
        ]
    },
    "banana": {"banana": [_ellipse(0, -0.1, 1.0, 0.95), _hole(0.05, -0.65, 1.05, 0.95)]},
    "tomato": {
        "tomato": [
            _ellipse(0, 0.18, 0.95, 0.78),
            _polygon(-0.12, -0.5, -0.35, -1, 0.35, -1, 0.12, -0.5),
            _hole(0, -0.45, 0.5, 0.12),
        ]
    },
    "frog": {
        "frog": [
            _ellipse(0, 0.15, 0.75, 0.55),
            _ellipse(-0.45, -0.5, 0.3, 0.34),
            _ellipse(0.45, -0.5, 0.3, 0.34),
            _polygon(-0.6, 0.3, -1, 0.95, -0.3, 0.75),
            _polygon(0.6, 0.3, 1, 0.95, 0.3, 0.75),
        ]
    },
    "carrot": {
        "carrot": [
            _polygon(-0.5, -0.4, 0.5, -0.4, 0, 1),
            _polygon(-0.1, -0.35, -0.6, -1, -0.2, -0.9),
            _polygon(0.1, -0.35, 0.6, -1, 0.2, -0.9),
            _polygon(-0.12, -0.35, 0, -1, 0.12, -0.35),
        ]
    },
    "grape": {
        "grape": [
            _ellipse(x, y, 0.3, 0.3)
            for x, y in ((-0.62, -0.6), (0, -0.6), (0.62, -0.6), (-0.31, 0.02), (0.31, 0.02), (0, 0.64))
        ]
    },
    "whale": {
        "whale": [
            _ellipse(-0.15, 0.25, 0.82, 0.5),
            _polygon(0.5, 0.2, 0.65, -0.3, 0.4, -0.85, 0.75, -0.6, 1, -0.85, 0.9, -0.2, 0.75, 0.35),
        ]
    },
    "raven": {
        "raven": [
            _ellipse(-0.05, 0.1, 0.5, 0.4),
            _ellipse(0.5, -0.35, 0.28, 0.28),
            _polygon(0.7, -0.5, 1, -0.3, 0.7, -0.2),
            _polygon(-0.3, 0.1, -1, -0.75, 0.2, -0.2),
            _polygon(-0.4, 0.2, -1, 0.6, -0.2, 0.45),
            _polygon(-0.05, 0.4, 0.05, 0.95, 0.2, 0.95, 0.15, 0.4),
        ]
    },
    "cactus": {
        "cactus": [
            _polygon(-0.25, -1, 0.25, -1, 0.25, 1, -0.25, 1),
            _polygon(-0.9, -0.45, -0.6, -0.45, -0.6, 0.1, -0.2, 0.1, -0.2, 0.4, -0.9, 0.4),
            _polygon(0.9, -0.75, 0.6, -0.75, 0.6, -0.2, 0.2, -0.2, 0.2, 0.1, 0.9, 0.1),
        ]
    },
    "house": {
        "roof": [_polygon(0, -1, 1, -0.2, -1, -0.2)],
        "wall": [_polygon(-0.8, -0.2, 0.8, -0.2, 0.8, 1, -0.8, 1)],
        "door": [_polygon(-0.3, 0.2, 0.3, 0.2, 0.3, 1, -0.3, 1)],
    },
    "tree": {
        "crown": [_ellipse(0, -0.35, 0.95, 0.65)],
        "trunk": [_polygon(-0.28, 0.25, 0.28, 0.25, 0.28, 1, -0.28, 1)],
    },
    "fish": {
        "body": [_ellipse(-0.25, 0, 0.75, 0.55)],
        "tail": [_polygon(0.35, 0, 1, -0.7, 1, 0.7)],
    },
    "mushroom": {
        "cap": [_ellipse(0, -0.05, 1, 0.9), ("-polygon", (-1, 0.05, 1, 0.05, 1, 1, -1, 1))],
        "stem": [_polygon(-0.32, 0.05, 0.32, 0.05, 0.32, 1, -0.32, 1)],
    },
    BEETLE: {BEETLE: [_ellipse(0, 0.1, 0.75, 0.85), _ellipse(0, -0.75, 0.35, 0.25)]},
}
MARKS: dict[str, list[Stroke]] = {
    "alva": [_polygon(-0.12, -0.6, 0.12, -0.6, 0.12, 0.9, -0.12, 0.9)],
    "brin": [_polygon(-0.7, -0.05, 0.7, -0.05, 0.7, 0.25, -0.7, 0.25)],
    "corvo": [_ellipse(0, 0.1, 0.3, 0.3)],
    "delu": [_ellipse(-0.35, 0.1, 0.2, 0.2), _ellipse(0.35, 0.1, 0.2, 0.2)],
    "emmer": [
        _polygon(-0.12, -0.6, 0.12, -0.6, 0.12, 0.9, -0.12, 0.9),
        _polygon(-0.7, -0.02, 0.7, -0.02, 0.7, 0.22, -0.7, 0.22),
    ],
    "fenno": [_ellipse(0, 0.1, 0.5, 0.55), _hole(0, 0.1, 0.28, 0.32)],
    "gorm": [_polygon(0, -0.6, 0.75, 0.1, 0, 0.95)],
    "hild": [
        _polygon(-0.6, -0.3, 0.6, -0.3, 0.6, -0.12, -0.6, -0.12),
        _polygon(-0.6, 0.35, 0.6, 0.35, 0.6, 0.53, -0.6, 0.53),
    ],
}
assert set(MARKS) == set(CLASSES)


def _draw_strokes(strokes: list[Stroke], length: int, x: Number, y: Number) -> Image.Image:
    mask = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    pen, half = ImageDraw.Draw(mask), length * SCALE / 2
    for name, numbers in strokes:
        fill = 0 if name.startswith("-") else 255
        if name.endswith("polygon"):
            xs, ys = numbers[::2], numbers[1::2]
            corners = [(x * SCALE + px * half, y * SCALE + py * half) for px, py in zip(xs, ys, strict=True)]
            pen.polygon(corners, fill=fill)
        else:
            cx, cy, rx, ry = numbers
            left, top = x * SCALE + (cx - rx) * half, y * SCALE + (cy - ry) * half
            pen.ellipse((left, top, left + 2 * rx * half, top + 2 * ry * half), fill=fill)
    return mask


@functools.lru_cache(maxsize=512)
def _stencil(kind: str, part: str, length: int) -> Image.Image:
    """The part of a thing centred in the canvas, to be moved into place."""
    return _draw_strokes(OUTLINES[kind][part], length, SIZE / 2, SIZE / 2)


@functools.lru_cache(maxsize=64)
def _marks(species: str, length: int) -> Image.Image:
    return _draw_strokes(MARKS[species], length, SIZE / 2, SIZE / 2)


def _offset(thing: Thing) -> tuple[int, int]:
    return round((thing.x - SIZE / 2) * SCALE), round((thing.y - SIZE / 2) * SCALE)


def _shade(colour: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, level + rng.randint(-12, 12))) for level in COLOURS[colour])
    return red, green, blue


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 96 x 96 pixels; the same scene always gives the same pixels."""
    rng = random.Random(scene.grain)
    canvas = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), (scene.background,) * 3)
    for thing in scene.things:
        # One draw of shades per part whatever the colour, so that a counterfactual keeps the shades of everything else.
        states = [rng.getrandbits(32) for _ in range(4)]
        for part, colour, state in zip(thing.parts, thing.colours, states, strict=False):
            ink = _shade(colour, random.Random(state))
            canvas.paste(ink, _offset(thing), _stencil(thing.kind, part, thing.length))
        if thing.species is not None:
            canvas.paste((20, 20, 20), _offset(thing), _marks(thing.species, thing.length))
    pixels = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX), dtype=np.float32)
    grain = np.random.default_rng(scene.grain).normal(0, NOISE, pixels.shape)
    return Image.fromarray(np.clip(pixels + grain, 0, 255).round().astype(np.uint8))


def masks(scene: Scene) -> dict[tuple[int, str], Bool[np.ndarray, "96 96"]]:
    """Visible pixels of every part, by number of the thing in the scene and name of the part.

    A pixel belongs to the part that covers at least half of it and is covered by nothing later.
    """
    found: dict[tuple[int, str], np.ndarray] = {}
    for number, thing in enumerate(scene.things):
        for part in thing.parts:
            canvas = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
            canvas.paste(255, _offset(thing), _stencil(thing.kind, part, thing.length))
            covered = np.asarray(canvas.resize((SIZE, SIZE), Image.Resampling.BOX)) >= 128
            for earlier in found:
                found[earlier] = found[earlier] & ~covered
            found[number, part] = covered
    return found


def shared_pixels(one: Thing, other: Thing) -> float:
    """Area in pixels that two things without parts would both cover."""
    canvases = []
    for thing in (one, other):
        canvas = Image.new("1", (SIZE * SCALE, SIZE * SCALE))
        canvas.paste(1, _offset(thing), _stencil(thing.kind, thing.kind, thing.length))
        canvases.append(canvas)
    both = ImageChops.logical_and(*canvases)
    return sum(both.histogram()[1:]) / SCALE**2


def blank(background: int = 228) -> Image.Image:
    """A picture of nothing: a plain grey ground without grain."""
    return Image.new("RGB", (SIZE, SIZE), (background,) * 3)
