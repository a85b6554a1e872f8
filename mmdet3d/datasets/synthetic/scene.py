"""A whole scene from a seed: street, still world, objects, ego path, sensors and times."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace

import numpy as np

from mmdet3d.datasets.geometry import pose_matrix

from .objects import Actor
from .rig import Sensor, make_rig, yaw_quaternion
from .road import Road, Track
from .traffic import WORK_ZONE, Traffic
from .world import StaticWorld, build_world, world_rim

INTERVAL = 500_000
"""Microseconds between key frames."""
_FIRST_TIME = 1_600_000_000_000_000  # microseconds
_SCENE_SPACING = 1_000_000_000


@dataclass(frozen=True)
class WorldSettings:
    """What a data set is made of.

    Attributes:
        scenes: Names of the scenes; each gets a street of its own.
        frames: Key frames per scene, half a second apart.
        image_size: (width, height) of the images in pixels.
        seed: Everything follows from it.
        version: Version of the nuScenes tables.
    """

    scenes: tuple[str, ...]
    frames: int = 8
    image_size: tuple[int, int] = (800, 450)
    seed: int = 0
    version: str = "v1.0-mini"


@dataclass(frozen=True)
class Scene:
    """One scene. Times are in seconds from its first key frame.

    Attributes:
        name: Its name.
        index: Its number in the data set.
        settings: Those of the data set.
        road: The street.
        world: What stands still.
        actors: What has an annotated box.
        ego: Path of the ego vehicle's rear axle.
        rig: Sensors by channel.
    """

    name: str
    index: int
    settings: WorldSettings
    road: Road
    world: StaticWorld
    actors: tuple[Actor, ...]
    ego: Track
    rig: dict[str, Sensor]

    def timestamp(self, frame: int, delay: int = 0) -> int:
        """Microseconds of a key frame, ``delay`` after its lidar."""
        return _FIRST_TIME + self.index * _SCENE_SPACING + frame * INTERVAL + delay

    def seconds(self, frame: int, delay: int = 0) -> float:
        """Time of a key frame, ``delay`` microseconds after its lidar."""
        return (frame * INTERVAL + delay) / 1e6

    def ego_record(self, seconds: float) -> dict:
        """``rotation`` and ``translation`` of the ego vehicle, as in the nuScenes tables."""
        x, y, yaw = self.ego.pose(seconds)
        return {"rotation": list(yaw_quaternion(yaw)), "translation": [x, y, 0.0]}

    def ego_pose(self, seconds: float) -> np.ndarray:
        """(4, 4) ego to global, exactly of :meth:`ego_record`."""
        return pose_matrix(**self.ego_record(seconds))

    def actor_pose(self, actor: Actor, seconds: float) -> np.ndarray:
        """(4, 4) object to global; the origin is the middle of the box's lower face."""
        x, y, yaw = actor.track.pose(seconds)
        return pose_matrix(yaw_quaternion(yaw), (x, y, actor.base))

    def token(self, *parts: object) -> str:
        """32 hexadecimal digits that name a record of this scene."""
        return make_token(self.settings.seed, self.name, *parts)


def make_token(*parts: object) -> str:
    """32 hexadecimal digits made of the text of ``parts``."""
    return hashlib.md5("/".join(map(str, parts)).encode(), usedforsecurity=False).hexdigest()


def build_scene(settings: WorldSettings, index: int) -> Scene:
    """Scene number ``index`` of a data set. The same settings always give the same scene."""
    rng = np.random.default_rng([settings.seed, index])
    duration = (settings.frames - 1) * INTERVAL / 1e6
    speed = float(rng.uniform(4.5, 8.5))
    length = speed * duration
    middle = length / 2
    lanes = int(rng.integers(1, 3))
    median = float(rng.choice((0.0, 2.0))) if index % 2 else 2.4
    curvature = float(rng.choice((-1, 0, 1))) / float(rng.uniform(140, 260))
    # The bend must not turn by more than about 150 degrees, or the street would run into itself.
    curvature = math.copysign(min(abs(curvature), 2.6 / (length + 150)), curvature)
    ahead, behind = middle + float(rng.uniform(36, 44)), middle - float(rng.uniform(32, 45))
    crossings = (*np.arange(behind, -80, -95).tolist()[::-1], *np.arange(ahead, length + 80, 95).tolist())
    road = Road((0.0, 0.0), float(rng.uniform(0, 2 * math.pi)), curvature, lanes, median, float(rng.uniform(3.0, 4.0)),
                crossings)
    # Maps have no negative coordinates.
    corner = world_rim(road, length).min(0)
    road = replace(road, origin=(20.0 - float(corner[0]), 20.0 - float(corner[1])))
    ego_lane = int(rng.integers(lanes))
    ego = Track(road, 0.0, -road.lane_middle(ego_lane), speed, weave=float(rng.uniform(0.05, 0.25)))
    actors = Traffic(road, ego, duration, rng).fill()
    world = build_world(road, length, (middle + WORK_ZONE[0], middle + WORK_ZONE[1]), rng)
    return Scene(settings.scenes[index], index, settings, road, world, tuple(actors), ego,
                 make_rig(settings.image_size, rng))
