"""Trilinear x2 up-sampling, softplus and a linear layer in one pass: the heads' way from finest stage to labels.

A linear layer commutes with interpolation, whose weights sum to one. So the first layer of a head runs on the coarse
volume, with an eighth of the products, and nothing as large as hidden channels times fine voxels (491 MB a sample in
the released model) is ever stored: not in the forward pass, and not for the backward pass, which computes it again slab
by slab.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._checks import FLOAT_DTYPES, check_dims, check_dtype, check_same_device, check_shape
from .._library import AVAILABLE, use_compiled
from .reference import upsample_mlp_slab

_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "upsample_mlp_forward")
#: Hidden values of a slab of the backward pass (64 MB in float32) and, where the forward pass runs
#: through PyTorch's own kernels, of that (small enough for a processor's cache).
_BACKWARD_SLAB, _FORWARD_SLAB = 2**24, 2**22


def upsample_mlp(hidden: Tensor, weight: Tensor, bias: Tensor, *, fine: Tensor | None = None,
                 residual: Tensor | None = None, residual_weight: float = 1.0) -> Tensor:
    """``linear(softplus(up(hidden) + fine)) + residual_weight * up(residual)`` for every fine voxel.

    ``up`` is trilinear x2 with ``align_corners=False``: along each axis the weights are 1/4 and 3/4, held at the
    borders. Sums are in float32 (float64 for float64 inputs). CUDA has a fused kernel; on CPUs slabs of the volume run
    through PyTorch's vectorised kernels. The backward pass adds in a fixed order.

    For float16 and bfloat16 ``hidden`` with a multiple of 16 channels, CUDA multiplies by tensor cores: there weights
    and results of the softplus are rounded to that type, as autocast would round them for a linear layer.
    Interpolation, softplus, sums, bias and residual stay in float32, and so does all of the backward pass. With float32
    ``hidden`` nothing is rounded.

    Args:
        hidden: (B, Z, Y, X, H) coarse values before the softplus; float32, float64, float16 or bfloat16.
        weight: (K, H) of the linear layer.
        bias: (K,).
        fine: (B, 2 X, 2 Y, 2 Z, H) added before the softplus, or None.
        residual: (B, X, Y, Z, K) coarse values that are up-sampled onto the result, or None. Gets no gradient.
        residual_weight: Factor of the residual.

    Returns:
        (B, 2 X, 2 Y, 2 Z, K), float32 (float64 for float64 ``hidden``), in the axis order of labels.

    Raises:
        TypeError: a dtype is not accepted. ValueError: shapes or devices disagree.
    """
    _check(hidden, weight, bias, fine, residual)
    with torch.autocast(hidden.device.type, enabled=False):
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        residual = None if residual is None else residual.detach()
        return _UpsampleMLP.apply(hidden, weight.to(accumulate), bias.to(accumulate), fine, residual,
                                  float(residual_weight))


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, fine: Tensor | None, residual: Tensor | None) -> None:
    check_dtype("hidden", hidden, FLOAT_DTYPES)
    check_dims("hidden", hidden, "B, Z, Y, X, H")
    B, Z, Y, X, H = hidden.shape
    check_dims("weight", weight, "K, H")
    K = weight.shape[0]
    expected = (("weight", weight, "K, H", (K, H)), ("bias", bias, "K,", (K,)),
                ("fine", fine, "B, 2 X, 2 Y, 2 Z, H", (B, 2 * X, 2 * Y, 2 * Z, H)),
                ("residual", residual, "B, X, Y, Z, K", (B, X, Y, Z, K)))
    for name, tensor, axes, shape in expected:
        if tensor is not None:
            check_dtype(name, tensor, FLOAT_DTYPES)
            check_same_device(name, tensor, "hidden", hidden)
            check_shape(name, tensor, axes, shape)


def _fused(hidden: Tensor) -> bool:
    return _COMPILED and hidden.is_cuda and hidden.dtype != torch.float64 and use_compiled(hidden)


def _slabs(hidden: Tensor, size: int) -> list[tuple[int, int]]:
    """Ranges of fine x, with even bounds, whose hidden values number about ``size``."""
    B, Z, Y, X, H = hidden.shape
    step = 2 * max(1, min(X, size // max(1, B * 8 * Z * Y * H)))
    return [(first, min(first + step, 2 * X)) for first in range(0, 2 * X, step)]


class _UpsampleMLP(torch.autograd.Function):
    """Keeps the coarse hidden values only; the backward pass computes the fine ones again, slab by slab."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, fine, residual, residual_weight):
        ctx.save_for_backward(hidden, weight, bias, fine)
        if _fused(hidden):
            return torch.ops.mmdet3d.upsample_mlp_forward(
                hidden.contiguous(), weight.contiguous(), bias.contiguous(),
                None if fine is None else fine.to(hidden.dtype).contiguous(),
                None if residual is None else residual.float().contiguous(), residual_weight)
        B, Z, Y, X, _ = hidden.shape
        out = weight.new_empty(B, 2 * X, 2 * Y, 2 * Z, weight.shape[0])
        hidden = hidden.to(weight.dtype)
        residual = None if residual is None else residual.to(weight.dtype)
        for first, last in _slabs(hidden, _FORWARD_SLAB):
            out[:, first:last] = upsample_mlp_slab(
                hidden, weight, bias, None if fine is None else fine[:, first:last].to(weight.dtype), residual,
                residual_weight, first, last)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, fine = ctx.saved_tensors
        grad = grad.contiguous()
        backward = _backward_fused if _fused(hidden) else _backward_by_autograd
        grad_hidden, grad_weight, grad_bias, grad_fine = backward(grad, hidden, weight, bias, fine)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, grad_fine, None, None


