"""Evaluation in half precision: the same network with about three decimal digits in convolutions and linear layers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from mmdet3d.utils.fold_batch_norm import fold_batch_norm, is_folded

HALF_LAYERS = (nn.Conv2d, nn.Conv3d, nn.Linear)
"""What runs in half precision. Everything else keeps the precision that autocast gives it."""


def fast_copy(model: nn.Module, dtype: torch.dtype = torch.float16, inplace: bool = False) -> nn.Module:
    """Make a detector for evaluation that is faster and less exact.

    Batch normalisation is folded into the convolutions; weights of convolutions and linear layers are stored in
    ``dtype`` and their inputs brought to it by autocast; so are the histories and, in float16, the differences of the
    plane sweep, whose features must stay below 16000. Geometry, softmax, normalisation, the sums of the custom
    operators and the logits stay in float32. cuDNN searches the fastest algorithm of each convolution when a runner
    first meets it, unless PyTorch's deterministic algorithms are on.

    Args:
        model: Detector with its final weights; it stays as it is unless ``inplace``.
        dtype: float16 keeps as many digits as the TF32 convolutions of the exact mode (10 bits), bfloat16 three bits
            less, but the range of float32, which networks with huge activations need.
        inplace: Change the detector itself.

    Raises:
        ValueError: another dtype.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
    if is_folded(model):
        fast = model if inplace else copy.deepcopy(model)
    else:
        fast = fold_batch_norm(model, inplace=inplace)
    for module in fast.modules():
        if isinstance(module, HALF_LAYERS):
            module.to(dtype)
    fast.inference_dtype = dtype
    return fast.requires_grad_(False)
