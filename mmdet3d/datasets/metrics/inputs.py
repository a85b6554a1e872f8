"""Checks of what metrics are given: NumPy arrays or tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor

CHUNK = 32768
"""Rays or voxels counted at once on a CPU: PyTorch does such work in one thread. Starting threads for each of the many
small steps takes far longer than the steps themselves where the CPUs are busy, as in training."""


def as_labels(name: str, labels: Array, size_xyz: Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """``labels`` as uint8 tensor on ``device``.

    Raises:
        TypeError: it holds no integers.
        ValueError: its shape is not ``size_xyz``, or it holds a label that is not among the classes.
    """
    tensor = torch.as_tensor(labels, device=device)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must hold integer labels, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(size_xyz):
        raise ValueError(f"{name} must have shape (X, Y, Z) = {tuple(size_xyz)}, got {tuple(tensor.shape)}")
    if tensor.dtype == torch.uint8 and tensor.device.type != "cpu":
        low, high = 0, int(tensor.max())
    elif tensor.device.type == "cpu":  # NumPy starts no threads for so little work
        low, high = int(tensor.numpy().min()), int(tensor.numpy().max())
    else:
        low, high = (int(bound) for bound in torch.stack(tensor.aminmax()).tolist())
    if low < 0 or high >= num_classes:
        found = low if low < 0 else high
        raise ValueError(f"{name} holds label {found}; the class table has labels 0 to {num_classes - 1}")
    return tensor.to(torch.uint8)


def as_flow(name: str, flow: Array, size_xyz: Sequence[int], device: torch.device) -> Tensor:
    """``flow`` as (X, Y, Z, 2) floating tensor on ``device``.

    Raises:
        TypeError: it holds no floating point numbers.
        ValueError: its shape is wrong.
    """
    tensor = torch.as_tensor(flow, device=device)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must hold floating point numbers, got {tensor.dtype}")
    if tuple(tensor.shape) != (*size_xyz, 2):
        raise ValueError(f"{name} must have shape (X, Y, Z, 2) = {(*size_xyz, 2)}, got {tuple(tensor.shape)}")
    return tensor


def as_origins(origins: Array) -> np.ndarray:
    """``origins`` as (T, 3) float64 array.

    Raises:
        ValueError: its shape is wrong, or a coordinate is not finite.
    """
    array = np.asarray(origins.detach().cpu() if isinstance(origins, Tensor) else origins, np.float64)
    if array.ndim != 2 or array.shape[1] != 3:
        raise ValueError(f"origins must have shape (T, 3), got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("origins must be finite")
    return array
