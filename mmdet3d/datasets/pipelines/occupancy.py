"""Occupancy labels of a sample at full and coarser resolutions, read from label files or computed on the fly."""

from collections.abc import Mapping, Sequence

import numpy as np

from mmdet3d.datasets.converters.label_files import label_folder
from mmdet3d.datasets.converters.multiscale_gt import (
    block_shape,
    coarsen_flow,
    coarsen_mask,
    downsample_labels,
    downsample_scales,
)
from mmdet3d.datasets.infos import DataError, resolve_path
from mmdet3d.datasets.labels import GRID_SIZE, IGNORE_LABEL, OCC3D, OPENOCC, LabelSet
from mmdet3d.datasets.npz import read_arrays
from mmdet3d.datasets.pipelines.compose import require, sample_error
from mmdet3d.registry import PIPELINES


class OccupancyLoader:
    """What the loaders of both label sets share.

    Adds ``voxel_semantics`` (X, Y, Z) and, per scale n, ``voxel_semantics_1_n`` (X / n, Y / n, Z / n), in the integer
    type of the files. Values are labels of :attr:`labels` or 255.

    Args:
        scale_1_2: Load the labels at half the resolution from ``labels_1_2.npz``, too.
        scale_1_4: Those at a quarter.
        scale_1_8: Those at an eighth.
        compute_scales: Compute the coarser labels instead of reading files; the result is identical.
        grid_size: Voxels (X, Y, Z) that the labels in the files must have.
        coarsen: For models with a coarser grid than the files: blocks of so many voxels along x, y and z become one
            voxel, by the rule of :func:`~mmdet3d.datasets.converters.multiscale_gt.downsample_labels`; a scale n then
            has blocks n times as large, counted in the files' voxels. Needs ``compute_scales`` for further scales, of
            which there are no files. Flow follows :func:`coarsen_flow`, masks follow :func:`coarsen_mask`.

    Raises:
        ValueError: ``grid_size`` is not three numbers that the scales and ``coarsen`` divide, or scales of a coarsened
            grid are to be read from files.
    """

    labels: LabelSet
    camera_mask = ignore_unobserved = False

    def __init__(self, scale_1_2: bool = False, scale_1_4: bool = False, scale_1_8: bool = False, *,
                 compute_scales: bool = False, grid_size: Sequence[int] = GRID_SIZE,
                 coarsen: int | Sequence[int] = 1) -> None:
        self.factors = tuple(n for n, wanted in ((2, scale_1_2), (4, scale_1_4), (8, scale_1_8)) if wanted)
        self.compute_scales = compute_scales
        self.grid_size = tuple(grid_size)
        self.coarsen = block_shape(coarsen)
        if len(self.grid_size) != 3 or any(n < 1 or n % (f * c) for f in (1, *self.factors)
                                           for n, c in zip(self.grid_size, self.coarsen, strict=True)):
            blocks = "" if self.coarsen == (1, 1, 1) else f" times coarsen {self.coarsen}"
            raise ValueError(f"grid_size: expected three numbers that {self.factors or 1}{blocks} divide, got "
                             f"{grid_size!r}")
        if self.coarsen != (1, 1, 1) and self.factors and not compute_scales:
            raise ValueError(f"coarsen={coarsen!r}: there are no files with coarser scales of that grid; set "
                             "compute_scales=True")

    def __call__(self, results: dict) -> dict:
        """Add the labels of ``occ_gt_path``.

        Raises:
            DataError: a file is missing or damaged, lacks an array, has another shape, or holds unknown labels.
        """
        require(self, results, "occ_gt_path")
        arrays = self.read_labels(results)
        scales = self._scales(results, arrays["semantics"])
        results.update({f"voxel_semantics{suffix}": grid for suffix, grid in scales.items()})
        if "flow" in arrays:
            results["voxel_flows"] = coarsen_flow(arrays["flow"], arrays["semantics"], scales[""])
        for suffix, grid in scales.items() if "mask_camera" in arrays else ():
            seen = coarsen_mask(arrays["mask_camera"], arrays["semantics"], grid)
            if self.camera_mask:
                results[f"mask_camera{suffix}"] = seen
            if self.ignore_unobserved:
                results[f"voxel_semantics{suffix}"] = np.where(seen, grid, np.uint8(IGNORE_LABEL))
        return results

    def read_labels(self, results: Mapping) -> dict[str, np.ndarray]:
        """What is needed of ``labels.npz``, at the resolution of the file."""
        return self.read_semantics(results, "labels.npz", 1)

    def _scales(self, results: Mapping, fine: np.ndarray) -> dict[str, np.ndarray]:
        """Labels of every scale by the suffix of its keys."""
        suffixes = [f"_1_{n}" for n in self.factors]
        if not self.compute_scales:
            coarse = [self.read_semantics(results, f"labels{suffix}.npz", n)["semantics"]
                      for n, suffix in zip(self.factors, suffixes, strict=True)]
        else:
            blocks = [tuple(n * side for side in self.coarsen) for n in self.factors]
            coarse = downsample_scales(fine, blocks, self.labels.free_index) if blocks else []
        if self.coarsen != (1, 1, 1):
            fine = downsample_labels(fine, self.coarsen, self.labels.free_index)
        return {"": fine, **dict(zip(suffixes, coarse, strict=True))}

    def read_semantics(self, results: Mapping, name: str, factor: int, *others: str) -> dict[str, np.ndarray]:
        """``semantics``, checked, and ``others`` of the file ``name`` of a sample."""
        relative = f"{label_folder(results['occ_gt_path'], self.labels.name)}/{name}"
        try:
            path = resolve_path(relative, results.get("info_file"))
        except DataError as error:
            hint = "" if name == "labels.npz" else ("; tools/generate_ms_occ.py makes it, and compute_scales=True of "
                                                    "this step does without it")
            raise sample_error(self, results, f"{error}{hint}") from None
        try:
            arrays = read_arrays(path, "semantics", *others)
        except DataError as error:
            raise sample_error(self, results, f"cannot read label file {error}") from None
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


