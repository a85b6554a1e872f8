"""Label sets: tables of the releases, derived indices, colours that colour-blind readers can tell apart."""

import dataclasses
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmdet3d.datasets.labels import CAMERAS, FLOW_CLASS_NAMES, OCC3D, OPENOCC, label_set, label_set_for

# Simulation of complete deuteranopia and protanopia on linear RGB (Machado et al., 2009).
VISIONS = {
    "normal": np.eye(3),
    "deuteranopia": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                              [-0.011820, 0.042940, 0.968881]]),
    "protanopia": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                            [-0.003882, -0.048116, 1.051998]]),
}
XYZ_FROM_RGB = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(rgb, vision):
    c = np.asarray(rgb) / 255.0
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = XYZ_FROM_RGB @ np.clip(VISIONS[vision] @ linear, 0, 1) / (0.9505, 1.0, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_tables_of_the_releases():
    assert (OPENOCC.num_classes, OPENOCC.free_index, OPENOCC.flow_classes) == (17, 16, tuple(range(8)))
    assert (OCC3D.num_classes, OCC3D.free_index, OCC3D.flow_classes) == (18, 17, (2, 3, 4, 5, 6, 7, 9, 10))
    assert OPENOCC.classes[:4] == ("car", "truck", "trailer", "bus") and OPENOCC.classes[10] == "driveable_surface"
    assert OCC3D.classes[:5] == ("others", "barrier", "bicycle", "bus", "car") and OCC3D.classes[16] == "vegetation"


def test_both_sets_name_and_colour_the_same_things():
    assert set(OCC3D.classes) - set(OPENOCC.classes) == {"others"}
    for labels in (OPENOCC, OCC3D):
        assert {labels.classes[i] for i in labels.flow_classes} == set(FLOW_CLASS_NAMES)
        assert len(labels.colors) == len(set(labels.colors)) == labels.num_classes
    for name in OPENOCC.classes:
        assert OPENOCC.colors[OPENOCC.classes.index(name)] == OCC3D.colors[OCC3D.classes.index(name)]


@pytest.mark.parametrize("vision, distance", [("normal", 30), ("deuteranopia", 15), ("protanopia", 15)])
def test_colours_stay_apart(vision, distance):
    seen = {name: lab(color, vision) for name, color in zip(OCC3D.classes, OCC3D.colors, strict=True)}
    nearest = min(itertools.combinations(seen, 2), key=lambda pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]))
    assert np.linalg.norm(seen[nearest[0]] - seen[nearest[1]]) > distance, nearest


def test_tables_by_label_value():
    assert OPENOCC.palette.shape == (256, 3) and OPENOCC.palette.dtype == np.uint8
    assert tuple(OPENOCC.palette[7]) == OPENOCC.colors[7]
    assert tuple(OPENOCC.palette[255]) == OPENOCC.colors[OPENOCC.free_index]
    assert np.flatnonzero(OCC3D.flow_mask).tolist() == list(OCC3D.flow_classes)


def test_look_up_and_its_errors():
    assert label_set("openocc") is OPENOCC and label_set_for(18) is OCC3D
    with pytest.raises(ValueError, match="dataset_name: 'occ4d'.*'occ3d', 'openocc'"):
        label_set("occ4d")
    with pytest.raises(ValueError, match="num_classes: no label set has 12 labels"):
        label_set_for(12)
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPENOCC.free_index = 0


def test_camera_order():
    assert [name.removeprefix("CAM_") for name in CAMERAS] == [
        "FRONT_LEFT", "FRONT", "FRONT_RIGHT", "BACK_LEFT", "BACK", "BACK_RIGHT"]


@pytest.mark.parametrize("module", ["mmdet3d.datasets.labels", "mmdet3d.datasets.infos",
                                    "mmdet3d.core.visualization.occupancy"])
def test_imports_without_a_framework(module):
    code = f"import sys, {module}; sys.exit(' '.join({{'mmcv', 'mmdet', 'torch'}} & set(sys.modules)) or 0)"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
