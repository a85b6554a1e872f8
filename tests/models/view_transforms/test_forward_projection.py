"""The coarse encoder: which frame meets which, in what order volumes are stacked, and where gradient flows."""

import camera_rig as rig
import pytest
import torch

from mmdet3d.models.view_transforms.geometry import camera_frames
from mmdet3d.registry import build
from mmdet3d.structures import CameraInputs

BATCH, CAMS, FRAMES, IMAGE = 2, 2, 3, (32, 96)
SIZE, CONTEXT, CHANNELS = (2, 6), 5, 7
GRID = {"x": [-8, 8, 2.0], "y": [-6, 6, 2.0], "z": [-2, 2, 1.0], "depth": [1.0, 11.0, 2.0]}  # X, Y, Z, D = 8, 6, 4, 5
CONFIG = {
    "type": "BEVDetStereoForwardProjection", "num_cams": CAMS, "adjust_channel": CHANNELS,
    "img_backbone": {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": (0, 2, 3),
                     "norm_eval": False},
    "img_neck": {"type": "CustomFPN", "in_channels": [32, 64], "out_channels": 9, "num_outs": 1, "out_ids": [0]},
    "img_view_transformer": {"type": "LSSVStereoForwardPorjection", "grid_config": GRID, "input_size": IMAGE,
                             "in_channels": 9, "out_channels": CONTEXT,
                             "depthnet_cfg": {"aspp_mid_channels": 4, "stereo": True, "bias": 5.0}},
    "img_bev_encoder_backbone": {"type": "CustomResNet3D", "numC_input": 2 * CONTEXT, "num_layer": [1, 1],
                                 "num_channels": [CHANNELS, 11], "stride": [1, 2], "adjust_number_channel": CHANNELS},
}


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(8)
    total, shape = BATCH * FRAMES * CAMS, (BATCH, FRAMES * CAMS)
    still = torch.eye(4).expand(BATCH, FRAMES * CAMS, 4, 4).clone()
    still[:, :, 0, 3] = torch.arange(FRAMES).repeat_interleave(CAMS) * -0.4  # driving ahead
    return (torch.randn(BATCH, CAMS * FRAMES, 3, *IMAGE, generator=generator),
            rig.stack(lambda: rig.pose(generator), total, *shape).float(), still,
            rig.stack(lambda: rig.intrinsics(generator), total, *shape).float(),
            torch.eye(4).expand(BATCH, FRAMES * CAMS, 4, 4),
            rig.stack(lambda: rig.bda(generator), BATCH, BATCH).float())


def build_module(**changes):
    torch.manual_seed(2)
    return build({**CONFIG, **changes}).eval()


@pytest.fixture(scope="module")
def module():
    return build_module()


def named(inputs, *image_size):
    return CameraInputs.from_img_inputs(inputs, CAMS, FRAMES, *image_size)


def forward(module, inputs):
    given = named(inputs)
    return module(given.images, module.geometry(given))


class Calls:
    """What the view transform was given and gave, call after call, and what the 3D encoder was given."""

    def __init__(self, module, inputs):
        self.transform, self.stacked = [], None
        hooks = [module.img_view_transformer.register_forward_hook(
                     lambda _, args, output: self.transform.append((args, output))),
                 module.img_bev_encoder_backbone.register_forward_pre_hook(self._keep_stacked)]
        self.features = forward(module, inputs)
        for hook in hooks:
            hook.remove()

    def _keep_stacked(self, _, args):
        self.stacked = args[0]


@pytest.fixture(scope="module")
def calls(module, inputs):
    return Calls(module, inputs)  # with gradients, hence frame after frame


def test_shapes(module, calls):
    features = calls.features
    shapes = [tuple(volume.shape) for volume in features.volumes]
    assert shapes == [(BATCH, CHANNELS, 4, 6, 8), (BATCH, CHANNELS, 2, 3, 4)]
    assert features.depth.shape == (BATCH * CAMS, 5, *SIZE)
    torch.testing.assert_close(features.depth.sum(1), torch.ones(BATCH * CAMS, *SIZE))
    _, (_, depth, context) = calls.transform[1]
    assert torch.equal(features.depth, depth)
    torch.testing.assert_close(features.context, module.adjust_channel_conv(context))


def test_the_earlier_frames_volume_comes_first(calls):
    earlier, key = (output[0] for _, output in calls.transform)
    assert torch.equal(calls.stacked, torch.cat([earlier, key], 1)) and not torch.allclose(earlier, key)


def test_each_frame_is_matched_with_the_one_before(module, calls, inputs):
    images, cameras = named(inputs).images.unbind(2), camera_frames(named(inputs))
    with torch.no_grad():
        features = [module.frame_features(image.flatten(0, 1)) for image in images]
        oldest = module.img_backbone.first_stage(images[2].flatten(0, 1))
    torch.testing.assert_close(oldest, features[2].stereo)
    for call, frame in ((0, 1), (1, 0)):
        neck, geometry, stereo, older_stereo = calls.transform[call][0]
        torch.testing.assert_close(neck, features[frame].neck)
        torch.testing.assert_close(stereo, features[frame].stereo)
        torch.testing.assert_close(older_stereo, features[frame + 1].stereo)
        # The camera vector holds the key frame's poses, for both.
        pose = cameras[0].key_ego_from_camera
        expected = module.img_view_transformer.geometry(cameras[frame], pose, inputs[5])
        assert torch.equal(geometry.camera_vector[..., 15:], pose[..., :3, :].flatten(-2))
        for mine, theirs in zip(*((lift.camera_vector, *lift.frustum, *lift.sweep) for lift in (geometry, expected)),
                                strict=True):
            assert torch.equal(mine, theirs) if torch.is_tensor(mine) else mine == theirs == IMAGE


