"""Where the plane sweep reads the older image: the cameras, and the positions step by step."""

from typing import NamedTuple

import torch
from torch import Tensor


class SweepGeometry(NamedTuple):
    """Cameras of a plane sweep, one entry per camera; tensors float32 or float64, all on one device.

    Image pixels are those of the network's image, which an augmentation ``p -> augmentation @ p + offset`` made from
    the original one. The same intrinsics and augmentation serve both images.
    """

    #: (N, 2, 2) inverse of ``augmentation``, from augmented to original pixels.
    pixel_from_augmented: Tensor
    #: (N, 2, 2) linear part of the image augmentation, from original to augmented pixels (x, y).
    augmentation: Tensor
    #: (N, 2) translation of the image augmentation (x, y) in pixels of the augmented image.
    offset: Tensor
    #: (N, 3, 3) rotation from the current to the older camera times the inverse of ``intrinsics``.
    older_from_pixel: Tensor
    #: (N, 3) the current camera's centre in the older camera's frame, metres.
    translation: Tensor
    #: (N, 3, 3) pinhole matrix of the original image, pixels.
    intrinsics: Tensor
    #: (H_img, W_img) of the network's image, at least 2 each; a map's corners lie on its corner pixels.
    image_size: tuple[int, int]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, in order."""
        return {name: value for name, value in self._asdict().items() if name != "image_size"}


def sweep_positions(
    geometry: SweepGeometry, depths: Tensor, size: tuple[int, int], min_depth: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where each pixel of the current map lands in the older map, for each depth.

    The steps are those listed in :func:`mmdet3d.ops.plane_sweep.plane_sweep`, each rounded to ``dtype``.

    Args:
        geometry: The cameras.
        depths: (D,) in metres.
        size: (H, W) of both maps.
        min_depth: Least depth in the older camera, in metres.
        dtype: float32 or float64.

    Returns:
        (N, D, H, W, 2) positions (x, y) in the normalised coordinates of ``grid_sample`` with
        ``align_corners=True``, and (N, D, H, W) bool, true where the position is in front of the camera and at
        least one of the pixels that it would be interpolated from is in the map.
    """
    cameras = {name: tensor.to(dtype)[..., None, None, None] for name, tensor in geometry.tensors.items()}
    depths = depths.to(dtype)[:, None, None]
    last = depths.new_tensor([[length - 1 for length in geometry.image_size], [length - 1 for length in size]])
    (image_y, image_x), (map_y, map_x) = last  # tensors: CUDA divides by a number less exactly than by a tensor
    v, u = (torch.linspace(0, image - 1, count, dtype=dtype, device=depths.device)
            for image, count in zip(geometry.image_size, size, strict=True))
    offset, linear = cameras["offset"].unbind(1), cameras["augmentation"]
    x, y = ordered_product(cameras["pixel_from_augmented"], (u - offset[0], v[:, None] - offset[1]))  # (N, 1, H, W)
    point = ordered_product(cameras["older_from_pixel"], (x * depths, y * depths, depths))
    point = [p + t for p, t in zip(point, cameras["translation"].unbind(1), strict=True)]  # 3 x (N, D, H, W)
    image = ordered_product(cameras["intrinsics"], point)
    px, py = ordered_product(linear, (image[0] / image[2], image[1] / image[2]))
    grid_x = (px + offset[0]) / image_x * 2 - 1
    grid_y = (py + offset[1]) / image_y * 2 - 1
    x, y = (grid_x + 1) / 2 * map_x, (grid_y + 1) / 2 * map_y
    inside = (point[2] >= min_depth) & (x > -1) & (x < size[1]) & (y > -1) & (y < size[0])
    return torch.stack([grid_x, grid_y], dim=-1), inside


def ordered_product(matrix: Tensor, vector: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    """Matrix (N, R, K, 1, 1, 1) times vector of K tensors, every product and every sum rounded, in order."""
    rows = []
    for row in range(matrix.shape[1]):
        total = matrix[:, row, 0] * vector[0]
        for k in range(1, matrix.shape[2]):
            total = total + matrix[:, row, k] * vector[k]
        rows.append(total)
    return rows
