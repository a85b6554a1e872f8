"""3D anchors, their projection into cameras, the positional encoding and the displacement of the previous map."""

import math

import numpy as np
import pytest
import torch

from mmdet3d.models.attention import CustomLearnedPositionalEncoding
from mmdet3d.models.attention.backward_projection import ego_shift, upsample_logits
from mmdet3d.models.attention.camera_anchors import anchor_points, project_anchors

RANGE = [-40.0, -40.0, -1.0, 40.0, 40.0, 5.4]
UNEVEN = [-6.0, -10.0, -2.0, 8.0, 6.0, 3.0]
HEIGHTS = {8: [-0.5, 0.2714, 1.0429, 1.8143, 2.5857, 3.3571, 4.1286, 4.9], 4: [-0.5, 1.3, 3.1, 4.9], 2: [-0.5, 4.9]}


@pytest.mark.parametrize("num_heights", [8, 4, 2])
def test_heights_of_the_anchors(num_heights):
    heights = anchor_points((3, 2), num_heights, RANGE)[..., 2]
    torch.testing.assert_close(heights, torch.tensor(HEIGHTS[num_heights]).expand(6, -1), atol=1e-4, rtol=0)
    centres = anchor_points((3, 2), num_heights, RANGE, legacy_heights=False)[..., 2]
    cell = 6.4 / num_heights
    expected = [-1 + (k + 0.5) * cell for k in range(num_heights)]
    torch.testing.assert_close(centres, torch.tensor(expected).expand(6, -1))


def test_anchors_stand_on_the_cell_centres():
    points = anchor_points((4, 7), 3, UNEVEN)
    assert points.shape == (28, 3, 4)
    for y in range(4):
        for x in range(7):
            column = points[y * 7 + x]
            torch.testing.assert_close(column[:, 0], torch.full((3,), -6 + (x + 0.5) * 14 / 7))
            torch.testing.assert_close(column[:, 1], torch.full((3,), -10 + (y + 0.5) * 16 / 4))
            assert column[:, 3].tolist() == [1, 1, 1]


def cameras(batch, cams):
    """[B, N, 4, 4] float64: cameras in the middle that look in different directions, 60 degrees wide."""
    matrices = torch.zeros(batch, cams, 4, 4, dtype=torch.float64)
    for b in range(batch):
        for n in range(cams):
            yaw = 2 * math.pi * n / cams + 0.3 * b
            forward, left = [math.cos(yaw), math.sin(yaw), 0], [-math.sin(yaw), math.cos(yaw), 0]
            rotation = np.array([[-v for v in left], [0, 0, -1], forward])
            calibration = np.array([[30.0, 0, 20], [0, 28, 10], [0, 0, 1]])
            matrices[b, n, :3, :3] = torch.from_numpy(calibration @ rotation)
            matrices[b, n, :3, 3] = torch.from_numpy(calibration @ rotation @ np.array([-0.5, 0.2, -1.0 - b]))
            matrices[b, n, 3, 3] = 1
    return matrices


@pytest.mark.parametrize("swap", [True, False])
def test_projection_equals_a_loop(swap):
    batch, cams, (height, width) = 2, 3, (20, 40)
    points = anchor_points((3, 5), 2, UNEVEN).double()
    matrices = cameras(batch, cams)
    anchors = project_anchors(points, matrices, (height, width), legacy_axis_swap=swap)
    assert anchors.position.shape == (cams, batch, 15, 2, 2) and anchors.depth.shape == (cams, batch, 15, 2)
    for n in range(cams):
        for b in range(batch):
            for q in range(15):
                for z in range(2):
                    u, v, r, _ = (matrices[b, n] @ points[q, z]).tolist()
                    u, v = u / max(r, 1e-5), v / max(r, 1e-5)
                    rho = (u / height, v / width) if swap else (u / width, v / height)
                    assert anchors.depth[n, b, q, z].item() == pytest.approx(r)
                    assert anchors.position[n, b, q, z].tolist() == pytest.approx(rho)
                    valid = r > 1e-5 and 0 < rho[0] < 1 and 0 < rho[1] < 1
                    assert anchors.valid[n, b, q, z].item() == valid
    assert 0 < anchors.valid.float().mean() < 1


def test_the_axis_swap_changes_only_the_divisor():
    points, matrices = anchor_points((3, 5), 2, UNEVEN).double(), cameras(2, 3)
    legacy = project_anchors(points, matrices, (20, 40))
    proper = project_anchors(points, matrices, (20, 40), legacy_axis_swap=False)
    assert torch.equal(legacy.depth, proper.depth)
    torch.testing.assert_close(legacy.position * torch.tensor([20.0, 40]), proper.position * torch.tensor([40.0, 20]))
    assert not torch.equal(legacy.valid, proper.valid)


@pytest.mark.parametrize("u, v, legacy, proper", [
    (100, 100, True, True), (300, 100, False, True), (100, 300, True, False), (0, 100, False, False),
    (256, 100, False, True), (-1, 5, False, False)])
