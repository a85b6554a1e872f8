"""Everything that gets an annotated box: vehicles, people, barriers and cones, made of upright boxes.

An object's own frame has its origin in the middle of the box's lower face, x forward, y left, z up. The parts of an
object touch all six faces of its box.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .road import Track

Span = tuple[float, float]


@dataclass(frozen=True)
class Part:
    """A box in an object's own frame, in metres.

    Attributes:
        low: Lower corner (x, y, z).
        high: Upper corner (x, y, z).
        color: RGB, 0..255.
        pattern: How it is painted, a key of :data:`mmdet3d.datasets.synthetic.paint.PATTERNS`.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]
    color: tuple[int, int, int]
    pattern: str = "plain"


@dataclass(frozen=True)
class Actor:
    """An object and its path.

    Attributes:
        kind: Class name, as in the label sets.
        category: nuScenes category.
        attribute: nuScenes attribute, empty for kinds without one.
        size: Length, width, height of the tight box in metres.
        parts: What it is made of.
        track: Its path; the position is that of the box's middle.
        base: z of the box's lower face.
    """

    kind: str
    category: str
    attribute: str
    size: tuple[float, float, float]
    parts: tuple[Part, ...]
    track: Track
    base: float

    @property
    def box_size(self) -> tuple[float, float, float]:
        """Length, width, height of the annotated box."""
        length, width, height = (edge + 2 * BOX_MARGIN for edge in self.size)
        return length, width, height

    def box_centre(self, seconds: float) -> tuple[float, float, float]:
        """Global centre of the annotated box."""
        x, y, _ = self.track.pose(seconds)
        return x, y, self.base + self.size[2] / 2


BOX_MARGIN = 0.03
"""Metres by which an annotated box is larger than its object on every side, so that noisy lidar points lie inside."""

CATEGORIES = {
    "car": "vehicle.car", "truck": "vehicle.truck", "trailer": "vehicle.trailer", "bus": "vehicle.bus.rigid",
    "construction_vehicle": "vehicle.construction", "bicycle": "vehicle.bicycle", "motorcycle": "vehicle.motorcycle",
    "pedestrian": "human.pedestrian.adult", "barrier": "movable_object.barrier",
    "traffic_cone": "movable_object.trafficcone",
}
"""nuScenes category of every kind of object."""

_PAINTS = ((178, 32, 40), (40, 70, 140), (226, 226, 228), (50, 52, 56), (210, 170, 40), (90, 130, 90), (150, 152, 156),
           (120, 60, 30), (30, 110, 120))
_CLOTHES = ((150, 60, 70), (60, 80, 150), (200, 180, 60), (70, 120, 80), (190, 190, 195), (110, 70, 130))
_SKIN, _TYRE, _DARK, _STEEL = (214, 172, 146), (26, 26, 28), (44, 46, 52), (128, 130, 134)


class _Builder:
    """Collects parts given as fractions of the box: x and y from -0.5 to 0.5, z from 0 to 1."""

    def __init__(self, size: tuple[float, float, float]) -> None:
        self.size, self.parts = size, []

    def add(self, x: Span, y: Span, z: Span, color: tuple[int, int, int], pattern: str = "plain") -> None:
        low, high = (tuple(span[side] * edge for span, edge in zip((x, y, z), self.size, strict=True))
                     for side in (0, 1))
        self.parts.append(Part(low, high, color, pattern))

    def wheels(self, places: tuple[float, ...], radius: float, width: float = 0.25) -> None:
        """Pairs of wheels at fractions of the length; radius and width in metres."""
        length, breadth, height = self.size
        for x in places:
            span = (x - radius / length, x + radius / length)
            for y in ((-0.5, width / breadth - 0.5), (0.5 - width / breadth, 0.5)):
                self.add(span, y, (0, 2 * radius / height), _TYRE, "tyre")


def _vary(rng: np.random.Generator, *size: float) -> tuple[float, float, float]:
    scale = rng.uniform(0.94, 1.06)
    return tuple(round(edge * scale, 3) for edge in size)


def _pick(rng: np.random.Generator, colors: tuple) -> tuple[int, int, int]:
    return colors[rng.integers(len(colors))]


def _car(rng: np.random.Generator) -> _Builder:
    b, paint = _Builder(_vary(rng, 4.5, 1.9, 1.6)), _pick(rng, _PAINTS)
    b.wheels((-0.31, 0.31), 0.33)
    b.add((-0.5, 0.5), (-0.5, 0.5), (0.16, 0.56), paint, "body")
    b.add((-0.38, 0.24), (-0.44, 0.44), (0.56, 0.93), paint, "glass")
    b.add((-0.35, 0.18), (-0.42, 0.42), (0.93, 1.0), paint)
    return b


