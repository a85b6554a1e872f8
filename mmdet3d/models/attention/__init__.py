"""Occlusion-aware attention: the backward projection of each stage and its parts."""

from .backward_projection import BEVFormerBackwardProjection
from .deformable_attention3d import OA_MSDeformableAttention3D
from .encoder import BEVFormerEncoder
from .encoder_layer import BEVFormerEncoderLayer
from .positional_encoding import CustomLearnedPositionalEncoding
from .spatial_cross_attention import OA_SpatialCrossAttention
from .temporal_attention import OA_TemporalAttention
from .transformer import BEVFormer

__all__ = ["BEVFormer", "BEVFormerBackwardProjection", "BEVFormerEncoder", "BEVFormerEncoderLayer",
           "CustomLearnedPositionalEncoding", "OA_MSDeformableAttention3D", "OA_SpatialCrossAttention",
           "OA_TemporalAttention"]
