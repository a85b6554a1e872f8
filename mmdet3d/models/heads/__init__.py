"""Heads."""

from .flow_head import OccFlowHead
from .occupancy_head import OccHead

__all__ = ["OccFlowHead", "OccHead"]
