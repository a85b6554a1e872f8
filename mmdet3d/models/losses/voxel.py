"""The four losses of the occupancy logits at each scale, under the names that the logs and the golden values use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmdet3d.models.losses.affinity import geometric_affinity, semantic_affinity
from mmdet3d.models.losses.focal import CustomFocalLoss
from mmdet3d.models.losses.labelled import ClassSums, LabelledVoxels, class_sums, label_voxels
from mmdet3d.models.losses.lovasz import lovasz_softmax


class _Scale(NamedTuple):
    """What one scale gives: the losses that need all its voxels, and the sums that the others need."""

    voxels: LabelledVoxels
    focal: Tensor
    sums: ClassSums
    lovasz: Tensor


class VoxelLosses(nn.Module):
    """Focal, semantic affinity, geometric affinity and Lovász-softmax loss of every scale.

    Scale i has cells 2^i times as large as the output grid and is named ``c_1_{2^i}``. The module has no entries in the
    state dict.

    Args:
        bev_h: Voxels of the output grid along Y.
        bev_w: Voxels of the output grid along X.
        empty_index: Class of free space.
        class_weights: K weights of the logits' columns in the focal loss; 1 if left out.
        scale_weights: Weight of each scale, finest first.
        ignore_index: Label of voxels that take no part.

    Raises:
        ValueError: the grid cannot be halved once per scale.
    """

    def __init__(self, *, bev_h: int, bev_w: int, empty_index: int, class_weights: Sequence[float] | None = None,
                 scale_weights: Sequence[float] = (1.0, 0.5, 0.25, 0.125), ignore_index: int = 255) -> None:
        super().__init__()
        coarsest = 2 ** (len(scale_weights) - 1)
        if not scale_weights or bev_h % coarsest or bev_w % coarsest:
            raise ValueError(f"a grid of bev_h={bev_h}, bev_w={bev_w} cannot be halved for each of the "
                             f"{len(scale_weights)} scale_weights")
        self.scale_weights = tuple(float(weight) for weight in scale_weights)
        self.empty_index = empty_index
        self.ignore_index = ignore_index
        self.focal = nn.ModuleList(CustomFocalLoss(bev_h=bev_h >> i, bev_w=bev_w >> i)
                                   for i in range(len(scale_weights)))
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Tensor]:
        """Weighted losses of all scales; every key is always there.

        Args:
            logits: Per scale, finest first, [B, X / 2^i, Y / 2^i, Z / 2^i, K].
            targets: Per scale [B, X / 2^i, Y / 2^i, Z / 2^i] integer labels 0..K-1, or ``ignore_index``.

        Returns:
            ``loss_voxel_ce_{tag}``, ``loss_voxel_sem_scal_{tag}``, ``loss_voxel_geo_scal_{tag}`` and
            ``loss_voxel_lovasz_{tag}`` for each scale, in this order, finest scale first; scalars.

        Raises:
            ValueError: the number of scales, shapes or labels disagree. TypeError: a target is not integer.
        """
        if not len(logits) == len(targets) == len(self.scale_weights):
            raise ValueError(f"expected logits and targets of {len(self.scale_weights)} scales, "
                             f"got {len(logits)} and {len(targets)}")
        with torch.autocast(logits[0].device.type, enabled=False):
            scales = [self._scale(scale, *pair) for scale, pair in enumerate(zip(logits, targets, strict=True))]
            # The sums of all scales go through the affinities together: a few numbers each, but many small steps.
            sums = ClassSums.stack([scale.sums for scale in scales])
            semantic = list(zip(*(values.unbind(0) for values in semantic_affinity(sums)), strict=True))
            geometric = geometric_affinity(sums, self.empty_index).unbind(0)
            losses = {}
            for i, (weight, scale) in enumerate(zip(self.scale_weights, scales, strict=True)):
                tag = f"c_1_{2 ** i}"
                losses[f"loss_voxel_ce_{tag}"] = weight * scale.focal
                losses[f"loss_voxel_sem_scal_{tag}"] = weight * scale.voxels.or_blank(*semantic[i])
                losses[f"loss_voxel_geo_scal_{tag}"] = weight * scale.voxels.or_blank(geometric[i])
                losses[f"loss_voxel_lovasz_{tag}"] = weight * scale.voxels.or_blank(scale.lovasz)
        return losses

    def _scale(self, scale: int, logits: Tensor, target: Tensor) -> _Scale:
        radial = self.focal[scale].radial_weight
        if logits.dim() == 5 and logits.shape[1:3] != radial.shape:
            raise ValueError(f"scale {scale} has X, Y = {list(radial.shape)}, got logits {list(logits.shape)} "
                             "[B, X, Y, Z, K]")
        voxels = label_voxels(logits, target, self.ignore_index)
        probability = voxels.logits.softmax(-1)             # one distribution and one set of sums for all three
        return _Scale(voxels, self.focal[scale].of_voxels(voxels, self.class_weights), class_sums(probability, voxels),
                      lovasz_softmax(probability, voxels))
