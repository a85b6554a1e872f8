"""Multi-scale deformable attention in plain PyTorch: what the compiled versions are judged by."""

from collections.abc import Sequence

import torch
from torch import Tensor


def sample_level(value: Tensor, size: tuple[int, int], locations: Tensor) -> Tensor:
    """Bilinear samples of one map, zero outside.

    Args:
        value: (B, H * W, M, D) map, row by row.
        size: (H, W).
        locations: (B, Q, M, P, 2) (x, y), where [0, 1] spans the map from border to border.

    Returns:
        (B, Q, M, P, D) samples.
    """
    H, W = size
    B, Q, M, P, _ = locations.shape
    x, y = locations[..., 0] * W - 0.5, locations[..., 1] * H - 0.5  # pixels; the centre of pixel 0 is 0
    # Written so that NaN is not inside; -2 makes all four taps of such a point fall off the map.
    inside = (x > -1) & (x < W) & (y > -1) & (y < H)
    x, y = torch.where(inside, x, -2), torch.where(inside, y, -2)
    left, top = x.detach().floor(), y.detach().floor()
    sample = torch.arange(B, device=value.device).view(B, 1, 1, 1)
    head = torch.arange(M, device=value.device).view(1, 1, M, 1)
    samples = value.new_zeros(B, Q, M, P, value.shape[-1])
    for row, row_weight in ((top, top + 1 - y), (top + 1, y - top)):
        for column, column_weight in ((left, left + 1 - x), (left + 1, x - left)):
            on_map = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            pixel = torch.where(on_map, row * W + column, 0).long()
            tap = torch.where(on_map.unsqueeze(-1), value[sample, pixel, head], 0)
            samples = samples + (row_weight * column_weight).unsqueeze(-1) * tap
    return samples


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Weighted sum of the samples of all levels; same contract as ``ms_deform_attn``."""
    B, _, M, D = value.shape
    Q = sampling_locations.shape[1]
    # Half precision is sampled and summed in float32, as the kernels do.
    dtype = value.dtype if value.dtype == torch.float64 else torch.float32
    locations, weights = sampling_locations.to(dtype), attention_weights.to(dtype)
    out = torch.zeros(B, Q, M, D, dtype=dtype, device=value.device)
    maps = value.to(dtype).split([H * W for H, W in spatial_shapes], dim=1)
    for level, (size, level_value) in enumerate(zip(spatial_shapes, maps, strict=True)):
        samples = sample_level(level_value, size, locations[:, :, :, level])  # (B, Q, M, P, D)
        out = out + (weights[:, :, :, level].unsqueeze(-1) * samples).sum(dim=3)
    return out.reshape(B, Q, M * D).to(value.dtype)
