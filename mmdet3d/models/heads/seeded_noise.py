"""Gumbel noise that depends on a seed per sample and on the position, and on nothing else.

A generator gives a voxel the number that happens to be next: the noise of a sample then depends on the samples before
it, on the batch and on the device. Here every number is a hash of (seed of its sample, position), so that an evaluation
has the same noise however its samples are shared out.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

_BITS = 23  # with one half added, 24 significant bits: exact in float32, and never 0 or 1


def sample_seed(token: str, seed: int = 0) -> int:
    """Seed of a sample in -2^31..2^31-1 for :func:`gumbel_noise`: CRC-32 of ``<seed>/<token>``, on any machine.

    Args:
        token: Name of the sample.
        seed: Another number gives every sample other noise.
    """
    code = zlib.crc32(f"{seed}/{token}".encode())
    return code - 2**32 if code >= 2**31 else code


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right of int32 words, whose own shift repeats the sign."""
    return (words >> bits).bitwise_and_((1 << (32 - bits)) - 1)


def _scramble(words: Tensor) -> Tensor:
    """Mix int32 words in place, one to one: a multiply-xorshift hash with the constants of C. Wellons' "lowbias32"."""
    words.bitwise_xor_(_shifted(words, 16)).mul_(0x7FEB352D)
    words.bitwise_xor_(_shifted(words, 15)).mul_(0x846CA68B - 2**32)
    return words.bitwise_xor_(_shifted(words, 16))


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
    count = math.prod(shape)
    if seeds.dtype != torch.int32:
        raise TypeError(f"seeds must be int32, got {seeds.dtype}")
    if seeds.dim() != 1 or count >= 2**31:
        raise ValueError(f"expected seeds [B] and fewer than 2^31 numbers a sample, got seeds {tuple(seeds.shape)} and "
                         f"shape {tuple(shape)}")
    positions = _scramble(torch.arange(1, count + 1, dtype=torch.int32, device=seeds.device))
    words = _scramble(positions ^ seeds[:, None])
    uniform = _shifted(words, 32 - _BITS).float().add_(0.5).mul_(2.0**-_BITS)
    return uniform.view(len(seeds), *shape)


def gumbel_noise(seeds: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard Gumbel noise ``-log(-log(u))``, the same on every device but for the rounding of the logarithm.

    Args, returned value and errors are those of :func:`uniform_noise`.
    """
    return uniform_noise(seeds, shape).log_().neg_().log_().neg_()
