"""Is a data set complete, readable and consistent? Asked before a training run finds out.

:func:`check_sample` looks at the record and the files of one sample, in any process; :func:`check_order` at what ties
the records together; :class:`Report` gathers both and knows what only shows over the whole data set.
"""

import collections
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmdet3d.datasets.converters.check_files import (
    Findings,
    Problem,
    check_coarse,
    check_images,
    check_labels,
    check_lidar,
    is_finite,
)
from mmdet3d.datasets.converters.multiscale_gt import FACTORS
from mmdet3d.datasets.labels import CAMERAS, label_set

KINDS = (
    "missing file", "unreadable file", "missing entry", "wrong shape or size", "wrong dtype", "labels", "values",
    "coarse labels", "calibration", "poses", "time", "sequence", "record",
)
"""Kinds of problems, in the order in which they are told."""
PARTS = ("images", "lidar", "labels", "coarse")
"""Parts of a data set that a check can leave out. Records and their order are always checked."""

MAX_CAMERA_DELAY_US = 200_000
MAX_FRAME_GAP_US = 2_500_000
MAX_EGO_SPEED_MPS = 70.0
MAX_SENSOR_OFFSET_M = 10.0
ROTATION_TOLERANCE = 1e-3


@dataclass(frozen=True)
class SampleCheck:
    """A check of single samples, with its settings; calling it with (position, record) gives :class:`Findings`.

    Attributes:
        info_file: The info file; its folder is the second place where relative paths are looked up.
        dataset_name: ``occ3d`` or ``openocc``.
        skip: Parts to leave out, of ``PARTS``.
        compare_every: Hold the coarse labels of every so many samples against the rule; 0 for none.
    """

    info_file: str
    dataset_name: str = "occ3d"
    skip: tuple[str, ...] = ()
    compare_every: int = 20

    def __post_init__(self) -> None:
        label_set(self.dataset_name)
        if unknown := sorted(set(self.skip) - set(PARTS)):
            raise ValueError(f"skip: {unknown} unknown; parts are {list(PARTS)}")

    def __call__(self, item: tuple[int, Mapping]) -> Findings:
        """Look at one sample; trouble of any kind becomes a problem in the findings."""
        position, info = item
        try:
            return check_sample(info, position, self)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # a value of a kind nobody thought of
            findings = Findings(str(info["token"]))
            findings.add("record", f"{type(error).__name__}: {error}")
            return findings


def check_sample(info: Mapping, position: int, settings: SampleCheck) -> Findings:
    """Look at the record and the files of one sample."""
    findings = Findings(str(info["token"]))
    check_record(info, findings)
    labels = label_set(settings.dataset_name)
    if "images" not in settings.skip:
        check_images(info, settings.info_file, findings)
    if "lidar" not in settings.skip:
        check_lidar(info, settings.info_file, findings)
    if "labels" not in settings.skip:
        path = check_labels(info, settings.info_file, labels, findings)
        if path is not None and "coarse" not in settings.skip:
            compare = settings.compare_every > 0 and position % settings.compare_every == 0
            check_coarse(path, labels, compare, findings)
    return findings


def check_record(info: Mapping, findings: Findings) -> None:
    """Numbers of one record: calibration, poses, times, and that the six cameras are there."""
    if missing := [name for name in CAMERAS if name not in info["cams"]]:
        findings.add("record", f"cameras {missing} are missing; found {sorted(info['cams'])}")
    if not is_finite(info["can_bus"], (18,)):
        findings.add("record", "can_bus: not 18 finite numbers")
    _check_pose(info, "lidar2ego", "calibration", findings)
    _check_pose(info, "ego2global", "poses", findings)
    for name, camera in info["cams"].items():
        _check_pose(camera, "sensor2ego", "calibration", findings, f"{name}: ")
        _check_pose(camera, "ego2global", "poses", findings, f"{name}: ")
        _check_intrinsics(camera["cam_intrinsic"], name, findings)
        rotation = camera.get("sensor2lidar_rotation")
        if rotation is not None and not _is_rotation(rotation):
            findings.add("calibration", f"{name}: sensor2lidar_rotation is not orthonormal")
        delay = camera.get("timestamp", info["timestamp"]) - info["timestamp"]
        if abs(delay) > MAX_CAMERA_DELAY_US:
            findings.add("time", f"{name}: taken {delay / 1e6:+.3f} s from the sample's time")


def _is_rotation(matrix: object) -> bool:
    if not is_finite(matrix, (3, 3)):
        return False
    matrix = np.asarray(matrix, np.float64)
    return bool(np.abs(matrix @ matrix.T - np.eye(3)).max() < ROTATION_TOLERANCE and np.linalg.det(matrix) > 0)


def _check_pose(record: Mapping, name: str, kind: str, findings: Findings, place: str = "") -> None:
    rotation, translation = record[f"{name}_rotation"], record[f"{name}_translation"]
    if not is_finite(rotation, (4,)) or abs(np.linalg.norm(rotation) - 1) > ROTATION_TOLERANCE:
        findings.add(kind, f"{place}{name}_rotation: {rotation} is not a unit quaternion (w, x, y, z)")
    if not is_finite(translation, (3,)):
        findings.add(kind, f"{place}{name}_translation: {translation} is not a position")
    elif name != "ego2global" and np.linalg.norm(translation) > MAX_SENSOR_OFFSET_M:
        findings.add(kind, f"{place}{name}_translation: {translation} is farther than {MAX_SENSOR_OFFSET_M:g} m from "
                           "the ego frame")


