"""Occupancy, flow and visibility labels of a scene, in the ego frame at the lidar's time.

What counts as seen follows Occ3D (Tian et al., NeurIPS 2023): rays walk through the label grid; the first occupied
voxel and the free voxels before it are observed, and a ray that meets nothing observes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from mmdet3d.datasets.geometry import rigid_inverse
from mmdet3d.datasets.labels import CAMERAS, OCC3D, OPENOCC
from mmdet3d.ops.ray_cast import ray_cast
from mmdet3d.structures import VoxelGrid

from .lidar import ELEVATIONS, MAX_RANGE
from .materials import LAST_GROUND, Material, material_labels
from .objects import inside_parts
from .rig import LIDAR, Sensor
from .scene import Scene
from .world import CELL

GRID = VoxelGrid((-40.0, -40.0, -1.0), (40.0, 40.0, 5.4), (0.4, 0.4, 0.4))
"""The grid of both label sets."""
_SAMPLES = 3  # per axis of a voxel; so dense that no voxel of the world is missed
_PAD = 0.04  # metres by which objects grow before they are sampled: half the distance of the samples
_INSET = 0.002  # metres: targets of sight lines lie this far inside a voxel's faces


@dataclass(frozen=True)
class OccupancyLabels:
    """Labels of one key frame; arrays are (200, 200, 16) in the order x, y, z.

    Attributes:
        openocc: uint8 OpenOcc labels.
        occ3d: uint8 Occ3D labels.
        flow: (200, 200, 16, 2) float32 velocity (vx, vy) in m/s along the grid's axes, zero for what cannot move.
        actor: int16 number of the object in each voxel, -1 elsewhere.
        mask_lidar: uint8, 1 where the lidar sees.
        mask_camera: uint8, 1 where a camera sees.
    """

    openocc: np.ndarray
    occ3d: np.ndarray
    flow: np.ndarray
    actor: np.ndarray
    mask_lidar: np.ndarray
    mask_camera: np.ndarray


def make_labels(scene: Scene, frame: int) -> OccupancyLabels:
    """Labels of a key frame.

    A voxel is occupied as soon as one of its 27 sample points is. Its label is that of most of them; an object's
    points count as one.
    """
    pose = scene.ego_pose(scene.seconds(frame))
    openocc, amount = _world_labels(scene, pose)
    actor = _actor_voxels(scene, frame, pose, amount)
    flow = np.zeros((*openocc.shape, 2), np.float32)
    for number in np.unique(actor[actor >= 0]):
        which = actor == number
        openocc[which] = OPENOCC.classes.index(scene.actors[number].kind)
        velocity = np.array((*scene.actors[number].track.velocity(scene.seconds(frame)), 0.0)) @ pose[:3, :3]
        flow[which] = velocity[:2]
    translate = np.array([OCC3D.classes.index(name) for name in OPENOCC.classes], np.uint8)
    occ3d = translate[openocc]
    sights = _exposed(openocc)
    mask_camera = np.zeros(openocc.shape, np.uint8)
    for channel in CAMERAS:
        _see(openocc, sights, scene.rig[channel], scene.settings.image_size, mask_camera)
    mask_lidar = np.zeros(openocc.shape, np.uint8)
    _see(openocc, sights, scene.rig[LIDAR], None, mask_lidar)
    return OccupancyLabels(openocc, occ3d, flow, actor, mask_lidar, mask_camera)


def _sample_positions(axis: int) -> np.ndarray:
    """Positions of the samples along an axis in metres, voxel after voxel."""
    cell, count = GRID.cell[axis], GRID.size_xyz[axis]
    return GRID.low[axis] + (np.arange(count * _SAMPLES) + 0.5) * (cell / _SAMPLES)


def _world_labels(scene: Scene, pose: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OpenOcc labels of the still world, and how many samples of each voxel carry the winning material."""
    world = scene.world
    x, y, z = (_sample_positions(axis) for axis in range(3))
    global_x = pose[0, 0] * x[:, None] + pose[0, 1] * y + pose[0, 3]
    global_y = pose[1, 0] * x[:, None] + pose[1, 1] * y + pose[1, 3]
    i = np.floor((global_x - world.low[0]) / CELL).astype(np.int64)
    j = np.floor((global_y - world.low[1]) / CELL).astype(np.int64)
    k = np.floor((z - world.low[2]) / CELL).astype(np.int64)
    size = world.grid.shape
    inside = (i >= 0) & (i < size[0]) & (j >= 0) & (j < size[1])
    columns = world.grid[np.where(inside, i, 0), np.where(inside, j, 0), : k.max() + 1]
    columns[~inside] = Material.AIR
    samples = np.zeros((len(x), len(y), len(z)), np.uint8)
    samples[:, :, k >= 0] = columns[:, :, k[k >= 0]]
    n, (a, b, c) = _SAMPLES, GRID.size_xyz
    blocks = samples.reshape(a, n, b, n, c, n).transpose(0, 2, 4, 1, 3, 5).reshape(a, b, c, n**3)
    winner, amount = np.zeros((a, b, c), np.uint8), np.zeros((a, b, c), np.uint8)
    for material in list(Material)[1:]:
        number = (blocks == material).sum(-1, dtype=np.uint8)
        better = number > amount
        winner[better], amount[better] = material, number[better]
    amount[winner <= LAST_GROUND] = np.minimum(amount[winner <= LAST_GROUND], _SAMPLES**2)
    return material_labels(OPENOCC)[winner], amount


