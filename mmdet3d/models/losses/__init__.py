"""Losses of the occupancy logits at each scale, of the flow and of the depth distribution."""

from mmdet3d.models.losses.affinity import geometric_affinity_loss, negative_log, semantic_affinity_loss
from mmdet3d.models.losses.depth import depth_loss, depth_targets
from mmdet3d.models.losses.flow import flow_loss
from mmdet3d.models.losses.focal import CustomFocalLoss
from mmdet3d.models.losses.lovasz import lovasz_softmax_loss
from mmdet3d.models.losses.voxel import VoxelLosses

__all__ = ["CustomFocalLoss", "VoxelLosses", "depth_loss", "depth_targets", "flow_loss", "geometric_affinity_loss",
           "lovasz_softmax_loss", "negative_log", "semantic_affinity_loss"]
