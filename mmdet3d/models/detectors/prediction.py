"""Results of a forward pass of the detector, and the part of its stages that needs no features of the frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mmdet3d.models.attention.backward_projection import StageSetup
from mmdet3d.models.temporal.sparse_fusion import PastVolumes
from mmdet3d.structures import TemporalMemory
from mmdet3d.utils.transfer import to_numpy


class StagePrecompute(NamedTuple):
    """Of one stage: ``setup`` of its backward projection, and its history, made ready by the temporal fusion."""

    setup: StageSetup
    past: PastVolumes | None


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


def result_dict(semantics: Tensor, flow: Tensor, indices: Sequence[Any]) -> dict[str, Any]:
    """Give a batch of predictions the form of mmdet-style results.

    Args:
        semantics: uint8 [B, X, Y, Z] class of each voxel.
        flow: float16 [B, X, Y, Z, 2] m/s.
        indices: Number of each of the B samples in its data set, or None.

    Returns:
        ``occ_results`` and ``flow_results``, NumPy arrays of the same dtypes and shapes, and ``index``, a list.
    """
    semantics, flow = to_numpy(semantics, flow)
    return {"occ_results": semantics, "flow_results": flow, "index": list(indices)}
