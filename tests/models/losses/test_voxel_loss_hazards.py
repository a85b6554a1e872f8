"""Empty scales, single voxels, NaN, data types and wrong inputs of the voxel losses; the set of all losses."""

import pytest
import torch
from literal_losses import (
    literal_focal,
    literal_geometric_affinity,
    literal_lovasz,
    literal_semantic_affinity,
    make_case,
)

from mmdet3d.models.losses import (
    CustomFocalLoss,
    VoxelLosses,
    geometric_affinity_loss,
    lovasz_softmax_loss,
    semantic_affinity_loss,
)
from mmdet3d.registry import LOSSES, build_from_config

SHAPE = (2, 5, 3, 4)
LOSS_FUNCTIONS = {
    "focal": CustomFocalLoss(bev_h=3, bev_w=5),
    "semantic": semantic_affinity_loss,
    "geometric": lambda x, t: geometric_affinity_loss(x, t, 5),
    "lovasz": lovasz_softmax_loss,
}
EACH = pytest.mark.parametrize("name", LOSS_FUNCTIONS)


def functions(name, device="cpu"):
    return LOSS_FUNCTIONS[name].to(device) if name == "focal" else LOSS_FUNCTIONS[name]


@EACH
def test_no_labelled_voxel_gives_zero_and_no_gradient(name, device):
    logits, target = make_case(SHAPE, dtype=torch.float32, device=device)
    loss = functions(name, device)(logits, torch.full_like(target, 255))
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@EACH
def test_no_labelled_voxel_does_not_hide_nan(name):
    logits, target = make_case(SHAPE, dtype=torch.float32)
    with torch.no_grad():
        logits[0, 0, 0, 0, 0] = float("nan")
    assert functions(name)(logits, torch.full_like(target, 255)).isnan()


def test_only_free_voxels():
    logits, target = make_case(SHAPE)
    free = torch.where(target == 255, 255, 5)
    loss = semantic_affinity_loss(logits, free)
    loss.backward()
    assert float(loss.detach()) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    torch.testing.assert_close(geometric_affinity_loss(logits, free, 5), literal_geometric_affinity(logits, free, 5))


def test_every_voxel_of_one_class():
    logits, target = make_case(SHAPE)
    same = torch.where(target == 255, 255, 1)
    torch.testing.assert_close(semantic_affinity_loss(logits, same), literal_semantic_affinity(logits, same))
    torch.testing.assert_close(lovasz_softmax_loss(logits, same), literal_lovasz(logits, same))


@pytest.mark.parametrize("label", [1, 5])
def test_one_labelled_voxel(label):
    logits, target = make_case(SHAPE)
    target = torch.full_like(target, 255)
    target[1, 4, 2, 3] = label
    torch.testing.assert_close(lovasz_softmax_loss(logits, target), 1 - logits.softmax(-1)[1, 4, 2, 3, label])
    expected, _ = literal_focal(logits.detach(), target, torch.ones(6))
    assert functions("focal")(logits, target).item() == pytest.approx(expected, rel=1e-6)
    assert torch.isfinite(geometric_affinity_loss(logits, target, 5))
    assert torch.isfinite(semantic_affinity_loss(logits, target))


@EACH
def test_nan_shows(name, device):
    logits, target = make_case(SHAPE, dtype=torch.float32, ignored=0, device=device)
    with torch.no_grad():
        logits[0, 0, 0, 0, 1] = float("nan")
    assert functions(name, device)(logits, target).isnan()


@EACH
def test_ignored_voxels_take_no_part(name, device):
    logits, target = make_case(SHAPE, dtype=torch.float32, device=device)
    expected = functions(name, device)(logits, target)
    expected_grad, = torch.autograd.grad(expected, logits)
    changed = torch.where((target == 255).unsqueeze(-1), 40 * torch.randn_like(logits), logits)
    changed = changed.detach().requires_grad_()
    loss = functions(name, device)(changed, target)
    grad, = torch.autograd.grad(loss, changed)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert not grad[target == 255].any()


@pytest.mark.parametrize("name", ["focal", "lovasz"])
def test_nan_in_an_ignored_voxel_does_not_reach_the_loss(name):
    logits, target = make_case(SHAPE, dtype=torch.float32)
    broken = torch.where((target == 255).unsqueeze(-1), float("nan"), logits)
    torch.testing.assert_close(functions(name)(broken, target), functions(name)(logits, target))


