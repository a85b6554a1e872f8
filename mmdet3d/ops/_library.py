"""Loads the compiled operator library, once, and says what to do when it is missing."""

import importlib
from pathlib import Path

import torch

BUILD_COMMAND = "python setup.py build_ext --inplace"
_error: str | None = None


def _load() -> bool:
    global _error
    try:
        importlib.import_module("mmdet3d.ops._C")
    except ImportError as error:
        built = list(Path(__file__).parent.glob("_C*.so"))
        if built:
            _error = (
                f"{built[0].name} was built for another Python or PyTorch and cannot be loaded ({error}); "
                f"rebuild it with `{BUILD_COMMAND}`"
            )
        else:
            _error = f"the operators are not compiled; build them with `{BUILD_COMMAND}`"
        return False
    return True


#: Whether the compiled library is there. Without it every operator runs its plain PyTorch reference.
AVAILABLE: bool = _load()


def load_error() -> str | None:
    """Why the compiled operators are missing and what to do about it, or None when they are loaded."""
    return _error


# Asked once: a compiled graph cannot call an operator that returns no tensor.
_BUILT_WITH_CUDA: bool = AVAILABLE and torch.ops.mmdet3d.built_with_cuda()


def built_with_cuda() -> bool:
    """Whether the compiled library holds CUDA kernels."""
    return _BUILT_WITH_CUDA


def use_compiled(tensor: torch.Tensor) -> bool:
    """Whether the compiled operator serves the device of ``tensor`` (CPU always, CUDA if it was built)."""
    if not AVAILABLE:
        return False
    return tensor.device.type in ("cpu", "meta") or (tensor.is_cuda and built_with_cuda())
