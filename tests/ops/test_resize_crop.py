"""Resizing a part of an image, against Pillow's resizing of the whole, byte for byte."""

import numpy as np
import pytest
import torch
from PIL import Image

from mmdet3d.ops import resize_crop, resize_crop_reference

COMPILED = hasattr(torch.ops.mmdet3d, "resize_crop")


def random_image(rng, height, width, extreme=False):
    """Noise; of black and white alone where ``extreme``, so that the filter overshoots and is clamped."""
    values = rng.randint(0, 2, (height, width, 3)) * 255 if extreme else rng.randint(0, 256, (height, width, 3))
    return torch.from_numpy(values.astype(np.uint8))


def rows_then_columns(image, size, crop):
    """Pillow in its order of old, whatever its version."""
    rows = Image.fromarray(image.numpy()).resize((size[0], image.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(rows.resize(size, Image.Resampling.BICUBIC).crop(crop))


def test_any_size_and_crop():
    """Growing and shrinking, crops inside, across and beyond every border, images of one pixel."""
    rng = np.random.RandomState(0)
    seen = set()
    for case in range(200):
        height, width = (1, 1) if case == 0 else rng.randint(1, 90, 2)
        size = tuple(rng.randint(1, 120, 2).tolist())
        left, top = rng.randint(-20, size[0] + 5), rng.randint(-20, size[1] + 5)
        crop = (left, top, left + rng.randint(1, 70), top + rng.randint(1, 70))
        image = random_image(rng, height, width, extreme=case % 2)
        result = resize_crop(image, size, crop)
        assert result.dtype == torch.uint8 and result.is_contiguous()
        np.testing.assert_array_equal(result.numpy(), rows_then_columns(image, size, crop))
        seen.add((size[0] > width, size[1] > height, left < 0, top < 0, left >= size[0]))
    assert len(seen) > 12


@pytest.mark.parametrize("size, crop", [((704, 396), (0, 140, 704, 396)), ((757, 425), (31, 169, 735, 425)),
                                        ((608, 342), (0, 86, 704, 342)), ((880, 495), (176, 239, 880, 495))])
def test_one_step_of_pillow_at_the_sizes_of_the_model(size, crop):
    image = random_image(np.random.RandomState(1), 900, 1600)
    expected = Image.fromarray(image.numpy()).resize(size, Image.Resampling.BICUBIC).crop(crop)
    np.testing.assert_array_equal(resize_crop(image, size, crop).numpy(), np.asarray(expected))


@pytest.mark.skipif(not COMPILED, reason="the operators are not compiled")
def test_compiled_equals_reference_and_leaves_the_image_alone():
    rng = np.random.RandomState(2)
    strided = random_image(rng, 3, 31).transpose(0, 1).expand(31, 3, 3)[:, :, :].repeat(1, 5, 1)[::2, ::3]
    before = strided.clone()
    for size, crop in (((40, 20), (-3, 2, 30, 25)), ((3, 5), (0, 0, 3, 5))):
        assert torch.equal(resize_crop(strided, size, crop), resize_crop_reference(strided, size, crop))
    assert torch.equal(strided, before)


@pytest.mark.parametrize("change, error, message", [
    ({"image": torch.zeros(4, 5, 3)}, TypeError, "image must be one of torch.uint8, got torch.float32"),
    ({"image": torch.zeros(4, 5, dtype=torch.uint8)}, ValueError, r"image must have shape \(H, W, 3\)"),
    ({"image": torch.zeros(4, 5, 4, dtype=torch.uint8)}, ValueError, r"image must have shape \(H, W, 3\) on the CPU"),
    ({"image": torch.zeros(0, 5, 3, dtype=torch.uint8)}, ValueError, r"image must have shape \(H, W, 3\) on the CPU"),
    ({"size": (0, 5)}, ValueError, r"size must be \(width, height\), at least 1 each, got \(0, 5\)"),
    ({"size": (5,)}, ValueError, "size must be"),
    ({"size": (5.5, 4)}, TypeError, "size must hold integers, got 5.5"),
    ({"crop": (2, 0, 2, 3)}, ValueError, "crop must be .* got .2, 0, 2, 3"),
    ({"crop": (0, 0, 2)}, ValueError, "crop must be")])
def test_errors(change, error, message):
    arguments = {"image": torch.zeros(4, 5, 3, dtype=torch.uint8), "size": (3, 2), "crop": (0, 0, 2, 2), **change}
    with pytest.raises(error, match=message):
        resize_crop(**arguments)
