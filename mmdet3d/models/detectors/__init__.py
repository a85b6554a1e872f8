"""Detectors."""

from .stcocc import Prediction, STCOcc

__all__ = ["Prediction", "STCOcc"]
