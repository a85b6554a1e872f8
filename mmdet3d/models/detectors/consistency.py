"""Contradictions between the parts of a detector's config, found when it is built."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from mmdet3d.registry import ConfigError
from mmdet3d.structures import VoxelGrid

ENCODER = "model.backward_projection.transformer.encoder"
TRANSFORM = "model.forward_projection.img_view_transformer"


def check_consistency(model: nn.Module, stages: Sequence[Mapping], class_options: Mapping[str, Any]) -> None:
    """Refuse a detector whose parts do not fit together.

    Args:
        model: The detector, with its projections, temporal fusions, heads, ``grids`` and ``top_k``.
        stages: The backward projections' configs, finest first.
        class_options: The detector's ``empty_idx``, ``foreground_idx``, ``class_weights``,
            ``intermediate_pred_loss_weight``, and the flow head's ``foreground_idx`` as ``flow_head.foreground_idx``.

    Raises:
        ConfigError: two values contradict each other; the message names both places.
    """
    _check_outputs(model)
    for s, stage in enumerate(stages):
        _check_stage(model, s, stage)
    _check_classes(model, class_options)
    weights = class_options["intermediate_pred_loss_weight"]
    _equal("length of model.intermediate_pred_loss_weight", len(weights), "num_stage + 1", model.num_stage + 1)


def _equal(place: str, value: Any, other_place: str, other: Any) -> None:
    if value != other:
        raise ConfigError(f"{place} is {value}, but {other_place} is {other}")


def _equal_where_said(place: str, part: Any, name: str, other_place: str, other: Any) -> None:
    """As :func:`_equal` for an attribute that not every class of this kind of part has use for."""
    if (value := getattr(part, name, None)) is not None:
        _equal(place, value, other_place, other)


def _check_outputs(model: nn.Module) -> None:
    """The 3D encoder gives one volume per stage, in the order of its layers."""
    encoder = model.forward_projection.img_bev_encoder_backbone
    place = "model.forward_projection.img_bev_encoder_backbone.backbone_output_ids"
    ids, layers = list(encoder.output_ids), len(encoder.layers)
    if ids != sorted(set(ids)) or not set(ids) <= set(range(layers)):
        raise ConfigError(f"{place}={ids} must be ascending stages of 0..{layers - 1}")
    if hasattr(encoder, "adjust_layer"):
        _equal(f"with adjust_number_channel, {place}", ids, "the list of all stages", list(range(layers)))
    _equal(f"the number of volumes of {place}", len(ids), "model.num_stage", model.num_stage)


def _check_stage(model: nn.Module, s: int, stage: Mapping) -> None:
    transform, grid = model.forward_projection.img_view_transformer, model.grids[s]
    transformer = model.backward_projection_list[s].transformer
    encoder, num_cams = transformer.encoder, model.forward_projection.num_cams
    at_stage = f" (stage {s})"
    if encoder.grid != grid:
        raise ConfigError(f"backward_projection: the encoder's grid_config of stage {s} is {encoder.grid}, "
                          f"but the view transformer's grid_config gives {grid}")
    for place, pc_range in _point_cloud_ranges(stage):
        _equal(place + at_stage, tuple(float(v) for v in pc_range), f"the grid of {TRANSFORM}", _bounds(grid))
    _equal(f"{ENCODER}.data_config.input_size", encoder.image_size, f"{TRANSFORM}.input_size", transform.input_size)
    cameras = "model.forward_projection.num_cams"
    _equal(f"{ENCODER}.num_cam", encoder.num_cams, cameras, num_cams)
    _equal("model.backward_projection.transformer.num_cams", len(transformer.cams_embeds), cameras, num_cams)
    for layer in encoder.layers:
        temporal, cross = layer.attentions
        place = f"{ENCODER}.transformerlayers.attn_cfgs"
        _equal_where_said(f"{place}[1].dbound", cross, "depth_range", f"{TRANSFORM}.grid_config.depth",
                          transform.depth_range)
        _equal_where_said(f"{place}[1].num_cams", cross, "num_cams", cameras, num_cams)
        for attention, part in ((temporal, "[0]"), (cross, "[1]"),
                                (getattr(cross, "deformable_attention", None), "[1].deformable_attention")):
            _equal_where_said(f"{place}{part}.num_points{at_stage}", attention, "num_points",
                              "the number of voxels along z", grid.size_xyz[2])
    for mode, top_k in (("training", model.top_k[True]), ("evaluation", model.top_k[False])):
        if model.temporal_fusion_list and not 0 < top_k[s] <= grid.num_voxels:
            raise ConfigError(f"model.train_top_k or val_top_k: {top_k[s]} for stage {s} in {mode} must be "
                              f"1..{grid.num_voxels}, the number of voxels of the stage")


def _point_cloud_ranges(stage: Mapping) -> Iterator[tuple[str, Sequence[float]]]:
    """Places and values of the bounds that a stage's config gives."""
    for place, part in (("model.backward_projection", stage), (ENCODER, stage["transformer"]["encoder"])):
        if "pc_range" in part:
            yield f"{place}.pc_range", part["pc_range"]


def _bounds(grid: VoxelGrid) -> tuple[float, ...]:
    return (*grid.low, *grid.high)


def _check_classes(model: nn.Module, options: Mapping[str, Any]) -> None:
    head, num_classes = "model.occupancy_head.num_classes", model.occupancy_head.num_classes
    for stage in model.backward_projection_list:
        _equal(f"{ENCODER}.predictor_num_calsses", stage.transformer.encoder.occ_predictor.num_classes, head,
               num_classes)
    for fusion in model.temporal_fusion_list:
        _equal_where_said("model.temporal_fusion.num_classes", fusion, "num_classes", head, num_classes)
    if (moving := getattr(model.flow_head, "moving_classes", None)) is not None:
        _equal("model.flow_head.num_classes", len(moving), head, num_classes)
    _equal("model.empty_idx", options["empty_idx"], "the last class, which is free space,", num_classes - 1)
    if options["class_weights"] is not None:
        _equal("length of model.class_weights", len(options["class_weights"]), head, num_classes)
    for name in ("foreground_idx", "flow_head.foreground_idx"):
        if wrong := [index for index in options[name] or () if not 0 <= index < num_classes]:
            raise ConfigError(f"model.{name} holds {wrong}; accepted are the classes 0..{num_classes - 1}")
