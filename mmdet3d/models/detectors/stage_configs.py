"""The configs of the coarser stages, derived from the finest one's."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet3d.registry import MODELS, ConfigError, accepted_keys
from mmdet3d.structures import VoxelGrid

PLACE = "model.backward_projection"


def stage_configs(finest: Mapping, num_stage: int, num_layers: Sequence[int]) -> list[dict]:
    """Backward-projection configs of all stages, finest first; ``finest`` stays as it is.

    From a stage to the next coarser one all sizes halve (BEV size, attention points, positional embeddings), and the
    voxel edges double.

    Args:
        finest: Config of the finest stage.
        num_stage: Number of stages S.
        num_layers: Transformer layers per stage, coarsest first.

    Raises:
        ConfigError: ``num_layers`` has not S entries, a part is missing, or a size cannot be halved.
        ValueError: ``grid_config`` is no grid, or an axis cannot be halved.
    """
    if len(num_layers) != num_stage:
        raise ConfigError(f"backward_num_layer={list(num_layers)} must have num_stage={num_stage} entries, "
                          "coarsest first")
    stages = [copy.deepcopy(dict(finest))]
    for _ in range(num_stage - 1):
        stages.append(_coarser(stages[-1]))
    for stage, layers in zip(stages, reversed(num_layers), strict=True):
        _part(stage, "transformer", "encoder")["num_layers"] = layers
    _part(stages[-1], "transformer", "encoder")["first_stage"] = True
    return stages


def _coarser(stage: Mapping) -> dict:
    coarse = copy.deepcopy(stage)
    encoder = _part(coarse, "transformer", "encoder")
    for key in ("bev_h", "bev_w", "bev_z"):
        _halve(coarse, key)
    for key in ("row_num_embed", "col_num_embed"):
        _halve(_part(coarse, "positional_encoding"), key)
    attentions = _part(coarse, "transformer", "encoder", "transformerlayers", "attn_cfgs")
    if len(attentions) != 2:
        raise ConfigError(f"{PLACE}...attn_cfgs must hold the temporal and the cross attention, "
                          f"got {len(attentions)} entries")
    _, spatial = attentions
    kind = spatial.get("type")
    cls = kind if inspect.isclass(kind) else MODELS.module_dict.get(kind)
    if cls is None or "deformable_attention" in accepted_keys(cls)[0]:
        attentions = [*attentions, _part(spatial, "deformable_attention", place=f"{PLACE}...attn_cfgs[1]")]
    for attention in attentions:
        for key in ("num_points", "num_Z_anchors"):
            _halve(attention, key)
    grid = VoxelGrid.from_config(_part(coarse, "transformer", "encoder", "grid_config")).coarsen(2)
    encoder["grid_config"].update({axis: list(values) for axis, *values in zip("xyz", grid.low, grid.high, grid.cell,
                                                                              strict=True)})
    return coarse


def _part(config: Mapping, *path: str, place: str = PLACE) -> Any:
    """The entry below ``config``, which ``place`` names, that the keys of ``path`` lead to."""
    for key in path:
        if key not in config:
            raise ConfigError(f"{place}: the key {key!r} is missing; found {sorted(config)}")
        config, place = config[key], f"{place}.{key}"
    return config


def _halve(config: dict, key: str) -> None:
    if key not in config:
        return
    if config[key] % 2:
        raise ConfigError(f"backward_projection: {key}={config[key]} cannot be halved for the next coarser stage")
    config[key] //= 2
