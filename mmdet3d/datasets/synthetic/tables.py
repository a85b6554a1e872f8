"""The nuScenes tables of a synthetic data set, its maps and its CAN bus poses.

Format: nuScenes (Caesar et al., CVPR 2020), tables of version 1.0; the official nuscenes-devkit loads them.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from mmdet3d.utils.files import atomic_write

from .materials import Material
from .objects import CATEGORIES, Actor
from .rig import LIDAR, Sensor, yaw_quaternion
from .scene import INTERVAL, Scene, WorldSettings, build_scene, make_token
from .world import CELL

ANNOTATION_RANGE = 60.0
"""Metres around the ego vehicle within which objects have an annotated box."""
_MAP_PIXEL = 0.1  # metres; the devkit expects this
_CAN_INTERVAL = 20_000  # microseconds
_VISIBILITY = (("1", "v0-40", 0.0, 0.4), ("2", "v40-60", 0.4, 0.6), ("3", "v60-80", 0.6, 0.8),
               ("4", "v80-100", 0.8, 1.0))
_ATTRIBUTES = ("vehicle.moving", "vehicle.stopped", "vehicle.parked", "cycle.with_rider", "cycle.without_rider",
               "pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down")
_TABLES = ("category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log",
           "scene", "sample", "sample_data", "sample_annotation", "map")

Table = list[dict]


def log_name(scene: Scene) -> str:
    """Name of the drive that a scene belongs to; each scene has a drive, and a vehicle, of its own."""
    return f"synthetic-{scene.settings.seed}-{scene.name.removeprefix('scene-')}"


def sample_file(scene: Scene, frame: int, channel: str) -> str:
    """File of a sensor at a key frame, relative to the root of the data set."""
    suffix = "pcd.bin" if channel == LIDAR else "jpg"
    time = scene.timestamp(frame, scene.rig[channel].delay)
    return f"samples/{channel}/{log_name(scene)}__{channel}__{time}.{suffix}"


def write_tables(folder: Path, settings: WorldSettings, records: list[list[dict]]) -> None:
    """Write all tables, maps and CAN bus files; the tables come last.

    Args:
        folder: Root of the data set.
        settings: What it is made of.
        records: Per scene and frame, ``num_lidar_pts``, ``pixels_seen`` and ``pixels_without_occlusion`` of each
            object.
    """
    tables: dict[str, Table] = {name: [] for name in _TABLES}
    _common_tables(tables)
    for index in range(len(settings.scenes)):
        scene = build_scene(settings, index)
        _log_and_map(folder, scene, tables)
        _sensors(scene, tables)
        _samples(scene, tables)
        _annotations(scene, records[index], tables)
        _write_json(folder / "can_bus" / f"{scene.name}_pose.json", _can_poses(scene))
    for name, table in tables.items():
        _write_json(folder / settings.version / f"{name}.json", table)


def _write_json(path: Path, content: list) -> None:
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def _common_tables(tables: dict[str, Table]) -> None:
    tables["category"] = [{"token": make_token("category", name), "name": name, "description": f"synthetic {kind}",
                           "index": number} for number, (kind, name) in enumerate(CATEGORIES.items(), 1)]
    tables["attribute"] = [{"token": make_token("attribute", name), "name": name, "description": name}
                           for name in _ATTRIBUTES]
    tables["visibility"] = [{"token": token, "level": level, "description":
                             f"visibility of whole object is between {100 * low:.0f} and {100 * high:.0f}%"}
                            for token, level, low, high in _VISIBILITY]


def _log_and_map(folder: Path, scene: Scene, tables: dict[str, Table]) -> None:
    token, filename = scene.token("log"), f"maps/{scene.token('map')}.png"
    tables["log"].append({"token": token, "logfile": log_name(scene), "vehicle": f"synthetic-{scene.index}",
                          "date_captured": "2020-09-13", "location": "synthetic"})
    tables["map"].append({"token": scene.token("map"), "log_tokens": [token], "category": "semantic_prior",
                          "filename": filename})
    buffer = io.BytesIO()
    Image.fromarray(_map_mask(scene)).save(buffer, "PNG")
    with atomic_write(folder / filename) as file:
        file.write(buffer.getvalue())


def _map_mask(scene: Scene) -> np.ndarray:
    """(rows, columns) uint8, 255 on streets and sidewalks; column 0 is x = 0, the last row y = 0."""
    ground = scene.world.grid[:, :, 0]
    fine = round(CELL / _MAP_PIXEL)
    known = np.isin(ground, (Material.ROAD, Material.SIDEWALK)).repeat(fine, 0).repeat(fine, 1)
    x, y = (round(low / _MAP_PIXEL) for low in scene.world.low[:2])
    mask = np.zeros((known.shape[0] + x, known.shape[1] + y), np.uint8)
    mask[x:, y:] = known * np.uint8(255)
    return np.ascontiguousarray(mask.T[::-1])


def _sensors(scene: Scene, tables: dict[str, Table]) -> None:
    for channel, sensor in scene.rig.items():
        token = make_token("sensor", channel)
        if all(record["token"] != token for record in tables["sensor"]):
            modality = "lidar" if channel == LIDAR else "camera"
            tables["sensor"].append({"token": token, "channel": channel, "modality": modality})
        intrinsic = [] if sensor.intrinsic is None else sensor.intrinsic.tolist()
        tables["calibrated_sensor"].append({
            "token": scene.token("calibration", channel), "sensor_token": token,
            "translation": list(sensor.translation), "rotation": list(sensor.rotation),
            "camera_intrinsic": intrinsic})


def _neighbours(scene: Scene, frame: int, *kind: str) -> dict[str, str]:
    """``prev`` and ``next`` of a chain over all key frames."""
    last = scene.settings.frames - 1
    return {"prev": scene.token(*kind, frame - 1) if frame > 0 else "",
            "next": scene.token(*kind, frame + 1) if frame < last else ""}


def _samples(scene: Scene, tables: dict[str, Table]) -> None:
    frames = scene.settings.frames
    tables["scene"].append({
        "token": scene.token("scene"), "log_token": scene.token("log"), "nbr_samples": frames,
        "first_sample_token": scene.token("sample", 0), "last_sample_token": scene.token("sample", frames - 1),
        "name": scene.name, "description": f"Synthetic street, {len(scene.actors)} objects"})
    for frame in range(frames):
        tables["sample"].append({
            "token": scene.token("sample", frame), "timestamp": scene.timestamp(frame),
            **_neighbours(scene, frame, "sample"), "scene_token": scene.token("scene")})
        for channel, sensor in scene.rig.items():
            _sample_data(scene, frame, channel, sensor, tables)


def _sample_data(scene: Scene, frame: int, channel: str, sensor: Sensor, tables: dict[str, Table]) -> None:
    token, time = scene.token("data", channel, frame), scene.timestamp(frame, sensor.delay)
    width, height = (0, 0) if channel == LIDAR else scene.settings.image_size
    tables["sample_data"].append({
        "token": token, "sample_token": scene.token("sample", frame), "ego_pose_token": token,
        "calibrated_sensor_token": scene.token("calibration", channel), "timestamp": time,
        "fileformat": "pcd" if channel == LIDAR else "jpg", "is_key_frame": True, "height": height, "width": width,
        "filename": sample_file(scene, frame, channel), **_neighbours(scene, frame, "data", channel)})
    tables["ego_pose"].append({"token": token, "timestamp": time,
                               **scene.ego_record(scene.seconds(frame, sensor.delay))})


def _annotations(scene: Scene, records: list[dict], tables: dict[str, Table]) -> None:
    for number, actor in enumerate(scene.actors):
        frames = [frame for frame in range(scene.settings.frames) if _annotated(scene, actor, frame)]
        if not frames:
            continue
        tokens = {frame: scene.token("annotation", number, frame) for frame in frames}
        tables["instance"].append({
            "token": scene.token("instance", number), "category_token": make_token("category", actor.category),
            "nbr_annotations": len(frames), "first_annotation_token": tokens[frames[0]],
            "last_annotation_token": tokens[frames[-1]]})
        for n, frame in enumerate(frames):
            neighbours = {"prev": tokens[frames[n - 1]] if n else "",
                          "next": tokens[frames[n + 1]] if n + 1 < len(frames) else ""}
            tables["sample_annotation"].append(
                {"token": tokens[frame], "sample_token": scene.token("sample", frame),
                 "instance_token": scene.token("instance", number),
                 **_annotation(scene, number, actor, frame, records[frame]), **neighbours})


def _annotated(scene: Scene, actor: Actor, frame: int) -> bool:
    seconds = scene.seconds(frame)
    place, ego = actor.track.pose(seconds), scene.ego.pose(seconds)
    return math.hypot(place[0] - ego[0], place[1] - ego[1]) < ANNOTATION_RANGE


def _annotation(scene: Scene, number: int, actor: Actor, frame: int, record: dict) -> dict:
    seconds = scene.seconds(frame)
    length, width, height = actor.box_size
    whole = record["pixels_without_occlusion"][number]
    part = record["pixels_seen"][number] / whole if whole else 0.0
    visibility = next(token for token, _, _, high in _VISIBILITY if part <= high)
    return {
        "visibility_token": visibility,
        "attribute_tokens": [make_token("attribute", actor.attribute)] if actor.attribute else [],
        "translation": list(actor.box_centre(seconds)), "size": [width, length, height],
        "rotation": list(yaw_quaternion(actor.track.pose(seconds)[2])),
        "num_lidar_pts": record["num_lidar_pts"][number], "num_radar_pts": 0}


def _can_poses(scene: Scene) -> list[dict]:
    """Messages of the CAN bus at 50 Hz, from 0.1 s before the first key frame to 0.1 s after the last."""
    step, messages = _CAN_INTERVAL / 1e6, []
    for time in range(-5 * _CAN_INTERVAL, (scene.settings.frames - 1) * INTERVAL + 6 * _CAN_INTERVAL, _CAN_INTERVAL):
        seconds = time / 1e6
        (x0, y0, yaw0), (x, y, yaw), (x1, y1, yaw1) = (scene.ego.pose(seconds + offset) for offset in (-step, 0, step))
        cos, sin = math.cos(yaw), math.sin(yaw)
        moved, bent = (x1 - x0, y1 - y0), (x1 - 2 * x + x0, y1 - 2 * y + y0)
        velocity, force = ([(cos * v[0] + sin * v[1]) / scale, (cos * v[1] - sin * v[0]) / scale]
                           for v, scale in ((moved, 2 * step), (bent, step * step)))
        messages.append({
            "accel": [*force, 9.81], "orientation": list(yaw_quaternion(yaw)), "pos": [x, y, 0.0],
            "rotation_rate": [0.0, 0.0, (yaw1 - yaw0) / (2 * step)], "utime": scene.timestamp(0) + time,
            "vel": [*velocity, 0.0]})
    return messages
