"""Mean IoU over voxels, as a state of one confusion matrix."""

import math
from collections.abc import Mapping

import numpy as np
import torch

from mmdet3d.datasets.labels import LabelSet, label_set

from .coverage import Coverage
from .inputs import CHUNK, Array


def _in_a_byte(labels: torch.Tensor) -> torch.Tensor:
    """Flat uint8 labels; those that do not fit become 255, which is in no class table."""
    if labels.dtype != torch.uint8:
        labels = labels.long()
        labels = labels.where((labels >= 0) & (labels < 255), 255).to(torch.uint8)
    return labels.flatten()


def _pairs(true: torch.Tensor, predicted: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
    """(256, 256) int64 how often each true label (row) meets each predicted one where ``mask`` is not zero."""
    table = np.zeros((256, 256), np.int64)
    size = max(1, CHUNK if true.device.type == "cpu" else len(true))
    for first in range(0, len(true), size):
        part = slice(first, first + size)
        codes = true[part].int() * 256 + predicted[part]
        if mask is not None:
            codes = codes[mask.flatten()[part] != 0]
        table += torch.bincount(codes, minlength=table.size).cpu().numpy().reshape(table.shape)
    return table


class VoxelMIoU:
    """IoU of each class over voxels, and their mean without free space (Tian et al., "Occ3D", arXiv 2304.14365).

    For Occ3D only voxels that a camera sees (``mask_camera``) count; OpenOcc has no such mask. Voxels whose true label
    is not in the class table, such as 255, do not count.

    Args:
        labels: Label set, or its name.
    """

    def __init__(self, labels: LabelSet | str) -> None:
        self.labels = label_set(labels) if isinstance(labels, str) else labels
        self.confusion = np.zeros((self.labels.num_classes,) * 2, np.int64)
        self.coverage = Coverage()

    def add(self, token: str, pred: Array, gt: Array, mask: Array | None = None) -> None:
        """Count one sample.

        Args:
            token: Name of the sample; each counts once.
            pred: Predicted labels, any shape.
            gt: True labels, same shape.
            mask: Same shape; voxels where it is zero do not count. Default: all count.

        Raises:
            CoverageError: the sample was added before.
            ValueError: shapes differ, or a predicted label that would count is not in the class table.
            TypeError: labels are no integers.
        """
        self.coverage.refuse_seen(token)
        first = torch.as_tensor(pred)
        second = torch.as_tensor(gt, device=first.device)
        third = None if mask is None else torch.as_tensor(mask, device=first.device)
        for name, tensor in (("pred", first), ("gt", second)):
            if tensor.is_floating_point() or tensor.is_complex():
                raise TypeError(f"{name} must hold integer labels, got {tensor.dtype}")
        for name, tensor in (("pred", first), ("mask", third)):
            if tensor is not None and tensor.shape != second.shape:
                raise ValueError(f"{name} must have the shape of gt, {tuple(second.shape)}, got {tuple(tensor.shape)}")
        table = _pairs(_in_a_byte(second), _in_a_byte(first), third)[: self.labels.num_classes]
        if (unknown := np.flatnonzero(table[:, self.labels.num_classes:].sum(0))).size:
            raise ValueError(f"pred holds label {unknown[0] + self.labels.num_classes}; the class table has labels 0 "
                             f"to {self.labels.num_classes - 1}")
        self.coverage.claim(token)
        self.confusion += table[:, : self.labels.num_classes]

    def merge(self, other: "VoxelMIoU") -> None:
        """Add what ``other`` has counted.

        Raises:
            ValueError: it has another label set.
            CoverageError: both have seen the same sample.
        """
        if other.labels != self.labels:
            raise ValueError(f"cannot merge a metric of {other.labels.name} into one of {self.labels.name}")
        self.coverage.merge(other.coverage)
        self.confusion += other.confusion

    def check_coverage(self, expected: list[str]) -> None:
        """Raises CoverageError, with tokens, unless exactly the ``expected`` samples were added."""
        self.coverage.check(expected)

    def state_dict(self) -> dict:
        """Plain arrays and strings; :meth:`load_state_dict` is the inverse."""
        return {"classes": self.labels.classes, "tokens": self.coverage.tokens, "confusion": self.confusion.copy()}

    def load_state_dict(self, state: Mapping) -> None:
        """Replace what was counted; raises ValueError for a state of other classes."""
        if tuple(state.get("classes", ())) != self.labels.classes:
            raise ValueError(f"the state is of other classes than {self.labels.name}")
        self.coverage = Coverage(state["tokens"])
        self.confusion = np.array(state["confusion"])

    def result(self) -> dict:
        """Percent, rounded to two decimals as the reference prints them: ``miou``, and ``classes``, IoU by name.

        A class that occurs in neither is NaN and does not count; free space never counts. ``samples`` is the number of
        samples.
        """
        true, predicted, both = self.confusion.sum(1), self.confusion.sum(0), np.diagonal(self.confusion)
        with np.errstate(invalid="ignore"):
            iou = both / (true + predicted - both)
        known = np.delete(iou, self.labels.free_index)
        known = known[~np.isnan(known)]
        mean = round(float(known.mean()) * 100, 2) if known.size else math.nan
        classes = {name: round(float(value) * 100, 2) for name, value in zip(self.labels.classes, iou, strict=True)}
        return {"miou": mean, "samples": len(self.coverage), "classes": classes}


def format_voxel_iou(result: Mapping) -> str:
    """The lines that the reference evaluation prints, for what :meth:`VoxelMIoU.result` returned."""
    lines = [f"===> per class IoU of {result['samples']} samples:"]
    solid = {name: value for name, value in result["classes"].items() if name != "free"}
    lines += [f"===> {name} - IoU = {value}" for name, value in solid.items()]
    lines += [f"===> empty - IoU = {result['classes']['free']}"]
    return "\n".join([*lines, f"===> mIoU of {result['samples']} samples: {result['miou']}"])
