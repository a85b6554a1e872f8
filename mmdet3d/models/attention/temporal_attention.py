"""Occlusion-aware temporal self-attention between the previous and the current bird's-eye view."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange, reduce
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.attention.deformable_init import init_projection, init_sampling_offsets, init_zero
from mmdet3d.ops import ms_deform_attn
from mmdet3d.registry import ATTENTION
from mmdet3d.utils.precision import working_dtype


def scrambled_mean(output: Tensor, num_queue: int) -> Tensor:
    """Average the sampled queue entries the way the released weights were trained.

    The contiguous [num_queue * B, Q, C] result is reinterpreted, without a permutation, as [Q, C, B, num_queue]
    before the mean over the last axis. For B = 1 the first half of the queries therefore gets history only, the second
    half the current map only, each the mean of two neighbouring channels; for B > 1 the samples of a batch mix too.
    """
    rows, num_query, channels = output.shape
    mixed = output.reshape(num_query, channels, rows // num_queue, num_queue)
    return reduce(mixed, "query channel batch queue -> batch query channel", "mean")


def queue_mean(output: Tensor, num_queue: int) -> Tensor:
    """Average over the queue of [num_queue * B, Q, C] with row = num_queue * b + entry: [B, Q, C]."""
    return reduce(output, "(batch queue) query channel -> batch query channel", "mean", queue=num_queue)


@ATTENTION.register_module()
class OA_TemporalAttention(BaseModule):  # noqa: N801  (name used by config files)
    """Deformable attention over a queue of history and current map, weighted by predicted occupancy.

    After BEVFormer's temporal self-attention (Li et al. arXiv 2203.17270); point p belongs to the p-th voxel above the
    query, and its weight is multiplied by that voxel's occupied probability.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads.
        num_levels: Must be 1.
        num_points: Points Z per head and queue entry, one per voxel height.
        num_bev_queue: Entries of the queue.
        dropout: Dropout of the output.
        scrambled_reduction: See :func:`scrambled_mean`; False uses :func:`queue_mean`.
        interleaved_history_rows: The history seen by the offset and weight predictors is the first B rows of the
            interleaved queue (for B > 1 rows of other samples too), as the reference trains it. False: each sample's
            own.
    """

    ignored_config_keys = frozenset({"im2col_step", "use_sampling", "norm_cfg", "batch_first", "num_Z_anchors"})

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 1, num_points: int = 4,
                 num_bev_queue: int = 2, dropout: float = 0.1, scrambled_reduction: bool = True,
                 interleaved_history_rows: bool = True, init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if embed_dims % num_heads or num_levels != 1:
            raise ValueError(f"num_heads={num_heads} must divide embed_dims={embed_dims}, and num_levels must be 1, "
                             f"got {num_levels}")
        self.num_heads, self.num_points, self.num_queue = num_heads, num_points, num_bev_queue
        self.scrambled_reduction = scrambled_reduction
        self.interleaved_history_rows = interleaved_history_rows
        samples = num_heads * num_bev_queue * num_points
        self.sampling_offsets = nn.Linear(num_bev_queue * embed_dims + 1, 2 * samples)
        self.attention_weights = nn.Linear(num_bev_queue * embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        self.dropout = nn.Dropout(dropout)
        init_sampling_offsets(self.sampling_offsets, num_heads, num_bev_queue, num_points)
        init_zero(self.attention_weights)
        init_projection(self.value_proj)
        init_projection(self.output_proj)

    def forward(self, query: Tensor, query_pos: Tensor, values: Tensor, reference_points: Tensor, visibility: Tensor,
                bev_size: tuple[int, int], cells: Tensor) -> Tensor:
        """Attend to the queue; the residual is included.

        Args:
            query: [B, Q, C], Q = Y * X.
            query_pos: [B, Q, C] positional encoding.
            values: [2 B, Q, C] queue, row 2 b the history and row 2 b + 1 the current map of sample b.
            reference_points: [2 B, Q, 2] normalised (x, y) of the queries in each row's map.
            visibility: [B, Q, Z] occupied probability above each query.
            bev_size: (Y, X).
            cells: [2] (X, Y) on the device, where an upload would hold up the frame.

        Returns:
            [B, Q, C].
        """
        batch, num_query, _ = query.shape
        history = values[:batch] if self.interleaved_history_rows else values[:: self.num_queue]
        guide = torch.cat([history, query + query_pos], -1)
        guide = guide.to(working_dtype(guide))  # once for both layers
        offsets = self.sampling_offsets(torch.cat([guide, visibility.mean(-1, keepdim=True).to(guide.dtype)], -1))
        weights = self.attention_weights(guide)
        shape = (batch, num_query, self.num_heads, self.num_queue, self.num_points)
        weights = weights.view(shape).softmax(-1) * visibility[:, :, None, None]
        weights = rearrange(weights, "batch query head queue point -> (batch queue) query head 1 point")
        offsets = rearrange(
            offsets.view(*shape, 2), "batch query head queue point xy -> (batch queue) query head point xy")
        locations = reference_points[:, :, None, None] + offsets / cells
        projected = self.value_proj(values).unflatten(-1, (self.num_heads, -1))
        output = ms_deform_attn(projected, [bev_size], locations.unsqueeze(3), weights)
        mean = scrambled_mean if self.scrambled_reduction else queue_mean
        return self.dropout(self.output_proj(mean(output, self.num_queue))) + query
