"""Custom operators: one folder each, with contract, plain reference, CPU and CUDA versions."""

from .bev_pool_v2 import PoolOrder, bev_pool_v2, bev_pool_v2_reference, sort_by_cell
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_reference
from .plane_sweep import plane_sweep, plane_sweep_reference

__all__ = [
    "PoolOrder",
    "bev_pool_v2",
    "bev_pool_v2_reference",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "plane_sweep",
    "plane_sweep_reference",
    "sort_by_cell",
]
