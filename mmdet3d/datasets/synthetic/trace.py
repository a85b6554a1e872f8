"""What rays meet first in a scene: its voxels, or the exact boxes of its objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mmdet3d.datasets.labels import OPENOCC
from mmdet3d.ops.ray_cast import ray_cast

from .materials import Material, material_labels
from .objects import Actor
from .scene import Scene
from .world import CELL

_NEAR = 0.05  # metres; nothing is seen nearer
_MAX_ACTOR_RANGE = 110.0


@dataclass
class Trace:
    """First hits of R rays.

    Attributes:
        distance: (R,) float32 metres, infinite where nothing is hit.
        material: (R,) uint8 :class:`Material` of the voxel; AIR where an object or nothing is hit.
        column: (R,) int32 flat index of the voxel's column (x * Y + y).
        axis: (R,) int8 axis of the face that is hit: the global frame's, or the object's own for objects.
        actor: (R,) int16 number of the object, -1 where none is hit.
        part: (R,) int16 number of its part.
        touched: (A,) int64 per object, rays that would hit it if nothing stood before it.
    """

    distance: np.ndarray
    material: np.ndarray
    column: np.ndarray
    axis: np.ndarray
    actor: np.ndarray
    part: np.ndarray
    touched: np.ndarray

    def classes(self, scene: Scene) -> np.ndarray:
        """(R,) uint8 OpenOcc label of what each ray meets, the free label where nothing is hit."""
        labels = material_labels(OPENOCC)[self.material]
        kinds = np.array([*(OPENOCC.classes.index(actor.kind) for actor in scene.actors), 0], np.uint8)
        return np.where(self.actor >= 0, kinds[self.actor], labels)


Candidates = Callable[[np.ndarray], np.ndarray]
"""Gives the indices of the rays that may hit a convex body, from its (8, 3) global corners."""


def trace(scene: Scene, seconds: float, origin: np.ndarray, rays: np.ndarray, candidates: Candidates) -> Trace:
    """Cast rays into a scene as it is at one moment.

    Args:
        scene: The scene.
        seconds: Time from its first key frame.
        origin: (3,) float64 common origin in the global frame, metres.
        rays: (R, 3) float32 unit directions in the global frame.
        candidates: Which rays may hit a body.
    """
    result = _trace_world(scene, origin, rays)
    for number, actor in enumerate(scene.actors):
        pose = scene.actor_pose(actor, seconds)
        if np.hypot(*(pose[:2, 3] - origin[:2])) < _MAX_ACTOR_RANGE:
            _trace_actor(result, number, actor, pose, origin, rays, candidates)
    return result


def _trace_world(scene: Scene, origin: np.ndarray, rays: np.ndarray) -> Trace:
    world, count = scene.world, len(rays)
    hits = ray_cast(torch.from_numpy(world.grid)[None], torch.from_numpy(origin)[None], torch.from_numpy(rays),
                    free_label=int(Material.AIR), low=world.low, cell_size=CELL, with_entry=True)
    hit, voxel = hits.hit[0].numpy(), hits.voxel[0].numpy()
    distance = np.where(hit, hits.entry[0].numpy(), np.float32(np.inf))
    material = np.where(hit, world.grid.reshape(-1)[voxel], np.uint8(Material.AIR))
    axis = hits.axis[0].numpy().copy()
    # Beyond the grid the ground goes on as a plane.
    with np.errstate(divide="ignore"):
        plane = (-origin[2] / rays[:, 2]).astype(np.float32)
    far = ~hit & (rays[:, 2] < -1e-4) & (plane < 1000)
    distance[far], material[far], axis[far] = plane[far], Material.TERRAIN, 2
    nobody = np.full(count, -1, np.int16)
    return Trace(distance, material, voxel // world.grid.shape[2], axis, nobody, nobody.copy(),
                 np.zeros(len(scene.actors), np.int64))


def actor_corners(actor: Actor, pose: np.ndarray) -> np.ndarray:
    """(8, 3) global corners of an object's box."""
    length, width, height = actor.size
    corners = np.array([(x, y, z) for x in (-length / 2, length / 2) for y in (-width / 2, width / 2)
                        for z in (0, height)])
    return corners @ pose[:3, :3].T + pose[:3, 3]


def into_actor(pose: np.ndarray, origin: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and rays (3, P) in an object's own frame, float32."""
    cos, sin = np.float32(pose[0, 0]), np.float32(pose[1, 0])
    start = (pose[:3, :3].T @ (origin - pose[:3, 3])).astype(np.float32)
    x, y, z = rays.T
    return start, np.stack([cos * x + sin * y, cos * y - sin * x, z])


def box_times(low: tuple, high: tuple, start: np.ndarray, inverse: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """When rays enter and leave the slab of each axis of a box, (3, P) each; ``start`` is (3,) or (3, P)."""
    start = start.reshape(3, -1)
    first = (np.array(low, np.float32)[:, None] - start) * inverse
    second = (np.array(high, np.float32)[:, None] - start) * inverse
    return np.minimum(first, second), np.maximum(first, second)


def _trace_actor(result: Trace, number: int, actor: Actor, pose: np.ndarray, origin: np.ndarray, rays: np.ndarray,
                 candidates: Candidates) -> None:
    index = candidates(actor_corners(actor, pose))
    if len(index) == 0:
        return
    start, local = into_actor(pose, origin, rays[index])
    tiny = np.float32(1e-9)
    inverse = 1 / np.where(np.abs(local) < tiny, tiny, local)
    nearest = np.full(len(index), np.inf, np.float32)
    axis, which = np.zeros(len(index), np.int8), np.zeros(len(index), np.int16)
    for n, part in enumerate(actor.parts):
        enter, leave = box_times(part.low, part.high, start, inverse)
        t = enter.max(0)
        better = (t <= leave.min(0)) & (t > _NEAR) & (t < nearest)
        nearest[better], which[better] = t[better], n
        axis[better] = enter[:, better].argmax(0)
    result.touched[number] = np.isfinite(nearest).sum()
    seen = nearest < result.distance[index]
    target = index[seen]
    result.distance[target], result.axis[target] = nearest[seen], axis[seen]
    result.material[target] = Material.AIR
    result.actor[target], result.part[target] = number, which[seen]
