"""Flow loss and depth loss against literal loops and closed forms."""

import pytest
import torch
import torch.nn.functional as F
from literal_losses import literal_depth_label, literal_flow

from mmdet3d.models.losses import depth_loss, depth_targets, flow_loss

DEPTH_RANGE = (1.0, 45.0, 0.5)


def flow_case(device="cpu", dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    flow, target = (torch.randn(3, 5, 4, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    semantics = torch.randint(0, 10, (3, 5, 4, 2), generator=generator).to(torch.uint8)
    semantics[0, 0] = 255
    return flow.to(device, dtype).requires_grad_(), target.to(device, dtype), semantics.to(device)


def test_flow_is_a_mean_per_sample_and_a_sum_over_samples(device):
    flow, target, semantics = flow_case(device)
    loss = flow_loss(flow, target, semantics, [0, 2, 3])
    expected = literal_flow(flow, target, semantics, [0, 2, 3])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, flow), torch.autograd.grad(expected, flow))
    assert torch.autograd.gradcheck(lambda f: flow_loss(f, target, semantics, [0, 2, 3]), flow)


def test_flow_without_foreground_is_zero(device):
    flow, target, semantics = flow_case(device)
    only_two = semantics.clone()
    only_two[1] = 9
    expected = literal_flow(flow[::2], target[::2], semantics[::2], [0, 2, 3])
    torch.testing.assert_close(flow_loss(flow, target, only_two, [0, 2, 3]), expected)
    loss = flow_loss(flow, target, torch.full_like(semantics, 255), [0, 2, 3])
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(flow.grad, torch.zeros_like(flow))


def test_flow_targets_off_the_foreground_are_not_looked_at(device):
    flow, target, semantics = flow_case(device, torch.float32)
    expected = flow_loss(flow, target, semantics, [0, 2, 3])
    foreground = (semantics == 0) | (semantics == 2) | (semantics == 3)
    target = torch.where(foreground.unsqueeze(-1), target, float("nan"))
    loss = flow_loss(flow, target, semantics, [0, 2, 3])
    assert torch.equal(loss, expected)
    grad, = torch.autograd.grad(loss, flow)
    assert torch.isfinite(grad).all()
    assert torch.equal(grad[~foreground], torch.zeros_like(grad[~foreground]))


def test_flow_in_half_precision_is_computed_in_float32():
    flow, target, semantics = flow_case(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = flow_loss(flow, target, semantics, [0])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, flow_loss(flow.float(), target.float(), semantics, [0]))


def test_flow_shapes_are_checked():
    flow, target, semantics = flow_case()
    with pytest.raises(ValueError, match=r"semantics \[B, X, Y, Z\], got .*\[3, 5, 2, 4\]"):
        flow_loss(flow, target, semantics.transpose(2, 3), [0])


@pytest.mark.parametrize("metres, label", [(0.0, -1), (0.4, -1), (0.99, -1), (1.0, 0), (1.49, 0), (1.5, 1),
                                           (44.99, 87), (45.0, -1), (60.0, -1)])
def test_depth_labels(metres, label, device):
    gt_depth = torch.zeros(2, 3, 8, 12, device=device)
    gt_depth[1, 2, 5, 9] = metres
    labels = depth_targets(gt_depth, 4, DEPTH_RANGE)
    expected = torch.full((2, 3, 2, 3), -1, device=device)
    expected[1, 2, 1, 2] = label
    assert torch.equal(labels, expected)


def depth_case(device="cpu", dtype=torch.float32):
    """Distribution [B * N, D, h, w] and depth [B, N, H, W] with B, N, h, w = 2, 3, 4, 5 and blocks of 4 pixels."""
    generator = torch.Generator().manual_seed(0)
    gt_depth = 60 * torch.rand(2, 3, 16, 20, generator=generator)
    gt_depth[torch.rand(gt_depth.shape, generator=generator) < 0.93] = 0
    logits = 3 * torch.randn(6, 88, 4, 5, generator=generator, dtype=torch.float64)
    return logits.to(device, dtype).requires_grad_(), gt_depth.to(device)


def test_depth_labels_are_those_of_the_nearest_point_of_each_block():
    _, gt_depth = depth_case()
    labels = depth_targets(gt_depth, 4, DEPTH_RANGE)
    assert labels.shape == (2, 3, 4, 5)
    kinds = set()
    for b, n, i, j in torch.cartesian_prod(*map(torch.arange, labels.shape)).tolist():
        block = gt_depth[b, n, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
        points = block[block > 0].tolist()
        expected = literal_depth_label(min(points)) if points else -1
        kinds.add((bool(points), expected >= 0))
        assert int(labels[b, n, i, j]) == expected
    assert kinds == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_depth_loss_equals_cross_entropy_of_the_labelled_pixels(dtype, tolerance, device):
    logits, gt_depth = depth_case(device, dtype)
    labels = depth_targets(gt_depth, 4, DEPTH_RANGE).flatten(0, 1)
    rows = logits.softmax(1).permute(0, 2, 3, 1)[labels >= 0]                            # [L, D]
    one_hot = F.one_hot(labels[labels >= 0], 88).to(dtype)
    expected = 0.5 * F.binary_cross_entropy(rows, one_hot, reduction="sum") / len(rows)
    loss = depth_loss(logits.softmax(1), gt_depth, 4, DEPTH_RANGE)
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits),
                               rtol=tolerance * 100, atol=tolerance * 0.01)


