"""Checks of what metrics are given: NumPy arrays or tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray | Tensor

CHUNK = 32768
"""Rays or voxels counted at once on a CPU: PyTorch does such work in one thread. Starting threads for each of the many
small steps takes far longer than the steps themselves where the CPUs are busy, as in training."""


def label_text(name: str, label: int, num_classes: int) -> str:
    """What is wrong with a grid ``name`` that holds ``label``."""
    return f"{name} holds label {label}; the class table has labels 0 to {num_classes - 1}"


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``; from the memory of the CPU to a GPU without waiting for what the GPU is doing."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def as_labels(name: str, labels: Array, size_xyz: Sequence[int], num_classes: int, device: torch.device) -> Tensor:
    """``labels`` as uint8 tensor on ``device``, without waiting for a GPU if they are uint8 or in the CPU's memory.

    Raises:
        TypeError: it holds no integers.
        ValueError: its shape is not ``size_xyz``, or it holds a label that is not among the classes and is not uint8.
    """
    tensor = torch.as_tensor(labels)
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must hold integer labels, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(size_xyz):
        raise ValueError(f"{name} must have shape (X, Y, Z) = {tuple(size_xyz)}, got {tuple(tensor.shape)}")
    if tensor.dtype != torch.uint8:
        if tensor.device.type == "cpu":  # NumPy starts no threads for so little work
            low, high = int(tensor.numpy().min()), int(tensor.numpy().max())
        else:
            low, high = (int(bound) for bound in torch.stack(tensor.aminmax()).tolist())
        if low < 0 or high >= num_classes:
            raise ValueError(label_text(name, low if low < 0 else high, num_classes))
    return upload(tensor.to(torch.uint8), device)


def as_flow(name: str, flow: Array, size_xyz: Sequence[int], device: torch.device) -> Tensor:
    """``flow`` as (X, Y, Z, 2) floating tensor on ``device``.

    Raises:
        TypeError: it holds no floating point numbers.
        ValueError: its shape is wrong.
    """
    tensor = torch.as_tensor(flow)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must hold floating point numbers, got {tensor.dtype}")
    if tuple(tensor.shape) != (*size_xyz, 2):
        raise ValueError(f"{name} must have shape (X, Y, Z, 2) = {(*size_xyz, 2)}, got {tuple(tensor.shape)}")
    return upload(tensor, device)


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
