"""The depth net: its gates, its pyramid and its options."""

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.models.view_transforms import DepthNet
from mmdet3d.models.view_transforms.depth_net import ASPP, SELayer

CHANNELS, MID, CONTEXT, BINS, SIZE = 5, 6, 4, 7, (2, 3)


def make(**options):
    torch.manual_seed(0)
    return DepthNet(CHANNELS, MID, CONTEXT, BINS, aspp_mid_channels=3, **options).eval()


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(8, CHANNELS, *SIZE, generator=generator), torch.randn(8, 27, generator=generator),
            torch.rand(8, BINS, 4 * SIZE[0], 4 * SIZE[1], generator=generator).softmax(1))


def test_context_is_a_gated_feature(case):
    feature, camera, cost = case
    net = make(stereo=True)
    depth, context = net(feature, camera, net.cost_volumn_net(cost))
    assert depth.shape == (8, BINS, *SIZE) and context.shape == (8, CONTEXT, *SIZE)
    x = net.reduce_conv(feature)
    m = net.bn(camera)
    m = net.context_mlp.fc2(net.context_mlp.fc1(m).clamp(min=0))[:, :, None, None]
    gate = torch.sigmoid(net.context_se.conv_expand(net.context_se.conv_reduce(m).clamp(min=0)))
    torch.testing.assert_close(context, net.context_conv(x * gate))


def test_the_cost_volume_joins_behind_the_gated_feature(case):
    feature, camera, cost = case
    net = make(stereo=True)
    seen = []
    net.depth_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    depth, _ = net(feature, camera, net.cost_volumn_net(cost))
    assert seen[0].shape == (8, MID + BINS, *SIZE)
    x = net.depth_se(net.reduce_conv(feature), net.depth_mlp(net.bn(camera)))
    torch.testing.assert_close(seen[0][:, :MID], x)
    for layer in net.cost_volumn_net:  # convolutions and norms, nothing else
        assert isinstance(layer, torch.nn.Conv2d | torch.nn.BatchNorm2d)
        cost = layer(cost)
    torch.testing.assert_close(seen[0][:, MID:], cost)
    torch.testing.assert_close(depth, net.depth_conv(seen[0]))


def test_the_gate_multiplies_channels():
    gate = SELayer(3)
    torch.nn.init.zeros_(gate.conv_expand.weight)
    with torch.no_grad():
        gate.conv_expand.bias.copy_(torch.tensor([0.0, 30, -30]))
    x = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(gate(x, torch.rand(2, 3)), x * torch.tensor([0.5, 1, 0]).view(3, 1, 1))


def test_the_pyramid_concatenates_its_branches_in_order():
    torch.manual_seed(0)
    pyramid = ASPP(4, 3).eval()
    x = torch.randn(2, 4, 5, 6)
    branches = []
    for name, padding in (("aspp1", 0), ("aspp2", 6), ("aspp3", 12), ("aspp4", 18)):
        branch = getattr(pyramid, name)
        y = F.conv2d(x, branch.atrous_conv.weight, padding=padding, dilation=max(padding, 1))
        branches.append(F.relu(branch.bn(y)))
    pooled = pyramid.global_avg_pool[2](F.conv2d(x.mean((2, 3), keepdim=True), pyramid.global_avg_pool[1].weight))
    branches.append(F.relu(pooled).expand(-1, -1, 5, 6))
    expected = F.relu(pyramid.bn1(F.conv2d(torch.cat(branches, 1), pyramid.conv1.weight)))
    torch.testing.assert_close(pyramid(x), expected)
    assert pyramid.train().dropout.p == 0.5


def test_names_of_the_published_checkpoints():
    state = make(stereo=True).state_dict()
    assert state["cost_volumn_net.0.weight"].shape == (BINS, BINS, 3, 3)
    assert state["cost_volumn_net.2.bias"].shape == (BINS,)
    assert state["depth_conv.0.downsample.weight"].shape == (MID, MID + BINS, 1, 1)
    assert "depth_conv.0.downsample.bias" in state and "depth_conv.0.conv1.bias" not in state
    assert state["depth_conv.3.conv1.weight"].shape == (MID, 15, 1, 1)
    assert state["depth_conv.4.weight"].shape == (BINS, MID, 1, 1)
    assert state["context_se.conv_reduce.weight"].shape == (MID, MID, 1, 1)


def test_without_stereo_and_without_pyramid(case):
    feature, camera, _ = case
    net = make(use_aspp=False)
    assert not any("cost_volumn_net" in key or "aspp" in key or "downsample" in key for key in net.state_dict())
    depth, _ = net(feature, camera, None)
    assert depth.shape == (8, BINS, *SIZE)
    assert make(use_aspp=False).depth_conv[3].weight.shape == (BINS, MID, 1, 1)


@pytest.mark.parametrize("options, words", [
    ({"use_dcn": True}, "depthnet_cfg.use_dcn=True is not supported"),
    ({"stereo": True, "cost_volume_downsample": 8}, "4 times finer than the feature, got 8")])
def test_unsupported_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)


def test_recomputation_changes_nothing(case):
    feature, camera, cost = case
    grads = []
    for with_cp in (False, True):
        net = make(stereo=True, with_cp=with_cp)
        depth, context = net(feature, camera, net.cost_volumn_net(cost))
        (depth.square().sum() + context.square().sum()).backward()
        grads.append({name: parameter.grad for name, parameter in net.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
