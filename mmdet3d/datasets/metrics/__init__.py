"""Metrics as small states that are added to, merged and read: RayIoU with mAVE, and voxel mIoU. No mmcv needed."""

from .ray_iou import RayMetric
from .rays import LABEL_GRID, lidar_rays
from .voxel_iou import VoxelMIoU

__all__ = ["LABEL_GRID", "RayMetric", "VoxelMIoU", "lidar_rays"]
