"""Info files from raw nuScenes tables: one record per key frame with poses, calibration, file names and boxes.

The records have the schema that the configs of the project and published info files share; docs/data.md describes
every key. Frames: LIDAR_TOP, the ego frame at the time of the lidar or of a camera, and the global frame; rotations
that end in ``_rotation`` are quaternions (w, x, y, z) except ``sensor2lidar_rotation``, which is a matrix.
"""

import os
import pickle
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from mmdet3d.datasets.converters.nuscenes_boxes import SampleBoxes
from mmdet3d.datasets.converters.nuscenes_can_bus import CanBus
from mmdet3d.datasets.converters.nuscenes_tables import (
    CAMERA_ORDER,
    LIDAR,
    NuScenesTables,
    Progress,
    no_progress,
)
from mmdet3d.datasets.geometry import rotation_matrix
from mmdet3d.datasets.infos import DataError
from mmdet3d.utils.files import atomic_write

SCHEMA_VERSION = 1
"""Version of the record layout, written to ``metadata['schema_version']``."""

VERSION_SPLITS = {
    "v1.0-trainval": {"train": "train", "val": "val"},
    "v1.0-mini": {"train": "mini_train", "val": "mini_val"},
    "v1.0-test": {"test": "test"},
}
"""Official split of scenes that each info file of a release holds."""

_PICKLE_PROTOCOL = 4  # the same bytes from every Python version


def scene_splits(version: str) -> dict[str, frozenset[str]]:
    """Scene names by split (``train`` and ``val``, or ``test``) of a release, from the nuScenes devkit.

    Raises:
        ValueError: the release is unknown.
    """
    if version not in VERSION_SPLITS:
        raise ValueError(f"version: expected one of {', '.join(VERSION_SPLITS)}, got {version!r}")
    from nuscenes.utils.splits import create_splits_scenes  # loads plotting libraries, which nothing else here needs

    official = create_splits_scenes()
    return {split: frozenset(official[name]) for split, name in VERSION_SPLITS[version].items()}


def path_prefix(root: str | os.PathLike) -> str:
    """How written paths start: ``./data/nuscenes`` for ``data/nuscenes``; an absolute root stays as it is."""
    text = str(root).replace(os.sep, "/")
    path = PurePosixPath(text)
    absolute = path.is_absolute() or os.path.isabs(root)
    return path.as_posix() if absolute or path.parts[:1] in ((), ("..",)) else f"./{path.as_posix()}"


def build_infos(tables: NuScenesTables, root: str | os.PathLike, splits: Mapping[str, Collection[str]], *,
                can_bus: CanBus | None = None, annotated: bool = True, leave_out: Collection[str] = (),
                progress: Progress = no_progress) -> dict[str, list[dict]]:
    """Make the records of all samples in one pass.

    Args:
        tables: The tables.
        root: Root of the data set as written paths start with it, see :func:`path_prefix`.
        splits: Scene names by split.
        can_bus: Vehicle states; None: zeros.
        annotated: Whether the release has annotations; without, the ``gt_*`` arrays are left out and ``ann_infos`` is
            empty.
        leave_out: Names of scenes to leave out as a whole, so that sequences stay unbroken.
        progress: Shows the progress over the samples.

    Returns:
        Records by split, in the order of the sample table.

    Raises:
        DataError: a scene belongs to no split, a sample lacks a key frame, or a category is unknown.
    """
    split_of = {name: split for split, names in splits.items() for name in names}
    if strangers := [name for name in tables.scenes.values() if name not in split_of]:
        raise DataError(f"{len(strangers)} scenes of the tables are in no official split of {' or '.join(splits)}: "
                        f"{', '.join(strangers[:5])}")
    can_bus = CanBus(None) if can_bus is None else can_bus
    infos: dict[str, list[dict]] = {split: [] for split in splits}
    prefix = path_prefix(root)
    for token, sample in progress(tables.samples.items(), desc="infos", unit="sample"):
        scene = tables.scenes[sample["scene_token"]]
        if scene not in leave_out:
            infos[split_of[scene]].append(
                make_info(tables, token, prefix, can_bus.vector(scene, sample["timestamp"]), annotated))
    return infos


