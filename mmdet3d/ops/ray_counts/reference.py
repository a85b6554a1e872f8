"""Plain PyTorch version of the counting of rays: what the compiled versions are judged by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .totals import GT_LABEL, PRED_FLOW, PRED_LABEL, RayTotals


def ray_counts_reference(totals: RayTotals, labels: Tensor, voxel: Tensor, distance: Tensor,
                         pred_flow: Tensor | None = None, gt_flow: Tensor | None = None, *, free_label: int,
                         flow_classes: Sequence[int], thresholds: Sequence[float], flow_threshold: float,
                         sample: int = 0) -> None:
    """Same contract as :func:`mmdet3d.ops.ray_counts.ray_counts`, without its checks. Waits for the device."""
    classes = totals.counts.shape[1]
    pred_label, gt_label = labels[0].flatten()[voxel[0].long()].long(), labels[1].flatten()[voxel[1].long()].long()
    for grid, kind in ((0, PRED_LABEL), (1, GT_LABEL)):
        if (largest := int(labels[grid].max())) >= classes:
            return _refuse(totals, sample, kind, largest, 0)
    error = (distance[0].double() - distance[1].double()).abs()
    kept = gt_label != free_label
    right = kept & (gt_label == pred_label)
    moving = torch.zeros(classes, dtype=torch.bool, device=labels.device)
    moving[list(flow_classes)] = True
    compared = right & (error < flow_threshold) & moving[gt_label]
    norm, strange = _flow_errors(pred_flow, gt_flow, voxel[0][compared].long(), voxel[1][compared].long())
    if strange:
        return _refuse(totals, sample, PRED_FLOW, strange, len(norm))
    chosen = [gt_label[kept], pred_label[kept], *(gt_label[right & (error < limit)] for limit in thresholds),
              gt_label[compared]]
    totals.counts.add_(torch.stack([torch.bincount(row, minlength=classes) for row in chosen]))
    totals.flow_error.index_add_(0, gt_label[compared], norm)
    return None


def _refuse(totals: RayTotals, sample: int, kind: int, value: int, of: int) -> None:
    """Note that a sample is not counted."""
    totals.problem[0] += 1
    if int(totals.problem[0]) == 1:
        totals.problem[1:] = totals.problem.new_tensor([sample, kind, value, of])


def _flow_errors(pred_flow: Tensor | None, gt_flow: Tensor | None, pred_voxel: Tensor, gt_voxel: Tensor
                 ) -> tuple[Tensor, int]:
    """(rays,) float64 norms of predicted minus true flow, and of how many the predicted flow is not finite."""
    zero = torch.zeros(len(pred_voxel), 2, dtype=torch.float64, device=pred_voxel.device)
    predicted = zero if pred_flow is None else pred_flow.reshape(-1, 2)[pred_voxel].double()
    true = zero if gt_flow is None else gt_flow.reshape(-1, 2)[gt_voxel].double()
    x, y = (true - predicted).unbind(1)
    return (x * x + y * y).sqrt(), int((~predicted.isfinite().all(dim=1)).sum())
