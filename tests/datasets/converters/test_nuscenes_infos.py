"""Info files from raw tables: every formula against independent float64 NumPy and the nuScenes devkit."""

import json
import math
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest
from loading import load_module

from mmdet3d.datasets.converters.nuscenes_boxes import DETECTION_CLASSES, DETECTION_NAMES, quaternion_product
from mmdet3d.datasets.converters.nuscenes_can_bus import NO_CAN_BUS, CanBus, find_can_bus
from mmdet3d.datasets.converters.nuscenes_files import survey_files
from mmdet3d.datasets.converters.nuscenes_infos import (
    SCHEMA_VERSION,
    build_infos,
    path_prefix,
    scene_splits,
    sensor_to_lidar,
    write_infos,
)
from mmdet3d.datasets.converters.nuscenes_tables import read_tables
from mmdet3d.datasets.infos import DataError, adjacent_indices, load_infos, scene_name, sequence_flags

CAMERA_ORDER = ["CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT"]
SPLITS = {"train": {"scene-0061"}, "val": {"scene-0103"}}


WORLD = load_module(Path(__file__).with_name("nuscenes_world.py"))


@pytest.fixture(scope="module")
def raw():
    return WORLD.make_tables()


@pytest.fixture(scope="module")
def download(raw, tmp_path_factory):
    root = tmp_path_factory.mktemp("nuscenes")
    WORLD.write_download(root, raw)
    return root


@pytest.fixture(scope="module")
def infos(download):
    tables = read_tables(download / "v1.0-mini")
    return build_infos(tables, "data/nuscenes", SPLITS, can_bus=CanBus(download / "can_bus"))


@pytest.fixture(scope="module")
def by_token(infos):
    return {info["token"]: info for part in infos.values() for info in part}


@pytest.fixture(scope="module")
def records(raw):
    return {name: {record["token"]: record for record in table} for name, table in raw.items()}


@pytest.fixture(scope="module")
def devkit(download):
    nuscenes = pytest.importorskip("nuscenes")
    return nuscenes.NuScenes("v1.0-mini", str(download), verbose=False)


def matrix(pose):
    """4x4 matrix by rotating the unit vectors with quaternion algebra: q v q*."""
    q = np.array(pose["rotation"], np.float64)
    conjugate = q * [1, -1, -1, -1]
    result = np.eye(4)
    for axis in range(3):
        vector = np.zeros(4)
        vector[1 + axis] = 1
        result[:3, axis] = quaternion_product(quaternion_product(q, vector), conjugate)[1:]
    result[:3, 3] = pose["translation"]
    return result


def sensor_pose(records, frame_token, channel):
    data = records["sample_data"][f"{frame_token}-{channel}-key"]
    calibration = records["calibrated_sensor"][data["calibrated_sensor_token"]]
    return calibration, records["ego_pose"][data["ego_pose_token"]], data


def test_records_are_split_by_scene_in_table_order(infos, raw):
    for split, scene in (("train", "scene-0061"), ("val", "scene-0103")):
        expected = [sample["token"] for sample in raw["sample"] if sample["token"].startswith(scene)]
        assert [info["token"] for info in infos[split]] == expected != sorted(expected)


