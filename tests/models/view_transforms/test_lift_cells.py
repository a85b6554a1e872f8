"""The voxel of every frustum point of driving rigs with augmentations, against the literal steps of the lift."""

import math

import pytest
import torch
from literal_lift import literal_cells, literal_points

from mmdet3d.datasets.synthetic.stream import Drive
from mmdet3d.models.detectors.frame_plan import map_tensors
from mmdet3d.models.view_transforms import LSSVStereoForwardProjection
from mmdet3d.models.view_transforms.geometry import CameraFrame, camera_frames
from mmdet3d.structures import CameraInputs

SEEDS, CAMS, FRAMES, IMAGE = range(4), 6, 3, (256, 704)
GRID = {"x": [-40, 40, 0.8], "y": [-40, 40, 0.8], "z": [-1, 5.4, 0.8], "depth": [1.0, 45.0, 0.5]}


@pytest.fixture(scope="module")
def transform():
    """The lift of the released model, but for its channels."""
    torch.manual_seed(0)
    return LSSVStereoForwardProjection(
        GRID, IMAGE, in_channels=8, out_channels=4, depthnet_cfg={"stereo": True, "aspp_mid_channels": 4}).eval()


def lifted_cameras(seed):
    """Cameras of the earlier and the key frame, and their BEV augmentations, as B' = 4 samples.

    Two vehicles; every image is scaled, turned, mirrored and moved as in training, all frames of a camera alike; one
    vehicle's world is mirrored along both axes, the other's along y and turned and scaled besides.
    """
    inputs, _ = Drive(IMAGE, batch=2, seed=seed).sample(3 + seed)
    generator = torch.Generator().manual_seed(seed)
    for n in range(CAMS):
        scale, angle, *shift = torch.randn(4, generator=generator).tolist()
        cos, sin = (0.44 + 0.03 * scale) * math.cos(0.05 * angle), 0.44 * math.sin(0.05 * angle)
        mirror = -1 if (n + seed) % 2 else 1
        post_aug = inputs[4][:, n::CAMS]
        post_aug[..., :2, :2] = torch.tensor([[mirror * cos, -sin], [mirror * sin, cos]])
        post_aug[..., :2, 2] += torch.tensor([352.0 - mirror * 352 + 20 * shift[0], 9 * shift[1]])
    turn = 0.3 * (1 + seed)
    inputs[5][:, 1, 1] = -1
    inputs[5][0, 0, 0] = -1
    inputs[5][1, :2, :2] @= 1.03 * torch.tensor([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    inputs[5][1, :3, 3] = torch.tensor([0.3, -0.2, 0.1])
    cameras = camera_frames(CameraInputs.from_img_inputs(inputs, CAMS, FRAMES))
    return CameraFrame.stack([cameras[1], cameras[0]]), inputs[5].repeat(2, 1, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_voxel_is_that_of_the_literal_steps(transform, device, seed):
    camera, bda = lifted_cameras(seed)
    points = literal_points(camera, bda, IMAGE, transform.feature_size, transform.depths.cpu())
    expected = literal_cells(points, transform.grid)
    assert expected.shape == (4, CAMS, 88, 16, 44) and 0.3 < (expected >= 0).float().mean() < 0.8
    geometry = transform.geometry(camera, camera.key_ego_from_camera, bda)
    cells, order = transform.to(device).pool_targets(map_tensors(lambda tensor: tensor.to(device), geometry)).get()
    assert cells.dtype == torch.int32 and torch.equal(cells.cpu(), expected) and order is not None


def test_the_rigs_tell_roundings_apart(transform):
    """The same in float64 puts some points elsewhere."""
    arguments = IMAGE, transform.feature_size, transform.depths.cpu()
    moved = 0
    for camera, bda in map(lifted_cameras, SEEDS):
        single, double = (literal_points(camera, matrices, *arguments) for matrices in (bda, bda.double()))
        torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-4)
        moved += int((literal_cells(single, transform.grid) != literal_cells(double, transform.grid)).sum())
    assert moved > 0
