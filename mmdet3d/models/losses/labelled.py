"""What all voxel losses share: logits and labels laid out for reductions, and the per-class sums of a distribution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class LabelledVoxels:
    """Logits and labels of one scale. R = B * X rows of S = Y * Z voxels, K classes.

    Nothing is removed: voxels to ignore are masked, because selecting them would make a GPU wait for their number.

    Attributes:
        logits: [R, S, K] float32, or float64 if the logits came as float64.
        labels: [R, S] int64 class of each voxel; 0 where ``valid`` is False.
        valid: [R, S] bool, False where the label is the index to ignore.
        num_valid: [] int64, how many voxels are valid.
        blank: [] the loss if no voxel is valid: 0 times the sum of the logits, without gradient, so that NaN shows.
    """

    logits: Tensor
    labels: Tensor
    valid: Tensor
    num_valid: Tensor
    blank: Tensor

    def or_blank(self, loss: Tensor, count: Tensor | None = None) -> Tensor:
        """``loss``, or ``blank`` where ``count`` (default: the number of valid voxels) is 0."""
        count = self.num_valid if count is None else count
        return torch.where(count > 0, loss, self.blank.to(loss.dtype))


def label_voxels(logits: Tensor, target: Tensor, ignore_index: int = 255) -> LabelledVoxels:
    """Check and flatten the inputs of the voxel losses.

    Args:
        logits: [B, X, Y, Z, K] floating; half precision is raised to float32.
        target: [B, X, Y, Z] integer, 0..K-1 or ``ignore_index``.
        ignore_index: Label of voxels that take no part.

    Raises:
        ValueError: the shapes disagree, or (on a CPU only, because the check would make a GPU wait) a label is neither
            a class nor ``ignore_index``. On CUDA such a label ends in a device-side assertion.
        TypeError: the target is not an integer tensor, or the logits are not floating.
    """
    if logits.dim() != 5 or target.shape != logits.shape[:4]:
        raise ValueError(f"expected logits [B, X, Y, Z, K] and target [B, X, Y, Z], "
                         f"got {list(logits.shape)} and {list(target.shape)}")
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target must hold integer labels, got {target.dtype}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    batch, x, y, z, classes = logits.shape
    logits = logits.reshape(batch * x, y * z, classes)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    target = target.reshape(batch * x, y * z)
    valid = target != ignore_index
    labels = torch.where(valid, target, 0).long()
    if labels.device.type == "cpu" and labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        wrong = sorted(set(labels.unique().tolist()) - set(range(classes)))
        raise ValueError(f"target holds the labels {wrong}; accepted are 0..{classes - 1} and {ignore_index} (ignored)")
    return LabelledVoxels(logits, labels, valid, valid.sum(), 0 * logits.detach().sum())


@dataclass(frozen=True)
class ClassSums:
    """Sums of a class distribution P over the valid voxels, [K] each; [S, K] for S distributions.

    Attributes:
        probability: float64, sum of P_k.
        hit: float64, sum of P_k over the voxels whose label is k.
        count: int64, number of voxels whose label is k.
        num_valid: [] or [S] int64, number of valid voxels.
        dtype: Precision of the distribution, in which the losses are computed.
    """

    probability: Tensor
    hit: Tensor
    count: Tensor
    num_valid: Tensor
    dtype: torch.dtype

    @classmethod
    def stack(cls, sums: Sequence[ClassSums]) -> ClassSums:
        """The sums of several distributions over the same classes."""
        return cls(*(torch.stack([getattr(one, name) for one in sums])
                     for name in ("probability", "hit", "count", "num_valid")), sums[0].dtype)


class _ClassSums(torch.autograd.Function):
    """Sums along rows in the distribution's precision, over the rows in float64: differences of sums stay exact."""

    @staticmethod
    def forward(ctx, probability: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(labels, valid)
        ctx.dtype, ctx.shape = probability.dtype, probability.shape
        classes = torch.arange(probability.shape[-1], device=labels.device)
        here = (labels.unsqueeze(-1) == classes) & valid.unsqueeze(-1)               # [R, S, K]
        total = probability.masked_fill(~valid.unsqueeze(-1), 0).sum(1).sum(0, dtype=torch.float64)
        hit = probability.masked_fill(~here, 0).sum(1).sum(0, dtype=torch.float64)
        count = here.sum((0, 1))
        ctx.mark_non_differentiable(count)
        return total, hit, count

    @staticmethod
    @once_differentiable
    def backward(ctx, total_grad: Tensor, hit_grad: Tensor, _count_grad: Tensor) -> tuple[Tensor, None, None]:
        labels, valid = ctx.saved_tensors
        grad = total_grad.to(ctx.dtype).expand(ctx.shape).clone()
        grad.scatter_add_(-1, labels.unsqueeze(-1), hit_grad.to(ctx.dtype)[labels].unsqueeze(-1))
        return grad.masked_fill_(~valid.unsqueeze(-1), 0), None, None


def class_sums(probability: Tensor, voxels: LabelledVoxels) -> ClassSums:
    """Sums of ``probability`` [R, S, K] per class over the valid voxels, without a one-hot copy of the labels."""
    total, hit, count = _ClassSums.apply(probability, voxels.labels, voxels.valid)
    return ClassSums(total, hit, count, voxels.num_valid, probability.dtype)
