"""Lifting and splatting of image features against a loop."""

import itertools

import camera_rig as rig
import pytest
import torch
from literal_lift import literal_points

from mmdet3d.models.view_transforms import LSSForwardProjection, LSSVStereoForwardProjection
from mmdet3d.models.view_transforms.geometry import CameraFrame, camera_vector
from mmdet3d.registry import ConfigError, build
from mmdet3d.structures import depth_bins

CONFIG = {"grid_config": {"x": [-6, 6, 2.0], "y": [-5, 5, 2.0], "z": [-4, 4, 2.0], "depth": [2.0, 12.0, 2.0]},
          "input_size": (32, 48), "in_channels": 6, "out_channels": 7, "downsample": 16,
          "depthnet_cfg": {"aspp_mid_channels": 4}}
BATCH, CAMS, SIZE = 2, 3, (2, 3)


@pytest.fixture
def scene():
    """Cameras, BEV augmentation and a feature map."""
    generator = torch.Generator().manual_seed(5)
    shape = (BATCH, CAMS)
    camera = CameraFrame(rig.stack(lambda: rig.pose(generator), 6, *shape).float(), None,
                         rig.stack(lambda: rig.intrinsics(generator), 6, *shape).float(),
                         rig.stack(lambda: rig.post_aug(generator), 6, *shape).float())
    bda = torch.stack([rig.bda(generator, (-1, 1)), rig.bda(generator, (1, -1))]).float()
    return camera, bda, torch.randn(BATCH * CAMS, 6, *SIZE, generator=generator)


def literal_volume(module, camera, bda, depth, context):
    """Each pixel's context times depth probability, dropped into its voxel; truncation by Python's int()."""
    grid = module.grid
    size_x, size_y, size_z = grid.size_xyz
    points = literal_points(camera, bda, module.input_size, SIZE, module.depths)
    volume = torch.zeros(BATCH, context.shape[1], size_z, size_y, size_x)
    kept = 0
    for b, n, d, v, u in itertools.product(*map(range, points.shape[:-1])):
        x, y, z = (int((float(points[b, n, d, v, u, i]) - grid.low[i]) / grid.cell[i]) for i in range(3))
        if 0 <= x < size_x and 0 <= y < size_y and 0 <= z < size_z:
            volume[b, :, z, y, x] += depth[b * CAMS + n, d, v, u] * context[b * CAMS + n, :, v, u]
            kept += 1
    return volume, kept / points[..., 0].numel()


def test_lift_and_splat_equal_a_loop(scene):
    torch.manual_seed(0)
    camera, bda, feature = scene
    module = build({"type": "LSSForwardProjection", **CONFIG}).eval()
    with torch.no_grad():
        volume, depth, context = module(feature, module.geometry(camera, camera.key_ego_from_camera, bda))
        logits, expected_context = module.depth_net(
            feature, camera_vector(camera, camera.key_ego_from_camera, bda).flatten(0, 1), None)
    assert volume.shape == (BATCH, 7, 4, 5, 6) and volume.is_contiguous()
    assert depth.shape == (BATCH * CAMS, 5, *SIZE) and context.shape == (BATCH * CAMS, 7, *SIZE)
    torch.testing.assert_close(depth, logits.softmax(1))
    torch.testing.assert_close(context, expected_context)
    expected, kept = literal_volume(module, camera, bda, depth, context)
    assert 0.2 < kept < 0.9
    torch.testing.assert_close(volume, expected)
    module.truncate_toward_zero = False
    with torch.no_grad():
        floored, *_ = module(feature, module.geometry(camera, camera.key_ego_from_camera, bda))
    assert not torch.allclose(floored, expected)


def test_gradients_reach_depth_and_context(scene):
    camera, bda, feature = scene
    module = build({"type": "LSSForwardProjection", **CONFIG})
    volume, *_ = module(feature.requires_grad_(), module.geometry(camera, camera.key_ego_from_camera, bda))
    volume.square().sum().backward()
    assert feature.grad.abs().sum() > 0
    for name in ("context_conv.weight", "depth_conv.4.weight", "context_mlp.fc1.weight", "depth_mlp.fc1.weight"):
        assert module.depth_net.get_parameter(name).grad.abs().sum() > 0, name


