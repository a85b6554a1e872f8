"""What a forward pass of the detector yields, and what its stages can do before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from mmdet3d.models.attention.backward_projection import StageSetup
from mmdet3d.structures import TemporalMemory


class Prepared(NamedTuple):
    """``setup`` of the backward projection and ``warped`` history of the temporal fusion, of one stage."""

    setup: StageSetup | None = None
    history: Tensor | None = None


@dataclass(frozen=True)
class Prediction:
    """Everything a forward pass yields.

    Attributes:
        semantic_logits: [B, X, Y, Z, K] at full resolution.
        flow: [B, X, Y, Z, 2] m/s before background voxels are zeroed; None without a flow head.
        stage_logits: Finest stage first, each [B, X_s, Y_s, Z_s, K].
        volume: [B, C, Z, Y, X] fused volume of the finest stage, the heads' input.
        memory: What to hand to the next frame.
    """

    semantic_logits: Tensor
    flow: Tensor | None
    stage_logits: tuple[Tensor, ...]
    volume: Tensor
    memory: TemporalMemory | None
