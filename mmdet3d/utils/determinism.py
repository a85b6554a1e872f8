"""The same bits in every run, as far as PyTorch's operators allow it."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

_WORKSPACES = (":4096:8", ":16:8")


def set_deterministic() -> None:
    """Make this process choose deterministic algorithms; call it before the first CUDA operation.

    cuDNN neither searches for the fastest algorithm nor takes one that varies. Operators of PyTorch that know no other
    way warn and run as they are; with PyTorch 2.11 none of those matters to the published models, whose trainings on
    CUDA repeat bit for bit in this mode. The operators of this project are deterministic in it;
    :func:`mmdet3d.ops.ms_deform_attn` says what its mode rounds.

    The mode holds until the process ends or ``torch.use_deterministic_algorithms(False)``.
    """
    setting = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", _WORKSPACES[0])
    if setting not in _WORKSPACES:
        logger.warning("CUBLAS_WORKSPACE_CONFIG=%s: matrix products on CUDA are only reproducible with one of %s",
                       setting, ", ".join(_WORKSPACES))
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
