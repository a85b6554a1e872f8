"""Custom operators: one folder each, with contract, plain reference, CPU and CUDA versions."""

from .bev_pool_v2 import PoolOrder, bev_pool_v2, bev_pool_v2_reference, bev_pool_v2_stacked, sort_by_cell
from .class_guidance import class_guidance, class_guidance_reference
from .frustum_cells import FrustumGeometry, frustum_cells, frustum_cells_reference
from .history_warp import history_warp, history_warp_reference
from .ms_deform_attn import ms_deform_attn, ms_deform_attn_reference
from .oa_cross_attention import (
    DepthFit,
    assign_queries,
    assign_queries_reference,
    depth_consistency,
    depth_consistency_reference,
    oa_cross_attention,
    oa_cross_attention_reference,
    project_points,
    project_points_reference,
)
from .plane_sweep import plane_sweep, plane_sweep_reference
from .ray_cast import RayHits, ray_cast, ray_cast_reference
from .ray_counts import RayTotals, ray_counts, ray_counts_reference
from .resize_crop import resize_crop, resize_crop_reference
from .row_argmax import row_argmax, row_argmax_reference
from .upsample_add import upsample_add, upsample_add_reference
from .upsample_mlp import upsample_mlp, upsample_mlp_reference

__all__ = [
    "DepthFit",
    "FrustumGeometry",
    "PoolOrder",
    "RayHits",
    "RayTotals",
    "assign_queries",
    "assign_queries_reference",
    "bev_pool_v2",
    "bev_pool_v2_reference",
    "bev_pool_v2_stacked",
    "class_guidance",
    "class_guidance_reference",
    "depth_consistency",
    "depth_consistency_reference",
    "frustum_cells",
    "frustum_cells_reference",
    "history_warp",
    "history_warp_reference",
    "ms_deform_attn",
    "ms_deform_attn_reference",
    "oa_cross_attention",
    "oa_cross_attention_reference",
    "plane_sweep",
    "plane_sweep_reference",
    "project_points",
    "project_points_reference",
    "ray_cast",
    "ray_cast_reference",
    "ray_counts",
    "ray_counts_reference",
    "resize_crop",
    "resize_crop_reference",
    "row_argmax",
    "row_argmax_reference",
    "sort_by_cell",
    "upsample_add",
    "upsample_add_reference",
    "upsample_mlp",
    "upsample_mlp_reference",
]