def test_poses_and_files_are_those_of_the_tables(by_token, records):
    for token, info in by_token.items():
        scene, frame = token.rsplit("-", 1)
        sample = records["sample"][token]
        calibration, ego, data = sensor_pose(records, token, "LIDAR_TOP")
        assert info["lidar2ego_translation"] == calibration["translation"] and info["sweeps"] == []
        assert info["lidar2ego_rotation"] == calibration["rotation"]
        assert info["ego2global_translation"] == ego["translation"] and info["ego2global_rotation"] == ego["rotation"]
        assert info["lidar_path"] == f"./data/nuscenes/{data['filename']}"
        assert info["timestamp"] == sample["timestamp"] and info["scene_token"] == sample["scene_token"]
        assert info["prev"] == ("" if frame == "0" else f"{scene}-{int(frame) - 1}")
        assert info["occ_path"] == f"./data/nuscenes/gts/{scene}/{token}" and scene_name(info) == scene
        assert list(info["cams"]) == CAMERA_ORDER
        for name, camera in info["cams"].items():
            calibration, ego, data = sensor_pose(records, token, name)
            assert camera["data_path"] == f"./data/nuscenes/{data['filename']}" and camera["type"] == name
            assert camera["sample_data_token"] == data["token"] and camera["timestamp"] == data["timestamp"]
            assert camera["sensor2ego_translation"] == calibration["translation"]
            assert camera["sensor2ego_rotation"] == calibration["rotation"]
            assert camera["ego2global_translation"] == ego["translation"] != info["ego2global_translation"]
            assert camera["ego2global_rotation"] == ego["rotation"]
            assert camera["cam_intrinsic"].dtype == np.float64
            assert camera["cam_intrinsic"].tolist() == calibration["camera_intrinsic"]


def test_sensor2lidar_goes_through_both_ego_poses(by_token, records):
    for token, info in by_token.items():
        lidar, lidar_ego, _ = sensor_pose(records, token, "LIDAR_TOP")
        for name, camera in info["cams"].items():
            calibration, ego, _ = sensor_pose(records, token, name)
            expected = np.linalg.inv(matrix(lidar_ego) @ matrix(lidar)) @ matrix(ego) @ matrix(calibration)
            np.testing.assert_allclose(camera["sensor2lidar_rotation"], expected[:3, :3], atol=1e-13)
            np.testing.assert_allclose(camera["sensor2lidar_translation"], expected[:3, 3], atol=1e-10)


def test_lidar_boxes_equal_numpy_and_the_devkit(by_token, raw, devkit):
    for token, info in by_token.items():
        annotations = [record for record in raw["sample_annotation"] if record["sample_token"] == token]
        boxes = devkit.get_sample_data(f"{token}-LIDAR_TOP-key")[1]
        assert len(boxes) == len(annotations) == len(info["gt_boxes"]) >= 5
        to_lidar = np.linalg.inv(matrix({"rotation": info["ego2global_rotation"], "translation": [0] * 3})
                                 @ matrix({"rotation": info["lidar2ego_rotation"], "translation": [0] * 3}))[:3, :3]
        for i, (box, record) in enumerate(zip(boxes, annotations, strict=True)):
            expected = [*box.center, *box.wlh[[1, 0, 2]], box.orientation.yaw_pitch_roll[0]]
            np.testing.assert_allclose(info["gt_boxes"][i], expected, atol=1e-10)
            velocity = to_lidar @ [*devkit.box_velocity(record["token"])[:2], 0]
            np.testing.assert_allclose(info["gt_velocity"][i], velocity[:2], atol=1e-10)
            assert info["gt_names"][i] == DETECTION_NAMES.get(box.name, box.name)
            assert info["num_lidar_pts"][i] == record["num_lidar_pts"]
            assert info["num_radar_pts"][i] == record["num_radar_pts"]
            assert info["valid_flag"][i] == (record["num_lidar_pts"] + record["num_radar_pts"] > 0)


def test_some_velocities_are_known_and_some_are_not(by_token):
    # tracks of three frames; the second gap is 3.5 s, in the other scene 1.7 s; the third object is seen once
    assert np.isfinite(by_token["scene-0061-0"]["gt_velocity"][:, 0]).sum() == 5
    assert np.isnan(by_token["scene-0061-0"]["gt_velocity"][2]).all()
    assert np.isnan(by_token["scene-0061-1"]["gt_velocity"]).all()
    assert np.isfinite(by_token["scene-0103-1"]["gt_velocity"]).all()
    assert np.isnan(by_token["scene-0061-2"]["gt_velocity"]).all()
    assert np.isnan(by_token["scene-0103-2"]["gt_velocity"]).all()


