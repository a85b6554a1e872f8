"""Who is on the street: the ego vehicle's path, and objects that never run into each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .objects import Actor, make_actor
from .rig import EGO_CENTRE_AHEAD, EGO_SIZE
from .road import BIKE_LANE_WIDTH, CROSS_STREET_HALF_WIDTH, PARKING_WIDTH, Road, Track
from .world import KERB

_GAP = 0.35  # metres kept between objects
_STEP = 0.25  # seconds between the moments at which gaps are checked
WORK_ZONE = (9.0, 31.0)
"""Begin and end of the work zone, metres along the street from the ego vehicle's middle position."""


@dataclass(frozen=True)
class _Body:
    """Footprints of an object over time: (T, 2) middles, (T,) headings, half length and half width."""

    middle: np.ndarray
    heading: np.ndarray
    half: tuple[float, float]


def _body(track: Track, size: tuple[float, float], times: np.ndarray, ahead: float = 0.0) -> _Body:
    poses = np.array([track.pose(float(t)) for t in (times if track.moving else times[:1])])
    poses = np.broadcast_to(poses, (len(times), 3))
    heading = poses[:, 2]
    middle = poses[:, :2] + ahead * np.stack([np.cos(heading), np.sin(heading)], 1)
    return _Body(middle, heading, ((size[0] + _GAP) / 2, (size[1] + _GAP) / 2))


def _touch(a: _Body, b: _Body) -> bool:
    """Whether two turned rectangles overlap at any time (separating axes)."""
    reach = math.hypot(*a.half) + math.hypot(*b.half)
    difference = b.middle - a.middle
    near = np.flatnonzero((difference**2).sum(1) < reach * reach)
    if len(near) == 0:
        return False
    overlap = np.ones(len(near), bool)
    axes = []
    for body in (a, b):
        cos, sin = np.cos(body.heading[near]), np.sin(body.heading[near])
        axes.append((np.stack([cos, sin], 1), np.stack([-sin, cos], 1)))
    for axis in (*axes[0], *axes[1]):
        distance = np.abs((difference[near] * axis).sum(1))
        extent = sum(half * np.abs((edge * axis).sum(1))
                     for body, pair in zip((a, b), axes, strict=True)
                     for half, edge in zip(body.half, pair, strict=True))
        overlap &= distance < extent
    return bool(overlap.any())


