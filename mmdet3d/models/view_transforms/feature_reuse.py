"""Which image features of a frame are computed, and which are there already.

The earlier frames of a sample are the key frames of the samples before it, and, at the start of a scene, the key frame
itself. In evaluation the features of a picture depend on nothing but the picture, so they serve again: those of the
backbone and the neck, and the stereo matching of two pictures if the cameras of the pair are the same numbers. The
depth net is not among them: it sees the poses of the current key frame.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from mmdet3d.ops.plane_sweep import SweepGeometry
from mmdet3d.structures import FrameCache

#: The features of the memory's newest frame serve.
CACHED = -1


class FeatureReuse(NamedTuple):
    """Where the features of each frame come from; a number decides nothing about values.

    Attributes:
        frames: For each frame, newest first: the frame whose features serve (itself: they are computed), or
            :data:`CACHED`.
        pairs: Likewise for the stereo matching of each lifted frame with the one before it.
        remember: Whether the features of the key frame shall be kept for the next sample.
    """

    frames: tuple[int, ...]
    pairs: tuple[int, ...]
    remember: bool = False


#: Everything is computed.
NO_REUSE = FeatureReuse((0, 1, 2), (0, 1))


def feature_reuse(keys: Sequence[Sequence[Hashable]] | None, sweeps: Sequence[SweepGeometry | None],
                  cache: FrameCache | None) -> FeatureReuse:
    """What can serve again.

    Args:
        keys: For each batch slot, a key of the pictures of each of its three frames, newest first: equal keys promise
            equal pictures after augmentation. None: nothing is known.
        sweeps: Cameras of the stereo pairs, key frame first, on the CPU; None without stereo.
        cache: Features of the sample before, or None.
    """
    if keys is None:
        return NO_REUSE
    frame_keys = list(zip(*keys, strict=True))
    newest = None if cache is None else tuple(key for key, _ in cache.keys)
    frames = tuple(CACHED if key == newest else frame_keys.index(key) for key in frame_keys)
    pairs = []
    for f, sweep in enumerate(sweeps):
        pair = (frame_keys[f], frame_keys[f + 1])
        if cache is not None and pair == tuple(zip(*cache.keys, strict=True)) and _equal(sweep, cache.sweep):
            pairs.append(CACHED)
        elif f > 0 and pair == (frame_keys[0], frame_keys[1]) and _equal(sweep, sweeps[0]):
            pairs.append(pairs[0])
        else:
            pairs.append(f)
    return FeatureReuse(frames, tuple(pairs), remember=True)


def _equal(first: SweepGeometry | None, second: SweepGeometry | None) -> bool:
    """Whether two plane sweeps are the same, bit for bit."""
    if first is None or second is None:
        return first is second
    return first.image_size == tuple(second.image_size) and all(
        torch.equal(mine, theirs) for mine, theirs in zip(first.tensors.values(), second.tensors.values(), strict=True))
