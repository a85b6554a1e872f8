"""The image backbone against mmdet's, its first stage alone, and recomputation."""

import pytest
import torch
from mmdet.models.backbones import ResNet as MMDetResNet

from mmdet3d.models.backbones import ResNet
from mmdet3d.registry import build

OPTIONS = {"depth": 18, "base_channels": 4, "out_indices": (0, 2, 3), "norm_eval": False}


def make(train=False, cls=ResNet, **options):
    torch.manual_seed(0)
    model = cls(**OPTIONS, **options)
    model.train(train)  # which returns nothing in mmdet's class
    return model


def images():
    return torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("deep_stem", [False, True])
def test_equals_mmdet_with_the_same_weights(deep_stem):
    mine, theirs = make(deep_stem=deep_stem), make(cls=MMDetResNet, deep_stem=deep_stem)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    with torch.no_grad():
        outputs, expected = mine(images()), theirs(images())
    assert [tuple(x.shape) for x in outputs] == [(2, 4, 8, 16), (2, 16, 2, 4), (2, 32, 1, 2)]
    for output, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, other)


def test_the_first_stage_alone_is_the_first_output():
    model = make()
    with torch.no_grad():
        first = model.first_stage(images())
        assert torch.equal(first, model(images())[0])
    assert first.min() >= 0 and first.shape == (2, 4, 8, 16)


def test_recomputation_gives_the_same_gradients_and_updates_statistics_twice():
    grads, counts = [], []
    for with_cp in (False, True):
        model = make(True, with_cp=with_cp).double()
        outputs = model(images().double())
        weights = torch.Generator().manual_seed(2)
        sum((output * torch.randn(output.shape, generator=weights)).sum() for output in outputs).backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters()})
        counts.append([int(model.get_submodule(name).num_batches_tracked)
                       for name in ("bn1", "layer1.0.bn1", "layer4.1.bn2")])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)
    assert counts == [[1, 1, 1], [1, 2, 2]]


def test_no_recomputation_without_gradient():
    model = make(True, with_cp=True)
    with torch.no_grad():
        model(images())
    assert model.get_buffer("layer1.0.bn1.num_batches_tracked") == 1


def test_initial_values():
    model = build({"type": "ResNet", "depth": 50, "base_channels": 4})
    model.init_weights()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            last = name.startswith("layer") and name.endswith("bn3")
            assert torch.equal(module.weight, torch.full_like(module.weight, 0.0 if last else 1.0)), name
            assert not module.bias.any()
    std = model.layer3[1].conv2.weight.std().item()
    fan_out = 9 * model.layer3[1].conv2.out_channels
    assert std == pytest.approx((2 / fan_out) ** 0.5, rel=0.15)
