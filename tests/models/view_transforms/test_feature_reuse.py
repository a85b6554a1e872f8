"""Which features serve again, decided on the host."""

import pytest
import torch

from mmdet3d.models.view_transforms.feature_reuse import CACHED, NO_REUSE, FeatureReuse, feature_reuse
from mmdet3d.ops.plane_sweep import SweepGeometry
from mmdet3d.structures import FrameCache


def sweep(seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, 2), (2, 2), (2,), (3, 3), (3,), (3, 3))
    return SweepGeometry(*(torch.randn(4, *shape, generator=generator) for shape in shapes), image_size=(32, 96))


def cache(keys, geometry):
    return FrameCache(keys, torch.zeros(4, 1), torch.zeros(4, 1), torch.zeros(4, 1), geometry)


SECOND = cache((("b", "a"), ("y", "x")), sweep(1))


@pytest.mark.parametrize("keys, sweeps, held, frames, pairs", [
    # nothing known of the past
    ([("c", "b", "a"), ("z", "y", "x")], (0, 1), None, (0, 1, 2), (0, 1)),
    # the sample after
    ([("c", "b", "a"), ("z", "y", "x")], (0, 1), SECOND, (0, CACHED, 2), (0, CACHED)),
    # with another calibration or pose of the older pair
    ([("c", "b", "a"), ("z", "y", "x")], (0, 2), SECOND, (0, CACHED, 2), (0, 1)),
    # one slot goes elsewhere
    ([("c", "b", "a"), ("z", "w", "x")], (0, 1), SECOND, (0, 1, 2), (0, 1)),
    # a scene starts
    ([("c", "c", "c"), ("z", "z", "z")], (0, 0), SECOND, (0, 0, 0), (0, 0)),
    # its second sample: the oldest frame is replaced by the current one
    ([("c", "b", "c"), ("z", "y", "z")], (0, 1), SECOND, (0, CACHED, 0), (0, 1)),
    # one slot starts, the other goes on
    ([("c", "c", "c"), ("z", "y", "x")], (0, 1), SECOND, (0, 1, 2), (0, 1)),
    # the same sample again
    ([("b", "a", "-"), ("y", "x", "-")], (1, 3), SECOND, (CACHED, 1, 2), (CACHED, 1)),
    ([("b", "b", "b"), ("y", "y", "y")], (0, 0), SECOND, (CACHED, CACHED, CACHED), (0, 0)),
])
def test_what_serves_again(keys, sweeps, held, frames, pairs):
    found = feature_reuse(keys, [sweep(seed) for seed in sweeps], held)
    assert found == FeatureReuse(frames, pairs, remember=True)


def test_without_keys_everything_is_computed():
    assert feature_reuse(None, [sweep(0), sweep(1)], SECOND) == NO_REUSE == FeatureReuse((0, 1, 2), (0, 1), False)


def test_without_stereo_there_are_no_pairs():
    assert feature_reuse([("c", "b", "a")], [], cache((("b", "a"),), None)) == FeatureReuse((0, CACHED, 2), (), True)
