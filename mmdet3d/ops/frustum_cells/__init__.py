"""Voxels that the frustum points of cameras fall in."""

from .frustum_cells import FrustumGeometry, frustum_cells
from .reference import frustum_cells_reference

__all__ = ["FrustumGeometry", "frustum_cells", "frustum_cells_reference"]
