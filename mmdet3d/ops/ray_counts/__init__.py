"""Counters of the ray metric, from where the rays of prediction and ground truth end."""

from .ray_counts import ray_counts
from .reference import ray_counts_reference
from .totals import GT_LABEL, PRED_FLOW, PRED_LABEL, RayTotals

__all__ = ["GT_LABEL", "PRED_FLOW", "PRED_LABEL", "RayTotals", "ray_counts", "ray_counts_reference"]
