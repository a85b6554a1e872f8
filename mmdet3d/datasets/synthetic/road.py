"""The street of a scene: a strip of constant curvature, and the paths of everything that moves along it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LANE_WIDTH = 3.5
BIKE_LANE_WIDTH = 1.7
PARKING_WIDTH = 2.4
CROSS_STREET_HALF_WIDTH = 5.0
CROSSWALK = (1.0, 4.0)
"""Begin and end of the zebra crossings, metres from the border of the cross street."""


@dataclass(frozen=True)
class Road:
    """A street in street coordinates: s along its middle, d to its left, both in metres.

    Attributes:
        origin: Global (x, y) of s = d = 0.
        heading: Direction at s = 0 in radians.
        curvature: 1 / radius in 1/m, positive to the left, 0 for a straight street.
        lanes: Lanes per direction; traffic keeps to the right.
        median: Width of the strip between the directions, 0 without one.
        walk: Width of the sidewalks.
        crossings: s of the middles of cross streets.
    """

    origin: tuple[float, float]
    heading: float
    curvature: float
    lanes: int
    median: float
    walk: float
    crossings: tuple[float, ...]

    @property
    def lanes_edge(self) -> float:
        """abs(d) of the outer border of the car lanes."""
        return self.median / 2 + self.lanes * LANE_WIDTH

    @property
    def half_width(self) -> float:
        """abs(d) of the kerb."""
        return self.lanes_edge + BIKE_LANE_WIDTH + PARKING_WIDTH

    @property
    def walk_edge(self) -> float:
        """abs(d) of the outer border of the sidewalks."""
        return self.half_width + self.walk

    def lane_middle(self, lane: int) -> float:
        """abs(d) of the middle of a lane; lane 0 is the innermost."""
        return self.median / 2 + (lane + 0.5) * LANE_WIDTH

    def heading_at(self, s: float) -> float:
        """Direction of the street in radians."""
        return self.heading + self.curvature * s

    def position(self, s: float, d: float) -> tuple[float, float]:
        """Global (x, y) of a point given in street coordinates."""
        if self.curvature == 0:
            x, y = s, d
        else:
            radius = 1 / self.curvature
            x = (radius - d) * math.sin(s * self.curvature)
            y = radius - (radius - d) * math.cos(s * self.curvature)
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        return self.origin[0] + cos * x - sin * y, self.origin[1] + sin * x + cos * y

    def street_coordinates(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(s, d) of global points, any shape."""
        x, y = x - self.origin[0], y - self.origin[1]
        cos, sin = math.cos(self.heading), math.sin(self.heading)
        x, y = cos * x + sin * y, cos * y - sin * x
        if self.curvature == 0:
            return x, y
        radius = 1 / self.curvature
        sign = math.copysign(1, radius)
        y = y - radius
        return np.arctan2(sign * x, -sign * y) * radius, radius - sign * np.sqrt(x * x + y * y)

    def from_crossing(self, s: np.ndarray) -> np.ndarray:
        """Distance along s to the middle of the nearest cross street, infinite without any."""
        distance = np.full(np.shape(s), np.inf, np.float32)
        for crossing in self.crossings:
            distance = np.minimum(distance, np.abs(s - crossing))
        return distance


@dataclass(frozen=True)
class Track:
    """A path through a street at constant speed, with an optional slow weave to the sides.

    Attributes:
        road: The street.
        s: Position along the street at time 0, in metres.
        d: Position across it at time 0.
        s_speed: Change of s in m/s.
        d_speed: Change of d in m/s.
        turn: Heading against the street's in radians.
        weave: Amplitude of the weave in metres.
    """

    road: Road
    s: float
    d: float
    s_speed: float = 0.0
    d_speed: float = 0.0
    turn: float = 0.0
    weave: float = 0.0

    @property
    def moving(self) -> bool:
        """Whether the position changes."""
        return self.s_speed != 0 or self.d_speed != 0

    def pose(self, seconds: float) -> tuple[float, float, float]:
        """Global x, y and heading in radians."""
        s = self.s + self.s_speed * seconds
        d = self.d + self.d_speed * seconds + self.weave * math.sin(0.7 * seconds)
        slip = math.atan2(0.7 * self.weave * math.cos(0.7 * seconds), self.s_speed) if self.weave else 0.0
        x, y = self.road.position(s, d)
        return x, y, self.road.heading_at(s) + self.turn + slip

    def velocity(self, seconds: float, interval: float = 0.5) -> tuple[float, float]:
        """Global (vx, vy) in m/s: the centred difference over ``interval`` to both sides, as for annotated boxes."""
        if not self.moving:
            return 0.0, 0.0
        before, after = self.pose(seconds - interval), self.pose(seconds + interval)
        return (after[0] - before[0]) / (2 * interval), (after[1] - before[1]) / (2 * interval)
