"""Custom operators: one folder each, with contract, plain reference, CPU and CUDA versions."""

from .bev_pool_v2 import PoolOrder, bev_pool_v2, bev_pool_v2_reference, sort_by_cell
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_reference
from .plane_sweep import plane_sweep, plane_sweep_reference
from .ray_cast import RayHits, ray_cast, ray_cast_reference
from .resize_crop import resize_crop, resize_crop_reference
from .upsample_mlp import upsample_mlp, upsample_mlp_reference

__all__ = [
    "PoolOrder",
    "RayHits",
    "bev_pool_v2",
    "bev_pool_v2_reference",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "plane_sweep",
    "plane_sweep_reference",
    "ray_cast",
    "ray_cast_reference",
    "resize_crop",
    "resize_crop_reference",
    "sort_by_cell",
    "upsample_mlp",
    "upsample_mlp_reference",
]
