"""The whole published pipelines on real frames, against the reference's values; and through collate."""

import zlib

import data_world
import numpy as np
import pytest
import torch
from mmcv.parallel import collate

from mmdet3d.datasets import build_dataset
from mmdet3d.datasets.labels import GRID_SIZE
from mmdet3d.utils.normalise import normalise_images

TEST_SAMPLES = [("real", 0, "s0061"), ("real", 1, "s0103"), ("real", 2, "s0003"),
                ("pseudo_seq", 0, "pseudo0"), ("pseudo_seq", 1, "pseudo1"), ("pseudo_seq", 2, "pseudo2")]
TRAIN_SAMPLES = [("real", 0, "train0_s0061"), ("real", 0, "train1_s0061"), ("real", 0, "train2_s0061"),
                 ("real", 2, "train3_s0003"), ("pseudo_seq", 2, "train4_pseudo2")]
MATRICES = {1: ("sensor2ego", 1e-6), 2: ("ego2global", 1.3e-4), 3: ("intrinsics", 1e-4), 4: ("post_aug", 1e-4),
            5: ("bda", 0)}


def check_samples(golden, key, array):
    positions = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).integers(0, array.size, 8192)
    np.testing.assert_array_equal(array.ravel()[positions], golden[f"{key}_samples"])


def check_depth(depth, expected):
    """Values within 1e-5; at most five pixels may have moved."""
    assert depth.dtype == torch.float32
    assert (np.abs(depth.numpy() - expected) > 1e-5).sum() <= 5


def check_inputs(golden, prefix, img_inputs, meta):
    images = normalise_images(img_inputs[0]).numpy()  # the configs ship pixels, which the network normalises
    assert images.shape == tuple(golden[f"{prefix}_imgs_shape"]) and images.dtype == np.float32
    check_samples(golden, f"{prefix}_imgs", images)
    stats = np.stack([images.mean((2, 3), np.float64), images.std((2, 3), np.float64), images.min((2, 3)),
                      images.max((2, 3))], -1)
    np.testing.assert_allclose(stats, golden[f"{prefix}_imgs_stats"], rtol=1e-5, atol=1e-5)
    for position, (name, atol) in MATRICES.items():
        np.testing.assert_allclose(img_inputs[position].numpy(), golden[f"{prefix}_{name}"], rtol=0, atol=atol)
    np.testing.assert_allclose(meta["lidar2img"].numpy(), golden[f"{prefix}_lidar2img"], rtol=1e-4, atol=1e-4)


def train_set(shared, folder, file):
    labels = data_world.link_labels(shared, folder / "gts/scene-unknown/label")
    config = data_world.published("occ3d", "train")
    config.update(ann_file=str(data_world.real_infos(shared, folder, file, labels)), sequences_split_num=1)
    return build_dataset(config)


@pytest.mark.parametrize("file, index, prefix", TRAIN_SAMPLES)
def test_train(shared, tmp_path, file, index, prefix):
    golden = np.load(shared / "golden/pipeline_train.npz")
    dataset = train_set(shared, tmp_path, file)
    np.random.seed(int(golden[f"{prefix}_seed"]))  # noqa: NPY002 the loader seeds this one
    sample = dataset[index]
    assert np.random.uniform() == golden[f"{prefix}_next_uniform"]  # noqa: NPY002
    check_inputs(golden, prefix, sample["img_inputs"], sample["img_metas"].data)
    check_depth(sample["gt_depth"], golden[f"{prefix}_gt_depth"])
    for suffix in ("", "_1_2", "_1_4", "_1_8"):
        labels = sample[f"voxel_semantics{suffix}"]
        assert labels.dtype == np.uint8 and labels.flags.c_contiguous
        check_samples(golden, f"{prefix}_voxel_semantics{suffix}", labels)
    for suffix in ("_1_4", "_1_8"):
        np.testing.assert_array_equal(sample[f"voxel_semantics{suffix}"], golden[f"{prefix}_voxel_semantics{suffix}"])


def test_consecutive_samples_go_on_in_the_same_random_stream(shared, tmp_path):
    golden = np.load(shared / "golden/pipeline_train.npz")
    dataset = train_set(shared, tmp_path, "real")
    dataset.seed(int(golden["consecutive_seed"]))
    samples = [dataset[0], dataset[2]]
    np.testing.assert_array_equal(np.stack([sample["img_inputs"][5] for sample in samples]), golden["consecutive_bda"])
    assert dataset.rng.uniform() == golden["consecutive_next_uniform"]
    # The scale of an image is the length of the first column of its augmentation matrix.
    scale = [np.hypot(*sample["img_inputs"][4][:6, :2, 0].numpy().T) for sample in samples]
    np.testing.assert_allclose(np.concatenate(scale), golden["consecutive_aug_resize"], rtol=1e-6)


