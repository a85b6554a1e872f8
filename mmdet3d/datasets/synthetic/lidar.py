"""A spinning lidar of 32 beams, as on the nuScenes vehicles."""

from __future__ import annotations

import math

import numpy as np

from .materials import Material
from .noise import hash_cells
from .rig import LIDAR
from .scene import Scene
from .trace import trace

BEAMS = 32
ELEVATIONS = (-30.67, 10.67)
"""Lowest and highest beam in degrees."""
AZIMUTHS = 1084
"""Directions per turn and beam."""
MAX_RANGE = 80.0
"""Metres; nothing is measured further away."""
_NOISE = 0.015  # metres, largest error of a range
_EGO_RADIUS = 1.2  # metres; the vehicle's own roof is cut out
_REFLECTION = {Material.ROAD: 12, Material.SIDEWALK: 22, Material.TERRAIN: 18, Material.PAVED: 24, Material.WALL: 34,
               Material.ROOF: 30, Material.METAL: 60, Material.FENCE: 28, Material.TRUNK: 20, Material.LEAVES: 16,
               Material.HEDGE: 16, Material.GABLE: 34}


def beam_directions() -> np.ndarray:
    """(32 * 1084, 3) float32 unit directions in the lidar frame (x right, y forward), azimuth outer, beam inner."""
    elevation = np.radians(np.linspace(*ELEVATIONS, BEAMS))
    azimuth = np.arange(AZIMUTHS) * (2 * math.pi / AZIMUTHS)
    flat = np.cos(elevation)
    rays = np.stack([np.cos(azimuth)[:, None] * flat, np.sin(azimuth)[:, None] * flat,
                     np.broadcast_to(np.sin(elevation), (AZIMUTHS, BEAMS))], -1)
    return rays.reshape(-1, 3).astype(np.float32)


def scan(scene: Scene, frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Points of one turn; the whole turn is measured at the time of the key frame.

    Args:
        scene: The scene.
        frame: Number of the key frame.

    Returns:
        (N, 5) float32 x, y, z in the lidar frame in metres, intensity 0..255 and ring 0 (lowest) to 31; and (N,) int16
        number of the object that each point lies on, -1 for the still world.
    """
    seconds = scene.seconds(frame)
    pose = scene.ego_pose(seconds) @ scene.rig[LIDAR].pose
    rays = beam_directions()
    turned = (rays.astype(np.float64) @ pose[:3, :3].T).astype(np.float32)
    hits = trace(scene, seconds, pose[:3, 3], turned, lambda corners: _near(pose[:3, 3], turned, corners))
    returns = np.flatnonzero((hits.distance < MAX_RANGE) & (hits.distance > _EGO_RADIUS))
    number = np.arange(len(rays))
    error = 2 * hash_cells(number, np.full_like(number, frame * 64 + scene.index), 21) - 1
    distance = hits.distance[returns] + np.float32(_NOISE) * error[returns]
    reflection = np.array([_REFLECTION.get(material, 0) for material in Material], np.float32)[hits.material[returns]]
    reflection[hits.actor[returns] >= 0] = 46
    intensity = np.floor(reflection * (0.8 + 0.4 * hash_cells(number[returns], number[returns], 22)))
    ring = (returns % BEAMS).astype(np.float32)
    points = np.concatenate([rays[returns] * distance[:, None], intensity[:, None], ring[:, None]], 1)
    return points.astype(np.float32), hits.actor[returns]


def _near(origin: np.ndarray, rays: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """Indices of the rays within the cone around a body, given by its corners."""
    centre = corners.mean(0) - origin
    distance, reach = np.linalg.norm(centre), np.linalg.norm(corners[0] - corners.mean(0))
    if distance <= reach:
        return np.arange(len(rays))
    limit = math.sqrt(1 - (reach / distance) ** 2) - 1e-6
    toward = (centre / distance).astype(np.float32)
    return np.flatnonzero(rays[:, 0] * toward[0] + rays[:, 1] * toward[1] + rays[:, 2] * toward[2] >= limit)


def count_in_boxes(scene: Scene, frame: int, points: np.ndarray) -> list[int]:
    """How many lidar points (N, 3 or more) of a key frame lie in the annotated box of each object."""
    seconds = scene.seconds(frame)
    to_global = scene.ego_pose(seconds) @ scene.rig[LIDAR].pose
    places = points[:, :3] @ to_global[:3, :3].T + to_global[:3, 3]
    counts = []
    for actor in scene.actors:
        pose = scene.actor_pose(actor, seconds)
        offset = places - actor.box_centre(seconds)
        near = offset[(np.abs(offset) < max(actor.box_size)).all(1)]
        counts.append(int((np.abs(near @ pose[:3, :3]) <= np.array(actor.box_size) / 2).all(1).sum()))
    return counts
