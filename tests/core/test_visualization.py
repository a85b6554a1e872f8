"""Pictures of occupancy: what is in the grid is at the right pixels."""

import numpy as np
import pytest
from PIL import Image

from mmdet3d.core.visualization.bev import EMPTY, render_bev
from mmdet3d.core.visualization.drawing import fit_text, font, save_png, text_width
from mmdet3d.core.visualization.grid import OccupancyGrid, flow_arrows
from mmdet3d.core.visualization.occupancy import compose_frame
from mmdet3d.core.visualization.raycast import cast_rays, free_radius
from mmdet3d.core.visualization.render3d import View, render_3d
from mmdet3d.datasets.labels import CAMERAS, OCC3D, OPENOCC

FREE, CAR, PERSON, ROAD, TREE = 16, 0, 7, 10, 15
SHAPE, RANGE = (12, 10, 4), (-6.0, -5.0, -1.0, 6.0, 5.0, 3.0)  # voxels of one metre


def empty():
    return np.full(SHAPE, FREE, np.uint8)


def near(pixel, label, tolerance=0.45):
    """Whether a shaded pixel has the hue of a class: parallel colours, not too dark."""
    a, b = np.asarray(pixel, float), np.asarray(OPENOCC.colors[label], float)
    return np.linalg.norm(a) > tolerance * np.linalg.norm(b) and a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.985


def test_bev_has_forward_up_and_left_left():
    grid = empty()
    grid[11, 9, 0], grid[0, 9, 0], grid[11, 0, 0] = CAR, PERSON, TREE
    image = np.asarray(render_bev(grid, OPENOCC, point_cloud_range=RANGE, pixels_per_voxel=2, shade=False,
                                  decorate=False))
    assert image.shape == (24, 20, 3)
    assert tuple(image[0, 0]) == tuple(image[1, 1]) == OPENOCC.colors[CAR]  # farthest ahead, farthest left
    assert tuple(image[-1, 0]) == OPENOCC.colors[PERSON]
    assert tuple(image[0, -1]) == OPENOCC.colors[TREE]
    assert (image == EMPTY).all(2).sum() == 24 * 20 - 3 * 4


def test_bev_shows_the_top_most_voxel_and_not_the_ignored():
    grid = empty()
    grid[3, 4, :3] = ROAD, CAR, PERSON
    grid[3, 4, 3] = 255
    grid[5, 5, 2] = 255
    image = np.asarray(render_bev(grid, OPENOCC, point_cloud_range=RANGE, pixels_per_voxel=1, shade=False,
                                  decorate=False))
    assert tuple(image[11 - 3, 9 - 4]) == OPENOCC.colors[PERSON]
    assert tuple(image[11 - 5, 9 - 5]) == EMPTY


def test_bev_marks_the_ego_car_the_scale_and_the_motion():
    grid, flow = empty(), np.zeros((*SHAPE, 2), np.float16)
    plain = np.asarray(render_bev(grid, OPENOCC, point_cloud_range=RANGE, pixels_per_voxel=20)).astype(int)
    assert plain[int(5.5 * 20), 100].sum() < 150  # half a metre ahead of the rear axle: the car
    assert (plain[-15:, :40].sum(2) < 200).any()  # the scale bar
    grid[9, 7, 0] = CAR
    flow[9, 7, 0] = (0, -4)  # to the right, from y = 2.5 to -1.5 at x = 3.5
    drawn = np.asarray(render_bev(grid, OPENOCC, flow, point_cloud_range=RANGE, pixels_per_voxel=20)).astype(int)
    row, columns = int((6 - 3.5) * 20), [int((5 - y) * 20) for y in (1.5, 0.5, -0.5)]
    assert all(drawn[row, c].sum() < 250 and plain[row, c].sum() > 700 for c in columns)
    assert drawn[row, int((5 - 4.0) * 20)].sum() > 600  # nothing behind it


def test_free_radius_is_the_distance_to_the_nearest_occupied_voxel():
    occupied = np.zeros((7, 5, 4), bool)
    occupied[2, 1, 3] = occupied[6, 4, 0] = True
    index = np.stack(np.indices(occupied.shape), -1)
    expected = np.minimum(*(np.abs(index - hit).max(-1) for hit in np.argwhere(occupied)))
    np.testing.assert_array_equal(free_radius(occupied), expected)
    assert (free_radius(np.zeros((3, 4, 2), bool)) == 15).all()


def walk(occupied, origin, direction, step=1e-3, reach=40.0):
    """First occupied voxel along a ray, by small steps."""
    t = np.arange(step, reach, step)
    cells = np.floor(origin + t[:, None] * direction).astype(int)
    inside = ((cells >= 0) & (cells < occupied.shape)).all(1)
    hit = np.flatnonzero(inside)[occupied[tuple(cells[inside].T)]]
    return (t[hit[0]], cells[hit[0]]) if len(hit) else (np.inf, None)


