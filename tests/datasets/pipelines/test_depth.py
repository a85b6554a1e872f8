"""Lidar files and depth maps, against loops and the reference's values."""

import numpy as np
import pytest
import torch

from mmdet3d.datasets.infos import DataError, load_infos
from mmdet3d.datasets.pipelines.depth import LoadPointsFromFile, PointToMultiViewDepth, depth_map, project

SIZE = (256, 704)
RANGE = (1.0, 45.0)


def nearest_by_loop(points, size, depth_range):
    result = np.zeros(size, np.float32)
    for column, row, depth in points.tolist():
        x, y = round(column), round(row)  # half to even
        if 0 <= x < size[1] and 0 <= y < size[0] and depth_range[0] <= depth < depth_range[1]:
            result[y, x] = min(depth, result[y, x] or np.inf)
    return result


def random_points(count, size, seed=0):
    """Points around an image so small that many meet, and so close together that float32 sort keys collide."""
    rng = np.random.RandomState(seed)
    return torch.from_numpy(np.stack([rng.uniform(-3, size[1] + 3, count), rng.uniform(-3, size[0] + 3, count),
                                      rng.uniform(0.5, 50, count)], 1).astype(np.float32))


def test_nearest_rule_equals_a_loop_whatever_the_order():
    points = random_points(600, (7, 11))
    expected = nearest_by_loop(points, (7, 11), RANGE)
    assert 0 < (expected > 0).sum() < 200
    for order in (slice(None), torch.randperm(600)):
        np.testing.assert_array_equal(depth_map(points[order], (7, 11), RANGE, nearest=True), expected)


def test_both_rules_set_the_same_pixels_and_agree_where_one_point_falls():
    points = random_points(500, (40, 60))
    ours, nearest = depth_map(points, (40, 60), RANGE), depth_map(points, (40, 60), RANGE, nearest=True)
    assert torch.equal(ours > 0, nearest > 0) and (ours >= nearest).all()


def test_downsampled_map():
    points = torch.tensor([[4.0, 7.0, 3.0], [9.9, 2.0, 4.0], [11.0, 0.0, 5.0]])
    result = depth_map(points, (8, 12), RANGE, downsample=2)
    assert result.shape == (4, 6) and result.nonzero().tolist() == [[1, 5]]  # 7 / 2 rounds to 4, 11 / 2 to 6


def test_no_points():
    for nearest in (False, True):
        assert not depth_map(torch.zeros(0, 3), (3, 4), RANGE, nearest=nearest).any()


def test_projection_drops_what_is_behind():
    matrix = torch.eye(4)
    matrix[:3, 3] = torch.tensor([10.0, 20.0, 0.0])
    points = torch.tensor([[4.0, 2.0, 2.0], [1.0, 1.0, 0.0], [1.0, 1.0, -3.0], [1.0, 1.0, float("nan")]])
    assert project(points, matrix, 1.0).tolist() == [[7.0, 11.0, 2.0]]


def test_golden_handmade_points(shared):
    golden = np.load(shared / "golden/pipeline_depth.npz")
    points = torch.from_numpy(golden["handmade_points"])
    result = depth_map(points, SIZE, RANGE).numpy()
    expected = np.zeros(SIZE, np.float32)
    expected[tuple(golden["handmade_pixels_yx"].T)] = golden["handmade_depth"]
    np.testing.assert_array_equal(result, expected)
    nearest = depth_map(points, SIZE, RANGE, nearest=True).numpy()
    np.testing.assert_array_equal(nearest, nearest_by_loop(points, SIZE, RANGE))
    assert nearest[250, 600] == np.float32(8.9) and result[250, 600] == 9.0


@pytest.mark.parametrize("file, index, prefix, several", [("real", 0, "s0061", 1), ("real", 2, "s0003", 3),
                                                          ("pseudo_seq", 0, "pseudo0", 0)])
def test_golden_depth_maps(shared, file, index, prefix, several):
    golden = np.load(shared / "golden/pipeline_depth.npz")
    path = shared / f"data/nuscenes_real/stcocc-nuscenes_infos_{file}.pkl"
    results = {"pts_filename": load_infos(path)[index]["lidar_path"], "info_file": path,
               "lidar2img": torch.from_numpy(golden[f"{prefix}_lidar2img"]), "img_inputs": (torch.empty(0, 3, *SIZE),)}
    results = LoadPointsFromFile("LIDAR", 5, 3)(results)
    config = {"depth": [1.0, 45.0, 0.5]}
    depth = PointToMultiViewDepth(config)(dict(results))["gt_depth"].numpy()
    expected = golden[f"{prefix}_gt_depth"]
    assert depth.shape == (6, *SIZE) and depth.dtype == np.float32
    assert (np.abs(depth - expected) > 1e-5).sum() <= 5
    nearest = PointToMultiViewDepth(config, nearest=True)(dict(results))["gt_depth"].numpy()
    assert ((nearest > 0) == (depth > 0)).all() and (nearest <= depth).all() and (nearest < depth).sum() == several


def test_points_keep_order_and_first_columns(tmp_path):
    rows = np.arange(28, dtype="<f4").reshape(7, 4)
    rows.tofile(tmp_path / "a.bin")
    results = LoadPointsFromFile("LIDAR", 4, 3)({"pts_filename": "a.bin", "info_file": tmp_path / "infos.pkl"})
    np.testing.assert_array_equal(results["points"].numpy(), rows[:, :3])
    assert results["points"].is_contiguous() and results["points"].dtype == torch.float32


def test_errors_name_step_sample_and_file(tmp_path):
    sample = {"sample_idx": "t7", "pts_filename": "a.bin", "info_file": tmp_path / "infos.pkl"}
    with pytest.raises(DataError, match="LoadPointsFromFile: sample t7: file not found: a.bin"):
        LoadPointsFromFile()(sample)
    for content in (b"", b"1234567", b"0" * 24):
        (tmp_path / "a.bin").write_bytes(content)
        with pytest.raises(DataError, match=f"sample t7: lidar file a.bin has {len(content)} bytes; expected whole"):
            LoadPointsFromFile()(sample)
    with pytest.raises(DataError, match="sample t7: the info record has no lidar_path"):
        LoadPointsFromFile()({**sample, "pts_filename": None})
    for name in (None, "none.bin"):
        assert LoadPointsFromFile(missing_ok=True)({**sample, "pts_filename": name})["points"].shape == (0, 3)
    with pytest.raises(DataError, match=r"PointToMultiViewDepth: sample t7: needs \['points', 'lidar2img'"):
        PointToMultiViewDepth({"depth": [1, 45, 0.5]})(sample)


@pytest.mark.parametrize("options, message", [
    ({"coord_type": "CAMERA"}, "coord_type: only 'LIDAR'"),
    ({"file_client_args": {"backend": "petrel"}}, "file_client_args: only"),
    ({"load_dim": 2}, "use_dim <= load_dim"),
    ({"use_dim": 2}, "3 <= use_dim")])
def test_unsupported_options_of_the_loader(options, message):
    with pytest.raises(ValueError, match=message):
        LoadPointsFromFile(**options)


@pytest.mark.parametrize("options, message", [
    ({"grid_config": {}}, "expected depth="),
    ({"grid_config": {"depth": [45, 1, 0.5]}}, "expected depth="),
    ({"grid_config": {"depth": [1, 45, 0.5]}, "downsample": 0}, "downsample: expected a positive")])
def test_unsupported_options_of_the_map(options, message):
    with pytest.raises(ValueError, match=message):
        PointToMultiViewDepth(**options)
