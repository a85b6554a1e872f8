"""Which sensor files of a nuScenes download are there, by sensor and by scene."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmdet3d.datasets.converters.nuscenes_tables import CHANNELS, LIDAR, NuScenesTables, Progress, no_progress

EXAMPLES = 3
"""File names that a report gives per sensor."""


@dataclass
class SensorGap:
    """What is missing of one sensor.

    Attributes:
        files: Number of files that the tables name and the folder lacks.
        records: Number of samples for which the tables have no key frame of the sensor.
        scenes: Names of the scenes concerned, in table order.
        examples: The first missing files, relative to the root.
    """

    files: int = 0
    records: int = 0
    scenes: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)


@dataclass
class Survey:
    """What a download lacks.

    Attributes:
        samples: Number of samples looked at.
        gaps: Gap by channel, only of channels that have one.
        lidar_absent: No lidar file is there at all: taken as a download without lidar, which depth supervision
            alone needs, and not as a gap of its scenes.
        incomplete: Names of scenes that lack anything else, in table order.
    """

    samples: int = 0
    gaps: dict[str, SensorGap] = field(default_factory=dict)
    lidar_absent: bool = False
    incomplete: list[str] = field(default_factory=list)

    def to_dict(self) -> dict:
        """For a JSON summary."""
        return {"samples": self.samples, "lidar_absent": self.lidar_absent, "incomplete_scenes": self.incomplete,
                "sensors": {channel: vars(gap) for channel, gap in self.gaps.items()}}


class _Listing:
    """Asks for each folder once what is in it: one call per folder instead of one per file."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._names: dict[str, frozenset[str]] = {}

    def has(self, file: str) -> bool:
        folder, name = os.path.split(file)
        if folder not in self._names:
            try:
                self._names[folder] = frozenset(os.listdir(self._root / folder))
            except (FileNotFoundError, NotADirectoryError):
                self._names[folder] = frozenset()
        return name in self._names[folder]


def survey_files(root: Path, tables: NuScenesTables, progress: Progress = no_progress) -> Survey:
    """Look for the key frame files of the lidar and the six cameras of every sample.

    Args:
        root: Root of the data set.
        tables: Its tables.
        progress: Shows the progress over the samples.

    Raises:
        OSError: a folder cannot be read.
    """
    listing, survey = _Listing(root), Survey(samples=len(tables.samples))
    scenes: dict[str, dict[str, None]] = {channel: {} for channel in CHANNELS}
    gaps = {channel: SensorGap() for channel in CHANNELS}
    for token, sample in progress(tables.samples.items(), desc="files", unit="sample"):
        frames: Mapping[str, dict] = tables.key_frames[token]
        for channel in CHANNELS:
            record, gap = frames.get(channel), gaps[channel]
            if record is not None and listing.has(record["filename"]):
                continue
            scenes[channel][tables.scenes[sample["scene_token"]]] = None
            if record is None:
                gap.records += 1
                continue
            gap.files += 1
            if len(gap.examples) < EXAMPLES:
                gap.examples.append(record["filename"])
    for channel in CHANNELS:
        gaps[channel].scenes = list(scenes[channel])
    lidar = gaps[LIDAR]
    survey.lidar_absent = lidar.files == survey.samples and lidar.records == 0 and survey.samples > 0
    survey.gaps = {channel: gap for channel, gap in gaps.items() if gap.scenes}
    counted = [channel for channel in survey.gaps if not (channel == LIDAR and survey.lidar_absent)]
    concerned = {name for channel in counted for name in scenes[channel]}
    survey.incomplete = [name for name in tables.scenes.values() if name in concerned]
    return survey
