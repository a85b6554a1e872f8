"""What every picture of a voxel grid needs: its checked labels, its place in the ego frame, its motion arrows."""

from dataclasses import dataclass

import numpy as np

from mmdet3d.datasets.labels import IGNORE_LABEL, POINT_CLOUD_RANGE, LabelSet


@dataclass(frozen=True)
class OccupancyGrid:
    """Labels of a voxel grid and where it lies.

    Attributes:
        semantics: (X, Y, Z) uint8 labels.
        occupied: (X, Y, Z) bool, neither free nor ignored.
        low: (3,) float64 lower corner in the ego frame, metres.
        cell: (3,) float64 voxel edges, metres.
    """

    semantics: np.ndarray
    occupied: np.ndarray
    low: np.ndarray
    cell: np.ndarray

    @classmethod
    def make(cls, semantics: np.ndarray, labels: LabelSet,
             point_cloud_range: tuple[float, ...] = POINT_CLOUD_RANGE) -> "OccupancyGrid":
        """Check and wrap a label grid.

        Raises:
            ValueError: it has not three axes, is no integer array, holds labels that ``labels`` does not have, or the
                range is not six increasing numbers.
        """
        semantics = np.asarray(semantics)
        if semantics.ndim != 3 or semantics.dtype.kind not in "ui" or not semantics.size:
            raise ValueError(f"semantics: expected whole-number labels of shape (X, Y, Z), got {semantics.dtype} of "
                             f"shape {semantics.shape}")
        found = np.unique(semantics)
        if unknown := [int(v) for v in found if not (0 <= v < labels.num_classes or v == IGNORE_LABEL)]:
            raise ValueError(f"semantics: labels {unknown} are not in {labels.name!r} (0..{labels.num_classes - 1}, "
                             f"or {IGNORE_LABEL} for ignored)")
        bounds = np.asarray(point_cloud_range, np.float64)
        if bounds.shape != (6,) or (bounds[3:] <= bounds[:3]).any():
            raise ValueError(f"point_cloud_range: expected low x, y, z and high x, y, z, got {point_cloud_range!r}")
        semantics = semantics.astype(np.uint8)
        occupied = (semantics != labels.free_index) & (semantics != IGNORE_LABEL)
        return cls(semantics, occupied, bounds[:3], (bounds[3:] - bounds[:3]) / semantics.shape)

    def to_cells(self, points: np.ndarray) -> np.ndarray:
        """(..., 3) ego points in metres -> voxel units, in which voxel (i, j, k) spans [i, i+1] x ..."""
        return (np.asarray(points, np.float64) - self.low) / self.cell


def _components(moving: np.ndarray) -> np.ndarray:
    """(X, Y) int64 id of the object each moving column belongs to: columns that touch, diagonally too, are one."""
    ids = np.where(moving, np.arange(1, moving.size + 1).reshape(moving.shape), 0)
    while True:
        padded = np.pad(ids, 1)
        best = ids
        for dx in range(3):
            for dy in range(3):
                best = np.maximum(best, padded[dx : dx + ids.shape[0], dy : dy + ids.shape[1]])
        best = np.where(moving, best, 0)
        best = np.where(moving, np.take(np.append(0, best.ravel()), best), 0)  # follow the id to its own column
        if (best == ids).all():
            return ids
        ids = best


def flow_arrows(grid: OccupancyGrid, flow: np.ndarray | None, labels: LabelSet, *, length: float = 8.0,
                min_speed: float = 0.5, limit: int = 250) -> np.ndarray:
    """A readable number of arrows for the motion of a grid: one for each object, or each part of a long one.

    Args:
        grid: The grid.
        flow: (X, Y, Z, 2) velocity along x and y in m/s, or None.
        labels: Its ``flow_classes`` can move; flow elsewhere is not looked at.
        length: Objects longer than this many metres get several arrows.
        min_speed: Slower voxels count as standing, m/s.
        limit: Keep this many, the fastest.

    Returns:
        (A, 5): x, y, z of the start (centre of the moving voxels, on top of the highest) in metres, vx, vy in m/s.

    Raises:
        ValueError: the flow does not fit the grid.
    """
    if flow is None:
        return np.zeros((0, 5))
    flow = np.asarray(flow)
    if flow.shape != (*grid.semantics.shape, 2):
        raise ValueError(f"flow: expected shape {(*grid.semantics.shape, 2)}, got {flow.shape}")
    cells = np.argwhere(grid.occupied & labels.flow_mask[grid.semantics])
    velocity = flow[tuple(cells.T)].astype(np.float64)
    speed = np.linalg.norm(velocity, axis=1)
    moving = np.isfinite(speed) & (speed >= min_speed)
    cells, velocity = cells[moving], velocity[moving]
    if not len(cells):
        return np.zeros((0, 5))
    columns = np.zeros(grid.semantics.shape[:2], bool)
    columns[tuple(cells[:, :2].T)] = True
    _, part = np.unique(_components(columns)[tuple(cells[:, :2].T)], return_inverse=True)
    corner = np.full((part.max() + 1, 2), np.iinfo(np.int64).max)
    np.minimum.at(corner, part, cells[:, :2])
    block = np.maximum(1, (length / grid.cell[:2]).astype(int))
    keys = np.column_stack([part, (cells[:, :2] - corner[part]) // block])
    _, group, counts = np.unique(keys, axis=0, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    sums, top = np.zeros((len(counts), 4)), np.zeros(len(counts))
    np.add.at(sums, group, np.concatenate([cells[:, :2] + 0.5, velocity], axis=1))
    np.maximum.at(top, group, cells[:, 2] + 1.0)
    means = sums / counts[:, None]
    start = np.concatenate([means[:, :2], top[:, None]], axis=1) * grid.cell + grid.low
    arrows = np.concatenate([start, means[:, 2:]], axis=1)
    mean_speed = np.linalg.norm(arrows[:, 3:], axis=1)
    order = np.argsort(-mean_speed, kind="stable")[:limit]
    return arrows[order[mean_speed[order] >= min_speed]]
