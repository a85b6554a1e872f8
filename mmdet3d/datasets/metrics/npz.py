"""Reading ``.npz`` files that nobody vouches for."""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdet3d.datasets.infos import DataError


def read_arrays(path: Path, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Those arrays of an ``.npz`` file that are ``wanted`` and there.

    Raises:
        DataError: the file is missing, damaged, or holds objects instead of arrays.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            return {name: archive[name] for name in wanted if name in archive.files}
    except FileNotFoundError:
        raise DataError(f"file not found: {path}") from None
    except (OSError, ValueError, KeyError, EOFError, AttributeError, TypeError, MemoryError, SyntaxError, RuntimeError,
            OverflowError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or no .npz file of arrays ({type(error).__name__}: {error})") from None
