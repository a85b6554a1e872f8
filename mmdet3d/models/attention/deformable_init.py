"""Initial values of deformable attention (Zhu et al. arXiv 2010.04159, appendix A.4)."""

from __future__ import annotations

import math

import torch
from torch import nn


def init_sampling_offsets(linear: nn.Linear, num_heads: int, num_maps: int, num_points: int) -> None:
    """Zero weight; bias that sends point p of head a to (p + 1) unit squares along the direction of the head.

    Args:
        linear: Layer with ``num_heads * num_maps * num_points * 2`` outputs in this order.
        num_heads: Heads; their directions are spread evenly over the circle.
        num_maps: Value maps (queue entries times levels) that share the pattern.
        num_points: Points per head and map.
    """
    angle = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().max(-1, keepdim=True).values
    steps = torch.arange(1, num_points + 1, dtype=torch.float32)
    pattern = direction[:, None, None] * steps[:, None]  # [heads, 1, points, 2]
    nn.init.zeros_(linear.weight)
    with torch.no_grad():
        linear.bias.copy_(pattern.expand(-1, num_maps, -1, -1).flatten())


def init_zero(linear: nn.Linear) -> None:
    """Zero weight and bias."""
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)


def init_projection(linear: nn.Linear) -> None:
    """Xavier-uniform weight, zero bias."""
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