@pytest.mark.parametrize("origin", [(-8.0, 3.3, 9.1), (5.5, 4.2, 3.4), (20.0, -6.0, -2.0)])
def test_rays_meet_what_small_steps_meet(origin):
    rng = np.random.default_rng(1)
    occupied = rng.random((13, 9, 5)) < 0.06
    occupied[5, 4, 3] = False
    directions = np.array([6.0, 4.5, 2.5]) + rng.normal(0, 4, (150, 3)) - origin
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    hits = cast_rays(free_radius(occupied), np.array(origin), directions)
    found = 0
    for n, direction in enumerate(directions):
        distance, cell = walk(occupied, np.array(origin), direction)
        if np.isinf(distance) != np.isinf(hits.distance[n]):
            continue  # a corner cut between two steps; counted below
        found += 1
        if np.isfinite(distance) and (cell == hits.cell[n]).all():
            assert abs(distance - hits.distance[n]) < 2e-3
            face = np.array(origin) + hits.distance[n] * direction - hits.cell[n]
            assert min(abs(face[hits.axis[n]]), abs(face[hits.axis[n]] - 1)) < 1e-4
    assert found >= 148


def test_a_grid_that_single_precision_cannot_count_is_refused():
    with pytest.raises(ValueError, match="too large to draw"):
        cast_rays(np.broadcast_to(np.uint8(1), (256, 256, 256)), np.zeros(3), np.ones((1, 3)))


def test_3d_view_shows_voxels_where_the_camera_says():
    grid = empty()
    grid[8, 7, 1], grid[8, 2, 1] = CAR, TREE  # left and right of the middle
    view = View(eye=(-14.0, 0.0, 9.0), target=(0.0, 0.0, 0.0), field_of_view=50)
    image = np.asarray(render_3d(grid, label_set=OPENOCC, point_cloud_range=RANGE, size=(160, 120), view=view))
    assert image.shape == (120, 160, 3)
    tops = np.array([[2.5, 2.5, 1.0], [2.5, -2.5, 1.0]])  # middle of the upper faces
    pixels, depth = view.project(tops, (160, 120))
    assert (depth > 0).all() and pixels[0, 0] < 80 < pixels[1, 0]
    for (u, v), label in zip(pixels, (CAR, TREE), strict=True):
        assert near(image[int(v), int(u)], label)
    assert tuple(image[0, 0]) == (255, 255, 255)


def test_3d_view_hides_what_is_behind_and_lights_the_top_most():
    grid = empty()
    grid[:, :, 0] = ROAD
    grid[6, 7:9, 1:] = PERSON  # a wall one voxel thick, beside the ego car
    grid[8, 7:9, 1] = CAR  # behind it
    view = View(eye=(-14.0, 3.0, 2.5), target=(0.0, 3.0, 1.0))
    image = np.asarray(render_3d(grid, label_set=OPENOCC, point_cloud_range=RANGE, size=(160, 90), view=view))
    pixels, _ = view.project(np.array([[0.0, 2.5, 1.6], [2.0, 2.5, 0.6]]), (160, 90))
    assert near(image[int(pixels[0, 1]), int(pixels[0, 0])], PERSON)
    assert near(image[int(pixels[1, 1]), int(pixels[1, 0])], PERSON)  # where the car would be
    plain = np.asarray(render_3d(np.where(grid == ROAD, grid, FREE), label_set=OPENOCC, point_cloud_range=RANGE,
                                 size=(160, 90), view=View(eye=(0, 0, 30.0), target=(0, 0, 0.0))))
    np.testing.assert_allclose(plain[20, 60], np.array(OPENOCC.colors[ROAD]), atol=14)


def test_straight_down_keeps_the_orientation_of_the_bev():
    grid = empty()
    grid[10, 8, 0] = CAR
    view = View(eye=(0.0, 0.0, 60.0), target=(0.0, 0.0, 0.0), field_of_view=16)
    image = np.asarray(render_3d(grid, label_set=OPENOCC, point_cloud_range=RANGE, size=(100, 100), view=view))
    rows, columns = np.nonzero([[near(p, CAR) and tuple(p) != (255,) * 3 for p in row] for row in image])
    assert len(rows) and rows.mean() < 50 and columns.mean() < 50


def test_3d_arrows_and_other_grid_sizes():
    labels = np.full((6, 8, 3), OCC3D.free_index, np.uint8)
    labels[3, 4, 0] = OCC3D.classes.index("car")
    flow = np.zeros((6, 8, 3, 2), np.float16)
    flow[3, 4, 0] = (6.0, 0.0)
    arguments = {"label_set": OCC3D, "point_cloud_range": (-9, -12, -2, 9, 12, 4), "size": (200, 120)}
    still, moving = (np.asarray(render_3d(labels, f, **arguments)).astype(int) for f in (None, flow))
    assert (np.abs(still - moving).sum(2) > 300).sum() > 20


