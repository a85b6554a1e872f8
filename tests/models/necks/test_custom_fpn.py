"""The feature pyramid: top-down sums, the levels asked for, and refusals."""

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.models.necks import CustomFPN
from mmdet3d.registry import ConfigError, build


def make(**options):
    torch.manual_seed(0)
    return CustomFPN(**{"in_channels": [3, 4, 5], "out_channels": 6, "num_outs": 1, "out_ids": [0], **options})


def inputs():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, c, h, w, generator=generator) for c, h, w in ((3, 8, 12), (4, 4, 6), (5, 2, 3))]


def expected_outputs(neck, features):
    """Output of every level by plain convolutions and nearest neighbours."""
    laterals = [F.conv2d(x, conv.conv.weight, conv.conv.bias)
                for conv, x in zip(neck.lateral_convs, features, strict=True)]
    laterals[1] = laterals[1] + laterals[2].repeat_interleave(2, 2).repeat_interleave(2, 3)
    laterals[0] = laterals[0] + laterals[1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    return [F.conv2d(laterals[level], conv.conv.weight, conv.conv.bias, padding=1)
            for conv, level in zip(neck.fpn_convs, neck.out_ids, strict=True)]


@pytest.mark.parametrize("out_ids, shapes", [([0], [(2, 6, 8, 12)]), ([1], [(2, 6, 4, 6)]),
                                             ([0, 2], [(2, 6, 8, 12), (2, 6, 2, 3)])])
def test_outputs_of_the_levels_asked_for(out_ids, shapes):
    neck = make(out_ids=out_ids, num_outs=len(out_ids))
    with torch.no_grad():
        outputs = neck(inputs())
        assert [tuple(x.shape) for x in outputs] == shapes
        for output, expected in zip(outputs, expected_outputs(neck, inputs()), strict=True):
            torch.testing.assert_close(output, expected)


def test_the_inputs_stay_as_they_are():
    features = inputs()
    make()(features)
    assert all(torch.equal(a, b) for a, b in zip(features, inputs(), strict=True))


def test_initial_values_and_names():
    neck = make()
    neck.init_weights()
    assert set(neck.state_dict()) == {f"lateral_convs.{i}.conv.{p}" for i in range(3) for p in ("weight", "bias")} | {
        "fpn_convs.0.conv.weight", "fpn_convs.0.conv.bias"}
    weight = neck.fpn_convs[0].conv.weight
    bound = (6 / (9 * 6 + 9 * 6)) ** 0.5  # Xavier, uniform
    assert 0.9 * bound < weight.abs().max() <= bound and not neck.fpn_convs[0].conv.bias.any()


@pytest.mark.parametrize("options, words", [
    ({"start_level": 1}, "start_level=0, end_level=-1 and no extra convolutions"),
    ({"end_level": 1}, "start_level=0, end_level=-1"),
    ({"add_extra_convs": True}, "no extra convolutions"), ({"relu_before_extra_convs": True}, "no extra convolutions"),
    ({"num_outs": 2}, r"num_outs=2 must be the number of out_ids=\[0\]"),
    ({"out_ids": [3]}, r"out_ids=\[3\], which are levels below 3")])
def test_unsupported_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_a_wrong_number_of_feature_maps_is_refused():
    with pytest.raises(ValueError, match="expected 3 feature maps, got 2"):
        make()(inputs()[:2])
    with pytest.raises(ConfigError, match=r"neck: CustomFPN takes no \['out_idx'\] \(did you mean 'out_ids'\?\)"):
        build({"type": "CustomFPN", "in_channels": [3], "out_channels": 4, "num_outs": 1, "out_idx": [0]}, "neck")
