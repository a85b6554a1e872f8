"""The raw nuScenes tables, reduced to the key frames of the lidar and the six cameras.

Format: nuScenes (Caesar et al., CVPR 2020), tables of version 1.0. Every table is read once; records of sweeps and of
other sensors are dropped while their file is parsed, so that the full data set fits into a few gigabytes and neither
maps nor sensor files are needed to read it.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mmdet3d.datasets.infos import DataError

LIDAR = "LIDAR_TOP"
CAMERA_ORDER = (
    "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT",
)
"""Order of the cameras in info files, which is not the order of the camera axis of the model."""
CHANNELS = (LIDAR, *CAMERA_ORDER)

_FIELDS = {
    "scene": ("token", "name"),
    "sample": ("token", "timestamp", "prev", "scene_token"),
    "sensor": ("token", "channel"),
    "calibrated_sensor": ("token", "sensor_token", "translation", "rotation", "camera_intrinsic"),
    "sample_data": ("token", "sample_token", "ego_pose_token", "calibrated_sensor_token", "timestamp", "filename",
                    "is_key_frame"),
    "ego_pose": ("token", "translation", "rotation"),
    "category": ("token", "name"),
    "instance": ("token", "category_token"),
    "sample_annotation": ("token", "sample_token", "instance_token", "translation", "size", "rotation", "prev", "next",
                          "num_lidar_pts", "num_radar_pts"),
}
_OPTIONAL_FIELDS = {"lidarseg": ("sample_data_token", "filename")}

Progress = Callable[..., Iterable]
"""Called as ``progress(items, desc=..., unit=...)``; yields the items, as ``tqdm`` does."""


def no_progress(items: Iterable, **_: object) -> Iterable:
    """A :data:`Progress` that shows nothing."""
    return items


@dataclass(frozen=True)
class NuScenesTables:
    """What info files are made of. Records are the dicts of the JSON files with the fields that are needed.

    Attributes:
        scenes: Name by scene token, in table order.
        samples: Samples by token, in table order.
        key_frames: Key frame record (``sample_data``) by sample token and channel, of :data:`CHANNELS` only.
        calibrated_sensors: Calibrations of these channels by token.
        ego_poses: Ego poses of these key frames by token.
        annotations: Annotations by token, in table order.
        sample_annotations: Annotations by sample token, in table order; samples without any are absent.
        categories: Category name by instance token.
        lidarseg: File name by ``sample_data`` token; None without that table.
    """

    scenes: Mapping[str, str]
    samples: Mapping[str, dict]
    key_frames: Mapping[str, dict[str, dict]]
    calibrated_sensors: Mapping[str, dict]
    ego_poses: Mapping[str, dict]
    annotations: Mapping[str, dict]
    sample_annotations: Mapping[str, list[dict]]
    categories: Mapping[str, str]
    lidarseg: Mapping[str, str] | None


def read_tables(folder: Path, progress: Progress = no_progress) -> NuScenesTables:
    """Read ``<root>/<version>``.

    Args:
        folder: Folder of the JSON files.
        progress: Shows the progress over the tables.

    Raises:
        DataError: the folder or tables are missing (the message lists which are there), a file is damaged, a record
            lacks a field, or a token refers to nothing.
    """
    _check_folder(folder)
    names = [*_FIELDS, *(name for name in _OPTIONAL_FIELDS if (folder / f"{name}.json").is_file())]
    raw: dict[str, dict[str, dict]] = {}
    for name in progress(names, desc="tables", unit="table"):
        raw[name] = _by_token(_read_table(folder / f"{name}.json", name, _keep(name, raw)), name, folder)
    key_frames: dict[str, dict[str, dict]] = {token: {} for token in raw["sample"]}
    for record in raw["sample_data"].values():
        calibration = raw["calibrated_sensor"][record["calibrated_sensor_token"]]
        channel = raw["sensor"][calibration["sensor_token"]]["channel"]
        _find(key_frames, record["sample_token"], "sample_data", record, "sample")[channel] = record
    sample_annotations: dict[str, list[dict]] = {}
    for record in raw["sample_annotation"].values():
        sample_annotations.setdefault(record["sample_token"], []).append(record)
    tables = NuScenesTables(
        scenes={token: _safe_name(record["name"]) for token, record in raw["scene"].items()},
        samples=raw["sample"], key_frames=key_frames, calibrated_sensors=raw["calibrated_sensor"],
        ego_poses=raw["ego_pose"], annotations=raw["sample_annotation"], sample_annotations=sample_annotations,
        categories={token: _find(raw["category"], record["category_token"], "instance", record, "category")["name"]
                    for token, record in raw["instance"].items()},
        lidarseg={token: safe_file(record["filename"]) for token, record in raw["lidarseg"].items()}
        if "lidarseg" in raw else None)
    _check_references(tables)
    return tables


def safe_file(name: str) -> str:
    """``name`` if it is a file below the root.

    Raises:
        DataError: it is absolute or leads out of the root.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
        raise DataError(f"the tables name the file {name!r}, which is not below the root")
    return name


