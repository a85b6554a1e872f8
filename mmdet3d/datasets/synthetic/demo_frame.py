"""A short drawn drive: boxes on a street seen by six cameras, written in the layout of real data.

Made for trying the whole path from image files to pictures without any download. The rig resembles nuScenes: images
of 1600 x 900 pixels, five cameras with a focal length of 1266 pixels and a wider one to the rear with 809 (sold as
70 and 110 degrees). Every pixel is traced exactly: a ray against the ground and all boxes.
"""

import io
import math
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mmdet3d.datasets.geometry import pose_matrix
from mmdet3d.datasets.labels import CAMERAS
from mmdet3d.utils.files import atomic_write

INFO_FILE = "demo_infos.pkl"
SCENE = "demo-scene"
_SIZE = (1600, 900)
_SPEED, _INTERVAL = 6.0, 0.5  # of the ego car in m/s, and seconds between key frames
_START = (412.0, 873.0, 0.0)  # ego position at the first frame in the global frame
_HEADING = math.radians(25)
_LIDAR = ((0.94, 0.0, 1.84), -math.pi / 2)
# Position (x, y, z) in the ego frame, heading in degrees, focal length in pixels.
_RIG = {
    "CAM_FRONT_LEFT": ((1.52, 0.49, 1.51), 55.0, 1266.0),
    "CAM_FRONT": ((1.70, 0.00, 1.51), 0.0, 1266.0),
    "CAM_FRONT_RIGHT": ((1.52, -0.49, 1.51), -55.0, 1266.0),
    "CAM_BACK_LEFT": ((1.03, 0.48, 1.56), 110.0, 1266.0),
    "CAM_BACK": ((0.03, 0.00, 1.57), 180.0, 809.0),
    "CAM_BACK_RIGHT": ((1.03, -0.48, 1.56), -110.0, 1266.0),
}
_SUN = np.array([0.35, 0.45, 0.82], np.float32)


@dataclass(frozen=True)
class _Box:
    """A box turned about z. ``speed`` is along its heading in m/s; ``kind`` chooses the paint."""

    kind: str
    centre: tuple[float, float]
    size: tuple[float, float, float]
    color: tuple[int, int, int]
    heading: float = 0.0
    speed: float = 0.0
    base: float = 0.0

    def at(self, seconds: float) -> tuple[float, float]:
        way = self.speed * seconds
        return self.centre[0] + way * math.cos(self.heading), self.centre[1] + way * math.sin(self.heading)

    def axes(self) -> np.ndarray:
        """(3, 3) float32 rotation from the street to the box's own axes."""
        c, s = math.cos(self.heading), math.sin(self.heading)
        return np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]], np.float32)


def _car(x: float, y: float, color: tuple[int, int, int], heading: float = 0.0, speed: float = 0.0) -> list[_Box]:
    """Body and cabin."""
    back = (x - 0.25 * math.cos(heading), y - 0.25 * math.sin(heading))
    return [_Box("body", (x, y), (4.5, 1.85, 0.75), color, heading, speed, 0.3),
            _Box("cabin", back, (2.5, 1.65, 0.65), color, heading, speed, 1.05)]


def _tree(x: float, y: float) -> list[_Box]:
    return [_Box("trunk", (x, y), (0.4, 0.4, 2.2), (96, 74, 55)),
            _Box("leaves", (x, y), (2.8, 2.8, 2.9), (62, 118, 52), 0.4, base=2.1)]


def _world() -> list[_Box]:
    """The street along x: two lanes each way, sidewalks, houses, cars, a bus, trees and pedestrians."""
    boxes = [*_car(14, 0.3, (178, 32, 40), speed=7.0), *_car(-13, 0.1, (40, 70, 140), speed=6.0),
             *_car(24, 3.8, (225, 225, 228), math.pi, 8.0), *_car(-9, 7.0, (50, 52, 56), math.pi),
             *_car(7, -3.6, (210, 170, 40)), *_car(33, -3.6, (90, 130, 90))]
    boxes.append(_Box("bus", (-24.0, 3.9), (11.0, 2.6, 3.2), (236, 186, 30), math.pi, 5.0, 0.3))
    for x, y, heading in ((9.5, 9.6, math.pi), (17.0, -6.6, 0.0), (-6.0, -6.9, 0.0)):
        boxes.append(_Box("person", (x, y), (0.5, 0.6, 1.75), (150, 60, 70), heading, 1.3))
    for x in (-30, -17, -4, 11, 22, 35):
        boxes += _tree(x, -8.6) + _tree(x + 5, 11.4)
    walls = ((172, 150, 128), (150, 108, 92), (186, 184, 176), (128, 138, 150))
    for n, x in enumerate((-33, -15, 4, 24, 43)):
        boxes.append(_Box("house", (x, 21.0), (16.0, 10.0, 9.0 + 2 * (n % 3)), walls[n % 4]))
        boxes.append(_Box("house", (x + 4, -18.0), (17.0, 9.0, 8.0 + 3 * (n % 2)), walls[(n + 2) % 4]))
    return boxes


