"""Names for synthetic scenes: those of the official splits, so that every tool finds its training and its val part."""

from __future__ import annotations

_MINI_TRAIN = ("scene-0061", "scene-0553", "scene-0655", "scene-0757", "scene-0796", "scene-1077", "scene-1094",
               "scene-1100")
_MINI_VAL = ("scene-0103", "scene-0916")

VERSIONS = ("v1.0-mini", "v1.0-trainval")
"""Versions of the tables that can be written."""


def scene_names(version: str, count: int) -> tuple[str, ...]:
    """Names of ``count`` scenes, training scenes first; about a quarter of them, at least one of two, are val scenes.

    Args:
        version: ``v1.0-mini`` for up to 10 scenes, ``v1.0-trainval`` for up to 850, whose names the nuscenes-devkit
            gives.
        count: Number of scenes.

    Raises:
        ValueError: the version is unknown or has not so many names.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {VERSIONS}, got {version!r}")
    if version == "v1.0-mini":
        train, val = _MINI_TRAIN, _MINI_VAL
    else:
        from nuscenes.utils.splits import create_splits_scenes

        splits = create_splits_scenes()
        train, val = tuple(splits["train"]), tuple(splits["val"])
    if not 1 <= count <= len(train) + len(val):
        raise ValueError(f"{version} has names for 1 to {len(train) + len(val)} scenes, got {count}")
    in_val = min(max(round(count / 4), count - len(train), int(count > 1)), len(val))
    return train[: count - in_val] + val[:in_val]
