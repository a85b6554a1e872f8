"""Detectors."""

from .prediction import Prediction
from .stcocc import STCOcc

__all__ = ["Prediction", "STCOcc"]
