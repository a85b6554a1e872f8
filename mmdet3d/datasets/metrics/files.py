"""Evaluation of predictions in files: where they lie, what they must hold, and one sample from files to counters."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mmdet3d.datasets.infos import DataError, scene_name
from mmdet3d.datasets.labels import LabelSet, label_set
from mmdet3d.datasets.npz import read_arrays
from mmdet3d.utils.files import prediction_path

from .hit_cache import HitCache
from .ray_iou import RayMetric
from .voxel_iou import VoxelMIoU

_ARRAYS = ("semantics", "pred", "flow", "mask_camera")


@dataclass(frozen=True)
class SampleFiles:
    """Files of one sample.

    Attributes:
        index: Position in the info file, in time order.
        token: Sample token.
        prediction: ``.npz`` with ``semantics`` (or ``pred``) and, if there is a flow, ``flow``.
        ground_truth: ``labels.npz``.
    """

    index: int
    token: str
    prediction: Path
    ground_truth: Path


@dataclass
class Sample:
    """What the files of a sample hold; axis order (X, Y, Z), flow in m/s, ``mask`` the voxels that cameras see."""

    pred_semantics: np.ndarray
    gt_semantics: np.ndarray
    pred_flow: np.ndarray | None
    gt_flow: np.ndarray | None
    mask: np.ndarray | None


def find_samples(infos: Sequence[Mapping], pred: str | os.PathLike, gt: str | os.PathLike
                 ) -> tuple[list[SampleFiles], list[str]]:
    """The files of every sample.

    Args:
        infos: Info records in time order.
        pred: Folder of predictions, ``<scene>/<token>.npz`` or ``<token>.npz``.
        gt: Folder of labels, ``<scene>/<token>/labels.npz``.

    Returns:
        The samples that have a prediction, and the tokens of those that have none.

    Raises:
        DataError: a folder does not exist, a sample has a prediction at both places, or two records have one token.
    """
    for name, folder in (("predictions", pred), ("ground truth", gt)):
        if not Path(folder).is_dir():
            raise DataError(f"folder of {name} not found: {folder}")
    found, missing, seen = [], [], set()
    for index, info in enumerate(infos):
        token, scene = info["token"], scene_name(info)
        if token in seen:
            raise DataError(f"the info file holds sample {token} twice")
        seen.add(token)
        nested = prediction_path(pred, scene, token)
        flat = Path(pred) / nested.name
        existing = [path for path in (nested, flat) if path.is_file()]
        if len(existing) > 1:
            raise DataError(f"sample {token} has two predictions: {existing[0]} and {existing[1]}")
        if existing:
            found.append(SampleFiles(index, token, existing[0], Path(gt) / scene / token / "labels.npz"))
        else:
            missing.append(token)
    return found, missing


def _labels(path: Path, arrays: Mapping, names: Sequence[str], labels: LabelSet) -> np.ndarray:
    name = next((name for name in names if name in arrays), None)
    if name is None:
        raise DataError(f"{path} has no array {' or '.join(repr(name) for name in names)}")
    array = arrays[name]
    if array.dtype.kind == "f" and array.size and bool((np.mod(array, 1) == 0).all()):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise DataError(f"{path}: {name} must hold whole numbers, found {array.dtype}")
    if array.size and not bool((array == labels.free_index).any()):
        raise DataError(f"{path}: no voxel of {name} is free (label {labels.free_index} of {labels.name}); "
                        "was it made for another class table?")
    return array.astype(np.int64) if array.dtype.itemsize > 1 else array


def read_sample(files: SampleFiles, labels: LabelSet) -> Sample:
    """Read the files of a sample.

    Raises:
        DataError: a file is missing or damaged, lacks an array, or has no free voxel.
    """
    predicted, true = (read_arrays(path, optional=_ARRAYS) for path in (files.prediction, files.ground_truth))
    needed = "mask_camera" if labels.name == "occ3d" else "flow"
    if needed not in true:
        raise DataError(f"{files.ground_truth} has no array {needed!r}; is it a label file of {labels.name}?")
    semantics = _labels(files.prediction, predicted, ("semantics", "pred"), labels)
    if labels.name == "occ3d":
        return Sample(semantics, _labels(files.ground_truth, true, ("semantics",), labels), None, None,
                      true["mask_camera"])
    flow = predicted.get("flow")
    with np.errstate(over="ignore"):
        true_flow = true["flow"].astype(np.float16)
    if flow is not None and flow.dtype.kind in "iu":
        flow = flow.astype(np.float32)
    return Sample(semantics, _labels(files.ground_truth, true, ("semantics",), labels), flow, true_flow, None)


@dataclass(frozen=True)
class FileEvaluation:
    """How samples are evaluated; may be sent to another process.

    Attributes:
        dataset: Name of the label set.
        device: Where to compute, None for the CPU.
        cache: Folder that keeps where rays hit the ground truth, or None.
        threads: CPU threads of the process, None for PyTorch's choice.
    """

    dataset: str
    device: str | None = None
    cache: str | None = None
    threads: int | None = None

    def metrics(self) -> tuple[RayMetric, VoxelMIoU]:
        """New metrics that have counted nothing."""
        labels = label_set(self.dataset)
        cache = None if self.cache is None else HitCache(self.cache)
        return RayMetric(labels, device=self.device, cache=cache), VoxelMIoU(labels)

    def count(self, files: SampleFiles, sample: Sample, origins: np.ndarray) -> tuple[dict, dict]:
        """States of both metrics after one sample.

        Raises:
            DataError: an array does not fit; the message names the file.
        """
        rays, voxels = self.metrics()
        try:
            rays.add(files.token, sample.pred_semantics, sample.gt_semantics, origins, sample.pred_flow, sample.gt_flow)
            voxels.add(files.token, sample.pred_semantics, sample.gt_semantics, sample.mask)
            return rays.state_dict(), voxels.state_dict()
        except (ValueError, TypeError) as error:
            path = files.ground_truth if str(error).startswith(("gt", "mask")) else files.prediction
            raise DataError(f"{path}: {re.sub('^(pred|gt)_', '', str(error))}") from None

    def __call__(self, job: tuple[SampleFiles, np.ndarray]) -> tuple[dict, dict]:
        """From files and origins to the states of both metrics; raises DataError naming the file at fault."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        files, origins = job
        return self.count(files, read_sample(files, label_set(self.dataset)), origins)

    def check_itself(self, job: tuple[SampleFiles, np.ndarray]) -> None:
        """Raises DataError unless the ground truth of a sample, evaluated against itself, is perfect."""
        files, origins = job
        sample = read_sample(files, label_set(self.dataset))
        # A true flow that is not finite has a defined effect; a predicted one is refused.
        flow = None if sample.gt_flow is None else np.nan_to_num(sample.gt_flow, nan=0, posinf=0, neginf=0)
        perfect = Sample(sample.gt_semantics, sample.gt_semantics, flow, flow, sample.mask)
        rays, _ = self.metrics()
        rays.load_state_dict(self.count(replace(files, prediction=files.ground_truth), perfect, origins)[0])
        result = rays.result()
        if result["rays"] and (result["RayIoU"] != 1.0 or result["mAVE"] > 0):
            raise DataError(f"{files.ground_truth}: evaluated against itself it scores RayIoU {result['RayIoU']} and "
                            f"mAVE {result['mAVE']} instead of 1 and 0; this installation does not compute correctly")
