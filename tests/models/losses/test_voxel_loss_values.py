"""Values and gradients of the voxel losses against the literal formulas, closed forms and the published Lovász code."""

import literal_losses as literal
import pytest
import torch
from literal_losses import make_case

from mmdet3d.models.losses import (
    CustomFocalLoss,
    geometric_affinity_loss,
    lovasz_softmax_loss,
    negative_log,
    semantic_affinity_loss,
)
from mmdet3d.models.losses import lovasz as lovasz_module

CLASS_WEIGHTS = torch.tensor([0.07, 0.5, 1.5, 0.3, 2.0, 0.9])
PAIRS = {
    "semantic": (semantic_affinity_loss, literal.literal_semantic_affinity),
    "geometric": (lambda x, t: geometric_affinity_loss(x, t, 5),
                  lambda x, t: literal.literal_geometric_affinity(x, t, 5)),
    "geometric, empty in the middle": (lambda x, t: geometric_affinity_loss(x, t, 3),
                                       lambda x, t: literal.literal_geometric_affinity(x, t, 3)),
    "lovasz": (lovasz_softmax_loss, literal.literal_lovasz),
}
PRECISIONS = pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])


def value_and_grad(function, logits, target):
    value = function(logits, target)
    grad, = torch.autograd.grad(value, logits)
    return value.detach(), grad


@PRECISIONS
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_literal_formula(name, dtype, tolerance, device):
    fast, slow = PAIRS[name]
    for seed, scale in ((0, 2.0), (1, 8.0)):
        logits, target = make_case(seed=seed, scale=scale)
        expected, expected_grad = value_and_grad(slow, logits, target)
        mine = logits.detach().to(device, dtype).requires_grad_()
        value, grad = value_and_grad(fast, mine, target.to(device))
        assert value.dtype == dtype
        torch.testing.assert_close(value.cpu().double(), expected, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad.cpu().double(), expected_grad, rtol=tolerance * 10,
                                   atol=tolerance * float(expected_grad.abs().max()))


@PRECISIONS
@pytest.mark.parametrize("scale", [2.0, 60.0])
def test_focal_equals_the_operators_closed_forms(scale, dtype, tolerance, device):
    logits, target = make_case(scale=scale, dtype=dtype)
    expected, expected_grad = literal.literal_focal(logits.detach(), target, CLASS_WEIGHTS)
    loss = CustomFocalLoss(bev_h=3, bev_w=5).to(device)
    mine = logits.detach().to(device).requires_grad_()
    value, grad = value_and_grad(lambda x, t: loss(x, t, CLASS_WEIGHTS.to(device)), mine, target.to(device))
    assert value.dtype == dtype
    assert float(value) == pytest.approx(expected, rel=1e-6)                # weights are float32
    torch.testing.assert_close(grad.cpu(), expected_grad, rtol=2e-5, atol=1e-6 * float(expected_grad.abs().max()))


@pytest.mark.parametrize("logit, label_is_class, focal, slope", [
    (20.0, False, 0.75 * 87.33654, 0.75),        # 1 - p rounds to 0 in float32: ln of the smallest normal float
    (200.0, False, 0.75 * 87.33654, 0.75),
    (-200.0, True, 0.25 * 87.33654, -0.25),
    (200.0, True, 0.0, 0.0),
    (-200.0, False, 0.0, 0.0),
    (0.0, True, 0.25 * 0.25 * 0.6931472, -0.25 * 0.25 * (0.5 + 0.6931472)),
])
def test_focal_clamps_the_logarithm_and_not_the_gradient(logit, label_is_class, focal, slope, device):
    logits = torch.tensor([logit, -300.0], device=device).view(1, 1, 1, 1, 2).requires_grad_()
    target = torch.tensor(0 if label_is_class else 1, device=device).view(1, 1, 1, 1)
    # the weights leave only column 0; in a grid of one column r is 2
    weights = torch.tensor([1.0, 0.0], device=device)
    loss = CustomFocalLoss(bev_h=1, bev_w=1).to(device)
    value, grad = value_and_grad(lambda x, t: loss(x, t, weights), logits, target)
    assert float(value) == pytest.approx(200 * focal, rel=1e-6)
    assert float(grad[..., 0]) == pytest.approx(200 * slope, rel=1e-5)


@pytest.mark.cuda
def test_focal_equals_mmcvs_operator():
    mmcv_ops = pytest.importorskip("mmcv.ops")
    logits, target = make_case(shape=(2, 6, 6, 4), dtype=torch.float32, scale=25.0, ignored=0, device="cuda")
    try:
        theirs = mmcv_ops.sigmoid_focal_loss(logits.reshape(-1, 6), target.reshape(-1), 2.0, 0.25, None, "none")
    except RuntimeError as error:
        pytest.skip(f"mmcv has no CUDA operators here: {error}")
    loss = CustomFocalLoss(bev_h=6, bev_w=6).cuda()
    radial = loss.radial_weight[None, :, :, None, None].expand(*logits.shape).reshape(-1, 6)
    theirs = 100 * (theirs * radial * CLASS_WEIGHTS.cuda()).sum(1).mean()
    expected_grad, = torch.autograd.grad(theirs, logits)
    value, grad = value_and_grad(lambda x, t: loss(x, t, CLASS_WEIGHTS.cuda()), logits, target)
    torch.testing.assert_close(value, theirs.detach(), rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*PAIRS, "focal"])
