"""Temporal fusion."""

from .sparse_fusion import SparseFusion

__all__ = ["SparseFusion"]