def _noise(a: np.ndarray, b: np.ndarray, cell: float) -> np.ndarray:
    """Repeatable noise in -1..1 that is constant within square cells."""
    i, j = np.floor(a / cell), np.floor(b / cell)
    value = np.sin(i * 127.1 + j * 311.7) * 43758.5453
    return 2 * (value - np.floor(value)) - 1


def _ground(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(P, 3) colours of ground points: road with markings, kerbs, sidewalks with slabs, grass."""
    colors = np.array([104, 132, 74], float) + 12 * _noise(x, y, 0.25)[:, None]
    walk = (y > -8.0) & (y < 12.0)
    slab = (np.abs(x - np.rint(x)) < 0.03) | (np.abs(y - np.rint(y)) < 0.03)
    colors[walk] = np.where(slab, 138, 168)[walk, None] + 4 * _noise(x, y, 1.0)[walk, None]
    road = (y > -5.2) & (y < 9.2)
    colors[road] = 84 + 5 * _noise(x, y, 0.12)[road, None]
    kerb = (np.abs(y + 5.2) < 0.12) | (np.abs(y - 9.2) < 0.12)
    colors[kerb] = 190
    dashed = (np.mod(x, 6) < 3) & ((np.abs(y + 1.75) < 0.07) | (np.abs(y - 5.6) < 0.07))
    solid = (np.abs(y - 1.85) < 0.06) | (np.abs(y - 2.1) < 0.06)
    crossing = (x > 18) & (x < 21) & road & (np.mod(y, 1.0) < 0.5)
    colors[dashed | crossing] = 222
    colors[solid & ~((x > 18) & (x < 21))] = (216, 190, 70)
    return colors


def _paint(box: _Box, point: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """(P, 3) colours of points (P, 3), given from the box's lower centre, on faces across ``axis`` (P,)."""
    colors = np.tile(np.array(box.color, float), (len(point), 1))
    along = np.where(axis == 0, point[:, 1], point[:, 0])
    height, side = point[:, 2], axis != 2
    if box.kind == "house":
        window = side & (np.mod(along, 2.2) > 0.8) & (np.mod(height, 2.8) > 1.1) & (height > 0.9)
        colors += 7 * _noise(along, height, 0.3)[:, None]
        colors[window] = (70, 92, 112)
    elif box.kind in ("cabin", "bus"):
        low = 0.06 if box.kind == "cabin" else 1.3
        glass = side & (height > low) & (height < low + (0.45 if box.kind == "cabin" else 1.1))
        colors[glass & (np.abs(np.mod(along, 1.3) - 0.65) < 0.6)] = (42, 50, 60)
    elif box.kind == "body":
        wheel = (axis == 1) & (np.hypot(np.abs(point[:, 0]) - 1.4, height + 0.02) < 0.34)
        colors[wheel] = (22, 22, 24)
        ends = (axis == 0) & (np.abs(np.abs(point[:, 1]) - 0.7) < 0.16) & (np.abs(height - 0.45) < 0.09)
        colors[ends & (point[:, 0] > 0)], colors[ends & (point[:, 0] < 0)] = (250, 246, 220), (210, 25, 25)
    elif box.kind == "leaves":
        colors += 22 * _noise(along, height, 0.22)[:, None]
    elif box.kind == "person":
        colors[height < 0.85], colors[height > 1.5] = (45, 50, 80), (224, 178, 150)
    return colors


def _slabs(box: _Box, start: np.ndarray, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances at which lines, given in the box's own axes, enter and leave the slab of each axis, (P, 3)."""
    x, y, z = box.size
    low, high = np.array([-x / 2, -y / 2, 0], np.float32), np.array([x / 2, y / 2, z], np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        first, second = (low - start) / direction, (high - start) / direction
    return np.fmin(first, second), np.fmax(first, second)


def _hit_box(box: _Box, eye: np.ndarray, rays: np.ndarray, seconds: float):
    """Distance (infinite without a hit), face axis and hit point from the lower centre, for rays (P, 3)."""
    start = (box.axes() @ (eye - (*box.at(seconds), box.base))).astype(np.float32)
    local = rays @ box.axes().T
    enter, leave = _slabs(box, start, local)
    axis = np.where(enter[:, 0] > enter[:, 1], 0, 1)
    t = np.maximum(enter[:, 0], enter[:, 1])
    axis, t = np.where(enter[:, 2] > t, 2, axis), np.maximum(enter[:, 2], t)
    hit = (np.minimum(np.minimum(leave[:, 0], leave[:, 1]), leave[:, 2]) >= t) & (t > 0.1)
    return np.where(hit, t, np.float32(np.inf)), axis, start + t[:, None] * local


def _trace(boxes: list[_Box], eye: np.ndarray, rays: np.ndarray, seconds: float) -> np.ndarray:
    """(P, 3) colours seen along unit rays (P, 3) from ``eye``, both in street coordinates."""
    up = rays[:, 2]
    horizon, zenith = np.array([[236, 240, 246], [120, 165, 222]], np.float32)
    colors = horizon + (zenith - horizon) * np.clip(up * 2.2, 0, 1)[:, None]
    with np.errstate(divide="ignore"):
        nearest = np.where(rays[:, 2] < -1e-6, -eye[2] / rays[:, 2], np.inf).astype(np.float32)
    down = np.flatnonzero(nearest < 400)
    ground = eye.astype(np.float32) + nearest[down, None] * rays[down]
    colors[down] = _ground(ground[:, 0], ground[:, 1]) * _shadow(boxes, ground, seconds)[:, None]
    for box in boxes:
        candidates = _beside(box, eye, rays, seconds)
        t, axis, point = _hit_box(box, eye, rays[candidates], seconds)
        nearer = t < nearest[candidates]
        target = candidates[nearer]
        axis, point = axis[nearer], point[nearer]
        normal = np.zeros((len(axis), 3), np.float32)
        normal[np.arange(len(axis)), axis] = -np.sign((rays[target] @ box.axes().T)[np.arange(len(axis)), axis])
        light = 0.70 + 0.30 * np.clip(normal @ box.axes() @ _SUN, 0, 1)
        colors[target] = _paint(box, point, axis) * light[:, None]
        nearest[target] = t[nearer]
    return colors


def _shadow(boxes: list[_Box], ground: np.ndarray, seconds: float) -> np.ndarray:
    """Light that reaches ground points (P, 3): less where a box stands between them and the sun."""
    light = np.ones(len(ground))
    for box in boxes:
        reach = max(box.size) + box.base
        x, y = box.at(seconds)
        near = np.flatnonzero((np.abs(ground[:, 0] - x) < reach) & (np.abs(ground[:, 1] - y) < reach))
        start = (ground[near] - np.array([x, y, box.base], np.float32)) @ box.axes().T
        enter, leave = _slabs(box, start, box.axes() @ _SUN)
        light[near[leave.min(1) >= np.maximum(enter.max(1), 0)]] = 0.62
    return light


def _beside(box: _Box, eye: np.ndarray, rays: np.ndarray, seconds: float) -> np.ndarray:
    """Rays that come near a box: those within the angle under which its surrounding sphere is seen."""
    centre = np.array([*box.at(seconds), box.base + box.size[2] / 2]) - eye
    distance, reach = np.linalg.norm(centre), np.linalg.norm(box.size) / 2
    if distance <= reach:
        return np.arange(len(rays))
    limit = math.sqrt(1 - (reach / distance) ** 2) - 1e-6
    return np.flatnonzero(rays @ (centre / distance).astype(rays.dtype) >= limit)


def _yaw(angle: float) -> list[float]:
    return [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)]


def _multiply(a: list[float], b: list[float]) -> list[float]:
    """Product of two quaternions (w, x, y, z)."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return [aw * bw - ax * bx - ay * by - az * bz, aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx, aw * bz + ax * by - ay * bx + az * bw]


def _camera_record(name: str, ego: dict, path: str) -> dict:
    position, degrees, focal = _RIG[name]
    # Image axes (x right, y down, z forward) in a frame that looks along x, then turned by the camera's heading.
    rotation = _multiply(_yaw(math.radians(degrees)), [0.5, -0.5, 0.5, -0.5])
    intrinsic = np.array([[focal, 0, _SIZE[0] / 2], [0, focal, _SIZE[1] / 2 + 30], [0, 0, 1.0]])
    return {"data_path": path, "type": name, "cam_intrinsic": intrinsic, "sensor2ego_translation": list(position),
            "sensor2ego_rotation": rotation, **ego}


def _draw(record: dict, boxes: list[_Box], travelled: float, seconds: float, shrink: int) -> Image.Image:
    """Picture of one camera, traced at ``1 / shrink`` of its size and scaled up."""
    columns, rows = (np.arange(n // shrink) * shrink + shrink / 2 for n in _SIZE)
    pixels = np.stack([*np.meshgrid(columns, rows), np.ones((len(rows), len(columns)))], -1).reshape(-1, 3)
    pose = pose_matrix(record["sensor2ego_rotation"], record["sensor2ego_translation"])
    rays = pixels @ np.linalg.inv(record["cam_intrinsic"]).T @ pose[:3, :3].T
    rays = (rays / np.sqrt(np.einsum("pi,pi->p", rays, rays))[:, None]).astype(np.float32)
    colors = _trace(boxes, pose[:3, 3] + (travelled, 0, 0), rays, seconds)
    picture = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8).reshape(len(rows), len(columns), 3))
    return picture.resize(_SIZE, Image.Resampling.BICUBIC)


def demo_infos(frames: int = 3) -> list[dict]:
    """Info records of the drive, in the schema of real info files; file names are relative to the folder."""
    infos = []
    for n in range(frames):
        seconds = n * _INTERVAL
        way = _SPEED * seconds
        position = [_START[0] + way * math.cos(_HEADING), _START[1] + way * math.sin(_HEADING), _START[2]]
        ego = {"ego2global_translation": position, "ego2global_rotation": _yaw(_HEADING)}
        can_bus = np.zeros(18)
        can_bus[13] = _SPEED
        token = f"demo{n:04d}"
        infos.append({
            "token": token, "prev": f"demo{n - 1:04d}" if n else "", "timestamp": 1_600_000_000_000_000 + n * 500_000,
            "scene_token": SCENE, "occ_path": f"gts/{SCENE}/{token}", "lidar_path": "", "sweeps": [],
            "ann_infos": ([], []), "can_bus": can_bus, "lidar2ego_translation": list(_LIDAR[0]),
            "lidar2ego_rotation": _yaw(_LIDAR[1]), **ego,
            "cams": {name: _camera_record(name, ego, f"samples/{name}/{token}.jpg") for name in CAMERAS},
        })
    return infos


def write_demo(folder: str | os.PathLike, frames: int = 3, shrink: int = 2) -> Path:
    """Draw the drive and write its images and info file.

    Args:
        folder: Where to write; made if absent. Files of an earlier drive are replaced.
        frames: Number of key frames, half a second apart.
        shrink: Trace one ray per ``shrink`` x ``shrink`` pixels.

    Returns:
        Path of the info file. The same call always writes the same pictures.
    """
    folder = Path(folder)
    infos, boxes = demo_infos(frames), _world()

    def draw(job: tuple[int, dict]) -> None:
        seconds, record = job[0] * _INTERVAL, job[1]
        buffer = io.BytesIO()
        _draw(record, boxes, _SPEED * seconds, seconds, shrink).save(buffer, "JPEG", quality=92)
        with atomic_write(folder / record["data_path"]) as file:
            file.write(buffer.getvalue())

    jobs = [(n, record) for n, info in enumerate(infos) for record in info["cams"].values()]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # NumPy works outside the interpreter lock
        for _ in pool.map(draw, jobs):
            pass
    content = {"infos": infos, "metadata": {"version": "demo"}}
    with atomic_write(folder / INFO_FILE) as file:
        pickle.dump(content, file, protocol=4)
    return folder / INFO_FILE