def test_depth_loss_of_a_certain_mistake_is_finite(device):
    gt_depth = torch.full((1, 1, 4, 4), 1.2, device=device)
    probability = torch.zeros(1, 88, 1, 1, device=device)
    probability[0, 10] = 1
    probability.requires_grad_()
    loss = depth_loss(probability, gt_depth, 4, DEPTH_RANGE)
    assert float(loss.detach()) == pytest.approx(0.5 * 200)                     # two logarithms clamped at -100
    assert torch.isfinite(torch.autograd.grad(loss, probability)[0]).all()


def test_depth_loss_without_points_is_zero_and_keeps_the_graph(device):
    logits, gt_depth = depth_case(device)
    loss = depth_loss(logits.softmax(1), torch.zeros_like(gt_depth), 4, DEPTH_RANGE)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_depth_loss_shows_nan_of_labelled_pixels_only(device):
    logits, gt_depth = depth_case(device)
    labelled = (depth_targets(gt_depth, 4, DEPTH_RANGE) >= 0).flatten(0, 1).unsqueeze(1)
    probability = logits.softmax(1)
    expected = depth_loss(probability, gt_depth, 4, DEPTH_RANGE)
    off = torch.where(labelled, probability, float("nan"))
    assert torch.equal(depth_loss(off, gt_depth, 4, DEPTH_RANGE), expected)
    on = torch.where(labelled, float("nan"), probability)
    assert depth_loss(on, gt_depth, 4, DEPTH_RANGE).isnan()


def test_depth_inputs_are_checked():
    logits, gt_depth = depth_case()
    with pytest.raises(ValueError, match="multiple of downsample=3, got 16 x 20"):
        depth_targets(gt_depth, 3, DEPTH_RANGE)
    for depth_range in ((45.0, 1.0, 0.5), (1.0, 45.0, 0.0), (1.0, 45.0, 3.0), (1.0, 45.0)):
        with pytest.raises(ValueError, match=r"depth must be \[low, high, step\] with a whole number of bins, got \("):
            depth_targets(gt_depth, 4, depth_range)
    with pytest.raises(ValueError, match=r"\[6, 118, 4, 5\] for this gt_depth .* got \[6, 88, 4, 5\]"):
        depth_loss(logits.softmax(1), gt_depth, 4, (1.0, 60.0, 0.5))
