"""The bird's-eye view: the top-most voxel of every column."""

import numpy as np
from PIL import Image, ImageDraw

from mmdet3d.core.visualization.drawing import INK, draw_arrow, font, text_width
from mmdet3d.core.visualization.grid import OccupancyGrid, flow_arrows
from mmdet3d.datasets.labels import POINT_CLOUD_RANGE, LabelSet

EMPTY = (244, 245, 247)
"""Colour of columns without an occupied voxel."""


def _shade(height: np.ndarray) -> np.ndarray:
    """(X, Y) brightness: columns that stand above their neighbours towards the light (front left) are brighter."""
    padded = np.pad(height.astype(np.float64), 1, mode="edge")
    step = 2 * padded[1:-1, 1:-1] - padded[2:, 1:-1] - padded[1:-1, 2:]
    return np.clip(0.94 + 0.05 * np.clip(step, -4, 3), 0.7, 1.08)


def bev_colors(grid: OccupancyGrid, labels: LabelSet, shade: bool = True) -> np.ndarray:
    """(X, Y, 3) uint8 colour of each column: its top-most occupied voxel, :data:`EMPTY` without one."""
    depth = grid.semantics.shape[2]
    top = depth - 1 - grid.occupied[:, :, ::-1].argmax(2)
    label = np.take_along_axis(grid.semantics, top[..., None], 2)[..., 0]
    any_occupied = grid.occupied.any(2)
    colors = labels.palette[label].astype(np.float64)
    if shade:
        colors *= _shade(np.where(any_occupied, top, 0))[..., None]
    colors = np.clip(colors, 0, 255).round().astype(np.uint8)
    colors[~any_occupied] = EMPTY
    return colors


def render_bev(semantics: np.ndarray, label_set: LabelSet, flow: np.ndarray | None = None, *,
               point_cloud_range: tuple[float, ...] = POINT_CLOUD_RANGE, pixels_per_voxel: int = 3, shade: bool = True,
               decorate: bool = True) -> Image.Image:
    """Bird's-eye view. Forward (x) is up, left (y) is left.

    Args:
        semantics: (X, Y, Z) labels.
        label_set: What the labels mean.
        flow: (X, Y, Z, 2) velocity along x and y in m/s; adds arrows as long as the way of one second.
        point_cloud_range: Bounds of the grid in the ego frame, metres.
        pixels_per_voxel: Size of a voxel.
        shade: Let differences in height show.
        decorate: Draw the ego car, the scale bar and the arrows.

    Returns:
        RGB image of (Y * pixels_per_voxel, X * pixels_per_voxel) pixels (width, height).

    Raises:
        ValueError: arrays that do not fit, or unknown labels.
    """
    grid = OccupancyGrid.make(semantics, label_set, point_cloud_range)
    colors = bev_colors(grid, label_set, shade)[::-1, ::-1]  # row 0 is the farthest x, column 0 the leftmost y
    image = Image.fromarray(np.ascontiguousarray(colors))
    size = (image.width * pixels_per_voxel, image.height * pixels_per_voxel)
    image = image.resize(size, Image.Resampling.NEAREST)
    if decorate:
        _decorate(image, grid, flow_arrows(grid, flow, label_set))
    return image


def _decorate(image: Image.Image, grid: OccupancyGrid, arrows: np.ndarray) -> None:
    """Draw at four times the size and scale down, for smooth lines."""
    smooth = 4
    scale = np.array([image.height / grid.semantics.shape[0], image.width / grid.semantics.shape[1]]) / grid.cell[:2]
    high = grid.low[:2] + grid.cell[:2] * grid.semantics.shape[:2]
    overlay = Image.new("RGBA", (image.width * smooth, image.height * smooth), (255, 255, 255, 0))
    draw = ImageDraw.Draw(overlay)

    def pixel(x: float, y: float) -> tuple[float, float]:
        return (high[1] - y) * scale[1] * smooth, (high[0] - x) * scale[0] * smooth

    _draw_car(draw, pixel)
    for x, y, _, vx, vy in arrows:
        draw_arrow(draw, pixel(x, y), pixel(x + vx, y + vy), width=max(1.4, image.width / 330) * smooth)
    image.paste(overlay.convert("RGB").resize(image.size, Image.Resampling.BOX),
                mask=overlay.getchannel("A").resize(image.size, Image.Resampling.BOX))
    _draw_scale_bar(image, scale[1])


def _draw_car(draw: ImageDraw.ImageDraw, pixel) -> None:
    """The ego car, seen from above; the origin is the middle of its rear axle."""
    rear, front, half = -1.0, 3.1, 0.95
    outline = [(rear, half), (2.5, half), (front, 0.55), (front, -0.55), (2.5, -half), (rear, -half)]
    draw.polygon([pixel(x, y) for x, y in outline], fill=(25, 27, 33, 255))
    window = [(1.9, 0.7), (1.2, 0.62), (1.2, -0.62), (1.9, -0.7)]
    draw.polygon([pixel(x, y) for x, y in window], fill=(225, 235, 245, 255))


def _draw_scale_bar(image: Image.Image, pixels_per_metre: float) -> None:
    """A bar of a round length, about an eighth of the width, in the lower left corner."""
    wanted = image.width / pixels_per_metre / 8
    metres = max((m for m in (1, 2, 5, 10, 20, 50, 100) if m <= wanted), default=1)
    length, size = metres * pixels_per_metre, max(9, image.width // 45)
    draw = ImageDraw.Draw(image, "RGBA")
    x, y, face = size * 0.8, image.height - size * 0.8, font(size)
    text = f"{metres} m"
    width = max(length, text_width(text, face)) + size
    draw.rectangle((x - size / 2, y - size * 2, x - size / 2 + width, y + size / 2), fill=(255, 255, 255, 215))
    draw.line((x, y, x + length, y), fill=INK, width=max(2, size // 6))
    for end in (x, x + length):
        draw.line((end, y - size * 0.3, end, y + size * 0.3), fill=INK, width=max(2, size // 6))
    draw.text((x, y - size * 1.7), text, fill=INK, font=face)
