"""Annotated boxes of nuScenes in the frames and conventions of info files; float64 throughout."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from mmdet3d.datasets.converters.nuscenes_tables import NuScenesTables
from mmdet3d.datasets.geometry import rotation_matrix
from mmdet3d.datasets.infos import DataError

DETECTION_CLASSES = (
    "car", "truck", "construction_vehicle", "bus", "trailer", "barrier", "motorcycle", "bicycle", "pedestrian",
    "traffic_cone",
)
"""Classes of the nuScenes detection task; the position is the label in ``ann_infos``."""

DETECTION_NAMES = {
    "movable_object.barrier": "barrier",
    "vehicle.bicycle": "bicycle",
    "vehicle.bus.bendy": "bus",
    "vehicle.bus.rigid": "bus",
    "vehicle.car": "car",
    "vehicle.construction": "construction_vehicle",
    "vehicle.motorcycle": "motorcycle",
    "human.pedestrian.adult": "pedestrian",
    "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian",
    "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone",
    "vehicle.trailer": "trailer",
    "vehicle.truck": "truck",
}
"""Detection class of a nuScenes category."""

IGNORED_CATEGORIES = frozenset({
    "human.pedestrian.wheelchair", "human.pedestrian.stroller", "human.pedestrian.personal_mobility", "animal",
    "vehicle.emergency.ambulance", "vehicle.emergency.police", "movable_object.pushable_pullable",
    "movable_object.debris", "static_object.bicycle_rack",
})
"""Categories that are annotated but are no detection class."""

MAX_VELOCITY_GAP_S = 1.5
"""Largest time between two key frames that a velocity is estimated from; twice as much for a centred difference."""


def quaternion_product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Hamilton product of quaternions (..., 4) in the order w, x, y, z: first ``right``, then ``left``."""
    w, x, y, z = np.moveaxis(np.asarray(left, np.float64), -1, 0)
    a, b, c, d = np.moveaxis(np.asarray(right, np.float64), -1, 0)
    return np.stack([w * a - x * b - y * c - z * d, w * b + x * a + y * d - z * c,
                     w * c - x * d + y * a + z * b, w * d + x * c - y * b + z * a], axis=-1)


def quaternion_inverse(quaternion: Sequence[float]) -> np.ndarray:
    """(4,) inverse of a quaternion (w, x, y, z)."""
    q = np.asarray(quaternion, np.float64)
    return q * [1.0, -1.0, -1.0, -1.0] / (q @ q)


def yaw_angle(quaternions: np.ndarray) -> np.ndarray:
    """(M,) yaw of (M, 4) quaternions (w, x, y, z), in radians.

    The first angle of R = R_x(roll) R_y(pitch) R_z(yaw), as pyquaternion's ``yaw_pitch_roll`` defines it and the
    published info files hold it; for a box that is tilted it is not the heading in the ground plane.
    """
    w, x, y, z = (quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)).T
    return np.arctan2(2 * (w * z - x * y), 1 - 2 * (y * y + z * z))


def box_velocity(tables: NuScenesTables, annotation: Mapping) -> list[float]:
    """Velocity (vx, vy, vz) of an object in the global frame in m/s; NaN where it cannot be estimated.

    The rule of the nuScenes devkit: centred difference of positions between the neighbouring key frames, one-sided at
    the ends of a track, none over gaps longer than ``MAX_VELOCITY_GAP_S`` a step.
    """
    first = tables.annotations[annotation["prev"]] if annotation["prev"] else annotation
    last = tables.annotations[annotation["next"]] if annotation["next"] else annotation
    limit = MAX_VELOCITY_GAP_S * (2 if annotation["prev"] and annotation["next"] else 1)
    seconds = (1e-6 * tables.samples[last["sample_token"]]["timestamp"]
               - 1e-6 * tables.samples[first["sample_token"]]["timestamp"])
    if first is last or seconds == 0 or seconds > limit:
        return [math.nan] * 3
    return [(b - a) / seconds for a, b in zip(first["translation"], last["translation"], strict=True)]


