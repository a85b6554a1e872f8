"""Bicubic resizing of that part of an image which is kept."""

from .reference import resize_crop_reference
from .resize_crop import resize_crop

__all__ = ["resize_crop", "resize_crop_reference"]
