"""A prediction beside the ground truth: cameras, both in 3-D and from above, and where they differ."""

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mmdet3d.core.visualization.bev import EMPTY, render_bev
from mmdet3d.core.visualization.drawing import INK, PAPER, draw_legend, draw_tag, font, text_width
from mmdet3d.core.visualization.occupancy import as_images, camera_panel, frame_header, stack_parts
from mmdet3d.core.visualization.render3d import render_3d
from mmdet3d.datasets.labels import IGNORE_LABEL, POINT_CLOUD_RANGE, LabelSet

VERDICTS = {"right class": (120, 190, 130), "other class": (246, 170, 60), "missed": (205, 40, 60),
            "invented": (50, 100, 215)}
"""Colours of what became of a voxel that is occupied in truth or prediction; voxels without truth are left out."""


def verdicts(truth: np.ndarray, prediction: np.ndarray, labels: LabelSet) -> np.ndarray:
    """(X, Y) int: number of the commonest of :data:`VERDICTS` in every column, of equals the last; -1 for empty ones.

    Args:
        truth: (X, Y, Z) labels; 255 is left out.
        prediction: (X, Y, Z) labels.
        labels: Label set.

    Raises:
        ValueError: the shapes differ.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"prediction: expected shape {truth.shape} as the ground truth has it, got {prediction.shape}")
    known = truth != IGNORE_LABEL
    filled = known & (truth != labels.free_index)
    claimed = known & (prediction != labels.free_index) & (prediction != IGNORE_LABEL)
    both, same = filled & claimed, truth == prediction
    counts = np.stack([part.sum(2) for part in (both & same, both & ~same, filled & ~claimed, claimed & ~filled)], -1)
    last = counts.shape[-1] - 1
    return np.where(counts.any(-1), last - counts[..., ::-1].argmax(-1), -1)


def render_verdicts(truth: np.ndarray, prediction: np.ndarray, labels: LabelSet, size: int) -> Image.Image:
    """Picture of :func:`verdicts` from above, forward up, with a legend; ``size`` is the longer side in pixels."""
    colors = np.array([*VERDICTS.values(), EMPTY], np.uint8)[verdicts(truth, prediction, labels)]
    image = Image.fromarray(np.ascontiguousarray(colors[::-1, ::-1]))
    scale = size / max(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.NEAREST)
    draw, letters = ImageDraw.Draw(image), max(9, size // 40)
    face, line = font(letters), round(letters * 1.5)
    width = max(text_width(name, face) for name in VERDICTS) + 3 * letters
    y = image.height - line * len(VERDICTS) - letters
    draw.rectangle((0, y - letters // 2, width, image.height), fill=PAPER)
    for name, color in VERDICTS.items():
        draw.rectangle((letters // 2, y + letters * 0.2, letters * 1.5, y + letters * 1.2), fill=color)
        draw.text((letters * 2, y), name, fill=INK, font=face)
        y += line
    return image


def compose_comparison(images: Mapping[str, Image.Image] | Sequence[Image.Image],
                       truth: tuple[np.ndarray, np.ndarray | None], prediction: tuple[np.ndarray, np.ndarray | None],
                       label_set: LabelSet, title: str = "", notes: Sequence[str] = (), *,
                       point_cloud_range: tuple[float, ...] = POINT_CLOUD_RANGE, width: int = 1920) -> Image.Image:
    """Cameras; ground truth and prediction in 3-D, and from above with what differs; class legend.

    Args:
        images: Camera images as for :func:`~mmdet3d.core.visualization.occupancy.compose_frame`.
        truth: (X, Y, Z) labels, and (X, Y, Z, 2) velocity in m/s or None.
        prediction: The same of the prediction.
        label_set: What the labels mean.
        title: First line, in bold.
        notes: Further remarks, on a line below.
        point_cloud_range: Bounds of the grid in the ego frame, metres.
        width: Width of the picture in pixels; everything else follows.

    Returns:
        RGB image.

    Raises:
        ValueError: arrays that do not fit, unknown labels or cameras.
    """
    images = as_images(images)
    margin, gap = width // 80, max(4, width // 240)
    inner, letters = width - 2 * margin, max(9, width // 128)
    half, third = (inner - gap) // 2, (inner - 2 * gap) // 3
    spaces, plans = [], []
    for name, (semantics, flow) in (("ground truth", truth), ("prediction", prediction)):
        space = render_3d(semantics, flow, label_set=label_set, point_cloud_range=point_cloud_range,
                          size=(half, round(half * 0.55)))
        plan = render_bev(semantics, label_set, flow, point_cloud_range=point_cloud_range,
                          pixels_per_voxel=max(1, -(-third // max(semantics.shape[:2]))))
        plan.thumbnail((third, third), Image.Resampling.LANCZOS)
        for picture in (space, plan):
            draw_tag(picture, name, letters)
        spaces.append(space)
        plans.append(plan)
    plans.append(render_verdicts(truth[0], prediction[0], label_set, third))
    draw_tag(plans[-1], "commonest in each column", letters)
    present = np.union1d(truth[0], prediction[0]).tolist()
    parts = [camera_panel(images, inner, gap)] if images else []
    parts += [_row(spaces, inner), _row(plans, inner), draw_legend(label_set, inner, present, max(9, width // 116))]
    return stack_parts(parts, frame_header(title, notes, inner), margin, gap)


def _row(pictures: Sequence[Image.Image], width: int) -> Image.Image:
    """Pictures side by side, spread over ``width``."""
    row = Image.new("RGB", (width, max(picture.height for picture in pictures)), PAPER)
    spare = (width - sum(picture.width for picture in pictures)) / max(1, len(pictures) - 1)
    x = 0.0
    for picture in pictures:
        row.paste(picture, (round(x), 0))
        x += picture.width + spare
    return row
