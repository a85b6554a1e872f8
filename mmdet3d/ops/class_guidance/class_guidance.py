"""Class guidance: contract, checks and choice of implementation."""

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, check_dims, check_dtype, check_same_device, check_shape
from .._library import AVAILABLE, built_with_cuda
from .noise import check_noise
from .reference import class_guidance_reference

#: False also for a library that was built before this operator was written.
_FUSED = AVAILABLE and built_with_cuda() and hasattr(torch.ops.mmdet3d, "class_guidance")

_HALF_DTYPES = (torch.float16, torch.bfloat16)
_PARAMETER_DTYPES = (torch.float32, *_HALF_DTYPES)
#: Largest sizes of the kernel, and its largest grid.
_MAX_CLASSES, _MAX_HIDDEN, _MAX_SAMPLES = 32, 64, 65535


def class_guidance(scores: Tensor, first_weight: Tensor, first_bias: Tensor, second_weight: Tensor,
                   second_bias: Tensor, *, noise_seeds: Tensor | None = None, softmax: bool = True,
                   dtype: torch.dtype = torch.float32) -> Tensor:
    """``linear(softplus(linear(softmax(scores + noise))))`` for every voxel, over the classes.

    **Rounding.** Noise, softmax, softplus, sums and biases are in float32 (float64 for that ``dtype``). Probabilities,
    softplus and both weights are rounded to ``dtype`` before they are multiplied, as autocast does. The kernel's
    softplus and exponential are the fast ones: absolute errors of some 1e-6 before those roundings.

    CUDA has a fused kernel for float16 and bfloat16, see :func:`kernel_serves`; all else runs in plain PyTorch.

    Args:
        scores: (B, ..., K) logits or, without ``softmax``, probabilities of the K classes; float32, float64, float16 or
            bfloat16.
        first_weight: (H, K) of the first linear layer.
        first_bias: (H,).
        second_weight: (D, H) of the second linear layer.
        second_bias: (D,).
        noise_seeds: (B,) int32 seeds of the Gumbel noise :func:`mmdet3d.ops.class_guidance.gumbel_noise` that is added
            to the logits of each sample. Default: no noise.
        softmax: Whether ``scores`` are logits.
        dtype: Of the result: float32, float64, float16 or bfloat16.

    Returns:
        (B, ..., D) of ``dtype``.

    Raises:
        TypeError: a dtype is not accepted.
        ValueError: shapes or devices disagree, or there are seeds, but no softmax.
        RuntimeError: an input requires a gradient while gradients are recorded.
    """
    _check(scores, first_weight, first_bias, second_weight, second_bias, dtype)
    if noise_seeds is not None:
        if not softmax:
            raise ValueError("noise_seeds need softmax=True: noise belongs to logits")
        check_noise(noise_seeds, scores.shape[1:])
        check_shape("noise_seeds", noise_seeds, "B,", scores.shape[:1])
        check_same_device("noise_seeds", noise_seeds, "scores", scores)
        noise_seeds = noise_seeds.contiguous()
    parameters = (first_weight, first_bias, second_weight, second_bias)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (scores, *parameters)):
        raise RuntimeError("class_guidance has no gradient; call it under torch.no_grad() or detach its inputs")
    if kernel_serves(scores, first_weight, second_weight, dtype):
        parameters = (p.contiguous() if p.dtype in _PARAMETER_DTYPES else p.float().contiguous() for p in parameters)
        return torch.ops.mmdet3d.class_guidance(scores.float().contiguous(), *parameters, noise_seeds, softmax, dtype)
    return class_guidance_reference(scores, *parameters, noise_seeds=noise_seeds, softmax=softmax, dtype=dtype)


def kernel_serves(scores: Tensor, first_weight: Tensor, second_weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the fused kernel runs for arguments of :func:`class_guidance`: not for many classes or hidden values."""
    outputs, hidden = second_weight.shape
    return (_FUSED and scores.is_cuda and dtype in _HALF_DTYPES and 1 <= first_weight.shape[1] <= _MAX_CLASSES
            and max(hidden, outputs) <= _MAX_HIDDEN and outputs % 4 == 0 and scores.shape[0] <= _MAX_SAMPLES)


def _check(scores: Tensor, first_weight: Tensor, first_bias: Tensor, second_weight: Tensor, second_bias: Tensor,
           dtype: torch.dtype) -> None:
    check_dtype("scores", scores, FLOAT_DTYPES)
    if scores.dim() < 2:
        raise ValueError(f"scores must have shape (B, ..., K), got {tuple(scores.shape)}")
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {dtype}")
    check_dims("first_weight", first_weight, "H, K")
    check_dims("second_weight", second_weight, "D, H")
    H, D = first_weight.shape[0], second_weight.shape[0]
    expected = (("first_weight", first_weight, "H, K", (H, scores.shape[-1])), ("first_bias", first_bias, "H,", (H,)),
                ("second_weight", second_weight, "D, H", (D, H)), ("second_bias", second_bias, "D,", (D,)))
    for name, tensor, axes, shape in expected:
        check_dtype(name, tensor, FLOAT_DTYPES)
        check_same_device(name, tensor, "scores", scores)
        check_shape(name, tensor, axes, shape)


if _FUSED:

    @torch.library.register_fake("mmdet3d::class_guidance")
    def _(scores, first_weight, first_bias, second_weight, second_bias, noise_seeds, softmax, dtype):
        return scores.new_empty((*scores.shape[:-1], second_weight.shape[0]), dtype=dtype)
