"""Label loaders: files and on-the-fly scales, camera masks, errors."""

import data_world
import numpy as np
import pytest

from mmdet3d.datasets.converters.multiscale_gt import coarsen_flow, coarsen_mask, downsample_labels
from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.pipelines.occupancy import LoadOccGTFromFileCVPR2023, LoadOccGTFromFileOpenOcc

GRID = data_world.GRID
SCALES = {"scale_1_2": True, "scale_1_4": True, "scale_1_8": True}
KEYS = ("voxel_semantics", "voxel_semantics_1_2", "voxel_semantics_1_4", "voxel_semantics_1_8")
BOTH = [(LoadOccGTFromFileCVPR2023, "gts", 17), (LoadOccGTFromFileOpenOcc, "openocc_v2", 16)]


def sample(folder):
    return {"sample_idx": "t3", "occ_gt_path": "gts/scene/t3", "info_file": folder / "infos.pkl"}


def write_scales(folder, semantics, free):
    for n in (2, 4, 8):
        coarse = downsample_labels(semantics, n, free)
        np.savez_compressed(folder / f"labels_1_{n}.npz", semantics=coarse, flow=coarse)


@pytest.mark.parametrize("loader, tree, free", BOTH)
def test_files_and_on_the_fly_scales_are_equal(tmp_path, loader, tree, free):
    folder = tmp_path / tree / "scene/t3"
    arrays = data_world.write_labels(folder, 0, free)
    write_scales(folder, arrays["semantics"], free)
    read = loader(**SCALES, grid_size=GRID)(sample(tmp_path))
    for n in (2, 4, 8):
        (folder / f"labels_1_{n}.npz").unlink()
    computed = loader(**SCALES, grid_size=GRID, compute_scales=True)(sample(tmp_path))
    for key, n in zip(KEYS, (1, 2, 4, 8), strict=True):
        assert read[key].shape == tuple(size // n for size in GRID) and read[key].dtype == np.uint8
        np.testing.assert_array_equal(read[key], computed[key])
    np.testing.assert_array_equal(read["voxel_semantics"], arrays["semantics"])
    if tree == "openocc_v2":
        np.testing.assert_array_equal(read["voxel_flows"], arrays["flow"])
    else:
        assert "voxel_flows" not in read
    assert set(loader(grid_size=GRID)(sample(tmp_path))) & set(KEYS) == {"voxel_semantics"}


def test_types_of_the_files_are_kept(tmp_path):
    folder = tmp_path / "openocc_v2/scene/t3"
    arrays = data_world.write_labels(folder, 0, 16)
    np.savez(folder / "labels.npz", semantics=arrays["semantics"].astype(np.int64), flow=arrays["flow"].astype("f8"))
    results = LoadOccGTFromFileOpenOcc(grid_size=GRID)(sample(tmp_path))
    assert results["voxel_semantics"].dtype == np.int64 and results["voxel_flows"].dtype == np.float64


def mask_by_loop(mask, labels, coarse, n):
    result = np.zeros(coarse.shape, np.uint8)
    for x, y, z in np.ndindex(*mask.shape):
        if mask[x, y, z] and labels[x, y, z] == coarse[x // n, y // n, z // n]:
            result[x // n, y // n, z // n] = 1
    return result


@pytest.mark.parametrize("files", [False, True])
def test_camera_masks_at_every_scale(tmp_path, files):
    folder = tmp_path / "gts/scene/t3"
    arrays = data_world.write_labels(folder, 1, 17)
    arrays["mask_camera"][:8, :8] = 0
    np.savez(folder / "labels.npz", **arrays)
    write_scales(folder, arrays["semantics"], 17)
    options = {**SCALES, "grid_size": GRID, "compute_scales": not files}
    plain = LoadOccGTFromFileCVPR2023(**options)(sample(tmp_path))
    masks = LoadOccGTFromFileCVPR2023(**options, camera_mask=True)(sample(tmp_path))
    ignored = LoadOccGTFromFileCVPR2023(**options, ignore_unobserved=True)(sample(tmp_path))
    both = LoadOccGTFromFileCVPR2023(**options, camera_mask=True, ignore_unobserved=True)(sample(tmp_path))
    for key, n in zip(KEYS, (1, 2, 4, 8), strict=True):
        mask_key = key.replace("voxel_semantics", "mask_camera")
        mask = masks[mask_key]
        np.testing.assert_array_equal(mask, mask_by_loop(arrays["mask_camera"], arrays["semantics"], plain[key], n))
        assert 0 < mask.sum() < mask.size and mask.dtype == np.uint8
        np.testing.assert_array_equal(masks[key], plain[key])
        np.testing.assert_array_equal(ignored[key], np.where(mask, plain[key], 255))
        assert mask_key not in plain and mask_key not in ignored and ignored[key].dtype == np.uint8
        np.testing.assert_array_equal(both[key], ignored[key])
        np.testing.assert_array_equal(both[mask_key], mask)


def test_a_coarse_voxel_is_observed_where_its_label_was_seen():
    labels = np.array([[[5, 5], [5, 17]], [[17, 17], [17, 17]]], np.uint8)  # one block, label 5
    for position, observed in (((0, 0, 1), 1), ((0, 1, 1), 0)):
        mask = np.zeros((2, 2, 2), np.uint8)
        mask[position] = 1
        assert coarsen_mask(mask, labels, np.array([[[5]]], np.uint8)).item() == observed


def flow_by_loop(flow, labels, coarse, sides):
    result = np.zeros((*coarse.shape, 2), np.float32)
    for place in np.ndindex(*coarse.shape):
        block = tuple(slice(p * side, (p + 1) * side) for p, side in zip(place, sides, strict=True))
        values = flow[block][labels[block] == coarse[place]]
        for channel in range(2 if len(values) else 0):
            known = values[values[:, channel] != 255, channel]
            result[place][channel] = known.astype(np.float64).mean() if len(known) else 255
    return result


@pytest.mark.parametrize("loader, tree, free", BOTH)
def test_a_coarser_grid_than_that_of_the_files(tmp_path, loader, tree, free):
    arrays = data_world.write_labels(tmp_path / tree / "scene/t3", 2, free)
    options = {"camera_mask": True} if tree == "gts" else {}
    step = loader(scale_1_2=True, grid_size=GRID, coarsen=(4, 3, 2), compute_scales=True, **options)
    results = step(sample(tmp_path))
    semantics = results["voxel_semantics"]
    assert semantics.shape == (4, 8, 4) and results["voxel_semantics_1_2"].shape == (2, 4, 2)
    np.testing.assert_array_equal(semantics, downsample_labels(arrays["semantics"], (4, 3, 2), free))
    np.testing.assert_array_equal(results["voxel_semantics_1_2"],
                                  downsample_labels(arrays["semantics"], (8, 6, 4), free))
    if tree == "gts":
        for key in ("", "_1_2"):
            mask, grid = results[f"mask_camera{key}"], results[f"voxel_semantics{key}"]
            np.testing.assert_array_equal(mask, coarsen_mask(arrays["mask_camera"], arrays["semantics"], grid))
            assert 0 < mask.sum() <= mask.size
    else:
        np.testing.assert_allclose(results["voxel_flows"],
                                   flow_by_loop(arrays["flow"], arrays["semantics"], semantics, (4, 3, 2)), rtol=1e-6)
        assert results["voxel_flows"].dtype == np.float32
    alone = loader(grid_size=GRID, coarsen=(4, 3, 2))(sample(tmp_path))
    np.testing.assert_array_equal(alone["voxel_semantics"], semantics)


def test_flow_of_a_coarser_grid():
    labels = np.array([0, 0, 16, 3, 255, 255, 0, 0], np.uint8).reshape(8, 1, 1)
    flow = np.array([2, 4, 9, 9, 9, 9, 255, 255], np.float16).reshape(8, 1, 1, 1).repeat(2, axis=-1)
    flow[1, ..., 1] = 255  # one component unknown
    coarse = np.array([0, 3, 255, 0], np.uint8).reshape(4, 1, 1)
    result = coarsen_flow(flow, labels, coarse).reshape(4, 2)
    assert result.tolist() == [[3, 2], [9, 9], [9, 9], [255, 255]] and result.dtype == np.float16
    assert coarsen_flow(flow, labels, np.full((4, 1, 1), 7)).max() == 0


@pytest.mark.parametrize("options, message", [
    ({"coarsen": (5, 3, 2)}, r"that 1 times coarsen \(5, 3, 2\) divide"),
    ({"coarsen": 2, "scale_1_8": True, "compute_scales": True}, "grid_size: expected three numbers"),
    ({"coarsen": 2, "scale_1_2": True}, "coarsen=2: there are no files .* set compute_scales=True"),
    ({"coarsen": (2, 2)}, "one or three positive whole numbers"),
])
def test_what_coarsen_cannot_do(options, message):
    with pytest.raises(ValueError, match=message):
        LoadOccGTFromFileOpenOcc(grid_size=GRID, **options)


def test_official_label(shared, tmp_path):
    folder = data_world.link_labels(shared, tmp_path / "gts/scene-unknown/label")
    results = {"sample_idx": "t", "occ_gt_path": str(folder)}
    read = LoadOccGTFromFileCVPR2023(**SCALES)(dict(results))
    computed = LoadOccGTFromFileCVPR2023(**SCALES, compute_scales=True, camera_mask=True)(dict(results))
    for key in KEYS:
        np.testing.assert_array_equal(read[key], computed[key])
    assert computed["mask_camera"].sum() == 43355


def broken(folder, tree, free):
    """Ways to break a label, with what the message must say."""
    labels = data_world.write_labels(folder, 0, free)
    unknown = labels["semantics"].copy()
    unknown[1, 2, 3] = free + 1
    negative = labels["semantics"].astype(np.int16)
    negative[0, 0, 0] = -1
    yield {**labels, "semantics": labels["semantics"][:8]}, r"semantics: expected whole numbers of shape \(16, 24, 8\)"
    yield {**labels, "semantics": labels["semantics"].astype(np.float32)}, "found float32"
    yield {**labels, "semantics": unknown}, rf"labels \[{free + 1}\] are not of"
    yield {**labels, "semantics": negative}, r"labels \[-1\] are not of"
    yield {"other": labels["semantics"]}, r"no \[.*'semantics'\]; found \['other'\]"
    yield {"semantics": np.array([{}], object), "flow": labels["flow"]}, "cannot read label file"
    if tree == "openocc_v2":
        yield {**labels, "flow": labels["flow"][..., :1]}, r"flow: expected numbers of shape \(16, 24, 8, 2\)"


@pytest.mark.parametrize("loader, tree, free", BOTH)
def test_errors_name_step_sample_and_file(tmp_path, loader, tree, free):
    folder = tmp_path / tree / "scene/t3"
    start = f"{loader.__name__}: sample t3: .*"
    with pytest.raises(DataError, match=start + "labels.npz"):
        loader(grid_size=GRID)(sample(tmp_path))
    for arrays, message in broken(folder, tree, free):
        np.savez(folder / "labels.npz", **arrays)
        with pytest.raises(DataError, match=start + message):
            loader(grid_size=GRID)(sample(tmp_path))
    whole = (folder / "labels.npz").read_bytes()
    for content in (b"", b"no zip", whole[: len(whole) // 2], whole[:200] + b"\0" * 60 + whole[260:]):
        (folder / "labels.npz").write_bytes(content)
        with pytest.raises(DataError, match=start + "cannot read label file .*labels.npz"):
            loader(grid_size=GRID)(sample(tmp_path))


@pytest.mark.parametrize("loader, tree, free", BOTH)
def test_errors_of_the_coarse_files(tmp_path, loader, tree, free):
    folder = tmp_path / tree / "scene/t3"
    labels = data_world.write_labels(folder, 0, free)["semantics"]
    step = loader(scale_1_4=True, grid_size=GRID)
    with pytest.raises(DataError, match="labels_1_4.npz; .*tools/generate_ms_occ.py makes it, and compute_scales=True"):
        step(sample(tmp_path))
    np.savez(folder / "labels_1_4.npz", semantics=downsample_labels(labels, 8, free))
    with pytest.raises(DataError, match=r"labels_1_4.npz: semantics: expected whole numbers of shape \(4, 6, 2\)"):
        step(sample(tmp_path))


def test_errors_of_mask_and_grid_size(tmp_path):
    folder = tmp_path / "gts/scene/t3"
    labels = data_world.write_labels(folder, 0, 17)
    np.savez(folder / "labels.npz", semantics=labels["semantics"], mask_camera=labels["mask_camera"][:2])
    with pytest.raises(DataError, match=r"mask_camera: expected shape \(16, 24, 8\), found \(2, 24, 8\)"):
        LoadOccGTFromFileCVPR2023(camera_mask=True, grid_size=GRID)(sample(tmp_path))
    for grid_size in ((200, 200), (12, 16, 8)):
        with pytest.raises(ValueError, match="grid_size: expected three numbers"):
            LoadOccGTFromFileCVPR2023(scale_1_8=True, grid_size=grid_size)
