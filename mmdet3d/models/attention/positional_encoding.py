"""Learned positional encoding of the bird's-eye view."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.registry import POSITIONAL_ENCODING


@POSITIONAL_ENCODING.register_module()
@POSITIONAL_ENCODING.register_module("CustormLearnedPositionalEncoding")
class CustomLearnedPositionalEncoding(BaseModule):
    """Learned row and column embeddings that follow the flips of the BEV augmentation.

    Args:
        num_feats: Features of each of the two embeddings.
        row_num_embed: Rows Y.
        col_num_embed: Columns X.
    """

    def __init__(self, num_feats: int, row_num_embed: int = 50, col_num_embed: int = 50, init_cfg: Mapping | None = None
                 ) -> None:
        super().__init__(init_cfg)
        self.row_embed = nn.Embedding(row_num_embed, num_feats)
        self.col_embed = nn.Embedding(col_num_embed, num_feats)

    def forward(self, bda: Tensor) -> Tensor:
        """[B, Y * X, 2 * num_feats] for the BEV augmentation [B, 4, 4]; columns (x) first, then rows (y).

        Along an axis whose entry of ``bda`` is not exactly 1 the embedding is read backwards.
        """
        columns = _flipped_where(self.col_embed.weight, bda[:, 0, 0] != 1)  # [B, X, F]
        rows = _flipped_where(self.row_embed.weight, bda[:, 1, 1] != 1)  # [B, Y, F]
        height, width = rows.shape[1], columns.shape[1]
        columns = columns[:, None].expand(-1, height, -1, -1)
        rows = rows[:, :, None].expand(-1, -1, width, -1)
        return torch.cat([columns, rows], -1).flatten(1, 2)


def _flipped_where(table: Tensor, flip: Tensor) -> Tensor:
    """[B, N, F] copies of the table [N, F], read backwards where ``flip`` [B] holds."""
    return torch.where(flip[:, None, None], table.flip(0), table)