@EACH
def test_uint8_and_int64_targets_agree(name, device):
    logits, target = make_case(SHAPE, dtype=torch.float32, device=device)
    assert torch.equal(functions(name, device)(logits, target.to(torch.uint8)), functions(name, device)(logits, target))


@EACH
def test_half_precision_logits_under_autocast_are_computed_in_float32(name, device):
    logits, target = make_case(SHAPE, dtype=torch.bfloat16, device=device)
    expected = functions(name, device)(logits.detach().float(), target)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = functions(name, device)(logits, target)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    grad, = torch.autograd.grad(loss, logits)
    assert grad.dtype == torch.bfloat16
    assert grad.any()


@pytest.mark.parametrize("name", ["semantic", "geometric", "lovasz"])
def test_the_order_of_voxels_and_samples_does_not_matter(name):
    logits, target = make_case(SHAPE, dtype=torch.float64)
    order = torch.randperm(target.numel(), generator=torch.Generator().manual_seed(1))
    shuffled = logits.reshape(-1, 6)[order].view_as(logits)
    shuffled_target = target.reshape(-1)[order].view_as(target)
    torch.testing.assert_close(functions(name)(shuffled, shuffled_target), functions(name)(logits, target))


@EACH
def test_logits_need_not_be_contiguous(name, device):
    logits, target = make_case(SHAPE, dtype=torch.float32, device=device)
    volume = logits.permute(0, 4, 3, 2, 1).contiguous().permute(0, 4, 3, 2, 1)
    assert not volume.is_contiguous()
    torch.testing.assert_close(functions(name, device)(volume, target), functions(name, device)(logits, target))


def test_class_weights_belong_to_the_columns():
    logits, target = make_case(SHAPE)
    loss = CustomFocalLoss(bev_h=3, bev_w=5)
    parts = [loss(logits, target, torch.eye(6)[k]) for k in range(6)]
    weights = torch.tensor([0.5, 1.0, 0.25, 2.0, 1.0, 4.0])
    expected = sum(float(w) * p for w, p in zip(weights, parts, strict=True))
    torch.testing.assert_close(loss(logits, target, weights), expected)


def test_large_counts_keep_their_digits():
    """Nearly everything free and well predicted: the sums differ by far less than they are large."""
    generator = torch.Generator().manual_seed(5)
    target = torch.full((1, 200, 200, 16), 3)
    target[torch.rand(target.shape, generator=generator) < 2e-4] = 0
    logits = torch.randn(*target.shape, 4, generator=generator)
    logits.scatter_add_(-1, target.unsqueeze(-1), torch.full((*target.shape, 1), 6.0))
    for loss in (semantic_affinity_loss, lovasz_softmax_loss, lambda x, t: geometric_affinity_loss(x, t, 3)):
        torch.testing.assert_close(loss(logits, target).double(), loss(logits.double(), target), rtol=1e-4, atol=1e-6)


