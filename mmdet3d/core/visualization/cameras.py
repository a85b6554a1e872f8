"""What is drawn into camera images: lidar points by distance, and the voxels that every pixel looks at."""

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from mmdet3d.core.visualization.grid import OccupancyGrid
from mmdet3d.core.visualization.raycast import cast_rays, free_radius
from mmdet3d.datasets.geometry import lidar_to_ego, rigid_inverse
from mmdet3d.datasets.labels import LabelSet
from mmdet3d.datasets.pipelines.images import lidar_to_image

# Colours from near to far: red, yellow, green, blue, violet.
_NEAR_TO_FAR = np.array([(215, 25, 28), (253, 174, 60), (240, 240, 90), (90, 190, 90), (44, 123, 220), (110, 50, 170)],
                        np.float64)
_FACE_LIGHT = np.array([0.9, 0.8, 1.0])  # of faces across x, y and z


def image_from_lidar(info: Mapping, camera: str) -> np.ndarray:
    """(4, 4) float64 from LIDAR_TOP points to pixels of the image file, times depth, through both ego poses.

    Args:
        info: Info record.
        camera: Camera name.
    """
    return lidar_to_image(info, [camera], torch.eye(4)[None], torch.float64)[0].double().numpy()


def image_from_ego(info: Mapping, camera: str) -> np.ndarray:
    """(4, 4) float64 from points in the ego frame of the labels to pixels of the image file, times depth."""
    return image_from_lidar(info, camera) @ rigid_inverse(lidar_to_ego(info))


def scaled(matrix: np.ndarray, factor: float) -> np.ndarray:
    """``matrix`` for an image that was scaled by ``factor``."""
    return np.diag([factor, factor, 1.0, 1.0]) @ matrix


def distance_colors(distance: np.ndarray, far: float = 50.0) -> np.ndarray:
    """(..., 3) uint8 colours of distances (...) in metres, red near, violet from ``far`` on."""
    steps = len(_NEAR_TO_FAR) - 1
    place = np.clip(np.sqrt(np.clip(distance / far, 0, 1)) * steps, 0, steps)
    channels = [np.interp(place, np.arange(steps + 1), _NEAR_TO_FAR[:, c]) for c in range(3)]
    return np.stack(channels, -1).round().astype(np.uint8)


def draw_points(image: Image.Image, points: np.ndarray, matrix: np.ndarray, size: int = 2) -> Image.Image:
    """Lidar points drawn as squares, coloured by depth, near ones in front.

    Args:
        image: RGB image.
        points: (P, 3) in metres.
        matrix: (4, 4) from the frame of the points to pixels of ``image``, times depth.
        size: Side of the squares in pixels.

    Returns:
        A new image.
    """
    seen = np.asarray(points, np.float64) @ matrix[:3, :3].T + matrix[:3, 3]
    seen = seen[seen[:, 2] > 0.5]
    corner = np.floor(seen[:, :2] / seen[:, 2:] - size / 2 + 0.5).astype(np.int64)
    inside = ((corner >= 0) & (corner <= (image.width - size, image.height - size))).all(1)
    order = np.argsort(-seen[inside, 2], kind="stable")
    (columns, rows), colors = corner[inside][order].T, distance_colors(seen[inside, 2][order])
    pixels = np.array(image.convert("RGB"))
    for dy in range(size):
        for dx in range(size):
            pixels[rows + dy, columns + dx] = colors
    return Image.fromarray(pixels)


def visible_labels(grid: OccupancyGrid, matrix: np.ndarray, size: tuple[int, int]
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first occupied voxel on the ray of every pixel.

    Args:
        grid: Labels.
        matrix: (4, 4) from the ego frame to pixels times depth.
        size: (width, height) of the image.

    Returns:
        Labels (H, W) uint8, 255 where nothing is hit; depth in metres (H, W) float32, infinite there; and the axis of
        the face that was hit (H, W) int8.
    """
    width, height = size
    inverse = np.linalg.inv(matrix[:3, :3])
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([columns.ravel() + 0.5, rows.ravel() + 0.5, np.ones(width * height)])
    directions = (inverse @ pixels).T / grid.cell
    eye = grid.to_cells(-inverse @ matrix[:3, 3])
    hits = cast_rays(free_radius(grid.occupied), eye, directions)
    labels = np.full(width * height, 255, np.uint8)
    seen = np.flatnonzero(hits.distance < np.inf)
    labels[seen] = grid.semantics[tuple(hits.cell[seen].T)]
    return labels.reshape(height, width), hits.distance.reshape(height, width), hits.axis.reshape(height, width)


def draw_labels(image: Image.Image, grid: OccupancyGrid, labels: LabelSet, matrix: np.ndarray,
                opacity: float = 0.55) -> Image.Image:
    """Blend the voxels that every pixel looks at over an image, in the colours of their classes.

    Args:
        image: RGB image.
        grid: Labels.
        labels: Label set.
        matrix: (4, 4) from the ego frame to pixels of ``image``, times depth.
        opacity: Of the voxels; 1 hides the image.

    Returns:
        A new image.
    """
    found, _, axis = visible_labels(grid, matrix, image.size)
    colors = labels.palette[found] * _FACE_LIGHT[axis][..., None]
    pixels = np.array(image.convert("RGB"), np.float64)
    mixed = np.where((found != 255)[..., None], (1 - opacity) * pixels + opacity * colors, pixels)
    return Image.fromarray(mixed.round().astype(np.uint8))
