"""One layer of the BEV encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mmcv.runner import BaseModule
from mmdet.models.backbones.resnet import BasicBlock
from torch import Tensor, nn

from mmdet3d.interfaces import SpatialAttention, TemporalAttention
from mmdet3d.models.attention.camera_anchors import CameraAnchors
from mmdet3d.registry import TRANSFORMER_LAYER, build, check_keys

OPERATION_ORDER = ("predictor", "self_attn", "norm", "cross_attn", "norm", "conv")


class BEVContext(NamedTuple):
    """What every layer of a stage reads.

    Attributes:
        bev_size: (Y, X).
        cells: [2] the numbers of cells (X, Y) on the device.
        query_pos: [B, Q, C] positional encoding.
        tokens: [N, B, h * w, C] image features.
        image_size: (h, w).
        anchors: 3D anchors of the queries in the cameras.
        consistency: [N, B, Q, Z] how well the anchors fit the depth of the images.
    """

    bev_size: tuple[int, int]
    cells: Tensor
    query_pos: Tensor
    tokens: Tensor
    image_size: tuple[int, int]
    anchors: CameraAnchors
    consistency: Tensor


@TRANSFORMER_LAYER.register_module()
class BEVFormerEncoderLayer(BaseModule):
    """Temporal attention, norm, cross attention, norm, and a residual 2D block over the bird's-eye view.

    Args:
        attn_cfgs: Configs of the temporal and of the cross attention, see :class:`TemporalAttention` and
            :class:`SpatialAttention` of :mod:`mmdet3d.interfaces`.
        conv_cfgs: ``embed_dims`` of the 2D block.
        operation_order: Must be :data:`OPERATION_ORDER` (the occupancy predictor is run by the encoder).
    """

    ignored_config_keys = frozenset({
        "feedforward_channels", "ffn_dropout", "ffn_num_fcs", "act_cfg", "norm_cfg", "ffn_cfgs", "batch_first"})

    def __init__(self, attn_cfgs: Sequence[Mapping], conv_cfgs: Mapping | None = None,
                 operation_order: Sequence[str] = OPERATION_ORDER, init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if tuple(operation_order) != OPERATION_ORDER:
            raise ValueError(f"operation_order must be {OPERATION_ORDER}, got {tuple(operation_order)}")
        if len(attn_cfgs) != 2:
            raise ValueError(f"attn_cfgs must hold the temporal and the cross attention, got {len(attn_cfgs)} entries")
        self.attentions = nn.ModuleList(build(cfg, f"attn_cfgs[{i}]", contract) for i, (cfg, contract) in enumerate(
            zip(attn_cfgs, (TemporalAttention, SpatialAttention), strict=True)))
        if conv_cfgs is not None:
            check_keys(conv_cfgs, ("embed_dims",), "conv_cfgs")
        embed_dims = (conv_cfgs or attn_cfgs[0])["embed_dims"]
        self.convs = nn.ModuleList([BasicBlock(embed_dims, embed_dims)])
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dims) for _ in attn_cfgs)

    def forward(self, query: Tensor, visibility: Tensor, values: Tensor, reference_points: Tensor, context: BEVContext
                ) -> Tensor:
        """[B, Q, C] -> [B, Q, C].

        Args:
            query: [B, Q, C] without positional encoding.
            visibility: [B, Q, Z] occupied probability above each query.
            values: [2 B, Q, C] temporal queue, see :class:`OA_TemporalAttention`.
            reference_points: [2 B, Q, 2] positions in the queue's maps.
            context: What all layers share.
        """
        temporal, spatial = self.attentions
        pos = context.query_pos
        query = self.norms[0](
            temporal(query, pos, values, reference_points, visibility, context.bev_size, context.cells))
        query = self.norms[1](spatial(query, pos, context.tokens, context.image_size, context.anchors,
                                      context.consistency, visibility))
        bev = query.transpose(1, 2).unflatten(2, context.bev_size)
        return self.convs[0](bev).flatten(2).transpose(1, 2)
