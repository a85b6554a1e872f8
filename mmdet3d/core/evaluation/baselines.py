"""Predictors that look at no image: what a trained model has to beat."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmdet3d.core.evaluation.evaluator import Evaluation, EvaluatorOptions
from mmdet3d.datasets.scoring import GroundTruthSource, score_predictions

Progress = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the loop over samples, as tqdm does."""


def majority_labels(dataset: Any, progress: Progress = iter) -> np.ndarray:
    """The most frequent label of every voxel, in the ego frame.

    Labels outside the class table, such as 255, do not count. Of labels that are equally frequent it is the one with
    the lowest number, and free space where nothing was counted.

    Args:
        dataset: A :class:`~mmdet3d.datasets.nuscenes_occupancy.NuScenesOccupancyDataset`; its labels are read, not its
            images.
        progress: See :data:`Progress`.

    Returns:
        (X, Y, Z) uint8.

    Raises:
        DataError: a label file is missing or damaged.
        ValueError: samples have grids of different sizes, or there is no sample.
    """
    labels, counts, size = dataset.labels, None, None
    for index in progress(range(len(dataset))):
        semantics = dataset.ground_truth(index)["semantics"]
        if counts is None:
            size = semantics.shape
            counts = np.zeros((labels.num_classes, semantics.size), np.int32)
        if semantics.shape != size:
            raise ValueError(f"{dataset.ann_file}: sample {index} has labels of {semantics.shape} voxels, the first "
                             f"one of {size}")
        for label in range(labels.num_classes):
            counts[label] += (semantics == label).ravel()
    if counts is None:
        raise ValueError(f"{dataset.ann_file} has no samples")
    most = counts.argmax(0)
    most[~counts.any(0)] = labels.free_index
    return most.reshape(size).astype(np.uint8)


def evaluate_constant(dataset: Any, semantics: np.ndarray | Tensor, device: torch.device | str = "cpu",
                      progress: Progress = iter) -> Evaluation:
    """Score the same prediction, with zero flow, for every sample.

    Args:
        dataset: Data set in test mode.
        semantics: (X, Y, Z) labels.
        device: Where rays are cast.
        progress: See :data:`Progress`.

    Raises:
        DataError: a label file is missing or damaged.
        ValueError: the labels do not fit the data set.
    """
    start = time.perf_counter()
    prediction = torch.as_tensor(semantics).to(device)
    flow = torch.zeros(*prediction.shape, 2, dtype=torch.float16, device=device)
    predictions = ((index, prediction, flow) for index in progress(range(len(dataset))))
    summary = score_predictions(dataset, predictions, GroundTruthSource(dataset))
    return Evaluation(summary, len(dataset), time.perf_counter() - start, 1, EvaluatorOptions(noise_seed=None))
