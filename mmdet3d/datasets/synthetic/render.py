"""Camera images of a scene: every pixel is a ray, with texture, sunlight, shadows and haze."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import texture
from .materials import LAST_GROUND, Material
from .paint import paint_part
from .rig import Sensor, pixel_rays
from .scene import Scene
from .trace import Trace, actor_corners, box_times, into_actor, trace
from .world import CELL

_AMBIENT, _SUNLIGHT = 0.56, 0.56
_HAZE = np.array((208, 216, 226), np.float32)
_HAZE_DISTANCE = 300.0
_SHADE_RANGE = 70.0  # metres within which objects throw shadows


@dataclass(frozen=True)
class Picture:
    """A rendered image, H x W.

    Attributes:
        colors: (H, W, 3) uint8 RGB.
        distance: (H, W) float32 metres along each pixel's ray, infinite for the sky.
        classes: (H, W) uint8 OpenOcc label of what each pixel shows, the free label for the sky.
        actor: (H, W) int16 number of the object, -1 elsewhere.
        touched: (A,) int64 pixels that each object would have if nothing stood before it.
    """

    colors: np.ndarray
    distance: np.ndarray
    classes: np.ndarray
    actor: np.ndarray
    touched: np.ndarray


def render_camera(scene: Scene, frame: int, channel: str) -> Picture:
    """Image of a camera at a key frame, at the camera's own time.

    Args:
        scene: The scene.
        frame: Number of the key frame.
        channel: Name of the camera.
    """
    camera, size = scene.rig[channel], scene.settings.image_size
    seconds = scene.seconds(frame, camera.delay)
    ego = scene.ego_pose(seconds)
    origin = (ego @ camera.pose)[:3, 3]
    rays = _turn(pixel_rays(camera, size), ego)
    to_camera = np.linalg.inv(ego @ camera.pose)
    hits = trace(scene, seconds, origin, rays, lambda corners: _image_part(camera, to_camera, size, corners))
    colors = _shade(scene, seconds, origin, rays, hits)
    shape = (size[1], size[0])
    return Picture(np.clip(colors + 0.5, 0, 255).astype(np.uint8).reshape(*shape, 3), hits.distance.reshape(shape),
                   hits.classes(scene).reshape(shape), hits.actor.reshape(shape), hits.touched)


def _turn(rays: np.ndarray, ego: np.ndarray) -> np.ndarray:
    """(R, 3) float32 directions of the ego frame in the global frame; the ego vehicle turns about z only."""
    cos, sin = np.float32(ego[0, 0]), np.float32(ego[1, 0])
    x, y, z = rays.T
    return np.stack([cos * x - sin * y, sin * x + cos * y, z], 1)


def _image_part(camera: Sensor, to_camera: np.ndarray, size: tuple[int, int], corners: np.ndarray) -> np.ndarray:
    """Flat indices of the pixels of the rectangle around a body, given by its global corners."""
    points = corners @ to_camera[:3, :3].T + to_camera[:3, 3]
    width, height = size
    left, right, top, bottom = 0, width, 0, height
    if points[:, 2].max() < 0.1:
        return np.empty(0, np.int64)
    if points[:, 2].min() > 0.1:
        pixels = points @ camera.intrinsic.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        (low_x, low_y), (high_x, high_y) = np.floor(pixels.min(0) - 1), np.ceil(pixels.max(0) + 1)
        left, right = (int(np.clip(v, 0, width)) for v in (low_x, high_x))
        top, bottom = (int(np.clip(v, 0, height)) for v in (low_y, high_y))
    return (np.arange(top, bottom)[:, None] * width + np.arange(left, right)).ravel()


def _shade(scene: Scene, seconds: float, origin: np.ndarray, rays: np.ndarray, hits: Trace) -> np.ndarray:
    """(R, 3) float32 colours."""
    colors = np.empty((len(rays), 3), np.float32)
    sky = np.flatnonzero(~np.isfinite(hits.distance))
    colors[sky] = texture.sky_colors(rays[sky], 100 + scene.index)
    for material in Material:
        chosen = np.flatnonzero(hits.material == material) if material else ()
        if len(chosen):
            _shade_material(scene, seconds, origin, rays, hits, material, chosen, colors)
    _shade_actors(scene, seconds, origin, rays, hits, colors)
    lit = np.flatnonzero(np.isfinite(hits.distance))
    haze = 1 - np.exp(hits.distance[lit] * np.float32(-1 / _HAZE_DISTANCE))
    colors[lit] += (_HAZE - colors[lit]) * haze[:, None]
    return colors


def _shade_material(scene: Scene, seconds: float, origin: np.ndarray, rays: np.ndarray, hits: Trace,
                    material: Material, chosen: np.ndarray, colors: np.ndarray) -> None:
    road, world, distance = scene.road, scene.world, hits.distance[chosen]
    low = np.array((*world.low[:2], 0.0))
    # Relative to the world's corner, so that single precision is enough.
    x, y, z = (rays[chosen] * distance[:, None] + (origin - low).astype(np.float32)).T
    calm = 1 / (1 + (distance / 18) ** 2)
    style = world.style.reshape(-1)[hits.column[chosen]]
    s, d = (v.astype(np.float32) for v in road.street_coordinates(x.astype(float) + low[0], y.astype(float) + low[1]))
    axis = hits.axis[chosen]
    sun = np.array(world.sun, np.float32)
    light = _face_light(axis, rays[chosen], sun)
    if material <= LAST_GROUND:
        light = _wall_light(scene, s, True, rays[chosen], light, axis, sun)
        light = _ground_light(scene, seconds, x, y, z, light)
    if material == Material.ROAD:
        base = texture.road_colors(road, s, d, calm)
    elif material == Material.SIDEWALK:
        base = texture.sidewalk_colors(road, s, d, calm)
    elif material == Material.TERRAIN:
        base = texture.terrain_colors(x, y, calm)
    elif material == Material.PAVED:
        base = texture.paved_colors(s, d, calm)
    elif material in (Material.WALL, Material.GABLE):
        along = material == Material.WALL
        base = texture.facade_colors(s if along else d, z, style, calm)
        light = _wall_light(scene, s, along, rays[chosen], light, axis, sun) * (0.8 + 0.2 * np.clip(z / 2, 0, 1))
    elif material in (Material.LEAVES, Material.HEDGE):
        base = texture.plant_colors(x, y, z, style, calm)
        light = 0.25 + 0.75 * light
    elif material == Material.TRUNK:
        base = texture.trunk_colors(x, y, z)
    elif material == Material.FENCE:
        base = texture.fence_colors(s, z)
    else:
        base = np.full((len(chosen), 3), (92, 96, 102) if material == Material.METAL else (132, 128, 124), np.float32)
    if material <= LAST_GROUND:
        base[axis != 2] = 172
    colors[chosen] = base * light[:, None]


def _face_light(axis: np.ndarray, rays: np.ndarray, sun: np.ndarray) -> np.ndarray:
    """(P,) light on faces across ``axis`` that are seen along ``rays``, everything in one frame."""
    facing = -np.sign(np.take_along_axis(rays, axis[:, None].astype(np.int64), 1)[:, 0])
    return _AMBIENT + _SUNLIGHT * np.clip(facing * sun[axis], 0, 1)


def _wall_light(scene: Scene, s: np.ndarray, along: bool, rays: np.ndarray, light: np.ndarray, axis: np.ndarray,
                sun: np.ndarray) -> np.ndarray:
    """Light of walls with the direction that they really have: their voxels are stairs."""
    heading = scene.road.heading + np.float32(scene.road.curvature) * s
    normal_x, normal_y = (-np.sin(heading), np.cos(heading)) if along else (np.cos(heading), np.sin(heading))
    facing = -np.sign(rays[:, 0] * normal_x + rays[:, 1] * normal_y)
    smooth = _AMBIENT + _SUNLIGHT * np.clip(facing * (normal_x * sun[0] + normal_y * sun[1]), 0, 1)
    return np.where(axis == 2, light, smooth.astype(np.float32))


def _ground_light(scene: Scene, seconds: float, x: np.ndarray, y: np.ndarray, z: np.ndarray,
                  light: np.ndarray) -> np.ndarray:
    """Light of ground points, given from the world's corner, with shadows of the world and of the objects."""
    world = scene.world
    size_x, size_y = world.lit.shape
    i, j = ((v * np.float32(1 / CELL)).astype(np.int32) for v in (x, y))
    inside = (i >= 0) & (i < size_x) & (j >= 0) & (j < size_y)
    sunny = np.where(inside, world.lit[np.clip(i, 0, size_x - 1), np.clip(j, 0, size_y - 1)], np.float32(1))
    _actor_shadows(scene, seconds, x, y, z, sunny)
    return _AMBIENT + (light - _AMBIENT) * sunny


