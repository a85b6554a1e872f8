"""Augmentation of the ego frame: draws, matrix, flips of labels and flow, against the reference's values."""

import data_world
import numpy as np
import pytest
import torch

from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.pipelines.bev_augment import BEVAug, BEVAugmentation

WIDE = {"rot_lim": (-22.5, 22.5), "scale_lim": (0.95, 1.05), "flip_dx_ratio": 0.5, "flip_dy_ratio": 0.5,
        "tran_lim": (0.5, 0.5, 0.25)}
LABELS = ("voxel_semantics", "voxel_semantics_1_2", "voxel_semantics_1_4", "voxel_semantics_1_8", "voxel_flows")


def sample(seed=0, **entries):
    return {"img_inputs": tuple(torch.zeros(1) for _ in range(5)), "rng": np.random.RandomState(seed), **entries}


def test_matrix_maps_points_as_described():
    augmentation = BEVAugmentation(90.0, 2.0, False, True, (1.0, 2.0, 3.0))
    point = augmentation.matrix() @ torch.tensor([1.0, 0.5, 4.0, 1.0])  # rotated to (-0.5, 1), then scaled, flipped
    torch.testing.assert_close(point, torch.tensor([0.0, 0.0, 11.0, 1.0]))
    assert augmentation.matrix().dtype == torch.float32


def test_flips_of_labels_flow_and_masks():
    x, y, z = np.meshgrid(*map(np.arange, (4, 6, 2)), indexing="ij")
    labels, flow = (100 * x + 10 * y + z), np.stack([x + 1.0, y + 1.0], -1).astype(np.float32)
    flow[0, 0, 0] = 255
    before = flow.copy()
    results = BEVAug(data_world.FLIPS)(sample(voxel_semantics=labels, voxel_flows=flow, mask_camera_1_2=labels % 3,
                                              bev_flip=(True, False)))
    np.testing.assert_array_equal(results["voxel_semantics"], labels[::-1])
    np.testing.assert_array_equal(results["mask_camera_1_2"], labels[::-1] % 3)
    flipped = results["voxel_flows"]
    assert flipped[3, 0, 0].tolist() == [255, 255] and flipped[3, 1, 0].tolist() == [-1, 2]
    np.testing.assert_array_equal(flow, before)
    assert results["img_inputs"][5].diagonal().tolist() == [-1, 1, 1, 1] and len(results["img_inputs"]) == 6


def test_one_voxel_is_not_flipped_in_place():
    flow = np.ones((1, 1, 1, 2), np.float32)
    result = BEVAugmentation(flip_dx=True, flip_dy=True).flip_flow(flow)
    assert flow.tolist() == [[[[1, 1]]]] and result.tolist() == [[[[-1, -1]]]]


def test_no_draw_at_test_time():
    rng = np.random.RandomState(0)
    results = BEVAug(None, is_train=False)({**sample(), "rng": rng})
    assert torch.equal(results["img_inputs"][5], torch.eye(4)) and rng.uniform() == np.random.RandomState(0).uniform()


def test_labels_refuse_what_they_cannot_follow():
    labels = np.zeros((4, 4, 2), np.uint8)
    for key in ("rot_lim", "scale_lim", "tran_lim"):
        with pytest.raises(ValueError, match="labels follow flips only"):
            BEVAug({**data_world.FLIPS, key: WIDE[key]})(sample(voxel_semantics=labels))


def test_errors():
    with pytest.raises(DataError, match=r"BEVAug: sample \(no token\): needs \['img_inputs'\]"):
        BEVAug(data_world.FLIPS)({})
    with pytest.raises(ValueError, match=r"unknown keys \['flip_x'\]"):
        BEVAug({**data_world.FLIPS, "flip_x": 1})
    with pytest.raises(ValueError, match=r"keys \['scale_lim', 'flip_dx_ratio', 'flip_dy_ratio'\] are missing"):
        BEVAug({"rot_lim": (0, 0)})
    with pytest.raises(ValueError, match="training needs bda_aug_conf"):
        BEVAug(None)


@pytest.mark.parametrize("prefix, conf", [("cfg", data_world.FLIPS), ("wide", WIDE)])
def test_golden_draws(shared, prefix, conf):
    golden = np.load(shared / "golden/pipeline_bevaug.npz")
    step = BEVAug(conf, classes=["car"])
    for seed in range(16):
        results = step(sample(seed))
        drawn = results["bev_augmentation"]
        tolerance = {"rtol": 0, "atol": 0 if prefix == "cfg" else 1e-6}
        np.testing.assert_allclose(results["img_inputs"][5].numpy(), golden[f"{prefix}_bda"][seed], **tolerance)
        assert (drawn.flip_dx, drawn.flip_dy) == (golden[f"{prefix}_flip_dx"][seed], golden[f"{prefix}_flip_dy"][seed])
        assert results["rng"].uniform() == golden[f"{prefix}_next_uniform"][seed]
        if prefix == "wide":
            assert (drawn.rotate, drawn.scale) == (golden["wide_rotate_deg"][seed], golden["wide_scale"][seed])
            assert drawn.translation == tuple(golden["wide_translation"][seed])


@pytest.mark.parametrize("dx, dy", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_golden_flips(shared, dx, dy):
    golden = np.load(shared / "golden/pipeline_bevaug.npz")
    results = BEVAug(data_world.FLIPS)(sample(5, bev_flip=(dx, dy), **{key: golden[f"input_{key}"] for key in LABELS}))
    for key in LABELS:
        expected = golden[f"flip{dx}{dy}_{key}"]
        np.testing.assert_array_equal(results[key], expected)
        np.testing.assert_array_equal(np.signbit(results[key]), np.signbit(expected))  # -0 is not 0
        assert results[key].dtype == expected.dtype and results[key].flags.c_contiguous
    np.testing.assert_array_equal(results["img_inputs"][5].numpy(), golden[f"flip{dx}{dy}_bda"])
    assert results["rng"].uniform() == golden[f"flip{dx}{dy}_next_uniform"]


def test_golden_test_time(shared):
    golden = np.load(shared / "golden/pipeline_bevaug.npz")
    results = BEVAug(data_world.FLIPS, is_train=False)(sample())
    np.testing.assert_array_equal(results["img_inputs"][5].numpy(), golden["test_bda"])
    assert results["rng"].uniform() == golden["test_next_uniform"]
