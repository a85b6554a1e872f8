"""Info files: reading untrusted pickles, order, sequences, adjacent frames, poses, CAN bus."""

import copy
import io
import os
import pickle

import numpy as np
import pytest

from mmdet3d.datasets.infos import (
    DataError,
    adjacent_indices,
    adjacent_offsets,
    effective_can_bus,
    is_start_of_sequence,
    load_infos,
    relative_poses,
    resolve_path,
    sample_record,
    scene_name,
    sequence_flags,
)


def make_info(token, timestamp=0, scene="s", prev="", **changes):
    pose = {"ego2global_translation": [1.0, 2.0, 0.5], "ego2global_rotation": [0.6, 0.0, 0.0, 0.8]}
    camera = {"data_path": "a.jpg", "cam_intrinsic": np.eye(3), "sensor2ego_translation": [0.0] * 3,
              "sensor2ego_rotation": [1.0, 0, 0, 0], **pose}
    return {"token": token, "timestamp": timestamp, "scene_token": scene, "prev": prev,
            "occ_path": f"gts/{scene}/{token}", "cams": {"CAM_FRONT": camera}, "can_bus": np.arange(18.0),
            "lidar2ego_translation": [0.9, 0, 1.8], "lidar2ego_rotation": [1.0, 0, 0, 0], **pose, **changes}


def make_scenes(*lengths):
    return [make_info(f"{s}-{i}", 100 * s + i, f"scene-{s}", f"{s}-{i - 1}" if i else "")
            for s, length in enumerate(lengths) for i in range(length)]


def write(path, infos, protocol=4):
    path.write_bytes(pickle.dumps({"infos": infos, "metadata": {"version": "x"}}, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_loads_sorted_and_stable_whatever_the_protocol(tmp_path, protocol):
    infos = [make_info("c", 5), make_info("a", 1), make_info("d", 5), make_info("b", 1, extra=np.float32(2), s={1})]
    loaded = load_infos(write(tmp_path / "i.pkl", infos, protocol))
    assert [info["token"] for info in loaded] == ["a", "b", "c", "d"]
    np.testing.assert_array_equal(loaded[0]["can_bus"], np.arange(18.0))
    assert loaded[1]["extra"] == 2 and loaded[1]["s"] == {1}
    assert [info["token"] for info in load_infos(tmp_path / "i.pkl", load_interval=3)] == ["a", "d"]


@pytest.mark.parametrize("names", [("numpy.core", "numpy._core"), ("numpy._core", "numpy.core")])
def test_module_names_of_both_numpy_generations(tmp_path, names):
    data = pickle.dumps({"infos": [make_info("a", v=np.float64(3))]}, 2)
    assert b"numpy" in data
    (tmp_path / "i.pkl").write_bytes(data.replace(*(b"c" + name.encode() + b".multiarray\n" for name in names)))
    assert load_infos(tmp_path / "i.pkl")[0]["v"] == 3


class _Runs:
    def __init__(self, call, *args):
        self.call, self.args = call, args

    def __reduce__(self):
        return self.call, self.args


@pytest.mark.parametrize("value, name", [
    (_Runs(os.system, "touch pwned"), r"(posix|nt)\.system"),
    (_Runs(eval, "1"), "builtins.eval"),
    (io.StringIO("x"), "_io.StringIO"),
    (_Runs(getattr, np.ndarray, "tofile"), "builtins.getattr"),
])
def test_a_pickle_cannot_run_code(tmp_path, monkeypatch, value, name):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "bad.pkl", [make_info("a", x=value)])
    with pytest.raises(DataError, match=rf"bad.pkl refers to {name}"):
        load_infos(path)
    assert not (tmp_path / "pwned").exists()


def test_other_codecs_are_refused(tmp_path):
    (tmp_path / "bad.pkl").write_bytes(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(DataError, match="_codecs.encode with 'rot13'"):
        load_infos(tmp_path / "bad.pkl")


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x04", pickle.dumps({"infos": [make_info("a")]})[:-40]])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.pkl").write_bytes(content)
    with pytest.raises(DataError, match="bad.pkl is truncated or not a pickle"):
        load_infos(tmp_path / "bad.pkl")


def test_missing_file_folder_and_wrong_content(tmp_path):
    with pytest.raises(DataError, match="info file not found: .*none.pkl"):
        load_infos(tmp_path / "none.pkl")
    with pytest.raises(DataError, match="cannot be read"):
        load_infos(tmp_path)
    for content, found in [([1], "found list"), ({"data": 1}, r"found a dict with \['data'\]")]:
        (tmp_path / "i.pkl").write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=found):
            load_infos(tmp_path / "i.pkl")
    with pytest.raises(DataError, match="'infos' is empty"):
        load_infos(write(tmp_path / "i.pkl", []))