def _actor_shadows(scene: Scene, seconds: float, x: np.ndarray, y: np.ndarray, z: np.ndarray,
                   sunny: np.ndarray) -> None:
    """Set ``sunny`` to 0 at the points, given from the world's corner, that lie in the shadow of an object."""
    world = scene.world
    low = np.array((*world.low[:2], 0.0))
    sun = np.array(world.sun)
    middle = np.array(scene.ego_pose(seconds)[:2, 3])
    for actor in scene.actors:
        pose = scene.actor_pose(actor, seconds)
        if np.hypot(*(pose[:2, 3] - middle)) > _SHADE_RANGE:
            continue
        corners = actor_corners(actor, pose) - low
        cast = corners[:, :2] - corners[:, 2:] / sun[2] * sun[:2]
        rim = np.concatenate([corners[:, :2], cast])
        (x0, y0), (x1, y1) = rim.min(0), rim.max(0)
        near = np.flatnonzero((x > x0) & (x < x1) & (y > y0) & (y < y1) & (sunny > 0))
        if len(near) == 0:
            continue
        points = np.stack([x[near], y[near], z[near]], 1)
        _, start = into_actor(pose, low, points - (pose[:3, 3] - low).astype(np.float32))
        direction = pose[:3, :3].T @ sun
        inverse = (1 / np.where(np.abs(direction) < 1e-9, 1e-9, direction)).astype(np.float32)[:, None]
        shaded = np.zeros(len(near), bool)
        for part in actor.parts:
            enter, leave = box_times(part.low, part.high, start, inverse)
            shaded |= (leave.min(0) >= np.maximum(enter.max(0), 0)) & (leave.min(0) > 0)
        sunny[near[shaded]] = 0


def _shade_actors(scene: Scene, seconds: float, origin: np.ndarray, rays: np.ndarray, hits: Trace,
                  colors: np.ndarray) -> None:
    seen = np.flatnonzero(hits.actor >= 0)
    for number in np.unique(hits.actor[seen]):
        actor, own = scene.actors[number], seen[hits.actor[seen] == number]
        pose = scene.actor_pose(actor, seconds)
        start, local = into_actor(pose, origin, rays[own])
        points = (start[:, None] + local * hits.distance[own]).T
        axis = hits.axis[own]
        light = _face_light(axis, local.T, (pose[:3, :3].T @ scene.world.sun).astype(np.float32))
        # Less light comes from below.
        light *= 0.72 + 0.28 * np.clip(points[:, 2] / 0.8, 0, 1)
        for n in np.unique(hits.part[own]):
            which = np.flatnonzero(hits.part[own] == n)
            base = paint_part(actor.parts[n], points[which], axis[which])
            colors[own[which]] = base * light[which, None]
