"""Plain PyTorch version of ``upsample_mlp``: what the compiled versions are tested against."""

import torch
from torch import Tensor
from torch.nn import functional as F


def upsample_rows(rows: Tensor, first: int, last: int) -> Tensor:
    """Fine rows ``first`` <= x < ``last`` (both even) of the trilinear x2 of (B, Z, Y, X, H): (B, n, 2 Y, 2 Z, H)."""
    low, high = max(first // 2 - 1, 0), min(last // 2 + 1, rows.shape[3])
    volume = rows[:, :, :, low:high].permute(0, 4, 1, 2, 3)
    fine = F.interpolate(volume, scale_factor=2, mode="trilinear", align_corners=False)
    return fine[..., first - 2 * low : last - 2 * low].permute(0, 4, 3, 2, 1)


def upsample_mlp_slab(hidden: Tensor, weight: Tensor, bias: Tensor, fine: Tensor | None, residual: Tensor | None,
                      residual_weight: float, first: int, last: int) -> Tensor:
    """``upsample_mlp`` for the fine rows ``first`` <= x < ``last``; ``fine`` holds these rows only."""
    before = upsample_rows(hidden, first, last)
    if fine is not None:
        before = before + fine
    out = F.linear(F.softplus(before), weight, bias)
    if residual is not None:
        out = out + residual_weight * upsample_rows(residual.permute(0, 3, 2, 1, 4), first, last)
    return out


def upsample_mlp_reference(hidden: Tensor, weight: Tensor, bias: Tensor, *, fine: Tensor | None = None,
                           residual: Tensor | None = None, residual_weight: float = 1.0) -> Tensor:
    """See ``upsample_mlp``; differentiable in everything but ``residual``."""
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    hidden, weight, bias = hidden.to(accumulate), weight.to(accumulate), bias.to(accumulate)
    fine = None if fine is None else fine.to(accumulate)
    residual = None if residual is None else residual.detach().to(accumulate)
    with torch.autocast(hidden.device.type, enabled=False):
        return upsample_mlp_slab(hidden, weight, bias, fine, residual, residual_weight, 0, 2 * hidden.shape[3])
