"""The query rays of RayIoU, and the grid in which the labels of both data sets lie."""

import functools

import numpy as np

from mmdet3d.datasets.labels import POINT_CLOUD_RANGE
from mmdet3d.structures import VoxelGrid

LABEL_GRID = VoxelGrid(low=POINT_CLOUD_RANGE[:3], high=POINT_CLOUD_RANGE[3:], cell=(0.4, 0.4, 0.4))
"""Grid of the Occ3D-nuScenes and OpenOcc labels in the ego frame."""

_LAST_PITCH = 0.21
"""Radians; pitches are added until one is at least this large."""


@functools.cache
def _rays() -> np.ndarray:
    pitches = [-(np.pi / 2 - np.arctan(k + 1)) for k in range(10)]
    while pitches[-1] < _LAST_PITCH:
        pitches.append(pitches[-1] + (pitches[-1] - pitches[-2]))
    azimuth = np.deg2rad(np.arange(360, dtype=np.float64))
    pitch = np.array(pitches)[:, None]
    up = np.broadcast_to(np.sin(pitch), (len(pitches), 360))
    rays = np.stack([np.cos(pitch) * np.cos(azimuth), np.cos(pitch) * np.sin(azimuth), up], axis=-1)
    return rays.reshape(-1, 3).astype(np.float32)


def lidar_rays() -> np.ndarray:
    """(14040, 3) float32 unit vectors (x, y, z) of a virtual lidar, in the ego frame.

    39 pitches, lowest first, of 360 azimuths each, counter-clockwise from the x axis. The first ten pitches hit flat
    ground in rings that lie one sensor height apart; the rest follow in the last of their steps, up to 0.219 rad.
    Computed in float64. From the RayIoU metric of Liu et al., "Fully Sparse 3D Occupancy Prediction", arXiv 2312.17118.
    """
    return _rays().copy()
