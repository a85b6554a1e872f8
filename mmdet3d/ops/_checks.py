"""Argument checks that the operators share; every message names the argument, what was found and what is accepted."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX_DTYPES = (torch.int32, torch.int64)


def check_dtype(name: str, tensor: Tensor, accepted: Sequence[torch.dtype]) -> None:
    """Raises TypeError unless ``tensor`` is a tensor of one of the ``accepted`` dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in accepted:
        raise TypeError(f"{name} must be one of {', '.join(map(str, accepted))}, got {tensor.dtype}")


def check_same_dtype(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises TypeError unless ``tensor`` has the dtype of ``other``."""
    check_dtype(name, tensor, FLOAT_DTYPES)
    if tensor.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises ValueError unless ``tensor`` is on the device of ``other``."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")


def check_dims(name: str, tensor: Tensor, axes: str) -> None:
    """Raises ValueError unless ``tensor`` has as many axes as ``axes``, such as ``"B, N, D"``, names."""
    if tensor.dim() != len(axes.split(",")):
        raise ValueError(f"{name} must have shape ({axes}), got {tuple(tensor.shape)}")


def check_shape(name: str, tensor: Tensor, axes: str, expected: Sequence[int]) -> None:
    """Raises ValueError unless ``tensor`` has the shape ``expected``, whose axes are called ``axes``."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"{name} must have shape ({axes}) = {tuple(expected)}, got {tuple(tensor.shape)}")


def as_integer(name: str, number: object) -> int:
    """``number`` as a Python integer (kept if symbolic); raises TypeError, saying that ``name`` must hold integers."""
    if isinstance(number, int | torch.SymInt):
        return number
    try:
        return operator.index(number)  # NumPy integers, for example
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {number!r}") from None


def full_precision_under_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as they are; where autocast is on for their device, half-precision ones in float32.

    Under autocast the inputs of an operator come in different dtypes, depending on what made them.
    """
    if not all(isinstance(t, Tensor) for t in tensors) or not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    return tuple(t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors)
