"""Frames, relative poses, the camera vector and frustum points, against NumPy and the literal steps of lifting."""

import camera_rig as rig
import numpy as np
import pytest
import torch

from mmdet3d.models.view_transforms.geometry import (
    CameraFrame,
    camera_frames,
    camera_vector,
    frustum_geometry,
    sweep_geometry,
)
from mmdet3d.ops import frustum_cells
from mmdet3d.structures import CameraInputs, VoxelGrid

BATCH, CAMS, FRAMES, HEIGHT, WIDTH = 2, 4, 3, 5, 7


def named(inputs, *image_size):
    return CameraInputs.from_img_inputs(inputs, CAMS, FRAMES, *image_size)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(3)


@pytest.fixture
def inputs(generator):
    images = torch.randn(BATCH, CAMS * FRAMES, 3, HEIGHT, WIDTH, generator=generator)
    total = BATCH * FRAMES * CAMS
    shape = (BATCH, FRAMES * CAMS)
    poses = rig.stack(lambda: rig.pose(generator, 2.0), total, *shape).float()
    # Far from the global origin, as on real maps: float32 arithmetic would lose centimetres.
    world = rig.stack(lambda: rig.pose(generator, 1500.0), total, *shape).float()
    cams = rig.stack(lambda: rig.intrinsics(generator), total, *shape).float()
    augs = rig.stack(lambda: rig.post_aug(generator), total, *shape).float()
    return images, poses, world, cams, augs, torch.eye(4).expand(BATCH, 4, 4)


def test_images_are_camera_major_and_matrices_frame_major(inputs):
    images, _, _, cams, augs, _ = inputs
    given = named(inputs)
    pictures, frames = given.images.unbind(2), camera_frames(given)
    assert len(pictures) == len(frames) == FRAMES
    for f in range(FRAMES):
        for n in range(CAMS):
            assert torch.equal(pictures[f][:, n], images[:, n * FRAMES + f])
            assert torch.equal(frames[f].intrinsics[:, n], cams[:, f * CAMS + n])
            assert torch.equal(frames[f].post_aug[:, n], augs[:, f * CAMS + n])


def test_poses_are_formed_in_float64(inputs):
    _, poses, world, *_ = inputs
    frames = camera_frames(named(inputs))
    sensor, ego = (m.double().numpy().reshape(BATCH, FRAMES, CAMS, 4, 4) for m in (poses, world))
    for b in range(BATCH):
        key = np.linalg.inv(ego[b, 0, 0])  # the ego of camera 0 of the newest frame
        for f in range(FRAMES):
            assert frames[f].key_ego_from_camera.dtype == torch.float32
            for n in range(CAMS):
                expected = key @ ego[b, f, n] @ sensor[b, f, n]
                np.testing.assert_allclose(frames[f].key_ego_from_camera[b, n], expected, rtol=2e-7, atol=1e-7)
                if f + 1 < FRAMES:
                    older = np.linalg.inv(ego[b, f + 1, n] @ sensor[b, f + 1, n]) @ ego[b, f, n] @ sensor[b, f, n]
                    np.testing.assert_allclose(frames[f].older_camera_from_camera[b, n], older, rtol=2e-7, atol=1e-7)
    assert frames[-1].older_camera_from_camera is None


@pytest.mark.parametrize("position, name", enumerate(["images", "sensor2ego", "ego2global", "intrinsics", "post_aug"]))
def test_a_wrong_number_of_entries_is_named(inputs, position, name):
    wrong = [*inputs]
    wrong[position] = wrong[position][:, 1:]
    with pytest.raises(ValueError, match=rf"img_inputs\[{position}\] \({name}\) must be .*12.*got .*11"):
        named(wrong)


def test_batches_must_agree(inputs):
    wrong = [*inputs]
    wrong[3] = wrong[3][:1]
    with pytest.raises(ValueError, match=r"\(intrinsics\) must be \(2, 12, 4, 4\), got \(1, 12, 4, 4\)"):
        named(wrong)
    with pytest.raises(ValueError, match=r"img_inputs\[0\] \(images\) must be \[B, 12 = 4 cameras x 3 frames"):
        named((inputs[0].flatten(3), *inputs[1:]))


def test_six_tensors_an_image_size_and_one_augmentation_per_sample(inputs):
    batch, total, _, height, width = inputs[0].shape
    with pytest.raises(ValueError, match=r"expected six img_inputs \(images, .*bda\), got 5"):
        named(inputs[:5])
    words = rf"input_size \(H, W\) = \({height}, {width + 1}\), got \({batch}, {total}, 3"
    with pytest.raises(ValueError, match=words):
        named(inputs, (height, width + 1))
    named(inputs, (height, width))
    with pytest.raises(ValueError, match=rf"img_inputs\[5\] \(bda\) must be \({batch}, 4, 4\), got \({batch}, 3, 3\)"):
        named((*inputs[:5], inputs[5][:, :3, :3]))


