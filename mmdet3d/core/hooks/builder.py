"""Hooks from configs: those of this project by their name, and all others of mmcv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmcv.runner import HOOKS as MMCV_HOOKS
from mmcv.runner import Hook
from mmcv.utils import Registry

from mmdet3d.core import hooks
from mmdet3d.interfaces import EndsStep, TrainingHook, TrainingState
from mmdet3d.registry import ConfigError, build_from_config, check_contract, config_place, import_modules

HOOKS = Registry("hooks", scope="mmdet3d")
"""Hooks of this project; looked up before those of mmcv, some of which they replace under the same name."""


def find_hook(name: Any, place: str) -> type[Hook]:
    """The hook class called ``name``, of the modules of this folder or imported before.

    Raises:
        ConfigError: there is none.
    """
    import_modules(hooks)
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
        ConfigError: there is no such hook, it does not take what it is given, or it is no :class:`TrainingHook`.
    """
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise ConfigError(f"{place}: expected a dict with a 'type', got {cfg!r}")
    args = {key: value for key, value in cfg.items() if key != "priority"}
    with config_place(place):
        hook = build_from_config({**args, "type": find_hook(cfg["type"], f"{place}.type")}, HOOKS, default_args)
        if not isinstance(hook, Hook):
            raise ConfigError(f"{place}: {type(hook).__name__} does not inherit from mmcv.runner.Hook")
        check_contract(hook, TrainingHook, TrainingState, EndsStep)
    return hook
