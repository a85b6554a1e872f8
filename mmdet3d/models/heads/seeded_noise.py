"""Seeds of the flow head's noise: with :func:`mmdet3d.ops.class_guidance.gumbel_noise` it depends on nothing else.

A generator gives a voxel the number that happens to be next: the noise of a sample then depends on the samples before
it, on the batch and on the device. There every number is a hash of (seed of its sample, position), so that an
evaluation has the same noise however its samples are shared out.
"""

from __future__ import annotations

import zlib


def sample_seed(token: str, seed: int = 0) -> int:
    """Seed of a sample in -2^31..2^31-1: CRC-32 of ``<seed>/<token>``, on any machine.

    Args:
        token: Name of the sample.
        seed: Another number gives every sample other noise.
    """
    code = zlib.crc32(f"{seed}/{token}".encode())
    return code - 2**32 if code >= 2**31 else code
