"""Labels against images, lidar and boxes of the same scene."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from mmdet3d.datasets.geometry import rigid_inverse
from mmdet3d.datasets.labels import CAMERAS, OCC3D, OPENOCC
from mmdet3d.datasets.synthetic.lidar import count_in_boxes, scan
from mmdet3d.datasets.synthetic.occupancy import GRID, make_labels
from mmdet3d.datasets.synthetic.render import render_camera
from mmdet3d.datasets.synthetic.rig import LIDAR, pixel_rays
from mmdet3d.ops import ray_cast

FRAME = 1
LOW, CELL = np.array(GRID.low), np.array(GRID.cell)
FREE = OPENOCC.free_index


@pytest.fixture(scope="module")
def scene(small_scene):
    """All sensors at the same time, so that moving objects are where the labels have them."""
    return replace(small_scene, rig={name: replace(s, delay=0) for name, s in small_scene.rig.items()})


@pytest.fixture(scope="module")
def labels(scene):
    return make_labels(scene, FRAME)


@pytest.fixture(scope="module")
def pictures(scene):
    return {name: render_camera(scene, FRAME, name) for name in CAMERAS}


def voxels_of(points):
    """(P, 3) voxels of points in the ego frame, and whether they lie at least one voxel inside the grid."""
    cells = np.floor((points - LOW) / CELL).astype(int)
    return cells, ((cells >= 1) & (cells < np.array(GRID.size_xyz) - 1)).all(1)


def seen_pixels(scene, channel, picture):
    """Rays (P, 3) in the ego frame, hit voxels (P, 3), classes and whether it is an object, of pixels in the grid."""
    camera = scene.rig[channel]
    distance = picture.distance.ravel()
    rays = pixel_rays(camera, scene.settings.image_size).astype(float)
    far = np.where(np.isfinite(distance), distance + 0.01, 1e4)
    cells, inside = voxels_of(np.array(camera.translation) + rays * far[:, None])
    return rays[inside], cells[inside], picture.classes.ravel()[inside], picture.actor.ravel()[inside] >= 0


@pytest.mark.parametrize("channel", CAMERAS)
def test_what_a_pixel_shows_is_the_label_of_the_voxel_that_its_ray_meets(scene, labels, pictures, channel):
    _, cells, classes, is_object = seen_pixels(scene, channel, pictures[channel])
    assert len(classes) > 1500
    found = labels.openocc[tuple(cells.T)]
    assert (found == classes)[~is_object].mean() > 0.85
    if is_object.sum() > 50:
        assert (found == classes)[is_object].mean() > 0.85
    # A face that reaches less than half a sample's distance into a voxel leaves it free.
    assert (found == FREE).mean() < 0.1
    # What differs lies at the border of two classes.
    near = np.zeros(len(cells), bool)
    for step in np.ndindex(3, 3, 3):
        near |= labels.openocc[tuple((cells + np.array(step) - 1).T)] == classes
    assert near.mean() > 0.998


def test_rays_through_the_labels_meet_what_the_pixels_show(scene, labels, pictures):
    agreement, classes_seen = [], set()
    for channel in CAMERAS:
        rays, _, classes, _ = seen_pixels(scene, channel, pictures[channel])
        hits = ray_cast(torch.from_numpy(labels.openocc)[None], torch.tensor([scene.rig[channel].translation]).double(),
                        torch.from_numpy(rays), free_label=FREE, low=GRID.low, cell_size=CELL[0])
        assert hits.hit.float().mean() > 0.99
        agreement.append((labels.openocc.ravel()[hits.voxel[0].numpy()] == classes).mean())
        classes_seen |= set(classes.tolist())
    # Voxels of 0.4 m are wider than what is in them, so that some rays beside a silhouette end in it.
    assert min(agreement) > 0.6 and np.mean(agreement) > 0.78
    assert {OPENOCC.classes.index(name) for name in ("driveable_surface", "sidewalk", "manmade", "car")} <= classes_seen


def test_sky_is_nothing(pictures):
    for picture in pictures.values():
        sky = ~np.isfinite(picture.distance)
        assert sky.mean() < 0.8
        assert (picture.classes[sky] == FREE).all() and (picture.classes[~sky] != FREE).all()
        assert not sky.any() or picture.colors[sky].mean() > picture.colors[~sky].mean()
    assert np.mean([~np.isfinite(picture.distance) for picture in pictures.values()]) > 0.05


def test_both_label_sets_say_the_same(labels):
    names = np.array(OPENOCC.classes)[labels.openocc]
    assert (names == np.array(OCC3D.classes)[labels.occ3d]).all()
    assert labels.openocc.shape == labels.occ3d.shape == (200, 200, 16)
    present = {OPENOCC.classes[n] for n in np.unique(labels.openocc)}
    assert len(present) >= 12 and {"terrain", "vegetation", "driveable_surface", "sidewalk", "manmade"} <= present


def test_voxels_of_objects_lie_in_their_boxes_and_carry_their_class(scene, labels):
    to_ego = rigid_inverse(scene.ego_pose(scene.seconds(FRAME)))
    foreground = OPENOCC.flow_mask[labels.openocc]
    kinds = [OPENOCC.classes.index(actor.kind) for actor in scene.actors]
    assert foreground.any() and (labels.actor[foreground] >= 0).all()
    for number in np.unique(labels.actor[labels.actor >= 0]):
        actor, cells = scene.actors[number], np.argwhere(labels.actor == number)
        assert (labels.openocc[labels.actor == number] == kinds[number]).all()
        pose = to_ego @ scene.actor_pose(actor, scene.seconds(FRAME))
        local = (LOW + (cells + 0.5) * CELL - pose[:3, 3]) @ pose[:3, :3] - (0, 0, actor.size[2] / 2)
        # A voxel belongs to the object when a part of it does; its middle is at most half a diagonal outside.
        assert (np.abs(local) <= np.array(actor.box_size) / 2 + (0.3, 0.3, 0.25)).all()


def test_every_near_object_has_voxels(scene, labels):
    seconds = scene.seconds(FRAME)
    x, y, _ = scene.ego.pose(seconds)
    near = [n for n, actor in enumerate(scene.actors)
            if np.hypot(actor.track.pose(seconds)[0] - x, actor.track.pose(seconds)[1] - y) < 35]
    assert len(near) > 10
    assert all((labels.actor == number).any() for number in near)


def test_flow_moves_the_boxes(scene, labels):
    now, later = scene.seconds(FRAME), scene.seconds(FRAME) + 0.5
    rotation = scene.ego_pose(now)[:3, :3]
    moving = 0
    for number in np.unique(labels.actor[labels.actor >= 0]):
        actor = scene.actors[number]
        flow = np.unique(labels.flow[labels.actor == number], axis=0)
        assert len(flow) == 1
        moved = np.array(actor.box_centre(later)) - actor.box_centre(now)
        # On a bend the way of half a second differs a little from the velocity times half a second.
        np.testing.assert_allclose(rotation @ (*flow[0] * 0.5, 0), moved, atol=0.12)
        moving += bool(np.abs(flow).max() > 0.5)
        assert actor.track.moving == bool(np.abs(flow).max() > 0)
    assert moving >= 5
    assert (labels.flow[labels.actor < 0] == 0).all()


def seen_from(labels, origin, points):
    rays = torch.from_numpy(points - origin)
    return ray_cast(torch.from_numpy(labels)[None], torch.from_numpy(np.array(origin))[None].double(), rays,
                    free_label=FREE, low=GRID.low, cell_size=CELL[0], with_entry=True)


def test_masks_hold_what_can_be_seen(scene, labels):
    lidar = np.array(scene.rig[LIDAR].translation)
    free = labels.openocc == FREE
    for mask, origins in ((labels.mask_lidar, [lidar]),
                          (labels.mask_camera, [np.array(scene.rig[name].translation) for name in CAMERAS])):
        assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 1}
        assert 0.02 < mask.mean() < 0.35
        seen = np.argwhere(mask.astype(bool) & free)
        middles = LOW + (seen + 0.5) * CELL
        passes = np.zeros(len(seen), bool)
        for origin in origins:
            hits = seen_from(labels.openocc, origin, middles)
            distance = torch.from_numpy(np.linalg.norm(middles - origin, axis=1))
            passes |= (hits.hit[0] & (hits.entry[0] > distance)).numpy()
        assert passes.all()
        # Occupied voxels that are seen border on free space.
        padded = np.pad(free, 1, constant_values=True)
        exposed = np.zeros(free.shape, bool)
        for axis in range(3):
            for step in (-1, 1):
                exposed |= np.roll(padded, step, axis)[1:-1, 1:-1, 1:-1]
        assert exposed[mask.astype(bool) & ~free].all()


def test_lidar_points_lie_in_occupied_voxels_that_the_mask_shows(scene, labels):
    points, owner = scan(scene, FRAME)
    assert points.dtype == np.float32 and points.shape[1] == 5 and 15_000 < len(points) <= 32 * 1084
    assert set(np.unique(points[:, 4])) <= set(range(32))
    pose = scene.rig[LIDAR].pose
    distance = np.linalg.norm(points[:, :3], axis=1, keepdims=True)
    # A little further than measured: within what was hit, in spite of the noise.
    places = points[:, :3] * (1 + 0.03 / distance) @ pose[:3, :3].T + pose[:3, 3]
    cells, inside = voxels_of(places)
    cells, owner = cells[inside], owner[inside]
    found = labels.openocc[tuple(cells.T)] != FREE
    assert found.mean() > 0.93
    observed = labels.mask_lidar[tuple(cells[found].T)]
    assert observed.mean() > 0.85
    kinds = np.array([OPENOCC.classes.index(actor.kind) for actor in scene.actors])
    on_object = owner >= 0
    assert (labels.openocc[tuple(cells[on_object].T)] == kinds[owner[on_object]]).mean() > 0.85


def test_boxes_count_their_lidar_points(scene):
    points, owner = scan(scene, FRAME)
    counts = np.array(count_in_boxes(scene, FRAME, points))
    on_object = np.bincount(owner[owner >= 0], minlength=len(scene.actors))
    assert (counts >= on_object).all()  # the ground under an object may add some
    assert counts.sum() < 1.2 * on_object.sum() + 50
