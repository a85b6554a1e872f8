"""Small drawing helpers shared by the pictures: fonts, arrows, labels, class legend, safe saving."""

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mmdet3d.datasets.labels import LabelSet
from mmdet3d.utils.files import atomic_write

INK = (30, 32, 38)
PAPER = (255, 255, 255)


@lru_cache(maxsize=32)
def font(size: int, bold: bool = False) -> ImageFont.ImageFont:
    """A sans-serif font of ``size`` pixels: the one that comes with matplotlib, else Pillow's own."""
    spec = find_spec("matplotlib")
    if spec is not None and spec.origin:
        name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
        path = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / name
        if path.is_file():
            return ImageFont.truetype(str(path), size)
    return ImageFont.load_default()


def text_width(text: str, face: ImageFont.ImageFont) -> int:
    """Width of a line of text in pixels."""
    left, _, right, _ = face.getbbox(text)
    return int(right - left)


def fit_text(text: str, face: ImageFont.ImageFont, width: int) -> str:
    """``text``, cut with an ellipsis so that it is at most ``width`` pixels wide."""
    if text_width(text, face) <= width:
        return text
    while text and text_width(text + "...", face) > width:
        text = text[:-1]
    return text + "..."


def draw_arrow(draw: ImageDraw.ImageDraw, start: Sequence[float], end: Sequence[float], width: float = 2.0,
               color: tuple[int, int, int] = INK, halo: tuple[int, int, int] = PAPER) -> None:
    """Arrow between two pixel positions, with a halo so that it can be seen on every colour; very short: none."""
    start, end = np.asarray(start, float), np.asarray(end, float)
    length = np.linalg.norm(end - start)
    if not np.isfinite(length) or length < 3 * width:
        return
    along = (end - start) / length
    across = np.array([-along[1], along[0]])
    head = min(5.0 * width, 0.6 * length)
    neck = end - along * head
    for grow, fill in ((1.6, halo), (0.0, color)):
        line = [tuple(start - along * grow), tuple(neck)]
        draw.line(line, fill=fill, width=max(1, round(width + 2 * grow)))
        side = across * (head * 0.5 + grow)
        draw.polygon([tuple(end + along * grow * 1.8), tuple(neck + side - along * grow),
                      tuple(neck - side - along * grow)], fill=fill)


def draw_tag(image: Image.Image, text: str, size: int = 15) -> None:
    """Write a label into the upper left corner of an RGB image, on a dark ground."""
    draw = ImageDraw.Draw(image, "RGBA")
    face = font(size)
    draw.rectangle((0, 0, text_width(text, face) + size, round(size * 1.55)), fill=(20, 22, 28, 190))
    draw.text((size / 2, size * 0.2), text, fill=(255, 255, 255), font=face)


def draw_legend(labels: LabelSet, width: int, present: Sequence[int] | None = None, size: int = 15) -> Image.Image:
    """Class legend: one colour patch and name per class except free space, in rows of equal columns.

    Args:
        labels: The label set.
        width: Width in pixels.
        present: Labels in the picture; the others are shown faintly. Default: all.
        size: Height of the letters in pixels.
    """
    shown = [i for i in range(labels.num_classes) if i != labels.free_index]
    face = font(size)
    column = max(text_width(labels.classes[i].replace("_", " "), face) for i in shown) + 3 * size
    columns = max(1, min(len(shown), width // column))
    columns = -(-len(shown) // -(-len(shown) // columns))  # rows of equal length
    rows = -(-len(shown) // columns)
    image = Image.new("RGB", (width, round(rows * size * 1.75)), PAPER)
    draw = ImageDraw.Draw(image)
    for n, label in enumerate(shown):
        row, col = divmod(n, columns)
        x, y = col * width // columns, row * size * 1.75 + size * 0.3
        faint = present is not None and label not in present
        color = tuple(labels.colors[label])
        patch = tuple(round(255 - (255 - v) * 0.3) for v in color) if faint else color
        draw.rounded_rectangle((x, y, x + size * 1.3, y + size * 1.1), radius=size * 0.25, fill=patch,
                               outline=(150, 150, 155))
        draw.text((x + size * 1.7, y - size * 0.05), labels.classes[label].replace("_", " "),
                  fill=(165, 168, 175) if faint else INK, font=face)
    return image


def save_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """Write a PNG under a temporary name and rename it, so that no half-written picture is ever seen."""
    return save_image(image, path, "PNG")


def save_image(image: Image.Image, path: str | os.PathLike, kind: str, **options) -> Path:
    """Write an image of a format of Pillow (``PNG``, ``JPEG``, ``GIF``) with its options, whole or not at all."""
    path = Path(path)
    with atomic_write(path) as file:
        image.save(file, format=kind, **options)
    return path
