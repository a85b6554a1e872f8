"""Scene-class affinity losses: precision, recall and specificity of whole scenes, made differentiable.

Cao and de Charette, "MonoScene: Monocular 3D Semantic Scene Completion", CVPR 2022, arXiv 2112.00726, section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmdet3d.models.losses.labelled import ClassSums, class_sums, label_voxels

_EPSILON = 1e-5


class _NegativeLog(torch.autograd.Function):
    """:func:`negative_log`; the derivative of its steps is 1, so that of the whole is -1 / shifted ratio."""

    @staticmethod
    def forward(ctx, ratio: Tensor) -> Tensor:
        for _ in range(3):
            ratio = torch.where(ratio >= 1 - _EPSILON, ratio - _EPSILON, ratio)
        ratio = torch.where(ratio < _EPSILON, ratio + _EPSILON, ratio)
        ctx.save_for_backward(ratio)
        inverse_sigmoid = -torch.log(1 / ratio - 1)
        return F.binary_cross_entropy_with_logits(
            inverse_sigmoid, torch.ones_like(inverse_sigmoid), reduction="none")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        ratio, = ctx.saved_tensors
        return -grad / ratio


def negative_log(ratio: Tensor) -> Tensor:
    """-ln of a ratio in [0, 1], kept away from both ends by steps of 1e-5.

    A ratio of 1 - 1e-5 or more is lowered until it is less (at most three steps for ratios up to 1 + 2e-5), one
    below 1e-5 is raised once. The gradient passes the steps unchanged; NaN stays NaN. In float32 a ratio of 1 gives
    2.0027e-5 and a ratio of 0 gives 11.5129.

    Args:
        ratio: Any shape, values in [0, 1 + 2e-5].

    Returns:
        Same shape, binary cross entropy of the inverse sigmoid of the ratio against 1.
    """
    return _NegativeLog.apply(ratio)


def _negative_logs(parts: list[Tensor], wholes: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """:func:`negative_log` of every part / (whole + 1e-5), in one pass."""
    wholes = torch.stack([whole.to(parts[0].dtype) for whole in wholes]).to(dtype)
    return negative_log(torch.stack(parts).to(dtype) / (wholes + _EPSILON)).unbind(0)


def semantic_affinity(sums: ClassSums) -> tuple[Tensor, Tensor]:
    """Semantic affinity from the sums of one or several distributions, [..., K].

    Returns:
        The losses [...], 0 where no class is present, and the numbers [...] of classes that are present; the last class
        (free space) never counts.
    """
    probability, hit, count = sums.probability[..., :-1], sums.hit[..., :-1], sums.count[..., :-1]
    others = sums.num_valid[..., None] - count
    precision, recall, specificity = _negative_logs(
        [hit, hit, others - (probability - hit)], [probability, count, others], sums.dtype)
    # "<= 0" and not "> 0": NaN must not be taken for an empty sum
    per_class = (torch.where(probability <= 0, 0, precision) + recall + torch.where(others <= 0, 0, specificity))
    present = count > 0
    num_present = present.sum(-1)
    return torch.where(present, per_class, 0).sum(-1) / num_present.clamp(min=1), num_present


def geometric_affinity(sums: ClassSums, empty_index: int) -> Tensor:
    """Geometric affinities [...] from the sums of one or several distributions, see :func:`geometric_affinity_loss`."""
    classes = sums.count.shape[-1]
    if not 0 <= empty_index < classes:
        raise ValueError(f"empty_index must be 0..{classes - 1}, the logits have {classes} classes, got {empty_index}")
    empty, hit_empty = sums.probability[..., empty_index], sums.hit[..., empty_index]
    count_empty = sums.count[..., empty_index]
    count_filled = sums.num_valid - count_empty
    hit_filled = count_filled - (empty - hit_empty)
    return sum(_negative_logs([hit_filled, hit_filled, hit_empty],
                              [sums.num_valid - empty, count_filled, count_empty], sums.dtype))


def semantic_affinity_loss(logits: Tensor, target: Tensor, ignore_index: int = 255) -> Tensor:
    """Mean over the present classes of -ln precision, -ln recall and -ln specificity of the soft prediction.

    Present are the classes 0..K-2 that at least one voxel carries; free space, the last class, takes no part. With
    P = softmax(logits) and y = [target is k]: precision = sum(P y) / sum(P), recall = sum(P y) / sum(y), specificity =
    sum((1-P) (1-y)) / sum(1-y), sums over the labelled voxels of the batch, 1e-5 added to each denominator.

    Args:
        logits: [B, X, Y, Z, K].
        target: [B, X, Y, Z] integer labels 0..K-1, or ``ignore_index``.
        ignore_index: Label of voxels that take no part.

    Returns:
        Scalar float32 (float64 for float64 logits); 0 times the sum of the logits if no class is present.

    Raises:
        ValueError: shapes disagree or a label is out of range.
        TypeError: the target is not integer.
    """
    with torch.autocast(logits.device.type, enabled=False):
        voxels = label_voxels(logits, target, ignore_index)
        return voxels.or_blank(*semantic_affinity(class_sums(voxels.logits.softmax(-1), voxels)))


def geometric_affinity_loss(logits: Tensor, target: Tensor, empty_index: int, ignore_index: int = 255) -> Tensor:
    """-ln precision and -ln recall of "not empty", -ln recall of "empty", of the soft prediction.

    With e = softmax(logits)[empty_index], n = 1 - e, y = [target is not empty]: precision = sum(y n) / sum(n), recall =
    sum(y n) / sum(y), and for the empty ones sum((1-y) e) / sum(1-y), sums over the labelled voxels of the batch, 1e-5
    added to each denominator.

    Args:
        logits: [B, X, Y, Z, K].
        target: [B, X, Y, Z] integer labels 0..K-1, or ``ignore_index``.
        empty_index: Class of free space.
        ignore_index: Label of voxels that take no part.

    Returns:
        Scalar float32 (float64 for float64 logits); 0 times the sum of the logits if no voxel is labelled.

    Raises:
        ValueError: shapes disagree, or a label or ``empty_index`` is out of range.
        TypeError: the target is not integer.
    """
    with torch.autocast(logits.device.type, enabled=False):
        voxels = label_voxels(logits, target, ignore_index)
        return voxels.or_blank(geometric_affinity(class_sums(voxels.logits.softmax(-1), voxels), empty_index))
