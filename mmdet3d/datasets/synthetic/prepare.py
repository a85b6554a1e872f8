"""A synthetic data set with all that training, evaluation and pictures read, in one call."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from mmdet3d.datasets.converters.multiscale_files import BAD, job_runner, make_jobs
from mmdet3d.datasets.converters.nuscenes_can_bus import CanBus, find_can_bus
from mmdet3d.datasets.converters.nuscenes_infos import build_infos, scene_splits, write_infos
from mmdet3d.datasets.converters.nuscenes_tables import read_tables
from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.labels import LABEL_SETS

from .generate import write_dataset
from .names import scene_names
from .scene import WorldSettings

SMALL = WorldSettings(scene_names("v1.0-mini", 2), frames=4)
"""One scene to train on and one to look at: enough to try everything."""

INFO_FILE = "stcocc-nuscenes_infos_{split}.pkl"
"""Name of the info files, that of published ones."""


def prepare_dataset(folder: str | os.PathLike, settings: WorldSettings = SMALL, workers: int = 0,
                    on_frame: Callable[[], None] | None = None) -> dict[str, Path]:
    """Write a data set, see :func:`write_dataset`, with coarse labels and info files.

    Paths in the info files count from their folder, so the data set can be moved. What is there already is not made
    again, except for the info files, which take no time.

    Args:
        folder: Root of the data set.
        settings: What to write.
        workers: Processes that render; 0 or 1 renders in this one.
        on_frame: Called after each key frame.

    Returns:
        Info file by split, ``train`` and ``val``; a split without scenes is left out.

    Raises:
        ValueError: the folder holds something else, or a setting is out of its range.
        mmdet3d.datasets.infos.DataError: files that were there already are damaged.
    """
    write_dataset(folder, settings, workers, on_frame)
    folder = Path(folder)
    records = build_infos(read_tables(folder / settings.version), ".", scene_splits(settings.version),
                          can_bus=CanBus(find_can_bus(folder)))
    paths = {split: folder / INFO_FILE.format(split=split) for split, infos in records.items() if infos}
    for split, path in paths.items():
        _write_coarse_labels(path, records[split])
        write_infos(path, records[split], settings.version)
    return paths


def _write_coarse_labels(info_file: Path, infos: list[dict]) -> None:
    for name, labels in LABEL_SETS.items():
        run = job_runner(labels.free_index, str(info_file), overwrite=False, check=False)
        for outcome in map(run, make_jobs(infos, name)):
            if outcome.status in BAD:
                raise DataError(outcome.detail)
