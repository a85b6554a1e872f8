"""The encoder of voxel volumes: blocks, strides, adjusted channels, recomputation."""

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.models.backbones import BasicBlock3D, CustomResNet3D


def batch_norm(module, x):
    return F.batch_norm(x, module.running_mean, module.running_var, module.weight, module.bias, eps=1e-5)


def randomise(model):
    generator = torch.Generator().manual_seed(3)
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "running_var" in name else -0.5))
    return model.eval()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_block_is_two_convolutions_and_a_convolved_shortcut(stride):
    block = randomise(BasicBlock3D(3, 5, stride=stride, downsample=True))
    x = torch.randn(2, 3, 4, 6, 8)
    with torch.no_grad():
        y = F.relu(batch_norm(block.conv1.bn, F.conv3d(x, block.conv1.conv.weight, stride=stride, padding=1)))
        y = batch_norm(block.conv2.bn, F.conv3d(y, block.conv2.conv.weight, padding=1))
        shortcut = F.conv3d(x, block.downsample.conv.weight, stride=stride, padding=1)
        expected = F.relu(y + batch_norm(block.downsample.bn, shortcut))
        torch.testing.assert_close(block(x), expected)
    assert expected.shape == (2, 5, 4 // stride, 6 // stride, 8 // stride)


def test_a_block_without_a_convolved_shortcut_adds_its_input():
    block = randomise(BasicBlock3D(3, 3))
    x = torch.randn(2, 3, 2, 3, 4)
    with torch.no_grad():
        torch.testing.assert_close(block(x), F.relu(block.conv2(block.conv1(x)) + x))
    assert not any("downsample" in key or "bias" in key and "conv.bias" in key for key in block.state_dict())


def make(**options):
    torch.manual_seed(0)
    return CustomResNet3D(**{"numC_input": 4, "num_layer": [1, 2, 2], "num_channels": [5, 6, 7], "stride": [1, 2, 2],
                             "adjust_number_channel": 5, **options})


def test_volumes_of_all_stages_with_the_same_channels():
    model = randomise(make())
    x = torch.randn(2, 4, 4, 8, 12)
    with torch.no_grad():
        outputs = model(x)
        chain = [model.layers[0](x)]
        chain += [model.layers[1](chain[0])]
        chain += [model.layers[2](chain[1])]
        assert [tuple(y.shape[1:]) for y in outputs] == [(5, 4, 8, 12), (5, 2, 4, 6), (5, 1, 2, 3)]
        torch.testing.assert_close(outputs[0], chain[0])
        for i in (1, 2):
            adjust = model.adjust_layer[i - 1]
            expected = F.relu(batch_norm(adjust.bn, F.conv3d(chain[i], adjust.conv.weight)))
            torch.testing.assert_close(outputs[i], expected)


def test_all_outputs_are_adjusted_when_the_first_has_other_channels():
    model = make(adjust_number_channel=3)
    assert len(model.adjust_layer) == 3
    assert [y.shape[1] for y in model(torch.randn(2, 4, 4, 8, 12))] == [3, 3, 3]


def test_without_adjustment_and_with_chosen_stages():
    model = make(adjust_number_channel=None, backbone_output_ids=[0, 2])
    assert [y.shape[1] for y in model(torch.randn(2, 4, 4, 8, 12))] == [5, 7]
    assert not any("adjust" in key for key in model.state_dict())


def test_names_of_the_published_checkpoints():
    state = make().state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items() if key.endswith("conv.weight")}
    assert shapes["layers.0.0.conv1.conv.weight"] == shapes["layers.0.0.downsample.conv.weight"] == (5, 4, 3, 3, 3)
    assert shapes["layers.1.1.conv2.conv.weight"] == (6, 6, 3, 3, 3)
    assert "layers.1.1.downsample.conv.weight" not in shapes
    assert shapes["adjust_layer.1.conv.weight"] == (5, 7, 1, 1, 1)
    assert "layers.2.0.downsample.bn.running_mean" in state


def test_recomputation_changes_nothing():
    x, grads = torch.randn(2, 4, 4, 4, 8), []
    for with_cp in (False, True):
        model = make(with_cp=with_cp).eval()
        sum(y.square().sum() for y in model(x)).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name, rtol=1e-4, atol=1e-4)


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="num_layer, num_channels and stride must be equally long"):
        make(stride=[1, 2])
