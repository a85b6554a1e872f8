"""First hits of many rays in a voxel grid, with NumPy alone.

Rays walk from free box to free box (distance-field leaping after Zuiderveld et al., 1992) instead of from voxel to
voxel: every free voxel knows how far around it everything is free, so empty space costs a few steps.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

_CHUNK = 32768  # rays walked together; their state stays in the processor's cache
_MAX_LEAP = 15
_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class Hits:
    """Where rays meet the grid.

    Attributes:
        distance: (R,) float32 ray parameter at the hit, infinite without one.
        cell: (R, 3) int32 voxel (x, y, z); (0, 0, 0) without a hit.
        axis: (R,) int8 axis 0..2 of the face that was hit. A ray that starts inside an occupied voxel gives 2.
    """

    distance: np.ndarray
    cell: np.ndarray
    axis: np.ndarray


def free_radius(occupied: np.ndarray) -> np.ndarray:
    """How far around each voxel everything is free.

    Args:
        occupied: (X, Y, Z) bool.

    Returns:
        (X, Y, Z) uint8, 0 for an occupied voxel; k if the cube of 2 k - 1 voxels around it holds no occupied one, as
        far as it lies in the grid. At most 15.
    """
    near = occupied.copy()
    radius = np.zeros(occupied.shape, np.uint8)
    for _ in range(_MAX_LEAP):
        radius += ~near
        if near.all():
            break
        for axis in range(3):
            grown = near.copy()
            source, target = [slice(None)] * 3, [slice(None)] * 3
            source[axis], target[axis] = slice(None, -1), slice(1, None)
            grown[tuple(target)] |= near[tuple(source)]
            grown[tuple(source)] |= near[tuple(target)]
            near = grown
    return radius


def cast_rays(radius: np.ndarray, origin: np.ndarray, directions: np.ndarray) -> Hits:
    """First occupied voxel along each ray.

    Args:
        radius: (X, Y, Z) uint8 of :func:`free_radius`.
        origin: (3,) common origin in voxel units: voxel (i, j, k) spans [i, i+1] x [j, j+1] x [k, k+1].
        directions: (R, 3) in voxel units; the length sets the unit of the distance.

    Raises:
        ValueError: the grid has 2^24 voxels or more, which single precision cannot count.
    """
    if radius.size >= 1 << 24:
        raise ValueError(f"a grid of {radius.shape} voxels is too large to draw; at most {(1 << 24) - 1} voxels")
    count = len(directions)
    hits = Hits(np.full(count, np.inf, np.float32), np.zeros((count, 3), np.int32), np.full(count, 2, np.int8))
    origin, radius = np.asarray(origin, np.float32), np.ascontiguousarray(radius)

    def walk(start: int) -> None:
        part = slice(start, start + _CHUNK)
        _cast_chunk(radius, origin, directions[part].astype(np.float32),
                    Hits(hits.distance[part], hits.cell[part], hits.axis[part]))

    with ThreadPoolExecutor(_THREADS) as pool:  # NumPy works outside the interpreter lock
        for _ in pool.map(walk, range(0, count, _CHUNK)):
            pass
    return hits


def _enter(shape: tuple[int, ...], origin: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, ...]:
    """Ray parameter and axis where each ray enters the grid, and whether it does. ``inverse`` is (3, R)."""
    far_side = np.array(shape, np.float32)[:, None]
    low, high = -origin[:, None] * inverse, (far_side - origin[:, None]) * inverse
    enters = np.minimum(low, high)
    axis = enters.argmax(0)
    t = np.maximum(enters.max(0), 0)
    return t, axis, np.maximum(low, high).min(0) > t


def _cast_chunk(radius: np.ndarray, origin: np.ndarray, directions: np.ndarray, out: Hits) -> None:
    """Walk rays until they hit or leave. Voxel indices are kept as float32, three arrays of one value per ray."""
    tiny = np.float32(1e-9)
    d = np.where(np.abs(directions) < tiny, tiny, directions).T.copy()  # (3, R)
    inverse = 1 / d
    t, axis, inside = _enter(radius.shape, origin, inverse)
    ray = np.flatnonzero(inside)
    t, axis, d, inverse = t[ray], axis[ray], d[:, ray], inverse[:, ray]
    limits = np.array(radius.shape, np.float32)
    cell = [np.clip(np.floor(origin[a] + t * d[a]), 0, limits[a] - 1) for a in range(3)]
    sign, backward = np.sign(d), (d < 0).astype(np.float32)
    strides, flat_radius = np.array(radius.strides, np.float32), radius.ravel()
    while len(ray):
        leap = flat_radius[(cell[0] * strides[0] + cell[1] * strides[1] + cell[2] * strides[2]).astype(np.int32)]
        keep = leap > 0
        if not keep.all():
            hit = ~keep
            done = ray[hit]
            out.distance[done], out.axis[done] = t[hit], axis[hit]
            for a in range(3):
                out.cell[done, a] = cell[a][hit]
            ray, leap, cell = ray[keep], leap[keep], [c[keep] for c in cell]
            d, inverse, sign, backward = d[:, keep], inverse[:, keep], sign[:, keep], backward[:, keep]
        leap = leap.astype(np.float32)
        # The far wall, on each axis, of the free cube's part within the grid, and when the ray reaches it.
        walls = [np.minimum(np.maximum(cell[a] + sign[a] * leap + backward[a], 0), limits[a]) for a in range(3)]
        times = [(walls[a] - origin[a]) * inverse[a] for a in range(3)]
        t = np.minimum(np.minimum(times[0], times[1]), times[2])
        crosses = [times[0] == t, times[1] == t]
        axis = np.where(crosses[0], 0, np.where(crosses[1], 1, 2))
        keep = np.ones(len(ray), bool)
        for a in range(3):
            # Rounding must neither turn a ray back nor push it through a wall that it has not reached.
            low, high = np.minimum(cell[a], walls[a]), np.maximum(cell[a], walls[a] - 1)
            moved = np.minimum(np.maximum(np.floor(origin[a] + t * d[a]), low), high)
            cell[a] = np.where(axis == a, walls[a] - backward[a], moved)
            keep &= (cell[a] >= 0) & (cell[a] < limits[a])
        if not keep.all():
            ray, t, axis, cell = ray[keep], t[keep], axis[keep], [c[keep] for c in cell]
            d, inverse, sign, backward = d[:, keep], inverse[:, keep], sign[:, keep], backward[:, keep]