class Traffic:
    """Places objects one after the other; those that would touch an earlier one are left out.

    Args:
        road: The street.
        ego: Path of the ego vehicle.
        duration: Length of the scene in seconds.
        rng: Source of the variety.
    """

    def __init__(self, road: Road, ego: Track, duration: float, rng: np.random.Generator) -> None:
        self.road, self.ego, self.duration, self.rng = road, ego, duration, rng
        way = ego.s_speed * duration
        self.middle = ego.s + way / 2
        self.begin, self.end = ego.s - 55, ego.s + way + 65
        self.times = np.arange(-0.5, duration + 0.5 + _STEP, _STEP)
        self.actors: list[Actor] = []
        self._bodies = [_body(ego, EGO_SIZE[:2], self.times, EGO_CENTRE_AHEAD)]

    def place(self, kind: str, s: float, d: float, s_speed: float = 0.0, d_speed: float = 0.0, turn: float = 0.0,
              base: float | None = None) -> bool:
        """Put an object that is at (s, d) at half time; whether there was room."""
        half_time = self.duration / 2
        if base is None:
            base = KERB if abs(d) > self.road.half_width else 0.0
        track = Track(self.road, s - s_speed * half_time, d - d_speed * half_time, s_speed, d_speed, turn)
        actor = make_actor(kind, track, base, self.rng)
        body = _body(track, actor.size[:2], self.times)
        if any(_touch(body, other) for other in self._bodies):
            return False
        self.actors.append(actor)
        self._bodies.append(body)
        return True

    def clear_of_crossings(self, s: float, distance: float) -> bool:
        """Whether s is that far from the borders of all cross streets."""
        return float(self.road.from_crossing(np.array(s))) > CROSS_STREET_HALF_WIDTH + distance

    def amount(self, per_stretch: float) -> int:
        """How many things there are along the whole way, of a number per 130 metres."""
        return round(per_stretch * (self.end - self.begin) / 130)

    def fill(self) -> list[Actor]:
        """Place everything; the objects."""
        self.lanes()
        self.work_zone()
        self.cycles()
        self.parked()
        self.people()
        return self.actors

    def lanes(self) -> None:
        """Cars, trucks with trailers, buses and motorcycles in the lanes of both directions."""
        road, rng = self.road, self.rng
        fleet = ["car", "truck", "car", "bus", "car", "motorcycle", "car", "construction_vehicle", "car", "car"]
        n = int(rng.integers(len(fleet)))
        for lane in range(road.lanes):
            for side in (-1, 1):
                d, backwards = side * road.lane_middle(lane), side > 0
                own = not backwards and abs(d - self.ego.d) < 1
                speed = self.ego.s_speed if own else rng.uniform(4, 10) * (-1 if backwards else 1)
                # Whoever comes near the ego vehicle at any time of the scene.
                reach = 45 + abs(self.ego.s_speed - speed) * self.duration / 2
                s = self.middle + (14 + rng.uniform(0, 6) if own else rng.uniform(-7, 5) - reach)
                stops = []
                while s < self.middle + reach + 15:
                    stops.append(s)
                    s += rng.uniform(15, 30)
                if own:
                    stops.append(self.middle - 13 - rng.uniform(0, 4))
                for place in stops:
                    n += self._in_lane(fleet[n % len(fleet)], place, d, speed, math.pi if backwards else 0.0)

    def _in_lane(self, kind: str, s: float, d: float, speed: float, turn: float) -> bool:
        d += self.rng.uniform(-0.2, 0.2)
        placed = self.place(kind, s, d, speed, turn=turn)
        if placed and kind == "truck":
            behind = -math.copysign(self.actors[-1].size[0] / 2 + 5.6, speed)
            self.place("trailer", s + behind, d, speed, turn=turn)
        return placed

    def work_zone(self) -> None:
        """A construction vehicle at the right border of the road, behind barriers and cones."""
        road, begin, end = self.road, self.middle + WORK_ZONE[0], self.middle + WORK_ZONE[1]
        lane_edge, kerb = road.lanes_edge, road.half_width
        self.place("construction_vehicle", (begin + end) / 2 + 2, -(kerb - 1.6), turn=self.rng.uniform(-0.2, 0.2))
        for s in np.arange(begin + 5, end - 2, 2.7):
            if self.clear_of_crossings(s, 0):
                self.place("barrier", s, -(lane_edge + 0.5), turn=math.pi / 2)
        for n in range(4):
            s, d = begin + 0.5 + 1.2 * n, -(kerb - 0.6 - 0.85 * n)
            if self.clear_of_crossings(s, 0):
                self.place("traffic_cone", s, d)

    def cycles(self) -> None:
        """Riders in the bicycle lanes, one motorcycle beside the traffic."""
        middle, rng = self.road.lanes_edge + BIKE_LANE_WIDTH / 2, self.rng
        for side in (-1, 1):
            s = self.begin + rng.uniform(10, 20)
            while s < self.end:
                speed = -side * rng.uniform(3.0, 5.5)
                kind = "motorcycle" if rng.random() < 0.2 else "bicycle"
                self.place(kind, s, side * middle, speed, turn=0 if side < 0 else math.pi)
                s += rng.uniform(16, 40)

    def parked(self) -> None:
        """Vehicles at the kerbs, cycles on the sidewalks."""
        road, rng = self.road, self.rng
        d = road.half_width - PARKING_WIDTH / 2 - 0.05
        kinds = ["truck", "car", "car", "trailer", "car", "car", "motorcycle", "car", "bus", "car", "car"]
        n = int(rng.integers(len(kinds)))
        for side in (-1, 1):
            s = self.begin - 10 + rng.uniform(0, 4)
            while s < self.end + 5:
                kind = kinds[n % len(kinds)]
                room = {"car": 6.4, "motorcycle": 3.5}.get(kind, 13.0)
                zone = side < 0 and WORK_ZONE[0] - 2 < s + room - self.middle and s < self.middle + WORK_ZONE[1] + 2
                if not zone and self.clear_of_crossings(s + room / 2, room / 2 + 4.5) and rng.random() < 0.6:
                    turn = (0 if side < 0 else math.pi) + rng.uniform(-0.03, 0.03)
                    n += self.place(kind, s + room / 2, side * d, turn=turn)
                    s += room
                else:
                    s += 6.4
            for _ in range(self.amount(4)):
                s = rng.uniform(self.begin, self.end)
                if self.clear_of_crossings(s, 4):
                    self.place("bicycle", s, side * (road.half_width + 1.9), turn=rng.uniform(-0.4, 0.4))

    def people(self) -> None:
        """Pedestrians on the sidewalks and on the zebra crossings, groups that stand."""
        road, rng = self.road, self.rng
        for side in (-1, 1):
            for _ in range(self.amount(9)):
                s, speed = rng.uniform(self.begin, self.end), rng.uniform(0.8, 1.7) * rng.choice((-1, 1))
                d = side * (road.half_width + rng.uniform(1.1, 1.35))
                reach = abs(speed) * (self.duration / 2 + 0.5)
                if self.clear_of_crossings(s, reach):
                    self.place("pedestrian", s, d, speed, turn=0 if speed > 0 else math.pi)
            for place in rng.uniform(self.begin, self.end, self.amount(5)):
                for _ in range(int(rng.integers(1, 4))):
                    s, d = place + rng.uniform(-1.4, 1.4), side * (road.half_width + rng.uniform(1.6, 2.25))
                    if self.clear_of_crossings(s, 3):
                        self.place("pedestrian", s, d, turn=rng.uniform(0, 2 * math.pi))
        for crossing in road.crossings:
            for side in (-1, 1):
                s = crossing + side * (CROSS_STREET_HALF_WIDTH + 2.5)
                for _ in range(3):
                    speed = rng.uniform(0.9, 1.5) * rng.choice((-1, 1))
                    d, reach = rng.uniform(-5, 5), abs(speed) * (self.duration / 2 + 0.5)
                    # Only while on the road: its surface is lower than the sidewalks, and the median is not open.
                    if abs(d) + reach < road.half_width - 0.4:
                        self.place("pedestrian", s + rng.uniform(-0.7, 0.7), d, d_speed=speed,
                                   turn=math.copysign(math.pi / 2, speed))
