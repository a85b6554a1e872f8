"""Occlusion-aware cross attention from bird's-eye-view queries to cameras, and what prepares its inputs."""

from .assignment import assign_queries
from .depth_consistency import DepthFit, depth_consistency
from .oa_cross_attention import oa_cross_attention
from .projection import project_points
from .reference import (
    assign_queries_reference,
    depth_consistency_reference,
    oa_cross_attention_reference,
    project_points_reference,
)

__all__ = [
    "DepthFit",
    "assign_queries",
    "assign_queries_reference",
    "depth_consistency",
    "depth_consistency_reference",
    "oa_cross_attention",
    "oa_cross_attention_reference",
    "project_points",
    "project_points_reference",
]
