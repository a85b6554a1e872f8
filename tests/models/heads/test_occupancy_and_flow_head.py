"""The two heads: axis order, residual and its gradient, Gumbel guidance, moving classes."""

import pytest
import torch
from torch.nn import functional as F

from mmdet3d.models.heads import OccFlowHead, OccHead

B, C, Z, Y, X, K = 2, 5, 2, 3, 4, 6


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(B, C, Z, Y, X, generator=generator), torch.randn(B, X, Y, Z, K, generator=generator),
            torch.randn(B, 2 * X, 2 * Y, 2 * Z, K, generator=generator))


def occupancy_head():
    torch.manual_seed(1)
    return OccHead(K, C, 7).eval()


def flow_head(**options):
    torch.manual_seed(2)
    return OccFlowHead(K, (0, 2, 3), C, 8, **options).eval()


def test_occupancy_logits(case):
    volume, coarse, _ = case
    head = occupancy_head()
    with torch.no_grad():
        logits, features = head(volume, coarse), head.voxel_conv(volume)
        up = F.interpolate(features, scale_factor=2, mode="trilinear", align_corners=False)
        residual = F.interpolate(coarse.permute(0, 4, 1, 2, 3), scale_factor=2, mode="trilinear", align_corners=False)
        assert logits.shape == (B, 2 * X, 2 * Y, 2 * Z, K)
        for x, y, z in ((0, 0, 0), (7, 1, 2), (3, 5, 1)):
            expected = head.predicter(up[:, :, z, y, x]) + 0.5 * residual[:, :, x, y, z]
            torch.testing.assert_close(logits[:, x, y, z], expected)
    assert head.predicter[0].weight.shape == (14, C) and isinstance(head.predicter[1], torch.nn.Softplus)


def test_no_gradient_into_the_stage_logits(case):
    volume, coarse, _ = case
    head = occupancy_head()
    head(volume.requires_grad_(), coarse.requires_grad_()).square().sum().backward()
    assert coarse.grad is None and volume.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for parameter in head.parameters())


def test_flow(case, monkeypatch):
    volume, _, logits = case
    head = flow_head()
    monkeypatch.setattr(torch.nn.functional, "gumbel_softmax", lambda x, tau, hard, dim: (x / tau).softmax(dim) * 3)
    with torch.no_grad():
        flow, features = head(volume, logits), head.voxel_conv(volume)
        up = F.interpolate(features, scale_factor=2, mode="trilinear", align_corners=False)
        assert flow.shape == (B, 2 * X, 2 * Y, 2 * Z, 2)
        for x, y, z in ((0, 0, 0), (7, 1, 2), (3, 5, 1)):
            guide = head.semantic_guidance(logits[:, x, y, z].softmax(-1) * 3)
            torch.testing.assert_close(flow[:, x, y, z], head.predicter(torch.cat([up[:, :, z, y, x], guide], 1)))
    assert head.semantic_guidance[0].weight.shape == (4, K) and head.predicter[0].weight.shape == (4, C + 4)


def test_gumbel_noise_in_evaluation_follows_the_seed(case):
    volume, _, logits = case
    head = flow_head()

    def flow(seed):
        torch.manual_seed(seed)
        with torch.no_grad():
            return head(volume, logits)

    assert torch.equal(flow(5), flow(5)) and not torch.allclose(flow(5), flow(6))
    # The noise is Gumbel's: softmax(logits + g), with g = -log(exponential).
    torch.manual_seed(5)
    noise = -torch.empty_like(logits).exponential_().log()
    seen = []
    head.semantic_guidance[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    flow(5)
    torch.testing.assert_close(seen[0], (logits + noise).softmax(-1))


def test_without_gumbel_noise_evaluation_is_deterministic(case):
    volume, _, logits = case
    head = flow_head(gumbel_in_eval=False)
    seen = []
    head.semantic_guidance[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        assert torch.equal(head(volume, logits), head(volume, logits))
        torch.testing.assert_close(seen[0], logits.softmax(-1))
        head.train()
        head(volume, logits)
        assert not torch.allclose(seen[-1], logits.softmax(-1))


def test_the_flow_loss_reaches_the_occupancy_logits(case):
    volume, _, logits = case
    head = flow_head()
    head(volume, logits.requires_grad_()).square().sum().backward()
    assert logits.grad.abs().sum() > 0 and all(p.grad.abs().sum() > 0 for p in head.parameters())


def test_moving_classes():
    head = flow_head()
    semantics = torch.arange(K, dtype=torch.uint8).view(1, 2, 3)
    assert head.foreground(semantics).flatten().tolist() == [True, False, True, True, False, False]
    assert "moving_classes" not in head.state_dict()


@pytest.mark.parametrize("option", ["conv_before_predictor", "up_sample", "last_occ_unsample"])
def test_unsupported_options_of_the_occupancy_head(option):
    with pytest.raises(ValueError, match="conv_before_predictor, up_sample and last_occ_unsample must be True"):
        OccHead(K, **{option: False})


def test_unsupported_options_of_the_flow_head():
    with pytest.raises(ValueError, match="up_sample must be True"):
        OccFlowHead(K, (0,), up_sample=False)
