"""Occlusion-aware cross attention: each BEV query looks into the cameras that can see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.attention.camera_anchors import CameraAnchors
from mmdet3d.models.attention.deformable_init import init_projection
from mmdet3d.registry import ATTENTION, build

EVAL_THRESHOLD = 0.5


class CameraQueries(NamedTuple):
    """The queries that each camera attends to, as padded lists.

    Attributes:
        index: [N, B, L] query index of each list entry, in ascending order; 0 in the padding.
        camera, sample, query, slot: [P] camera n, sample b, query q and list position j of each of the P entries.
        count: [B, Q] number of cameras that see a query, at least 1.
    """

    index: Tensor
    camera: Tensor
    sample: Tensor
    query: Tensor
    slot: Tensor
    count: Tensor


def select_queries(seen: Tensor) -> CameraQueries:
    """List the queries of each camera, for the mask ``seen`` [N, B, Q]."""
    camera, sample, query = seen.nonzero(as_tuple=True)
    position = seen.cumsum(-1) - 1
    slot = position[camera, sample, query]
    length = int(seen.sum(-1).max()) if seen.numel() else 0
    index = seen.new_zeros((*seen.shape[:2], length), dtype=torch.long)
    index[camera, sample, slot] = query
    return CameraQueries(index, camera, sample, query, slot, seen.sum(0).clamp(min=1))


def shared_buffer_source(queries: CameraQueries, num_query: int) -> Tensor:
    """[B, L] query whose visibility the shared buffer holds at each list position.

    The reference gathers visibility for one camera after the other into a single buffer, so position j ends up with
    the j-th query of the last camera whose list is longer than j; all cameras then read that buffer.
    """
    _, batch, length = queries.index.shape
    newest = queries.query.new_full((batch * length,), 0)
    # A larger camera index wins whatever the query, so the maximum of (camera, query) is the last write.
    rank = queries.camera * num_query + queries.query
    newest.scatter_reduce_(0, queries.sample * length + queries.slot, rank, "amax")
    return (newest % num_query).view(batch, length)


@ATTENTION.register_module()
class OA_SpatialCrossAttention(BaseModule):  # noqa: N801  (name used by config files)
    """Cross attention from BEV queries to camera images, restricted to anchors that are likely occupied.

    After BEVFormer's spatial cross-attention (Li et al. arXiv 2203.17270) and FB-BEV's depth consistency (Li et al.
    arXiv 2308.02236).

    Args:
        embed_dims: Channels C.
        num_cams: Cameras N.
        dbound: (first, end, step) of the depth bins, metres.
        deformable_attention: Config of the per-camera attention.
        dropout: Dropout of the output.
        shared_occlusion_buffer: See :func:`shared_buffer_source`. False: every camera reads its own queries' values.
    """

    ignored_config_keys = frozenset({"pc_range", "batch_first", "norm_cfg"})

    def __init__(self, deformable_attention: Mapping, embed_dims: int = 256, num_cams: int = 6,
                 dbound: Sequence[float] = (1.0, 45.0, 0.5), dropout: float = 0.1, layer_scale: float | None = None,
                 shared_occlusion_buffer: bool = True, init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if layer_scale is not None:
            raise ValueError("layer_scale is not supported (the reference registers it but never applies it)")
        self.num_cams = num_cams
        self.depth_range = tuple(float(v) for v in dbound)
        self.shared_occlusion_buffer = shared_occlusion_buffer
        self.dropout = nn.Dropout(dropout)
        self.deformable_attention = build(deformable_attention, "deformable_attention")
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        init_projection(self.output_proj)

    def forward(self, query: Tensor, query_pos: Tensor, tokens: Tensor, anchors: CameraAnchors, visibility: Tensor,
                depth: Tensor) -> Tensor:
        """Attend to the images; the residual is included.

        Args:
            query: [B, Q, C].
            query_pos: [B, Q, C] positional encoding.
            tokens: [N, B, h * w, C] image features.
            anchors: The queries' anchors in the cameras.
            visibility: [B, Q, Z] occupied probability of the anchors.
            depth: [B, N, D, h, w] depth probability.

        Returns:
            [B, Q, C].
        """
        seen = self.visible_anchors(anchors.valid, visibility).any(-1)  # [N, B, Q]
        queries = select_queries(seen)
        slots = self._attend(query + query_pos, tokens, anchors, visibility, depth, queries)
        output = self.output_proj(slots / queries.count[..., None])
        return self.dropout(output) + query

    def visible_anchors(self, valid: Tensor, visibility: Tensor) -> Tensor:
        """[N, B, Q, Z] anchors that fall into a camera and pass the occupancy test.

        The threshold is drawn per anchor in training (a normal around 0.5, truncated to [0, 1]) and 0.5 otherwise.
        When no anchor at all passes, every anchor in a camera counts.
        """
        threshold = torch.full_like(visibility, EVAL_THRESHOLD)
        if self.training:
            nn.init.trunc_normal_(threshold, mean=0.5, std=1.0, a=0.0, b=1.0)
        mask = valid & (threshold < visibility)
        return torch.where(mask.any(), mask, valid)

    def _attend(self, query: Tensor, tokens: Tensor, anchors: CameraAnchors, visibility: Tensor, depth: Tensor,
                queries: CameraQueries) -> Tensor:
        batch, num_query, channels = query.shape
        cameras = torch.arange(self.num_cams, device=query.device)[:, None, None]
        samples = torch.arange(batch, device=query.device)[:, None]
        if self.shared_occlusion_buffer:
            source = shared_buffer_source(queries, num_query).expand(self.num_cams, -1, -1)
        else:
            source = queries.index
        per_camera = self.deformable_attention(
            query[samples, queries.index].flatten(0, 1), tokens.flatten(0, 1),
            anchors.position[cameras, samples, queries.index].flatten(0, 1),
            anchors.depth[cameras, samples, queries.index].flatten(0, 1),
            visibility[samples, source].flatten(0, 1),
            depth.transpose(0, 1).flatten(0, 1), self.depth_range)  # [N * B, L, C]
        entries = per_camera.unflatten(0, (self.num_cams, batch))[queries.camera, queries.sample, queries.slot]
        slots = entries.new_zeros(batch * num_query, channels)
        return slots.index_add(0, queries.sample * num_query + queries.query, entries).view_as(query)
