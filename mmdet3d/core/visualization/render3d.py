"""The 3-D view: a perspective picture of the voxels, by casting rays.

Faces are lit by direction, corners are darkened by their neighbours (ambient occlusion at voxel corners after Lysenko,
2012), and voxel edges are drawn where voxels are large enough on the picture.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from mmdet3d.core.visualization.drawing import draw_arrow
from mmdet3d.core.visualization.grid import OccupancyGrid, flow_arrows
from mmdet3d.core.visualization.raycast import Hits, cast_rays, free_radius
from mmdet3d.datasets.labels import POINT_CLOUD_RANGE, LabelSet

# Light on faces that look along -x, +x, -y, +y, -z, +z: the sun stands high, behind and to the left of the car.
_LIGHT = np.array([[0.80, 0.66], [0.70, 0.86], [0.5, 1.0]], np.float32)
_SAMPLES = ((-0.36, -0.12), (0.28, -0.30), (0.08, 0.40))  # looked at besides the middle of a pixel
_PLATE = np.array([0.955, 0.96, 0.97], np.float32)
_PAPER = np.ones(3, np.float32)
# The ego car as boxes (low x, y, z, high x, y, z) in metres from the middle of the rear axle on the ground, and colour.
_CAR = (
    ((-1.0, -0.95, 0.3, 3.4, 0.95, 1.0), (0.16, 0.17, 0.20)),
    ((-0.7, -0.80, 1.0, 2.0, 0.80, 1.65), (0.24, 0.26, 0.30)),
)


@dataclass(frozen=True)
class View:
    """A pinhole camera that looks at a point of the ego frame.

    Attributes:
        eye: Position (x, y, z) in metres.
        target: Point in the middle of the picture, metres.
        field_of_view: Horizontal angle in degrees.
    """

    eye: tuple[float, float, float]
    target: tuple[float, float, float]
    field_of_view: float = 40.0

    @classmethod
    def behind(cls, grid: OccupancyGrid) -> "View":
        """From behind and above the car, so that the whole grid is in the picture."""
        size = grid.cell * grid.semantics.shape
        centre = grid.low + size / 2
        reach = max(size[0], size[1])
        eye = centre + np.array([-1.5, 0.0, 1.02]) * reach
        return cls(tuple(eye), tuple(centre + np.array([-0.05, 0.0, 0.0]) * reach))

    def axes(self) -> np.ndarray:
        """(3, 3) rows: right, up, forward, in the ego frame."""
        forward = np.subtract(self.target, self.eye)
        forward = forward / np.linalg.norm(forward)
        right = np.cross(forward, (0.0, 0.0, 1.0))
        if (norm := np.linalg.norm(right)) < 1e-6:  # straight down: forward (x) is up in the picture
            right, norm = np.array([0.0, -1.0, 0.0]), 1.0
        right /= norm
        return np.stack([right, np.cross(right, forward), forward])

    def rays(self, columns: np.ndarray, rows: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(R, 3) float32 directions in metres through pixel positions, one metre long along the optical axis."""
        scale = 2 * np.tan(np.radians(self.field_of_view) / 2) / size[0]
        right, up, forward = self.axes().astype(np.float32)
        u = ((columns - size[0] / 2) * scale).astype(np.float32)[:, None]
        v = ((size[1] / 2 - rows) * scale).astype(np.float32)[:, None]
        return forward + u * right + v * up

    def project(self, points: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Pixel positions (..., 2) and depths (...) of ego points (..., 3) in metres."""
        scale = 2 * np.tan(np.radians(self.field_of_view) / 2) / size[0]
        seen = (np.asarray(points) - self.eye) @ self.axes().T
        depth = np.maximum(seen[..., 2], 1e-6)
        pixels = np.stack([size[0] / 2 + seen[..., 0] / depth / scale, size[1] / 2 - seen[..., 1] / depth / scale], -1)
        return pixels, seen[..., 2]


@dataclass(frozen=True)
class _Scene:
    """A grid made ready for looking at."""

    grid: OccupancyGrid
    view: View
    size: tuple[int, int]
    radius: np.ndarray  # (X, Y, Z) of free_radius
    padded: np.ndarray  # (X+2, Y+2, Z+2) float32 occupancy
    palette: np.ndarray  # (256, 3) float32 0..1

    def look(self, columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Colours (R, 3) float32 0..1 of pixel positions, and (R,) int32 ids that change where a surface ends."""
        directions = self.view.rays(columns, rows, self.size)
        colors, distance = _ground_plate(self, directions)
        ids = np.where(np.isfinite(distance), -2, -1).astype(np.int32)
        hits = cast_rays(self.radius, self.grid.to_cells(self.view.eye), directions / self.grid.cell.astype(np.float32))
        seen = np.flatnonzero(hits.distance < np.inf)
        seen_hits = Hits(hits.distance[seen], hits.cell[seen], hits.axis[seen])
        colors[seen], ids[seen] = _shade(self, directions[seen], seen_hits)
        distance[seen] = seen_hits.distance
        for number, (box, color) in enumerate(_CAR):
            near = self._near_box(box, columns, rows)
            part = [array[near] for array in (colors, distance, ids)]
            _add_box(self, directions[near], box, color, *part, -10 * (number + 1))
            colors[near], distance[near], ids[near] = part
        return colors, ids

    def _near_box(self, box: tuple[float, ...], columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Positions whose pixel is within the picture's rectangle around a box."""
        corners = np.array([(box[i], box[j], box[k]) for i in (0, 3) for j in (1, 4) for k in (2, 5)])
        pixels, depth = self.view.project(corners, self.size)
        if depth.min() <= 0:
            return np.arange(len(columns))
        low, high = pixels.min(0) - 1, pixels.max(0) + 1
        return np.flatnonzero((columns >= low[0]) & (columns <= high[0]) & (rows >= low[1]) & (rows <= high[1]))


def _box_entry(eye: np.ndarray, directions: np.ndarray, low: np.ndarray, high: np.ndarray):
    """(R,) distance (infinite without a hit) and axis at which rays enter a box that does not hold the eye."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = 1 / directions
        near, far = (low - eye).astype(np.float32) * inverse, (high - eye).astype(np.float32) * inverse
    enters = np.minimum(near, far)
    axis = enters.argmax(1)
    t = enters.max(1)
    return np.where((np.maximum(near, far).min(1) >= t) & (t > 0), t, np.inf).astype(np.float32), axis


def _ground_plate(scene: _Scene, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Colours and distances of the pale plate below the grid, with lines every ten metres."""
    grid, eye = scene.grid, np.asarray(scene.view.eye)
    high = grid.low + grid.cell * grid.semantics.shape
    colors = np.tile(_PAPER, (len(directions), 1))
    distance = np.full(len(directions), np.inf, np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = ((grid.low[2] - eye[2]) / directions[:, 2]).astype(np.float32)
        x, y = eye[0] + t * directions[:, 0], eye[1] + t * directions[:, 1]
        on = (t > 0) & (x >= grid.low[0]) & (x <= high[0]) & (y >= grid.low[1]) & (y <= high[1])
    colors[on] = _PLATE
    line = np.minimum(np.abs(x[on] / 10 - np.rint(x[on] / 10)), np.abs(y[on] / 10 - np.rint(y[on] / 10))) < 0.008
    colors[np.flatnonzero(on)[line]] = _PLATE * 0.93
    distance[on] = t[on]
    return colors, distance


def _add_box(scene: _Scene, directions: np.ndarray, box: tuple[float, ...], color: tuple[float, ...],
             colors: np.ndarray, distance: np.ndarray, ids: np.ndarray, number: int) -> None:
    """Draw a box of the ego car into the picture so far, where it is nearer."""
    t, axis = _box_entry(np.asarray(scene.view.eye), directions, np.array(box[:3]), np.array(box[3:]))
    nearer = np.flatnonzero(t < distance)
    side = (directions[nearer, axis[nearer]] < 0).astype(int)
    colors[nearer] = np.array(color, np.float32) * _LIGHT[axis[nearer], side][:, None]
    distance[nearer], ids[nearer] = t[nearer], number - axis[nearer]


def _shade(scene: _Scene, directions: np.ndarray, hits: Hits) -> tuple[np.ndarray, np.ndarray]:
    """Colours and surface ids of voxel hits."""
    grid = scene.grid
    index = tuple(hits.cell.T)
    label = grid.semantics[index]
    axis = hits.axis.astype(np.int64)
    rows = np.arange(len(axis))
    towards = np.where(directions[rows, axis] < 0, 1, -1)  # the face's normal along its axis
    eye = grid.to_cells(scene.view.eye).astype(np.float32)
    across = ((axis + 1) % 3, (axis + 2) % 3)
    rates = directions / grid.cell.astype(np.float32)
    place = [np.clip(eye[a] + hits.distance * rates[rows, a] - hits.cell[rows, a], 0, 1) for a in across]
    light = _LIGHT[axis, (towards > 0).astype(int)] * _ambient(scene, hits.cell, axis, towards, across, place)
    light *= 0.96 + 0.04 * (hits.cell[:, 2] + 1) / grid.semantics.shape[2]
    pixel = 2 * np.tan(np.radians(scene.view.field_of_view) / 2) / scene.size[0] / grid.cell.min()
    light *= _edges(hits.distance * np.float32(pixel), place)
    plane = hits.cell[rows, axis] * 2 + (towards > 0)
    ids = (label.astype(np.int32) * 3 + axis) * 4096 + plane
    return scene.palette[label] * light[:, None].astype(np.float32), ids.astype(np.int32)


def _ambient(scene: _Scene, cell: np.ndarray, axis: np.ndarray, towards: np.ndarray,
             across: tuple[np.ndarray, np.ndarray], place: list[np.ndarray]) -> np.ndarray:
    """Light left by the eight voxels that touch the air before a face, interpolated between the face's corners."""
    strides = np.array(scene.padded.strides) // scene.padded.itemsize
    flat = scene.padded.ravel()
    before = (cell + 1) @ strides + strides[axis] * towards
    step = (strides[across[0]], strides[across[1]])
    edge = {(i, j): flat[before + i * step[0] + j * step[1]] for i, j in ((-1, 0), (1, 0), (0, -1), (0, 1))}
    total = np.zeros(len(cell), np.float32)
    for i in (-1, 1):
        for j in (-1, 1):
            sides = edge[i, 0] + edge[0, j]
            corner = flat[before + i * step[0] + j * step[1]]
            shadow = np.where(sides == 2, 3, sides + corner)
            weight = (place[0] if i > 0 else 1 - place[0]) * (place[1] if j > 0 else 1 - place[1])
            total += weight * (1 - 0.13 * shadow)
    return total


def _edges(footprint: np.ndarray, place: list[np.ndarray]) -> np.ndarray:
    """Light left by dark voxel edges of about a pixel; they fade where voxels are only a few pixels wide."""
    border = np.minimum(np.minimum(place[0], 1 - place[0]), np.minimum(place[1], 1 - place[1]))
    strength = np.clip((0.32 - footprint) / 0.25, 0, 1) * 0.30
    return 1 - strength * np.clip(1.4 - border / np.maximum(footprint * 0.6, 0.03), 0, 1)


def _boundaries(ids: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels beside which another surface begins."""
    found = np.zeros(ids.shape, bool)
    for a, b in (((slice(1, None),), (slice(None, -1),)),
                 ((slice(None), slice(1, None)), (slice(None), slice(None, -1)))):
        differs = ids[a] != ids[b]
        found[a] |= differs
        found[b] |= differs
    return found


def _trace(scene: _Scene, antialias: bool) -> np.ndarray:
    """(H, W, 3) float32 colours. Only pixels where a surface ends are looked at more than once."""
    width, height = scene.size
    rows, columns = (axis.ravel() for axis in np.mgrid[0:height, 0:width])
    colors, ids = scene.look(columns + 0.5, rows + 0.5)
    if antialias:
        again = np.flatnonzero(_boundaries(ids.reshape(height, width)).ravel())
        total = colors[again]
        for dx, dy in _SAMPLES:
            total += scene.look(columns[again] + 0.5 + dx, rows[again] + 0.5 + dy)[0]
        colors[again] = total / (1 + len(_SAMPLES))
    return colors.reshape(height, width, 3)


def _draw_arrows(image: Image.Image, view: View, arrows: np.ndarray) -> None:
    """Draw motion arrows, far ones first."""
    if not len(arrows):
        return
    smooth = 2
    starts = arrows[:, :3] + (0, 0, 0.3)
    ends = starts + np.concatenate([arrows[:, 3:], np.zeros((len(arrows), 1))], axis=1)
    size = (image.width * smooth, image.height * smooth)
    (first, depth), (last, end_depth) = view.project(starts, size), view.project(ends, size)
    overlay = image.resize(size, Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(overlay)
    for n in np.argsort(-depth):
        if min(depth[n], end_depth[n]) > 1:
            draw_arrow(draw, first[n], last[n], width=max(1.0, image.width / 500) * smooth)
    image.paste(overlay.resize(image.size, Image.Resampling.BOX))


def render_3d(semantics: np.ndarray, flow: np.ndarray | None = None, *, label_set: LabelSet,
              point_cloud_range: tuple[float, ...] = POINT_CLOUD_RANGE, size: tuple[int, int] = (1240, 700),
              view: View | None = None, antialias: bool = True) -> Image.Image:
    """Perspective view of the occupied voxels.

    Args:
        semantics: (X, Y, Z) labels.
        flow: (X, Y, Z, 2) velocity along x and y in m/s; adds arrows as long as the way of one second.
        label_set: What the labels mean.
        point_cloud_range: Bounds of the grid in the ego frame, metres.
        size: (width, height) in pixels.
        view: Where to look from. Default: from behind and above, with the whole grid in the picture.
        antialias: Smooth the outlines.

    Returns:
        RGB image.

    Raises:
        ValueError: arrays that do not fit, or unknown labels.
    """
    grid = OccupancyGrid.make(semantics, label_set, point_cloud_range)
    view = View.behind(grid) if view is None else view
    scene = _Scene(grid, view, size, free_radius(grid.occupied), np.pad(grid.occupied, 1).astype(np.float32),
                   label_set.palette.astype(np.float32) / 255)
    colors = _trace(scene, antialias)
    image = Image.fromarray((np.clip(colors, 0, 1) * 255).round().astype(np.uint8))
    _draw_arrows(image, view, flow_arrows(grid, flow, label_set))
    return image
