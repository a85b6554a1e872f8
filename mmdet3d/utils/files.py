"""Files that are either there as a whole or not at all, and the format of predictions."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, sync: bool = False) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` once everything is written, and not at all after an error.

    The data goes to a temporary file in the same folder, which is renamed at the end. Missing folders are made.

    Args:
        path: The file.
        sync: Force the data to the disk before the file is renamed.

    Raises:
        OSError: the file cannot be written; what was under ``path`` is unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, content: Any, allow_nan: bool = True) -> None:
    """Write ``content`` as indented JSON, whole or not at all.

    Raises:
        ValueError: ``content`` holds NaN or infinity, which JSON does not know, and ``allow_nan`` is False.
    """
    with atomic_write(path) as file:
        file.write((json.dumps(content, indent=2, allow_nan=allow_nan) + "\n").encode())


def without_nan(value: Any) -> Any:
    """``value`` with None for numbers that are not finite, which JSON does not know."""
    if isinstance(value, Mapping):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def prediction_path(folder: str | os.PathLike, scene: str, token: str) -> Path:
    """``<folder>/<scene>/<token>.npz``.

    Raises:
        ValueError: a name could lead elsewhere; info files may be anybody's.
    """
    for kind, name in (("scene", scene), ("token", token)):
        if not re.fullmatch(r"[\w.\-]+", name) or set(name) == {"."}:
            raise ValueError(f"the {kind} name {name!r} of the info file cannot be used as a file name")
    return Path(folder) / scene / f"{token}.npz"


def save_prediction(path: str | os.PathLike, semantics: np.ndarray, flow: np.ndarray) -> None:
    """Write ``semantics`` uint8 [X, Y, Z] and ``flow`` float16 [X, Y, Z, 2] (m/s) as a compressed ``.npz``."""
    with atomic_write(path) as file:
        np.savez_compressed(file, semantics=semantics, flow=flow)
