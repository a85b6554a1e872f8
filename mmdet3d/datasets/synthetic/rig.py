"""The ego vehicle's sensors, much like those of nuScenes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mmdet3d.datasets.geometry import pose_matrix
from mmdet3d.datasets.labels import CAMERAS

EGO_SIZE = (4.1, 1.75, 1.6)
"""Length, width and height of the ego vehicle in metres."""
EGO_CENTRE_AHEAD = 1.3
"""Distance of its middle from the rear axle, the origin of the ego frame."""
BASE_IMAGE_SIZE = (1600, 900)
LIDAR = "LIDAR_TOP"

# Position (x, y, z) in the ego frame in metres, heading in degrees, focal length in pixels of a 1600 x 900 image, and
# time against the lidar's in microseconds: a camera triggers when the lidar sweeps across the middle of its view.
_CAMERAS = {
    "CAM_FRONT_LEFT": ((1.57, 0.50, 1.51), 55.2, 1257.9, -42_800),
    "CAM_FRONT": ((1.72, 0.00, 1.50), 0.3, 1252.8, -35_200),
    "CAM_FRONT_RIGHT": ((1.58, -0.50, 1.52), -56.1, 1256.7, -27_100),
    "CAM_BACK_LEFT": ((1.05, 0.48, 1.56), 108.6, 1255.0, -200),
    "CAM_BACK": ((0.05, 0.01, 1.57), 179.9, 796.9, -10_000),
    "CAM_BACK_RIGHT": ((1.06, -0.47, 1.55), -110.7, 1250.0, -19_500),
}


@dataclass(frozen=True)
class Sensor:
    """A camera or the lidar.

    Attributes:
        channel: Its name.
        rotation: Quaternion (w, x, y, z), sensor to ego.
        translation: Position in the ego frame in metres.
        intrinsic: (3, 3) for a camera, None for the lidar. The middle of the first pixel is at (0.5, 0.5).
        delay: Time against the lidar's in microseconds.
    """

    channel: str
    rotation: tuple[float, float, float, float]
    translation: tuple[float, float, float]
    intrinsic: np.ndarray | None
    delay: int

    @property
    def pose(self) -> np.ndarray:
        """(4, 4) sensor to ego."""
        return pose_matrix(self.rotation, self.translation)


def yaw_quaternion(angle: float) -> tuple[float, float, float, float]:
    """Quaternion (w, x, y, z) of a turn about z, in radians."""
    return math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)


def multiply(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, float, float, float]:
    """Product of two quaternions (w, x, y, z)."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return (aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw)


def make_rig(image_size: tuple[int, int], rng: np.random.Generator) -> dict[str, Sensor]:
    """The sensors of one vehicle; calibrations differ a little from vehicle to vehicle.

    Args:
        image_size: (width, height) in pixels; the field of view stays that of 1600 x 900 images.
        rng: Source of the differences.

    Returns:
        The lidar and the six cameras by channel.
    """
    turn = tuple(float(v) for v in rng.normal(0, 0.003, 2))
    rotation = multiply(yaw_quaternion(-math.pi / 2), _small_rotation(turn[0], turn[1], 0))
    rig = {LIDAR: Sensor(LIDAR, rotation, (0.94, 0.0, 1.84), None, 0)}
    scale = np.array([image_size[0] / BASE_IMAGE_SIZE[0], image_size[1] / BASE_IMAGE_SIZE[1], 1.0])
    for channel in CAMERAS:
        position, degrees, focal, delay = _CAMERAS[channel]
        shake = [float(v) for v in rng.normal(0, 0.004, 3)]
        # Image axes (x right, y down, z forward) in a frame that looks along x, then turned by the heading.
        rotation = multiply(multiply(yaw_quaternion(math.radians(degrees)), (0.5, -0.5, 0.5, -0.5)),
                            _small_rotation(*shake))
        middle = (800 + rng.uniform(10, 30), 450 + rng.uniform(5, 35))
        intrinsic = np.array([[focal, 0, middle[0]], [0, focal, middle[1]], [0, 0, 1]]) * scale[:, None]
        rig[channel] = Sensor(channel, rotation, position, intrinsic, delay)
    return rig


def _small_rotation(x: float, y: float, z: float) -> tuple[float, float, float, float]:
    """Quaternion of a turn by a small rotation vector in radians."""
    angle = math.sqrt(x * x + y * y + z * z)
    if angle == 0:
        return 1.0, 0.0, 0.0, 0.0
    sine = math.sin(angle / 2) / angle
    return math.cos(angle / 2), x * sine, y * sine, z * sine


def pixel_rays(sensor: Sensor, image_size: tuple[int, int]) -> np.ndarray:
    """(height * width, 3) float32 unit directions of all pixels in the ego frame, row by row."""
    width, height = image_size
    k = sensor.intrinsic
    x = (np.arange(width) + 0.5 - k[0, 2]) / k[0, 0]
    y = (np.arange(height) + 0.5 - k[1, 2]) / k[1, 1]
    rays = np.empty((height, width, 3))
    rotation = sensor.pose[:3, :3]
    for axis in range(3):
        rays[:, :, axis] = rotation[axis, 0] * x + rotation[axis, 1] * y[:, None] + rotation[axis, 2]
    rays /= np.sqrt(1 + x * x + (y * y)[:, None])[:, :, None]
    return rays.reshape(-1, 3).astype(np.float32)
