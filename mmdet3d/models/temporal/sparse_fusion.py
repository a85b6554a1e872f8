"""Sparse temporal fusion: a long history where something is, half of it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.temporal.volume_warp import gather_rows, previous_index_from_index
from mmdet3d.ops.history_warp import history_warp, trilinear_taps
from mmdet3d.registry import HEADS
from mmdet3d.structures import VoxelGrid
from mmdet3d.utils.precision import Softplus, full_precision, working_dtype


def _mlp(in_features: int, out_features: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_features, out_features), Softplus(), nn.Linear(out_features, out_features))


class PastVolumes(NamedTuple):
    """History of a stage, made ready for a frame before the frame's features are there.

    Attributes:
        history: [B, V, T, C] of the previous frame, in the dtype of the new one; None before the first frame.
        index_matrix: [B, 4, 4] voxel index now to voxel index in the previous frame's volume.
        starts: Whether a sequence starts, for each of the B slots.
        new: [B, V, T, C] that becomes the new history: slot 0 is still to be filled and, where a sequence starts, the
            others too. None before the first frame if no tensor was given for it.
    """

    history: Tensor | None
    index_matrix: Tensor
    starts: tuple[bool, ...]
    new: Tensor | None

    @property
    def goes_on(self) -> bool:
        """True if every slot follows its history, so that ``new`` is warped already."""
        return self.history is not None and not any(self.starts)


def _mlp_of_parts(mlp: nn.Sequential, parts: Sequence[Tensor], fresh: Tensor | None = None) -> Tensor:
    """``mlp(cat(parts, 1))`` without the concatenation.

    Args:
        mlp: Linear layer, activation, linear layer.
        parts: [N, F_i] columns of the input; history first, current features and embedding last.
        fresh: [N, C] zeros that stand for each of the history's slots in the backward pass, or None.
    """
    linear = mlp[0]
    dtype = working_dtype(linear.weight)
    weights = linear.weight.split([part.shape[1] for part in parts], 1)
    products = list(zip(parts, weights, strict=True))
    if fresh is not None:
        history = torch.cat(weights[:-2], 1).detach()
        products.append((fresh, history.unflatten(1, (-1, fresh.shape[1])).sum(1)))
    return mlp[2](mlp[1](_sum_of_products(products, linear.bias, dtype)))


@full_precision
def _sum_of_products(products: Sequence[tuple[Tensor, Tensor]], bias: Tensor, dtype: torch.dtype) -> Tensor:
    """[N, H] ``bias`` plus all rows [N, F_i] times their weights [H, F_i], computed in ``dtype``."""
    total = None
    for rows, weight in products:
        rows, weight = rows.to(dtype), weight.to(dtype).T
        # In place: the backward pass of a product does not ask what it was added to.
        total = torch.addmm(bias.to(dtype), rows, weight) if total is None else total.addmm_(rows, weight)
    return total


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
        self.corner_origin, self.num_classes = corner_origin, num_classes
        channels = single_bev_num_channels
        self.occ_embedding = _mlp(num_classes, occ_embedims)
        self.history_fusion_linear = _mlp(channels * (history_num + 1) + occ_embedims, channels)
        self.history_fusion_bg_linear = _mlp(channels * (history_num // 2 + 1) + occ_embedims, channels)

    def forward(self, volume: Tensor, logits: Tensor, occupied: Tensor, past: PastVolumes, grid: VoxelGrid,
                top_k: int | None = None) -> tuple[Tensor, Tensor]:
        """Fuse a volume with its history.

        Args:
            volume: [B, C, Z, Y, X] current features; not copied if it is channels-last.
            logits: [B, X, Y, Z, K] detached stage logits.
            occupied: [B, Z, Y, X] occupied probability of the stage.
            past: Of :meth:`prepare`, called for this frame.
            grid: Voxel grid of the stage.
            top_k: Number of foreground voxels, instead of the constructor's.

        Returns:
            The fused volume [B, C, Z, Y, X], channels-last in memory, and the new history [B, V, T * C] without
            gradient, in the dtype of autocast where that is on, in which it is read. Where a sequence starts, the
            history is the current volume, with gradient, in every slot.

        Raises:
            ValueError: the grid has fewer than ``top_k`` voxels.
        """
        top_k = self.top_k if top_k is None else top_k
        if top_k > grid.num_voxels:
            raise ValueError(f"top_k={top_k} exceeds the {grid.num_voxels} voxels of the stage")
        current = volume.flatten(2).transpose(1, 2).contiguous()  # [B, V, C]
        embedding = self.occ_embedding(logits.permute(0, 3, 2, 1, 4).flatten(0, 3))
        foreground, background = self._select(occupied.flatten(1), top_k)
        new, oldest = self._warp(current, past, grid.size_zyx, foreground)
        fresh = self._restart_gradient(current, grid.size_zyx, past.starts, past.index_matrix)
        output = self._fuse(current, new, oldest, embedding, fresh, foreground, background)
        new[:, :, 0] = output.detach()
        return output.transpose(1, 2).unflatten(2, grid.size_zyx), new.flatten(2)

    @torch.no_grad()
    def prepare(self, history: Tensor | None, grid: VoxelGrid, starts: Sequence[bool], index_matrix: Tensor,
                out: Tensor | None = None) -> PastVolumes:
        """Do the part of :meth:`forward` that needs no features: warp the history where every sequence goes on.

        Args:
            history: [B, V, T * C] of the previous frame, see :class:`TemporalMemory`; None before the first frame.
            grid: Voxel grid of the stage.
            starts: Whether a sequence starts, for each of the B slots.
            index_matrix: [B, 4, 4] voxel index now to voxel index in the previous frame's volume, see
                :func:`~mmdet3d.models.temporal.volume_warp.previous_index_from_index` and :meth:`index_matrices`.
            out: Contiguous [B, V, T * C] to write the new history to, in memory of its own, without gradient. The
                backward pass reads it, so it may be written again only after that. None for a new tensor.

        Raises:
            ValueError: ``out`` does not fit.
        """
        if out is not None and (out.requires_grad or not out.is_contiguous()):
            raise ValueError("the tensor for the new history must be contiguous and must not require a gradient")
        slots = (self.history_num, self.channels)
        new = None if out is None else out.unflatten(2, slots)
        if history is None:
            return PastVolumes(None, index_matrix, tuple(starts), new)
        history = history.to(self._history_dtype()).unflatten(2, slots)
        past = PastVolumes(history, index_matrix, tuple(starts), torch.empty_like(history) if new is None else new)
        if past.goes_on:
            history_warp(history, index_matrix, grid.size_zyx, out=past.new)
        return past

    def _history_dtype(self) -> torch.dtype:
        """Dtype of a new history: that of autocast; without it at least float32."""
        weight = self.occ_embedding[0].weight
        dtype = working_dtype(weight)
        return dtype if torch.is_autocast_enabled(weight.device.type) else torch.promote_types(dtype, torch.float32)

    def index_matrices(self, grids: Sequence[VoxelGrid], starts: Sequence[bool], bda: Tensor,
                       previous_bda: Tensor | None, previous_ego_from_ego: Tensor) -> Tensor:
        """[G, B, 4, 4] ``index_matrix`` of :meth:`forward` for each grid, on the device of the matrices (best the CPU).

        Args:
            grids: Voxel grids of stages whose temporal fusion has the options of this one.
            starts: Whether a sequence starts, for each of the B slots.
            bda: [B, 4, 4] BEV augmentation.
            previous_bda: [B, 4, 4] that of the previous frame; None before the first frame.
            previous_ego_from_ego: [B, 4, 4] current to previous ego.
        """
        if previous_bda is None:
            previous_bda = bda
        elif any(starts):  # a volume that starts a sequence is its own past
            restart = torch.tensor(starts, device=bda.device)[:, None, None]
            previous_bda = torch.where(restart, bda, previous_bda)
        return previous_index_from_index(grids, previous_bda, previous_ego_from_ego, bda, self.corner_origin)

    @staticmethod
    @torch.no_grad()
    def _select(occupied: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Foreground [B, top_k] and background [B, V - top_k] voxels for the occupied probability [B, V].

        Two separate selections, as in the reference: with ties at the boundary a voxel may be in both or in neither.
        """
        foreground = occupied.topk(top_k, sorted=False).indices
        return foreground, (1 - occupied).topk(occupied.shape[1] - top_k, sorted=False).indices

    @torch.no_grad()
    def _warp(self, current: Tensor, past: PastVolumes, size_zyx: tuple[int, int, int], foreground: Tensor
              ) -> tuple[Tensor, Tensor]:
        """New history [B, V, T, C], slot 0 to be filled, and what leaves it, at the foreground voxels [B, K, C]."""
        history, matrix = past.history, past.index_matrix
        if past.goes_on:
            return past.new, history_warp(history[:, :, -1:], matrix, size_zyx, oldest_at=foreground)[1]
        slots, dtype = (self.history_num, self.channels), self._history_dtype()
        new = current.new_empty(*current.shape[:2], *slots, dtype=dtype) if past.new is None else past.new
        own = current.detach().to(dtype)[:, :, None].expand(-1, -1, *slots)  # its own past: one volume for all slots
        if history is None or all(past.starts):
            return history_warp(own, matrix, size_zyx, oldest_at=foreground, out=new)
        oldest = []
        for b, start in enumerate(past.starts):
            one = slice(b, b + 1)
            oldest.append(history_warp(own[one] if start else history[one], matrix[one], size_zyx,
                                       oldest_at=foreground[one], out=new[one])[1])
        return new, torch.cat(oldest)

    @staticmethod
    def _restart_gradient(current: Tensor, size_zyx: tuple[int, int, int], starts: Sequence[bool],
                          index_matrix: Tensor) -> Tensor | None:
        """[B * V, C] zeros with the gradient of a slot of the warped history: where a sequence starts, current's own.

        The values themselves come from the new history, as in every frame. None where no gradient is asked for.
        """
        if not (torch.is_grad_enabled() and current.requires_grad and any(starts)):
            return None
        slots = [gather_rows(rows, trilinear_taps(matrix, size_zyx)) if start else torch.zeros_like(rows)
                 for rows, matrix, start in zip(current, index_matrix, starts, strict=True)]
        return torch.cat([slot - slot.detach() for slot in slots])

    def _fuse(self, current: Tensor, new: Tensor, oldest: Tensor, embedding: Tensor, fresh: Tensor | None,
              foreground: Tensor, background: Tensor) -> Tensor:
        """[B, V, C] fused features. Arguments as the other methods return them; ``current`` is [B, V, C]."""
        batch, voxels, channels = current.shape
        rows = current.flatten(0, 1)
        # Read through `data`, for autograd another tensor: slot 0, not read here, is written while the others are still
        # needed for the gradients of the weights.
        slots = new.data.flatten(2).flatten(0, 1)  # [B * V, T * C]
        newest = channels * (self.history_num // 2)
        update = _mlp_of_parts(self.history_fusion_bg_linear, (slots[:, channels : channels + newest], rows, embedding),
                               fresh)
        chosen = torch.zeros_like(current[..., 0]).scatter_(1, background, 1)
        output = torch.addcmul(rows, chosen.view(-1, 1), update.to(rows.dtype))
        index = (foreground + torch.arange(0, batch * voxels, voxels, device=foreground.device)[:, None]).flatten()
        past, here, embedded = (part.index_select(0, index) for part in (slots[:, channels:], rows, embedding))
        update = _mlp_of_parts(self.history_fusion_linear, (past, oldest.flatten(0, 1), here, embedded),
                               None if fresh is None else fresh.index_select(0, index))
        return output.index_add(0, index, update.to(rows.dtype)).unflatten(0, (batch, voxels))