class SampleBoxes:
    """The annotations of one sample as arrays, in table order.

    Args:
        tables: The tables.
        sample_token: The sample.

    Raises:
        DataError: a category is unknown.
    """

    def __init__(self, tables: NuScenesTables, sample_token: str) -> None:
        records = tables.sample_annotations.get(sample_token, [])
        self._names = [tables.categories[record["instance_token"]] for record in records]
        if unknown := sorted({*self._names} - DETECTION_NAMES.keys() - IGNORED_CATEGORIES):
            raise DataError(f"sample {sample_token}: annotations of unknown categories {unknown}; known are those of "
                            "nuScenes 1.0")
        self._centres = np.array([record["translation"] for record in records], np.float64).reshape(-1, 3)
        self._dimensions = np.array([record["size"] for record in records], np.float64).reshape(-1, 3)[:, [1, 0, 2]]
        self._rotations = np.array([record["rotation"] for record in records], np.float64).reshape(-1, 4)
        self._velocities = np.array([box_velocity(tables, record) for record in records]).reshape(-1, 3)
        self._lidar_points = np.array([record["num_lidar_pts"] for record in records], np.int64)
        self._radar_points = np.array([record["num_radar_pts"] for record in records], np.int64)

    def lidar_arrays(self, info: Mapping) -> dict[str, np.ndarray]:
        """All boxes in the LIDAR_TOP frame.

        Args:
            info: ``lidar2ego_*`` and ``ego2global_*`` are read.

        Returns:
            gt_boxes (M, 7) centre, length, width, height, yaw; gt_names (M,); gt_velocity (M, 2) m/s, may be NaN;
            num_lidar_pts and num_radar_pts (M,) int64; valid_flag (M,) bool, whether any point was counted.
        """
        ego, lidar = rotation_matrix(info["ego2global_rotation"]), rotation_matrix(info["lidar2ego_rotation"])
        centres = (self._centres - info["ego2global_translation"]) @ ego
        centres = (centres - info["lidar2ego_translation"]) @ lidar
        rotations = quaternion_product(quaternion_inverse(info["ego2global_rotation"]), self._rotations)
        rotations = quaternion_product(quaternion_inverse(info["lidar2ego_rotation"]), rotations)
        flat = self._velocities * [1.0, 1.0, 0.0]
        velocities = flat @ np.linalg.inv(ego).T @ np.linalg.inv(lidar).T
        return {
            "gt_boxes": np.concatenate([centres, self._dimensions, yaw_angle(rotations)[:, None]], axis=1),
            "gt_names": np.array([DETECTION_NAMES.get(name, name) for name in self._names], dtype=np.str_),
            "gt_velocity": velocities[:, :2].copy(),
            "num_lidar_pts": self._lidar_points,
            "num_radar_pts": self._radar_points,
            "valid_flag": self._lidar_points + self._radar_points > 0,
        }

    def detection_boxes(self, rotation: Sequence[float], translation: Sequence[float]
                        ) -> tuple[list[np.ndarray], list[int]]:
        """Boxes of the ten detection classes that have points, in an ego frame.

        Args:
            rotation: Ego to global, quaternion (w, x, y, z).
            translation: Ego to global, metres.

        Returns:
            One (9,) array per box: centre, length, width, height, yaw, vx, vy, the velocity 0 where it is unknown;
            and the position of each box's class in :data:`DETECTION_CLASSES`.
        """
        ego = rotation_matrix(rotation)
        known = ~np.isnan(self._velocities).any(axis=1, keepdims=True)
        velocities = np.where(known, self._velocities, 0.0) @ ego
        yaw = yaw_angle(quaternion_product(quaternion_inverse(rotation), self._rotations))
        boxes = np.concatenate([(self._centres - translation) @ ego, self._dimensions, yaw[:, None],
                                velocities[:, :2]], axis=1)
        seen = self._lidar_points + self._radar_points > 0
        kept = [i for i, name in enumerate(self._names) if name in DETECTION_NAMES and seen[i]]
        return ([boxes[i].copy() for i in kept],
                [DETECTION_CLASSES.index(DETECTION_NAMES[self._names[i]]) for i in kept])