def _truck(rng: np.random.Generator) -> _Builder:
    b, paint = _Builder(_vary(rng, 7.4, 2.5, 3.1)), _pick(rng, _PAINTS)
    b.wheels((-0.33, -0.18, 0.36), 0.48, 0.32)
    b.add((0.26, 0.5), (-0.48, 0.48), (0.15, 0.52), paint, "body")
    b.add((0.26, 0.46), (-0.46, 0.46), (0.52, 0.86), paint, "glass")
    b.add((-0.5, 0.24), (-0.5, 0.5), (0.28, 1.0), _pick(rng, ((225, 225, 220), (90, 120, 160), (190, 130, 60))), "box")
    b.add((-0.5, 0.26), (-0.3, 0.3), (0.18, 0.28), _DARK)
    return b


def _trailer(rng: np.random.Generator) -> _Builder:
    b = _Builder(_vary(rng, 9.5, 2.6, 3.6))
    b.wheels((-0.40, -0.29), 0.48, 0.32)
    b.add((-0.5, 0.5), (-0.5, 0.5), (0.3, 1.0), _pick(rng, ((170, 60, 50), (60, 90, 70), (205, 205, 210))), "box")
    b.add((0.30, 0.33), (-0.3, 0.3), (0.0, 0.3), _STEEL)
    b.add((-0.5, 0.45), (-0.25, 0.25), (0.22, 0.3), _DARK)
    return b


def _bus(rng: np.random.Generator) -> _Builder:
    b = _Builder(_vary(rng, 11.0, 2.8, 3.3))
    b.wheels((-0.28, 0.33), 0.5, 0.32)
    b.add((-0.5, 0.5), (-0.5, 0.5), (0.1, 0.96), _pick(rng, ((226, 176, 40), (60, 130, 90), (190, 50, 50))), "windows")
    b.add((-0.2, 0.2), (-0.3, 0.3), (0.96, 1.0), _STEEL)
    return b


def _construction_vehicle(rng: np.random.Generator) -> _Builder:
    b, yellow = _Builder(_vary(rng, 6.6, 2.7, 3.2)), (222, 160, 24)
    for y in ((-0.5, -0.26), (0.26, 0.5)):
        b.add((-0.5, 0.12), y, (0, 0.28), _TYRE, "tyre")
    b.add((-0.46, 0.08), (-0.46, 0.46), (0.28, 0.58), yellow, "stripes")
    b.add((-0.2, 0.08), (0.0, 0.44), (0.58, 0.96), yellow, "glass")
    b.add((0.0, 0.2), (-0.2, -0.04), (0.5, 1.0), yellow)
    b.add((0.18, 0.44), (-0.18, -0.06), (0.84, 0.96), yellow)
    b.add((0.38, 0.45), (-0.18, -0.06), (0.26, 0.86), yellow)
    b.add((0.36, 0.5), (-0.34, 0.1), (0.02, 0.26), _STEEL)
    return b


def _rider(b: _Builder, rng: np.random.Generator, seat: float) -> None:
    cloth = _pick(rng, _CLOTHES)
    b.add((-0.18, 0.06), (-0.36, 0.36), (seat, 0.84), cloth)
    b.add((0.04, 0.28), (-0.5, 0.5), (0.64, 0.72), cloth)
    b.add((-0.12, 0.06), (-0.34, 0.34), (seat - 0.26, seat), _DARK)
    b.add((-0.14, 0.02), (-0.2, 0.2), (0.84, 1.0), _SKIN, "head")


def _bicycle(rng: np.random.Generator, ridden: bool) -> _Builder:
    b = _Builder(_vary(rng, 1.75, 0.6, 1.7 if ridden else 1.1))
    top = 0.4 if ridden else 0.62
    for x in ((-0.5, -0.12), (0.12, 0.5)):
        b.add(x, (-0.06, 0.06), (0, top), _TYRE, "tyre")
    paint = _pick(rng, _PAINTS)
    b.add((-0.3, 0.3), (-0.07, 0.07), (top * 0.55, top * 1.25), paint)
    b.add((0.2, 0.26), (-0.5, 0.5), (top * 1.4, 0.64 if ridden else 1.0), _STEEL)
    if ridden:
        _rider(b, rng, 0.52)
    return b


