"""Occlusion-aware cross attention: each BEV query looks into the cameras that can see it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.attention.camera_anchors import CameraAnchors
from mmdet3d.models.attention.deformable_init import init_projection
from mmdet3d.ops import assign_queries, depth_consistency
from mmdet3d.registry import ATTENTION, build

EVAL_THRESHOLD = 0.5


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
        shared_occlusion_buffer: The visibility of a query in a camera is that of another query, see
            :func:`assign_queries`, as the released weights expect. False: its own.
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

    def consistency(self, anchors: CameraAnchors, depth: Tensor) -> Tensor:
        """[N, B, Q, Z] how well the anchors fit the depth probability [B, N, D, h, w] of the images; no gradient."""
        rule = self.deformable_attention.depth_fit(self.depth_range)
        return depth_consistency(anchors.position, anchors.depth, anchors.valid, depth, rule)

    def forward(self, query: Tensor, query_pos: Tensor, tokens: Tensor, size: tuple[int, int], anchors: CameraAnchors,
                consistency: Tensor, visibility: Tensor) -> Tensor:
        """Attend to the images; the residual is included.

        Args:
            query: [B, Q, C].
            query_pos: [B, Q, C] positional encoding.
            tokens: [N, B, h * w, C] image features.
            size: (h, w).
            anchors: The queries' anchors in the cameras.
            consistency: [N, B, Q, Z] see :meth:`consistency`.
            visibility: [B, Q, Z] occupied probability of the anchors.

        Returns:
            [B, Q, C].

        Raises:
            ValueError: there is another number of cameras than the constructor was told.
        """
        if len(tokens) != self.num_cams:
            raise ValueError(f"expected the tokens of num_cams={self.num_cams} cameras, got {len(tokens)}")
        seen = self.visible_anchors(anchors.valid, visibility).any(-1)  # [N, B, Q]
        output = self.deformable_attention(query + query_pos, tokens, size, anchors.position, consistency, visibility,
                                           self._visibility_source(seen))
        return self.dropout(self.output_proj(output)) + query

    def visible_anchors(self, valid: Tensor, visibility: Tensor) -> Tensor:
        """[N, B, Q, Z] anchors that fall into a camera and pass the occupancy test.

        The threshold is drawn per anchor in training (a normal around 0.5, truncated to [0, 1]) and 0.5 otherwise.
        When no anchor at all passes, every anchor in a camera counts.
        """
        threshold = EVAL_THRESHOLD
        if self.training:
            threshold = nn.init.trunc_normal_(torch.empty_like(visibility), mean=0.5, std=1.0, a=0.0, b=1.0)
        mask = valid & (visibility > threshold)
        return torch.where(mask.any(), mask, valid)

    def _visibility_source(self, seen: Tensor) -> Tensor:
        """[N, B, Q] int32 query whose visibility each camera reads for a query; -1 where ``seen`` does not hold."""
        if self.shared_occlusion_buffer:
            return assign_queries(seen)
        own = torch.arange(seen.shape[-1], dtype=torch.int32, device=seen.device)
        return torch.where(seen, own, -1)
