"""Image augmentation: resize, crop, flip, rotate, as parameters, as an image operation and as a matrix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from mmdet3d.ops.resize_crop import resize_crop

DATA_CONFIG_KEYS = ("cams", "Ncams", "input_size", "src_size", "resize", "rot", "flip", "crop_h", "resize_test")


def check_data_config(data_config: Mapping) -> None:
    """Check the ``data_config`` of a config file.

    Raises:
        ValueError: an unknown key, a missing one, a size that is not two positive numbers, or ``Ncams`` that is not
            the number of ``cams``.
    """
    if unknown := sorted(set(data_config) - set(DATA_CONFIG_KEYS)):
        raise ValueError(f"data_config: unknown keys {unknown}; accepted: {list(DATA_CONFIG_KEYS)}")
    if missing := [key for key in ("cams", "input_size") if key not in data_config]:
        raise ValueError(f"data_config: keys {missing} are missing; found {sorted(data_config)}")
    size = data_config["input_size"]
    if len(size) != 2 or any(int(n) != n or n <= 0 for n in size):
        raise ValueError(f"data_config.input_size: expected (height, width) in whole pixels, got {size!r}")
    if data_config.get("Ncams", len(data_config["cams"])) != len(data_config["cams"]):
        raise ValueError(f"data_config.Ncams is {data_config['Ncams']}, but cams has {len(data_config['cams'])} names")


@dataclass(frozen=True)
class ImageAugmentation:
    """One draw of the image augmentation. Frozen and hashable, so that prepared images can be looked up by it.

    Attributes:
        resize: Scale from source pixels to resized pixels, as the matrix has it.
        resize_dims: (width, height) of the resized image: the scaled size, cut to whole pixels.
        crop: (left, top, right, bottom) in the resized image; may reach beyond it.
        flip: Mirror left-right.
        rotate: Rotation about the centre of the crop in degrees, counter-clockwise as seen.
    """

    resize: float
    resize_dims: tuple[int, int]
    crop: tuple[int, int, int, int]
    flip: bool = False
    rotate: float = 0.0

    @classmethod
    def _make(cls, data_config: Mapping, size: tuple[int, int], scale: float, keep_height: float,
              left, flip=lambda: False, rotate=lambda: 0.0) -> "ImageAugmentation":
        """Common arithmetic; the callables run in this order, after the size is known, since they may draw."""
        height, width = data_config["input_size"]
        new_w, new_h = int(size[0] * scale), int(size[1] * scale)
        top = int(keep_height() * new_h) - height
        x = int(left(max(0, new_w - width)))
        return cls(scale, (new_w, new_h), (x, top, x + width, top + height), bool(flip()), rotate())

    @classmethod
    def for_test(cls, data_config: Mapping, size: tuple[int, int]) -> "ImageAugmentation":
        """The fixed augmentation of test time: scale to the input width, keep the bottom, centre the rest.

        Args:
            data_config: Reads ``input_size`` (height, width), ``resize_test`` (added to the scale) and ``crop_h``
                (limits of the part that is cut off below).
            size: (width, height) of the source image.
        """
        scale = data_config["input_size"][1] / size[0] + data_config.get("resize_test", 0.0)
        keep = 1 - float(np.mean(data_config.get("crop_h", (0.0, 0.0))))
        return cls._make(data_config, size, scale, lambda: keep, lambda spare: spare / 2)

    @classmethod
    def sample(cls, data_config: Mapping, size: tuple[int, int],
               rng: np.random.RandomState | None = None) -> "ImageAugmentation":
        """A random augmentation for training.

        Args:
            data_config: Reads ``input_size``, ``resize``, ``crop_h`` and ``rot`` (limits, degrees) and ``flip``.
            size: (width, height) of the source image.
            rng: Where the five draws come from, in the order resize, crop height, left edge, flip, rotation. Default:
                NumPy's global generator, which the loader seeds in every worker.
        """
        rng = np.random.mtrand._rand if rng is None else rng
        scale = data_config["input_size"][1] / size[0] + rng.uniform(*data_config["resize"])
        return cls._make(
            data_config, size, scale,
            keep_height=lambda: 1 - rng.uniform(*data_config["crop_h"]),
            left=lambda spare: rng.uniform(0, spare),
            # The draw happens even where the config switches the flip off.
            flip=lambda: bool(rng.choice([0, 1])) and data_config["flip"],
            rotate=lambda: rng.uniform(*data_config["rot"]),
        )

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the result."""
        left, top, right, bottom = self.crop
        return right - left, bottom - top

    def apply(self, image: Image.Image) -> np.ndarray:
        """Augment an image; what the crop takes from beyond it, and what rotates in, is black.

        Args:
            image: In mode RGB.

        Returns:
            (H, W, 3) uint8, the values that Pillow's ``resize`` (bicubic), ``crop``, ``transpose`` and ``rotate``
            (nearest neighbour) give.
        """
        result = resize_crop(torch.from_numpy(np.array(image)), self.resize_dims, self.crop).numpy()
        if not (self.flip or self.rotate):
            return result
        image = Image.fromarray(result)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image.rotate(self.rotate, Image.Resampling.NEAREST))

    def matrix(self) -> np.ndarray:
        """(4, 4) float32 matrix on (u * d, v * d, d, 1), from source to augmented pixels.

        The translation is in column 2, where it is multiplied by the depth d. The scale is :attr:`resize`, not the
        ratio of the whole-pixel sizes.
        """
        linear = np.eye(2, dtype=np.float32) * np.float32(self.resize)
        shift = -np.array(self.crop[:2], np.float32)
        if self.flip:
            mirror = np.diag(np.array([-1, 1], np.float32))
            linear, shift = mirror @ linear, mirror @ shift + np.array([self.size[0], 0], np.float32)
        angle = self.rotate / 180 * math.pi
        turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]], np.float32)
        centre = np.array(self.size, np.float32) / 2
        linear, shift = turn @ linear, turn @ shift + (turn @ -centre + centre)
        matrix = np.eye(4, dtype=np.float32)
        matrix[:2, :2], matrix[:2, 2] = linear, shift
        return matrix
