"""Mixed precision: its names, and what stays in full precision under autocast."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import nn

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
"""Values of a config's ``precision``: the type that :func:`torch.autocast` uses in the forward pass."""


def working_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that autocast calculates in on the device of ``tensor``; without autocast that of ``tensor``."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class Softplus(nn.Softplus):
    """Softplus in the dtype of its input, under autocast too; calculated in float32 at least.

    Autocast would hand on float32, which the linear layer behind rounds to the same numbers again.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[...] -> [...]."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x)


def full_precision(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Decorator: run a function without autocast, as geometry must be (half precision moves points by metres)."""

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return function(*args, **kwargs)  # most calls; to enter and leave both takes longer than small geometry
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run
