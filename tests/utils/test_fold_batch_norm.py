"""Batch norms folded into convolutions: the same values, for every kind of block."""

import copy

import pytest
import torch
from mmcv.cnn import ConvModule
from mmdet.models.backbones.res2net import Bottle2neck
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
                    if tensor is not None:
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


class Neighbours(nn.Module):
    """Convolution and batch norm side by side, as in many heads."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)

    def forward(self, x):
        return self.bn(self.conv(x)).relu()


class Backwards(nn.Sequential):
    def forward(self, x):
        for layer in reversed(self):
            x = layer(x)
        return x


class Halved(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) / 2


LEFT_ALONE = {
    "neighbours": (Neighbours, ["0.bn"]),
    "norm first": (lambda: nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 5, 3)), ["0.0"]),
    "padding that is not zero": (lambda: nn.Sequential(nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"),
                                                       nn.BatchNorm2d(5)), ["0.1"]),
    "statistics of the batch": (lambda: nn.Sequential(nn.Conv2d(6, 5, 3),
                                                      nn.BatchNorm2d(5, track_running_stats=False)), ["0.1"]),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(6, 5, 3), nn.BatchNorm2d(5)), ["0.1"]),
    "another convolution": (lambda: nn.Sequential(Halved(6, 5, 3), nn.BatchNorm2d(5)), ["0.1"]),
    "another order": (lambda: Backwards(nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)), ["0.1"]),
    "explicit padding": (lambda: ConvModule(6, 5, 3, padding=1, padding_mode="reflect", norm_cfg={"type": "BN"}),
                         ["0.bn"]),
    "group norm": (lambda: ConvModule(6, 6, 3, norm_cfg={"type": "GN", "num_groups": 2}), []),
    "block with group norm": (lambda: BasicBlock(6, 6, norm_cfg={"type": "GN", "num_groups": 2}), []),
    "long shortcut": (lambda: BasicBlock(6, 6, downsample=nn.Sequential(
        nn.Identity(), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6))), ["0.bn1", "0.bn2"]),
    "block of another network": (lambda: Bottle2neck(32, 8, scales=2), ["0.bn1", "0.bn3", "0.bns.0"]),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_cannot_be_folded_stays_and_is_named_once(name, caplog):
    torch.manual_seed(0)
    make, left = LEFT_ALONE[name]
    module = trained(nn.Sequential(make()))
    x = torch.randn(2, 32 if name == "block of another network" else 6, 7, 9)
    expected, = outputs(module, x.clone())
    folded = fold_batch_norm(module)
    found, = outputs(folded, x.clone())
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert [name for name, part in folded.named_modules() if isinstance(part, _BatchNorm)] == left
    assert [record.levelname for record in caplog.records] == ["WARNING"] * bool(left)
    if left:
        assert caplog.messages[0].startswith(f"not folded, because the convolution before them is not known: "
                                             f"{', '.join(left)}; ")


def test_folding_goes_on_beside_what_is_left_alone(caplog):
    torch.manual_seed(0)
    module = trained(nn.Sequential(Neighbours(), nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4), nn.ReLU()),
                                   nn.BatchNorm2d(4)))
    x = torch.randn(IMAGE)
    folded = fold_batch_norm(module)
    torch.testing.assert_close(outputs(folded, x), outputs(module, x), atol=2e-5, rtol=1e-4)
    assert isinstance(folded[1][0], FusedConv) and not folded[0].bn.training
    assert len(caplog.messages) == 1 and "not known: 0.bn, 2; " in caplog.messages[0]


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
