"""Procedural textures of the ground, buildings and plants. Colours are (P, 3) float32, 0..255."""

from __future__ import annotations

import numpy as np

from .noise import cell_noise, hash_cells, smooth_noise
from .road import BIKE_LANE_WIDTH, CROSS_STREET_HALF_WIDTH, CROSSWALK, PARKING_WIDTH, Road
from .world import lane_lines

_FACADES = np.array([(176, 152, 128), (150, 100, 84), (190, 188, 180), (128, 138, 150), (206, 190, 150),
                     (120, 92, 78), (168, 176, 168), (184, 132, 104)], np.float32)
_GREENS = np.array([(70, 112, 46), (58, 98, 52), (92, 122, 48), (76, 104, 66), (112, 118, 50)], np.float32)
_WHITE, _YELLOW = (214, 214, 210), (206, 170, 56)


def _grey(value: np.ndarray) -> np.ndarray:
    return np.repeat(value.astype(np.float32)[:, None], 3, axis=1)


def road_colors(road: Road, s: np.ndarray, d: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Asphalt with lane lines, zebra crossings, stop lines and parking bays.

    Args:
        road: The street.
        s: (P,) street coordinates of the points.
        d: (P,) likewise.
        calm: (P,) factor of the fine noise, small where the points are far.
    """
    colors = _grey(88 + calm * 9 * cell_noise(s, d, 0.06) + 6 * smooth_noise(s, d, 2.3, 1))
    across, away = np.abs(d), road.from_crossing(s) - CROSS_STREET_HALF_WIDTH
    free, inside = away > CROSSWALK[1] + 0.9, across < road.half_width
    dashed, solid = lane_lines(road)
    white = np.zeros(len(s), bool)
    for line in dashed:
        white |= (np.abs(across - line) < 0.08) & (np.mod(s, 9) < 4)
    bike = road.lanes_edge + BIKE_LANE_WIDTH
    white |= (np.abs(across - solid[0]) < 0.07) | ((np.abs(across - bike) < 0.05) & (np.mod(s, 2) < 1.2))
    white |= (across > road.half_width - PARKING_WIDTH) & (np.mod(s, 6.4) < 0.1)
    white &= free & inside
    white |= inside & (away > CROSSWALK[0]) & (away < CROSSWALK[1]) & (np.mod(d, 1.1) < 0.55)
    white |= inside & (away > CROSSWALK[1] + 0.4) & (away < CROSSWALK[1] + 0.8)
    colors[white] = _WHITE
    yellow = free & (np.abs(across - solid[1]) < 0.06)
    yellow |= (np.abs(away + CROSS_STREET_HALF_WIDTH) < 0.07) & (across > road.half_width + 2) & (np.mod(d, 6) < 3)
    colors[yellow] = _YELLOW
    worn = (white | yellow) & (cell_noise(s, d, 0.11, 3) > 0.75)
    colors[worn] *= 0.8
    return colors


def sidewalk_colors(road: Road, s: np.ndarray, d: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Slabs of a metre, a light kerb."""
    joint = (np.mod(s, 1.0) < 0.035) | (np.mod(d, 1.0) < 0.035)
    colors = _grey(150 + 7 * cell_noise(s, d, 1.0, 2) + calm * 5 * cell_noise(s, d, 0.08, 4))
    colors[:, 2] -= 6
    colors[joint] -= 34 * calm[joint, None]
    colors[np.abs(np.abs(d) - road.half_width - 0.1) < 0.1] = 184
    return colors


def terrain_colors(x: np.ndarray, y: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Grass with bare patches."""
    colors = np.empty((len(x), 3), np.float32)
    colors[:] = (92, 112, 56)
    bare = np.clip(smooth_noise(x, y, 3.1, 6) * 1.6 - 0.5, 0, 1)
    colors += bare[:, None] * np.array((38, -6, 10), np.float32)
    colors *= (1 + 0.08 * smooth_noise(x, y, 7.0, 7) + calm * 0.17 * cell_noise(x, y, 0.09, 8))[:, None]
    return colors


def paved_colors(s: np.ndarray, d: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Bricks."""
    row = np.floor(d * 5)
    along = s * 2.5 + 0.5 * np.mod(row, 2)
    joint = (np.mod(d, 0.2) < 0.02) | (np.mod(along, 1) < 0.05)
    tone = 2 * hash_cells(np.floor(along), row, 9) - 1
    colors = np.array((150, 98, 80), np.float32) * (1 + 0.13 * calm * tone)[:, None]
    colors[joint] *= (1 - 0.3 * calm[joint])[:, None]
    return colors


def facade_colors(u: np.ndarray, z: np.ndarray, style: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Floors of three metres with windows; shops below for some styles.

    Args:
        u: (P,) position along the wall in metres.
        z: (P,) height in metres.
        style: (P,) number of the building.
        calm: (P,) factor of the fine noise.
    """
    kind = style.astype(np.int32)
    colors = _FACADES[kind % len(_FACADES)] * (1 + 0.05 * smooth_noise(u, z, 2.0, 10))[:, None]
    brick = (kind % 3 == 0) & ((np.mod(z, 0.25) < 0.04) | (np.mod(u + 0.3 * np.mod(np.floor(z * 4), 2), 0.6) < 0.04))
    colors[brick] *= (1 - 0.16 * calm[brick])[:, None]
    pitch = (2.4 + 0.25 * (kind % 5)).astype(np.float32)
    column, storey = np.floor(u / pitch), np.floor(z / 3)
    x, y = np.mod(u, pitch) / pitch, np.mod(z, 3)
    frame = (x > 0.26) & (x < 0.76) & (y > 0.92) & (y < 2.5) & (storey > 0)
    window = (x > 0.3) & (x < 0.72) & (y > 1.0) & (y < 2.4) & (storey > 0)
    shop = (storey == 0) & (kind % 2 == 0) & (x > 0.12) & (x < 0.9) & (y > 0.6) & (y < 2.5)
    door = (storey == 0) & (kind % 2 == 1) & (np.mod(column, 3) == 0) & (x > 0.3) & (x < 0.7) & (y < 2.3)
    colors[frame] *= 1.12
    tone = hash_cells(column + 31 * kind, storey, 11)
    glass = window | shop
    colors[glass] = np.array((58, 74, 92), np.float32) * (0.75 + 0.6 * tone[glass])[:, None]
    colors[window & (tone > 0.86)] = (196, 180, 132)
    colors[door] = (84, 62, 48)
    return colors


def plant_colors(x: np.ndarray, y: np.ndarray, z: np.ndarray, style: np.ndarray, calm: np.ndarray) -> np.ndarray:
    """Leaves: one hue per plant, light and dark spots."""
    hue = _GREENS[style % len(_GREENS)]
    spots = cell_noise(x + 0.7 * z, y - 0.6 * z, 0.12, 12) * calm + 0.8 * cell_noise(x - z, y + z, 0.45, 13)
    return hue * (1 + 0.2 * spots)[:, None]


def trunk_colors(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Bark."""
    return np.array((98, 76, 58), np.float32) * (1 + 0.2 * cell_noise(x + y, z * 0.2, 0.07, 14))[:, None]


def fence_colors(u: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Boards."""
    colors = np.empty((len(u), 3), np.float32)
    colors[:] = (124, 100, 76)
    colors[np.mod(u, 0.25) < 0.05] *= 0.6
    return colors


def sky_colors(rays: np.ndarray, seed: int) -> np.ndarray:
    """Haze at the horizon, blue above, clouds, hills and far roofs; ``rays`` (P, 3) are unit vectors."""
    up = np.clip(rays[:, 2], 0, 1)
    horizon, zenith = np.array([[222, 228, 236], [104, 152, 214]], np.float32)
    colors = horizon + (zenith - horizon) * np.sqrt(np.minimum(up * 2.0, 1))[:, None]
    height = 1 / (up + 0.12)
    a, b = rays[:, 0] * height, rays[:, 1] * height
    cover = smooth_noise(a, b, 1.1, seed) + 0.5 * smooth_noise(a, b, 0.43, seed + 1)
    cloud = np.clip((cover - 0.15) * 1.4, 0, 0.9) * np.clip(up * 8, 0, 1)
    colors += (np.float32(246) - colors) * cloud[:, None]
    azimuth = np.arctan2(rays[:, 1], rays[:, 0])
    hill = 0.016 + 0.012 * smooth_noise(azimuth, azimuth * 0, 0.21, seed + 2)
    roof = 0.03 + 0.025 * cell_noise(azimuth, azimuth * 0, 0.055, seed + 3)
    colors[rays[:, 2] < np.maximum(hill, 0)] = (150, 166, 170)
    colors[rays[:, 2] < roof * (cell_noise(azimuth, azimuth * 0, 0.16, seed + 4) > 0.1)] = (168, 174, 186)
    return colors