def test_one_arrow_per_object_and_none_for_what_stands_or_cannot_move():
    labels, flow = np.full((60, 40, 3), FREE, np.uint8), np.zeros((60, 40, 3, 2), np.float32)
    labels[4:14, 3:8, :2], flow[4:14, 3:8] = CAR, (5.0, 1.0)
    labels[30:55, 20:26, :3], flow[30:55, 20:26] = 3, (-3.0, 0.0)  # a bus of 10 m
    labels[20, 30, 0], flow[20, 30] = PERSON, (0.1, 0.1)
    labels[0, 0, 0], flow[0, 0] = ROAD, (9.0, 9.0)
    labels[1, 39, 0], flow[1, 39] = PERSON, (np.nan, np.inf)
    grid = OccupancyGrid.make(labels, OPENOCC, (0, 0, 0, 24, 16, 1.2))
    arrows = flow_arrows(grid, flow, OPENOCC)
    np.testing.assert_allclose(arrows[0], [9 * 0.4, 5.5 * 0.4, 2 * 0.4, 5, 1], rtol=1e-6)
    np.testing.assert_allclose(arrows[1:, 3:], [[-3, 0]] * 2)
    assert len(arrows) == 3 and len(flow_arrows(grid, flow, OPENOCC, limit=1)) == 1
    assert len(flow_arrows(grid, None, OPENOCC)) == 0
    assert len(flow_arrows(grid, np.zeros_like(flow), OPENOCC)) == 0


@pytest.mark.parametrize("labels, bounds, message", [
    (np.zeros((3, 4), np.uint8), RANGE, "expected whole-number labels of shape"),
    (np.zeros((3, 4, 2), float), RANGE, "expected whole-number labels"),
    (np.full((3, 4, 2), 17, np.uint8), RANGE, r"labels \[17\] are not in 'openocc' \(0\.\.16"),
    (np.zeros((3, 4, 2), np.uint8), (0, 0, 0, 1, 1, 0), "point_cloud_range"),
])
def test_wrong_grids_are_refused(labels, bounds, message):
    for render in (lambda: render_bev(labels, OPENOCC, point_cloud_range=bounds),
                   lambda: render_3d(labels, label_set=OPENOCC, point_cloud_range=bounds)):
        with pytest.raises(ValueError, match=message):
            render()


def test_flow_must_fit():
    with pytest.raises(ValueError, match=r"flow: expected shape \(12, 10, 4, 2\), got \(10, 12, 4, 2\)"):
        render_bev(empty(), OPENOCC, np.zeros((10, 12, 4, 2)), point_cloud_range=RANGE)


def test_composed_frame_places_the_cameras_and_the_views():
    colors = {name: (40 * n, 200 - 30 * n, 25 * n) for n, name in enumerate(CAMERAS)}
    images = [Image.new("RGB", (160, 90), colors[name]) for name in CAMERAS]
    grid = empty()
    grid[:, :, 0] = ROAD
    arguments = {"label_set": OPENOCC, "point_cloud_range": RANGE, "width": 640}
    picture = compose_frame(images, grid, None, title="a title", notes=["note"], **arguments)
    assert picture.mode == "RGB" and picture.width <= 640
    pixels = np.asarray(picture)
    where = {name: np.argwhere((pixels == color).all(2)).mean(0) for name, color in colors.items()}
    rows, columns = (np.array([[where[n][axis] for n in CAMERAS[k : k + 3]] for k in (0, 3)]) for axis in (0, 1))
    assert np.ptp(rows[0]) < 2 and rows[0].max() < rows[1].min()
    assert (np.diff(columns, axis=1) > 150).all() and np.abs(columns[0] - columns[1]).max() < 5
    lower = pixels[int(rows[1].max()) + 80 :, 430:]
    assert np.mean([near(p, ROAD) for p in lower.reshape(-1, 3)[::37]]) > 0.4  # the bird's-eye view of the road
    without = compose_frame({}, grid, None, **arguments)
    assert without.height < picture.height
    some = compose_frame(dict(zip(CAMERAS[:2], images, strict=False)), grid, None, **arguments)
    assert some.size[0] == picture.size[0]
    with pytest.raises(ValueError, match="expected 6 in the order"):
        compose_frame(images[:5], grid, None, **arguments)
    with pytest.raises(ValueError, match=r"unknown cameras \['CAM_UP'\]"):
        compose_frame({"CAM_UP": images[0]}, grid, None, **arguments)


def test_png_is_written_whole_or_not_at_all(tmp_path):
    path = save_png(Image.new("RGB", (4, 3), (1, 2, 3)), tmp_path / "new" / "a.png")
    assert Image.open(path).getpixel((0, 0)) == (1, 2, 3)

    class Broken:
        def save(self, file, format):
            file.write(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_png(Broken(), path)
    assert Image.open(path).size == (4, 3) and [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_long_text_is_cut():
    face = font(12)
    assert fit_text("short", face, 500) == "short"
    cut = fit_text("a very long line of text", face, 60)
    assert cut.endswith("...") and text_width(cut, face) <= 60
