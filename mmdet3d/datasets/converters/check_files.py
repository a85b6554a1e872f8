"""The files of one sample, opened and looked at: images, lidar sweep, labels, coarse labels."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from mmdet3d.datasets.converters.label_files import LABEL_FILE, coarse_name, label_folder
from mmdet3d.datasets.converters.multiscale_files import compare_coarse_files
from mmdet3d.datasets.converters.multiscale_gt import FACTORS
from mmdet3d.datasets.infos import DataError, resolve_path
from mmdet3d.datasets.labels import IGNORE_LABEL, LabelSet
from mmdet3d.datasets.npz import read_arrays, read_headers

LIDAR_POINT_BYTES = 20
"""Five float32 a point: x, y, z, intensity, ring."""
MAX_LIDAR_RANGE_M = 500.0
MAX_SPEED_MPS = 100.0
MASKS = ("mask_lidar", "mask_camera")


@dataclass(frozen=True)
class Problem:
    """Something wrong with one sample.

    Attributes:
        kind: What kind of problem, one of ``check.KINDS``.
        token: Sample token.
        detail: File or key, what was found and what was expected.
    """

    kind: str
    token: str
    detail: str


@dataclass
class Findings:
    """What looking at one sample gave.

    Attributes:
        token: Sample token.
        problems: What is wrong with it.
        image_sizes: (width, height) by image file.
        grid_shape: Shape of the label grid, None if it could not be read.
        coarse_files: How many of the coarse label files are there; None if nobody looked.
    """

    token: str
    problems: list[Problem] = field(default_factory=list)
    image_sizes: dict[str, tuple[int, int]] = field(default_factory=dict)
    grid_shape: tuple[int, ...] | None = None
    coarse_files: int | None = None

    def add(self, kind: str, detail: str) -> None:
        """Note a problem."""
        self.problems.append(Problem(kind, self.token, detail))


def is_finite(value: object, shape: tuple[int, ...]) -> bool:
    """Whether ``value`` is an array of this shape that holds finite numbers only."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        return False
    return array.shape == shape and bool(np.isfinite(array).all())


