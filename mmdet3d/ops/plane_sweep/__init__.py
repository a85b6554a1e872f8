"""Stereo cost volume by plane sweeping."""

from .geometry import SweepGeometry
from .plane_sweep import plane_sweep, plane_sweep_probability
from .reference import plane_sweep_reference

__all__ = ["SweepGeometry", "plane_sweep", "plane_sweep_probability", "plane_sweep_reference"]