@PIPELINES.register_module()
class LoadOccGTFromFileOpenOcc(OccupancyLoader):
    """Pipeline step: OpenOcc labels, and ``voxel_flows`` (X, Y, Z, 2): velocity along x and y in m/s.

    The arrays called ``flow`` in the files of the coarser scales are copies of the labels and are not read.
    Arguments, result and errors are those of :class:`OccupancyLoader`.
    """

    labels = OPENOCC

    def read_labels(self, results: Mapping) -> dict[str, np.ndarray]:
        """Labels and flow."""
        arrays = self.read_semantics(results, "labels.npz", 1, "flow")
        flow = arrays["flow"]
        if flow.shape != (*self.grid_size, 2) or flow.dtype.kind not in "fiu":
            raise sample_error(self, results, f"labels.npz: flow: expected numbers of shape "
                                              f"{(*self.grid_size, 2)}, found {flow.dtype} of shape {flow.shape}")
        return arrays


@PIPELINES.register_module()
class LoadOccGTFromFileCVPR2023(OccupancyLoader):
    """Pipeline step: Occ3D labels. Arguments, result and errors are those of :class:`OccupancyLoader`, and:

    Args:
        scale_1_2: See :class:`OccupancyLoader`, as for the next five.
        scale_1_4: ...
        scale_1_8: ...
        compute_scales: ...
        grid_size: ...
        coarsen: ...
        camera_mask: Add ``mask_camera`` and, per scale, ``mask_camera_1_n`` by the rule of :func:`coarsen_mask`:
            uint8, 1 where the cameras observe a voxel.
        ignore_unobserved: Training with the camera mask: set the labels of voxels that the cameras do not observe to
            255 (ignore), at every scale by the same rule. Coarse labels come from the whole grid, as without masks.
    """

    labels = OCC3D

    def __init__(self, scale_1_2: bool = False, scale_1_4: bool = False, scale_1_8: bool = False, *,
                 compute_scales: bool = False, grid_size: Sequence[int] = GRID_SIZE,
                 coarsen: int | Sequence[int] = 1, camera_mask: bool = False,
                 ignore_unobserved: bool = False) -> None:
        super().__init__(scale_1_2, scale_1_4, scale_1_8, compute_scales=compute_scales, grid_size=grid_size,
                         coarsen=coarsen)
        self.camera_mask, self.ignore_unobserved = camera_mask, ignore_unobserved

    def read_labels(self, results: Mapping) -> dict[str, np.ndarray]:
        """Labels and, where wanted, the camera mask."""
        if not (self.camera_mask or self.ignore_unobserved):
            return super().read_labels(results)
        arrays = self.read_semantics(results, "labels.npz", 1, "mask_camera")
        if arrays["mask_camera"].shape != self.grid_size:
            raise sample_error(self, results, f"labels.npz: mask_camera: expected shape {self.grid_size}, found "
                                              f"{arrays['mask_camera'].shape}")
        return arrays


def ground_truth_step(labels: LabelSet, options: Mapping | None = None) -> OccupancyLoader:
    """The loading step that gives evaluation what it compares with: labels, and flow or camera mask.

    Args:
        labels: Label set.
        options: Options of the step, such as ``dict(coarsen=(5, 5, 2))``.

    Raises:
        TypeError: the step has no such option. ValueError: its value does not fit.
    """
    kind = {OPENOCC.name: LoadOccGTFromFileOpenOcc, OCC3D.name: LoadOccGTFromFileCVPR2023}[labels.name]
    always = {"camera_mask": True} if labels is OCC3D else {}
    return kind(**{**always, **(options or {})})
