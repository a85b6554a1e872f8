"""Where the label files of a sample lie, and what is in them.

``<root>/gts/<scene>/<token>/labels.npz`` (Occ3D) or ``<root>/openocc_v2/<scene>/<token>/labels.npz`` (OpenOcc) hold the
full resolution; ``labels_1_2.npz``, ``labels_1_4.npz`` and ``labels_1_8.npz`` beside them the coarse grids.
"""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mmdet3d.utils.files import atomic_write

LABEL_FILE = "labels.npz"
COARSE_ENTRIES = ("semantics", "flow")
"""Entries of a coarse file. Both hold the labels: readers of the OpenOcc variant open ``flow`` as well."""

LABEL_TREES = {"occ3d": "gts", "openocc": "openocc_v2"}
"""Folder of each label set; info files name the first."""


def label_folder(occ_path: str, dataset_name: str) -> str:
    """Folder with the labels of a sample.

    Args:
        occ_path: ``<root>/gts/<scene>/<token>`` of an info record.
        dataset_name: ``occ3d`` or ``openocc``; for the latter the last component ``gts`` above the scene becomes
            ``openocc_v2``. A path without that component stays as it is.

    Raises:
        ValueError: ``dataset_name`` is unknown.
    """
    if dataset_name not in LABEL_TREES:
        raise ValueError(f"dataset_name: expected one of {sorted(LABEL_TREES)}, got {dataset_name!r}")
    parts = str(occ_path).replace("\\", "/").split("/")
    for position in range(len(parts) - 3, -1, -1):
        if parts[position] == LABEL_TREES["occ3d"]:
            parts[position] = LABEL_TREES[dataset_name]
            break
    return "/".join(parts)


def coarse_name(factor: int) -> str:
    """File name of the grid at ``1 / factor`` of the resolution."""
    return f"labels_1_{factor}.npz"


def write_coarse_labels(folder: str | Path, grids: Mapping[int, np.ndarray]) -> None:
    """Write one file per down-sampling factor, each whole or not at all.

    The format is that of ``np.savez_compressed``, with the same bytes for the same grid. It compresses less hard:
    at NumPy's setting compressing would take most of the time of making the files, to save 2 KB a sample.
    """
    for factor, grid in grids.items():
        content = io.BytesIO()
        np.lib.format.write_array(content, np.ascontiguousarray(grid), allow_pickle=False)
        with atomic_write(Path(folder) / coarse_name(factor)) as file, zipfile.ZipFile(file, "w") as archive:
            for name in COARSE_ENTRIES:
                entry = zipfile.ZipInfo(f"{name}.npy")  # without a date
                archive.writestr(entry, content.getbuffer(), zipfile.ZIP_DEFLATED, compresslevel=4)