def _actor_voxels(scene: Scene, frame: int, pose: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """(X, Y, Z) int16 object that fills more samples of a voxel than the still world does (``amount``), else -1."""
    owner, best = np.full(amount.shape, -1, np.int16), amount.copy()
    to_ego, low, cell = rigid_inverse(pose), np.array(GRID.low), np.array(GRID.cell)
    fine = (np.arange(_SAMPLES) + 0.5) / _SAMPLES
    offsets = np.stack(np.meshgrid(fine, fine, fine, indexing="ij"), -1).reshape(-1, 3) * cell
    for number, actor in enumerate(scene.actors):
        place = to_ego @ scene.actor_pose(actor, scene.seconds(frame))
        length, width, height = actor.size
        reach = np.hypot(length, width) / 2
        first = np.floor((place[:3, 3] - (reach, reach, 0) - low) / cell).astype(int)
        last = np.ceil((place[:3, 3] + (reach, reach, height) - low) / cell).astype(int)
        first, last = np.clip(first, 0, GRID.size_xyz), np.clip(last, 0, GRID.size_xyz)
        if (last <= first).any():
            continue
        cells = np.stack(np.meshgrid(*(np.arange(a, b) for a, b in zip(first, last, strict=True)), indexing="ij"), -1)
        points = (low + cells.reshape(-1, 1, 3) * cell + offsets).reshape(-1, 3)
        local = (points - place[:3, 3]) @ place[:3, :3]
        filled = inside_parts(actor, local, _PAD).reshape(-1, _SAMPLES**3).sum(1)
        window = tuple(slice(a, b) for a, b in zip(first, last, strict=True))
        filled = filled.reshape(owner[window].shape)
        better = filled > best[window]
        owner[window][better], best[window][better] = number, filled[better]
    return owner


@dataclass(frozen=True)
class _Sights:
    """Points to look at: (P, 3) positions in the ego frame and (P,) flat voxels that they lie in."""

    points: np.ndarray
    voxels: np.ndarray


def _exposed(labels: np.ndarray) -> tuple[_Sights, _Sights]:
    """Middles of the free voxels, and middles of those faces of occupied voxels that border on free ones."""
    free = labels == OPENOCC.free_index
    low, cell = np.array(GRID.low), np.array(GRID.cell)
    points, voxels = [], []
    for axis in range(3):
        for side in (0, 1):
            neighbour = np.roll(free, 1 if side == 0 else -1, axis)
            edge = [slice(None)] * 3
            edge[axis] = 0 if side == 0 else -1
            neighbour[tuple(edge)] = True
            index = np.argwhere(~free & neighbour)
            offset = np.full(3, 0.5)
            offset[axis] = side
            inset = np.zeros(3)
            inset[axis] = _INSET if side == 0 else -_INSET
            points.append(low + (index + offset) * cell + inset)
            voxels.append(np.ravel_multi_index(tuple(index.T), labels.shape))
    index = np.argwhere(free)
    air = _Sights(low + (index + 0.5) * cell, np.ravel_multi_index(tuple(index.T), labels.shape))
    return air, _Sights(np.concatenate(points), np.concatenate(voxels))


def _in_view(points: np.ndarray, sensor: Sensor, image_size: tuple[int, int] | None) -> np.ndarray:
    """(P,) bool, whether a sensor's view covers points (P, 3) of the ego frame."""
    local = (points - sensor.translation) @ sensor.pose[:3, :3]
    if sensor.intrinsic is None:
        distance = np.linalg.norm(local, axis=1)
        slope = np.degrees(np.arcsin(local[:, 2] / np.maximum(distance, 1e-9)))
        return (distance < MAX_RANGE) & (slope >= ELEVATIONS[0]) & (slope <= ELEVATIONS[1])
    ahead = local[:, 2] > 0.1
    pixels = local @ sensor.intrinsic.T
    depth = np.where(ahead, pixels[:, 2], 1)
    u, v = pixels[:, 0] / depth, pixels[:, 1] / depth
    return ahead & (u >= 0) & (u < image_size[0]) & (v >= 0) & (v < image_size[1])


def _see(labels: np.ndarray, sights: tuple[_Sights, _Sights], sensor: Sensor, image_size: tuple[int, int] | None,
         mask: np.ndarray) -> None:
    """Set ``mask`` to 1 where a sensor sees.

    An occupied voxel is seen if the sight line to the middle of one of its faces ends in it; a free one if the line
    to its middle passes, and meets something behind.
    """
    air, faces = sights
    grid, flat = torch.from_numpy(labels)[None], mask.reshape(-1)
    origin = torch.tensor(sensor.translation, dtype=torch.float64)[None]
    options = {"free_label": OPENOCC.free_index, "low": GRID.low, "cell_size": GRID.cell[0], "with_entry": True}
    for points, voxels, solid in ((air.points, air.voxels, False), (faces.points, faces.voxels, True)):
        chosen = np.flatnonzero(_in_view(points, sensor, image_size))
        rays = torch.from_numpy(points[chosen]) - origin
        hits = ray_cast(grid, origin, rays, **options)
        seen = hits.hit[0] & ((hits.voxel[0] == torch.from_numpy(voxels[chosen])) if solid
                              else (hits.entry[0] >= rays.norm(dim=1)))
        flat[voxels[chosen[seen.numpy()]]] = 1
