"""A finer volume plus the trilinear x2 of a coarser one, and the mean over its height, in one pass."""

from .reference import upsample_add_reference
from .upsample_add import upsample_add

__all__ = ["upsample_add", "upsample_add_reference"]
