"""The still part of a scene: ground, buildings, plants and street furniture in a fine voxel grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .materials import LAST_GROUND, Material
from .noise import hash_cells
from .road import CROSS_STREET_HALF_WIDTH, CROSSWALK, LANE_WIDTH, Road

CELL = 0.2
"""Edge of a voxel in metres."""
LOW_Z = -0.2
"""z of the lower faces of the lowest voxels; the road's surface is at 0."""
KERB = 0.2
"""z of the surface of everything on the ground but the road."""
_HEIGHT = 72  # voxels: up to 14.2 m
_STRIP = 58.0  # metres to both sides of the street that are built
_AHEAD = 75.0  # metres of street before the ego vehicle's start and behind its end
_WALL = 0.6  # thickness of the walls of buildings, which are hollow


@dataclass(frozen=True)
class StaticWorld:
    """Voxels along the axes of the global frame.

    Attributes:
        grid: (X, Y, Z) uint8 :class:`Material`.
        low: Global (x, y, z) of the lower corner in metres.
        style: (X, Y) uint8 number of the building, plant or paving of a column: textures differ by it.
        lit: (X, Y) float32 part of the sun's light that reaches the ground.
        sun: Unit vector towards the sun in the global frame.
    """

    grid: np.ndarray
    low: tuple[float, float, float]
    style: np.ndarray
    lit: np.ndarray
    sun: tuple[float, float, float]


def build_world(road: Road, length: float, work_zone: tuple[float, float], rng: np.random.Generator) -> StaticWorld:
    """Build along a street.

    Args:
        road: The street.
        length: Way of the ego vehicle, from s = 0, in metres.
        work_zone: Begin and end (s) of a part whose right side is kept free of tall things next to the road.
        rng: Source of the variety.
    """
    builder = _WorldBuilder(road, length)
    builder.ground()
    builder.buildings(rng)
    builder.street_furniture(rng, work_zone)
    builder.trees(rng)
    azimuth, elevation = rng.uniform(0, 2 * math.pi), math.radians(rng.uniform(35, 60))
    sun = (math.cos(elevation) * math.cos(azimuth), math.cos(elevation) * math.sin(azimuth), math.sin(elevation))
    return StaticWorld(builder.grid, (*builder.low, LOW_Z), builder.style, _ground_light(builder.grid, sun), sun)


def world_rim(road: Road, length: float) -> np.ndarray:
    """(P, 2) global points around everything that is built along a street."""
    stations = np.linspace(-_AHEAD, length + _AHEAD, 40)
    return np.array([road.position(float(s), d) for s in stations for d in (-_STRIP, _STRIP)])


