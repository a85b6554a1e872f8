"""The transformer of one stage: image features to tokens, then the encoder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from einops import rearrange
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.registry import TRANSFORMER, build


@TRANSFORMER.register_module()
class BEVFormer(BaseModule):
    """Encoder over image tokens (after BEVFormer, Li et al. arXiv 2203.17270).

    Args:
        encoder: Config of the encoder.
        embed_dims: Channels C.
        num_cams: Cameras N.
        use_cams_embeds: Add a learned embedding per camera to the tokens. The published models do not, but their
            checkpoints hold the parameter, which then only receives a zero gradient.
    """

    ignored_config_keys = frozenset({"output_dims"})

    def __init__(self, encoder: Mapping, embed_dims: int = 256, num_cams: int = 6, use_cams_embeds: bool = True,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        self.use_cams_embeds = use_cams_embeds
        self.cams_embeds = nn.Parameter(torch.zeros(num_cams, embed_dims))
        self.encoder = build(encoder, "encoder")
        if use_cams_embeds:
            nn.init.normal_(self.cams_embeds)

    def forward(self, features: Tensor, **inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the encoder.

        Args:
            features: [B, N, C, h, w] image features.
            **inputs: The other inputs of the encoder.

        Returns:
            As the encoder: queries [B, Q, C] and logits [B, X, Y, Z, K].
        """
        tokens = rearrange(features, "batch camera channel h w -> camera batch (h w) channel")
        if self.use_cams_embeds or self.training:
            # The factor 0 keeps the unused parameter in the graph, so that weight decay and DDP treat it as usual.
            tokens = tokens + self.cams_embeds[:, None, None] * float(self.use_cams_embeds)
        return self.encoder(tokens=tokens, **inputs)