def test_which_pixels_count_as_valid(u, v, legacy, proper):
    matrix = torch.eye(4)[None, None]
    point = torch.tensor([2.0 * u, 2.0 * v, 2.0, 1.0])[None, None]
    assert project_anchors(point, matrix, (256, 704)).valid.item() is legacy
    assert project_anchors(point, matrix, (256, 704), legacy_axis_swap=False).valid.item() is proper
    behind = point * torch.tensor([1, 1, -1, 1])
    assert not project_anchors(behind, matrix, (256, 704)).valid.item()


@pytest.mark.parametrize("flip_x, flip_y", [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_positional_encoding_follows_the_flips(flip_x, flip_y):
    torch.manual_seed(0)
    size_y, size_x, features = 3, 5, 4
    module = CustomLearnedPositionalEncoding(features, size_y, size_x)
    bda = torch.stack([torch.eye(4), torch.diag(torch.tensor([flip_x, flip_y, 1, 1.0]))])
    encoding = module(bda)
    assert encoding.shape == (2, size_y * size_x, 2 * features)
    columns, rows = module.col_embed.weight, module.row_embed.weight
    for y in range(size_y):
        for x in range(size_x):
            assert torch.equal(encoding[0, y * size_x + x], torch.cat([columns[x], rows[y]]))
            from_x = x if flip_x == 1 else size_x - 1 - x
            from_y = y if flip_y == 1 else size_y - 1 - y
            assert torch.equal(encoding[1, y * size_x + x], torch.cat([columns[from_x], rows[from_y]]))


def test_positional_encoding_is_read_backwards_unless_the_entry_is_exactly_one():
    module = CustomLearnedPositionalEncoding(2, 3, 4)
    bda = torch.eye(4)[None].clone()
    bda[0, 0, 0] = 0.9
    columns = module(bda)[0].view(3, 4, 4)[..., :2]
    assert torch.equal(columns[1], module.col_embed.weight.flip(0))


def test_ego_shift_equals_the_formula():
    generator = np.random.default_rng(0)
    motion, yaw = generator.normal(size=(6, 3)) * 5, generator.uniform(0, 2 * math.pi, 6)
    shift = ego_shift(torch.from_numpy(motion), torch.from_numpy(yaw), (14.0, 16.0))
    assert shift.shape == (6, 2) and shift.dtype == torch.float32
    bev_h, bev_w = 4, 7
    grid_h, grid_w = 16.0 / bev_h, 14.0 / bev_w
    for i in range(6):
        dx, dy = motion[i, :2]
        length = np.sqrt(dx**2 + dy**2)
        degrees = yaw[i] / np.pi * 180 - np.arctan2(dy, dx) / np.pi * 180
        shift_y = length * np.cos(degrees / 180 * np.pi) / grid_h / bev_h
        shift_x = length * np.sin(degrees / 180 * np.pi) / grid_w / bev_w
        assert shift[i].tolist() == pytest.approx([shift_x, shift_y], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("motion, yaw, expected", [
    ((8.0, 0, 5), 0.0, (0, 0.1)), ((0, 8.0, 0), math.pi / 2, (0, 0.1)), ((8.0, 0, 0), math.pi / 2, (0.1, 0)),
    ((0, 0, 3.0), 1.0, (0, 0)), ((0, 0, 0), 2.0, (0, 0))])
def test_ego_shift_of_simple_motions(motion, yaw, expected):
    shift = ego_shift(torch.tensor([motion]).double(), torch.tensor([yaw]).double(), (80.0, 80.0))
    assert shift[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_upsampled_logits_keep_their_axes():
    """A ramp along each axis stays one: at index i the value is that of (i + 0.5) / 2 - 0.5, held at the border."""
    size = (3, 4, 2)
    x, y, z = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in size), indexing="ij")
    logits = torch.stack([100 * x + 10 * y + z, -x], -1)[None]  # [1, X, Y, Z, K]
    upsampled = upsample_logits(logits)
    assert upsampled.shape == (1, 6, 8, 4, 2)
    at = [((torch.arange(2 * n) + 0.5) / 2 - 0.5).clamp(0, n - 1) for n in size]
    x, y, z = torch.meshgrid(*at, indexing="ij")
    torch.testing.assert_close(upsampled, torch.stack([100 * x + 10 * y + z, -x], -1)[None])


def test_corrected_shift_points_along_the_motion():
    motion = torch.tensor([[8.0, 0.0, 0.0], [0.0, 4.0, 0.0]], dtype=torch.float64)
    yaw = torch.tensor([0.0, torch.pi / 2], dtype=torch.float64)  # both cars drive straight ahead
    shift = ego_shift(motion, yaw, (80.0, 40.0), legacy_axes=False)
    torch.testing.assert_close(shift, torch.tensor([[0.1, 0.0], [0.05, 0.0]]), atol=1e-7, rtol=0)
    sideways = ego_shift(motion[:1], yaw[1:], (80.0, 40.0), legacy_axes=False)  # heading left of the motion
    torch.testing.assert_close(sideways, torch.tensor([[0.0, -0.2]]), atol=1e-7, rtol=0)
