"""Lidar origins: selection, geometry against plain matrices, both pairings, incomplete splits."""

import json

import numpy as np
import pytest

from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.lidar_origins import LidarOrigins, scene_origins, select_evenly


def quaternion(yaw):
    return [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))]


def make_scene(name, start, lengths_of_step, time):
    """A drive along a bend; ``lengths_of_step`` metres from frame to frame."""
    frames, place = [], np.array(start, float)
    for number, length in enumerate((0.0, *lengths_of_step)):
        yaw = 0.3 + 0.01 * number
        place = place + length * np.array([np.cos(yaw), np.sin(yaw), 0.02])
        frames.append({
            "token": f"{name}-{number}", "scene_token": name, "timestamp": time + number,
            "prev": f"{name}-{number - 1}" if number else "", "occ_path": f"gts/{name}/{name}-{number}",
            "ego2global_translation": place.tolist(), "ego2global_rotation": quaternion(yaw),
            "lidar2ego_translation": [0.94, 0.01, 1.84], "lidar2ego_rotation": quaternion(-1.57)})
    return frames


def pose(rotation, translation):
    matrix = np.eye(4)
    yaw = 2 * np.arctan2(rotation[3], rotation[0])
    matrix[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    matrix[:3, 3] = translation
    return matrix


def test_even_selection_rounds_halves_to_even():
    assert select_evenly(8).tolist() == list(range(8)) and select_evenly(0).tolist() == []
    assert select_evenly(9).tolist() == [0, 1, 2, 3, 5, 6, 7, 8]
    assert select_evenly(20).tolist() == [0, 3, 5, 8, 11, 14, 16, 19]
    assert select_evenly(41).tolist() == [0, 6, 11, 17, 23, 29, 34, 40]


@pytest.mark.parametrize("reference", [0, 4, 11])
def test_positions_in_the_ego_frame(reference):
    frames = make_scene("s", (600, 1200, 0.5), [9.0] * 11, 0)
    ego_from_global = np.linalg.inv(pose(frames[reference]["ego2global_rotation"],
                                         frames[reference]["ego2global_translation"]))
    lidars = [ego_from_global @ pose(f["ego2global_rotation"], f["ego2global_translation"])
              @ [*f["lidar2ego_translation"], 1.0] for f in frames]
    expected = np.array([p[:3] for p in lidars if abs(p[0]) < 39 and abs(p[1]) < 39])
    assert 1 < len(expected) < 12, "some frames must be out of reach"
    origins = scene_origins(frames, reference)
    assert origins.dtype == np.float64
    np.testing.assert_allclose(origins, expected[select_evenly(len(expected))], atol=1e-5)
    if reference == 0:
        assert origins[0].tolist() == frames[0]["lidar2ego_translation"], "the own origin is exact"


def test_only_x_and_y_limit_the_reach():
    frames = make_scene("s", (0, 0, 0), [1.0], 0)
    frames[1]["ego2global_translation"][2] = 500.0
    assert len(scene_origins(frames, 0)) == 2 and scene_origins(frames, 0)[1, 2] > 400


def world(tmp_path):
    """Three scenes in time order c, a, b; in table order a, b, c. One scene of the table belongs to another split."""
    scenes = {"c": make_scene("c", (0, 0, 0), [2.0] * 2, 0), "a": make_scene("a", (50, 0, 0), [5.0] * 4, 100),
              "b": make_scene("b", (0, 90, 1), [1.0], 200)}
    table = [{"token": name, "name": name, "nbr_samples": len(scenes.get(name, "1234"))} for name in "axbc"]
    path = tmp_path / "scene.json"
    path.write_text(json.dumps(table))
    return [info for name in "cab" for info in scenes[name]], scenes, path


def test_pairing_by_token_and_by_index(tmp_path):
    infos, scenes, path = world(tmp_path)
    by_token, by_index = LidarOrigins(infos), LidarOrigins(infos, "index", path)
    table_order = [(name, i) for name in "abc" for i in range(len(scenes[name]))]
    assert len(by_token) == len(by_index) == len(table_order) == 10
    for index, info in enumerate(infos):
        own = scenes[info["scene_token"]]
        np.testing.assert_array_equal(by_token[index], scene_origins(own, int(info["token"][2:])))
        name, place = table_order[index]
        np.testing.assert_array_equal(by_index[index], scene_origins(scenes[name], place))
    assert [len(by_index[i]) for i in range(10)] == [5] * 5 + [2] * 2 + [3] * 3
    assert [len(by_token[i]) for i in range(10)] == [3] * 3 + [5] * 5 + [2] * 2


def test_the_pairings_agree_where_the_orders_do(tmp_path):
    infos, _, path = world(tmp_path)
    path.write_text(json.dumps([{"token": name} for name in "cab"]))
    by_token, by_index = LidarOrigins(infos), LidarOrigins(infos, "index", path)
    for index in range(len(infos)):
        np.testing.assert_array_equal(by_token[index], by_index[index])


def test_partial_splits_are_refused(tmp_path):
    infos, _, path = world(tmp_path)
    with pytest.raises(DataError, match=r"needs a whole split: scene b has 2 samples in .*scene.json, 1 in the info"):
        LidarOrigins(infos[:-1], "index", path)
    with pytest.raises(DataError, match="sample a-1, the prev of a-2, is not in the info file"):
        LidarOrigins([info for info in infos if info["token"] != "a-1"])
    table = [{"token": name} for name in "abc"] + [{"token": str(i)} for i in range(847)]
    path.write_text(json.dumps(table))
    with pytest.raises(DataError, match=r"3 scenes with 10 samples, the splits .*\[\(150, 6019\), \(700, 28130\)\]"):
        LidarOrigins(infos, "index", path)
    path.write_text(json.dumps(table[1:]))
    with pytest.raises(DataError, match="does not hold scene a and 0 others"):
        LidarOrigins(infos, "index", path)


@pytest.mark.parametrize("content, message", [
    (None, "scene table not found"), ("{", "cannot be read"), ("[1]", "expected a list of records"),
    ('[{"token": "a"}, {"token": "a"}]', "holds scene a twice"), ("[" * 100000, "cannot be read"),
])
def test_bad_scene_tables(tmp_path, content, message):
    infos, _, path = world(tmp_path)
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        LidarOrigins(infos, "index", path)


def test_options(tmp_path):
    infos, _, path = world(tmp_path)
    with pytest.raises(ValueError, match="pairing: expected one of .*got 'tokens'"):
        LidarOrigins(infos, "tokens")
    for pairing, scenes in (("index", None), ("token", path)):
        with pytest.raises(ValueError, match="pairing 'index' needs the scene table"):
            LidarOrigins(infos, pairing, scenes)
