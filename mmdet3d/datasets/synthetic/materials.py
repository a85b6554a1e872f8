"""What the still part of a world is made of: one byte per voxel."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from mmdet3d.datasets.labels import LabelSet


class Material(IntEnum):
    """Content of a voxel. The value 0 is air; ``WALL`` runs along the street, ``GABLE`` across it."""

    AIR = 0
    ROAD = 1
    SIDEWALK = 2
    TERRAIN = 3
    PAVED = 4
    WALL = 5
    ROOF = 6
    METAL = 7
    FENCE = 8
    TRUNK = 9
    LEAVES = 10
    HEDGE = 11
    GABLE = 12


CLASS_OF_MATERIAL = {
    Material.AIR: "free", Material.ROAD: "driveable_surface", Material.SIDEWALK: "sidewalk",
    Material.TERRAIN: "terrain", Material.PAVED: "other_flat", Material.WALL: "manmade", Material.ROOF: "manmade",
    Material.METAL: "manmade", Material.FENCE: "manmade", Material.TRUNK: "vegetation",
    Material.LEAVES: "vegetation", Material.HEDGE: "vegetation", Material.GABLE: "manmade",
}
"""Class name of every material."""

LAST_GROUND = Material.PAVED
"""Materials 1 to this one lie on the ground."""


def material_labels(labels: LabelSet) -> np.ndarray:
    """(number of materials,) uint8 label value of every material in a label set."""
    return np.array([labels.classes.index(CLASS_OF_MATERIAL[m]) for m in Material], np.uint8)
