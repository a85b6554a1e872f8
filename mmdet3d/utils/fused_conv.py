"""Convolutions of a model that is only evaluated: batch norm folded into the weights, what follows in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from mmcv.cnn.bricks import wrappers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d.utils.precision import working_dtype

TOLERANCE = 2e-2
"""Accepted difference of a fused kernel, as a part of the largest value: convolutions may use 8 bits (bfloat16)."""

_PLAIN = tuple(kind.forward for kind in (nn.Conv2d, nn.Conv3d, wrappers.Conv2d, wrappers.Conv3d))
"""Forward passes that are the convolution alone."""

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class CannotFuseError(ValueError):
    """A layer that does something which its fused form would leave out."""


class FusedConv(nn.Module):
    """2D or 3D convolution, bias, an optional residual, an optional ReLU; for evaluation.

    On a GPU with cuDNN all of it is one kernel, which is compared with the steps one by one at its first use. Where
    cuDNN has none, or it does not agree, and on other devices, the steps follow each other, in place.

    Args:
        conv: The convolution.
        norm: Batch norm behind it, whose running statistics go into weight and bias (in float64); None for none.
        relu: Whether a ReLU ends it.

    Raises:
        CannotFuseError: the norm is no batch norm with running statistics, the convolution's padding is not zeros, or a
            subclass changes what it computes.
    """

    def __init__(self, conv: nn.Conv2d | nn.Conv3d, norm: nn.Module | None = None, relu: bool = False) -> None:
        super().__init__()
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise CannotFuseError(f"cannot fuse a convolution with padding={conv.padding!r} ({conv.padding_mode})")
        if type(conv).forward not in _PLAIN:
            raise CannotFuseError(f"cannot fuse {type(conv).__name__}, whose forward pass is its own")
        weight, bias = conv.weight, conv.bias
        if norm is not None:
            weight, bias = folded_parameters(conv, norm)
        elif bias is None:
            bias = weight.new_zeros(len(weight))
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.options = (conv.stride, conv.padding, conv.dilation)
        self.groups = conv.groups
        self.relu = relu
        self.one_kernel: bool | None = None  # not known yet
        self._converted: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[M, C, ...] -> [M, C', ...]; ``residual`` [M, C', ...] is added before the ReLU."""
        weight, bias = self.weight, self.bias
        x = as_input(x)
        if torch.is_autocast_enabled(x.device.type):
            weight, bias = self._in_dtype(x.dtype)
            residual = None if residual is None else residual.to(x.dtype)
        if self.relu and x.is_cuda and not (torch.is_grad_enabled() and x.requires_grad):
            if self.one_kernel is None and not torch.cuda.is_current_stream_capturing():
                self.one_kernel = self._agrees(x, weight, bias, residual)
            if self.one_kernel and (result := self._in_one_kernel(x, weight, bias, residual)) is not None:
                return result
        return self._step_by_step(x, weight, bias, residual)

    def _step_by_step(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
        convolve = F.conv2d if weight.dim() == 4 else F.conv3d
        with torch.autocast(x.device.type, enabled=False):
            x = convolve(x, weight, bias, *self.options, self.groups)
        if residual is not None:
            x += residual
        return x.relu_() if self.relu else x

    def _in_one_kernel(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None
                       ) -> Tensor | None:
        """The result of cuDNN's fused convolution; None, from then on, if it has none for this layer."""
        try:
            if residual is None:
                return torch.cudnn_convolution_relu(x, weight, bias, *self.options, self.groups)
            return torch.cudnn_convolution_add_relu(x, weight, residual, 1.0, bias, *self.options, self.groups)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            self.one_kernel = False
            return None

    def _agrees(self, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> bool:
        """Whether cuDNN has a fused kernel for this layer whose result is that of the steps but for rounding."""
        expected = self._step_by_step(x, weight, bias, residual)
        # The kernel's output most likely gets this memory: a kernel that reads its output before writing is found out.
        torch.full_like(expected, torch.nan)
        found = self._in_one_kernel(x, weight, bias, residual)
        if found is None:
            return False
        if expected.numel() == 0 or not expected.isfinite().all():
            return True
        return bool((found - expected).abs().max() <= TOLERANCE * expected.abs().max())

    def _in_dtype(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in ``dtype``, converted once."""
        if dtype not in self._converted:
            self._converted[dtype] = (
                self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return self._converted[dtype]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedConv:
        self._converted.clear()
        super()._apply(fn, recurse)
        if self.weight.is_cuda and self.weight.dim() == 5:
            # cuDNN works with channels last, and would bring everything into that order at each call.
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last_3d)
        return self

    def train(self, mode: bool = True) -> FusedConv:
        """Stay in evaluation mode.

        Raises:
            RuntimeError: training mode is asked for.
        """
        if mode:
            raise RuntimeError("batch norms were folded into the convolutions: this model is for evaluation only; "
                               "build one without folding to train it")
        return super().train(mode)

    def extra_repr(self) -> str:
        """Shape and options."""
        stride, padding, dilation = self.options
        return (f"{tuple(self.weight.shape)}, stride={stride}, padding={padding}, dilation={dilation}, "
                f"groups={self.groups}, relu={self.relu}")


def as_input(x: Tensor) -> Tensor:
    """``x`` as a :class:`FusedConv` takes it: in the dtype of autocast, 3D volumes on a GPU channels-last; one copy."""
    if x.is_cuda and x.dim() == 5:
        return x.to(working_dtype(x), memory_format=torch.channels_last_3d)
    return x.to(working_dtype(x))


class FusedBlock(nn.Module):
    """Residual block: convolutions with a ReLU each, the last one after the shortcut is added.

    Args:
        convs: (convolution, batch norm) of each layer.
        shortcut: (convolution, batch norm or None) of the shortcut; None for the identity.
    """

    def __init__(self, convs: Sequence[tuple[nn.Module, nn.Module]],
                 shortcut: tuple[nn.Module, nn.Module | None] | None = None) -> None:
        super().__init__()
        self.convs = nn.ModuleList(FusedConv(conv, norm, relu=True) for conv, norm in convs)
        self.shortcut = None if shortcut is None else FusedConv(*shortcut)
        if self.shortcut is not None:  # one bias for the sum of both paths
            self.convs[-1].bias.data += self.shortcut.bias.data
            self.shortcut.bias = None

    def forward(self, x: Tensor) -> Tensor:
        """[M, C, ...] -> [M, C', ...]."""
        x = as_input(x)  # once for both paths
        residual = x if self.shortcut is None else self.shortcut(x)
        *first, last = self.convs
        for conv in first:
            x = conv(x)
        return last(x, residual)


def folded_parameters(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution or linear layer with the batch norm that **follows** it.

    Raises:
        CannotFuseError: it has no running statistics, or is no batch norm.
    """
    scale, shift = _scale_and_shift(norm)
    bias = torch.zeros_like(shift) if conv.bias is None else conv.bias.detach().double()
    weight = conv.weight.detach()
    product = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return torch.empty_like(weight).copy_(product), (bias * scale + shift).to(weight.dtype)


@torch.no_grad()
def fold_norm_into_next(norm: nn.Module, linear: nn.Linear) -> None:
    """Fold a batch norm into the linear layer that reads its output, in place.

    Raises:
        CannotFuseError: it has no running statistics, or is no batch norm.
    """
    scale, shift = _scale_and_shift(norm)
    weight = linear.weight.double()
    linear.bias.copy_(linear.bias.double() + weight @ shift)
    linear.weight.copy_(weight * scale)


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Float64 factors and offsets per channel that a batch norm applies in evaluation."""
    if not isinstance(norm, _BatchNorm):
        raise CannotFuseError(f"{type(norm).__name__} cannot be folded; it is no batch norm")
    if norm.running_mean is None:
        raise CannotFuseError("a batch norm without running statistics cannot be folded")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean.double() * scale
    if norm.affine:
        scale, shift = scale * norm.weight.detach().double(), shift * norm.weight.detach().double()
        shift = shift + norm.bias.detach().double()
    return scale, shift
