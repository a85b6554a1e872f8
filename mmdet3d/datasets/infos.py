"""Info files: the key frames of a data set with poses, calibration and file names, and what follows from their order.

An info file is a pickle of ``{"infos": [...], "metadata": {...}}`` with one dict per key frame, as mmdet3d-style data
preparation writes it. It is read by an unpickler that knows containers and NumPy arrays only, so a file from a
stranger cannot run code. Nothing here changes the records it is given.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmdet3d.datasets.geometry import ego_to_global, lidar_to_ego, rotation_matrix
from mmdet3d.utils.safe_pickle import ForbiddenGlobal, load_plain

REQUIRED_KEYS = (
    "token", "timestamp", "scene_token", "prev", "occ_path", "cams", "can_bus", "lidar2ego_translation",
    "lidar2ego_rotation", "ego2global_translation", "ego2global_rotation",
)
REQUIRED_CAMERA_KEYS = (
    "data_path", "cam_intrinsic", "sensor2ego_translation", "sensor2ego_rotation", "ego2global_translation",
    "ego2global_rotation",
)


class DataError(ValueError):
    """A data file is missing, damaged or not what it should be; the message names the file and what is wrong."""


def _unpickle(path: Path) -> object:
    try:
        with open(path, "rb") as file:
            return load_plain(file)
    except FileNotFoundError:
        raise DataError(f"info file not found: {path}") from None
    except OSError as error:
        raise DataError(f"info file {path} cannot be read: {error.strerror or error}") from error
    except ForbiddenGlobal as error:
        raise DataError(f"info file {path} refers to {error}, which could run code; an info file holds only "
                        "containers, numbers, strings and NumPy arrays") from None
    except Exception as error:  # damaged bytes make the pickle machine fail in nearly any way
        raise DataError(f"info file {path} is truncated or not a pickle "
                        f"({type(error).__name__}: {error})") from None


def _check_info(info: object, place: str) -> None:
    if not isinstance(info, Mapping):
        raise DataError(f"{place}: expected a dict, found {type(info).__name__}")
    if missing := [key for key in REQUIRED_KEYS if key not in info]:
        raise DataError(f"{place}: keys {missing} are missing; found {sorted(map(str, info))}")
    if not isinstance(info["cams"], Mapping):
        raise DataError(f"{place}: cams: expected a dict by camera name, found {type(info['cams']).__name__}")
    for name, camera in info["cams"].items():
        if missing := [key for key in REQUIRED_CAMERA_KEYS if key not in camera]:
            raise DataError(f"{place}: cams[{name!r}]: keys {missing} are missing; found {sorted(map(str, camera))}")
    if np.shape(info["can_bus"]) != (18,):
        raise DataError(f"{place}: can_bus: expected 18 numbers, found shape {np.shape(info['can_bus'])}")


def load_infos(path: str | os.PathLike, load_interval: int = 1) -> list[dict]:
    """Read an info file.

    Args:
        path: The pickle.
        load_interval: Keep every ``load_interval``-th record of the sorted list.

    Returns:
        The records, sorted by ``timestamp`` (stable). Their position in this list is the sample index everywhere.

    Raises:
        DataError: the file is missing, truncated, no pickle, refers to a global that an info file does not need, has
            no ``infos`` list, or a record lacks a key.
    """
    path = Path(path)
    content = _unpickle(path)
    infos = content.get("infos") if isinstance(content, Mapping) else None
    if not isinstance(infos, list):
        found = f"a dict with {sorted(map(str, content))}" if isinstance(content, Mapping) else type(content).__name__
        raise DataError(f"info file {path}: expected a dict with a list under 'infos', found {found}")
    if not infos:
        raise DataError(f"info file {path}: 'infos' is empty")
    for position, info in enumerate(infos):
        _check_info(info, f"info file {path}: infos[{position}]")
    return sorted(infos, key=lambda info: info["timestamp"])[::load_interval]


def resolve_path(path: str | os.PathLike, info_file: str | os.PathLike | None = None) -> Path:
    """The existing file or folder that ``path`` of an info record means.

    A relative path is looked up below the working directory, then below the folder of the info file.

    Raises:
        DataError: it is at neither place; the message lists both.
    """
    candidates = [Path(path)]
    if info_file is not None and not candidates[0].is_absolute():
        candidates.append(Path(info_file).parent / path)
    for candidate in candidates:
        if candidate.exists():
            return candidate
    tried = " or ".join(str(candidate.absolute()) for candidate in candidates)
    raise DataError(f"file not found: {path}; looked for {tried}")


def scene_name(info: Mapping) -> str:
    """Name of the scene: the second-to-last component of ``occ_path``.

    Raises:
        DataError: ``occ_path`` has fewer than two components.
    """
    parts = str(info["occ_path"]).replace("\\", "/").split("/")
    if len(parts) < 2:
        raise DataError(f"sample {info['token']}: occ_path {info['occ_path']!r} does not end in <scene>/<token>")
    return parts[-2]


def sequence_flags(infos: Sequence[Mapping], split: int | str = 1) -> np.ndarray:
    """Sequence id of every sample.

    A new sequence starts where ``prev`` is empty.

    Args:
        infos: Records in order.
        split: Cut every sequence into this many pieces with ids of their own; ``"all"``: each sample its own.

    Returns:
        (N,) int64, starting at 0, never decreasing.

    Raises:
        ValueError: ``split`` is neither a positive number nor ``"all"``, or a sequence is too short to be cut into
            that many pieces.
    """
    if split == "all":
        return np.arange(len(infos), dtype=np.int64)
    if not isinstance(split, int) or split < 1:
        raise ValueError(f"sequences_split_num: expected a positive whole number or 'all', got {split!r}")
    starts = np.array([i > 0 and info["prev"] == "" for i, info in enumerate(infos)])
    flags = np.cumsum(starts, dtype=np.int64)
    if split == 1:
        return flags
    pieces = []
    for group, length in enumerate(np.bincount(flags)):
        size = math.ceil(length / split)
        edges = list(range(0, length, size))
        if len(edges) != split:
            raise ValueError(f"sequences_split_num={split}: sequence {group} of {length} frames gives {len(edges)} "
                             f"pieces of {size} frames")
        pieces += [min(size, length - edge) for edge in edges]
    return np.repeat(np.arange(len(pieces), dtype=np.int64), pieces)


def is_start_of_sequence(flags: np.ndarray, index: int) -> bool:
    """Whether sample ``index`` is the first of its sequence."""
    return index == 0 or bool(flags[index - 1] != flags[index])


def adjacent_offsets(multi_adj_frame_id_cfg: Sequence[int], stereo: bool) -> tuple[int, ...]:
    """How many frames back the adjacent frames of a sample lie.

    Args:
        multi_adj_frame_id_cfg: (start, stop, step) of a range.
        stereo: Add ``stop``, for the stereo depth of the oldest frame.

    Raises:
        ValueError: with ``stereo`` the range must start at 1 and have step 1.
    """
    start, stop, step = multi_adj_frame_id_cfg
    offsets = tuple(range(start, stop, step))
    if not stereo:
        return offsets
    if (start, step) != (1, 1):
        raise ValueError("multi_adj_frame_id_cfg: stereo needs a range that starts at 1 with step 1, got "
                         f"{tuple(multi_adj_frame_id_cfg)}")
    return (*offsets, stop)


def adjacent_indices(infos: Sequence[Mapping], index: int, offsets: Sequence[int]) -> tuple[int, ...]:
    """Index of each adjacent frame; ``index`` itself where the frame that far back belongs to another scene.

    Positions before the first record count as the first record, and sequences cut by :func:`sequence_flags` as whole.
    """
    scene = infos[index]["scene_token"]
    earlier = [max(index - offset, 0) for offset in offsets]
    return tuple(j if infos[j]["scene_token"] == scene else index for j in earlier)


def relative_poses(infos: Sequence[Mapping], index: int, start_of_sequence: bool) -> dict[str, np.ndarray]:
    """Motion from a sample to the one before it.

    Returns:
        ``curr_to_prev_ego_rt``, ``curr_to_prev_lidar_rt``, ``prev_lidar_to_global_rt`` and
        ``global_to_curr_lidar_rt``: (4, 4) float32, computed in float64. At a start of sequence "previous" is the
        sample itself; the ego matrix is then the numerical product of inverse and matrix.
    """
    previous = index if start_of_sequence else index - 1
    ego, prev_ego = ego_to_global(infos[index]), ego_to_global(infos[previous])
    lidar = ego @ lidar_to_ego(infos[index])
    prev_lidar = prev_ego @ lidar_to_ego(infos[previous])
    poses = {
        "curr_to_prev_ego_rt": np.linalg.inv(prev_ego) @ ego,
        "curr_to_prev_lidar_rt": np.eye(4) if start_of_sequence else np.linalg.inv(prev_lidar) @ lidar,
        "prev_lidar_to_global_rt": prev_lidar,
        "global_to_curr_lidar_rt": np.linalg.inv(lidar),
    }
    return {name: pose.astype(np.float32) for name, pose in poses.items()}


def effective_can_bus(info: Mapping, *, legacy_rotation: bool = True) -> np.ndarray:
    """(18,) float64 CAN bus vector with the ego pose filled in; the record's own vector stays as it is.

    Entries 0..2 become the global position in metres, 3..6 the rotation, 16 and 17 the heading in radians and in
    degrees, both in one turn from 0; 7..15 (acceleration, rotation rate, velocity) stay.

    Args:
        info: Info record.
        legacy_rotation: Write the scalar part w of the quaternion into all of 3..6, as the data that the released
            weights were trained with has it; otherwise (w, x, y, z).
    """
    can_bus = np.array(info["can_bus"], np.float64)
    quaternion = np.asarray(info["ego2global_rotation"], np.float64)
    can_bus[:3] = info["ego2global_translation"]
    can_bus[3:7] = quaternion[0] if legacy_rotation else quaternion
    forward = rotation_matrix(quaternion)[:, 0]
    degrees = math.atan2(forward[1], forward[0]) / math.pi * 180
    degrees += 360 if degrees < 0 else 0
    can_bus[16] = degrees / 180 * math.pi
    can_bus[17] = degrees
    return can_bus


def sample_record(infos: Sequence[Mapping], index: int, flags: np.ndarray, offsets: Sequence[int],
                  info_file: str | os.PathLike | None = None) -> dict:
    """What the pipeline starts from.

    Args:
        infos: Records in order.
        index: Sample index.
        flags: (N,) sequence ids of :func:`sequence_flags`.
        offsets: How far back the adjacent frames lie.
        info_file: Where the records came from, for relative file names.

    Returns:
        New dict with index, sample_index, sample_idx (the token), scene_name, timestamp (seconds), info_file,
        occ_gt_path, pts_filename, curr (the record), adjacent (records, newest first), sequence_group_idx,
        start_of_sequence, can_bus and the matrices of :func:`relative_poses`.
    """
    info = infos[index]
    start = is_start_of_sequence(flags, index)
    return {
        "index": index,
        "sample_index": index,
        "sample_idx": info["token"],
        "scene_name": scene_name(info),
        "timestamp": info["timestamp"] / 1e6,
        "info_file": info_file,
        "occ_gt_path": info["occ_path"],
        "pts_filename": info.get("lidar_path"),
        "curr": info,
        "adjacent": [infos[j] for j in adjacent_indices(infos, index, offsets)],
        "sequence_group_idx": int(flags[index]),
        "start_of_sequence": start,
        "can_bus": effective_can_bus(info),
        **relative_poses(infos, index, start),
    }
