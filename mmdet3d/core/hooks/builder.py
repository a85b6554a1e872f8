"""Hooks from configs: those of this project by their name, and all others of mmcv."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from mmcv.runner import HOOKS as MMCV_HOOKS
from mmcv.runner import Hook
from mmcv.utils import Registry

from mmdet3d.registry import ConfigError, build_from_config, config_place

HOOKS = Registry("hooks", scope="mmdet3d")
"""Hooks of this project; looked up before those of mmcv, some of which they replace under the same name."""

_MODULES = ("optimizer", "progress", "checkpoint", "ema", "finite_loss")


def find_hook(name: Any, place: str) -> type[Hook]:
    """The hook class called ``name``.

    Raises:
        ConfigError: there is none.
    """
    for module in _MODULES:
        importlib.import_module(f"mmdet3d.core.hooks.{module}")
    for registry in (HOOKS, MMCV_HOOKS):
        if isinstance(name, str) and name in registry.module_dict:
            return registry.module_dict[name]
    known = sorted({*HOOKS.module_dict, *MMCV_HOOKS.module_dict})
    raise ConfigError(f"{place}: {name!r} is not a hook; known are {known}")


def build_hook(cfg: Mapping[str, Any], place: str, **default_args: Any) -> Hook:
    """The hook that ``cfg`` describes; ``cfg`` stays as it is.

    Args:
        cfg: ``type`` and the arguments; a ``priority`` is left to the caller.
        place: Where ``cfg`` is in the config, for messages.
        **default_args: Arguments used where ``cfg`` does not set them.

    Raises:
        ConfigError: there is no such hook, or it does not take what it is given.
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise ConfigError(f"{place}: expected a dict with a 'type', got {cfg!r}")
    args = {key: value for key, value in cfg.items() if key != "priority"}
    with config_place(place):
        return build_from_config({**args, "type": find_hook(cfg["type"], f"{place}.type")}, HOOKS, default_args)
