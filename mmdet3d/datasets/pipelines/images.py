"""From an info record to the image tensor and the matrices of the model: read, augment, normalise, stack."""

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmdet3d.datasets.geometry import ego_to_global, lidar_to_ego, rigid_inverse, sensor_to_ego
from mmdet3d.datasets.infos import DataError, resolve_path
from mmdet3d.datasets.pipelines.augmentation import ImageAugmentation, check_data_config
from mmdet3d.datasets.pipelines.compose import generator
from mmdet3d.registry import PIPELINES
from mmdet3d.utils.normalise import NORMALISED

CHANNELS = (2, 1, 0)
"""Of the tensor, blue, green and red, in an RGB image."""


def normalise(image: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Normalised (3, H, W) float32 channels blue, green, red of an (H, W, 3) uint8 RGB image.

    Args:
        image: (H, W, 3) uint8, RGB.
        out: (3, H, W) float32 array to write into.
    """
    out = np.empty((3, *image.shape[:2]), np.float32) if out is None else out
    for channel, source in enumerate(CHANNELS):
        np.take(NORMALISED[channel], image[..., source], out=out[channel], mode="clip")
    return out


class ImageReader:
    """Reads and augments images, and remembers the latest, which return as adjacent frames of the next samples.

    Args:
        capacity: How many augmented images to keep; 0 keeps none.
    """

    def __init__(self, capacity: int = 0) -> None:
        self.capacity = capacity
        self.decoded = 0
        self._images: OrderedDict[tuple, np.ndarray] = OrderedDict()

    def open(self, path: str | os.PathLike, info_file: str | os.PathLike | None, what: str) -> Image.Image:
        """Open an image file without decoding it; ``what`` starts the message of an error.

        Raises:
            DataError: the file is missing or no image.
        """
        try:
            return Image.open(resolve_path(path, info_file))
        except DataError as error:
            raise DataError(f"{what}: {error}") from None
        except (OSError, Image.DecompressionBombError) as error:
            raise DataError(f"{what}: cannot read image {path}: {error}") from error

    def read(self, path: str | os.PathLike, augmentation: ImageAugmentation,
             info_file: str | os.PathLike | None = None, what: str = "image") -> np.ndarray:
        """Augmented image, (H, W, 3) uint8 RGB. It may be shared: do not write into it.

        Raises:
            DataError: the file is missing, or damaged anywhere.
        """
        key = (str(path), augmentation)
        if key in self._images:
            self._images.move_to_end(key)
            return self._images[key]
        image = self.open(path, info_file, what)
        try:
            with image:
                image.load()
                array = augmentation.apply(image if image.mode == "RGB" else image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged data
            raise DataError(f"{what}: cannot decode image {path}: {error}") from error
        self.decoded += 1
        self._images[key] = array
        while len(self._images) > self.capacity:
            self._images.popitem(last=False)
        return array


def _as_tensor(matrices: Sequence[np.ndarray]) -> Tensor:
    """(M, 4, 4) float32 tensor of float64 matrices."""
    return torch.from_numpy(np.stack(matrices)).float()


def intrinsic_matrix(camera: Mapping) -> np.ndarray:
    """(4, 4) identity with the pinhole matrix of a camera in its upper left corner."""
    matrix = np.eye(4)
    matrix[:3, :3] = camera["cam_intrinsic"]
    return matrix


def lidar_to_image(info: Mapping, cameras: Sequence[str], post_augs: Tensor,
                   dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, 4, 4) float32 matrices from LIDAR_TOP points to augmented pixels times depth, through both ego poses.

    Args:
        info: Info record.
        cameras: N camera names.
        post_augs: (N, 4, 4) float32 augmentation matrices.
        dtype: Precision of the products. The published data has float32, which costs up to 0.1 pixel at 10 m because
            global positions are large; float64 is rounded once at the end.
    """
    def chain_link(matrices: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(matrices)).to(dtype)

    cams = [info["cams"][name] for name in cameras]
    chain = chain_link([intrinsic_matrix(cam) for cam in cams])
    for link in ([rigid_inverse(sensor_to_ego(cam)) for cam in cams],
                 [rigid_inverse(ego_to_global(cam)) for cam in cams],
                 [ego_to_global(info)],
                 [lidar_to_ego(info)]):  # each rounded on its own, multiplied left to right
        chain = chain @ chain_link(link)
    return (post_augs.to(dtype) @ chain).float()


def as_bytes(image: np.ndarray, out: np.ndarray) -> np.ndarray:
    """(3, H, W) uint8 channels blue, green, red of an (H, W, 3) uint8 RGB image, written into ``out``."""
    for channel, source in enumerate(CHANNELS):
        out[channel] = image[..., source]
    return out


@PIPELINES.register_module()
class PrepareImageInputs:
    """Pipeline step: ``img_inputs`` and the camera matrices of one sample.

    Args:
        data_config: ``cams``, ``input_size`` and the augmentation limits of the config file.
        is_train: Draw the augmentation; otherwise the fixed one of test time.
        sequential: Add the adjacent frames of the sample.
        ship_uint8: Give the images as uint8 channels blue, green, red, a quarter of the bytes;
            the model makes the same floats of them on its device.
        single_precision: Multiply ``lidar2img`` in float32 as the published data has it; otherwise in float64.
        reader: Where images come from. Default: a reader of its own. At test time, when images return unchanged, it
            keeps those of the latest samples, see :meth:`remember_samples`; in training it keeps those of one camera,
            because at the start of a scene the adjacent frames are the current one.

    Raises:
        ValueError: ``data_config`` does not fit.
    """

    # Twice the frames of a sample: the oldest of a sample were looked at before the newest of it.
    IMAGES_OF_A_CAMERA = 6

    def __init__(self, data_config: Mapping, is_train: bool = False, sequential: bool = True, *,
                 ship_uint8: bool = False, single_precision: bool = True,
                 reader: ImageReader | None = None) -> None:
        check_data_config(data_config)
        self.data_config = data_config
        self.cameras = tuple(data_config["cams"])
        self.is_train = is_train
        self.sequential = sequential
        self.dtype = torch.float32 if single_precision else torch.float64
        self.ship_uint8 = ship_uint8
        self.reader = ImageReader(self.IMAGES_OF_A_CAMERA) if reader is None else reader
        if reader is None:
            self.remember_samples(1)

    def remember_samples(self, samples_per_batch: int) -> None:
        """At test time keep as many images that they are still there when the next frame of a sequence comes.

        Args:
            samples_per_batch: How many sequences take turns.
        """
        if not self.is_train:
            self.reader.capacity = self.IMAGES_OF_A_CAMERA * len(self.cameras) * samples_per_batch

    def __call__(self, results: dict) -> dict:
        """Add the images and matrices of a sample; N cameras, F frames (the current one and the adjacent ones).

        Args:
            results: Dict of :func:`mmdet3d.datasets.infos.sample_record`; under ``rng`` the generator of the draws,
                without it NumPy's global one.

        Returns:
            ``results`` itself with ``img_inputs``, a tuple of float32 tensors: images (N * F, 3, H, W), camera-major
            (camera * F + frame), uint8 with ``ship_uint8``; sensor2ego, ego2global, intrinsics and augmentation, each
            (F * N, 4, 4), frame-major (frame * N + camera), the last two those of the current frame, repeated. Also
            ``sensor2sensorego``, ``sensorego2global`` and their inverses ``sensorego2sensor``, ``global2sensorego``
            (F * N, 4, 4), ``lidar2img`` (N, 4, 4), ``ego2lidar`` (1, 4, 4) and ``cam_names``. At test time also
            ``image_keys``, for each of the F frames the files and augmentations of its pictures: where two are equal,
            the pictures are, and so what a model computes of them.

        Raises:
            DataError: a camera is not in the info file, or an image is missing or damaged; the message names the
                step, the sample and the file.
        """
        frames = [results["curr"], *(results["adjacent"] if self.sequential else ())]
        self._check_cameras(frames)
        images, augmentations = self._images(results, frames)
        cams = [frame["cams"][name] for frame in frames for name in self.cameras]
        sensor_poses = [sensor_to_ego(cam) for cam in cams]
        ego_poses = [ego_to_global(cam) for cam in cams]
        post_augs = torch.from_numpy(np.stack([augmentation.matrix() for augmentation in augmentations]))
        intrinsics = _as_tensor([intrinsic_matrix(frames[0]["cams"][name]) for name in self.cameras])
        repeat = (len(frames), 1, 1)
        results["img_inputs"] = (images, _as_tensor(sensor_poses), _as_tensor(ego_poses),
                                 intrinsics.repeat(repeat), post_augs.repeat(repeat))
        results["sensor2sensorego"], results["sensorego2global"] = results["img_inputs"][1:3]
        results["sensorego2sensor"] = _as_tensor([rigid_inverse(pose) for pose in sensor_poses])
        results["global2sensorego"] = _as_tensor([rigid_inverse(pose) for pose in ego_poses])
        results["lidar2img"] = lidar_to_image(frames[0], self.cameras, post_augs, self.dtype)
        results["ego2lidar"] = _as_tensor([rigid_inverse(lidar_to_ego(frames[0]))])
        results["cam_names"] = self.cameras
        if not self.is_train:
            results["image_keys"] = self._image_keys(results, frames, augmentations)
        return results

    def _image_keys(self, results: Mapping, frames: Sequence[Mapping], augmentations: Sequence[ImageAugmentation]
                    ) -> tuple[tuple, ...]:
        """For each frame, what says which pictures it holds."""
        files = [tuple(str(frame["cams"][name]["data_path"]) for name in self.cameras) for frame in frames]
        return tuple((str(results.get("info_file")), paths, tuple(augmentations)) for paths in files)

    def _check_cameras(self, frames: Sequence[Mapping]) -> None:
        for frame in frames:
            if missing := [name for name in self.cameras if name not in frame["cams"]]:
                raise DataError(f"PrepareImageInputs: sample {frame['token']} has no cameras {missing}; "
                                f"it has {sorted(frame['cams'])}")

    def _images(self, results: Mapping, frames: Sequence[Mapping]) -> tuple[Tensor, list[ImageAugmentation]]:
        """Images, camera-major, and the augmentation of each camera, which all its frames share."""
        height, width = self.data_config["input_size"]
        write, dtype = (as_bytes, np.uint8) if self.ship_uint8 else (normalise, np.float32)
        out = np.empty((len(self.cameras), len(frames), 3, height, width), dtype)
        info_file = results.get("info_file")
        rng = generator(results)
        augmentations = []
        for c, name in enumerate(self.cameras):
            paths = [frame["cams"][name]["data_path"] for frame in frames]
            what = [f"PrepareImageInputs: sample {frame['token']}, {name}" for frame in frames]
            with self.reader.open(paths[0], info_file, what[0]) as header:
                augmentations.append(ImageAugmentation.sample(self.data_config, header.size, rng) if self.is_train
                                     else ImageAugmentation.for_test(self.data_config, header.size))
            for f, path in enumerate(paths):
                write(self.reader.read(path, augmentations[c], info_file, what[f]), out=out[c, f])
        return torch.from_numpy(out).flatten(0, 1), augmentations
