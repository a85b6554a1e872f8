"""Lidar points and labels drawn into camera images, and predictions compared with the truth."""

import numpy as np
import pytest
from PIL import Image

from mmdet3d.core.visualization.cameras import (
    distance_colors,
    draw_labels,
    draw_points,
    image_from_ego,
    image_from_lidar,
    scaled,
    visible_labels,
)
from mmdet3d.core.visualization.compare import VERDICTS, compose_comparison, render_verdicts, verdicts
from mmdet3d.core.visualization.grid import OccupancyGrid
from mmdet3d.datasets.labels import OPENOCC

FREE, CAR, PERSON, ROAD = 16, 0, 7, 10
SHAPE, RANGE = (12, 10, 4), (-6.0, -5.0, -1.0, 6.0, 5.0, 3.0)  # voxels of one metre
LOOK = [0.5, -0.5, 0.5, -0.5]  # along x of the vehicle
POSE = {"ego2global_translation": [400.0, 800.0, 1.0], "ego2global_rotation": [0.8, 0.0, 0.0, 0.6]}


@pytest.fixture
def info():
    """A camera at x = 1, one metre up, looking ahead; the lidar two metres up, turned by 90 degrees."""
    camera = {"cam_intrinsic": np.array([[40.0, 0, 30], [0, 40, 20], [0, 0, 1]]), "sensor2ego_translation": [1, 0, 1],
              "sensor2ego_rotation": LOOK, **POSE}
    turn = np.sqrt(0.5)
    return {"token": "t", "cams": {"CAM_FRONT": camera}, "lidar2ego_translation": [0, 0, 2],
            "lidar2ego_rotation": [turn, 0, 0, turn], **POSE}


def project(matrix, point):
    u, v, depth, _ = matrix @ [*point, 1.0]
    return u / depth, v / depth, depth


def test_points_fall_on_the_right_pixels(info):
    matrix = image_from_ego(info, "CAM_FRONT")
    assert project(matrix, (5, 0, 1)) == pytest.approx((30, 20, 4), abs=1e-2)  # straight ahead
    assert project(matrix, (5, 1, 1)) == pytest.approx((20, 20, 4), abs=1e-2)  # to the left
    assert project(matrix, (5, 0, 2)) == pytest.approx((30, 10, 4), abs=1e-2)  # higher
    # x of the lidar is y of the vehicle
    assert project(image_from_lidar(info, "CAM_FRONT"), (1, -5, -1)) == pytest.approx((20, 20, 4), abs=1e-2)
    assert project(scaled(matrix, 0.5), (5, 1, 1)) == pytest.approx((10, 10, 4), abs=1e-2)


def test_near_points_hide_far_ones(info):
    matrix = image_from_ego(info, "CAM_FRONT")
    image = Image.new("RGB", (60, 40), (9, 9, 9))
    points = np.array([[3.0, 0.5, 1.0], [5.0, 1.0, 1.0], [-4.0, 0, 1.0], [5.0, 30, 1]])  # same pixel, behind, outside
    pixels = np.asarray(draw_points(image, points, matrix))
    assert (pixels != 9).any(2).sum() == 4
    assert tuple(pixels[20, 20]) == tuple(distance_colors(np.array([2.0]))[0])
    assert image.getpixel((20, 20)) == (9, 9, 9)  # the given image stays
    colors = distance_colors(np.array([0.0, 50.0, 900.0]))
    assert colors[0, 0] > 200 and (colors[1] == colors[2]).all() and colors[1, 2] > colors[1, 1]


def test_every_pixel_shows_the_first_voxel_on_its_ray(info):
    semantics = np.full(SHAPE, FREE, np.uint8)
    semantics[..., 0] = ROAD
    semantics[10, 5, 1:3] = CAR  # x 4..5, y 0..1, z 0..2
    semantics[11, 5, 1:3] = PERSON  # hidden by it
    grid = OccupancyGrid.make(semantics, OPENOCC, RANGE)
    matrix = image_from_ego(info, "CAM_FRONT")
    labels, depth, axis = visible_labels(grid, matrix, (60, 40))
    assert labels.shape == (40, 60) and PERSON not in labels
    rows, columns = np.nonzero(labels == CAR)
    # seen from x = 1 at distance 3: y 0..1 is 13 pixels to the left of the middle, z 0..2 13 up and down
    assert (columns.min(), columns.max()) == (17, 29) and (rows.min(), rows.max()) == (7, 32)
    assert depth[20, 25] == pytest.approx(3, abs=1e-3) and axis[20, 25] == 0
    assert labels[39, 45] == ROAD and axis[39, 45] == 2 and labels[5, 45] == 255 and np.isinf(depth[5, 45])
    drawn = np.asarray(draw_labels(Image.new("RGB", (60, 40)), grid, OPENOCC, matrix, opacity=1.0))
    assert (drawn[5, 45] == 0).all() and tuple(drawn[39, 45]) == OPENOCC.colors[ROAD]
    assert np.abs(drawn[20, 25] - 0.9 * np.array(OPENOCC.colors[CAR])).max() < 1


def test_verdicts():
    truth = np.full((2, 3, 4), FREE, np.uint8)
    guess = truth.copy()
    truth[0, 0, :2], guess[0, 0, :2] = CAR, (CAR, PERSON)  # one right, one of another class: the worse one counts
    truth[0, 1, 0], guess[0, 1, 0] = CAR, CAR
    truth[0, 2, :2] = ROAD
    guess[1, 0, 3] = PERSON
    truth[1, 1, 0], guess[1, 1, 0] = 255, CAR
    expected = [[1, 0, 2], [3, -1, -1]]
    assert verdicts(truth, guess, OPENOCC).tolist() == expected
    image = render_verdicts(truth, guess, OPENOCC, 300)
    assert image.size == (300, 200)
    colors = list(VERDICTS.values())
    assert image.getpixel((250, 150)) == colors[1]  # x = 0 is below, y = 0 on the right
    assert image.getpixel((250, 50)) == colors[3]
    with pytest.raises(ValueError, match=r"expected shape \(2, 3, 4\) as the ground truth has it, got \(2, 3, 3\)"):
        verdicts(truth, guess[..., :3], OPENOCC)


def test_comparison_is_of_the_asked_width():
    truth = np.full(SHAPE, FREE, np.uint8)
    truth[..., 0] = ROAD
    flow = np.zeros((*SHAPE, 2), np.float16)
    for images in ({}, {"CAM_BACK": Image.new("RGB", (16, 9))}):
        picture = compose_comparison(images, (truth, flow), (truth[::-1], None), OPENOCC, "title",
                                     point_cloud_range=RANGE, width=400)
        assert picture.width == 400 and picture.height > 250
