"""Lovász-softmax: the Jaccard index (IoU) of each class, extended to soft predictions.

Berman, Triki and Blaschko, "The Lovász-Softmax loss", CVPR 2018, arXiv 1705.08790.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mmdet3d.models.losses.labelled import LabelledVoxels, label_voxels

# Errors sorted at a time. Classes are sorted together while they are small, which spares launches, and one after the
# other when they are large, which bounds the memory (about 30 bytes an element).
_SORT_ELEMENTS = 1 << 23


def jaccard_steps(is_class: Tensor, dtype: torch.dtype) -> Tensor:
    """Growth of the Jaccard loss 1 - I/U with each voxel, voxels in the order of falling error.

    With S voxels of the class, c of them and b others seen so far, I = S - c and U = S + b. A voxel of the class lowers
    I by one, so the loss grows by 1/U; another voxel raises U by one, so it grows by I / (U (U - 1)). Unlike
    differences of the cumulative loss these are exact to the last digits however many voxels there are.

    Args:
        is_class: [C, V] bool, whether the voxel carries the class.
        dtype: Floating type of the result.

    Returns:
        [C, V], all 0 for a class without a voxel.
    """
    # One long scan: a GPU scans a row of a matrix with a single block.
    seen = is_class.flatten().cumsum(0, dtype=torch.int32).view(is_class.shape)
    seen = seen - F.pad(seen[:-1, -1:], (0, 0, 1, 0))
    intersection = seen[:, -1:] - seen
    union = intersection + torch.arange(1, is_class.shape[1] + 1, dtype=torch.int32, device=is_class.device)
    previous_union = (union - 1).clamp_(min=1).to(dtype)
    union = union.to(dtype)
    return torch.where(is_class, union.reciprocal(), intersection.to(dtype).div_(previous_union).div_(union))


class _LovaszSoftmax(torch.autograd.Function):
    """Loss from probabilities [V, K], labels [V] and validity [V].

    The steps of the Jaccard loss and the order of the errors are constants for the gradient, so the forward pass
    already has it: the steps, put back in place.
    """

    @staticmethod
    def forward(ctx, probability: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        num_voxels, num_classes = probability.shape
        losses, present = [], []
        slopes = torch.empty_like(probability.t(), memory_format=torch.contiguous_format)      # [K, V]
        together = max(1, _SORT_ELEMENTS // max(1, num_voxels))
        for first in range(0, num_classes, together):
            classes = torch.arange(first, min(first + together, num_classes), device=labels.device)
            is_class = (labels == classes[:, None]) & valid                                    # [C, V]
            soft = probability[:, first:first + together].t()
            # voxels to ignore come last, where every step is 0
            errors = torch.where(is_class, 1 - soft, soft).masked_fill_(~valid, -1)
            errors, order = errors.sort(dim=1, descending=True, stable=True)
            is_class = is_class.gather(1, order)
            steps = jaccard_steps(is_class, probability.dtype)
            losses.append((errors * steps).sum(1))
            present.append(is_class.any(1))
            if ctx.needs_input_grad[0]:
                steps = torch.where(is_class, -steps, steps).mul_(errors > 0)
                slopes[first:first + together].scatter_(1, order, steps)
        present = torch.cat(present)
        share = present / present.sum().clamp(min=1).to(probability.dtype)                     # [K], sums to 1
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(slopes.mul_(share[:, None]))
        return torch.where(present, torch.cat(losses), 0).mul_(share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None, None]:
        slopes, = ctx.saved_tensors
        return (slopes * grad_output).t(), None, None


def lovasz_softmax(probability: Tensor, voxels: LabelledVoxels) -> Tensor:
    """Lovász-softmax of ``probability`` [R, S, K]; 0 if no voxel is valid. See :func:`lovasz_softmax_loss`."""
    if voxels.valid.numel() == 0:
        return probability.sum()
    return _LovaszSoftmax.apply(probability.flatten(0, 1), voxels.labels.flatten(), voxels.valid.flatten())


def lovasz_softmax_loss(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Lovász-softmax over the labelled voxels of the batch, mean over the classes that are present.

    All K classes take part, free space too, if at least one voxel carries them.

    Args:
        logits: [B, X, Y, Z, K].
        target: [B, X, Y, Z] integer labels 0..K-1, or ``ignore_index``.
        ignore_index: Label of voxels that take no part.

    Returns:
        Scalar in [0, 1], float32 (float64 for float64 logits); 0 times the sum of the logits if no voxel is labelled.

    Raises:
        ValueError: shapes disagree or a label is out of range.
        TypeError: the target is not integer.
    """
    with torch.autocast(logits.device.type, enabled=False):
        voxels = label_voxels(logits, target, ignore_index)
        return voxels.or_blank(lovasz_softmax(voxels.logits.softmax(-1), voxels))