def _backward_fused(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, fine: Tensor | None):
    operators = torch.ops.mmdet3d
    hidden = hidden.contiguous()
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    grad_weight = torch.zeros_like(weight)
    grad_fine = None if fine is None else torch.empty_like(fine, memory_format=torch.contiguous_format)
    for first, last in _slabs(hidden, _BACKWARD_SLAB):
        before = operators.upsample_rows(hidden, first, last)
        if fine is not None:
            before += fine[:, first:last]
        part = grad[:, first:last].reshape(-1, grad.shape[-1])
        grad_weight.addmm_(part.t(), torch.nn.functional.softplus(before).view(-1, hidden.shape[-1]))
        slope = (part @ weight).view(before.shape).mul_(before.sigmoid_())
        if grad_fine is not None:
            grad_fine[:, first:last] = slope
        operators.upsample_rows_backward(slope, grad_hidden, first)
    return grad_hidden, grad_weight, grad.flatten(0, -2).sum(0), grad_fine


def _backward_by_autograd(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, fine: Tensor | None):
    leaves = [tensor.detach().to(weight.dtype).requires_grad_() for tensor in (hidden, weight, bias)]
    sums = [torch.zeros_like(leaf) for leaf in leaves]
    grad_fine = None if fine is None else torch.empty_like(fine, memory_format=torch.contiguous_format)
    for first, last in _slabs(hidden, _BACKWARD_SLAB):
        inputs, slab = list(leaves), None
        if fine is not None:
            slab = fine[:, first:last].detach().to(weight.dtype).requires_grad_()
            inputs.append(slab)
        with torch.enable_grad():
            out = upsample_mlp_slab(*leaves, slab, None, 0.0, first, last)
        grads = torch.autograd.grad(out, inputs, grad[:, first:last])
        for total, part in zip(sums, grads, strict=False):
            total += part
        if grad_fine is not None:
            grad_fine[:, first:last] = grads[3]
    return (*sums, grad_fine)


def _forward_fake(hidden, weight, bias, fine, residual, residual_weight):
    B, Z, Y, X, _ = hidden.shape
    return hidden.new_empty(B, 2 * X, 2 * Y, 2 * Z, weight.shape[0], dtype=torch.float32)


def _rows_fake(hidden, first, last):
    B, Z, Y, _, H = hidden.shape
    return hidden.new_empty(B, last - first, 2 * Y, 2 * Z, H, dtype=torch.float32)


def _rows_backward_fake(grad, grad_hidden, first):
    return None


if _COMPILED:
    torch.library.register_fake("mmdet3d::upsample_mlp_forward", _forward_fake)
    torch.library.register_fake("mmdet3d::upsample_rows", _rows_fake)
    torch.library.register_fake("mmdet3d::upsample_rows_backward", _rows_backward_fake)
