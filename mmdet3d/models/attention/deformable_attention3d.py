"""Deformable attention of BEV queries in camera images, weighted by depth consistency and occupancy."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.attention.deformable_init import init_projection, init_sampling_offsets, init_zero
from mmdet3d.ops import ms_deform_attn
from mmdet3d.registry import ATTENTION


@ATTENTION.register_module()
class OA_MSDeformableAttention3D(BaseModule):  # noqa: N801  (name used by config files)
    """One sampling point per 3D anchor; its weight says how likely the image shows that anchor.

    The weight of an anchor is the softmax attention times its occupied probability times a Gaussian of the distance
    between the anchor's depth and the most probable depth at its image position.

    Args:
        embed_dims: Channels C.
        num_heads: Attention heads.
        num_levels: Must be 1.
        num_points: Anchors Z per query.
        sigma: Width of the Gaussian.
        squared_sigma: The exponent is ``-mu^2 / 2 * sigma^2`` evaluated left to right, as the released weights
            expect. False: ``-mu^2 / (2 sigma^2)``.
        distance_to_neighbours: ``mu`` is the distance to the nearer of the two depth bins next to the most probable
            one, as the released weights expect. False: to the most probable bin itself.
        softmax_depth: Apply a softmax to the (already normalised) sampled depth distribution before the arg max, as
            the reference does; it only decides ties.
    """

    ignored_config_keys = frozenset({"im2col_step", "dropout", "batch_first", "norm_cfg", "num_Z_anchors"})

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 1, num_points: int = 8,
                 sigma: float = 2, squared_sigma: bool = True, distance_to_neighbours: bool = True,
                 softmax_depth: bool = True, init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if embed_dims % num_heads or num_levels != 1:
            raise ValueError(f"num_heads={num_heads} must divide embed_dims={embed_dims}, and num_levels must be 1, "
                             f"got {num_levels}")
        self.num_heads, self.num_points = num_heads, num_points
        self.sigma = sigma
        self.squared_sigma = squared_sigma
        self.distance_to_neighbours = distance_to_neighbours
        self.softmax_depth = softmax_depth
        self.sampling_offsets = nn.Linear(embed_dims + 1, num_heads * num_points * 2)
        self.attention_weights = nn.Linear(embed_dims, num_heads * num_points)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        init_sampling_offsets(self.sampling_offsets, num_heads, 1, num_points)
        init_zero(self.attention_weights)
        init_projection(self.value_proj)

    def forward(self, query: Tensor, tokens: Tensor, position: Tensor, anchor_depth: Tensor, visibility: Tensor,
                depth: Tensor, depth_range: tuple[float, float, float]) -> Tensor:
        """Sample the image features of each camera at the anchors of the queries it sees.

        Args:
            query: [M, L, C] queries, positional encoding included; M = N * B cameras, L queries each.
            tokens: [M, h * w, C] image features.
            position: [M, L, Z, 2] normalised image position of the anchors.
            anchor_depth: [M, L, Z] metres.
            visibility: [M, L, Z] occupied probability.
            depth: [M, D, h, w] depth probability.
            depth_range: (first, end, step) of the depth bins, metres.

        Returns:
            [M, L, C].
        """
        cameras, length, _ = query.shape
        height, width = depth.shape[-2:]
        shape = (cameras, length, self.num_heads, self.num_points)
        offsets = self.sampling_offsets(torch.cat([query, visibility.mean(-1, keepdim=True)], -1)).view(*shape, 2)
        locations = position[:, :, None] + offsets / offsets.new_tensor((width, height))
        consistency = self.depth_consistency(position, anchor_depth, depth, depth_range)
        weights = self.attention_weights(query).view(shape).softmax(-1) * (consistency * visibility)[:, :, None]
        value = self.value_proj(tokens).unflatten(-1, (self.num_heads, -1))
        return ms_deform_attn(value, [(height, width)], locations.unsqueeze(3), weights.unsqueeze(3))

    @torch.no_grad()
    def depth_consistency(self, position: Tensor, anchor_depth: Tensor, depth: Tensor,
                          depth_range: tuple[float, float, float]) -> Tensor:
        """[M, L, Z] in (0, 1]: how well an anchor's depth fits the most probable depth at its image position."""
        cameras, bins, height, width = depth.shape
        start, _, step = depth_range
        value = depth.flatten(2).transpose(1, 2).unsqueeze(2)  # [M, h * w, 1, D]
        where = position.flatten(1, 2)[:, :, None, None, None]  # [M, L * Z, 1, 1, 1, 2]
        sampled = ms_deform_attn(value, [(height, width)], where, where.new_ones(where.shape[:-1]))
        sampled = sampled.view(*position.shape[:-1], bins)
        if self.softmax_depth:
            sampled = sampled.softmax(-1)
        likely = step * sampled.argmax(-1) + start
        if self.distance_to_neighbours:
            distance = torch.minimum((anchor_depth - (likely - step)).abs(), (anchor_depth - (likely + step)).abs())
        else:
            distance = (anchor_depth - likely).abs()
        if self.squared_sigma:
            return torch.exp(-distance.square() / 2 * self.sigma**2)
        return torch.exp(-distance.square() / (2 * self.sigma**2))