class _WorldBuilder:
    """Fills the grid. (s, d) of all columns are kept, so that things follow the street's bend."""

    def __init__(self, road: Road, length: float) -> None:
        self.road, self.begin, self.end = road, -_AHEAD, length + _AHEAD
        rim = world_rim(road, length)
        self.low = tuple(np.floor(rim.min(0) / CELL) * CELL)
        size = np.ceil((rim.max(0) - self.low) / CELL).astype(int)
        x, y = (self.low[a] + (np.arange(size[a]) + 0.5) * CELL for a in range(2))
        s, d = road.street_coordinates(x[:, None], y[None])
        self.s, self.d = (np.broadcast_to(v, size).astype(np.float32) for v in (s, d))
        self.grid = np.zeros((*size, _HEIGHT), np.uint8)
        self.style = np.zeros(size, np.uint8)
        self.away = road.from_crossing(self.s)

    def level(self, z: float) -> int:
        """Number of voxels whose lower face is below z."""
        return max(0, min(_HEIGHT, round((z - LOW_Z) / CELL)))

    def columns(self, s: tuple[float, float], d: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Indices (i, j) of the columns in a rectangle of street coordinates."""
        return np.nonzero((self.s >= s[0]) & (self.s < s[1]) & (self.d >= d[0]) & (self.d < d[1]))

    def fill(self, columns: tuple[np.ndarray, np.ndarray], z: tuple[float, float], material: Material) -> None:
        self.grid[(*columns, slice(self.level(z[0]), self.level(z[1])))] = material

    def ground(self) -> None:
        """Road, cross streets, sidewalks, a paved median; terrain elsewhere."""
        road, across = self.road, np.abs(self.d)
        surface = np.full(self.s.shape, Material.TERRAIN, np.uint8)
        cross = self.away <= CROSS_STREET_HALF_WIDTH
        surface[(across <= road.walk_edge) | (self.away <= CROSS_STREET_HALF_WIDTH + 2.4)] = Material.SIDEWALK
        surface[(across <= road.half_width) | cross] = Material.ROAD
        if road.median:
            open_part = self.away <= CROSS_STREET_HALF_WIDTH + CROSSWALK[1] + 0.5
            surface[(across < road.median / 2) & ~open_part] = Material.PAVED
        self.grid[:, :, 0] = surface
        self.grid[:, :, 1] = np.where(surface == Material.ROAD, Material.AIR, surface)

    def pave(self, columns: tuple[np.ndarray, np.ndarray], material: Material) -> None:
        self.grid[(*columns, slice(0, 2))] = material

    def lots(self, rng: np.random.Generator, side: int):
        """(begin, end) along s of the building lots of a side, between the cross streets."""
        s = self.begin - 4
        while s < self.end:
            width = rng.uniform(13, 24)
            reach = CROSS_STREET_HALF_WIDTH + 3.5
            for crossing in self.road.crossings:
                if s < crossing + reach and s + width > crossing - reach:
                    if crossing - reach - s >= 8:
                        width = crossing - reach - s
                    else:
                        s = crossing + reach
            yield s, s + width
            s += width + (rng.uniform(1.5, 5) if rng.random() < 0.6 else 0)

    def buildings(self, rng: np.random.Generator) -> None:
        """Two rows of lots per side: houses, parks with hedges, paved places."""
        for side in (-1, 1):
            for begin, end in self.lots(rng, side):
                kind, front = rng.random(), self.road.walk_edge + rng.uniform(0.6, 5)
                if kind < 0.62:
                    self.house(begin, end, side, front, rng.uniform(9, 13), rng.uniform(4.4, 12), rng)
                elif kind < 0.82:
                    place = self.columns((begin, end), _span(side, self.road.walk_edge, self.road.walk_edge + 11))
                    self.pave(place, Material.PAVED)
                    self.fence(begin + 1, end - 1, side * (self.road.walk_edge + 11))
                else:
                    self.hedge(begin + 1, end - 1, side * (self.road.walk_edge + 1.2), rng.uniform(0.8, 1.4))
                if rng.random() < 0.75:
                    self.house(begin, end, side, self.road.walk_edge + rng.uniform(22, 26), 11, rng.uniform(6, 14), rng)

    def house(self, begin: float, end: float, side: int, front: float, depth: float, height: float,
              rng: np.random.Generator) -> None:
        """Hollow, with a flat roof and a low hedge or fence at its front now and then."""
        height = round(height / 1.0) * 1.0
        i, j = self.columns((begin, end), _span(side, front, front + depth))
        s, across = self.s[i, j], self.d[i, j] * side
        self.fill((i, j), (height - 0.4, height), Material.ROOF)
        gable = (s < begin + _WALL) | (s >= end - _WALL)
        wall = (across < front + _WALL) | (across >= front + depth - _WALL)
        self.fill((i[gable], j[gable]), (KERB, height), Material.GABLE)
        self.fill((i[wall], j[wall]), (KERB, height), Material.WALL)
        self.style[i, j] = rng.integers(1, 250)
        if front - self.road.walk_edge > 2.5:
            self.hedge(begin + 1, end - 4, side * (front - 0.8), 0.8)

    def hedge(self, begin: float, end: float, d: float, height: float) -> None:
        i, j = self.columns((begin, end), (d - 0.45, d + 0.45))
        ragged = hash_cells(i, j, 5) < 0.6
        self.fill((i, j), (KERB, height), Material.HEDGE)
        self.fill((i[ragged], j[ragged]), (height, height + 0.2), Material.HEDGE)

    def fence(self, begin: float, end: float, d: float) -> None:
        self.fill(self.columns((begin, end), (d - 0.15, d + 0.15)), (KERB, 1.4), Material.FENCE)

    def street_furniture(self, rng: np.random.Generator, work_zone: tuple[float, float]) -> None:
        """Lamps, signs, traffic lights, bus shelters."""
        road = self.road
        for side in (-1, 1):
            for s in np.arange(self.begin + rng.uniform(0, 15), self.end, 26.0):
                if abs(float(road.from_crossing(np.array(s)))) < 9 or (side < 0 and _within(s, work_zone)):
                    continue
                self.pole(s, side * (road.half_width + 0.35), 6.0)
                self.fill(self.columns((s - 0.2, s + 0.2), _span(side, road.half_width - 1.4, road.half_width + 0.7)),
                          (5.8, 6.2), Material.METAL)
            for crossing in road.crossings:
                s = crossing - side * -(CROSS_STREET_HALF_WIDTH + CROSSWALK[1] + 1.2)
                self.pole(s, side * (road.half_width + 0.35), 4.2)
                self.fill(self.columns((s - 0.2, s + 0.2), _span(side, road.half_width + 0.3, road.half_width + 0.7)),
                          (3.0, 4.2), Material.METAL)
            s = rng.uniform(self.begin + 20, self.end - 25)
            if float(road.from_crossing(np.array(s))) > 16 and not (side < 0 and _within(s, work_zone)):
                outer = road.walk_edge
                self.fill(self.columns((s, s + 4), _span(side, outer - 0.3, outer)), (KERB, 2.4), Material.METAL)
                self.fill(self.columns((s, s + 4), _span(side, outer - 1.6, outer)), (2.4, 2.6), Material.METAL)

    def pole(self, s: float, d: float, height: float) -> None:
        x, y = self.road.position(float(s), d)
        i, j = (int((v - low) / CELL) for v, low in zip((x, y), self.low, strict=True))
        if 0 <= i < self.grid.shape[0] and 0 <= j < self.grid.shape[1]:
            self.grid[i, j, 1 : self.level(height)] = Material.METAL

    def trees(self, rng: np.random.Generator) -> None:
        """Along the sidewalks' outer borders and behind; never inside houses or on a street."""
        road = self.road
        for side in (-1, 1):
            for s in np.arange(self.begin + rng.uniform(0, 6), self.end, 9.0):
                places = [(s + rng.uniform(-1, 1), road.walk_edge + 0.5)] if rng.random() < 0.7 else []
                places += [(s + rng.uniform(-4, 4), road.walk_edge + rng.uniform(4, 38)) for _ in range(2)]
                for along, d in places:
                    self.tree(along, side * d, rng)

    def tree(self, s: float, d: float, rng: np.random.Generator) -> None:
        """A trunk and an ellipsoid of leaves with holes, where the ground is free for it."""
        radius, trunk = rng.uniform(1.2, 2.3), rng.uniform(2.2, 3.2)
        tall, seed = radius * rng.uniform(0.9, 1.3), int(rng.integers(1 << 20))
        x, y = self.road.position(float(s), float(d))
        i, j = (int((v - low) / CELL) for v, low in zip((x, y), self.low, strict=True))
        reach = math.ceil(radius / CELL)
        if not (reach <= i < self.grid.shape[0] - reach - 1 and reach <= j < self.grid.shape[1] - reach - 1):
            return
        near = self.grid[i - 3 : i + 4, j - 3 : j + 4]
        if near[:, :, 2:].any() or (near[:, :, 0] == Material.ROAD).any():
            return
        self.grid[i : i + 2, j : j + 2, 1 : self.level(trunk + tall)] = Material.TRUNK
        offsets = np.arange(-reach, reach + 1) * CELL
        z = (np.arange(_HEIGHT) + 0.5) * CELL + LOW_Z
        shape = ((offsets[:, None, None] / radius) ** 2 + (offsets[None, :, None] / radius) ** 2
                 + ((z - trunk - tall) / tall) ** 2)
        number = np.arange(shape.size).reshape(shape.shape)
        leaves = shape + 0.35 * hash_cells(number, np.full_like(number, seed)) < 1.05
        window = (slice(i - reach, i + reach + 1), slice(j - reach, j + reach + 1))
        part = self.grid[window]
        part[leaves & (part == Material.AIR)] = Material.LEAVES
        style = self.style[window]
        style[leaves.any(2) & (style == 0)] = seed % 200 + 1


def _span(side: int, near: float, far: float) -> tuple[float, float]:
    return (near, far) if side > 0 else (-far, -near)


def _within(s: float, span: tuple[float, float]) -> bool:
    return span[0] <= s <= span[1]


def _ground_light(grid: np.ndarray, sun: tuple[float, float, float]) -> np.ndarray:
    """(X, Y) float32 in [0, 1]: 0 where something stands between the ground and the sun; soft at the borders."""
    solid = grid > LAST_GROUND
    top = np.where(solid.any(2), _HEIGHT - solid[:, :, ::-1].argmax(2), 0).astype(np.float32) * CELL
    flat = math.hypot(sun[0], sun[1])
    rise, lit = sun[2] / flat, np.ones(top.shape, np.float32)
    for step in range(2, math.ceil(_HEIGHT / rise)):
        di, dj = (round(step * sun[a] / flat) for a in range(2))
        to = [slice(max(0, -n), size - max(0, n)) for n, size in zip((di, dj), top.shape, strict=True)]
        source = [slice(max(0, n), size - max(0, -n)) for n, size in zip((di, dj), top.shape, strict=True)]
        if min(s.stop - s.start for s in to) <= 0:
            break
        lit[tuple(to)][top[tuple(source)] > step * CELL * rise] = 0
    padded = np.pad(lit, 1, mode="edge")
    x, y = lit.shape
    return sum(padded[a : a + x, b : b + y] for a in range(3) for b in range(3)) / np.float32(9)


def world_side(world: StaticWorld) -> tuple[float, float, float, float]:
    """(x low, y low, x high, y high) of a world in metres."""
    x, y, _ = world.grid.shape
    return world.low[0], world.low[1], world.low[0] + x * CELL, world.low[1] + y * CELL


def lane_lines(road: Road) -> tuple[list[float], list[float]]:
    """abs(d) of the dashed and of the solid lines of a street."""
    dashed = [road.median / 2 + lane * LANE_WIDTH for lane in range(1, road.lanes)]
    solid = [road.lanes_edge] + ([road.median / 2 + 0.25] if road.median else [0.12])
    return dashed, solid
