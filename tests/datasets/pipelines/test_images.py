"""Images and matrices of a sample: augmentation, normalisation, order, errors; against the reference's values."""

import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from mmdet3d.datasets.infos import DataError, load_infos, sample_record, sequence_flags
from mmdet3d.datasets.labels import CAMERAS
from mmdet3d.datasets.pipelines.augmentation import ImageAugmentation, check_data_config
from mmdet3d.datasets.pipelines.format import META_KEYS, FrameSource, frame_from_infos
from mmdet3d.datasets.pipelines.images import (
    ImageReader,
    PrepareImageInputs,
    lidar_to_image,
    normalise,
)
from mmdet3d.utils.normalise import MEAN, NORMALISED, STD

DATA_CONFIG = {"cams": list(CAMERAS), "Ncams": 6, "input_size": (256, 704), "src_size": (900, 1600),
               "resize": (-0.06, 0.11), "rot": (-5.4, 5.4), "flip": True, "crop_h": (0.0, 0.0), "resize_test": 0.0}
SAMPLES = [("real", 0, "s0061"), ("real", 1, "s0103"), ("real", 2, "s0003"),
           ("pseudo_seq", 0, "pseudo0"), ("pseudo_seq", 1, "pseudo1"), ("pseudo_seq", 2, "pseudo2")]


def make_infos(folder, frames=3, cameras=("CAM_FRONT", "CAM_BACK"), size=(40, 30)):
    """One scene whose images are single colours: camera in red, frame in blue."""
    infos = []
    for i in range(frames):
        cams = {}
        for c, name in enumerate(cameras):
            path = f"{name}_{i}.png"
            Image.new("RGB", size, (10 * c, 7, 20 * i)).save(folder / path)
            cams[name] = {"data_path": path, "cam_intrinsic": np.diag([30.0 + c, 31.0 + i, 1.0]),
                          "sensor2ego_translation": [c, 0, 1.5], "sensor2ego_rotation": [1, 0, 0, 0.1 * c],
                          "ego2global_translation": [100.0 + i, c, 0], "ego2global_rotation": [1, 0, 0, 0]}
        infos.append({"token": f"t{i}", "timestamp": i, "scene_token": "s", "prev": f"t{i - 1}" if i else "",
                      "occ_path": f"gts/scene/t{i}", "cams": cams, "can_bus": np.zeros(18),
                      "lidar2ego_translation": [1, 0, 1.8], "lidar2ego_rotation": [1, 0, 0, 0],
                      "ego2global_translation": [100.0 + i, 0, 0], "ego2global_rotation": [1, 0, 0, 0]})
    return infos


SMALL = {"cams": ["CAM_FRONT", "CAM_BACK"], "input_size": (16, 32)}


def test_check_values_of_the_augmentation():
    test = ImageAugmentation.for_test(DATA_CONFIG, (1600, 900))
    assert (test.resize, test.resize_dims, test.crop) == (0.44, (704, 396), (0, 140, 704, 396))
    expected = np.eye(4, dtype=np.float32)
    expected[[0, 1], [0, 1]] = 0.44
    expected[1, 2] = -140
    np.testing.assert_array_equal(test.matrix(), expected)
    train = ImageAugmentation(0.4732982957, (757, 425), (31, 169, 735, 425), True, 3.75031878).matrix()
    np.testing.assert_allclose(train[:2, :2], [[-0.4723, 0.0310], [0.0310, 0.4723]], atol=5e-5)
    np.testing.assert_allclose(train[:2, 2], [714.7535, -193.4155], atol=5e-4)
    np.testing.assert_array_equal(train[:, 3], [0, 0, 0, 1])


def test_the_matrix_says_where_a_pixel_goes():
    """A bright dot is found where the matrix puts it, through resize, crop beyond the border, flip and rotation."""
    augmentation = ImageAugmentation(0.5, (100, 60), (10, -8, 74, 40), True, 12.0)
    image = Image.new("RGB", (200, 120))
    image.paste((255, 255, 255), (116, 56, 120, 60))
    result = np.asarray(augmentation.apply(image))[..., 0].astype(float)
    assert result.shape == (48, 64)
    centre = [(result.sum(axis) * (np.arange(n) + 0.5)).sum() / result.sum() for axis, n in ((0, 64), (1, 48))]
    expected = augmentation.matrix()[:2, :3] @ [118 * 5.0, 58 * 5.0, 5.0] / 5.0
    np.testing.assert_allclose(centre, expected, atol=0.6)


