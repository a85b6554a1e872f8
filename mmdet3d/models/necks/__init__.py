"""Necks."""

from .custom_fpn import CustomFPN

__all__ = ["CustomFPN"]
