"""The operators of occlusion-aware cross attention in plain PyTorch: what the compiled versions are judged by.

Shapes do not depend on the data, so that nothing here waits for a GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..ms_deform_attn.reference import sample_level

if TYPE_CHECKING:
    from .depth_consistency import DepthFit


def project_points_reference(
    points: Tensor, image_from_points: Tensor, span: tuple[float, float], min_depth: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One product of matrices, and what follows; same contract as ``project_points``."""
    camera = torch.einsum("bnij,qzj->nbqzi", image_from_points, points)
    depth = camera[..., 2]
    pixels = camera[..., :2] / depth.clamp(min=min_depth).unsqueeze(-1)
    position = torch.stack((pixels[..., 0] / span[0], pixels[..., 1] / span[1]), dim=-1)
    valid = (depth > min_depth) & (position > 0).all(-1) & (position < 1).all(-1)
    return position, depth, valid


def assign_queries_reference(seen: Tensor) -> Tensor:
    """Cameras overwrite one buffer of query indices after the other; same contract as ``assign_queries``."""
    _, B, Q = seen.shape
    place = seen.cumsum(-1) - 1
    index = torch.arange(Q, device=seen.device).expand(B, Q)
    buffer = index.new_zeros(B, Q + 1)  # the last column takes what a camera does not see
    for camera_seen, camera_place in zip(seen, place, strict=True):
        buffer = buffer.scatter(1, torch.where(camera_seen, camera_place, Q), index)
    found = buffer.expand(seen.shape[0], B, Q + 1).gather(2, place.clamp(min=0))
    return torch.where(seen, found, -1).int()


def depth_consistency_reference(
    position: Tensor, anchor_depth: Tensor, valid: Tensor, depth: Tensor, rule: DepthFit
) -> Tensor:
    """Samples, softmax and arg max of one camera after the other; same contract as ``depth_consistency``."""
    B, _, D, h, w = depth.shape
    fits = []
    for camera, (where, metres) in enumerate(zip(position, anchor_depth, strict=True)):
        value = depth[:, camera].flatten(2).transpose(1, 2).unsqueeze(2)  # (B, h * w, 1, D)
        sampled = sample_level(value, (h, w), where.flatten(1, 2)[:, :, None, None])
        sampled = sampled.view(*metres.shape, D)
        if rule.softmax_depth:
            sampled = sampled.softmax(-1)
        fits.append(_fit(metres, rule.step * sampled.argmax(-1) + rule.first, rule))
    fit = torch.stack(fits) if fits else torch.zeros_like(anchor_depth)
    return torch.where(valid.any(-1, keepdim=True), fit, 0)


def _fit(anchor_depth: Tensor, likely: Tensor, rule: DepthFit) -> Tensor:
    distance = (anchor_depth - likely).abs()
    if rule.distance_to_neighbours:
        nearer, farther = likely - rule.step, likely + rule.step
        distance = torch.minimum((anchor_depth - nearer).abs(), (anchor_depth - farther).abs())
    if rule.squared_sigma:
        return torch.exp(-distance.square() / 2 * rule.sigma**2)
    return torch.exp(-distance.square() / (2 * rule.sigma**2))


def oa_cross_attention_reference(
    value: Tensor,
    size: tuple[int, int],
    base_offsets: Tensor,
    offset_slope: Tensor,
    attention_weights: Tensor,
    position: Tensor,
    consistency: Tensor,
    visibility: Tensor,
    source: Tensor,
) -> Tensor:
    """One camera after the other; same contract as ``oa_cross_attention``."""
    height, width = size
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    N, B, _, M, D = value.shape
    _, Q, _, P, _ = base_offsets.shape
    total = torch.zeros(B, Q, M, D, dtype=dtype, device=value.device)
    for camera in range(N):
        sees = (source[camera] >= 0) & (source[camera] < Q)  # (B, Q)
        row = torch.where(sees, source[camera], 0).long()
        visible = visibility.gather(1, row.unsqueeze(-1).expand(B, Q, P)) * sees.unsqueeze(-1)  # (B, Q, P)
        offsets = base_offsets + visible.mean(-1)[..., None, None, None] * offset_slope
        x, y = offsets[..., 0] / width, offsets[..., 1] / height
        locations = position[camera].unsqueeze(2) + torch.stack((x, y), dim=-1)  # (B, Q, M, P, 2)
        weights = attention_weights * torch.where(sees.unsqueeze(-1), consistency[camera] * visible, 0).unsqueeze(2)
        samples = sample_level(value[camera].to(dtype), (height, width), locations)
        total = total + (weights.unsqueeze(-1) * samples).sum(dim=3)
    count = ((source >= 0) & (source < Q)).sum(0).clamp(min=1)
    return (total / count[..., None, None]).flatten(2)
