"""Multi-scale deformable attention: weighted bilinear samples of feature maps at free locations."""

from .ms_deform_attn import ms_deform_attn
from .reference import ms_deform_attn_reference

__all__ = ["ms_deform_attn", "ms_deform_attn_reference"]
