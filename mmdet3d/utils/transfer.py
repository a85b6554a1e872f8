"""From the device to the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_numpy(*tensors: Tensor) -> tuple[np.ndarray, ...]:
    """NumPy arrays of tensors; from a GPU through page-locked memory, with one wait for all of them."""
    if not any(tensor.is_cuda for tensor in tensors):
        return tuple(tensor.detach().cpu().numpy() for tensor in tensors)
    copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor.detach(), non_blocking=True)
              for tensor in tensors]
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return tuple(copy.numpy() for copy in copies)
