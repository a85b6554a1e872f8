"""BEVPoolv2: sum depth-weighted image features into voxels."""

from .bev_pool_v2 import PoolOrder, bev_pool_v2, bev_pool_v2_stacked, sort_by_cell
from .reference import bev_pool_v2_reference, sort_by_cell_reference

__all__ = ["PoolOrder", "bev_pool_v2", "bev_pool_v2_reference", "bev_pool_v2_stacked", "sort_by_cell",
           "sort_by_cell_reference"]