def test_crop_beyond_the_image_is_black():
    augmentation = ImageAugmentation(1.0, (10, 6), (4, 2, 14, 6))
    result = np.asarray(augmentation.apply(Image.new("RGB", (10, 6), (255, 255, 255))))
    assert (result[:, :6] == 255).all() and (result[:, 6:] == 0).all()


def test_training_draws_match_the_reference(shared):
    golden = np.load(shared / "golden/pipeline_train.npz")
    for prefix in ("train0_s0061", "train1_s0061", "train2_s0061", "train3_s0003"):
        rng = np.random.RandomState(int(golden[f"{prefix}_seed"]))
        for camera in range(6):
            drawn = ImageAugmentation.sample(DATA_CONFIG, (1600, 900), rng)
            assert drawn.resize == golden[f"{prefix}_aug_resize"][camera]
            assert drawn.resize_dims == tuple(golden[f"{prefix}_aug_resize_dims"][camera])
            assert drawn.crop == tuple(golden[f"{prefix}_aug_crop"][camera])
            assert drawn.flip == golden[f"{prefix}_aug_flip"][camera]
            assert drawn.rotate == golden[f"{prefix}_aug_rotate"][camera]
            np.testing.assert_allclose(drawn.matrix(), golden[f"{prefix}_post_aug"][camera], rtol=0, atol=1e-4)


def test_training_uses_the_global_generator_and_needs_no_flip():
    np.random.seed(3)  # noqa: NPY002 the loader seeds this one
    first = ImageAugmentation.sample({**DATA_CONFIG, "flip": False}, (1600, 900))
    second = ImageAugmentation.sample(DATA_CONFIG, (1600, 900), np.random.RandomState(3))
    assert not first.flip and (first.resize, first.crop, first.rotate) == (second.resize, second.crop, second.rotate)


def test_normalisation_of_every_value():
    value = np.arange(256, dtype=np.float32)
    for c in range(3):
        shifted = (value - np.float32(MEAN[c])).astype(np.float32)
        exact = (shifted.astype(np.float64) * (1 / np.float64(np.float32(STD[c])))).astype(np.float32)
        np.testing.assert_array_equal(NORMALISED[c], exact)


def test_channels_are_blue_green_red_with_statistics_of_red_green_blue():
    image = np.zeros((4, 5, 3), np.uint8)
    image[..., 2] = 200
    out = normalise(image)
    assert out.shape == (3, 4, 5) and out.dtype == np.float32
    np.testing.assert_allclose(out[:, 0, 0], [(200 - 123.675) / 58.395, -116.28 / 57.12, -103.53 / 57.375], rtol=1e-6)


@pytest.mark.parametrize("changes, message", [
    ({"resise": 1}, r"unknown keys \['resise'\]"),
    ({"Ncams": 5}, "Ncams is 5, but cams has 6"),
    ({"input_size": (256,)}, "expected \\(height, width\\)"),
    ({"input_size": (256, 0)}, "expected \\(height, width\\)"),
])
def test_data_config_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        check_data_config({**DATA_CONFIG, **changes})
    with pytest.raises(ValueError, match=r"keys \['input_size'\] are missing"):
        check_data_config({"cams": []})


