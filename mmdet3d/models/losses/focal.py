"""Sigmoid focal loss on voxels, weighted by class and by distance from the ego vehicle.

Focal loss: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002. The growth of the weight
with the distance follows FB-OCC (Li et al., arXiv 2307.01492).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mmdet3d.models.losses.labelled import LabelledVoxels, label_voxels
from mmdet3d.registry import LOSSES

# Logarithms are taken of max(., smallest normal float32) in every precision, as mmcv's CUDA operator does: a confident
# mistake costs at most 87.3 per class and its gradient is the one of the closed form, not of the clamp.
_TINY = torch.finfo(torch.float32).tiny


class _SigmoidFocal(torch.autograd.Function):
    """Sum over voxels v and classes k of voxel_weight(v) * class_weight(k) * focal(v, k).

    For the label's class focal = -alpha (1-p)^gamma ln p, else -(1-alpha) p^gamma ln(1-p), p = sigmoid(logit).
    The backward pass computes p again instead of keeping three tensors as large as the logits.
    """

    @staticmethod
    def forward(ctx, logits, labels, valid, voxel_weight, class_weights, gamma, alpha):
        ctx.save_for_backward(logits, labels, valid, voxel_weight, class_weights)
        ctx.gamma, ctx.alpha = gamma, alpha
        p = logits.sigmoid()                                                         # [R, S, K]
        p_label = p.gather(-1, labels.unsqueeze(-1))                                 # [R, S, 1]
        label_term = -alpha * (1 - p_label).pow(gamma) * p_label.clamp(min=_TINY).log()
        terms = (1 - p).clamp_(min=_TINY).log_().mul_(p.pow_(gamma)).mul_(alpha - 1)
        terms.scatter_(-1, labels.unsqueeze(-1), label_term).mul_(class_weights)
        return terms.sum(-1).mul_(voxel_weight).masked_fill_(~valid, 0).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        logits, labels, valid, voxel_weight, class_weights = ctx.saved_tensors
        gamma, alpha = ctx.gamma, ctx.alpha
        p = logits.sigmoid()
        p_label = p.gather(-1, labels.unsqueeze(-1))
        label_slope = -alpha * (1 - p_label).pow(gamma) * (
            1 - p_label - gamma * p_label * p_label.clamp(min=_TINY).log())
        q = 1 - p
        slope = q.clamp(min=_TINY).log_().mul_(q).mul_(gamma).sub_(p).mul_(p.pow_(gamma)).mul_(alpha - 1)
        slope.scatter_(-1, labels.unsqueeze(-1), label_slope).mul_(class_weights)
        slope.mul_((voxel_weight * grad_output).unsqueeze(-1)).masked_fill_(~valid.unsqueeze(-1), 0)
        return slope, None, None, None, None, None, None


def radial_weight(bev_h: int, bev_w: int) -> Tensor:
    """Weight of each column of voxels: 1 at the grid's index (n/2, n/2), growing linearly to 2 at the corner (0, 0).

    Args:
        bev_h: Voxels along Y.
        bev_w: Voxels along X.

    Returns:
        [X, Y] float32, 1 + d / max(d) with d the distance of index (i, j) from (X/2, Y/2).
    """
    i = torch.arange(bev_w, dtype=torch.float32) - bev_w / 2
    j = torch.arange(bev_h, dtype=torch.float32) - bev_h / 2
    distance = torch.sqrt(i[:, None] ** 2 + j[None, :] ** 2)
    return 1 + distance / distance.max()


@LOSSES.register_module()
class CustomFocalLoss(nn.Module):
    """Sigmoid focal loss over all K logits of each voxel, mean over the labelled voxels.

    loss = loss_weight * mean over valid voxels v of sum over classes k of class_weights[k] * r(v) * focal(v, k), with
    the class weight taken by column k, not by the voxel's label, and r of :func:`radial_weight`. The module has no
    entries in the state dict.

    Args:
        bev_h: Voxels along Y.
        bev_w: Voxels along X.
        use_sigmoid: Only True is defined.
        gamma: Focusing exponent.
        alpha: Weight of the label's class; the others get 1 - alpha.
        reduction: Only "mean" is defined.
        loss_weight: Factor of the result.
        activated: Only False is defined: the predictions are logits.

    Raises:
        ValueError: an option has a value that is not defined.
    """

    def __init__(self, *, bev_h: int, bev_w: int, use_sigmoid: bool = True, gamma: float = 2.0, alpha: float = 0.25,
                 reduction: str = "mean", loss_weight: float = 100.0, activated: bool = False) -> None:
        super().__init__()
        for name, value, accepted in (("use_sigmoid", use_sigmoid, True), ("reduction", reduction, "mean"),
                                      ("activated", activated, False)):
            if value != accepted:
                raise ValueError(f"CustomFocalLoss: {name}={value!r} is not supported, only {accepted!r} is")
        self.gamma = float(gamma)
        self.alpha = float(alpha)
        self.loss_weight = float(loss_weight)
        self.register_buffer("radial_weight", radial_weight(bev_h, bev_w), persistent=False)

    def forward(self, logits: Tensor, target: Tensor, class_weights: Tensor | None = None,
                ignore_index: int = 255) -> Tensor:
        """Loss of one scale, a scalar in float32 (float64 for float64 logits), also under autocast.

        Args:
            logits: [B, X, Y, Z, K].
            target: [B, X, Y, Z] integer labels 0..K-1, or ``ignore_index``.
            class_weights: [K] weight of each column of the logits; 1 if left out.
            ignore_index: Label of voxels that take no part.

        Returns:
            Scalar; 0 times the sum of the logits if no voxel is labelled.

        Raises:
            ValueError: shapes disagree with each other or with ``bev_w``, ``bev_h``, or a label is out of range.
        """
        if logits.dim() == 5 and logits.shape[1:3] != self.radial_weight.shape:
            raise ValueError(f"CustomFocalLoss was built for X, Y = bev_w, bev_h = {list(self.radial_weight.shape)}, "
                             f"got logits {list(logits.shape)} [B, X, Y, Z, K]")
        with torch.autocast(logits.device.type, enabled=False):
            return self.of_voxels(label_voxels(logits, target, ignore_index), class_weights)

    def of_voxels(self, voxels: LabelledVoxels, class_weights: Tensor | None = None) -> Tensor:
        """Loss of one scale of this size whose logits and labels are laid out already, see :meth:`forward`."""
        logits = voxels.logits
        if class_weights is None:
            class_weights = logits.new_ones(logits.shape[-1])
        elif class_weights.shape != logits.shape[-1:]:
            raise ValueError(f"class_weights must be [{logits.shape[-1]}], one per logit, "
                             f"got {list(class_weights.shape)}")
        (rows, columns), (x, y) = voxels.labels.shape, self.radial_weight.shape
        voxel_weight = self.radial_weight.to(logits.dtype)[None, :, :, None]
        voxel_weight = voxel_weight.expand(rows // x, -1, -1, columns // y).reshape(rows, columns)
        total = _SigmoidFocal.apply(logits, voxels.labels, voxels.valid, voxel_weight, class_weights.to(logits),
                                    self.gamma, self.alpha)
        return voxels.or_blank(self.loss_weight * total / voxels.num_valid.clamp(min=1))