def test_own_extrinsics_of_the_earlier_frame(inputs, calls):
    module = build_module(legacy_adjacent_extrinsics=False)
    own = Calls(module, inputs)
    cameras = camera_frames(named(inputs))
    for call, frame in ((0, 1), (1, 0)):
        pose = own.transform[call][0][1].camera_vector[..., 15:]
        assert torch.equal(pose, cameras[frame].key_ego_from_camera[..., :3, :].flatten(-2))
    torch.testing.assert_close(own.features.depth, calls.features.depth)
    assert not torch.allclose(own.features.volumes[0], calls.features.volumes[0])


def test_without_an_earlier_frame_its_volume_is_zero(inputs, calls):
    alone = Calls(build_module(with_prev=False), inputs)
    assert len(alone.transform) == 1 and not alone.stacked[:, :CONTEXT].any()
    assert torch.equal(alone.stacked[:, CONTEXT:], calls.stacked[:, CONTEXT:])


def test_gradient_flows_into_the_key_frame_alone(inputs):
    module = build_module().train()
    images = inputs[0].clone().requires_grad_()
    features = forward(module, (images, *inputs[1:]))
    sum(volume.square().sum() for volume in features.volumes).backward()
    per_frame = images.grad.unflatten(1, (CAMS, FRAMES)).abs().sum((0, 1, 3, 4, 5))
    assert per_frame[0] > 0 and not per_frame[1:].any()
    # Batch norms see the earlier frames too: the stem and first stage all three, the rest two, the 3D encoder one.
    for name, count in {"img_backbone.bn1": 3, "img_backbone.layer1.0.bn1": 3, "img_backbone.layer2.0.bn1": 2,
                        "img_view_transformer.depth_net.bn": 2,
                        "img_bev_encoder_backbone.layers.0.0.conv1.bn": 1}.items():
        assert module.get_buffer(f"{name}.num_batches_tracked") == count, name


@pytest.mark.parametrize("options", [{}, {"with_prev": False}, {"legacy_adjacent_extrinsics": False}])
def test_without_gradient_both_frames_share_a_pass(inputs, options):
    module = build_module(**options)
    one_by_one = forward(module, inputs)
    with torch.no_grad():
        together = forward(module, inputs)
    assert together.key_features is None
    for name in ("depth", "context"):
        torch.testing.assert_close(getattr(together, name), getattr(one_by_one, name))
    for mine, theirs in zip(together.volumes, one_by_one.volumes, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frames_in_one_pass_through_the_backbone(module, inputs):
    images = [frame.flatten(0, 1) for frame in named(inputs).images.unbind(2)]
    with torch.no_grad():
        expected = [module.frame_features(image) for image in images[:2]]
        features = module._batch_features(images, full=2)
        assert features[2].neck is None
        torch.testing.assert_close(features[2].stereo, module.img_backbone.first_stage(images[2]))
    for mine, theirs in zip(features, expected, strict=False):
        torch.testing.assert_close(mine.stereo, theirs.stereo)
        torch.testing.assert_close(mine.neck, theirs.neck)


@pytest.mark.parametrize("option", [{"num_adj": 2}, {"stereo_feat_index": 1}, {"return_intermediate": False}])
def test_unsupported_options_are_refused(option):
    with pytest.raises(ValueError, match="supported are num_adj=1, stereo_feat_index=0, return_intermediate=True; got"):
        build_module(**option)


def test_another_stride_of_the_stereo_features_is_refused():
    with pytest.raises(ValueError, match="cv_downsample must be 4, .* got 8"):
        build_module(cv_downsample=8)
    assert build_module(cv_downsample=4).num_cams == CAMS


def test_the_view_transform_may_do_without_stereo(inputs, calls):
    transform = {**CONFIG["img_view_transformer"], "type": "LSSForwardProjection",
                 "depthnet_cfg": {"aspp_mid_channels": 4, "stereo": False}}
    module = build_module(img_view_transformer=transform)
    assert not any("cost_volumn_net" in key for key in module.state_dict())
    with torch.no_grad():
        features = forward(module, inputs)
        again = forward(module, inputs)
    assert [v.shape for v in features.volumes] == [v.shape for v in calls.features.volumes]
    assert features.depth.shape == calls.features.depth.shape and features.context.shape == calls.features.context.shape
    assert all(v.isfinite().all() and v.any() for v in features.volumes)
    torch.testing.assert_close(again.depth, features.depth)


def test_images_of_another_size_are_refused(module, inputs):
    with pytest.raises(ValueError, match=r"input_size \(H, W\) = \(32, 96\), got \(2, 6, 3, 32, 64\)"):
        named((inputs[0][..., :64], *inputs[1:]), IMAGE)


def test_context_without_an_adjusting_convolution(inputs):
    module = build_module(adjust_channel=None)
    assert not any("adjust_channel_conv" in key for key in module.state_dict())
    with torch.no_grad():
        assert forward(module, inputs).context.shape == (BATCH * CAMS, CONTEXT, *SIZE)


def test_registration_order_follows_the_published_checkpoints(module):
    assert [name for name, _ in module.named_children()] == [
        "img_backbone", "img_neck", "img_view_transformer", "img_bev_encoder_backbone", "adjust_channel_conv"]
