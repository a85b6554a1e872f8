"""Streets, objects and sensors: nothing runs into anything, every class is there, calibrations fit."""

import math

import numpy as np
import pytest

from mmdet3d.datasets.labels import CAMERAS, FLOW_CLASS_NAMES
from mmdet3d.datasets.synthetic.lidar import beam_directions
from mmdet3d.datasets.synthetic.materials import LAST_GROUND, Material
from mmdet3d.datasets.synthetic.names import scene_names
from mmdet3d.datasets.synthetic.noise import cell_noise, hash_cells, smooth_noise
from mmdet3d.datasets.synthetic.objects import CATEGORIES, inside_parts, make_actor
from mmdet3d.datasets.synthetic.rig import EGO_CENTRE_AHEAD, EGO_SIZE, LIDAR, make_rig, pixel_rays
from mmdet3d.datasets.synthetic.road import Road, Track
from mmdet3d.datasets.synthetic.scene import WorldSettings, build_scene
from mmdet3d.datasets.synthetic.world import CELL


@pytest.fixture(scope="module")
def scenes():
    settings = WorldSettings(("scene-0061", "scene-0553", "scene-0655"), frames=8, image_size=(64, 36))
    return [build_scene(settings, index) for index in range(3)]


@pytest.mark.parametrize("curvature", [0.0, 0.008, -0.005])
def test_street_coordinates_are_undone(curvature):
    road = Road((103.0, 55.0), 2.1, curvature, 2, 0.0, 3.0, (40.0,))
    for s, d in ((0.0, 0.0), (30.0, -12.0), (-55.0, 20.0), (120.0, 3.5)):
        x, y = road.position(s, d)
        np.testing.assert_allclose(road.street_coordinates(np.array(x), np.array(y)), (s, d), atol=1e-9)
    step = np.subtract(road.position(20.001, 4.0), road.position(19.999, 4.0))
    assert math.atan2(step[1], step[0]) == pytest.approx(road.heading_at(20.0))


def test_velocity_and_heading_follow_the_track():
    road = Road((0.0, 0.0), 0.3, 0.006, 1, 0.0, 3.0, ())
    for track in (Track(road, 5.0, -2.0, 7.0, weave=0.2), Track(road, 5.0, 3.0, -6.0, turn=math.pi),
                  Track(road, 8.0, -3.0, d_speed=1.2, turn=math.pi / 2)):
        vx, vy = track.velocity(1.0, interval=1e-4)
        heading = track.pose(1.0)[2]
        assert math.cos(heading) * vx + math.sin(heading) * vy == pytest.approx(math.hypot(vx, vy), rel=1e-5)
    assert Track(road, 1.0, 2.0).velocity(3.0) == (0.0, 0.0)


def rectangle(x, y, heading, length, width):
    from shapely.geometry import Polygon

    cos, sin = math.cos(heading), math.sin(heading)
    return Polygon([(x + cos * a - sin * b, y + sin * a + cos * b) for a, b in
                    ((-length / 2, -width / 2), (length / 2, -width / 2), (length / 2, width / 2),
                     (-length / 2, width / 2))])


def test_nobody_runs_into_anybody(scenes):
    for scene in scenes:
        for seconds in np.arange(0, 3.6, 0.35):
            x, y, yaw = scene.ego.pose(seconds)
            shapes = [rectangle(x + EGO_CENTRE_AHEAD * math.cos(yaw), y + EGO_CENTRE_AHEAD * math.sin(yaw), yaw,
                                *EGO_SIZE[:2])]
            shapes += [rectangle(*actor.track.pose(seconds), *actor.size[:2]) for actor in scene.actors]
            places = np.array([shape.centroid.coords[0] for shape in shapes])
            for n, shape in enumerate(shapes):
                for m in np.flatnonzero(np.hypot(*(places[n + 1 :] - places[n]).T) < 14) + n + 1:
                    assert not shape.intersects(shapes[m])


def test_nobody_runs_into_houses_trees_or_poles(scenes):
    rng = np.random.default_rng(0)
    for scene in scenes:
        world = scene.world
        for actor in scene.actors:
            points = rng.uniform((-0.5, -0.5, 0.05), (0.5, 0.5, 1.0), (400, 3)) * actor.size
            points = points[inside_parts(actor, points)]
            for seconds in np.arange(0, 3.6, 0.7):
                pose = scene.actor_pose(actor, seconds)
                cells = np.floor((points @ pose[:3, :3].T + pose[:3, 3] - world.low) / CELL).astype(int)
                cells = cells[((cells >= 0) & (cells < world.grid.shape)).all(1)]
                assert (world.grid[tuple(cells.T)] <= LAST_GROUND).all(), (scene.name, actor.kind)


def test_everything_stands_on_the_ground(scenes):
    for scene in scenes:
        world = scene.world
        for actor in scene.actors:
            for seconds in (0.0, 1.7, 3.5):
                x, y, _ = actor.track.pose(seconds)
                i, j = int((x - world.low[0]) / CELL), int((y - world.low[1]) / CELL)
                if 0 <= i < world.grid.shape[0] and 0 <= j < world.grid.shape[1]:
                    surface = 0.0 if world.grid[i, j, 0] == Material.ROAD else 0.2
                    assert actor.base == surface, (scene.name, actor.kind)


