"""Tables, empty sensor files and CAN bus of a tiny nuScenes download: two scenes of three samples, all poses tilted."""

import json
from pathlib import Path

import numpy as np

SCENES = {"scene-0061": "train", "scene-0103": "val"}
CAMERAS = ("CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT", "CAM_FRONT", "CAM_FRONT_LEFT", "CAM_FRONT_RIGHT")
CHANNELS = ("RADAR_FRONT", *CAMERAS, "LIDAR_TOP")
FRAMES = 3
CATEGORIES = ("vehicle.car", "human.pedestrian.adult", "vehicle.bus.rigid", "animal", "movable_object.trafficcone",
              "static_object.bicycle_rack")
START = {"scene-0061": 2_000_000_000, "scene-0103": 1_000_000_000}
PAUSE = {"scene-0061": 3_000_000, "scene-0103": 1_200_000}


def quaternion(rng: np.random.Generator) -> list[float]:
    q = rng.normal(size=4)
    return (q / np.linalg.norm(q)).tolist()


def time_of(scene: str, frame: int) -> int:
    """The last gap is too long for a one-sided velocity, in the first scene also for a centred one."""
    return START[scene] + 500_000 * frame + (PAUSE[scene] if frame == 2 else 0)


def make_tables() -> dict[str, list[dict]]:
    """All thirteen tables; the sample table is in another order than time."""
    rng = np.random.default_rng(3)
    tables: dict[str, list[dict]] = {name: [] for name in (
        "category", "attribute", "visibility", "instance", "sensor", "calibrated_sensor", "ego_pose", "log", "scene",
        "sample", "sample_data", "sample_annotation", "map")}
    tables["category"] = [{"token": f"cat-{name}", "name": name, "description": ""} for name in CATEGORIES]
    tables["visibility"] = [{"token": "4", "level": "v80-100", "description": ""}]
    tables["sensor"] = [{"token": f"sensor-{channel}", "channel": channel, "modality": channel[:5].lower()}
                        for channel in CHANNELS]
    for scene in SCENES:
        _add_scene(tables, scene, rng)
    tables["map"] = [{"token": "map", "log_tokens": [log["token"] for log in tables["log"]], "filename": "maps/m.png",
                      "category": "semantic_prior"}]
    tables["sample"] = [tables["sample"][i] for i in (4, 2, 0, 5, 1, 3)]
    return tables


def _add_scene(tables, scene, rng):
    tables["log"].append({"token": f"log-{scene}", "logfile": scene, "vehicle": "v", "date_captured": "2020-01-01",
                          "location": "here"})
    tables["scene"].append({"token": f"{scene}-token", "log_token": f"log-{scene}", "nbr_samples": FRAMES,
                            "first_sample_token": f"{scene}-0", "last_sample_token": f"{scene}-{FRAMES - 1}",
                            "name": scene, "description": ""})
    for channel in CHANNELS:
        camera = [[1266.4 + rng.random(), 0, 816.2], [0, 1267.0, 491.5], [0, 0, 1]] if channel in CAMERAS else []
        tables["calibrated_sensor"].append({
            "token": f"{scene}-cs-{channel}", "sensor_token": f"sensor-{channel}",
            "translation": rng.normal(size=3).tolist(), "rotation": quaternion(rng), "camera_intrinsic": camera})
    for frame in range(FRAMES):
        tables["sample"].append({
            "token": f"{scene}-{frame}", "timestamp": time_of(scene, frame), "scene_token": f"{scene}-token",
            "prev": f"{scene}-{frame - 1}" if frame else "",
            "next": f"{scene}-{frame + 1}" if frame + 1 < FRAMES else ""})
        for offset, channel in enumerate(CHANNELS):
            for key in (True, False):
                _add_file(tables, scene, frame, channel, key, time_of(scene, frame) - 7000 * offset + 20_000 * key, rng)
    _add_objects(tables, scene, rng)


def _add_file(tables, scene, frame, channel, key, time, rng):
    token = f"{scene}-{frame}-{channel}-{'key' if key else 'sweep'}"
    suffix = "jpg" if channel in CAMERAS else "pcd.bin"
    tables["ego_pose"].append({"token": f"pose-{token}", "timestamp": time, "rotation": quaternion(rng),
                               "translation": (500 * rng.random(3)).tolist()})
    tables["sample_data"].append({
        "token": token, "sample_token": f"{scene}-{frame}", "ego_pose_token": f"pose-{token}", "timestamp": time,
        "calibrated_sensor_token": f"{scene}-cs-{channel}", "fileformat": suffix, "is_key_frame": key, "height": 900,
        "width": 1600, "filename": f"{'samples' if key else 'sweeps'}/{channel}/{token}.{suffix}", "prev": "",
        "next": ""})


def _add_objects(tables, scene, rng):
    """One object per category: seen in frames 0, 1 and 2, but the bus in frame 0 only; the cone without points."""
    for category in CATEGORIES:
        name = f"{scene}-{category}"
        frames = [0] if category == "vehicle.bus.rigid" else list(range(FRAMES))
        tables["instance"].append({"token": f"instance-{name}", "category_token": f"cat-{category}",
                                   "nbr_annotations": len(frames), "first_annotation_token": f"{name}-{frames[0]}",
                                   "last_annotation_token": f"{name}-{frames[-1]}"})
        for frame in frames:
            tables["sample_annotation"].append({
                "token": f"{name}-{frame}", "sample_token": f"{scene}-{frame}", "instance_token": f"instance-{name}",
                "visibility_token": "4", "attribute_tokens": [], "translation": (400 * rng.random(3)).tolist(),
                "size": rng.uniform(1, 9, 3).tolist(), "rotation": quaternion(rng),
                "prev": f"{name}-{frame - 1}" if frame - 1 in frames else "",
                "next": f"{name}-{frame + 1}" if frame + 1 in frames else "",
                "num_lidar_pts": 0 if category.endswith("cone") or frame == 1 else 5,
                "num_radar_pts": 0 if category.endswith("cone") else frame})


def can_messages(scene: str) -> list[dict]:
    rng = np.random.default_rng(8)
    times = range(START[scene] - 10_000, START[scene] + 1_000_000, 20_000)
    return [{"accel": rng.normal(size=3).tolist(), "orientation": quaternion(rng), "pos": rng.normal(size=3).tolist(),
             "rotation_rate": rng.normal(size=3).tolist(), "utime": time, "vel": rng.normal(size=3).tolist()}
            for time in times]


def write_download(root: Path, tables: dict[str, list[dict]], version: str = "v1.0-mini", can_bus: bool = True) -> None:
    """Tables, empty key frame files, a map and the CAN bus of the second scene."""
    write_json_tables(root, tables, version)
    for record in tables["sample_data"]:
        if record["is_key_frame"]:
            path = root / record["filename"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    (root / "maps").mkdir()
    (root / "maps/m.png").touch()
    if can_bus:
        (root / "can_bus").mkdir()
        (root / "can_bus/scene-0103_pose.json").write_text(json.dumps(can_messages("scene-0103")))


def write_json_tables(root: Path, tables: dict[str, list[dict]], version: str) -> None:
    (root / version).mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        (root / version / f"{name}.json").write_text(json.dumps(table))