def test_sizes_follow_the_config_and_orders_differ_for_images_and_matrices(tmp_path):
    infos = make_infos(tmp_path)
    frame = frame_from_infos(infos, 2, SMALL, tmp_path / "infos.pkl", offsets=(1, 2))
    images, sensor2ego, ego2global, intrinsics, post_aug, bda = frame.img_inputs
    assert images.shape == (1, 6, 3, 16, 32) and bda.shape == (1, 4, 4)
    assert all(matrix.shape == (1, 6, 4, 4) for matrix in (sensor2ego, ego2global, intrinsics, post_aug))
    assert all(tensor.dtype == torch.float32 for tensor in frame.img_inputs)
    camera = np.rint(images[0, :, 2, 8, 8].numpy() * STD[2] + MEAN[2]) / 10
    newest_first = 2 - np.rint(images[0, :, 0, 8, 8].numpy() * STD[0] + MEAN[0]) / 20
    assert camera.tolist() == [0, 0, 0, 1, 1, 1] and newest_first.tolist() == [0, 1, 2, 0, 1, 2]
    assert ego2global[0, :, 0, 3].tolist() == [102, 102, 101, 101, 100, 100]
    assert sensor2ego[0, :, 0, 3].tolist() == [0, 1] * 3
    assert intrinsics[0, :, 0, 0].tolist() == [30, 31] * 3 and intrinsics[0, :, 1, 1].tolist() == [33] * 6
    assert torch.equal(bda[0], torch.eye(4))
    (meta,) = frame.img_metas
    assert set(meta) == set(META_KEYS) and meta["lidar2img"].shape == (2, 4, 4) and meta["ego2lidar"].shape == (1, 4, 4)
    assert frame.token == "t2" and frame.scene == "scene"
    assert frame.image_files["CAM_BACK"] == str(tmp_path / "CAM_BACK_2.png")


def test_keys_say_which_pictures_return(tmp_path):
    source = FrameSource(make_infos(tmp_path, frames=4), SMALL, tmp_path / "infos.pkl")
    keys = [source[i].img_metas[0]["image_keys"] for i in range(4)]
    assert len({keys[i][0] for i in range(4)}) == 4
    assert keys[0] == (keys[0][0],) * 3  # a scene starts: all three frames are the current one
    assert keys[1] == (keys[1][0], keys[0][0], keys[0][0])
    assert keys[3] == (keys[3][0], keys[2][0], keys[1][0])
    other = FrameSource(make_infos(tmp_path, frames=4), {**SMALL, "input_size": (18, 32)}, tmp_path / "infos.pkl")
    assert other[0].img_metas[0]["image_keys"][0] != keys[0][0]


def test_each_image_of_a_sequence_is_decoded_once(tmp_path):
    infos = make_infos(tmp_path, frames=6)
    source = FrameSource(infos, SMALL, tmp_path / "infos.pkl")
    streamed = [source[i] for i in range(6)]
    assert source.prepare.reader.decoded == 12
    for i, frame in enumerate(streamed):
        alone = frame_from_infos(infos, i, SMALL, tmp_path / "infos.pkl")
        assert all(torch.equal(a, b) for a, b in zip(frame.img_inputs, alone.img_inputs, strict=True))
    assert len(source) == 6
    with pytest.raises(IndexError, match=r"sample index 6 is not in 0\.\.5"):
        source[6]


def test_training_draws_anew_and_shares_a_draw_among_the_frames_of_a_camera(tmp_path):
    infos = make_infos(tmp_path, frames=1)
    config = {**DATA_CONFIG, **SMALL, "Ncams": 2}
    step = PrepareImageInputs(config, is_train=True)
    record = sample_record(infos, 0, sequence_flags(infos), (1, 2), tmp_path / "infos.pkl")
    first, second = step(dict(record))["img_inputs"], step(dict(record))["img_inputs"]
    assert not torch.equal(first[4], second[4])
    assert "image_keys" not in step(dict(record))  # pictures that are drawn anew never return
    assert torch.equal(first[0][0], first[0][1]) and torch.equal(first[4][0], first[4][2])
    assert len(PrepareImageInputs(config, sequential=False)(record)["img_inputs"][0]) == 2


def test_errors_name_step_sample_and_file(tmp_path):
    infos = make_infos(tmp_path)
    (tmp_path / "CAM_BACK_1.png").unlink()
    with pytest.raises(DataError, match="PrepareImageInputs: sample t1, CAM_BACK: file not found: CAM_BACK_1.png"):
        frame_from_infos(infos, 2, SMALL, tmp_path / "infos.pkl")
    good = (tmp_path / "CAM_FRONT_0.png").read_bytes()
    for content in (b"", b"no image", good[:40], good[:-30]):
        (tmp_path / "CAM_FRONT_0.png").write_bytes(content)
        with pytest.raises(DataError, match="PrepareImageInputs: sample t0, CAM_FRONT: cannot .*CAM_FRONT_0.png"):
            frame_from_infos(infos, 0, SMALL, tmp_path / "infos.pkl")
    with pytest.raises(DataError, match=r"sample t0 has no cameras \['CAM_LEFT'\]"):
        frame_from_infos(infos, 0, {**SMALL, "cams": ["CAM_LEFT"]}, tmp_path / "infos.pkl")


