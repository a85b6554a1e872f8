"""Numbers that depend on a seed per sample and on the position, and on nothing else: hashes of both."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import AVAILABLE, built_with_cuda

_BITS = 23  # with one half added, 24 significant bits: exact in float32, and never 0 or 1
_MAX_SAMPLES = 65535  # of the kernel: its largest grid
_FUSED = AVAILABLE and built_with_cuda() and hasattr(torch.ops.mmdet3d, "gumbel_noise")


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int32 words, whose own shift repeats the sign."""
    return (words >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _scramble(words: Tensor) -> Tensor:
    """Mix int32 words in place, one to one: a multiply-xorshift hash with the constants of C. Wellons' "lowbias32"."""
    words.bitwise_xor_(_shifted(words, 16)).mul_(0x7FEB352D)
    words.bitwise_xor_(_shifted(words, 15)).mul_(0x846CA68B - 2**32)
    return words.bitwise_xor_(_shifted(words, 16))


def check_noise(seeds: Tensor, shape: Sequence[int]) -> None:
    """Raises what :func:`uniform_noise` does."""
    if seeds.dtype != torch.int32:
        raise TypeError(f"seeds must be int32, got {seeds.dtype}")
    if seeds.dim() != 1 or math.prod(shape) >= 2**31:
        raise ValueError(f"expected seeds [B] and fewer than 2^31 numbers a sample, got seeds {tuple(seeds.shape)} and "
                         f"shape {tuple(shape)}")


def uniform_noise(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers between 0 and 1 (exclusive), the same bits on every device.

    Args:
        seeds: [B] int32 seed of each sample.
        shape: Shape of one sample, at most 2^31 - 1 numbers.

    Returns:
        [B, *shape] float32 on the device of ``seeds``.

    Raises:
        TypeError: ``seeds`` is not int32.
        ValueError: ``seeds`` is not one-dimensional, or ``shape`` is too large.
    """
    check_noise(seeds, shape)
    positions = _scramble(torch.arange(1, math.prod(shape) + 1, dtype=torch.int32, device=seeds.device))
    words = _scramble(positions ^ seeds[:, None])
    uniform = _shifted(words, 32 - _BITS).float().add_(0.5).mul_(2.0**-_BITS)
    return uniform.view(len(seeds), *shape)


def gumbel_noise_reference(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """:func:`gumbel_noise` in plain PyTorch, in some thirty passes over the numbers."""
    return uniform_noise(seeds, shape).log_().neg_().log_().neg_()


def gumbel_noise(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard Gumbel noise ``-log(-log(u))``, the same on every device but for the rounding of the logarithm.

    Args, returned value and errors are those of :func:`uniform_noise`, whose numbers are the u.
    """
    check_noise(seeds, shape)
    if _FUSED and seeds.is_cuda and len(seeds) <= _MAX_SAMPLES:
        return torch.ops.mmdet3d.gumbel_noise(seeds.contiguous(), math.prod(shape)).view(len(seeds), *shape)
    return gumbel_noise_reference(seeds, shape)


if _FUSED:

    @torch.library.register_fake("mmdet3d::gumbel_noise")
    def _(seeds, count):
        return seeds.new_empty(seeds.shape[0], count, dtype=torch.float32)
