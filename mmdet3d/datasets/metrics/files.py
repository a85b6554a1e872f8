"""Predictions in files: where they lie, what they must hold, and one sample from files to its score."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mmdet3d.datasets.converters.multiscale_gt import blocks_of, coarsen_flow, coarsen_mask, downsample_labels
from mmdet3d.datasets.infos import DataError, scene_name
from mmdet3d.datasets.labels import GRID_SIZE, IGNORE_LABEL, LabelSet, label_set
from mmdet3d.datasets.npz import read_arrays
from mmdet3d.datasets.scoring import GroundTruth, SampleScore, SampleScorer, summarise
from mmdet3d.utils.files import prediction_path

from .inputs import label_text


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


def find_prediction(folder: str | os.PathLike, scene: str, token: str) -> Path | None:
    """Prediction of a sample, ``<scene>/<token>.npz`` or ``<token>.npz``; None without one.

    Raises:
        DataError: it is at both places.
    """
    nested = prediction_path(folder, scene, token)
    existing = [path for path in (nested, Path(folder) / nested.name) if path.is_file()]
    if len(existing) > 1:
        raise DataError(f"sample {token} has two predictions: {existing[0]} and {existing[1]}")
    return existing[0] if existing else None


def find_samples(infos: Sequence[Mapping], pred: str | os.PathLike, gt: str | os.PathLike
                 ) -> tuple[list[SampleFiles], list[str]]:
    """The files of every sample.

    Args:
        infos: Info records in time order.
        pred: Folder of predictions, see :func:`find_prediction`.
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
        path = find_prediction(pred, scene, token)
        if path is None:
            missing.append(token)
        else:
            found.append(SampleFiles(index, token, path, Path(gt) / scene / token / "labels.npz"))
    return found, missing


