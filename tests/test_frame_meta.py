"""The meta data of a batch as tensors."""

import numpy as np
import pytest
import tiny_model as tiny
import torch

from mmdet3d.structures import META_KEYS, FrameMeta


@pytest.fixture
def metas():
    generator = torch.Generator().manual_seed(0)
    _, metas = tiny.frame(2, starts=[True, False])
    for meta in metas:
        meta["lidar2img"] = torch.randn(tiny.CAMS, 4, 4, generator=generator)
        meta["ego2lidar"] = torch.randn(1, 4, 4, generator=generator)
    return metas


def test_stacked_values(metas):
    meta = FrameMeta.from_metas(metas)
    assert meta.sequence_ids == (3, 5) and meta.starts == (True, False)
    assert meta.ego_translation.dtype == meta.yaw.dtype == torch.float64
    torch.testing.assert_close(meta.ego_translation, torch.tensor([[301.6, 120, 1], [301.6, 121, 1]]).double())
    assert meta.yaw.tolist() == [0.0, 0.1]  # radians, the entry before the last
    assert meta.previous_ego_from_ego[:, 0, 3].tolist() == pytest.approx([0.0, 0.8])
    assert meta.image_from_ego.shape == (2, tiny.CAMS, 4, 4)
    for b in range(2):
        for n in range(tiny.CAMS):
            expected = metas[b]["lidar2img"][n] @ metas[b]["ego2lidar"][0]
            torch.testing.assert_close(meta.image_from_ego[b, n], expected)


@pytest.mark.parametrize("convert", [np.asarray, lambda matrix: np.asarray(matrix).astype(np.float64),
                                     lambda matrix: np.asarray(matrix).tolist()])
def test_arrays_lists_and_tensors_serve(metas, convert):
    expected = FrameMeta.from_metas(metas)
    for meta in metas:
        for key in ("lidar2img", "ego2lidar", "curr_to_prev_ego_rt"):
            meta[key] = convert(meta[key])
        meta["sequence_group_idx"] = int(meta["sequence_group_idx"])
        meta["start_of_sequence"] = np.bool_(meta["start_of_sequence"])
    found = FrameMeta.from_metas(metas)
    assert torch.equal(found.image_from_ego, expected.image_from_ego) and found.image_from_ego.dtype == torch.float32
    assert torch.equal(found.previous_ego_from_ego, expected.previous_ego_from_ego)
    assert (found.sequence_ids, found.starts) == (expected.sequence_ids, expected.starts)


@pytest.mark.parametrize("key", META_KEYS)
def test_a_missing_key_is_named(metas, key):
    del metas[1][key]
    with pytest.raises(ValueError, match=rf"img_metas\[1\] lacks \['{key}'\]; it has \['"):
        FrameMeta.from_metas(metas)


@pytest.mark.parametrize("key, value, words", [
    ("can_bus", np.zeros(17), r"can_bus must have the shape \(18,\), got \(17,\)"),
    ("curr_to_prev_ego_rt", torch.eye(3), r"curr_to_prev_ego_rt must have the shape \(4, 4\), got \(3, 3\)"),
    ("lidar2img", torch.zeros(3, 4, 4), r"lidar2img must have the shape \(2, 4, 4\), got \(3, 4, 4\)"),
    ("lidar2img", torch.zeros(2, 3, 4), r"lidar2img must have the shape \(2, 4, 4\), got \(2, 3, 4\)"),
    ("ego2lidar", torch.zeros(2, 4, 4), r"ego2lidar must have the shape \(1, 4, 4\) or \(4, 4\), got \(2, 4, 4\)")])
def test_values_of_another_shape_are_refused(metas, key, value, words):
    metas[1][key] = value
    for num_cams in (tiny.CAMS, None):
        with pytest.raises(ValueError, match=rf"^img_metas\[1\]: {words}$"):
            FrameMeta.from_metas(metas, num_cams=num_cams)


def test_the_number_of_cameras_is_that_of_the_model(metas):
    assert FrameMeta.from_metas(metas).image_from_ego.shape[1] == tiny.CAMS
    with pytest.raises(ValueError, match=r"img_metas\[0\]: lidar2img must have the shape \(6, 4, 4\), got \(2, 4, 4\)"):
        FrameMeta.from_metas(metas, num_cams=6)


def test_one_lidar_pose_serves_with_and_without_its_axis(metas):
    expected = FrameMeta.from_metas(metas).image_from_ego
    metas[1]["ego2lidar"] = metas[1]["ego2lidar"][0]
    assert torch.equal(FrameMeta.from_metas(metas).image_from_ego, expected)


def test_keys_of_pictures_need_to_be_there_for_all_samples(metas):
    assert FrameMeta.from_metas(metas).image_keys is None
    metas[0]["image_keys"] = ("c", "b", "a")
    assert FrameMeta.from_metas(metas).image_keys is None
    metas[1]["image_keys"] = ["z", "y", "x"]
    assert FrameMeta.from_metas(metas).image_keys == (("c", "b", "a"), ("z", "y", "x"))


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="img_metas is empty"):
        FrameMeta.from_metas([])


def test_negative_sequence_numbers_are_refused(metas):
    metas[0]["sequence_group_idx"] = -1
    with pytest.raises(ValueError, match=r"img_metas\[0\]: sequence_group_idx must not be negative, got -1"):
        FrameMeta.from_metas(metas)


def test_noise_seeds_need_one_of_every_sample(metas):
    assert FrameMeta.from_metas(metas).noise_seeds is None
    seeded = [{**meta, "noise_seed": seed} for meta, seed in zip(metas, (-2**31, 7), strict=True)]
    seeds = FrameMeta.from_metas(seeded).noise_seeds
    assert seeds.dtype == torch.int32 and seeds.tolist() == [-2**31, 7]
    assert FrameMeta.from_metas([seeded[0], metas[1]]).noise_seeds is None