def test_the_camera_vector_holds_27_numbers_in_order():
    intrinsics, post_aug, bda = (torch.zeros(1, 1, 4, 4) for _ in range(3))
    for row, column, value in ((0, 0, 1), (1, 1, 2), (0, 2, 3), (1, 2, 4)):
        intrinsics[..., row, column] = value
    for row, column, value in ((0, 0, 5), (0, 1, 6), (0, 2, 7), (1, 0, 8), (1, 1, 9), (1, 2, 10)):
        post_aug[..., row, column] = value
    for row, column, value in ((0, 0, 11), (0, 1, 12), (1, 0, 13), (1, 1, 14), (2, 2, 15)):
        bda[..., row, column] = value
    pose = torch.tensor([[16.0, 17, 18, 19], [20, 21, 22, 23], [24, 25, 26, 27], [99, 99, 99, 99]])[None, None]
    camera = CameraFrame(torch.full((1, 1, 4, 4), 77.0), None, intrinsics, post_aug)
    assert camera_vector(camera, pose, bda[:, 0])[0, 0].tolist() == list(range(1, 28))


def test_the_camera_vector_of_a_batch(inputs, generator):
    frames = camera_frames(named(inputs))
    bda = rig.stack(lambda: rig.bda(generator, angle=0.4), BATCH, BATCH).float()
    vector = camera_vector(frames[1], frames[0].key_ego_from_camera, bda)
    assert vector.shape == (BATCH, CAMS, 27)
    assert torch.equal(vector[1, 2, 15:], frames[0].key_ego_from_camera[1, 2, :3].flatten())
    assert torch.equal(vector[1, :, 11], bda[1, 0, 1].expand(CAMS))
    assert torch.equal(vector[..., 6], frames[1].post_aug[..., 0, 2])


def frustum_points(camera, bda, image_size, feature_size, depths, reach, edge):
    """[B, N, D, h, w, 3] frustum points up to ``reach`` metres away, read off grids that are fine along one axis."""
    v, u = (torch.linspace(0, length - 1, count) for length, count in zip(image_size, feature_size, strict=True))
    geometry, points = frustum_geometry(camera, bda), []
    for axis in range(3):
        cell = [2.0 * reach] * 3
        cell[axis] = edge
        index = frustum_cells(geometry, u, v, depths, VoxelGrid((-reach,) * 3, (reach,) * 3, tuple(cell)))
        assert (index >= 0).all()
        points.append((index.double() + 0.5) * edge - reach)
    return torch.stack(points, -1)


def test_a_camera_that_looks_ahead_sees_points_ahead(generator):
    """A camera at (1, 0.2, 1.5) whose optical axis is the ego's x axis: the principal point at 10 m is 11 m ahead."""
    pose = torch.eye(4)
    pose[:3, :3] = torch.tensor([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # right, down, forward -> forward, left, up
    pose[:3, 3] = torch.tensor([1.0, 0.2, 1.5])
    intrinsics = torch.eye(4)
    intrinsics[0, 0] = intrinsics[1, 1] = 40.0
    intrinsics[0, 2], intrinsics[1, 2] = 20.0, 10.0
    camera = CameraFrame(*(m[None, None] for m in (pose, pose)), *(m[None, None] for m in (intrinsics, torch.eye(4))))
    points = frustum_points(camera, torch.eye(4)[None], (21, 41), (3, 5), torch.tensor([10.0]), reach=16.0, edge=1e-5)
    torch.testing.assert_close(points[0, 0, 0, 1, 2].float(), torch.tensor([11.0, 0.2, 1.5]))
    # The right-most column, u = 40, looks 0.5 to the right per metre: y = 0.2 - 5; the top row looks up.
    torch.testing.assert_close(points[0, 0, 0, 0, 4].float(), torch.tensor([11.0, -4.8, 4.0]))


def test_a_result_can_be_changed_without_changing_the_next_one(generator):
    shape = (1, 3)
    older, poses, intrinsics, post_aug = (rig.stack(draw, 3, *shape).float() for draw in (
        lambda: rig.pose(generator), lambda: rig.pose(generator), lambda: rig.intrinsics(generator),
        lambda: rig.post_aug(generator)))
    camera = CameraFrame(poses, older, intrinsics, post_aug)
    first = sweep_geometry(camera, (32, 88))
    expected = {name: tensor.clone() for name, tensor in first.tensors.items()}
    first.pixel_from_augmented.mul_(5)
    for name, tensor in sweep_geometry(camera, (32, 88)).tensors.items():
        assert torch.equal(tensor, expected[name]), name