def make_info(tables: NuScenesTables, token: str, prefix: str, can_bus: np.ndarray, annotated: bool = True) -> dict:
    """The record of one sample.

    Args:
        tables: The tables.
        token: The sample.
        prefix: What written paths start with.
        can_bus: (18,) vehicle state.
        annotated: Whether the release has annotations.

    Raises:
        DataError: the sample lacks a key frame of the lidar or of a camera, or a category is unknown.
    """
    sample, frames = tables.samples[token], tables.key_frames[token]
    if missing := [channel for channel in (LIDAR, *CAMERA_ORDER) if channel not in frames]:
        raise DataError(f"sample {token}: no key frame of {', '.join(missing)} in sample_data.json")
    lidar = frames[LIDAR]
    info = {
        "lidar_path": f"{prefix}/{lidar['filename']}",
        "token": token,
        "can_bus": can_bus,
        "sweeps": [],
        "cams": {},
        **_pose("lidar2ego", tables.calibrated_sensors[lidar["calibrated_sensor_token"]]),
        **_pose("ego2global", tables.ego_poses[lidar["ego_pose_token"]]),
        "timestamp": sample["timestamp"],
    }
    for name in CAMERA_ORDER:
        info["cams"][name] = _camera(tables, name, frames[name], prefix, info)
    boxes = SampleBoxes(tables, token)
    if annotated:
        info.update(boxes.lidar_arrays(info))
    if tables.lidarseg is not None and lidar["token"] in tables.lidarseg:
        info["pts_semantic_mask_path"] = f"{prefix}/{tables.lidarseg[lidar['token']]}"
    front = info["cams"]["CAM_FRONT"]
    info["ann_infos"] = boxes.detection_boxes(front["ego2global_rotation"], front["ego2global_translation"])
    info["scene_token"] = sample["scene_token"]
    info["prev"] = sample["prev"]
    info["occ_path"] = f"{prefix}/gts/{tables.scenes[sample['scene_token']]}/{token}"
    return info


def _pose(name: str, record: Mapping) -> dict[str, list[float]]:
    return {f"{name}_translation": record["translation"], f"{name}_rotation": record["rotation"]}


def _camera(tables: NuScenesTables, name: str, frame: Mapping, prefix: str, info: Mapping) -> dict:
    calibration = tables.calibrated_sensors[frame["calibrated_sensor_token"]]
    camera = {
        "data_path": f"{prefix}/{frame['filename']}",
        "type": name,
        "sample_data_token": frame["token"],
        **_pose("sensor2ego", calibration),
        **_pose("ego2global", tables.ego_poses[frame["ego_pose_token"]]),
        "timestamp": frame["timestamp"],
    }
    rotation, translation = sensor_to_lidar(camera, info)
    intrinsic = np.array(calibration["camera_intrinsic"], np.float64)
    if intrinsic.shape != (3, 3):
        raise DataError(f"calibrated_sensor.json: {calibration['token']} of {name}: camera_intrinsic is not a 3x3 "
                        f"matrix but has shape {intrinsic.shape}")
    return {**camera, "sensor2lidar_rotation": rotation, "sensor2lidar_translation": translation,
            "cam_intrinsic": intrinsic}


def sensor_to_lidar(camera: Mapping, info: Mapping) -> tuple[np.ndarray, np.ndarray]:
    """Pose of a camera in the LIDAR_TOP frame of the key frame, through the global frame and both ego poses.

    Args:
        camera: ``sensor2ego_*`` and ``ego2global_*`` of the camera's own time.
        info: ``lidar2ego_*`` and ``ego2global_*`` of the lidar's time.

    Returns:
        Rotation matrix (3, 3) and translation (3,) in metres, float64, for column points.
    """
    sensor, ego = rotation_matrix(camera["sensor2ego_rotation"]), rotation_matrix(camera["ego2global_rotation"])
    lidar_inverse = np.linalg.inv(rotation_matrix(info["lidar2ego_rotation"])).T
    to_lidar = np.linalg.inv(rotation_matrix(info["ego2global_rotation"])).T @ lidar_inverse
    translation = (np.array(camera["sensor2ego_translation"]) @ ego.T + camera["ego2global_translation"]) @ to_lidar
    translation -= np.array(info["ego2global_translation"]) @ to_lidar + info["lidar2ego_translation"] @ lidar_inverse
    return ((sensor.T @ ego.T) @ to_lidar).T, translation


def write_infos(path: str | os.PathLike, infos: Sequence[Mapping], version: str) -> None:
    """Write an info file: it appears as a whole or not at all.

    Args:
        path: The pickle; missing folders are made.
        infos: Records.
        version: Release of nuScenes.
    """
    content = {"infos": list(infos), "metadata": {"version": version, "schema_version": SCHEMA_VERSION}}
    with atomic_write(path) as file:
        pickle.dump(content, file, protocol=_PICKLE_PROTOCOL)
