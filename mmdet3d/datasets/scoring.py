"""Scores of predictions sample by sample: true labels from the files of a data set, counters, and their sum.

A sample gives a few hundred counted numbers. Kept apart until the end, and added in the order of the data set, they
give the same sums, to the last bit, however the samples were shared out among processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.labels import LabelSet
from mmdet3d.datasets.lidar_origins import LidarOrigins
from mmdet3d.datasets.metrics.coverage import CoverageError
from mmdet3d.datasets.metrics.hit_cache import HitCache
from mmdet3d.datasets.metrics.inputs import upload
from mmdet3d.datasets.metrics.moving import MovingRayMetric
from mmdet3d.datasets.metrics.ray_scores import format_table
from mmdet3d.datasets.metrics.rays import LABEL_GRID
from mmdet3d.datasets.metrics.voxel_iou import VoxelMIoU, format_voxel_iou
from mmdet3d.utils.text import listing


@dataclass(frozen=True)
class GroundTruth:
    """What a prediction is compared with.

    Attributes:
        index: Number of the sample in its data set.
        token: Sample token.
        semantics: (X, Y, Z) uint8 labels.
        flow: (X, Y, Z, 2) float16 velocity along x and y in m/s; None for a label set without flow.
        mask: (X, Y, Z), not zero where a camera sees the voxel; None for a label set without it.
        origins: (T, 3) float64 positions in the ego frame from which rays are cast, metres.
    """

    index: int
    token: str
    semantics: Tensor
    flow: Tensor | None
    mask: Tensor | None
    origins: np.ndarray

    @classmethod
    def of(cls, index: int, token: str, semantics: np.ndarray, flow: np.ndarray | None, mask: np.ndarray | None,
           origins: np.ndarray) -> GroundTruth:
        """Make it of arrays as label files hold them, in any type of number."""
        with np.errstate(over="ignore"):
            rounded = None if flow is None else torch.from_numpy(flow.astype(np.float16))
        return cls(index, token, torch.from_numpy(semantics.astype(np.uint8)), rounded,
                   None if mask is None else torch.from_numpy(mask), origins)

    def pin_memory(self) -> GroundTruth:
        """The same in page-locked memory; loaders call it."""
        pinned = {name: value.pin_memory() for name in ("semantics", "flow", "mask")
                  if (value := getattr(self, name)) is not None}
        return replace(self, **pinned)


class GroundTruthSource:
    """The ground truth of every sample of a data set, read when it is asked for; works in loader workers.

    Args:
        dataset: A :class:`~mmdet3d.datasets.nuscenes_occupancy.NuScenesOccupancyDataset`.
        pairing: Whose lidar positions a sample is seen from, see :class:`~mmdet3d.datasets.lidar_origins.LidarOrigins`.
        scenes: ``scene.json`` of the nuScenes tables, for the pairing "index".

    Raises:
        ValueError: ``pairing`` is unknown or does not fit ``scenes``.
        DataError: a scene lacks frames, or ``scenes`` cannot be read.
    """

    def __init__(self, dataset: Any, pairing: str = "token", scenes: str | os.PathLike | None = None) -> None:
        self.dataset = dataset
        self.origins = LidarOrigins(dataset.data_infos, pairing, scenes)

    def __getitem__(self, index: int) -> GroundTruth:
        """Ground truth of a sample.

        Raises:
            DataError: the label file is missing or damaged.
        """
        found = self.dataset.ground_truth(index)
        return GroundTruth.of(int(index), self.dataset.data_infos[index]["token"], found["semantics"], found["flow"],
                              found["mask_camera"], self.origins[index])


@dataclass(frozen=True)
class SampleScore:
    """What was counted for one sample.

    Attributes:
        index: Number of the sample in its data set.
        token: Sample token.
        rays: State of a :class:`MovingRayMetric` that has seen this sample only.
        voxels: The same of a :class:`VoxelMIoU`.
    """

    index: int
    token: str
    rays: Mapping[str, Any]
    voxels: Mapping[str, Any]


def refine(grid: Tensor, size_xyz: Sequence[int]) -> Tensor:
    """The same occupancy on a finer grid: every voxel takes what its block has.

    Args:
        grid: (X, Y, Z, ...).
        size_xyz: Voxels of the finer grid.

    Raises:
        ValueError: the finer grid is no whole multiple.
    """
    if len(grid.shape) < 3 or any(wanted % size for wanted, size in zip(size_xyz, grid.shape, strict=False)):
        raise ValueError(f"the labels' grid {tuple(size_xyz)} (X, Y, Z) is no multiple of {tuple(grid.shape)}")
    for axis, wanted in enumerate(size_xyz):
        if grid.shape[axis] != wanted:
            grid = grid.repeat_interleave(wanted // grid.shape[axis], axis)
    return grid


class SampleScorer:
    """Compares predictions with the ground truth, each for itself.

    Rays are cast in the grid of the labels as released; coarser labels and predictions, of models with a coarser grid,
    are seen there as blocks.

    Args:
        labels: Label set.
        device: Where to compute; default: where the predictions are.
        cache: Folder that keeps where rays hit the ground truth.
    """

    def __init__(self, labels: LabelSet, device: torch.device | str | None = None,
                 cache: str | os.PathLike | None = None) -> None:
        self._device = None if device is None else torch.device(device)
        self._rays = MovingRayMetric(labels, cache=None if cache is None else HitCache(cache))
        self._voxels = VoxelMIoU(labels)
        self._empty = self._rays.state_dict(), self._voxels.state_dict()

    def __call__(self, truth: GroundTruth, semantics: Tensor, flow: Tensor | None) -> SampleScore:
        """Count one sample.

        Args:
            truth: Its ground truth.
            semantics: (X, Y, Z) predicted labels.
            flow: (X, Y, Z, 2) predicted velocity in m/s; not read where the ground truth has none. None: zero.

        Raises:
            ValueError: the prediction does not fit; the message names the sample.
            TypeError: likewise.
        """
        device, size = self._device or semantics.device, LABEL_GRID.size_xyz
        flow = None if truth.flow is None else flow
        predicted, flow, true, true_flow, mask = (
            None if value is None else upload(value, device)
            for value in (semantics, flow, truth.semantics, truth.flow, truth.mask))
        for metric, state in zip((self._rays, self._voxels), self._empty, strict=True):
            metric.load_state_dict(state)
        try:
            self._rays.add(truth.token, refine(predicted, size), refine(true, size), truth.origins,
                           *(None if value is None else refine(value, size) for value in (flow, true_flow)))
            self._voxels.add(truth.token, predicted, true, mask)
            return SampleScore(truth.index, truth.token, self._rays.state_dict(), self._voxels.state_dict())
        except (ValueError, TypeError) as error:
            raise type(error)(f"sample {truth.token}: {error}") from error


def in_order(scores: Iterable[SampleScore]) -> list[SampleScore]:
    """Scores in the order of the data set.

    Raises:
        CoverageError: a sample is there twice; the message lists them.
    """
    ordered = sorted(scores, key=lambda score: score.index)
    doubled = [one.token for one, other in zip(ordered, ordered[1:], strict=False) if one.index == other.index]
    if doubled:
        raise CoverageError(f"{len(doubled)} samples were evaluated twice: {listing(doubled)}")
    return ordered


def first_of_each(scores: Iterable[SampleScore]) -> list[SampleScore]:
    """Scores without those of samples that were there before, as the reference evaluation drops them."""
    seen: dict[int, SampleScore] = {}
    for score in scores:
        seen.setdefault(score.index, score)
    return list(seen.values())


@dataclass(frozen=True)
class Summary:
    """Scores of a data set.

    Attributes:
        labels: Label set.
        eval_metric: "rayiou" or "miou", what is printed first.
        rays: Result of :meth:`~mmdet3d.datasets.metrics.ray_iou.RayMetric.result`.
        voxels: Result of :meth:`VoxelMIoU.result`.
        counters: States of both metrics, ``rays`` and ``voxels``.
        missing: Tokens of samples that were not evaluated.
        moving: ``moving`` of :meth:`MovingRayMetric.result`.
    """

    labels: LabelSet
    eval_metric: str
    rays: Mapping[str, Any]
    voxels: Mapping[str, Any]
    counters: Mapping[str, Any]
    missing: tuple[str, ...]
    moving: Mapping[str, Any]

    @property
    def headline(self) -> dict[str, float]:
        """What the reference evaluation returns: ``miou`` and ``mave`` as fractions, or ``miou`` in percent."""
        if self.eval_metric == "miou":
            return {"miou": self.voxels["miou"]}
        return {"miou": self.rays["miou"], "mave": self.rays["mave"]}

    def record(self) -> dict[str, Any]:
        """The scores under the names that they have in results files: ``ray_iou``, ``voxel_iou`` and ``moving``."""
        return {"ray_iou": dict(self.rays), "voxel_iou": dict(self.voxels), "moving": self.moving}

    def table(self) -> str:
        """What the reference evaluation prints."""
        return format_voxel_iou(self.voxels) if self.eval_metric == "miou" else format_table(self.rays)


def summarise(scores: Sequence[SampleScore], labels: LabelSet, tokens: Sequence[str], eval_metric: str = "rayiou",
              allow_missing: bool = False) -> Summary:
    """Add up scores, in the order they have.

    Args:
        scores: One per sample.
        labels: Label set.
        tokens: Tokens of all samples.
        eval_metric: What :meth:`Summary.table` shows.
        allow_missing: Do with the samples that are there.

    Raises:
        CoverageError: a sample is missing, is there twice, or does not belong to the data set; lists them.
    """
    rays, voxels = MovingRayMetric(labels), VoxelMIoU(labels)
    for score in scores:
        for total, state in ((rays, score.rays), (voxels, score.voxels)):
            part = type(total)(labels)
            part.load_state_dict(state)
            total.merge(part)
    counted = set(rays.coverage.tokens)
    missing = [token for token in tokens if token not in counted] if allow_missing else []
    rays.check_coverage([token for token in tokens if token in counted] if allow_missing else tokens)
    result = rays.result()
    moving = result.pop("moving")
    return Summary(labels, eval_metric, result, voxels.result(),
                   {"rays": rays.state_dict(), "voxels": voxels.state_dict()}, tuple(missing), moving)


def first_results(results: Sequence[Mapping], num_samples: int) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(index, labels, flow) of every sample in the results of a test loop, where it comes first.

    Args:
        results: Dicts with ``occ_results`` [B, X, Y, Z], ``flow_results`` [B, X, Y, Z, 2] and ``index``, B numbers.
        num_samples: Number of samples of the data set.

    Raises:
        ValueError: a key is missing, the numbers of entries differ, or there is no such sample.
    """
    seen: set[int] = set()
    for position, result in enumerate(results):
        if missing := [key for key in ("occ_results", "flow_results", "index") if key not in result]:
            raise ValueError(f"results[{position}] lacks {missing}; it has {sorted(result)}")
        counts = {key: len(result[key]) for key in ("occ_results", "flow_results", "index")}
        if len(set(counts.values())) != 1:
            raise ValueError(f"results[{position}] has different numbers of samples: {counts}")
        for index, semantics, flow in zip(result["index"], result["occ_results"], result["flow_results"], strict=True):
            if not 0 <= index < num_samples:
                raise ValueError(f"results[{position}]: sample index {index} is not in 0..{num_samples - 1}")
            if index not in seen:
                seen.add(index)
                yield int(index), semantics, flow


def score_results(dataset: Any, results: Sequence[Mapping], truth: GroundTruthSource, allow_missing: bool = False
                  ) -> Summary:
    """Scores of the results of a test loop; see :func:`first_results` and :func:`score_predictions`."""
    return score_predictions(dataset, first_results(results, len(dataset)), truth, allow_missing)


def score_predictions(dataset: Any, predictions: Iterable[tuple[int, Any, Any]], truth: GroundTruthSource,
                      allow_missing: bool = False) -> Summary:
    """Scores of predictions of a data set.

    Args:
        dataset: The data set.
        predictions: (index, labels, flow) of each, arrays or tensors.
        truth: Ground truth of the data set.
        allow_missing: Score the samples that are there.

    Raises:
        CoverageError: samples are missing, or there twice.
        ValueError: a prediction does not fit.
    """
    scorer = SampleScorer(dataset.labels)
    scores = [scorer(truth[index], torch.as_tensor(semantics), torch.as_tensor(flow))
              for index, semantics, flow in predictions]
    tokens = [dataset.data_infos[index]["token"] for index in range(len(dataset))]
    return summarise(in_order(scores), dataset.labels, tokens, dataset.eval_metric, allow_missing)