def test_gradcheck(name, device):
    logits, target = make_case(shape=(2, 3, 2, 2), classes=4, absent=1, device=device, seed=3)
    functions = {"semantic": semantic_affinity_loss, "lovasz": lovasz_softmax_loss,
                 "geometric": lambda x, t: geometric_affinity_loss(x, t, 3),
                 "geometric, empty in the middle": lambda x, t: geometric_affinity_loss(x, t, 2),
                 "focal": CustomFocalLoss(bev_h=2, bev_w=3).to(device)}
    assert torch.autograd.gradcheck(lambda x: functions[name](x, target), logits)


def test_radial_weight_is_one_in_the_middle_and_two_in_the_corner():
    weight = CustomFocalLoss(bev_h=200, bev_w=200).radial_weight
    assert weight.shape == (200, 200)
    assert weight[0, 0] == 2
    assert weight[100, 100] == 1
    assert float(CustomFocalLoss(bev_h=25, bev_w=25).radial_weight.min()) == pytest.approx(1.04)
    assert CustomFocalLoss(bev_h=3, bev_w=5).radial_weight.shape == (5, 3)              # X, Y


def test_negative_log_at_the_ends():
    assert float(negative_log(torch.tensor(1.0))) == pytest.approx(2.0027e-5, abs=5e-10)
    assert float(negative_log(torch.tensor(0.0))) == pytest.approx(11.5129, abs=5e-5)
    assert negative_log(torch.tensor(float("nan"))).isnan()
    ratio = torch.tensor([0.0, 5e-6, 0.5, 0.99999, 1.0], requires_grad=True)
    grad, = torch.autograd.grad(negative_log(ratio).sum(), ratio)
    torch.testing.assert_close(grad[:3], torch.tensor([-1e5, -1 / 1.5e-5, -2.0]), rtol=2e-3, atol=0)
    assert torch.isfinite(grad).all()


def test_negative_log_equals_the_loops_bitwise():
    one, step = torch.tensor(1.0), torch.tensor(0.0)
    near_one = [one]
    for _ in range(60):
        near_one.append(torch.nextafter(near_one[-1], step))
    above = [one]
    for _ in range(8):
        above.append(torch.nextafter(above[-1], torch.tensor(2.0)))
    near_one += [x - 1e-5 for x in near_one + above] + above
    near_zero = [torch.tensor(x) for x in (0.0, 1e-12, 5e-6, 9.9999e-6, 1e-5, 1.00001e-5, 1.5e-5, 0.3)]
    ratios = torch.stack(near_one + near_zero)
    expected = torch.stack([literal.literal_negative_log(x) for x in ratios])
    assert torch.equal(negative_log(ratios), expected)


@pytest.mark.parametrize("seed", [0, 1])
def test_lovasz_equals_mmsegs(seed):
    from mmseg.models.losses.lovasz_loss import lovasz_softmax

    logits, target = make_case(shape=(2, 7, 6, 5), dtype=torch.float32, seed=seed, scale=3.0)

    def theirs(x, t):
        probability = x.softmax(-1).permute(0, 4, 1, 2, 3).flatten(3)                  # [B, K, X, Y * Z]
        return lovasz_softmax(probability, t.flatten(2), classes="present", ignore_index=255)

    expected, expected_grad = value_and_grad(theirs, logits, target)
    value, grad = value_and_grad(lovasz_softmax_loss, logits, target)
    torch.testing.assert_close(value, expected, rtol=2e-6, atol=0)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-3, atol=1e-8)


def test_lovasz_does_not_depend_on_how_many_classes_are_sorted_together(monkeypatch):
    logits, target = make_case(dtype=torch.float32)
    expected = value_and_grad(lovasz_softmax_loss, logits, target)
    monkeypatch.setattr(lovasz_module, "_SORT_ELEMENTS", 1)
    for mine, other in zip(value_and_grad(lovasz_softmax_loss, logits, target), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_lovasz_is_one_minus_the_mean_iou_for_hard_predictions():
    target = torch.tensor([0, 0, 0, 1, 1, 2]).view(1, 1, 2, 3, 1)[..., 0].unsqueeze(0)[0]
    predicted = torch.tensor([0, 0, 1, 1, 2, 2]).view(target.shape)
    logits = 200 * torch.nn.functional.one_hot(predicted, 4).float()
    iou = (2 / 3 + 1 / 3 + 1 / 2) / 3
    assert float(lovasz_softmax_loss(logits, target)) == pytest.approx(1 - iou, rel=1e-6)
