"""What a stage's wrapper prepares for its transformer: query, previous map, augmentation, displacement."""

import math

import pytest
import small_stage as stage
import torch
from torch.nn import functional as F

from mmdet3d.models.attention.backward_projection import ego_shift
from mmdet3d.registry import ConfigError

BATCH, X, Y = stage.BATCH, stage.X, stage.Y


def prepared(arguments, **options):
    """What the transformer is given."""
    module, seen = stage.make(**options), {}
    module.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    with torch.no_grad():
        stage.call(module, **arguments)
    return seen


def as_map(sequence):
    """[B, Q, C] -> [B, C, Y, X] with q = y * X + x."""
    return torch.stack([sequence[:, y * X : (y + 1) * X].transpose(1, 2) for y in range(Y)], 2)


def test_query_logits_and_displacement():
    arguments = stage.inputs()
    seen = prepared(arguments)
    torch.testing.assert_close(as_map(seen["query"]), arguments["volume"].mean(2))
    logits = F.interpolate(arguments["coarse_logits"].permute(0, 4, 1, 2, 3), scale_factor=2, mode="trilinear",
                           align_corners=False)
    torch.testing.assert_close(seen["coarse_logits"], logits.permute(0, 2, 3, 4, 1))
    assert seen["coarse_logits"].shape == (BATCH, X, Y, stage.Z, stage.CLASSES)
    module = stage.make()
    expected = module.transformer.encoder.geometry(arguments["image_from_augmented"], arguments["shift"])
    for mine, theirs in zip((*seen["geometry"].anchors, seen["geometry"].reference_points),
                            (*expected.anchors, expected.reference_points), strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(seen["query_pos"], module.positional_encoding(arguments["bda"]))


def test_the_first_frame_of_the_coarsest_stage_has_neither_logits_nor_previous_map():
    seen = prepared(stage.inputs(coarse=False, previous=False))
    assert seen["coarse_logits"] is None and seen["previous"] is None


@pytest.mark.parametrize("flips", [(False, False), (True, False), (False, True)])
def test_the_previous_map_is_always_turned_around(flips):
    arguments = stage.inputs()
    arguments["previous_flips"] = torch.tensor([flips, flips])
    previous = as_map(prepared(arguments)["previous"])
    torch.testing.assert_close(previous, arguments["previous_volume"].mean(2).flip(2, 3))


def test_the_previous_map_can_be_flipped_by_the_change_of_augmentation():
    arguments = stage.inputs()
    for flip_x in (1, -1):
        for flip_y in (1, -1):
            arguments["previous_flips"] = torch.tensor([[flip_x < 0, flip_y < 0], [False, False]])
            previous = as_map(prepared(arguments, always_flip_previous=False)["previous"])
            expected = arguments["previous_volume"].mean(2)
            axes = [axis for axis, flip in ((3, flip_x), (2, flip_y)) if flip == -1]  # X is the last axis
            torch.testing.assert_close(previous[0], (expected.flip(axes) if axes else expected)[0])
            torch.testing.assert_close(previous[1], expected[1])


def test_a_starting_sequence_sees_the_map_of_the_sequence_before():
    arguments = stage.inputs()  # sample 1 starts
    turned = arguments["previous_volume"].mean(2).flip(2, 3)
    torch.testing.assert_close(as_map(prepared(arguments)["previous"]), turned)
    fresh = prepared(arguments, stale_previous_at_start=False)
    torch.testing.assert_close(as_map(fresh["previous"])[0], turned[0])
    assert torch.equal(fresh["previous"][1], fresh["query"][1])


@pytest.mark.parametrize("invert", [False, True])
def test_augmentation_of_the_anchors(invert):
    arguments = stage.inputs()
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    bda = torch.stack([turn, stage.flips(-1, 1)])
    image_from_ego = arguments["image_from_augmented"]
    found = stage.make(invert_bda=invert).image_from_augmented(image_from_ego, bda)
    for b in range(BATCH):
        augmentation = torch.linalg.inv(bda[b]) if invert else bda[b]
        for n in range(stage.CAMS):
            torch.testing.assert_close(found[b, n], image_from_ego[b, n] @ augmentation)


@pytest.mark.parametrize("legacy", [True, False])
def test_displacement_is_mirrored_with_the_map_unless_it_is_the_legacy_one(legacy):
    moved = torch.tensor([[1.5, 0.5, 0], [0.7, -0.2, 0]], dtype=torch.float64)
    yaw = torch.tensor([0.3, math.pi], dtype=torch.float64)
    bda = torch.stack([stage.flips(1, 1), stage.flips(-1, 1)])
    expected = ego_shift(moved, yaw, (12.0, 16.0), legacy_axes=legacy)
    if not legacy:
        expected[1, 0] = -expected[1, 0]
    found = stage.make(legacy_shift_axes=legacy).displacement(moved, yaw, bda)
    assert found.dtype == torch.float32 and found.all()
    torch.testing.assert_close(found, expected)


def test_for_flips_the_inverse_augmentation_is_the_same():
    image_from_ego, bda = stage.inputs()["image_from_augmented"], stage.flips(-1, 1).expand(BATCH, 4, 4)
    mine, theirs = (stage.make(invert_bda=invert).image_from_augmented(image_from_ego, bda) for invert in (True, False))
    torch.testing.assert_close(mine, theirs)


def test_no_gradient_into_the_past():
    arguments = stage.inputs()
    arguments["volume"].requires_grad_()
    arguments["context"].requires_grad_()
    module = stage.make()
    bev, logits = stage.call(module, **arguments)
    (bev.square().sum() + logits.square().sum()).backward()
    assert arguments["volume"].grad.abs().sum() > 0 and arguments["context"].grad.abs().sum() > 0
    without = [name for name, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["transformer.cams_embeds"]


def test_samples_are_independent_when_the_batch_quirks_are_off():
    encoder = stage.config()["transformer"]["encoder"]["transformerlayers"]
    encoder["attn_cfgs"][0] |= {"scrambled_reduction": False, "interleaved_history_rows": False}
    module = stage.make({"transformerlayers": encoder})
    arguments = stage.inputs()
    with torch.no_grad():
        together = stage.call(module, **arguments)
        for b in range(BATCH):
            alone = stage.call(module, **{name: value[b : b + 1] for name, value in arguments.items()})
            for mine, theirs in zip(alone, together, strict=True):
                torch.testing.assert_close(mine, theirs[b : b + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options, words", [
    ({"use_can_bus": True}, "use_can_bus=True is not supported"),
    ({"bev_w": 5}, r"bev_h, bev_w = \(4, 5\) must be the \(Y, X\) of the encoder's grid_config, \(4, 6\)")])
def test_unsupported_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        stage.make(**options)
