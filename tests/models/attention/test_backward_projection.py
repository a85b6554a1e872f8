"""What a stage's wrapper prepares for its transformer: query, previous map, augmentation, displacement."""

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
        module(**arguments)
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
    torch.testing.assert_close(seen["shift"], ego_shift(arguments["displacement"], arguments["yaw"], (12.0, 16.0)))
    module = stage.make()
    torch.testing.assert_close(seen["query_pos"], module.positional_encoding(arguments["bda"]))


def test_the_first_frame_of_the_coarsest_stage_has_neither_logits_nor_previous_map():
    seen = prepared(stage.inputs(coarse=False, previous=False))
    assert seen["coarse_logits"] is None and seen["previous"] is None


@pytest.mark.parametrize("previous_flips, current_flips", [((1, 1), (1, 1)), ((-1, 1), (1, 1)), ((1, -1), (-1, -1))])
def test_the_previous_map_is_always_turned_around(previous_flips, current_flips):
    arguments = stage.inputs()
    arguments["previous_bda"] = stage.flips(*previous_flips).expand(BATCH, 4, 4)
    arguments["bda"] = stage.flips(*current_flips).expand(BATCH, 4, 4)
    previous = as_map(prepared(arguments)["previous"])
    torch.testing.assert_close(previous, arguments["previous_volume"].mean(2).flip(2, 3))


def test_the_previous_map_can_be_flipped_by_the_change_of_augmentation():
    arguments = stage.inputs()
    for flip_x in (1, -1):
        for flip_y in (1, -1):
            arguments["previous_bda"] = torch.stack([stage.flips(flip_x, 1), stage.flips(-1, -1)])
            arguments["bda"] = torch.stack([stage.flips(1, flip_y), stage.flips(-1, -1)])
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
    arguments["bda"] = torch.stack([turn, stage.flips(-1, 1)])
    seen = prepared(arguments, invert_bda=invert)
    for b in range(BATCH):
        bda = torch.linalg.inv(arguments["bda"][b]) if invert else arguments["bda"][b]
        for n in range(stage.CAMS):
            torch.testing.assert_close(seen["image_from_ego"][b, n], arguments["image_from_ego"][b, n] @ bda)


def test_for_flips_the_inverse_augmentation_is_the_same():
    arguments = stage.inputs()
    arguments["bda"] = stage.flips(-1, 1).expand(BATCH, 4, 4)
    with torch.no_grad():
        for mine, theirs in zip(stage.make(invert_bda=True)(**arguments), stage.make()(**arguments), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_no_gradient_into_the_past():
    arguments = stage.inputs()
    arguments["volume"].requires_grad_()
    arguments["context"].requires_grad_()
    module = stage.make()
    bev, logits = module(**arguments)
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
        together = module(**arguments)
        for b in range(BATCH):
            alone = module(**{name: value[b : b + 1] for name, value in arguments.items()})
            for mine, theirs in zip(alone, together, strict=True):
                torch.testing.assert_close(mine, theirs[b : b + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options, words", [
    ({"use_can_bus": True}, "use_can_bus=True is not supported"),
    ({"bev_w": 5}, r"bev_h, bev_w = \(4, 5\) must be the \(Y, X\) of the encoder's grid_config, \(4, 6\)")])
def test_unsupported_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        stage.make(**options)
