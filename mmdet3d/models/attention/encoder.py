"""The BEV encoder of one stage: occupancy prediction and attention, layer after layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.models.attention.camera_anchors import CameraAnchors, anchor_points, project_anchors
from mmdet3d.models.attention.encoder_layer import BEVContext
from mmdet3d.models.attention.occupancy_predictor import OccupancyPredictor, query_visibility
from mmdet3d.registry import TRANSFORMER_LAYER_SEQUENCE, build, check_keys
from mmdet3d.structures import VoxelGrid

RECURRENCE_WEIGHT = 0.5
#: Keys of the pipeline's ``data_config``, of which only ``input_size`` is read here.
DATA_CONFIG_KEYS = ("cams", "Ncams", "input_size", "src_size", "resize", "rot", "flip", "crop_h", "resize_test")


class EncoderGeometry(NamedTuple):
    """Where the queries of a stage look.

    Attributes:
        anchors: 3D anchors of the queries in the cameras.
        reference_points: [2 B, Q, 2] positions (x, y) of the queries in the maps of the temporal queue, in units of the
            map; row 2 b is the previous map, row 2 b + 1 the current one.
    """

    anchors: CameraAnchors
    reference_points: Tensor


@TRANSFORMER_LAYER_SEQUENCE.register_module()
class BEVFormerEncoder(BaseModule):
    """Layers that predict the occupancy above each BEV query and let it steer their attention.

    Args:
        transformerlayers: Config of a layer; every layer gets its own copy.
        num_layers: Layers.
        pc_range: Lower and upper bounds (x, y, z) in metres.
        grid_config: Voxel grid of the stage.
        data_config: ``input_size`` (H, W) of the network image.
        num_cam: Cameras N.
        predictor_in_channels: Channels of the occupancy predictor's input.
        predictor_out_channels: Half its hidden channels.
        predictor_num_calsses: Classes K (the spelling is the config files').
        first_stage: Whether this is the coarsest stage, which has no earlier logits.
        use_temporal: Must be True.
        legacy_axis_swap: See :func:`project_anchors`.
        legacy_anchor_heights: See :func:`anchor_points`.
        trainable_recurrence: The weight of the previous logits is the constant 0.5, as in the released weights. True:
            one learned weight per layer that has previous logits (adds ``recurrence_weights`` to the state dict).
        refresh_value_queue: With a history, the current map in the temporal queue is the stage's input for every layer,
            as the released weights expect. True: each layer's own input.
    """

    ignored_config_keys = frozenset({"return_intermediate", "group_list", "num_points_in_pillar"})

    def __init__(self, transformerlayers: Mapping, num_layers: int, pc_range: Sequence[float], grid_config: Mapping,
                 data_config: Mapping, num_cam: int = 6, predictor_in_channels: int = 96,
                 predictor_out_channels: int = 96, predictor_num_calsses: int = 18, first_stage: bool = False,
                 use_temporal: bool = True, legacy_axis_swap: bool = True, legacy_anchor_heights: bool = True,
                 trainable_recurrence: bool = False, refresh_value_queue: bool = False,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if not use_temporal:
            raise ValueError("use_temporal=False is not supported")
        check_keys(grid_config, ("x", "y", "z", "depth"), "grid_config")
        check_keys(data_config, DATA_CONFIG_KEYS, "data_config")
        self.grid = VoxelGrid.from_config(grid_config)
        self.image_size = tuple(data_config["input_size"])
        self.num_cams = num_cam
        self.legacy_axis_swap = legacy_axis_swap
        self.refresh_value_queue = refresh_value_queue
        self.layers = nn.ModuleList(build(transformerlayers, f"transformerlayers[{i}]") for i in range(num_layers))
        num_z, *bev_size = self.grid.size_zyx
        self.bev_size = tuple(bev_size)
        self.occ_predictor = OccupancyPredictor(
            predictor_in_channels, predictor_out_channels, num_z, predictor_num_calsses)
        self.recurrences = num_layers - int(first_stage)
        if trainable_recurrence:
            self.recurrence_weights = nn.Parameter(torch.full((self.recurrences,), RECURRENCE_WEIGHT))
        self.trainable_recurrence = trainable_recurrence
        points = anchor_points(self.bev_size, num_z, pc_range, legacy_heights=legacy_anchor_heights)
        self.register_buffer("anchors", points, persistent=False)
        self.register_buffer("reference_points", _cell_centres(self.bev_size), persistent=False)
        self.register_buffer("cells", torch.tensor(self.bev_size[::-1], dtype=torch.float32), persistent=False)

    def geometry(self, image_from_ego: Tensor, shift: Tensor | None) -> EncoderGeometry:
        """``geometry`` of :meth:`forward`.

        Args:
            image_from_ego: [B, N, 4, 4] augmented ego to augmented pixels times depth.
            shift: [B, 2] (x, y) displacement of the previous map, in units of the map; None without that map.
        """
        return EncoderGeometry(
            project_anchors(self.anchors, image_from_ego, self.image_size, legacy_axis_swap=self.legacy_axis_swap),
            self._queue_references(len(image_from_ego), shift))

    def forward(self, query: Tensor, query_pos: Tensor, tokens: Tensor, depth: Tensor, geometry: EncoderGeometry,
                coarse_logits: Tensor | None, previous: Tensor | None) -> tuple[Tensor, Tensor]:
        """Refine the queries and predict the stage's occupancy.

        Args:
            query: [B, Q, C], Q = Y * X with index y * X + x.
            query_pos: [B, Q, C] positional encoding.
            tokens: [N, B, h * w, C] image features.
            depth: [B, N, D, h, w] depth probability.
            geometry: Where the queries look, see :meth:`geometry`.
            coarse_logits: [B, X, Y, Z, K] up-sampled logits of the coarser stage, or None.
            previous: [B, Q, C] map of the previous frame, or None.

        Returns:
            Refined queries [B, Q, C], and the logits [B, X, Y, Z, K] that the last layer's predictor gave, before that
            layer's attention.
        """
        anchors, reference_points = geometry
        # The layers are built from one config, so that their depth weights are the same.
        consistency = self.layers[0].attentions[1].consistency(anchors, depth)
        context = BEVContext(self.bev_size, self.cells, query_pos, tokens, tuple(depth.shape[-2:]), anchors,
                             consistency)
        values, logits = None, coarse_logits
        for index, layer in enumerate(self.layers):
            logits = self._predict(query, logits, index)
            if values is None or previous is None or self.refresh_value_queue:
                values = torch.stack([query if previous is None else previous, query], 1).flatten(0, 1)
            query = layer(query, query_visibility(logits), values, reference_points, context)
        return query, logits

    def _predict(self, query: Tensor, previous_logits: Tensor | None, layer: int) -> Tensor:
        logits = self.occ_predictor(query.transpose(1, 2).unflatten(2, self.bev_size))
        if previous_logits is None:
            return logits
        if not self.trainable_recurrence:
            return torch.add(logits, previous_logits, alpha=RECURRENCE_WEIGHT)  # one kernel
        weight = self.recurrence_weights[layer - (len(self.layers) - self.recurrences)]
        return logits + weight * previous_logits

    def _queue_references(self, batch: int, shift: Tensor | None) -> Tensor:
        """[2 B, Q, 2]: positions in the previous map (displaced by ``shift``) and in the current one."""
        current = self.reference_points.expand(batch, -1, -1)
        previous = current if shift is None else current + shift[:, None]
        return torch.stack([previous, current], 1).flatten(0, 1)


def _cell_centres(bev_size: tuple[int, int]) -> Tensor:
    """[Y * X, 2] normalised (x, y) of the cells."""
    height, width = bev_size
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)
