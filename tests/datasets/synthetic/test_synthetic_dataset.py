"""The written data set: the official devkit reads it, it is the same every time, and it can be continued."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mmdet3d.datasets.labels import CAMERAS, OPENOCC
from mmdet3d.datasets.synthetic import generate
from mmdet3d.datasets.synthetic.generate import RECORDS, SETTINGS_FILE, write_dataset, write_frame
from mmdet3d.datasets.synthetic.occupancy import make_labels
from mmdet3d.datasets.synthetic.render import render_camera
from mmdet3d.datasets.synthetic.rig import LIDAR
from mmdet3d.datasets.synthetic.scene import WorldSettings

SETTINGS = WorldSettings(("scene-0061",), frames=2, image_size=(112, 64), seed=3)  # of the fixtures

VERSION = "v1.0-mini"


@pytest.fixture(scope="module")
def nusc(small_dataset):
    import matplotlib

    matplotlib.use("Agg")
    devkit = pytest.importorskip("nuscenes.nuscenes")
    return devkit.NuScenes(VERSION, str(small_dataset), verbose=False)


def digests(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def test_all_files_are_there(small_dataset, small_scene):
    assert small_scene.settings == SETTINGS
    files = digests(small_dataset)
    assert sum(name.startswith("samples/") for name in files) == 2 * 7
    assert not [name for name in files if name.endswith(".tmp")]
    for frame in range(2):
        token = small_scene.token("sample", frame)
        assert {f"gts/scene-0061/{token}/labels.npz", f"openocc_v2/scene-0061/{token}/labels.npz"} <= set(files)
    assert {"can_bus/scene-0061_pose.json", f"{VERSION}/sample.json", SETTINGS_FILE} <= set(files)


def test_label_files_have_the_published_keys_and_types(small_dataset, small_scene):
    token = small_scene.token("sample", 1)
    expected = make_labels(small_scene, 1)
    with np.load(small_dataset / "gts" / "scene-0061" / token / "labels.npz") as file:
        assert sorted(file) == ["mask_camera", "mask_lidar", "semantics"]
        for key, value in (("semantics", expected.occ3d), ("mask_camera", expected.mask_camera),
                           ("mask_lidar", expected.mask_lidar)):
            assert file[key].dtype == np.uint8 and file[key].shape == (200, 200, 16)
            np.testing.assert_array_equal(file[key], value)
    with np.load(small_dataset / "openocc_v2" / "scene-0061" / token / "labels.npz") as file:
        assert sorted(file) == ["flow", "semantics"]
        np.testing.assert_array_equal(file["semantics"], expected.openocc)
        assert file["flow"].dtype == np.float32 and file["flow"].shape == (200, 200, 16, 2)


def test_the_devkit_loads_it(nusc, small_dataset, small_scene):
    scene = nusc.scene[0]
    assert (len(nusc.scene), len(nusc.sample), scene["nbr_samples"]) == (1, 2, 2)
    first = nusc.get("sample", scene["first_sample_token"])
    second = nusc.get("sample", first["next"])
    assert second["token"] == scene["last_sample_token"] and second["next"] == "" and first["prev"] == ""
    assert second["timestamp"] - first["timestamp"] == 500_000
    assert set(first["data"]) == {*CAMERAS, LIDAR}
    for channel in CAMERAS:
        data = nusc.get("sample_data", second["data"][channel])
        image = Image.open(small_dataset / data["filename"])
        assert image.size == (data["width"], data["height"]) == SETTINGS.image_size
        assert abs(data["timestamp"] - second["timestamp"]) < 50_000
        assert data["prev"] == first["data"][channel]
        pose = nusc.get("ego_pose", data["ego_pose_token"])
        seconds = small_scene.seconds(1, small_scene.rig[channel].delay)
        np.testing.assert_allclose(pose["translation"][:2], small_scene.ego.pose(seconds)[:2])
    pose = nusc.get("ego_pose", nusc.get("sample_data", first["data"][LIDAR])["ego_pose_token"])
    x, y, _ = pose["translation"]
    assert nusc.map[0]["mask"].is_on_mask([x, 1.0], [y, 1.0]).tolist() == [True, False]


def test_images_are_the_rendered_ones(nusc, small_dataset, small_scene):
    data = nusc.get("sample_data", nusc.sample[1]["data"]["CAM_BACK"])
    stored = np.asarray(Image.open(small_dataset / data["filename"]), float)
    assert np.abs(stored - render_camera(small_scene, 1, "CAM_BACK").colors).mean() < 8


def test_devkit_boxes_hold_their_lidar_points(nusc, small_dataset):
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import points_in_box

    sample = nusc.sample[0]
    path, boxes, _ = nusc.get_sample_data(sample["data"][LIDAR])
    points = LidarPointCloud.from_file(path).points[:3]
    assert len(boxes) > 15
    total = 0
    for box in boxes:
        annotation = nusc.get("sample_annotation", box.token)
        inside = int(points_in_box(box, points).sum())
        assert abs(inside - annotation["num_lidar_pts"]) <= 1 + 0.02 * inside  # points on a face may round away
        total += inside
    assert total > 500


def test_devkit_boxes_fit_labels_and_velocities(nusc, small_dataset, small_scene):
    """Voxels of moving classes lie in a box of their category, and its velocity is their flow."""
    sample = nusc.sample[0]
    _, boxes, _ = nusc.get_sample_data(sample["data"][LIDAR])
    calibration = nusc.get("calibrated_sensor", nusc.get("sample_data", sample["data"][LIDAR])[
        "calibrated_sensor_token"])
    from pyquaternion import Quaternion

    pose = small_scene.ego_pose(0.0)
    with np.load(small_dataset / "openocc_v2" / "scene-0061" / sample["token"] / "labels.npz") as file:
        semantics, flow = file["semantics"], file["flow"]
    cells = np.argwhere(OPENOCC.flow_mask[semantics])
    middles, claimed = (cells + 0.5) * 0.4 + (-40, -40, -1), np.zeros(len(cells), bool)
    compared = 0
    for box in boxes:
        box.rotate(Quaternion(calibration["rotation"]))
        box.translate(calibration["translation"])
        local = np.abs((middles - box.center) @ box.rotation_matrix)
        inside = (local <= box.wlh[[1, 0, 2]] / 2 + 0.3).all(1)
        claimed |= inside
        velocity = nusc.box_velocity(box.token) @ pose[:3, :3]
        core = cells[(local <= box.wlh[[1, 0, 2]] / 2 - 0.1).all(1)]
        if len(core) and np.hypot(*velocity[:2]) > 1:
            values = flow[tuple(core.T)]
            same = np.abs(values - velocity[:2]).max(1) < 0.25  # one-sided difference there, centred one here
            assert same[(values != 0).any(1)].mean() > 0.95
            compared += 1
    assert claimed.all() and compared >= 4


def test_the_devkit_draws_the_boxes(nusc, tmp_path):
    path = tmp_path / "boxes.png"
    nusc.render_sample_data(nusc.sample[0]["data"]["CAM_FRONT"], out_path=str(path), verbose=False)
    assert np.asarray(Image.open(path).convert("RGB")).std() > 10
    drawn = [nusc.get_sample_data(nusc.sample[0]["data"][name])[1] for name in CAMERAS]
    assert sum(map(len, drawn)) > 10


def test_the_devkit_reads_the_can_bus(nusc, small_dataset, small_scene):
    from nuscenes.can_bus.can_bus_api import NuScenesCanBus

    messages = NuScenesCanBus(str(small_dataset)).get_messages("scene-0061", "pose")
    assert list(messages[0]) == ["accel", "orientation", "pos", "rotation_rate", "utime", "vel"]
    times = [message["utime"] for message in messages]
    assert (np.diff(times) == 20_000).all()
    assert times[0] < nusc.sample[0]["timestamp"] < nusc.sample[1]["timestamp"] < times[-1]
    here = messages[times.index(nusc.sample[1]["timestamp"])]
    np.testing.assert_allclose(here["pos"][:2], small_scene.ego.pose(0.5)[:2])
    assert here["vel"][0] == pytest.approx(small_scene.ego.s_speed, rel=0.1) and abs(here["vel"][1]) < 0.2


def test_the_same_settings_give_the_same_bytes(small_dataset, tmp_path):
    write_dataset(tmp_path / "again", SETTINGS)
    assert digests(tmp_path / "again") == digests(small_dataset)
    other = replace(SETTINGS, seed=4, frames=1, image_size=(32, 18))
    write_dataset(tmp_path / "other", other)
    assert not set(digests(tmp_path / "other").values()) & {
        value for name, value in digests(small_dataset).items() if name.startswith(("samples", "gts", "openocc"))}


def test_workers_write_the_same_and_unfinished_frames_only(small_dataset, tmp_path):
    folder, done = tmp_path / "some", []
    folder.mkdir()
    generate._claim(folder, SETTINGS)
    write_frame(folder, SETTINGS, 0, 1)
    kept = next(folder.glob("samples/CAM_FRONT/*"))
    kept.write_bytes(b"not made again")
    (folder / SETTINGS_FILE).touch()
    write_dataset(folder, SETTINGS, workers=2, on_frame=lambda: done.append(1))
    assert len(done) == 2 and kept.read_bytes() == b"not made again"
    found, expected = digests(folder), digests(small_dataset)
    name = str(kept.relative_to(folder))
    assert found.pop(name) != expected.pop(name)
    assert found == expected


def test_an_interrupted_frame_is_made_again(tmp_path, monkeypatch):
    settings = replace(SETTINGS, frames=1, image_size=(32, 18))

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(generate, "render_camera", fail)
        with pytest.raises(OSError, match="no space"):
            write_dataset(tmp_path, settings)
    assert not list(tmp_path.glob(f"{RECORDS}/*")) and not (tmp_path / VERSION).exists()
    write_dataset(tmp_path, settings)
    assert len(list(tmp_path.glob(f"{RECORDS}/*"))) == 1 and (tmp_path / VERSION / "map.json").is_file()


def test_other_settings_or_other_files_are_not_mixed(small_dataset, tmp_path):
    with pytest.raises(ValueError, match="other settings"):
        write_dataset(small_dataset, replace(SETTINGS, seed=9))
    (tmp_path / "samples").mkdir()
    with pytest.raises(ValueError, match="not empty"):
        write_dataset(tmp_path, SETTINGS)


@pytest.mark.parametrize("change, message", [
    ({"frames": 0}, "frames must be"), ({"image_size": (800, 2)}, "image_size must be"), ({"scenes": ()}, "scenes"),
    ({"scenes": ("a", "a")}, "each once"), ({"seed": -1}, "seed must")])
def test_settings_out_of_range_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_dataset(tmp_path / "new", replace(SETTINGS, **change))
    assert not (tmp_path / "new").exists()


def test_annotations_are_chained(small_dataset):
    annotations = {a["token"]: a for a in json.loads((small_dataset / VERSION / "sample_annotation.json").read_text())}
    instances = json.loads((small_dataset / VERSION / "instance.json").read_text())
    assert sum(instance["nbr_annotations"] for instance in instances) == len(annotations)
    for instance in instances:
        token, count = instance["first_annotation_token"], 0
        while token:
            count, last, token = count + 1, token, annotations[token]["next"]
        assert (count, last) == (instance["nbr_annotations"], instance["last_annotation_token"])
    levels = {a["visibility_token"] for a in annotations.values()}
    assert levels <= {"1", "2", "3", "4"} and {"1", "4"} <= levels
