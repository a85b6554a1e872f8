"""Re-sampling of a history of volumes into the current ego frame."""

from .history_warp import history_warp
from .reference import history_warp_reference, trilinear_taps

__all__ = ["history_warp", "history_warp_reference", "trilinear_taps"]
