"""The picture of one frame: what the cameras saw, and the occupancy and flow from above and in 3-D."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmdet3d.core.visualization.bev import render_bev
from mmdet3d.core.visualization.drawing import INK, PAPER, draw_legend, draw_tag, fit_text, font, save_png
from mmdet3d.core.visualization.render3d import View, render_3d
from mmdet3d.datasets.labels import CAMERAS, POINT_CLOUD_RANGE, LabelSet

__all__ = ["View", "compose_frame", "render_3d", "render_bev", "save_png"]

_ROWS = (CAMERAS[:3], CAMERAS[3:])


def camera_panel(images: Mapping[str, Image.Image], width: int, gap: int) -> Image.Image:
    """Two rows of three cameras: in front from left to right, behind from left to right."""
    cell_w = (width - 2 * gap) // 3
    first = next(iter(images.values()))
    cell_h = round(cell_w * first.height / first.width)
    panel = Image.new("RGB", (width, 2 * cell_h + gap), PAPER)
    for row, names in enumerate(_ROWS):
        for column, name in enumerate(names):
            x, y = column * (cell_w + gap), row * (cell_h + gap)
            if name in images:
                picture = images[name].convert("RGB").resize((cell_w, cell_h), Image.Resampling.LANCZOS)
            else:
                picture = Image.new("RGB", (cell_w, cell_h), (235, 236, 240))
            draw_tag(picture, name.removeprefix("CAM_").replace("_", " ").lower(), size=max(9, cell_w // 42))
            panel.paste(picture, (x, y))
    return panel


def as_images(images: Mapping[str, Image.Image] | Sequence[Image.Image]) -> dict[str, Image.Image]:
    """Images by camera name, of a mapping or of six in order.

    Raises:
        ValueError: another number of images, or an unknown camera.
    """
    if not isinstance(images, Mapping):
        if len(images) != len(CAMERAS):
            raise ValueError(f"images: expected {len(CAMERAS)} in the order {CAMERAS}, got {len(images)}")
        return dict(zip(CAMERAS, images, strict=True))
    if unknown := sorted(set(images) - set(CAMERAS)):
        raise ValueError(f"images: unknown cameras {unknown}; known: {CAMERAS}")
    return dict(images)


def compose_frame(images: Mapping[str, Image.Image] | Sequence[Image.Image], semantics: np.ndarray,
                  flow: np.ndarray | None, label_set: LabelSet, title: str = "", notes: Sequence[str] = (), *,
                  point_cloud_range: tuple[float, ...] = POINT_CLOUD_RANGE, width: int = 1920) -> Image.Image:
    """Cameras, 3-D view, bird's-eye view and class legend of one frame in one picture.

    Args:
        images: PIL images by camera name, or six in the order of :data:`mmdet3d.datasets.labels.CAMERAS`. Cameras
            that are absent stay grey; none at all leaves them out.
        semantics: (X, Y, Z) labels.
        flow: (X, Y, Z, 2) velocity along x and y in m/s, or None.
        label_set: What the labels mean.
        title: First line, in bold.
        notes: Further remarks, such as where the weights came from; on a line below the title.
        point_cloud_range: Bounds of the grid in the ego frame, metres.
        width: Width of the picture in pixels; everything else follows.

    Returns:
        RGB image.

    Raises:
        ValueError: arrays that do not fit, unknown labels or cameras.
    """
    images = as_images(images)
    margin, gap = width // 80, max(4, width // 240)
    inner = width - 2 * margin
    side = round(inner * 0.345)
    pixels_per_voxel = max(1, -(-side // max(np.shape(semantics)[:2])))
    bev = render_bev(semantics, label_set, flow, point_cloud_range=point_cloud_range,
                     pixels_per_voxel=pixels_per_voxel)
    bev.thumbnail((side, side), Image.Resampling.LANCZOS)
    space = render_3d(semantics, flow, label_set=label_set, point_cloud_range=point_cloud_range,
                      size=(inner - side - gap, side))
    draw_tag(space, "3D occupancy" + ("; arrows: motion in 1 s" if flow is not None else ""), max(9, width // 128))
    draw_tag(bev, "bird's-eye view", max(9, width // 128))
    present = np.unique(semantics).tolist()
    legend = draw_legend(label_set, inner, present, size=max(9, width // 116))
    parts = [camera_panel(images, inner, gap)] if images else []
    lower = Image.new("RGB", (inner, side), PAPER)
    lower.paste(space, (0, 0))
    lower.paste(bev, (inner - side + (side - bev.width) // 2, (side - bev.height) // 2))
    parts += [lower, legend]
    return stack_parts(parts, frame_header(title, notes, inner), margin, gap)


def frame_header(title: str, notes: Sequence[str], width: int) -> Image.Image | None:
    """Title and notes, one line each; None without either."""
    size = width // 76
    lines = [(title, font(size, bold=True), INK)] if title else []
    lines += [("  |  ".join(notes), font(round(size * 0.72)), (95, 98, 108))] if notes else []
    if not lines:
        return None
    image = Image.new("RGB", (width, round(size * 1.45 * len(lines))), PAPER)
    draw = ImageDraw.Draw(image)
    for n, (text, face, color) in enumerate(lines):
        draw.text((0, n * size * 1.45), fit_text(text, face, width), fill=color, font=face)
    return image


def stack_parts(parts: list[Image.Image], header: Image.Image | None, margin: int, gap: int) -> Image.Image:
    """Parts of equal width below each other, with a margin around and gaps between."""
    parts = [header, *parts] if header is not None else parts
    height = sum(part.height for part in parts) + gap * (len(parts) - 1) + 2 * margin
    picture = Image.new("RGB", (parts[0].width + 2 * margin, height), PAPER)
    y = margin
    for part in parts:
        picture.paste(part, (margin, y))
        y += part.height + gap
    return picture