def check_images(info: Mapping, info_file: str, findings: Findings) -> None:
    """All images decode to the end and have three channels; their principal points lie inside."""
    for name, camera in info["cams"].items():
        try:
            path = resolve_path(camera["data_path"], info_file)
        except DataError as error:
            findings.add("missing file", f"{name}: {error}")
            continue
        try:
            with Image.open(path) as image:
                width, height = image.size
                channels = len(image.getbands())
                # At an eighth of the size a JPEG is still read to its end, but most of the arithmetic is saved.
                image.draft(None, (max(width // 8, 1), max(height // 8, 1)))
                image.load()
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            findings.add("unreadable file", f"{path}: {type(error).__name__}: {error}")
            continue
        findings.image_sizes[str(path)] = (width, height)
        if channels != 3:
            findings.add("wrong shape or size", f"{path}: expected 3 colour channels, found {channels}")
        if is_finite(camera["cam_intrinsic"], (3, 3)):
            x, y = np.asarray(camera["cam_intrinsic"], np.float64)[:2, 2]
            if not (0 < x < width and 0 < y < height):
                findings.add("calibration", f"{name}: principal point ({x:g}, {y:g}) lies outside of the image, "
                                            f"{width} x {height}")


def check_lidar(info: Mapping, info_file: str, findings: Findings) -> None:
    """The lidar file holds whole points with finite coordinates."""
    if not info.get("lidar_path"):
        findings.add("missing file", "the record has no lidar_path")
        return
    try:
        path = resolve_path(info["lidar_path"], info_file)
        size = path.stat().st_size
        if size == 0 or size % LIDAR_POINT_BYTES:
            findings.add("wrong shape or size", f"{path}: {size} bytes, expected a multiple of {LIDAR_POINT_BYTES} "
                                                "(5 float32 a point)")
            return
        points = np.fromfile(path, "<f4").reshape(-1, 5)
    except DataError as error:
        findings.add("missing file", str(error))
        return
    except OSError as error:
        findings.add("unreadable file", f"{path}: {error.strerror or error}")
        return
    bad = int((~(np.abs(points[:, :3]) <= MAX_LIDAR_RANGE_M)).any(axis=1).sum())  # also where not a number
    if bad:
        findings.add("values", f"{path}: {bad} of {len(points)} points are not finite or farther than "
                               f"{MAX_LIDAR_RANGE_M:g} m")


def check_labels(info: Mapping, info_file: str, labels: LabelSet, findings: Findings) -> Path | None:
    """The label file has its arrays in the right shape and range; returns it if ``semantics`` is sound."""
    try:
        path = resolve_path(f"{label_folder(info['occ_path'], labels.name)}/{LABEL_FILE}", info_file)
    except DataError as error:
        findings.add("missing file", str(error))
        return None
    try:
        names = list(read_headers(path))
        wanted = ["semantics", *(["flow"] if labels.name == "openocc" else MASKS)]
        if missing := [name for name in wanted if name not in names]:
            findings.add("missing entry", f"{path}: no {missing}; found {sorted(names)}")
        if "semantics" not in names:
            return None
        arrays = read_arrays(path, *(wanted if not missing else ["semantics"]))
    except DataError as error:
        findings.add("unreadable file", str(error))
        return None
    semantics = arrays.pop("semantics")
    sound = _check_semantics(path, semantics, labels, findings)
    for name, array in arrays.items():
        if name == "flow":
            _check_flow(path, array, semantics.shape, findings)
        else:
            _check_mask(path, name, array, semantics.shape, findings)
    return path if sound else None


def _check_semantics(path: Path, semantics: np.ndarray, labels: LabelSet, findings: Findings) -> bool:
    if semantics.ndim != 3 or semantics.size == 0 or any(size % max(FACTORS) for size in semantics.shape):
        findings.add("wrong shape or size", f"{path}: semantics: expected a grid [X, Y, Z] of multiples of "
                                            f"{max(FACTORS)}, found {list(semantics.shape)}")
        return False
    findings.grid_shape = semantics.shape
    if semantics.dtype.kind not in "iu":
        findings.add("wrong dtype", f"{path}: semantics: expected whole numbers, found {semantics.dtype}")
        return False
    unknown = semantics[((semantics < 0) | (semantics > labels.free_index)) & (semantics != IGNORE_LABEL)]
    if unknown.size:
        findings.add("labels", f"{path}: semantics: {unknown.size} voxels hold {np.unique(unknown)[:8].tolist()}; "
                               f"{labels.name} has 0..{labels.free_index} and {IGNORE_LABEL}")
        return False
    if (semantics == labels.free_index).all():
        findings.add("labels", f"{path}: semantics: every voxel is free")
    return True


def _check_mask(path: Path, name: str, mask: np.ndarray, shape: tuple[int, ...], findings: Findings) -> None:
    if mask.shape != shape:
        findings.add("wrong shape or size", f"{path}: {name}: expected {list(shape)} as semantics, found "
                                            f"{list(mask.shape)}")
    elif mask.dtype.kind not in "iub":
        findings.add("wrong dtype", f"{path}: {name}: expected 0 and 1, found {mask.dtype}")
    elif mask.size and (mask.min() < 0 or mask.max() > 1):
        findings.add("values", f"{path}: {name}: expected 0 and 1, found {mask.min()}..{mask.max()}")


def _check_flow(path: Path, flow: np.ndarray, shape: tuple[int, ...], findings: Findings) -> None:
    if flow.shape != (*shape, 2):
        findings.add("wrong shape or size", f"{path}: flow: expected {[*shape, 2]}, found {list(flow.shape)}")
    elif flow.dtype.kind != "f":
        findings.add("wrong dtype", f"{path}: flow: expected floating-point numbers, found {flow.dtype}")
    else:
        wild = (~(np.abs(flow) <= MAX_SPEED_MPS)) & (flow != IGNORE_LABEL)  # also where not a number
        if count := int(wild.any(axis=-1).sum()):
            findings.add("values", f"{path}: flow: {count} voxels are not finite or faster than {MAX_SPEED_MPS:g} m/s")


def check_coarse(path: Path, labels: LabelSet, compare: bool, findings: Findings) -> None:
    """Count the coarse files beside a label file and, with ``compare``, hold them against the rule."""
    files = [path.with_name(coarse_name(factor)) for factor in FACTORS]
    findings.coarse_files = sum(file.exists() for file in files)
    if findings.coarse_files < len(files):
        return
    try:
        if compare:
            if detail := compare_coarse_files(path, labels.free_index):
                findings.add("coarse labels", detail)
            return
        for file in files:
            read_headers(file)
    except DataError as error:
        findings.add("unreadable file", str(error))