@pytest.mark.cuda
def test_no_loss_waits_for_the_device():
    losses = VoxelLosses(bev_h=16, bev_w=24, empty_index=5, class_weights=[1.0] * 6).cuda()
    cases = [make_case((2, 24 >> i, 16 >> i, 8 >> i), dtype=torch.float32, device="cuda") for i in range(4)]
    logits, targets = [c[0] for c in cases], [c[1] for c in cases]
    sum(losses(logits, targets).values()).backward()                        # first use may set libraries up
    torch.cuda.set_sync_debug_mode("error")
    try:
        sum(losses(logits, targets).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_all_scales_give_the_single_losses_times_their_weights(device):
    weights = [0.5, 1.0, 0.25, 2.0, 1.0, 4.0]
    losses = VoxelLosses(bev_h=16, bev_w=24, empty_index=5, class_weights=weights).to(device)
    cases = [make_case((2, 24 >> i, 16 >> i, 8 >> i), dtype=torch.float32, device=device, seed=i,
                       target_dtype=torch.uint8) for i in range(4)]
    result = losses([c[0] for c in cases], [c[1] for c in cases])
    assert list(result) == [f"loss_voxel_{kind}_c_1_{scale}" for scale in (1, 2, 4, 8)
                            for kind in ("ce", "sem_scal", "geo_scal", "lovasz")]
    for i, (logits, target) in enumerate(cases):
        tag, factor = f"c_1_{2 ** i}", 0.5 ** i
        focal = CustomFocalLoss(bev_h=16 >> i, bev_w=24 >> i).to(device)
        expected = {"ce": focal(logits, target, torch.tensor(weights, device=device)),
                    "sem_scal": semantic_affinity_loss(logits, target),
                    "geo_scal": geometric_affinity_loss(logits, target, 5),
                    "lovasz": lovasz_softmax_loss(logits, target)}
        total = sum(expected.values())
        for kind, value in expected.items():
            torch.testing.assert_close(result[f"loss_voxel_{kind}_{tag}"], factor * value)
        mine = sum(value for key, value in result.items() if key.endswith(tag))
        grad, = torch.autograd.grad(mine, logits, retain_graph=True)  # the scales share a part of the graph
        expected_grad, = torch.autograd.grad(factor * total, logits)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-7)


def test_every_key_is_there_for_an_empty_scale():
    losses = VoxelLosses(bev_h=2, bev_w=4, empty_index=5, scale_weights=(1.0, 0.5))
    cases = [make_case((1, 4 >> i, 2 >> i, 2 >> i), dtype=torch.float32) for i in range(2)]
    result = losses([c[0] for c in cases], [torch.full_like(c[1], 255) for c in cases])
    assert len(result) == 8
    assert all(v.item() == 0 and v.requires_grad for v in result.values())


def test_nothing_is_kept_in_the_state_dict_and_buffers_move():
    losses = VoxelLosses(bev_h=16, bev_w=24, empty_index=5, class_weights=[1.0] * 6)
    assert not losses.state_dict()
    assert not list(losses.parameters())
    assert all(b.device.type == "meta" for b in losses.to("meta").buffers())


def test_focal_is_built_from_a_config():
    loss = build_from_config(dict(type="CustomFocalLoss", bev_h=3, bev_w=5), LOSSES)
    assert isinstance(loss, CustomFocalLoss)
    assert loss.loss_weight == 100


@pytest.mark.parametrize("option", [dict(use_sigmoid=False), dict(activated=True), dict(reduction="sum")])
def test_focal_refuses_options_that_are_not_defined(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}=.* is not supported"):
        CustomFocalLoss(bev_h=3, bev_w=5, **option)


def test_focal_needs_the_size_of_the_grid():
    with pytest.raises(TypeError, match="'bev_h' and 'bev_w'"):
        CustomFocalLoss()


@EACH
def test_wrong_inputs_are_named(name):
    logits, target = make_case(SHAPE, dtype=torch.float32)
    wrong = target.clone()
    wrong[0, 0, 0, :2] = torch.tensor([6, 17])
    with pytest.raises(ValueError, match=r"labels \[6, 17\]; accepted are 0..5 and 255"):
        functions(name)(logits, wrong)
    with pytest.raises(ValueError, match=r"target \[B, X, Y, Z\], got \[2, 5, 3, 4, 6\] and \[2, 5, 4, 3\]"):
        functions(name)(logits, target.transpose(2, 3))
    with pytest.raises(TypeError, match="integer labels, got torch.float32"):
        functions(name)(logits, target.float())


def test_wrong_sizes_are_named():
    logits, target = make_case(SHAPE, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"X, Y = bev_w, bev_h = \[3, 5\]"):
        CustomFocalLoss(bev_h=5, bev_w=3)(logits, target)
    with pytest.raises(ValueError, match=r"class_weights must be \[6\]"):
        functions("focal")(logits, target, torch.ones(5))
    with pytest.raises(ValueError, match="empty_index must be 0..5"):
        geometric_affinity_loss(logits, target, 6)
    with pytest.raises(ValueError, match="cannot be halved"):
        VoxelLosses(bev_h=20, bev_w=24, empty_index=5)
    with pytest.raises(ValueError, match="4 scales, got 1 and 1"):
        VoxelLosses(bev_h=16, bev_w=24, empty_index=5)([logits], [target])
