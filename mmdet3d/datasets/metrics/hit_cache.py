"""Where rays hit the ground truth, kept on disk: it depends on no prediction."""

import hashlib
import os
from pathlib import Path

import numpy as np

from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.npz import read_arrays
from mmdet3d.structures import VoxelGrid
from mmdet3d.utils.files import atomic_write

from .rays import lidar_rays

_FORMAT = b"ray hits 1"
"""Changes when the caster's rules or the content of the files do."""


class HitCache:
    """A folder of files named by what they depend on: labels, origins, rays, grid and free label.

    A file takes 0.9 MB for eight origins. Files that are damaged count as absent and are written again.

    Args:
        folder: Where; made when the first file is written. It may be shared by processes and deleted at any time.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        self._rays = hashlib.sha256(lidar_rays().tobytes()).digest()

    def key(self, labels: np.ndarray, origins: np.ndarray, free_label: int, grid: VoxelGrid) -> str:
        """Name of what is cast.

        Args:
            labels: (X, Y, Z) uint8.
            origins: (T, 3) float64 metres.
            free_label: Label of free space.
            grid: Where the labels lie.
        """
        digest = hashlib.sha256(_FORMAT + self._rays)
        digest.update(repr((grid.low, grid.cell, labels.shape, int(free_label), origins.shape)).encode())
        digest.update(np.ascontiguousarray(labels).tobytes())
        digest.update(np.ascontiguousarray(origins).tobytes())
        return digest.hexdigest()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.npz"

    def load(self, key: str, count: int, num_voxels: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(count,) int32 voxels and float32 distances, or None if there is no usable file."""
        try:
            arrays = read_arrays(self._path(key), "voxel", "distance")
        except DataError:
            return None
        voxel, distance = arrays["voxel"], arrays["distance"]
        usable = (voxel.shape == distance.shape == (count,) and (voxel.dtype, distance.dtype) == (np.int32, np.float32)
                  and (not count or 0 <= voxel.min() <= voxel.max() < num_voxels))
        return (voxel, distance) if usable else None

    def save(self, key: str, voxel: np.ndarray, distance: np.ndarray) -> None:
        """Keep (T * R,) int32 voxels and float32 distances."""
        with atomic_write(self._path(key)) as file:
            np.savez(file, voxel=voxel, distance=distance)
