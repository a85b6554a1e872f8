"""From where the ray metric looks: the lidar positions of a sample's scene, in the ego frame of the sample."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mmdet3d.datasets.geometry import ego_to_global, lidar_to_ego, rigid_inverse
from mmdet3d.datasets.infos import DataError

MAX_ORIGINS = 8
"""Origins of a sample at most."""

REACH = 39.0
"""Metres along x and y of the ego frame within which (exclusive) an origin must lie."""

PAIRINGS = ("token", "index")

# (scenes, samples) of the official splits, by the number of scenes in the table.
_OFFICIAL_SPLITS = {850: {(700, 28130), (150, 6019)}, 10: {(8, 323), (2, 81)}}


def select_evenly(count: int, limit: int = MAX_ORIGINS) -> np.ndarray:
    """Indices of ``limit`` of ``count`` items, evenly spread, first and last included; all if there are no more."""
    if count <= limit:
        return np.arange(count)
    return np.round(np.linspace(0, count - 1, limit)).astype(np.int64)  # rounds halves to even


def scene_origins(frames: Sequence[Mapping], reference: int) -> np.ndarray:
    """Lidar positions of a scene in the ego frame of one of its samples.

    Args:
        frames: Info records of all key frames of the scene, in time order.
        reference: Position of the sample among them.

    Returns:
        (T, 3) float64 metres, T from 1 to 8, in time order. Positions further than 39 m along x or y are left out,
        and of more than eight that remain, eight are taken evenly; z is not looked at. In the lidar frame of the
        sample the positions are rounded to float32.
    """
    return _origins(frames[reference], reference, _lidar_to_global(frames))


def _lidar_to_global(frames: Sequence[Mapping]) -> np.ndarray:
    """(F, 4, 4) poses of LIDAR_TOP in the global frame."""
    return np.stack([ego_to_global(frame) @ lidar_to_ego(frame) for frame in frames])


def _origins(info: Mapping, reference: int, lidar_to_global: np.ndarray) -> np.ndarray:
    """As :func:`scene_origins`, for the sample ``info`` at position ``reference`` of the scene's poses."""
    lidar = lidar_to_ego(info)
    lidar_from_global = rigid_inverse(lidar) @ rigid_inverse(ego_to_global(info))
    offsets = (lidar_from_global @ lidar_to_global)[:, :3, 3].astype(np.float32).astype(np.float64)
    offsets[reference] = 0.0
    positions = np.concatenate([offsets, np.ones((len(offsets), 1))], axis=1) @ lidar[:3].T
    near = positions[(np.abs(positions[:, :2]) < REACH).all(axis=1)]
    return near[select_evenly(len(near))]


class LidarOrigins:
    """Origins of every sample of a split.

    With the pairing ``token`` a sample is looked at from the lidar positions of its own scene, as the authors of the
    metric define it. With ``index``, sample number i in time order is looked at from the positions that belong to
    sample number i in the order of the nuScenes scene table, which is another one: so does the reference evaluation
    of this model, by mistake. Its number needs the whole split.

    Args:
        infos: Info records in time order, as :func:`mmdet3d.datasets.infos.load_infos` gives them.
        pairing: ``token`` or ``index``.
        scenes: For ``index``: ``scene.json`` of the nuScenes tables.

    Raises:
        ValueError: ``pairing`` is unknown, or ``scenes`` is missing or not wanted.
        DataError: a scene lacks frames, ``scenes`` cannot be read, or it does not fit the infos.
    """

    def __init__(self, infos: Sequence[Mapping], pairing: str = "token",
                 scenes: str | os.PathLike | None = None) -> None:
        if pairing not in PAIRINGS:
            raise ValueError(f"pairing: expected one of {PAIRINGS}, got {pairing!r}")
        if (scenes is not None) != (pairing == "index"):
            raise ValueError("pairing 'index' needs the scene table (scene.json); pairing 'token' takes none")
        self.pairing = pairing
        self._infos = infos
        self._frames: dict[str, list[int]] = {}
        for index, info in enumerate(infos):
            self._frames.setdefault(info["scene_token"], []).append(index)
        for frames in self._frames.values():
            frames.sort(key=lambda index: infos[index]["timestamp"])
            _check_complete([infos[index] for index in frames])
        self._position = {index: place for frames in self._frames.values() for place, index in enumerate(frames)}
        self._poses: dict[str, np.ndarray] = {}
        self._partner = np.arange(len(infos)) if scenes is None else self._in_table_order(Path(scenes))

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, index: int) -> np.ndarray:
        """(T, 3) float64 origins with which sample ``index`` is evaluated, see :func:`scene_origins`."""
        partner = int(self._partner[index])
        info = self._infos[partner]
        scene = info["scene_token"]
        if scene not in self._poses:
            self._poses[scene] = _lidar_to_global([self._infos[i] for i in self._frames[scene]])
        return _origins(info, self._position[partner], self._poses[scene])

    def _in_table_order(self, path: Path) -> np.ndarray:
        table = _read_scenes(path)
        known = {record["token"] for record in table}
        if unknown := [scene for scene in self._frames if scene not in known]:
            raise DataError(f"{path} does not hold scene {unknown[0]} and {len(unknown) - 1} others of the info file")
        sizes = {record["token"]: record["nbr_samples"] for record in table if "nbr_samples" in record}
        for scene, frames in self._frames.items():
            if sizes.get(scene, len(frames)) != len(frames):
                raise DataError(f"pairing 'index' needs a whole split: scene {scene} has {sizes[scene]} samples in "
                                f"{path}, {len(frames)} in the info file")
        found = (len(self._frames), len(self._infos))
        splits = _OFFICIAL_SPLITS.get(len(table), {found})
        if found not in splits:
            raise DataError(f"pairing 'index' needs a whole split: the info file has {found[0]} scenes with {found[1]} "
                            f"samples, the splits of {path} have (scenes, samples) {sorted(splits)}")
        order = [index for record in table for index in self._frames.get(record["token"], ())]
        return np.array(order, np.int64)


def _check_complete(frames: Sequence[Mapping]) -> None:
    """Raises DataError if a frame's predecessor, or successor where it is known, is not among ``frames``."""
    tokens = {frame["token"] for frame in frames}
    for frame in frames:
        for key in ("prev", "next"):
            if frame.get(key) and frame[key] not in tokens:
                raise DataError(f"scene {frame['scene_token']}: sample {frame[key]}, the {key} of {frame['token']}, is "
                                "not in the info file; the origins need all key frames of a scene")


def _read_scenes(path: Path) -> list[dict]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"scene table not found: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"scene table {path} cannot be read: {error}") from None
    if not isinstance(table, list) or not all(isinstance(r, dict) and isinstance(r.get("token"), str) for r in table):
        raise DataError(f"scene table {path}: expected a list of records with a token")
    doubled = [token for token, count in Counter(record["token"] for record in table).items() if count > 1]
    if doubled:
        raise DataError(f"scene table {path} holds scene {doubled[0]} twice")
    return table
