"""Boxes of a sample. The model does not read them; they are there for steps that users add."""

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.pipelines.compose import sample_error
from mmdet3d.registry import PIPELINES


class Box3DMode(IntEnum):
    """Conventions of boxes, numbered as in mmdet3d."""

    LIDAR = 0
    CAM = 1
    DEPTH = 2


@dataclass(frozen=True)
class LiDARBoxes:
    """Upright boxes in the lidar convention (x forward, y left, z up).

    Attributes:
        tensor: [M, 9] float32: x, y, z of the centre of the bottom face, length, width, height (metres), yaw
            (radians), velocity x, y (m/s).
    """

    tensor: Tensor

    @classmethod
    def from_centers(cls, boxes: np.ndarray) -> "LiDARBoxes":
        """Boxes of (M, 9) rows whose z is that of the centre of the box."""
        tensor = torch.tensor(np.asarray(boxes), dtype=torch.float32).reshape(-1, 9)
        tensor[:, 2] -= 0.5 * tensor[:, 5]
        return cls(tensor)

    def __len__(self) -> int:
        return len(self.tensor)


@PIPELINES.register_module()
class LoadAnnotations:
    """Pipeline step: ``gt_bboxes_3d`` (:class:`LiDARBoxes`) and ``gt_labels_3d`` ([M] int64) of ``ann_infos``.

    A sample without ``ann_infos`` passes unchanged.
    """

    def __call__(self, results: dict) -> dict:
        """Add the boxes to ``results``.

        Raises:
            DataError: ``ann_infos`` is not a pair of boxes with 9 numbers and as many labels.
        """
        annotations = results.get("ann_infos")
        if annotations is None:
            return results
        try:
            rows, labels = annotations
            boxes = np.array(rows, np.float64).reshape(-1, 9)
            labels = np.array(labels, np.int64).reshape(-1)
        except (TypeError, ValueError) as error:
            raise sample_error(self, results, f"ann_infos: expected (boxes of 9 numbers, labels): {error}") from None
        if len(boxes) != len(labels):
            raise sample_error(self, results, f"ann_infos: {len(boxes)} boxes, but {len(labels)} labels")
        results["gt_bboxes_3d"] = LiDARBoxes.from_centers(boxes)
        results["gt_labels_3d"] = labels
        return results