@pytest.mark.parametrize("file, index, prefix", TEST_SAMPLES)
def test_test(shared, tmp_path, file, index, prefix):
    golden = np.load(shared / "golden/pipeline_test.npz")
    config = data_world.published("openocc", "test")
    config["ann_file"] = str(data_world.real_infos(shared, tmp_path, file))
    has_lidar = f"{prefix}_points_head" in golden
    if not has_lidar:
        next(step for step in config["pipeline"] if step["type"] == "LoadPointsFromFile")["missing_ok"] = True
    sample = build_dataset(config)[index]
    assert set(sample) == {"img_metas", "points", "img_inputs"} and {len(value) for value in sample.values()} == {1}
    meta = sample["img_metas"][0].data
    check_inputs(golden, prefix, sample["img_inputs"][0], meta)
    points = sample["points"][0].data
    assert points.dtype == torch.float32
    if has_lidar:
        assert tuple(points.shape) == tuple(golden[f"{prefix}_points_shape"])
        np.testing.assert_array_equal(points[:64].numpy(), golden[f"{prefix}_points_head"])
    else:
        assert tuple(points.shape) == (0, 3)
    np.testing.assert_allclose(meta["ego2lidar"].numpy(), golden[f"{prefix}_ego2lidar"], rtol=0, atol=1e-6)
    for key in ("curr_to_prev_ego_rt", "curr_to_prev_lidar_rt"):
        np.testing.assert_allclose(meta[key], golden[f"{prefix}_{key}"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(meta["can_bus"], golden[f"{prefix}_can_bus"], rtol=1e-14, atol=1e-12)
    for key in ("start_of_sequence", "sequence_group_idx", "index"):
        assert meta[key] == golden[f"{prefix}_{key}"]
    assert meta["pcd_horizontal_flip"] is False and meta["flip"] is False and meta["pcd_scale_factor"] == 1.0


def test_boxes(shared, tmp_path):
    golden = np.load(shared / "golden/pipeline_test.npz")
    config = data_world.published("openocc", "test")
    config.update(ann_file=str(data_world.real_infos(shared, tmp_path, "real")), pipeline=config["pipeline"][1:2])
    dataset = build_dataset(config)
    for index, prefix in enumerate(("s0061", "s0103", "s0003")):
        sample = dataset[index]
        np.testing.assert_array_equal(sample["gt_bboxes_3d"].tensor.numpy(), golden[f"{prefix}_gt_bboxes_3d"])
        np.testing.assert_array_equal(sample["gt_labels_3d"], golden[f"{prefix}_gt_labels_3d"])


def test_batches_have_the_documented_shapes(shared, tmp_path):
    dataset = train_set(shared, tmp_path, "real")
    batch = collate([dataset[0], dataset[2]], samples_per_gpu=2)
    assert [tuple(tensor.shape) for tensor in batch["img_inputs"]] == [
        (2, 18, 3, 256, 704), *[(2, 18, 4, 4)] * 4, (2, 4, 4)]
    assert batch["gt_depth"].shape == (2, 6, 256, 704)
    for suffix, n in (("", 1), ("_1_2", 2), ("_1_4", 4), ("_1_8", 8)):
        labels = batch[f"voxel_semantics{suffix}"]
        assert labels.shape == (2, *(size // n for size in GRID_SIZE)) and labels.dtype == torch.uint8
    (metas,) = batch["img_metas"].data
    assert [meta["index"] for meta in metas] == [0, 2]

    config = data_world.published("occ3d", "test")
    config["ann_file"] = str(data_world.real_infos(shared, tmp_path, "pseudo_seq"))
    dataset = build_dataset(config)
    batch = collate([dataset[0], dataset[2]], samples_per_gpu=2)
    assert {len(value) for value in batch.values()} == {1}
    assert [tuple(tensor.shape) for tensor in batch["img_inputs"][0]] == [
        (2, 18, 3, 256, 704), *[(2, 18, 4, 4)] * 4, (2, 4, 4)]
    (metas,) = batch["img_metas"][0].data
    (points,) = batch["points"][0].data
    assert [meta["sample_idx"] for meta in metas] == [dataset.data_infos[i]["token"] for i in (0, 2)]
    assert [cloud.shape[1] for cloud in points] == [3, 3]