def test_ann_infos_are_in_the_ego_frame_of_the_front_camera(by_token, raw, devkit, records):
    known = 0
    for token, info in by_token.items():
        boxes, labels = info["ann_infos"]
        ego = np.linalg.inv(matrix(sensor_pose(records, token, "CAM_FRONT")[1]))
        expected = []
        for record in raw["sample_annotation"]:
            category = record["instance_token"].split("-", 3)[3]
            if (record["sample_token"] != token or category not in DETECTION_NAMES
                    or record["num_lidar_pts"] + record["num_radar_pts"] == 0):
                continue
            velocity = devkit.box_velocity(record["token"])
            velocity = np.zeros(3) if np.isnan(velocity).any() else velocity
            known += velocity.any()
            width, length, height = record["size"]
            box = devkit.get_box(record["token"])
            box.rotate(_inverse(info["cams"]["CAM_FRONT"]["ego2global_rotation"]))
            expected.append((DETECTION_CLASSES.index(DETECTION_NAMES[category]),
                             [*(ego @ [*record["translation"], 1])[:3], length, width, height,
                              box.orientation.yaw_pitch_roll[0], *(ego[:3, :3] @ velocity)[:2]]))
        assert labels == [label for label, _ in expected] and all(type(label) is int for label in labels)
        assert isinstance(boxes, list) and len(boxes) == len(labels) > 1
        np.testing.assert_allclose(boxes, [box for _, box in expected], atol=1e-9)
    assert known >= 4


def _inverse(rotation):
    return pytest.importorskip("pyquaternion").Quaternion(rotation).inverse


def literal_can_bus(messages, timestamp, motion_from_next):
    last = stopped = messages[0]
    for message in messages:
        stopped = message
        if message["utime"] > timestamp:
            break
        last = message
    source = stopped if motion_from_next else last
    rest = [key for key in source if key not in ("utime", "pos", "orientation")]
    return [*last["pos"], *last["orientation"], *(number for key in rest for number in source[key]), 0.0, 0.0]


@pytest.mark.parametrize("motion", ["next", "last"])
def test_can_bus_takes_the_pose_before_and_the_motion_after(download, by_token, motion):
    messages, can_bus = WORLD.can_messages("scene-0103"), CanBus(download / "can_bus", motion)
    times = [info["timestamp"] for token, info in by_token.items() if token.startswith("scene-0103")]
    for time in (*times, 0, messages[0]["utime"], messages[3]["utime"], messages[-1]["utime"], 10**12):
        vector = can_bus.vector("scene-0103", time)
        assert vector.shape == (18,) and vector.dtype == np.float64
        assert vector.tolist() == literal_can_bus(messages, time, motion == "next")
    if motion == "next":
        info = by_token["scene-0103-1"]
        assert info["can_bus"].tolist() == literal_can_bus(messages, info["timestamp"], True)
        assert info["can_bus"].tolist() != literal_can_bus(messages, info["timestamp"], False)


def test_can_bus_without_usable_messages_is_zero_and_says_why(tmp_path):
    good = WORLD.can_messages("scene-0103")
    contents = {"scene-0001": "[]", "scene-0002": "[{", "scene-0003": json.dumps([{"utime": 1, "pos": [0, 0, 0]}]),
                "scene-0004": json.dumps([{**good[0], "vel": [1.0]}]), "scene-0161": json.dumps(good)}
    for scene, text in contents.items():
        (tmp_path / f"{scene}_pose.json").write_text(text)
    can_bus = CanBus(tmp_path)
    for scene in (*contents, "scene-0005"):
        assert not can_bus.vector(scene, good[5]["utime"]).any()
    assert set(can_bus.problems) == {*contents, "scene-0005"}
    assert "not found" in can_bus.problems["scene-0005"] and "without a CAN bus" in can_bus.problems["scene-0161"]
    assert all("damaged" in can_bus.problems[f"scene-000{i}"] for i in range(1, 5))
    assert not CanBus(None).vector("scene-0103", 0).any()
    with pytest.raises(ValueError, match="'both'"):
        CanBus(None, "both")


