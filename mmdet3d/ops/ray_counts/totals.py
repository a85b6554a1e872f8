"""Counters that are added to where they are, and read in one transfer."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 6
"""Rows of the counters: ground truth, prediction, true positives at three thresholds, rays with flow."""

PRED_LABEL, GT_LABEL, PRED_FLOW = 1, 2, 3
"""Kinds of problems of a sample."""


class RayTotals:
    """What :func:`mmdet3d.ops.ray_counts.ray_counts` adds to; K labels, free space included.

    Args:
        num_classes: K.
        device: Where the counters lie.

    Attributes:
        memory: (7 K + 5,) int64, what the others are views of.
        counts: (6, K) int64 rays whose ground truth is not free: by true label, by predicted label, true positives at
            each of three thresholds, true positives whose flow was compared.
        flow_error: (K,) float64 sums of the norms of predicted minus true flow over the last of those, in m/s.
        problem: (5,) int64 number of samples that were not counted; and of the first of them its number, why
            (``PRED_LABEL``, ``GT_LABEL`` or ``PRED_FLOW``), the largest label or the number of true positives whose
            predicted flow is not finite, and the number of true positives whose flow was compared.
    """

    def __init__(self, num_classes: int, device: torch.device | str | None = None) -> None:
        self.memory = torch.zeros(num_classes * (ROWS + 1) + 5, dtype=torch.int64, device=device)
        self._view(num_classes)

    def _view(self, num_classes: int) -> None:
        counters, sums = ROWS * num_classes, (ROWS + 1) * num_classes
        self.counts: Tensor = self.memory[:counters].view(ROWS, num_classes)
        self.flow_error: Tensor = self.memory[counters:sums].view(torch.float64)
        self.problem: Tensor = self.memory[sums:]

    def take(self) -> RayTotals:
        """The counters on the CPU, in one transfer; here they start again from zero."""
        taken = RayTotals.__new__(RayTotals)
        taken.memory = self.memory.clone() if self.memory.device.type == "cpu" else self.memory.cpu()
        taken._view(self.counts.shape[1])
        self.memory.zero_()
        return taken
