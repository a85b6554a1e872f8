"""Writes a whole synthetic data set: images, lidar, labels, tables. What is already there is not made again."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmdet3d.datasets.converters.parallel import map_unordered
from mmdet3d.datasets.labels import CAMERAS
from mmdet3d.utils.files import atomic_write

from .lidar import count_in_boxes, scan
from .occupancy import make_labels
from .render import render_camera
from .rig import LIDAR
from .scene import Scene, WorldSettings, build_scene
from .tables import sample_file, write_tables

SETTINGS_FILE = "synthetic.json"
RECORDS = "synthetic_frames"
"""Folder of what is noted about each finished frame."""
_GENERATION = 1
"""To be raised when the same settings give other files."""
_JPEG_QUALITY = 92

_cached_scene = lru_cache(maxsize=1)(build_scene)


def write_dataset(folder: str | os.PathLike, settings: WorldSettings, workers: int = 0,
                  on_frame: Callable[[], None] | None = None) -> None:
    """Write a data set in the nuScenes layout; an interrupted call is continued by the next one.

    Args:
        folder: Root of the data set. Only a new or empty folder, or one that was begun with the same settings.
        settings: What to write.
        workers: Processes that render; 0 or 1 renders in this one.
        on_frame: Called after each key frame, those that were there already included.

    Raises:
        ValueError: the folder holds something else, or a setting is out of its range.
    """
    folder = Path(folder)
    _check(settings)
    _claim(folder, settings)
    jobs = [(folder, settings, index, frame) for index in range(len(settings.scenes))
            for frame in range(settings.frames)]
    for _ in map_unordered(_write_job, jobs, workers, chunk=1):
        if on_frame:
            on_frame()
    records = [[json.loads(_record(folder, settings, index, frame).read_text(encoding="utf-8"))
                for frame in range(settings.frames)] for index in range(len(settings.scenes))]
    write_tables(folder, settings, records)


def _check(settings: WorldSettings) -> None:
    if not settings.scenes or len(set(settings.scenes)) != len(settings.scenes):
        raise ValueError(f"scenes must be at least one name, each once, got {settings.scenes}")
    if not 1 <= settings.frames <= 80:
        raise ValueError(f"frames must be 1 to 80, got {settings.frames}")
    if min(settings.image_size) < 16 or max(settings.image_size) > 8192:
        raise ValueError(f"image_size must be (width, height) of 16 to 8192 pixels, got {settings.image_size}")
    if settings.seed < 0:
        raise ValueError(f"seed must not be negative, got {settings.seed}")


def _claim(folder: Path, settings: WorldSettings) -> None:
    """Note the settings in a new folder, or compare them with those of an earlier call."""
    content = json.dumps({"generation": _GENERATION, **asdict(settings)}, indent=1) + "\n"
    path = folder / SETTINGS_FILE
    if path.is_file():
        if path.read_text(encoding="utf-8") != content:
            raise ValueError(f"{path} says that this folder was made with other settings; delete the folder, or "
                             f"write to another one.\nthere: {path.read_text(encoding='utf-8')}\nnow: {content}")
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and has no {SETTINGS_FILE}: refusing to mix a synthetic data set with "
                         "other files")
    _write(path, content.encode())


def _record(folder: Path, settings: WorldSettings, index: int, frame: int) -> Path:
    """File that says that a frame is finished."""
    return folder / RECORDS / f"{settings.scenes[index]}_{frame:04d}.json"


def _write_job(job: tuple[Path, WorldSettings, int, int]) -> None:
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)  # there are as many processes as processors
    write_frame(*job)


def write_frame(folder: Path, settings: WorldSettings, index: int, frame: int) -> None:
    """Write images, lidar and labels of one key frame, unless its record says that they are there.

    Args:
        folder: Root of the data set.
        settings: What it is made of.
        index: Number of the scene.
        frame: Number of the key frame in it.
    """
    record = _record(folder, settings, index, frame)
    if record.is_file():
        return
    scene = _cached_scene(settings, index)
    points, _ = scan(scene, frame)
    _write(folder / sample_file(scene, frame, LIDAR), points.tobytes())
    _write_labels(folder, scene, frame)
    seen = touched = np.zeros(len(scene.actors), np.int64)
    for channel in CAMERAS:
        picture = render_camera(scene, frame, channel)
        buffer = io.BytesIO()
        Image.fromarray(picture.colors).save(buffer, "JPEG", quality=_JPEG_QUALITY)
        _write(folder / sample_file(scene, frame, channel), buffer.getvalue())
        owners = picture.actor[picture.actor >= 0]
        seen = seen + np.bincount(owners, minlength=len(scene.actors))
        touched = touched + picture.touched
    content = {"num_lidar_pts": count_in_boxes(scene, frame, points), "pixels_seen": seen.tolist(),
               "pixels_without_occlusion": touched.tolist()}
    _write(record, (json.dumps(content) + "\n").encode())


def _write_labels(folder: Path, scene: Scene, frame: int) -> None:
    labels, token = make_labels(scene, frame), scene.token("sample", frame)
    _write_npz(folder / "gts" / scene.name / token / "labels.npz", semantics=labels.occ3d,
               mask_lidar=labels.mask_lidar, mask_camera=labels.mask_camera)
    _write_npz(folder / "openocc_v2" / scene.name / token / "labels.npz", semantics=labels.openocc, flow=labels.flow)


def _write_npz(path: Path, **arrays: np.ndarray) -> None:
    """Compressed ``.npz``; NumPy gives its entries a fixed date."""
    with atomic_write(path) as file:
        np.savez_compressed(file, **arrays)


def _write(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)
