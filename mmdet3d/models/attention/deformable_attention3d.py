"""Deformable attention of BEV queries in camera images, weighted by depth consistency and occupancy."""

from __future__ import annotations

from collections.abc import Mapping

from mmcv.runner import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmdet3d.models.attention.deformable_init import init_projection, init_sampling_offsets, init_zero
from mmdet3d.ops import DepthFit, oa_cross_attention
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

    def depth_fit(self, depth_range: tuple[float, float, float]) -> DepthFit:
        """Rule of the depth weights, for depth bins (first, end, step) in metres."""
        first, _, step = depth_range
        return DepthFit(first, step, self.sigma, self.squared_sigma, self.distance_to_neighbours, self.softmax_depth)

    def forward(self, query: Tensor, tokens: Tensor, size: tuple[int, int], position: Tensor, consistency: Tensor,
                visibility: Tensor, source: Tensor) -> Tensor:
        """Sample the image features of the cameras that see a query at its anchors, and average them.

        Args:
            query: [B, Q, C] queries, positional encoding included.
            tokens: [N, B, h * w, C] image features.
            size: (h, w).
            position: [N, B, Q, Z, 2] normalised image position of the anchors.
            consistency: [N, B, Q, Z] how well the anchors fit the depth of the images.
            visibility: [B, Q, Z] occupied probability.
            source: [N, B, Q] int32 query whose visibility counts for a query in a camera, -1 if that does not see it.

        Returns:
            [B, Q, C]; 0 for queries that no camera sees.
        """
        shape = (self.num_heads, self.num_points)
        # The last input is the mean visibility, which differs from camera to camera: the operator adds its part.
        weight, bias = self.sampling_offsets.weight, self.sampling_offsets.bias
        offsets = F.linear(query, weight[:, :-1], bias).unflatten(-1, (*shape, 2))
        weights = self.attention_weights(query).unflatten(-1, shape).softmax(-1)
        value = self.value_proj(tokens).unflatten(-1, (self.num_heads, -1))
        return oa_cross_attention(value, size, offsets, weight[:, -1].view(*shape, 2), weights, position, consistency,
                                  visibility, source)