def read_prediction(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(X, Y, Z) labels of a prediction, whole numbers, and its flow if there is one.

    Raises:
        DataError: the file is missing or damaged, or holds no labels in the grid of the labels as released or in one
            of whole blocks of its voxels.
    """
    arrays = read_arrays(path, optional=("semantics", "pred", "flow"))
    semantics = _grid(path, arrays, "semantics", "pred")
    try:
        blocks_of(semantics.shape)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    return semantics, arrays.get("flow")


def _grid(path: Path, arrays: Mapping[str, np.ndarray], *names: str) -> np.ndarray:
    name = next((name for name in names if name in arrays), None)
    if name is None:
        raise DataError(f"{path} has no array {' or '.join(map(repr, names))}; expected whole numbers 'semantics' of "
                        "shape (X, Y, Z)")
    array = arrays[name]
    if array.dtype.kind == "f" and array.size and bool((np.mod(array, 1) == 0).all()):
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 3:
        raise DataError(f"{path}: expected whole numbers {name!r} of shape (X, Y, Z), found {array.dtype} of shape "
                        f"{array.shape}")
    return array.astype(np.int64) if array.dtype.itemsize > 1 else array


def _check(path: Path, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape or array.dtype.kind not in "biuf":
        raise DataError(f"{path}: {name} must have shape {shape} and hold numbers, got {array.dtype} of shape "
                        f"{array.shape}")


def _check_grid(path: Path, grid: np.ndarray, size: tuple[int, ...], labels: LabelSet) -> None:
    _check(path, "semantics", grid, size)
    if not bool((grid == labels.free_index).any()):
        raise DataError(f"{path}: no voxel of semantics is free (label {labels.free_index} of {labels.name}); "
                        "was it made for another class table?")


@functools.lru_cache(maxsize=1)
def _scorer(dataset: str, device: str | None, cache: str | None) -> SampleScorer:
    """That of a process, which makes what is needed for all samples once."""
    return SampleScorer(label_set(dataset), device, cache)


@dataclass(frozen=True)
class FileEvaluation:
    """How samples are evaluated; may be sent to another process.

    Predictions with fewer voxels than the labels are compared with coarser labels, as in the evaluation of a model
    with a coarser grid: those of a data set with ``label_options=dict(coarsen=...)``.

    Attributes:
        dataset: Name of the label set.
        size: Voxels (X, Y, Z) of the predictions.
        device: Where to compute, None for the CPU.
        cache: Folder that keeps where rays hit the ground truth, or None.
        threads: CPU threads of the process, None for PyTorch's choice.
    """

    dataset: str
    size: tuple[int, int, int] = GRID_SIZE
    device: str | None = None
    cache: str | None = None
    threads: int | None = None

    def read(self, files: SampleFiles, origins: np.ndarray) -> tuple[GroundTruth, np.ndarray, np.ndarray | None]:
        """Ground truth, predicted labels and predicted flow (None: zero) of a sample.

        Raises:
            DataError: a file is missing or damaged, lacks an array, has another shape, or has no free voxel.
        """
        path = files.prediction
        semantics, flow = read_prediction(path)
        _check_grid(path, semantics, self.size, label_set(self.dataset))
        truth = self.read_truth(files, origins)
        if flow is None or truth.flow is None:
            return truth, semantics, None
        _check(path, "flow", flow, (*self.size, 2))
        return truth, semantics, flow.astype(flow.dtype.newbyteorder("=") if flow.dtype.kind == "f" else np.float32)

    def read_truth(self, files: SampleFiles, origins: np.ndarray) -> GroundTruth:
        """Ground truth of a sample at the resolution of the predictions; raises as :meth:`read`."""
        labels, path = label_set(self.dataset), files.ground_truth
        masked = labels.name == "occ3d"
        other = "mask_camera" if masked else "flow"
        arrays = read_arrays(path, optional=("semantics", other))
        if other not in arrays:
            raise DataError(f"{path} has no array {other!r}; is it a label file of {labels.name}?")
        fine = _grid(path, arrays, "semantics")
        _check_grid(path, fine, GRID_SIZE, labels)
        _check(path, other, arrays[other], GRID_SIZE if masked else (*GRID_SIZE, 2))
        if fine.min() < 0 or fine.max() > labels.free_index:
            unknown = fine[((fine < 0) | (fine > labels.free_index)) & (fine != IGNORE_LABEL)]
            if unknown.size:
                raise DataError(f"{path}: {label_text('semantics', unknown[0], labels.num_classes)}")
        blocks = blocks_of(self.size)
        grid = fine if blocks == (1, 1, 1) else downsample_labels(fine, blocks, labels.free_index)
        coarse = (coarsen_mask if masked else coarsen_flow)(arrays[other], fine, grid)
        flow, mask = (None, coarse) if masked else (coarse, None)
        return GroundTruth.of(files.index, files.token, grid, flow, mask, origins)

    def score(self, files: SampleFiles, truth: GroundTruth, semantics: np.ndarray, flow: np.ndarray | None
              ) -> SampleScore:
        """What is counted for a sample.

        Raises:
            DataError: an array does not fit; the message names the file.
        """
        try:
            scorer = _scorer(self.dataset, self.device, self.cache)
            return scorer(truth, torch.as_tensor(semantics), None if flow is None else torch.as_tensor(flow))
        except (ValueError, TypeError) as error:
            wrong = str(error).removeprefix(f"sample {files.token}: ")
            path = files.ground_truth if wrong.startswith(("gt_", "mask")) else files.prediction
            raise DataError(f"{path}: {error}") from None

    def __call__(self, job: tuple[SampleFiles, np.ndarray]) -> SampleScore:
        """From files and origins to what is counted; raises DataError naming the file at fault."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return self.score(job[0], *self.read(*job))

    def check_itself(self, job: tuple[SampleFiles, np.ndarray]) -> None:
        """Raises DataError unless the ground truth of a sample, evaluated against itself, is perfect."""
        files, truth = job[0], self.read_truth(*job)
        # A true flow that is not finite has a defined effect; a predicted one is refused.
        flow = None if truth.flow is None else truth.flow.nan_to_num(nan=0, posinf=0, neginf=0)
        score = self.score(replace(files, prediction=files.ground_truth), replace(truth, flow=flow), truth.semantics,
                           flow)
        result = summarise([score], label_set(self.dataset), [files.token]).rays
        if result["rays"] and (result["RayIoU"] != 1.0 or result["mAVE"] > 0):
            raise DataError(f"{files.ground_truth}: evaluated against itself it scores RayIoU {result['RayIoU']} and "
                            f"mAVE {result['mAVE']} instead of 1 and 0; this installation does not compute correctly")
