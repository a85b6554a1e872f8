"""First occupied voxel along rays."""

from .ray_cast import MAX_STEPS, RayHits, ray_cast
from .reference import ray_cast_reference

__all__ = ["MAX_STEPS", "RayHits", "ray_cast", "ray_cast_reference"]
