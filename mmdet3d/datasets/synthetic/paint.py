"""Procedural textures of objects. A painter gets points on a part and gives their colours."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .objects import Part

Painter = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]
"""(colors (P, 3) to be changed, unit (P, 3) position in the part from 0 to 1, metres (P, 3) from its middle, axis)."""


def _plain(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """One colour."""


def _body(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """Lamps at both ends, a dark line along the sides."""
    lamp = (axis == 0) & (np.abs(unit[:, 1] - 0.5) > 0.3) & (np.abs(unit[:, 1] - 0.5) < 0.47)
    lamp &= (unit[:, 2] > 0.45) & (unit[:, 2] < 0.8)
    colors[(axis == 0) & (unit[:, 2] < 0.35)] *= 0.6
    colors[(axis == 1) & (unit[:, 2] < 0.12)] *= 0.5
    colors[lamp & (unit[:, 0] > 0.5)] = (250, 246, 220)
    colors[lamp & (unit[:, 0] < 0.5)] = (205, 24, 24)


def _glass(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """Windows between pillars."""
    along = np.where(axis == 1, unit[:, 0], unit[:, 1])
    pane = (np.abs(along - 0.5) < 0.46) & (unit[:, 2] > 0.08) & (axis != 2)
    pane &= (axis == 0) | (np.abs(along - 0.5) > 0.03)
    colors[pane] = (46, 56, 66)
    colors[pane] += 26 * unit[pane, 2:]


def _windows(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """A band of large windows, lamps below."""
    _body(colors, unit, metres, axis)
    along = np.where(axis == 0, metres[:, 1], metres[:, 0])
    pane = (axis != 2) & (unit[:, 2] > 0.42) & (unit[:, 2] < 0.82) & (np.mod(along, 1.5) > 0.14)
    colors[pane] = (40, 50, 62)


def _tyre(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """A hub on dark rubber."""
    radius = np.hypot(unit[:, 0] - 0.5, unit[:, 2] - 0.5)
    colors[(axis == 1) & (radius < 0.27)] = (126, 128, 132)
    colors[(axis == 1) & (radius > 0.5)] = (14, 14, 15)


def _stripes(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """Slanted warning stripes."""
    along = np.where(axis == 0, metres[:, 1], metres[:, 0])
    colors[np.mod(along + metres[:, 2], 0.6) < 0.3] = (232, 230, 224)


def _bands(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """A white band around the lower half."""
    colors[(unit[:, 2] > 0.15) & (unit[:, 2] < 0.55) & (axis != 2)] = (238, 238, 234)


def _head(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """Hair at the top and the back."""
    colors[(unit[:, 2] > 0.72) | ((unit[:, 0] < 0.4) & (unit[:, 2] > 0.3))] = (62, 44, 32)


def _box(colors: np.ndarray, unit: np.ndarray, metres: np.ndarray, axis: np.ndarray) -> None:
    """Ribs and a dark lower border, lamps at the rear."""
    along = np.where(axis == 0, metres[:, 1], metres[:, 0])
    colors[np.mod(along, 0.8) < 0.08] *= 0.82
    low = (unit[:, 2] < 0.06) & (axis != 2)
    colors[low] = (52, 54, 58)
    colors[low & (axis == 0) & (unit[:, 0] < 0.5) & (np.abs(unit[:, 1] - 0.5) > 0.36)] = (205, 24, 24)


PATTERNS: dict[str, Painter] = {
    "plain": _plain, "body": _body, "glass": _glass, "windows": _windows, "tyre": _tyre, "stripes": _stripes,
    "bands": _bands, "head": _head, "box": _box,
}
"""Painters by the name that parts give."""


def paint_part(part: Part, points: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """(P, 3) float32 colours, 0..255, of points (P, 3) on a part, in the object's own frame.

    Args:
        part: The part.
        points: Positions in metres.
        axis: (P,) axis across the face that each lies on.
    """
    low, high = np.array(part.low, np.float32), np.array(part.high, np.float32)
    colors = np.tile(np.array(part.color, np.float32), (len(points), 1))
    PATTERNS[part.pattern](colors, (points - low) / (high - low), points - (low + high) / 2, axis)
    return colors
