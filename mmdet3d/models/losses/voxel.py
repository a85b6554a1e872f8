"""The four losses of the occupancy logits at each scale, under the names that the logs and the golden values use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmdet3d.models.losses.affinity import geometric_affinity, semantic_affinity
from mmdet3d.models.losses.focal import CustomFocalLoss
from mmdet3d.models.losses.labelled import class_sums, label_voxels
from mmdet3d.models.losses.lovasz import lovasz_softmax


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
        losses = {}
        for scale in range(len(self.scale_weights)):
            losses.update(self.losses_at_scale(scale, logits[scale], targets[scale]))
        return losses

    def losses_at_scale(self, scale: int, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The four losses of scale number ``scale`` (0 = finest); arguments as one entry of :meth:`forward`'s."""
        weight, tag = self.scale_weights[scale], f"c_1_{2 ** scale}"
        focal = self.focal[scale](logits, target, self.class_weights, self.ignore_index)
        with torch.autocast(logits.device.type, enabled=False):
            voxels = label_voxels(logits, target, self.ignore_index)
            probability = voxels.logits.softmax(-1)             # one distribution and one set of sums for all three
            sums = class_sums(probability, voxels)
            return {
                f"loss_voxel_ce_{tag}": weight * focal,
                f"loss_voxel_sem_scal_{tag}": weight * voxels.or_blank(*semantic_affinity(sums)),
                f"loss_voxel_geo_scal_{tag}": weight * voxels.or_blank(geometric_affinity(sums, self.empty_index)),
                f"loss_voxel_lovasz_{tag}": weight * voxels.or_blank(lovasz_softmax(probability, voxels)),
            }
