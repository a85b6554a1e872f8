"""Occupancy labels of a sample at full and coarser resolutions, read from label files or computed on the fly."""

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from mmdet3d.datasets.converters.label_files import label_folder
from mmdet3d.datasets.converters.multiscale_gt import downsample_scales
from mmdet3d.datasets.infos import DataError, resolve_path
from mmdet3d.datasets.labels import GRID_SIZE, IGNORE_LABEL, OCC3D, OPENOCC, LabelSet
from mmdet3d.datasets.pipelines.compose import require, sample_error
from mmdet3d.registry import PIPELINES


def openocc_path(occ_path: str) -> str:
    """Folder of the OpenOcc label of a sample, see :func:`label_folder`, without a leading ``./``."""
    return str(PurePosixPath(label_folder(occ_path, "openocc")))


def coarsen_mask(mask: np.ndarray, labels: np.ndarray, coarse_labels: np.ndarray) -> np.ndarray:
    """Which voxels of a coarser grid count as observed.

    A coarse voxel is observed if at least one of its fine voxels is observed and has the label of the coarse voxel:
    what the label says was then seen somewhere in it, and is not only known from lidar.

    Args:
        mask: (X, Y, Z), not zero where a voxel is observed.
        labels: (X, Y, Z) labels.
        coarse_labels: (X / n, Y / n, Z / n) labels.

    Returns:
        (X / n, Y / n, Z / n) uint8, 0 or 1.
    """
    blocks = [size for coarse, fine in zip(coarse_labels.shape, labels.shape, strict=True)
              for size in (coarse, fine // coarse)]
    seen = (labels.reshape(blocks) == coarse_labels[:, None, :, None, :, None]) & (mask.reshape(blocks) != 0)
    return seen.any(axis=(1, 3, 5)).astype(np.uint8)


class OccupancyLoader:
    """What the loaders of both label sets share.

    Adds ``voxel_semantics`` (X, Y, Z) and, per scale n, ``voxel_semantics_1_n`` (X / n, Y / n, Z / n), in the integer
    type of the files. Values are labels of :attr:`labels` or 255.

    Args:
        scale_1_2: Load the labels at half the resolution from ``labels_1_2.npz``, too.
        scale_1_4: Those at a quarter.
        scale_1_8: Those at an eighth.
        compute_scales: Compute the coarser labels instead of reading files; the result is identical.
        grid_size: Voxels (X, Y, Z) that the labels must have.

    Raises:
        ValueError: ``grid_size`` is not three numbers that the scales divide.
    """

    labels: LabelSet

    def __init__(self, scale_1_2: bool = False, scale_1_4: bool = False, scale_1_8: bool = False, *,
                 compute_scales: bool = False, grid_size: Sequence[int] = GRID_SIZE) -> None:
        self.factors = tuple(n for n, wanted in ((2, scale_1_2), (4, scale_1_4), (8, scale_1_8)) if wanted)
        self.compute_scales = compute_scales
        self.grid_size = tuple(grid_size)
        if len(self.grid_size) != 3 or any(n < 1 or n % f for n in self.grid_size for f in (1, *self.factors)):
            raise ValueError(f"grid_size: expected three numbers that {self.factors or 1} divide, got {grid_size!r}")

    def folder(self, occ_path: str) -> str:
        """Where the labels of a sample are, for the ``occ_path`` of its record."""
        return occ_path

    def __call__(self, results: dict) -> dict:
        """Add the labels of ``occ_gt_path``.

        Raises:
            DataError: a file is missing or damaged, lacks an array, has another shape, or holds unknown labels.
        """
        require(self, results, "occ_gt_path")
        self.add_arrays(results)
        fine = results["voxel_semantics"]
        if self.compute_scales:
            coarse = downsample_scales(fine, self.factors, self.labels.free_index) if self.factors else []
        else:
            coarse = [self.read_semantics(results, f"labels_1_{n}.npz", n)["semantics"] for n in self.factors]
        results.update({f"voxel_semantics_1_{n}": grid for n, grid in zip(self.factors, coarse, strict=True)})
        return results

    def add_arrays(self, results: dict) -> None:
        """Add what ``labels.npz`` holds to ``results``."""
        results["voxel_semantics"] = self.read_semantics(results, "labels.npz", 1)["semantics"]

    def read_semantics(self, results: Mapping, name: str, factor: int, *others: str) -> dict[str, np.ndarray]:
        """``semantics``, checked, and ``others`` of the file ``name`` of a sample."""
        path, arrays = self._read(results, name, ("semantics", *others))
        grid = arrays["semantics"]
        shape = tuple(n // factor for n in self.grid_size)
        if grid.shape != shape or grid.dtype.kind not in "iu":
            raise sample_error(self, results, f"{path}: semantics: expected whole numbers of shape {shape} (grid_size "
                                              f"{self.grid_size}), found {grid.dtype} of shape {grid.shape}")
        unknown = ((grid < 0) | (grid > self.labels.free_index)) & (grid != IGNORE_LABEL)
        if unknown.any():
            raise sample_error(self, results, f"{path}: semantics: labels {np.unique(grid[unknown])[:5].tolist()} are "
                                              f"not of {self.labels.name!r}, which has 0..{self.labels.free_index} and "
                                              f"{IGNORE_LABEL} (ignore)")
        return arrays

    def _read(self, results: Mapping, name: str, keys: Sequence[str]) -> tuple[Path, dict[str, np.ndarray]]:
        relative = f"{self.folder(results['occ_gt_path'])}/{name}"
        try:
            path = resolve_path(relative, results.get("info_file"))
        except DataError as error:
            hint = "" if name == "labels.npz" else ("; tools/generate_ms_occ.py makes it, and compute_scales=True of "
                                                    "this step does without it")
            raise sample_error(self, results, f"{error}{hint}") from None
        try:
            with np.load(path, allow_pickle=False) as file:
                if missing := [key for key in keys if key not in file]:
                    raise sample_error(self, results, f"{path}: arrays {missing} are missing; found {file.files}")
                return path, {key: file[key] for key in keys}
        except DataError:
            raise
        except (OSError, EOFError, ValueError, AttributeError, NotImplementedError, RuntimeError,
                zipfile.BadZipFile, zlib.error) as error:  # what damaged bytes make NumPy and zipfile raise
            raise sample_error(self, results, f"cannot read label file {path}: {error}") from error


@PIPELINES.register_module()
class LoadOccGTFromFileOpenOcc(OccupancyLoader):
    """Pipeline step: OpenOcc labels, and ``voxel_flows`` (X, Y, Z, 2): velocity along x and y in m/s.

    The arrays called ``flow`` in the files of the coarser scales are copies of the labels and are not read.
    Arguments, result and errors are those of :class:`OccupancyLoader`.
    """

    labels = OPENOCC

    def folder(self, occ_path: str) -> str:
        """The folder of the OpenOcc labels."""
        return openocc_path(occ_path)

    def add_arrays(self, results: dict) -> None:
        """Add labels and flow."""
        arrays = self.read_semantics(results, "labels.npz", 1, "flow")
        flow = arrays["flow"]
        if flow.shape != (*self.grid_size, 2) or flow.dtype.kind not in "fiu":
            raise sample_error(self, results, f"labels.npz: flow: expected numbers of shape "
                                              f"{(*self.grid_size, 2)}, found {flow.dtype} of shape {flow.shape}")
        results["voxel_semantics"], results["voxel_flows"] = arrays["semantics"], flow


@PIPELINES.register_module()
class LoadOccGTFromFileCVPR2023(OccupancyLoader):
    """Pipeline step: Occ3D labels. Arguments, result and errors are those of :class:`OccupancyLoader`, and:

    Args:
        scale_1_2: See :class:`OccupancyLoader`, as for the next four.
        scale_1_4: ...
        scale_1_8: ...
        compute_scales: ...
        grid_size: ...
        camera_mask: Add ``mask_camera`` and, per scale, ``mask_camera_1_n`` by the rule of :func:`coarsen_mask`:
            uint8, 1 where the cameras observe a voxel.
        ignore_unobserved: Training with the camera mask: set the labels of voxels that the cameras do not observe to
            255 (ignore), at every scale by the same rule. Coarse labels come from the whole grid, as without masks.
    """

    labels = OCC3D

    def __init__(self, scale_1_2: bool = False, scale_1_4: bool = False, scale_1_8: bool = False, *,
                 compute_scales: bool = False, grid_size: Sequence[int] = GRID_SIZE, camera_mask: bool = False,
                 ignore_unobserved: bool = False) -> None:
        super().__init__(scale_1_2, scale_1_4, scale_1_8, compute_scales=compute_scales, grid_size=grid_size)
        self.camera_mask, self.ignore_unobserved = camera_mask, ignore_unobserved

    def __call__(self, results: dict) -> dict:
        """Add labels and masks; see :meth:`OccupancyLoader.__call__`."""
        results = super().__call__(results)
        if not (self.camera_mask or self.ignore_unobserved):
            return results
        masks = self._masks(results)
        if self.camera_mask:
            results.update({f"mask_camera{suffix}": mask for suffix, mask in masks.items()})
        if self.ignore_unobserved:
            results.update({f"voxel_semantics{suffix}": np.where(mask, results[f"voxel_semantics{suffix}"],
                                                                 np.uint8(IGNORE_LABEL))
                            for suffix, mask in masks.items()})
        return results

    def add_arrays(self, results: dict) -> None:
        """Add labels and, where wanted, the mask, for the time being under the key ``mask_camera``."""
        if not (self.camera_mask or self.ignore_unobserved):
            return super().add_arrays(results)
        arrays = self.read_semantics(results, "labels.npz", 1, "mask_camera")
        if arrays["mask_camera"].shape != self.grid_size:
            raise sample_error(self, results, f"labels.npz: mask_camera: expected shape {self.grid_size}, found "
                                              f"{arrays['mask_camera'].shape}")
        results["voxel_semantics"], results["mask_camera"] = arrays["semantics"], arrays["mask_camera"]
        return None

    def _masks(self, results: dict) -> dict[str, np.ndarray]:
        """The mask of every scale by the suffix of its keys."""
        mask, labels = results.pop("mask_camera"), results["voxel_semantics"]
        masks = {"": (mask != 0).astype(np.uint8)}
        for n in self.factors:
            masks[f"_1_{n}"] = coarsen_mask(mask, labels, results[f"voxel_semantics_1_{n}"])
        return masks
