"""Poses of the info files as 4x4 matrices. All in float64; matrices take homogeneous column points."""

from collections.abc import Mapping, Sequence

import numpy as np


def rotation_matrix(quaternion: Sequence[float]) -> np.ndarray:
    """(3, 3) rotation of a quaternion (w, x, y, z), which is normalised first.

    Raises:
        ValueError: it has not four finite entries, or is zero.
    """
    q = np.asarray(quaternion, np.float64)
    norm = np.linalg.norm(q) if q.shape == (4,) else np.nan
    if not np.isfinite(norm) or norm == 0:
        raise ValueError(f"a rotation needs a quaternion (w, x, y, z) that is not zero, got {quaternion!r}")
    w, x, y, z = q / norm
    return np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])


def pose_matrix(rotation: Sequence[float], translation: Sequence[float]) -> np.ndarray:
    """(4, 4) rigid transform of a quaternion (w, x, y, z) and a translation (x, y, z) in metres."""
    pose = np.eye(4)
    pose[:3, :3] = rotation_matrix(rotation)
    pose[:3, 3] = translation
    return pose


def rigid_inverse(pose: np.ndarray) -> np.ndarray:
    """(4, 4) inverse of a rigid transform, by transposing its rotation."""
    inverse = np.eye(4)
    inverse[:3, :3] = pose[:3, :3].T
    inverse[:3, 3] = -pose[:3, :3].T @ pose[:3, 3]
    return inverse


def ego_to_global(record: Mapping) -> np.ndarray:
    """(4, 4) ego pose of an info record (at the lidar's time) or of one of its cameras (at the camera's time)."""
    return pose_matrix(record["ego2global_rotation"], record["ego2global_translation"])


def lidar_to_ego(info: Mapping) -> np.ndarray:
    """(4, 4) pose of LIDAR_TOP in the ego frame."""
    return pose_matrix(info["lidar2ego_rotation"], info["lidar2ego_translation"])


def sensor_to_ego(camera: Mapping) -> np.ndarray:
    """(4, 4) pose of a camera in the ego frame, x right, y down, z along the optical axis."""
    return pose_matrix(camera["sensor2ego_rotation"], camera["sensor2ego_translation"])
