"""Reading ``.npz`` files that nobody vouches for: labels, predictions, caches."""

from __future__ import annotations

import contextlib
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mmdet3d.datasets.infos import DataError

# what damaged bytes make NumPy and zipfile raise
_DAMAGE = (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, MemoryError, SyntaxError, RuntimeError,
           OverflowError, NotImplementedError, zipfile.BadZipFile, zlib.error)


class ArrayHeader(NamedTuple):
    """Shape and dtype of an array in a file."""

    shape: tuple[int, ...]
    dtype: np.dtype


def read_arrays(path: str | os.PathLike, *names: str, optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The arrays called ``names`` of an ``.npz`` file, and those of ``optional`` that are there.

    Raises:
        DataError: the file is missing or damaged, lacks one of ``names``, or holds objects instead of arrays.
    """
    with _damage_refused(path):
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            raise ValueError("found a single array")
        with content:
            found = content.files
            arrays = {name: content[name] for name in (*names, *optional) if name in found}
    if missing := sorted(set(names) - set(arrays)):
        raise DataError(f"{path}: no {missing}; found {sorted(found)}")
    return arrays


def read_headers(path: str | os.PathLike) -> dict[str, ArrayHeader]:
    """Shape and dtype of every array in an ``.npz`` file, without reading the arrays.

    A file that was cut off is noticed: the directory of a zip file is at its end.

    Raises:
        DataError: the file cannot be read, or an entry is no array.
    """
    headers = {}
    with _damage_refused(path), zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            with archive.open(name) as file:
                old = np.lib.format.read_magic(file) == (1, 0)
                read = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
                shape, _, dtype = read(file)
                headers[name.removesuffix(".npy")] = ArrayHeader(shape, dtype)
    return headers


@contextlib.contextmanager
def _damage_refused(path: str | os.PathLike) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"file not found: {path}") from None
    except _DAMAGE as error:
        raise DataError(f"{path}: not a readable .npz file of arrays; it is damaged or no .npz file "
                        f"({type(error).__name__}: {error})") from None
