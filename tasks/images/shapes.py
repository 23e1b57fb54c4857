"""The bundled images: ten shapes, 32 x 32 pixels, drawn from random numbers.

Everything but the shape is random: its pose, the colours of shape and ground, stripes over both, and noise. Shape and
ground are as often the brighter one, so no pixel tells anything by itself and a linear model stays near chance; a model
must find edges first, and then how they go on.

All numbers are float32. Functions are computed in float64, since numpy's in float32 depend on the CPU (AVX-512 or not).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SIZE = 32  # pixels a side
CHUNK = 1000  # images drawn at once
# {what is drawn: {place: value}}: 61 of the 86 million numbers of the bundled images. They differ by 1 from what is
# drawn, because the images of published records were drawn with functions in float32, on CPUs with AVX-512.
PUBLISHED = Path(__file__).with_name("shapes_published.json")

# What the random numbers range over: chosen so that models that see more of an image's structure do better.
SHIFT = 4.5  # from the middle, in pixels, both ways
TURN = 1.2  # in radians, both ways
RADIUS = (8, 12)  # in pixels
STRETCH = (0.85, 1.18)  # of the shape's own axes, the one by this and the other by its inverse
CONTRAST, TINT = (0.25, 0.4), 0.12  # of all channels together and of each by itself, where white is 1
STRIPES = 0.03
NOISE = (0.02, 0.05)  # standard deviation


def _rounded(function: Callable[..., Array]) -> Callable[..., Array]:
    """Return the function, computed in float64 and rounded to float32: the same on every CPU."""

    def rounded(*values: Array) -> Array:
        found: Array = function(*values, dtype=np.float64).astype(np.float32)
        return found

    return rounded


_arctan2, _hypot, _sin, _cos = map(_rounded, (np.arctan2, np.hypot, np.sin, np.cos))


def _polygon(u: Array, v: Array, corners: int) -> Array:
    """Return the distance to a regular polygon, its corners on the unit circle."""
    sector = 2 * np.pi / corners
    angle = np.mod(_arctan2(v, u), sector) - sector / 2
    distance: Array = _hypot(u, v) * _cos(angle) - np.cos(sector / 2)
    return distance


def _star(u: Array, v: Array) -> Array:
    """Return the distance to a star: five points on the unit circle, five notches on a circle of .45."""
    sector = 2 * np.pi / 5
    angle = np.abs(np.mod(_arctan2(v, u), sector) - sector / 2)  # 0 at a notch, sector / 2 at a point
    radius = _hypot(u, v)
    x, y = radius * _cos(angle), radius * _sin(angle)
    notch, point = np.array([0.45, 0.0]), np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = (point - notch) / np.linalg.norm(point - notch)
    distance: Array = (x - notch[0]) * edge[1] - (y - notch[1]) * edge[0]
    return distance


def _box(u: Array, v: Array, left: float, right: float, low: float, high: float) -> Array:
    across, along = np.abs(u - (left + right) / 2) - (right - left) / 2, np.abs(v - (low + high) / 2) - (high - low) / 2
    return np.maximum(across, along)


# Signed distances (nearly): negative inside, in units of the shape's radius.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: _hypot(u, v) - 0.85,
    "ring": lambda u, v: np.abs(_hypot(u, v) - 0.7) - 0.2,
    "triangle": lambda u, v: _polygon(u, v, 3),
    "square": lambda u, v: _polygon(u, v, 4),
    "pentagon": lambda u, v: _polygon(u, v, 5),
    "star": _star,
    "cross": lambda u, v: np.minimum(_box(u, v, -0.9, 0.9, -0.27, 0.27), _box(u, v, -0.27, 0.27, -0.9, 0.9)),
    "crescent": lambda u, v: np.maximum(_hypot(u, v) - 0.9, 0.72 - _hypot(u - 0.45, v)),
    "ell": lambda u, v: np.minimum(_box(u, v, -0.6, -0.1, -0.85, 0.85), _box(u, v, -0.6, 0.7, -0.85, -0.35)),
    "tee": lambda u, v: np.minimum(_box(u, v, -0.25, 0.25, -0.85, 0.85), _box(u, v, -0.8, 0.8, 0.35, 0.85)),
}


def draw(count: int, seed: int) -> tuple[Array, Array]:
    """Return ``count`` images, the same for a seed: uint8 ``[count, 32, 32, 3]``, and labels, int64 ``[count]``.

    The classes, in the order of :data:`SHAPES`, come equally often.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    chunks = [_draw(labels[start : start + CHUNK], rng) for start in range(0, count, CHUNK)]
    images = np.concatenate(chunks)
    published = json.loads(PUBLISHED.read_text(encoding="utf8")).get(f"{count} images, seed {seed}", {})
    images.flat[list(map(int, published))] = list(published.values())
    return images, labels


def _draw(labels: Array, rng: np.random.Generator) -> Array:
    n = len(labels)

    def uniform(low: float, high: float, *more: int) -> Array:
        return rng.uniform(low, high, (n, *more)).astype(np.float32)

    def spread(values: Array) -> Array:
        return values[:, None, None]  # [n] to [n, 1, 1]

    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32) - (SIZE - 1) / 2  # from the middle, in pixels
    # pose
    x, y = columns - spread(uniform(-SHIFT, SHIFT)), rows - spread(uniform(-SHIFT, SHIFT))  # [n, H, W]
    turn, radius, stretch = uniform(-TURN, TURN), uniform(*RADIUS), uniform(*STRETCH)
    u, v = _turned(x, y, turn)
    u, v = u / spread(radius * stretch), v / spread(radius / stretch)
    inside = np.empty((n, SIZE, SIZE), np.float32)
    for label, shape in enumerate(SHAPES.values()):
        chosen = labels == label
        inside[chosen] = shape(u[chosen], v[chosen])
    cover = np.clip(0.5 - inside * spread(radius), 0, 1)  # an edge is a pixel wide
    # colours: the shape is brighter than the ground, or darker
    ground = uniform(0.25, 0.75, 3)
    step = uniform(*CONTRAST, 1) * rng.choice((-1, 1), (n, 1)) + uniform(-TINT, TINT, 3)
    image = ground[:, None, None] + cover[..., None] * step[:, None, None]  # [n, H, W, 3]
    # stripes, of another kind on the shape
    for part in (cover, 1 - cover):
        along, _ = _turned(columns, rows, uniform(0, np.pi))
        wave = _sin(spread(uniform(0.3, 1.6)) * along + spread(uniform(0, 2 * np.pi)))
        image += (part * wave)[..., None] * uniform(-STRIPES, STRIPES, 3)[:, None, None]
    noise = rng.standard_normal(image.shape, np.float32)
    image += noise * uniform(*NOISE)[:, None, None, None]
    pixels: Array = np.clip(image * 255 + 0.5, 0, 255).astype(np.uint8)
    return pixels


def _turned(x: Array, y: Array, angle: Array) -> tuple[Array, Array]:
    cos, sin = _cos(angle)[:, None, None], _sin(angle)[:, None, None]
    return cos * x + sin * y, cos * y - sin * x