def _safe_name(name: str) -> str:
    if not re.fullmatch(r"[\w.\-]+", name) or set(name) == {"."}:
        raise DataError(f"the scene name {name!r} of the tables cannot be used as a folder name")
    return name


def _check_folder(folder: Path) -> None:
    root = folder.parent
    if not root.is_dir():
        raise DataError(f"root folder not found: {root}")
    if not folder.is_dir():
        versions = sorted(path.parent.name for path in root.glob("*/scene.json"))
        raise DataError(f"{folder} not found: unpack the nuScenes metadata into {root}; versions there: "
                        f"{', '.join(versions) or 'none'}")
    missing = [f"{name}.json" for name in _FIELDS if not (folder / f"{name}.json").is_file()]
    if missing:
        found = sorted(path.name for path in folder.glob("*.json"))
        raise DataError(f"{folder}: tables missing: {', '.join(missing)}; found: {', '.join(found) or 'none'}. They "
                        "are part of the nuScenes metadata archive")


def _keep(name: str, raw: Mapping[str, Mapping[str, dict]]) -> Callable[[dict], bool] | None:
    """Which records of a table are needed, given the tables before it in ``_FIELDS``."""
    if name == "sample_data":
        sensors = {token for token, record in raw["sensor"].items() if record["channel"] in CHANNELS}
        wanted = {token for token, record in raw["calibrated_sensor"].items() if record["sensor_token"] in sensors}
        known = raw["calibrated_sensor"].keys()
        return lambda record: record["is_key_frame"] and _is_wanted(record, wanted, known)
    if name == "ego_pose":
        poses = {record["ego_pose_token"] for record in raw["sample_data"].values()}
        return lambda record: record["token"] in poses
    return None


def _is_wanted(record: dict, wanted: Collection[str], known: Collection[str]) -> bool:
    token = record["calibrated_sensor_token"]
    if token not in known:
        raise _dangling("sample_data", record, "calibrated_sensor", token)
    return token in wanted


def _read_table(path: Path, name: str, keep: Callable[[dict], bool] | None) -> list[dict]:
    fields = {**_FIELDS, **_OPTIONAL_FIELDS}[name]

    def reduce(record: dict) -> dict | None:
        try:
            return {field: record[field] for field in fields} if keep is None or keep(record) else None
        except KeyError as error:
            raise DataError(f"{path}: a record lacks {error}; it has {sorted(record)}") from None

    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=reduce)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path} is truncated or not JSON: {error}") from None
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of records, found {type(content).__name__}")
    return [record for record in content if record is not None]


def _by_token(records: list[dict], name: str, folder: Path) -> dict[str, dict]:
    key = "sample_data_token" if name == "lidarseg" else "token"
    table = {record[key]: record for record in records}
    if len(table) != len(records):
        raise DataError(f"{folder / name}.json: {len(records) - len(table)} tokens occur more than once")
    return table


def _dangling(table: str, record: Mapping, other: str, token: str) -> DataError:
    return DataError(f"{table}.json: record {record.get('token')!r} refers to {token!r}, which {other}.json lacks: the "
                     "tables do not belong together or are incomplete")


def _find(target: Mapping, token: str, table: str, record: Mapping, other: str):
    if token not in target:
        raise _dangling(table, record, other, token)
    return target[token]


def _check_references(tables: NuScenesTables) -> None:
    for sample in tables.samples.values():
        _find(tables.scenes, sample["scene_token"], "sample", sample, "scene")
    for frames in tables.key_frames.values():
        for record in frames.values():
            safe_file(record["filename"])
            _find(tables.ego_poses, record["ego_pose_token"], "sample_data", record, "ego_pose")
    for record in tables.annotations.values():
        _find(tables.samples, record["sample_token"], "sample_annotation", record, "sample")
        _find(tables.categories, record["instance_token"], "sample_annotation", record, "instance")
        for neighbour in (record["prev"], record["next"]):
            if neighbour:
                _find(tables.annotations, neighbour, "sample_annotation", record, "sample_annotation")
