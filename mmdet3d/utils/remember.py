"""Results of small computations on the host that repeat, as those of calibrations do frame after frame."""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_DTYPES = frozenset({torch.float32, torch.float64})


def remembered(function: Callable[Parameters, Result], capacity: int = 16) -> Callable[Parameters, Result]:
    """Decorator: return the result of an earlier call whose arguments had the same values.

    The function must depend on nothing but its arguments, small tensors and hashable values, and nobody may change its
    result in place. Calls with tensors, in or out, that are not plain float tensors on the CPU without gradient are not
    remembered.

    Args:
        function: What to decorate.
        capacity: Results that are kept, those used last.
    """
    results: OrderedDict[Hashable, Result] = OrderedDict()

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        values = (*args, *kwargs.values())
        if not all(map(_is_plain, values)):
            return function(*args, **kwargs)
        key = (len(args), *kwargs, *map(_identity, values))
        result = results.pop(key, None)  # put back as the newest; another thread may have taken it meanwhile
        if result is None:
            result = function(*args, **kwargs)
            if not all(map(_is_plain, result if isinstance(result, tuple) else (result,))):
                return result  # as a tracer makes them
        results[key] = result
        while len(results) > capacity:
            results.popitem(last=False)
        return result

    return call


def _is_plain(value: Any) -> bool:
    if not isinstance(value, torch.Tensor):
        return True
    return type(value) is torch.Tensor and value.is_cpu and value.dtype in _DTYPES and not value.requires_grad


def _identity(value: Any) -> Hashable:
    """Equal for values that are equal bit for bit."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    return value
