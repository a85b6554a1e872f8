"""From images to voxels: camera geometry, depth, lift-splat and the coarse encoder."""

from .depth_net import DepthNet
from .forward_projection import BEVDetStereoForwardProjection, ForwardFeatures
from .lift_splat import LSSForwardProjection, LSSVStereoForwardProjection

__all__ = ["BEVDetStereoForwardProjection", "DepthNet", "ForwardFeatures", "LSSForwardProjection",
           "LSSVStereoForwardProjection"]
