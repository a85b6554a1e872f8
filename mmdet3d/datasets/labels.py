"""Class names, free labels, flow classes, colours and the camera order: the one place that holds them.

The label values of both data sets follow their releases: Occ3D-nuScenes (Tian et al., NeurIPS 2023) and OpenOcc
(Tong et al., "Scene as Occupancy", ICCV 2023). Nothing here needs a framework, so that viewers and metrics can import
this module alone.
"""

from dataclasses import dataclass

import numpy as np

CAMERAS = (
    "CAM_FRONT_LEFT",
    "CAM_FRONT",
    "CAM_FRONT_RIGHT",
    "CAM_BACK_LEFT",
    "CAM_BACK",
    "CAM_BACK_RIGHT",
)
"""Order of every camera axis. Info files store cameras in another order: always look them up by name."""

IGNORE_LABEL = 255
"""Label of voxels that have no ground truth."""

GRID_SIZE = (200, 200, 16)
"""Voxels (X, Y, Z) of the labels as released, 0.4 m a side."""

POINT_CLOUD_RANGE = (-40.0, -40.0, -1.0, 40.0, 40.0, 5.4)
"""Bounds of the labels as released: x, y, z low, then high, in metres in the ego frame."""

FLOW_CLASS_NAMES = (
    "car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle", "pedestrian",
)
"""Classes that can move: the only ones whose flow is predicted and scored."""

# RGB. Hues follow the habits of the field (blue cars, red pedestrians, purple ground, green plants); the
# distances between all pairs were evened out for normal, deuteranopic and protanopic vision (Machado et al., 2009).
_COLORS = {
    "others": (20, 20, 20),
    "car": (20, 117, 249),
    "truck": (64, 18, 169),
    "trailer": (97, 38, 0),
    "bus": (255, 234, 17),
    "construction_vehicle": (20, 204, 206),
    "bicycle": (255, 110, 171),
    "motorcycle": (255, 124, 0),
    "pedestrian": (249, 8, 62),
    "traffic_cone": (255, 255, 174),
    "barrier": (246, 152, 134),
    "driveable_surface": (172, 92, 185),
    "other_flat": (106, 112, 112),
    "sidewalk": (64, 24, 86),
    "terrain": (150, 227, 95),
    "manmade": (178, 182, 250),
    "vegetation": (0, 141, 65),
    "free": (255, 255, 255),
}


@dataclass(frozen=True)
class LabelSet:
    """What the label values of one data set mean.

    Attributes:
        name: Name of the data set as configs write it in ``dataset_name``.
        classes: Class names; the position is the label value. Free space is one of them.
        free_index: Label of free space.
        flow_classes: Labels of the classes that can move, ascending.
        colors: One (red, green, blue) per label, 0..255.
    """

    name: str
    classes: tuple[str, ...]
    free_index: int
    flow_classes: tuple[int, ...]
    colors: tuple[tuple[int, int, int], ...]

    @property
    def num_classes(self) -> int:
        """Number of labels K, free space included."""
        return len(self.classes)

    @property
    def palette(self) -> np.ndarray:
        """(256, 3) uint8 RGB by label value. Values without a class, 255 among them, are the colour of free space."""
        table = np.empty((256, 3), np.uint8)
        table[:] = self.colors[self.free_index]
        table[: self.num_classes] = self.colors
        return table

    @property
    def flow_mask(self) -> np.ndarray:
        """(256,) bool by label value: whether the class can move."""
        mask = np.zeros(256, bool)
        mask[list(self.flow_classes)] = True
        return mask


def _make(name: str, classes: tuple[str, ...]) -> LabelSet:
    return LabelSet(
        name=name,
        classes=classes,
        free_index=classes.index("free"),
        flow_classes=tuple(i for i, c in enumerate(classes) if c in FLOW_CLASS_NAMES),
        colors=tuple(_COLORS[c] for c in classes),
    )


OPENOCC = _make("openocc", (
    "car", "truck", "trailer", "bus", "construction_vehicle", "bicycle", "motorcycle", "pedestrian",
    "traffic_cone", "barrier", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade", "vegetation",
    "free",
))
"""OpenOcc v2: 17 labels with flow, free = 16."""

OCC3D = _make("occ3d", (
    "others", "barrier", "bicycle", "bus", "car", "construction_vehicle", "motorcycle", "pedestrian",
    "traffic_cone", "trailer", "truck", "driveable_surface", "other_flat", "sidewalk", "terrain", "manmade",
    "vegetation", "free",
))
"""Occ3D-nuScenes: 18 labels without flow, free = 17."""

LABEL_SETS = {labels.name: labels for labels in (OPENOCC, OCC3D)}
"""Every known label set by name."""


def label_set(name: str) -> LabelSet:
    """The label set called ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in LABEL_SETS:
        raise ValueError(f"dataset_name: {name!r} is not a known label set; known: {sorted(LABEL_SETS)}")
    return LABEL_SETS[name]


def label_set_for(num_classes: int) -> LabelSet:
    """The label set that has ``num_classes`` labels, free space included.

    Raises:
        ValueError: none has that many.
    """
    for labels in LABEL_SETS.values():
        if labels.num_classes == num_classes:
            return labels
    known = {labels.name: labels.num_classes for labels in LABEL_SETS.values()}
    raise ValueError(f"num_classes: no label set has {num_classes} labels; known: {known}")