def _motorcycle(rng: np.random.Generator, ridden: bool) -> _Builder:
    b = _Builder(_vary(rng, 2.1, 0.8, 1.7 if ridden else 1.2))
    top = 0.38 if ridden else 0.54
    for x in ((-0.5, -0.2), (0.2, 0.5)):
        b.add(x, (-0.12, 0.12), (0, top), _TYRE, "tyre")
    b.add((-0.4, 0.36), (-0.24, 0.24), (top * 0.5, top * 1.35), _pick(rng, _PAINTS), "body")
    b.add((0.2, 0.28), (-0.5, 0.5), (top * 1.35, 0.62 if ridden else 1.0), _STEEL)
    if ridden:
        _rider(b, rng, 0.5)
    return b


def _pedestrian(rng: np.random.Generator) -> _Builder:
    b, cloth = _Builder(_vary(rng, 0.62, 0.66, 1.76)), _pick(rng, _CLOTHES)
    trousers = _pick(rng, ((40, 44, 70), (70, 62, 54), (30, 30, 32)))
    b.add((-0.02, 0.5), (0.06, 0.32), (0, 0.48), trousers)
    b.add((-0.5, 0.02), (-0.32, -0.06), (0, 0.48), trousers)
    b.add((-0.2, 0.2), (-0.36, 0.36), (0.46, 0.83), cloth)
    b.add((-0.14, 0.16), (-0.5, -0.36), (0.44, 0.8), cloth)
    b.add((-0.14, 0.16), (0.36, 0.5), (0.44, 0.8), cloth)
    b.add((-0.16, 0.18), (-0.15, 0.15), (0.85, 1.0), _SKIN, "head")
    return b


def _barrier(rng: np.random.Generator) -> _Builder:
    b = _Builder((0.5, 2.4, 1.0))
    b.add((-0.5, 0.5), (-0.5, 0.5), (0, 0.25), (186, 184, 178))
    b.add((-0.25, 0.25), (-0.5, 0.5), (0.25, 1.0), (222, 82, 40), "stripes")
    return b


def _traffic_cone(rng: np.random.Generator) -> _Builder:
    b = _Builder((0.42, 0.42, 0.78))
    orange = (240, 96, 26)
    b.add((-0.5, 0.5), (-0.5, 0.5), (0, 0.08), orange)
    for edge, z in ((0.36, (0.08, 0.36)), (0.26, (0.36, 0.68)), (0.16, (0.68, 1.0))):
        b.add((-edge, edge), (-edge, edge), z, orange, "bands")
    return b


_BUILDERS: dict[str, Callable[[np.random.Generator], _Builder]] = {
    "car": _car, "truck": _truck, "trailer": _trailer, "bus": _bus, "construction_vehicle": _construction_vehicle,
    "pedestrian": _pedestrian, "barrier": _barrier, "traffic_cone": _traffic_cone,
}


def _attribute(kind: str, moving: bool) -> str:
    if kind in ("barrier", "traffic_cone"):
        return ""
    if kind == "pedestrian":
        return "pedestrian.moving" if moving else "pedestrian.standing"
    if kind in ("bicycle", "motorcycle"):
        return "cycle.with_rider" if moving else "cycle.without_rider"
    return "vehicle.moving" if moving else "vehicle.parked"


def make_actor(kind: str, track: Track, base: float, rng: np.random.Generator) -> Actor:
    """A new object of a kind on a path; cycles that move have a rider.

    Args:
        kind: A key of :data:`CATEGORIES`.
        track: Its path.
        base: z of the ground under it in metres.
        rng: Source of sizes and colours.
    """
    if kind in ("bicycle", "motorcycle"):
        built = (_bicycle if kind == "bicycle" else _motorcycle)(rng, track.moving)
    else:
        built = _BUILDERS[kind](rng)
    return Actor(kind, CATEGORIES[kind], _attribute(kind, track.moving), built.size, tuple(built.parts), track, base)


def inside_parts(actor: Actor, points: np.ndarray, pad: float = 0.0) -> np.ndarray:
    """(P,) bool, whether points (P, 3) in the object's own frame lie in one of its parts.

    Args:
        actor: The object.
        points: Positions in metres.
        pad: Metres by which the parts grow on every side, so that coarse samples miss neither thin parts nor faces.
    """
    inside = np.zeros(len(points), bool)
    for part in actor.parts:
        low, high = np.array(part.low) - pad, np.array(part.high) + pad
        inside |= ((points >= low) & (points < high)).all(1)
    return inside