def test_can_bus_file_is_read_once(download, monkeypatch):
    can_bus = CanBus(download / "can_bus")
    expected = can_bus.vector("scene-0103", WORLD.START["scene-0103"])
    monkeypatch.setattr("builtins.open", None)
    assert can_bus.vector("scene-0103", WORLD.START["scene-0103"]).tolist() == expected.tolist()


def test_can_bus_folder_and_the_devkits_list_of_scenes_without(download, tmp_path):
    assert find_can_bus(download) == find_can_bus(download / "can_bus") == download / "can_bus"
    assert find_can_bus(tmp_path) is None and find_can_bus(tmp_path / "absent") is None
    api = pytest.importorskip("nuscenes.can_bus.can_bus_api")
    assert {f"scene-{number:04}" for number in api.NuScenesCanBus(str(download)).can_blacklist} == NO_CAN_BUS


def test_round_trip_through_the_restricted_reader(infos, tmp_path):
    path = tmp_path / "new" / "stcocc_infos_train.pkl"
    write_infos(path, infos["train"], "v1.0-mini")
    loaded = load_infos(path)
    assert [info["token"] for info in loaded] == [f"scene-0061-{frame}" for frame in range(3)]
    assert sequence_flags(loaded).tolist() == [0, 0, 0] and adjacent_indices(loaded, 2, (1, 2)) == (1, 0)
    content = pickle.loads(path.read_bytes())
    assert content["metadata"] == {"version": "v1.0-mini", "schema_version": SCHEMA_VERSION}
    assert [info["token"] for info in content["infos"]] == [info["token"] for info in infos["train"]]
    modules = {text for opcode, text, _ in pickletools.genops(path.read_bytes())
               if opcode.name in ("SHORT_BINUNICODE", "GLOBAL") and str(text).startswith(("numpy", "mmdet3d"))}
    assert modules <= {"numpy", "numpy.core.multiarray", "numpy._core.multiarray"}
    assert not list(path.parent.glob(".*"))


def test_keys_and_types_equal_those_of_published_files(shared, infos):
    source = shared / "data/nuscenes_real/stcocc-nuscenes_infos_mini_val_poses.pkl"
    reference, ours = load_infos(source)[5], infos["val"][0]
    assert list(ours) == [key for key in reference if key != "next"]

    def kinds(record):
        return {key: (type(value), getattr(value, "dtype", np.dtype(float)).kind, np.ndim(value))
                for key, value in record.items() if key not in ("cams", "ann_infos", "next")}

    assert kinds(ours) == kinds(reference)
    assert list(ours["cams"]) == list(reference["cams"])
    for name, camera in ours["cams"].items():
        assert set(camera) == set(reference["cams"][name]) and kinds(camera) == kinds(reference["cams"][name])
    assert ours["ann_infos"][0][0].shape == reference["ann_infos"][0][0].shape == (9,)


def test_extrinsics_of_published_frames_are_met(shared):
    for info in load_infos(shared / "data/nuscenes_real/stcocc-nuscenes_infos_mini_val_poses.pkl")[::20]:
        for camera in info["cams"].values():
            rotation, translation = sensor_to_lidar(camera, info)
            np.testing.assert_allclose(rotation, camera["sensor2lidar_rotation"], atol=1e-6)
            np.testing.assert_allclose(translation, camera["sensor2lidar_translation"], atol=1e-4)


def test_paths_start_with_the_root_as_given():
    assert path_prefix("data/nuscenes") == path_prefix("./data/nuscenes/") == "./data/nuscenes"
    assert path_prefix("/mnt/nuscenes/") == "/mnt/nuscenes" and path_prefix("../nuscenes") == "../nuscenes"
    assert path_prefix(".") == "."


