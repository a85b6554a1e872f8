"""Sparse temporal fusion: a long history where something is, half of it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.temporal.volume_warp import gather_rows, previous_index_from_index, trilinear_taps
from mmdet3d.registry import HEADS
from mmdet3d.structures import VoxelGrid


def _mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), nn.Softplus(), nn.Linear(out_features, out_features))


@HEADS.register_module()
class SparseFusion(BaseModule):
    """Fuses a volume with the re-sampled history of one stage.

    The ``top_k`` voxels that are most likely occupied see all T history slots, the others the newest T // 2; each adds
    the output of its MLP to its feature. The history keeps the *fused* features, re-sampled into the current ego frame
    at every step (STCOcc; the recurrence follows SOLOFusion, Park et al. arXiv 2210.02443).

    Args:
        top_k: Number of foreground voxels.
        history_num: Slots T.
        single_bev_num_channels: Channels C.
        num_classes: Classes K of the stage logits.
        occ_embedims: Features of the embedding of the logits.
        corner_origin: A voxel index stands for the voxel's lower corner when poses are applied, as the released weights
            expect; False: its centre.
    """

    ignored_config_keys = frozenset({"bev_w", "bev_h", "bev_z", "foreground_idx"})

    def __init__(self, top_k: int, history_num: int = 8, single_bev_num_channels: int = 96, num_classes: int = 17,
                 occ_embedims: int = 32, corner_origin: bool = True, init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        self.top_k, self.history_num, self.channels = top_k, history_num, single_bev_num_channels
        self.corner_origin = corner_origin
        channels = single_bev_num_channels
        self.occ_embedding = _mlp(num_classes, occ_embedims)
        self.history_fusion_linear = _mlp(channels * (history_num + 1) + occ_embedims, channels)
        self.history_fusion_bg_linear = _mlp(channels * (history_num // 2 + 1) + occ_embedims, channels)

    def forward(self, volume: Tensor, logits: Tensor, occupied: Tensor, history: Tensor | None, grid: VoxelGrid,
                starts: Sequence[bool], index_matrix: Tensor, top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """Fuse a volume with its history.

        Args:
            volume: [B, C, Z, Y, X] current features.
            logits: [B, X, Y, Z, K] detached stage logits.
            occupied: [B, Z, Y, X] occupied probability of the stage.
            history: [B, V, T * C] of the previous frame, see :class:`TemporalMemory`; None before the first frame.
            grid: Voxel grid of the stage.
            starts: Whether a sequence starts, for each of the B slots.
            index_matrix: [B, 4, 4] voxel index now to voxel index in the previous frame's volume, see
                :func:`previous_index_from_index` and :meth:`index_matrix`.
            top_k: Number of foreground voxels, instead of the constructor's.

        Returns:
            The fused volume [B, C, Z, Y, X], and the new history [B, V, T * C] without gradient. Where a sequence
            starts, the history is the current volume, with gradient, in every slot.

        Raises:
            ValueError: the grid has fewer than ``top_k`` voxels.
        """
        top_k = self.top_k if top_k is None else top_k
        if top_k > grid.num_voxels:
            raise ValueError(f"top_k={top_k} exceeds the {grid.num_voxels} voxels of the stage")
        current = volume.flatten(2).transpose(1, 2)  # [B, V, C]
        embedding = self.occ_embedding(logits.permute(0, 3, 2, 1, 4).flatten(1, 3))
        fused, histories = [], []
        for b, start in enumerate(starts):
            past = self._past(current[b], None if history is None else history[b], start)
            sampled = self._sample(past, index_matrix[b], grid.size_zyx)
            out = self._fuse(current[b], sampled, embedding[b], occupied[b].flatten(), top_k)
            fused.append(out)
            histories.append(torch.cat([out.detach().to(sampled.dtype), sampled.detach()[:, : -self.channels]], 1))
        output = torch.stack(fused).transpose(1, 2).unflatten(2, grid.size_zyx)
        return output, torch.stack(histories) if len(histories) > 1 else histories[0][None]

    def index_matrix(self, grid: VoxelGrid, starts: Sequence[bool], bda: Tensor, previous_bda: Tensor | None,
                     previous_ego_from_ego: Tensor) -> Tensor:
        """[B, 4, 4] ``index_matrix`` of :meth:`forward`, on the device of the matrices (best the CPU).

        Args:
            grid: Voxel grid of the stage.
            starts: Whether a sequence starts, for each of the B slots.
            bda: [B, 4, 4] BEV augmentation.
            previous_bda: [B, 4, 4] that of the previous frame; None before the first frame.
            previous_ego_from_ego: [B, 4, 4] current to previous ego.
        """
        if previous_bda is None:
            previous_bda = bda
        else:  # a volume that starts a sequence is its own past
            restart = torch.tensor(starts, device=bda.device)[:, None, None]
            previous_bda = torch.where(restart, bda, previous_bda)
        return previous_index_from_index(grid, previous_bda, previous_ego_from_ego, bda, self.corner_origin)

    @staticmethod
    def _past(current: Tensor, history: Tensor | None, start: bool) -> Tensor:
        """History rows [V, T * C], or [V, C] when all slots are equal because there is no past."""
        if start:
            return current
        return current.detach() if history is None else history

    def _sample(self, past: Tensor, matrix: Tensor, size_zyx: tuple[int, int, int]) -> Tensor:
        """[V, T * C] past in the current frame."""
        sampled = gather_rows(past, trilinear_taps(matrix, size_zyx))
        return sampled if past.shape[1] > self.channels else sampled.repeat(1, self.history_num)

    def _fuse(self, current: Tensor, sampled: Tensor, embedding: Tensor, occupied: Tensor, top_k: int
              ) -> Tensor:
        """[V, C] fused features of one sample."""
        newest = self.channels * (self.history_num // 2)
        # Two separate selections, as in the reference: with ties at the boundary a voxel may be in both or in neither.
        foreground = occupied.topk(top_k).indices
        background = (1 - occupied).topk(len(occupied) - top_k).indices
        groups = ((foreground, sampled, self.history_fusion_linear),
                  (background, sampled[:, :newest], self.history_fusion_bg_linear))
        output = current
        for index, past, mlp in groups:
            update = mlp(torch.cat([past[index], current[index], embedding[index]], 1))
            output = output.index_add(0, index, update.to(output.dtype))
        return output
