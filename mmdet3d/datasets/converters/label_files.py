"""Where the label files of a sample lie, and what is in them.

``<root>/gts/<scene>/<token>/labels.npz`` (Occ3D) or ``<root>/openocc_v2/<scene>/<token>/labels.npz`` (OpenOcc) hold the
full resolution; ``labels_1_2.npz``, ``labels_1_4.npz`` and ``labels_1_8.npz`` beside them the coarse grids.
"""

import io
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmdet3d.datasets.infos import DataError
from mmdet3d.utils.files import atomic_write

LABEL_FILE = "labels.npz"
COARSE_ENTRIES = ("semantics", "flow")
"""Entries of a coarse file. Both hold the labels: readers of the OpenOcc variant open ``flow`` as well."""

LABEL_TREES = {"occ3d": "gts", "openocc": "openocc_v2"}
"""Folder of each label set; info files name the first."""


class ArrayHeader(NamedTuple):
    """Shape and dtype of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


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


def read_headers(path: str | Path) -> dict[str, ArrayHeader]:
    """Shape and dtype of every array in an ``.npz`` file, without reading the arrays.

    A file that was cut off is noticed: the directory of a zip file is at its end.

    Raises:
        DataError: the file cannot be read, or an entry is no array.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            headers = {}
            for name in archive.namelist():
                with archive.open(name) as file:
                    headers[name.removesuffix(".npy")] = _read_header(file)
            return headers
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable .npz file ({type(error).__name__}: {error})") from None


def _read_header(file: io.BufferedIOBase) -> ArrayHeader:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return ArrayHeader(shape, dtype)


def read_arrays(path: str | Path, *names: str) -> list[np.ndarray]:
    """The arrays called ``names`` of an ``.npz`` file.

    Raises:
        DataError: the file is missing or damaged, or has no such array; pickled objects are refused.
    """
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise DataError(f"{path}: expected an .npz file, found a single array")
        with content:
            if missing := sorted(set(names) - set(content.files)):
                raise DataError(f"{path}: no {missing}; found {sorted(content.files)}")
            return [content[name] for name in names]
    except FileNotFoundError:
        raise DataError(f"file not found: {path}") from None
    except DataError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: not a readable .npz file ({type(error).__name__}: {error})") from None


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
