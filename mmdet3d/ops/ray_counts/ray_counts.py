"""Counting of rays: contract, checks and choice of implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import check_dims, check_dtype, check_same_device, check_shape
from .._library import AVAILABLE, built_with_cuda
from .reference import ray_counts_reference
from .totals import RayTotals

#: False also for a library that was built before this operator was written.
_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "ray_counts")
_SERVED = (("cpu", "cuda") if built_with_cuda() else ("cpu",)) if _COMPILED else ()

_FLOW_DTYPES = (torch.float16, torch.float32, torch.float64)
_MAX_CLASSES = 64


def ray_counts(
    totals: RayTotals,
    labels: Tensor,
    voxel: Tensor,
    distance: Tensor,
    pred_flow: Tensor | None = None,
    gt_flow: Tensor | None = None,
    *,
    free_label: int,
    flow_classes: Sequence[int],
    thresholds: Sequence[float],
    flow_threshold: float,
    sample: int = 0,
) -> None:
    """Add the rays of one sample to the counters of the RayIoU metric (Liu et al., arXiv 2312.17118).

    Rays whose true label is free do not count. A ray is a true positive of a class, at a threshold, if both labels are
    that class and the distances differ by less than the threshold. The Euclidean norm of true minus predicted flow is
    summed over the true positives of ``flow_classes`` at ``flow_threshold``.

    A sample that has a label outside the class table anywhere in its grids, or a predicted flow that is not finite at
    one of those true positives, is not counted at all, and ``totals.problem`` says so. Nothing is read back: on a GPU
    the call returns before the work is done, and it never waits.

    Counters are exact. Sums of flow errors are formed in float64, in an order that depends on the number of rays alone:
    the compiled CPU and CUDA versions agree bit for bit, with any number of threads; the reference version sums in
    another order.

    Args:
        totals: What is added to.
        labels: (2, X, Y, Z) uint8 labels of prediction and ground truth.
        voxel: (2, R) int32 flat index of the voxel in which each ray ends, in prediction and ground truth; from 0 to
            X * Y * Z - 1. See :class:`mmdet3d.ops.ray_cast.RayHits`.
        distance: (2, R) float32 metres to there.
        pred_flow: (X, Y, Z, 2) velocity (x, y) in m/s, float16, float32 or float64. Default: zero.
        gt_flow: (X, Y, Z, 2) float16. Default: zero.
        free_label: Label of free space.
        flow_classes: Labels of the classes whose flow is compared.
        thresholds: Three distances in metres.
        flow_threshold: Distance in metres.
        sample: Number by which ``totals.problem`` names the sample.

    Raises:
        ValueError: shapes or devices disagree, there are more than 64 labels, a flow class is none of them, or there
            are not three thresholds.
        TypeError: a dtype is not accepted.
    """
    _check_tensors(totals, labels, voxel, distance, pred_flow, gt_flow)
    classes = totals.counts.shape[1]
    if classes > _MAX_CLASSES or not all(0 <= label < classes for label in flow_classes):
        raise ValueError(f"flow_classes must be among the labels, of which there are 1 to {_MAX_CLASSES}; got "
                         f"{list(flow_classes)} of {classes} labels")
    if len(thresholds) != 3:
        raise ValueError(f"thresholds must be three numbers, got {thresholds}")
    if labels.device.type not in _SERVED:
        ray_counts_reference(totals, labels, voxel, distance, pred_flow, gt_flow, free_label=free_label,
                             flow_classes=flow_classes, thresholds=thresholds, flow_threshold=flow_threshold,
                             sample=sample)
        return
    torch.ops.mmdet3d.ray_counts(labels, voxel, distance, pred_flow, gt_flow, free_label, flow_classes, thresholds,
                                 flow_threshold, sample, totals.counts, totals.flow_error, totals.problem)


def _check_tensors(totals: RayTotals, labels: Tensor, voxel: Tensor, distance: Tensor, pred_flow: Tensor | None,
                   gt_flow: Tensor | None) -> None:
    check_dtype("labels", labels, (torch.uint8,))
    check_dims("labels", labels, "2, X, Y, Z")
    check_shape("labels", labels, "2, X, Y, Z", (2, *labels.shape[1:]))
    check_same_device("totals", totals.memory, "labels", labels)
    for name, tensor, dtype in (("voxel", voxel, torch.int32), ("distance", distance, torch.float32)):
        check_dtype(name, tensor, (dtype,))
        check_dims(name, tensor, "2, R")
        check_shape(name, tensor, "2, R", (2, voxel.shape[1]))
        check_same_device(name, tensor, "labels", labels)
    for name, flow, dtypes in (("pred_flow", pred_flow, _FLOW_DTYPES), ("gt_flow", gt_flow, (torch.float16,))):
        if flow is not None:
            check_dtype(name, flow, dtypes)
            check_shape(name, flow, "X, Y, Z, 2", (*labels.shape[1:], 2))
            check_same_device(name, flow, "labels", labels)


if _COMPILED:

    @torch.library.register_fake("mmdet3d::ray_counts")
    def _(labels, voxel, distance, pred_flow, gt_flow, free_label, flow_classes, thresholds, flow_threshold, sample,
          counts, flow_error, problem):
        return None