def _check_intrinsics(matrix: object, name: str, findings: Findings) -> None:
    if not is_finite(matrix, (3, 3)):
        findings.add("calibration", f"{name}: cam_intrinsic is not a finite 3x3 matrix")
        return
    matrix = np.asarray(matrix, np.float64)
    if matrix[0, 0] <= 0 or matrix[1, 1] <= 0 or matrix[1, 0] != 0 or matrix[2].tolist() != [0, 0, 1]:
        findings.add("calibration", f"{name}: cam_intrinsic {matrix.tolist()} is not a pinhole matrix")


def check_order(infos: Sequence[Mapping]) -> list[Problem]:
    """What ties the records together: unique tokens, whole scenes, chains of ``prev``, times and motion.

    Args:
        infos: Records in the order of :func:`mmdet3d.datasets.infos.load_infos`.
    """
    problems = []

    def add(kind: str, info: Mapping, detail: str) -> None:
        problems.append(Problem(kind, str(info["token"]), detail))

    counts = collections.Counter(info["token"] for info in infos)
    for info in infos:
        if (count := counts.pop(info["token"], 1)) > 1:
            add("record", info, f"the token occurs {count} times")
    finished: set[str] = set()
    for scene, run in itertools.groupby(infos, key=lambda info: info["scene_token"]):
        frames = list(run)
        if scene in finished:
            add("sequence", frames[0], f"scene {scene} goes on after frames of another scene: sorted by time, scenes "
                                       "must not interleave")
        finished.add(scene)
        if frames[0]["prev"] != "":
            add("sequence", frames[0], f"the first frame of scene {scene} has prev {frames[0]['prev']!r}: the frames "
                                       "before it are missing, and it would be joined to the scene before")
        for previous, current in itertools.pairwise(frames):
            _check_step(previous, current, add)
    return problems


def _check_step(previous: Mapping, current: Mapping, add) -> None:
    """Two neighbouring frames of a scene."""
    if current["prev"] == "":
        add("sequence", current, f"prev is empty within scene {current['scene_token']}: the sequence is split")
    elif current["prev"] != previous["token"]:
        add("sequence", current, f"prev is {current['prev']}, but the frame before is {previous['token']}")
    step = current["timestamp"] - previous["timestamp"]
    if not 0 < step <= MAX_FRAME_GAP_US:
        add("time", current, f"{step / 1e6:.3f} s after the frame before")
        return
    ends = [info["ego2global_translation"] for info in (previous, current)]
    if all(is_finite(end, (3,)) for end in ends):
        speed = np.linalg.norm(np.subtract(*ends)) / (step / 1e6)
        if speed > MAX_EGO_SPEED_MPS:
            add("poses", current, f"the ego vehicle moved at {speed:.0f} m/s from the frame before")


@dataclass
class Report:
    """Problems of a data set, and what was seen of it.

    Attributes:
        problems: All problems so far.
        samples: Number of samples looked at.
        image_sizes: Images by (width, height).
        grid_shapes: Tokens by shape of the label grid.
        coarse: Tokens by number of coarse files; samples that nobody looked at are not in it.
    """

    problems: list[Problem] = field(default_factory=list)
    samples: int = 0
    image_sizes: dict = field(default_factory=lambda: collections.defaultdict(list))
    grid_shapes: dict = field(default_factory=lambda: collections.defaultdict(list))
    coarse: dict = field(default_factory=lambda: collections.defaultdict(list))

    def add(self, findings: Findings) -> None:
        """Take in what looking at one sample gave."""
        self.samples += 1
        self.problems += findings.problems
        for path, size in findings.image_sizes.items():
            self.image_sizes[size].append((findings.token, path))
        if findings.grid_shape is not None:
            self.grid_shapes[findings.grid_shape].append((findings.token, "semantics"))
        if findings.coarse_files is not None:
            self.coarse[findings.coarse_files].append(findings.token)

    def finish(self, order: Iterable[str]) -> None:
        """Add what only shows over all samples, and sort by kind and by the ``order`` of tokens."""
        for seen, what in ((self.image_sizes, "image"), (self.grid_shapes, "label grid")):
            usual = max(seen, key=lambda size: len(seen[size]), default=None)
            for size, places in seen.items():
                for token, place in places if size != usual else ():
                    self.problems.append(Problem("wrong shape or size", token, f"{place}: {what} of {list(size)}, "
                                                                               f"most are {list(usual)}"))
        if self.has_coarse_files:
            for count, tokens in self.coarse.items():
                for token in tokens if count < len(FACTORS) else ():
                    self.problems.append(Problem("coarse labels", token, f"{count} of {len(FACTORS)} coarse label "
                                                                         "files, other samples have them"))
        position = {token: index for index, token in enumerate(order)}
        self.problems.sort(key=lambda problem: (KINDS.index(problem.kind), position.get(problem.token, -1)))

    @property
    def has_coarse_files(self) -> bool:
        """Whether any sample has coarse label files."""
        return any(count > 0 and tokens for count, tokens in self.coarse.items())

    def by_kind(self) -> dict[str, list[Problem]]:
        """Problems of each kind that occurs."""
        grouped: dict[str, list[Problem]] = {}
        for problem in self.problems:
            grouped.setdefault(problem.kind, []).append(problem)
        return grouped