def test_reader_keeps_no_more_than_its_capacity(tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    reader, augmentation = ImageReader(2), ImageAugmentation(1.0, (8, 8), (0, 0, 8, 8))
    for i in (0, 1, 0, 2, 0):
        reader.read(tmp_path / f"{i}.png", augmentation)
    assert reader.decoded == 3
    reader.read(tmp_path / "1.png", augmentation)
    assert reader.decoded == 4


@pytest.mark.parametrize("file, index, prefix", SAMPLES)
def test_golden_test_pipeline(shared, file, index, prefix):
    golden = np.load(shared / "golden/pipeline_test.npz")
    path = shared / f"data/nuscenes_real/stcocc-nuscenes_infos_{file}.pkl"
    frame = frame_from_infos(load_infos(path), index, DATA_CONFIG, path)
    images = frame.img_inputs[0][0].numpy()
    assert images.shape == tuple(golden[f"{prefix}_imgs_shape"])
    positions = np.random.Generator(np.random.PCG64(zlib.crc32(f"{prefix}_imgs".encode()))).integers(
        0, images.size, 8192)
    np.testing.assert_array_equal(images.ravel()[positions], golden[f"{prefix}_imgs_samples"])
    names = {1: ("sensor2ego", 1e-6), 2: ("ego2global", 1.3e-4), 3: ("intrinsics", 1e-4), 4: ("post_aug", 1e-6),
             5: ("bda", 0)}
    for position, (name, atol) in names.items():
        np.testing.assert_allclose(frame.img_inputs[position][0].numpy(), golden[f"{prefix}_{name}"], rtol=0, atol=atol)
    (meta,) = frame.img_metas
    np.testing.assert_allclose(meta["lidar2img"].numpy(), golden[f"{prefix}_lidar2img"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(meta["ego2lidar"].numpy(), golden[f"{prefix}_ego2lidar"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(meta["curr_to_prev_ego_rt"], golden[f"{prefix}_curr_to_prev_ego_rt"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(meta["can_bus"], golden[f"{prefix}_can_bus"], rtol=1e-14, atol=1e-14)
    for key in ("start_of_sequence", "sequence_group_idx", "index"):
        assert meta[key] == golden[f"{prefix}_{key}"]


def test_golden_front_image_and_augmentation(shared):
    golden = np.load(shared / "golden/pipeline_test.npz")
    path = shared / "data/nuscenes_real/stcocc-nuscenes_infos_real.pkl"
    augmentation = ImageAugmentation.for_test(DATA_CONFIG, (1600, 900))
    camera = load_infos(path)[0]["cams"]["CAM_FRONT"]
    image = ImageReader().read(camera["data_path"], augmentation, path)
    np.testing.assert_array_equal(image, golden["s0061_front_u8"])
    assert (augmentation.resize, augmentation.flip, augmentation.rotate) == (
        golden["test_aug_resize"], golden["test_aug_flip"], golden["test_aug_rotate"])
    assert augmentation.resize_dims == tuple(golden["test_aug_resize_dims"])
    assert augmentation.crop == tuple(golden["test_aug_crop"])


def test_double_precision_projection_is_near_the_published_one(shared):
    golden = np.load(shared / "golden/pipeline_test.npz")
    info = load_infos(shared / "data/nuscenes_real/stcocc-nuscenes_infos_real.pkl")[0]
    post_augs = torch.from_numpy(golden["s0061_post_aug"][:6])
    difference = np.abs(lidar_to_image(info, CAMERAS, post_augs, torch.float64).numpy() - golden["s0061_lidar2img"])
    assert difference[..., 3].max() < 0.5 and difference[..., :3].max() < 5e-4
    assert difference.max() > 0