def test_no_point_in_the_grid_gives_zeros(scene):
    camera, bda, feature = scene
    module = build({"type": "LSSForwardProjection", **CONFIG}).eval()
    bda = bda.clone()
    bda[:, 0, 3] = 1e4
    volume, *_ = module(feature, module.geometry(camera, camera.key_ego_from_camera, bda))
    assert volume.shape == (BATCH, 7, 4, 5, 6) and not volume.any()


def test_depth_bins():
    module = build({"type": "LSSForwardProjection", **CONFIG})
    assert module.depths.tolist() == [2, 4, 6, 8, 10]
    published = torch.arange(1.0, 45.0, 0.5)
    assert len(published) == 88 and published[-1] == 44.5
    assert "depths" not in module.state_dict()


def test_rounding_adds_no_depth_bin():
    for depth in ([0.0, 0.6, 0.2], [0.0, 2.1, 0.7], [1.0, 1.3, 0.1]):
        module = build({"type": "LSSForwardProjection", **CONFIG, "grid_config": {**CONFIG["grid_config"],
                                                                                "depth": depth}})
        assert len(module.depths) == depth_bins(depth) == 3


@pytest.mark.parametrize("change, words", [
    ({"depthnet_cfg": {"aspp_mid_channel": 4}},
     r"transform.depthnet_cfg: unknown \['aspp_mid_channel'\] \(did you mean 'aspp_mid_channels'\?\); accepted are \["),
    ({"grid_config": {**CONFIG["grid_config"], "w": [0, 1, 1]}},
     r"transform.grid_config: unknown \['w'\]; accepted are \['depth', 'x', 'y', 'z'\]"),
    ({"depthnet_cfg": {"stereo": True}}, "stereo=True needs the cost volume of LSSVStereoForwardProjection"),
    ({"type": "LSSVStereoForwardProjection", "cv_downsample": 8}, "cv_downsample must be 4, .* got 8")])
def test_options_that_do_not_fit_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        build({"type": "LSSForwardProjection", **CONFIG, **change}, "transform")


@pytest.mark.parametrize("option", ["collapse_z", "accelerate", "sid", "with_depth_from_lidar"])
def test_unsupported_options_are_refused(option):
    with pytest.raises(ValueError, match=rf"\['{option}'\] are not supported, set them to False"):
        LSSForwardProjection(**CONFIG, **{option: True})


@pytest.mark.parametrize("depth", [None, [1.0, 45.0], [1.0, 45.0, 3.0]])
def test_depth_bins_must_be_given(depth):
    grid_config = {key: value for key, value in (CONFIG["grid_config"] | {"depth": depth}).items() if value}
    with pytest.raises(ValueError, match=r"depth must be \[low, high, step\] with a whole number of bins, got "):
        LSSForwardProjection(**{**CONFIG, "grid_config": grid_config})


def test_the_stereo_variant_hands_a_cost_volume_to_the_depth_net(scene):
    torch.manual_seed(1)
    camera, bda, feature = scene
    generator = torch.Generator().manual_seed(6)
    older = rig.stack(lambda: rig.pose(generator, 0.3), 6, BATCH, CAMS).float()
    camera = CameraFrame(camera.key_ego_from_camera, older, camera.intrinsics, camera.post_aug)
    module = LSSVStereoForwardProjection(**{**CONFIG, "depthnet_cfg": {**CONFIG["depthnet_cfg"], "stereo": True}})
    seen = []
    module.depth_net.cost_volumn_net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    stereo = torch.rand(2, BATCH * CAMS, 8, 4 * SIZE[0], 4 * SIZE[1], generator=generator).requires_grad_()
    volume, depth, context = module.eval()(
        feature, module.geometry(camera, camera.key_ego_from_camera, bda), stereo[0], stereo[1])
    assert volume.shape == (BATCH, 7, 4, 5, 6)
    assert seen[0].shape == (BATCH * CAMS, 5, 8, 12) and not seen[0].requires_grad
    torch.testing.assert_close(seen[0].sum(1), torch.ones(BATCH * CAMS, 8, 12))
    volume.sum().backward()
    assert module.depth_net.cost_volumn_net[0].weight.grad.abs().sum() > 0 and stereo.grad is None