def test_all_classes_move_and_stand(scenes):
    moving = {actor.kind for scene in scenes for actor in scene.actors if actor.track.moving}
    standing = {actor.kind for scene in scenes for actor in scene.actors if not actor.track.moving}
    assert moving == set(FLOW_CLASS_NAMES)
    assert standing == set(CATEGORIES)
    materials = {value for scene in scenes for value in np.unique(scene.world.grid).tolist()}
    assert materials == {int(material) for material in Material}


@pytest.mark.parametrize("kind", sorted(CATEGORIES))
@pytest.mark.parametrize("speed", [0.0, 3.0])
def test_parts_touch_all_faces_of_the_box(kind, speed):
    road = Road((0.0, 0.0), 0.0, 0.0, 1, 0.0, 3.0, ())
    for seed in range(3):
        actor = make_actor(kind, Track(road, 0.0, 0.0, speed), 0.0, np.random.default_rng(seed))
        low = np.min([part.low for part in actor.parts], 0)
        high = np.max([part.high for part in actor.parts], 0)
        length, width, height = actor.size
        np.testing.assert_allclose(low, (-length / 2, -width / 2, 0), atol=1e-9)
        np.testing.assert_allclose(high, (length / 2, width / 2, height), atol=1e-9)
        assert all(a < b for part in actor.parts for a, b in zip(part.low, part.high, strict=True))


def test_rays_go_through_their_pixels():
    size = (48, 30)
    rig = make_rig(size, np.random.default_rng(1))
    assert set(rig) == {LIDAR, *CAMERAS}
    for channel in CAMERAS:
        camera = rig[channel]
        rays = pixel_rays(camera, size).astype(float)
        np.testing.assert_allclose(np.linalg.norm(rays, axis=1), 1, atol=1e-6)
        pixels = rays @ camera.pose[:3, :3] @ camera.intrinsic.T
        pixels = (pixels[:, :2] / pixels[:, 2:]).reshape(30, 48, 2)
        np.testing.assert_allclose(pixels[..., 0], np.broadcast_to(np.arange(48) + 0.5, (30, 48)), atol=1e-3)
        np.testing.assert_allclose(pixels[..., 1], np.broadcast_to(np.arange(30)[:, None] + 0.5, (30, 48)), atol=1e-3)
        assert abs(rays.mean(0)[2]) < 0.1  # level
    ahead = {name: pixel_rays(rig[name], size).mean(0) for name in CAMERAS}
    assert ahead["CAM_FRONT"][0] > 0.7 and ahead["CAM_BACK"][0] < -0.5
    assert ahead["CAM_FRONT_LEFT"][1] > 0.5 and ahead["CAM_BACK_LEFT"][1] > 0.5
    assert ahead["CAM_FRONT_RIGHT"][1] < -0.5 and ahead["CAM_BACK_RIGHT"][1] < -0.5


def test_calibration_follows_the_image_size():
    small, large = (make_rig(size, np.random.default_rng(4)) for size in ((400, 300), (1600, 900)))
    for channel in CAMERAS:
        np.testing.assert_allclose(small[channel].intrinsic[0] * 4, large[channel].intrinsic[0])
        np.testing.assert_allclose(small[channel].intrinsic[1] * 3, large[channel].intrinsic[1])


def test_beams_of_the_lidar():
    rays = beam_directions().reshape(1084, 32, 3)
    np.testing.assert_allclose(np.degrees(np.arcsin(rays[5, [0, 31], 2])), (-30.67, 10.67), atol=1e-4)
    assert (np.diff(rays[0, :, 2]) > 0).all()


def test_noise_is_uniform_and_the_same_everywhere():
    i, j = np.meshgrid(np.arange(-300, 300), np.arange(500), indexing="ij")
    noise = hash_cells(i, j, 7)
    assert noise.min() >= 0 and noise.max() < 1 and abs(noise.mean() - 0.5) < 0.003
    assert abs(np.corrcoef(noise[1:].ravel(), noise[:-1].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(noise[:, 1:].ravel(), noise[:, :-1].ravel())[0, 1]) < 0.01
    np.testing.assert_array_equal(hash_cells(np.array([-2, 3]), np.array([5, -7]), 1) * 2**24, PINNED)
    a = np.linspace(0, 4, 9, dtype=np.float32)
    assert (cell_noise(a, a, 2.0)[:4] == cell_noise(a, a, 2.0)[0]).all()
    assert np.abs(np.diff(smooth_noise(np.linspace(0, 3, 400), np.zeros(400), 1.0))).max() < 0.05


PINNED = [13523950, 7192896]


def test_names_come_from_the_official_splits():
    splits = pytest.importorskip("nuscenes.utils.splits").create_splits_scenes()
    assert scene_names("v1.0-mini", 10) == (*splits["mini_train"], *splits["mini_val"])
    for count in range(1, 11):
        names = scene_names("v1.0-mini", count)
        assert len(set(names)) == count
        assert sum(name in splits["mini_val"] for name in names) == {1: 0, 6: 2, 7: 2, 8: 2, 9: 2, 10: 2}.get(count, 1)
    names = scene_names("v1.0-trainval", 40)
    assert sum(name in splits["train"] for name in names) == 30 and sum(name in splits["val"] for name in names) == 10
    with pytest.raises(ValueError, match="1 to 10 scenes, got 11"):
        scene_names("v1.0-mini", 11)
    with pytest.raises(ValueError, match="v2.0"):
        scene_names("v2.0", 3)
