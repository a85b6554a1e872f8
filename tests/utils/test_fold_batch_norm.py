"""Batch norms folded into convolutions: the same values, for every kind of block."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d.models.backbones import BasicBlock3D, CustomResNet3D, ResNet
from mmdet3d.models.view_transforms import DepthNet
from mmdet3d.models.view_transforms.depth_net import ASPP
from mmdet3d.utils.fold_batch_norm import fold_batch_norm
from mmdet3d.utils.fused_conv import FusedBlock, FusedConv
from mmdet3d.utils.memory_format import use_channels_last

IMAGE, VOLUME = (2, 6, 7, 9), (2, 6, 4, 5, 7)


def trained(module):
    """With statistics and affine parameters as after a training."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, _BatchNorm):
                for tensor, low, high in ((part.weight, -1.5, 1.5), (part.bias, -1, 1), (part.running_mean, -2, 2),
                                          (part.running_var, 0.3, 3)):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return module.eval()


def shortcut(cls, norm, in_channels, out_channels):
    return nn.Sequential(cls(in_channels, out_channels, 1, bias=False), norm(out_channels))


BLOCKS = {
    "sequence": (lambda: nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1)), IMAGE),
    "sequence without relu": (lambda: nn.Sequential(
        nn.Conv2d(6, 5, 3, stride=2), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)), IMAGE),
    "basic block": (lambda: BasicBlock(6, 6), IMAGE),
    "basic block with a plain shortcut": (lambda: BasicBlock(6, 5, downsample=nn.Conv2d(6, 5, 1)), IMAGE),
    "bottleneck": (lambda: Bottleneck(6, 2, downsample=shortcut(nn.Conv2d, nn.BatchNorm2d, 6, 8)), IMAGE),
    "conv module": (lambda: nn.Sequential(ConvModule(6, 5, 3, norm_cfg={"type": "BN"})), IMAGE),
    "conv module without norm": (lambda: nn.Sequential(ConvModule(6, 5, 3)), IMAGE),
    "pyramid": (lambda: ASPP(6, 3), IMAGE),
    "3d block": (lambda: BasicBlock3D(6, 6), VOLUME),
    "3d block with a shortcut": (lambda: nn.Sequential(BasicBlock3D(6, 5, stride=2, downsample=True)), VOLUME),
    "backbone": (lambda: ResNet(18, base_channels=4, in_channels=6), (2, 6, 33, 65)),
    "encoder": (lambda: CustomResNet3D(6, [1, 1], [4, 8], [1, 2], adjust_number_channel=4), VOLUME),
}


def outputs(module, *x):
    with torch.no_grad():
        found = module(*x)
    return found if isinstance(found, list | tuple) else [found]


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_values_stay(name, channels_last):
    torch.manual_seed(0)
    make, shape = BLOCKS[name]
    module = trained(nn.Sequential(make()))
    if channels_last:
        use_channels_last(module)
    x = torch.randn(shape)
    before = copy.deepcopy(module.state_dict())
    expected = outputs(module[0], x.clone())
    folded = fold_batch_norm(module)
    assert not any(isinstance(part, _BatchNorm) for part in folded.modules())
    kept = x.clone()
    for found, wanted in zip(outputs(folded[0], x), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    assert torch.equal(x, kept)  # blocks work in place on what is theirs alone
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_the_depth_net_with_the_norm_of_its_camera_vector():
    torch.manual_seed(0)
    net = trained(DepthNet(6, 8, 4, 7, stereo=True, aspp_mid_channels=3))
    x, camera, matching = torch.randn(3, 6, 2, 3), torch.randn(3, 27), torch.randn(3, 7, 2, 3)
    folded = fold_batch_norm(net)
    for found, wanted in zip(outputs(folded, x, camera, matching), outputs(net, x, camera, matching), strict=True):
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)


def test_weights_keep_their_memory_format():
    module = nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    use_channels_last(module)
    strides = [module[i].weight.stride() for i in (0, 2)]
    folded = fold_batch_norm(module)
    assert [folded[i].weight.stride() for i in (0, 2)] == strides


def test_in_place_changes_the_model_itself():
    module = nn.Sequential(nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    assert fold_batch_norm(module, inplace=True) is module and not module.training
    assert isinstance(module[0], FusedConv) and module[0].relu
    assert [type(part) for part in module[1:]] == [nn.Identity, nn.Identity]


def test_a_folded_model_refuses_training():
    folded = fold_batch_norm(nn.Sequential(BasicBlock(6, 6)))
    assert isinstance(folded[0], FusedBlock) and folded.eval() is folded
    with pytest.raises(RuntimeError, match="folded into the convolutions: this model is for evaluation only"):
        folded.train()


def test_a_norm_without_convolution_is_named():
    with pytest.raises(ValueError, match=r"no convolution to fold these batch norms into: \['1'\]"):
        fold_batch_norm(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)))


def test_what_cannot_be_fused_is_refused():
    with pytest.raises(ValueError, match=r"padding=\(1, 1\) \(reflect\)"):
        FusedConv(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(ValueError, match="without running statistics"):
        FusedConv(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3, track_running_stats=False))


def test_under_autocast_weights_are_converted_once():
    torch.manual_seed(0)
    conv = FusedConv(nn.Conv2d(6, 5, 3), trained(nn.BatchNorm2d(5)), relu=True)
    x = torch.randn(IMAGE)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = conv(x)
        weight, _ = conv._in_dtype(torch.bfloat16)
        assert conv._in_dtype(torch.bfloat16)[0] is weight
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), conv(x), atol=0.1, rtol=0.05)
    conv.double()
    assert conv._converted == {}


@pytest.mark.parametrize("name", ["bottleneck", "3d block with a shortcut"])
def test_blocks_under_autocast(name):
    torch.manual_seed(0)
    make, shape = BLOCKS[name]
    block, x = fold_batch_norm(trained(make())), torch.randn(shape)
    expected, = outputs(block, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, = outputs(block, x)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.cuda
@pytest.mark.parametrize("name", BLOCKS)
def test_values_on_a_gpu(name):
    torch.manual_seed(0)
    make, shape = BLOCKS[name]
    module = trained(nn.Sequential(make()))
    use_channels_last(module)
    x = torch.randn(shape)
    expected = outputs(module[0], x)
    folded = fold_batch_norm(module).cuda()
    fused = [part for part in folded.modules() if isinstance(part, FusedConv) and part.relu]
    for one_kernel in (None, False):
        for part in fused:
            part.one_kernel = one_kernel
        for found, wanted in zip(outputs(folded[0], x.cuda()), expected, strict=True):
            torch.testing.assert_close(found.cpu(), wanted, atol=1e-4, rtol=1e-3)
        assert all(part.one_kernel is not None for part in fused)