def test_missing_keys_are_named_with_their_place(tmp_path):
    bad = make_info("a")
    del bad["prev"]
    with pytest.raises(DataError, match=r"infos\[1\]: keys \['prev'\] are missing"):
        load_infos(write(tmp_path / "i.pkl", [make_info("b"), bad]))
    bad = make_info("a")
    del bad["cams"]["CAM_FRONT"]["cam_intrinsic"]
    with pytest.raises(DataError, match=r"cams\['CAM_FRONT'\]: keys \['cam_intrinsic'\]"):
        load_infos(write(tmp_path / "i.pkl", [bad]))
    with pytest.raises(DataError, match=r"can_bus: expected 18 numbers, found shape \(3,\)"):
        load_infos(write(tmp_path / "i.pkl", [make_info("a", can_bus=np.zeros(3))]))


def test_paths_below_the_working_directory_or_the_info_file(tmp_path, monkeypatch):
    work, data = tmp_path / "work", tmp_path / "data"
    (work / "samples").mkdir(parents=True)
    (data / "samples").mkdir(parents=True)
    for path in (data / "samples/a.jpg", data / "samples/b.jpg", work / "samples/b.jpg"):
        path.write_text("x")
    monkeypatch.chdir(work)
    info_file = data / "infos.pkl"
    assert resolve_path("./samples/a.jpg", info_file).resolve() == data / "samples/a.jpg"
    assert resolve_path("samples/b.jpg", info_file).resolve() == work / "samples/b.jpg"
    assert resolve_path(data / "samples/a.jpg") == data / "samples/a.jpg"
    with pytest.raises(DataError) as caught:
        resolve_path("samples/c.jpg", info_file)
    assert str(work / "samples/c.jpg") in str(caught.value) and str(data / "samples/c.jpg") in str(caught.value)


def test_sequences_of_three_scenes():
    infos = make_scenes(41, 40, 39)
    flags = sequence_flags(infos)
    assert flags.dtype == np.int64 and np.bincount(flags).tolist() == [41, 40, 39]
    assert np.bincount(sequence_flags(infos, 2)).tolist() == [21, 20, 20, 20, 20, 19]
    assert sequence_flags(infos, "all").tolist() == list(range(120))
    starts = [i for i in range(120) if is_start_of_sequence(flags, i)]
    assert starts == [0, 41, 81]
    for split in (0, -1, "some", 1.5):
        with pytest.raises(ValueError, match="sequences_split_num"):
            sequence_flags(infos, split)
    with pytest.raises(ValueError, match="sequence 1 of 1 frames gives 1 pieces"):
        sequence_flags(make_scenes(4, 1), 2)


def test_adjacent_frames():
    infos = make_scenes(3, 3)
    assert [adjacent_indices(infos, i, (1, 2)) for i in range(6)] == [
        (0, 0), (0, 0), (1, 0), (3, 3), (3, 4), (4, 3)]
    assert adjacent_offsets((1, 2, 1), stereo=True) == (1, 2)
    assert adjacent_offsets((1, 2, 1), stereo=False) == (1,)
    with pytest.raises(ValueError, match="starts at 1"):
        adjacent_offsets((2, 3, 1), stereo=True)