def test_splits_of_the_releases():
    pytest.importorskip("nuscenes")
    sizes = {version: {split: len(names) for split, names in scene_splits(version).items()}
             for version in ("v1.0-trainval", "v1.0-mini", "v1.0-test")}
    assert sizes == {"v1.0-trainval": {"train": 700, "val": 150}, "v1.0-mini": {"train": 8, "val": 2},
                     "v1.0-test": {"test": 150}}
    with pytest.raises(ValueError, match="v1.0-trainval, .* got 'v2.0'"):
        scene_splits("v2.0")


def test_release_without_annotations_and_with_lidarseg(raw, tmp_path):
    tables = {**raw, "sample_annotation": [], "instance": [], "lidarseg": [
        {"token": "x", "sample_data_token": "scene-0061-0-LIDAR_TOP-key", "filename": "lidarseg/x.bin"}]}
    WORLD.write_json_tables(tmp_path, tables, "v1.0-test")
    infos = build_infos(read_tables(tmp_path / "v1.0-test"), tmp_path, {"test": set(WORLD.SCENES)}, annotated=False)
    assert len(infos["test"]) == 6
    for info in infos["test"]:
        assert info["ann_infos"] == ([], []) and not any(key.startswith("gt_") for key in info)
        assert ("pts_semantic_mask_path" in info) == (info["token"] == "scene-0061-0")
        assert info["lidar_path"].startswith(f"{tmp_path}/samples/LIDAR_TOP/") and not info["can_bus"].any()


def test_samples_without_boxes_have_empty_arrays(raw, tmp_path):
    WORLD.write_json_tables(tmp_path, {**raw, "sample_annotation": []}, "v1.0-mini")
    info = build_infos(read_tables(tmp_path / "v1.0-mini"), tmp_path, SPLITS)["train"][0]
    assert info["gt_boxes"].shape == (0, 7) and info["gt_velocity"].shape == (0, 2)
    assert info["gt_names"].dtype.kind == "U" and info["valid_flag"].dtype == bool


def test_scene_outside_the_official_splits_is_an_error(download):
    with pytest.raises(DataError, match="1 scenes .*train or val: scene-0061"):
        build_infos(read_tables(download / "v1.0-mini"), "data", {"train": set(), "val": {"scene-0103"}})


def changed(raw, table, position, **values):
    return {**raw, table: [{**record, **values} if i == position else record for i, record in enumerate(raw[table])]}


@pytest.mark.parametrize("table, position, values, message", [
    ("sample_data", 2, {"calibrated_sensor_token": "nowhere"}, "sample_data.json: .*'nowhere'.*calibrated_sensor.json"),
    ("sample_data", -1, {"filename": "../secret"}, "not below the root"),
    ("sample_data", -1, {"filename": "/etc/passwd"}, "not below the root"),
    ("sample", 0, {"scene_token": "nowhere"}, "sample.json: .*'nowhere', which scene.json lacks"),
    ("sample_annotation", 0, {"next": "nowhere"}, "sample_annotation.json: .*'nowhere'"),
    ("instance", 0, {"category_token": "nowhere"}, "instance.json: .*'nowhere', which category.json lacks"),
    ("scene", 0, {"name": "../scene"}, "scene name '../scene'"),
    ("category", 1, {"token": "cat-vehicle.car"}, "category.json: 1 tokens occur more than once"),
    ("category", 1, {"name": "vehicle.ufo"}, r"unknown categories \['vehicle.ufo'\]"),
    ("calibrated_sensor", 1, {"camera_intrinsic": []}, "camera_intrinsic is not a 3x3"),
])
def test_unsound_tables_are_errors(raw, tmp_path, table, position, values, message):
    position = position % len(raw[table])
    if table == "sample_data" and "filename" in values:
        position = max(i for i, record in enumerate(raw[table]) if record["is_key_frame"])
    WORLD.write_json_tables(tmp_path, changed(raw, table, position, **values), "v1.0-mini")
    with pytest.raises(DataError, match=message):
        build_infos(read_tables(tmp_path / "v1.0-mini"), tmp_path, SPLITS)


