"""Trilinear up-sampling fused with the voxel MLP that follows it."""

from .reference import upsample_mlp_reference
from .upsample_mlp import upsample_mlp

__all__ = ["upsample_mlp", "upsample_mlp_reference"]