def test_can_bus_copy():
    info = make_info("a")
    before = info["can_bus"].copy()
    can_bus = effective_can_bus(info)
    np.testing.assert_array_equal(info["can_bus"], before)
    assert can_bus[:3].tolist() == [1.0, 2.0, 0.5] and can_bus[3:7].tolist() == [0.6] * 4
    assert can_bus[7:16].tolist() == before[7:16].tolist()
    np.testing.assert_allclose(can_bus[16:], [2 * np.arctan2(0.8, 0.6), np.degrees(2 * np.arctan2(0.8, 0.6))])
    assert effective_can_bus(info, legacy_rotation=False)[3:7].tolist() == [0.6, 0.0, 0.0, 0.8]
    right = effective_can_bus(make_info("a", ego2global_rotation=[0.6, 0, 0, -0.8]))
    assert 180 < right[17] < 360


def test_a_sample_record_leaves_the_infos_alone():
    infos = make_scenes(3)
    before = copy.deepcopy(infos)
    record = sample_record(infos, 2, sequence_flags(infos), (1, 2), "x.pkl")
    np.testing.assert_equal(infos, before)
    assert (record["sample_idx"], record["scene_name"], record["info_file"]) == ("0-2", "scene-0", "x.pkl")
    assert [info["token"] for info in record["adjacent"]] == ["0-1", "0-0"]
    with pytest.raises(DataError, match="occ_path 'token'"):
        scene_name(make_info("a", occ_path="token"))


@pytest.mark.parametrize("split", [1, 2])
def test_golden_sequence(shared, split):
    golden = np.load(shared / "golden/pipeline_dataset.npz")
    infos = load_infos(shared / "data/nuscenes_real/stcocc-nuscenes_infos_mini_val_poses.pkl")
    assert [info["token"] for info in infos] == golden["split1_tokens"].tolist()
    flags = sequence_flags(infos, split)
    np.testing.assert_array_equal(flags, golden[f"split{split}_flag"])
    tolerance = {"curr_to_prev_ego_rt": 1e-6, "curr_to_prev_lidar_rt": 1e-6, "prev_lidar_to_global_rt": 1.3e-4,
                 "global_to_curr_lidar_rt": 1.3e-4}
    for i, info in enumerate(infos):
        record = sample_record(infos, i, flags, (1, 2))
        for key in ("sequence_group_idx", "sample_index", "start_of_sequence"):
            assert record[key] == golden[f"split{split}_{key}"][i]
        assert adjacent_indices(infos, i, (1, 2)) == tuple(golden[f"split{split}_adjacent"][i])
        np.testing.assert_array_equal(info["can_bus"], golden[f"split{split}_can_bus_before"][i])
        np.testing.assert_allclose(record["can_bus"], golden[f"split{split}_can_bus"][i], rtol=1e-14, atol=1e-14)
        for key, atol in tolerance.items():
            assert record[key].dtype == np.float32
            np.testing.assert_allclose(record[key], golden[f"split{split}_{key}"][i], rtol=0, atol=atol)


def test_golden_splits(shared):
    golden = np.load(shared / "golden/pipeline_dataset.npz")
    path = shared / "data/nuscenes_real/stcocc-nuscenes_infos_mini_val_poses.pkl"
    infos = load_infos(path)
    for split in (3, 4, "all"):
        np.testing.assert_array_equal(sequence_flags(infos, split), golden[f"flag_split{split}"])
    np.testing.assert_array_equal(sequence_flags(load_infos(path, 3)), golden["flag_load_interval3"])
    for split in (8, 13, 15, 20):
        with pytest.raises(ValueError, match="pieces"):
            sequence_flags(infos, split)


def test_relative_pose_at_a_start_is_nearly_the_identity():
    poses = relative_poses(make_scenes(2), 0, True)
    np.testing.assert_allclose(poses["curr_to_prev_ego_rt"], np.eye(4), atol=1e-12)
    np.testing.assert_array_equal(poses["curr_to_prev_lidar_rt"], np.eye(4, dtype=np.float32))