def test_damaged_and_missing_tables_are_named(raw, tmp_path):
    folder = tmp_path / "v1.0-mini"
    with pytest.raises(DataError, match="v1.0-mini not found.*versions there: none"):
        read_tables(folder)
    WORLD.write_json_tables(tmp_path, raw, "v1.0-mini")
    with pytest.raises(DataError, match="v1.0-trainval not found.*versions there: v1.0-mini"):
        read_tables(tmp_path / "v1.0-trainval")
    with pytest.raises(DataError, match="root folder not found"):
        read_tables(tmp_path / "nowhere" / "v1.0-mini")
    text = (folder / "ego_pose.json").read_text()
    for damaged, message in ((text[:-20], "ego_pose.json is truncated or not JSON"),
                             ('{"a": 1}', "ego_pose.json: a record lacks 'token'; it has"),
                             ("3", "ego_pose.json: expected a list of records, found int")):
        (folder / "ego_pose.json").write_text(damaged)
        with pytest.raises(DataError, match=message):
            read_tables(folder)
    (folder / "ego_pose.json").unlink()
    (folder / "sample.json").unlink()
    with pytest.raises(DataError, match="tables missing: sample.json, ego_pose.json; found: attribute.json, "):
        read_tables(folder)


def test_survey_counts_by_sensor_and_scene(raw, tmp_path):
    WORLD.write_download(tmp_path, raw)
    tables = read_tables(tmp_path / "v1.0-mini")
    assert survey_files(tmp_path, tables).to_dict() == {
        "samples": 6, "lidar_absent": False, "incomplete_scenes": [], "sensors": {}}
    for path in (tmp_path / "samples/LIDAR_TOP").iterdir():
        path.unlink()
    survey = survey_files(tmp_path, tables)
    assert survey.lidar_absent and survey.incomplete == [] and survey.gaps["LIDAR_TOP"].files == 6
    (tmp_path / "samples/LIDAR_TOP/scene-0061-0-LIDAR_TOP-key.pcd.bin").touch()
    (tmp_path / "samples/CAM_BACK/scene-0103-1-CAM_BACK-key.jpg").unlink()
    survey = survey_files(tmp_path, tables)
    assert not survey.lidar_absent and survey.incomplete == ["scene-0061", "scene-0103"]
    assert set(survey.gaps) == {"LIDAR_TOP", "CAM_BACK"} and survey.gaps["LIDAR_TOP"].files == 5
    assert vars(survey.gaps["CAM_BACK"]) == {"files": 1, "records": 0, "scenes": ["scene-0103"],
                                             "examples": ["samples/CAM_BACK/scene-0103-1-CAM_BACK-key.jpg"]}


def test_key_frame_that_the_tables_lack(raw, tmp_path):
    lacking = [record for record in raw["sample_data"] if record["token"] != "scene-0061-1-CAM_FRONT-key"]
    WORLD.write_download(tmp_path, {**raw, "sample_data": lacking})
    tables = read_tables(tmp_path / "v1.0-mini")
    survey = survey_files(tmp_path, tables)
    assert survey.gaps["CAM_FRONT"].records == 1 and survey.incomplete == ["scene-0061"]
    with pytest.raises(DataError, match="scene-0061-1: no key frame of CAM_FRONT"):
        build_infos(tables, tmp_path, SPLITS)
    assert [len(part) for part in build_infos(tables, tmp_path, SPLITS, leave_out={"scene-0061"}).values()] == [0, 3]


def test_quaternion_product_is_hamiltons():
    i, j, k = np.eye(4)[1:]
    assert quaternion_product(i, j).tolist() == k.tolist() and quaternion_product(j, i).tolist() == (-k).tolist()
    angle = quaternion_product([math.cos(0.1), 0, 0, math.sin(0.1)], [math.cos(0.2), 0, 0, math.sin(0.2)])
    np.testing.assert_allclose(angle, [math.cos(0.3), 0, 0, math.sin(0.3)], atol=1e-15)
