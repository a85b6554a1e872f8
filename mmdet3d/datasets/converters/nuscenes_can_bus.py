"""Vehicle state at a sample, from the CAN bus expansion of nuScenes; zeros where there is none."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

NO_CAN_BUS = frozenset(f"scene-{number:04}" for number in (*range(161, 169), *range(170, 177), *range(309, 315)))
"""Scenes that were recorded without a CAN bus (list of the nuScenes devkit)."""

_POSE_SIZE = 7
_MOTION_SIZE = 9


def find_can_bus(folder: str | os.PathLike) -> Path | None:
    """The folder of the ``<scene>_pose.json`` files: ``<folder>/can_bus`` or ``folder`` itself; None if neither."""
    folder = Path(folder)
    if (folder / "can_bus").is_dir():
        return folder / "can_bus"
    return folder if next(folder.glob("*_pose.json"), None) else None


class CanBus:
    """Vectors by scene and time. The file of a scene is read once.

    Args:
        folder: Folder of the ``<scene>_pose.json`` files; None: there is no CAN bus data, all vectors are zeros.
        motion: Which message gives acceleration, rotation rate and velocity: ``"next"``, the first one after the
            sample, as in the published info files; or ``"last"``, the same message that gives the pose.

    Attributes:
        problems: By scene name, why its vectors are zeros.

    Raises:
        ValueError: ``motion`` is neither.
    """

    def __init__(self, folder: str | os.PathLike | None, motion: str = "next") -> None:
        if motion not in ("next", "last"):
            raise ValueError(f"motion: expected 'next' or 'last', got {motion!r}")
        self.folder = None if folder is None else Path(folder)
        self.motion = motion
        self.problems: dict[str, str] = {}
        self._scenes: dict[str, tuple[np.ndarray, np.ndarray] | None] = {}

    def vector(self, scene: str, timestamp: int) -> np.ndarray:
        """(18,) float64 state at ``timestamp`` (microseconds).

        0..2 position, 3..6 orientation (w, x, y, z) of the last message not after the sample; 7..9 acceleration
        m/s^2, 10..12 rotation rate rad/s, 13..15 velocity m/s; 16 and 17 are 0.
        """
        if scene not in self._scenes:
            self._scenes[scene] = self._read(scene)
        vector = np.zeros(18)
        if self._scenes[scene] is None:
            return vector
        times, values = self._scenes[scene]
        later = np.flatnonzero(times > timestamp)
        following = later[0] if len(later) else len(times) - 1
        last = max(following - 1, 0) if len(later) else following
        vector[:_POSE_SIZE] = values[last, :_POSE_SIZE]
        vector[_POSE_SIZE:16] = values[following if self.motion == "next" else last, _POSE_SIZE:]
        return vector

    def _read(self, scene: str) -> tuple[np.ndarray, np.ndarray] | None:
        if self.folder is None:
            self.problems[scene] = "no CAN bus folder"
            return None
        if scene in NO_CAN_BUS:
            self.problems[scene] = "recorded without a CAN bus"
            return None
        path = self.folder / f"{scene}_pose.json"
        try:
            with open(path, encoding="utf-8") as file:
                messages = json.load(file)
            return _messages(messages)
        except FileNotFoundError:
            self.problems[scene] = f"{path} not found"
        except OSError as error:
            self.problems[scene] = f"{path} cannot be read: {error.strerror or error}"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.problems[scene] = f"{path} is damaged: {type(error).__name__}: {error}"
        return None


def _messages(messages: list[Mapping]) -> tuple[np.ndarray, np.ndarray]:
    """Times (N,) int64 in microseconds and values (N, 16) in file order."""
    if not messages:
        raise ValueError("no messages")
    values = []
    for message in messages:
        motion = [number for key, numbers in message.items() if key not in ("utime", "pos", "orientation")
                  for number in numbers]
        row = [*message["pos"], *message["orientation"], *motion]
        if len(message["pos"]) != 3 or len(row) != _POSE_SIZE + _MOTION_SIZE:
            raise ValueError(f"a message has {len(row)} numbers in {list(message)}, expected "
                             f"{_POSE_SIZE + _MOTION_SIZE}")
        values.append(row)
    return np.array([message["utime"] for message in messages], np.int64), np.array(values, np.float64)
