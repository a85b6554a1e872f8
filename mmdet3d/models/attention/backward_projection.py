"""One stage of voxel renovation: voxels to bird's-eye view, attention into the images, occupancy of the stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor
from torch.nn import functional as F

from mmdet3d.models.attention.encoder import EncoderGeometry
from mmdet3d.registry import HEADS, build
from mmdet3d.utils.precision import full_precision


def height_mean(volume: Tensor) -> Tensor:
    """Mean over Z of [B, C, Z, Y, X], in float32 at least."""
    return volume.mean(2, dtype=torch.promote_types(volume.dtype, torch.float32))


def upsample_logits(logits: Tensor) -> Tensor:
    """Trilinear x2 of logits [B, X, Y, Z, K] -> [B, 2 X, 2 Y, 2 Z, K]."""
    volume = F.interpolate(logits.permute(0, 4, 1, 2, 3), scale_factor=2, mode="trilinear", align_corners=False)
    return volume.permute(0, 2, 3, 4, 1)


def ego_shift(displacement: Tensor, yaw: Tensor, extent: tuple[float, float], *, legacy_axes: bool = True) -> Tensor:
    """Displacement of the bird's-eye view between two frames, in units of the map: [B, 2] (x, y), float32.

    Args:
        displacement: [B, 3] float64 ego motion since the previous frame in global axes, metres.
        yaw: [B] float64 heading, radians.
        extent: (x, y) size of the map in metres.
        legacy_axes: With L the length and b the bearing of the motion, x = L sin(yaw - b) / extent_x and
            y = L cos(yaw - b) / extent_y: right where y is forward, as in BEVFormer, and what the released weights
            expect, although x is forward here. False: x = L cos(b - yaw) / extent_x, y = L sin(b - yaw) / extent_y.
    """
    dx, dy = displacement[:, 0], displacement[:, 1]
    length = torch.hypot(dx, dy)
    # In degrees and back, as the reference rounds it.
    degrees = yaw / math.pi * 180 - torch.atan2(dy, dx) / math.pi * 180
    angle = degrees / 180 * math.pi
    across, along = length * angle.sin(), length * angle.cos()
    x, y = (across, along) if legacy_axes else (along, -across)
    return torch.stack([x / extent[0], y / extent[1]], -1).float()


class StageSetup(NamedTuple):
    """Inputs of a stage besides the features of the frame: the frame before and where everything is.

    Attributes:
        previous_map: [B, Q, C] bird's-eye view of the previous frame, flipped for the current augmentation, or None.
        query_pos: [B, Q, C] positional encoding.
        geometry: Where the queries look.
    """

    previous_map: Tensor | None
    query_pos: Tensor
    geometry: EncoderGeometry


@HEADS.register_module()
class BEVFormerBackwardProjection(BaseModule):
    """Backward projection of one stage.

    Args:
        transformer: Config of the transformer.
        positional_encoding: Config of the positional encoding.
        pc_range: Lower and upper bounds (x, y, z) in metres.
        bev_h: Y of the stage.
        bev_w: X of the stage.
        use_can_bus: Must be False.
        always_flip_previous: Rotate the previous map by 180 degrees in every frame, as the released weights expect (the
            reference tests the product of two flips for being non-zero). False: undo the flip of the previous frame and
            apply the current one.
        stale_previous_at_start: At the first frame of a sequence, use the last map of the sequence before it in the
            same batch slot, as the reference does. False: start with the current map.
        invert_bda: The reference multiplies anchors by the BEV augmentation where its inverse is meant (equal for
            flips). True: use the inverse.
        legacy_shift_axes: See :func:`ego_shift`. False also mirrors the shift with the map.
    """

    ignored_config_keys = frozenset({
        "in_channels", "out_channels", "bev_z", "can_bus_norm"})

    def __init__(self, transformer: Mapping, positional_encoding: Mapping, pc_range: Sequence[float],
                 bev_h: int = 100, bev_w: int = 100,
                 use_can_bus: bool = False,
                 always_flip_previous: bool = True, stale_previous_at_start: bool = True, invert_bda: bool = False,
                 legacy_shift_axes: bool = True,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if use_can_bus:
            raise ValueError("use_can_bus=True is not supported; the published models set it to False")
        self.bev_size = (bev_h, bev_w)
        self.extent = (pc_range[3] - pc_range[0], pc_range[4] - pc_range[1])
        self.always_flip_previous = always_flip_previous
        self.stale_previous_at_start = stale_previous_at_start
        self.invert_bda = invert_bda
        self.legacy_shift_axes = legacy_shift_axes
        self.positional_encoding = build(positional_encoding, "positional_encoding")
        self.transformer = build(transformer, "transformer")
        if self.transformer.encoder.bev_size != self.bev_size:
            raise ValueError(f"bev_h, bev_w = {self.bev_size} must be the (Y, X) of the encoder's grid_config, "
                             f"{self.transformer.encoder.bev_size}")

    def forward(self, bev: Tensor, context: Tensor, depth: Tensor, coarse_logits: Tensor | None, starts: Tensor,
                setup: StageSetup) -> tuple[Tensor, Tensor]:
        """Refine the bird's-eye view of a volume and predict its occupancy.

        Args:
            bev: [B, C, Y, X] mean of the volume of the stage over its height, see :func:`height_mean`.
            context: [B, N, C, h, w] image features.
            depth: [B, N, D, h, w] depth probability.
            coarse_logits: [B, X / 2, Y / 2, Z / 2, K] logits of the coarser stage, or None.
            starts: [B] bool, whether a sequence starts.
            setup: Of :meth:`setup`, called for this frame.

        Returns:
            BEV features [B, C, Y, X] and logits [B, X, Y, Z, K].
        """
        query = bev.flatten(2).transpose(1, 2)
        previous = setup.previous_map
        if previous is not None and not self.stale_previous_at_start:
            previous = torch.where(starts[:, None, None], query.detach(), previous)
        query, logits = self.transformer(
            context, query=query, query_pos=setup.query_pos, depth=depth, geometry=setup.geometry,
            coarse_logits=None if coarse_logits is None else upsample_logits(coarse_logits), previous=previous)
        return query.transpose(1, 2).unflatten(2, self.bev_size), logits

    def setup(self, previous_volume: Tensor | None, previous_flips: Tensor, bda: Tensor, shift: Tensor,
              image_from_augmented: Tensor) -> StageSetup:
        """Do the part of :meth:`forward` that needs no features of the frame.

        Args:
            previous_volume: [B, C, Z, Y, X] volume that this stage produced at the previous frame, or None.
            previous_flips: [B, 2] bool, whether the flip of the BEV augmentation along (x, y) changed since that frame;
                only read without ``always_flip_previous``.
            bda: [B, 4, 4] BEV augmentation.
            shift: [B, 2] displacement of the previous map, see :func:`ego_shift`.
            image_from_augmented: [B, N, 4, 4] augmented ego to augmented pixels times depth.
        """
        previous_map = None if previous_volume is None else self._previous_map(previous_volume, previous_flips)
        geometry = self.transformer.encoder.geometry(image_from_augmented, None if previous_map is None else shift)
        return StageSetup(previous_map, self.positional_encoding(bda), geometry)

    def displacement(self, moved: Tensor, yaw: Tensor, bda: Tensor) -> Tensor:
        """[B, 2] ``shift`` of :meth:`setup`.

        Args:
            moved: [B, 3] float64 ego motion since the previous frame in global axes, metres; 0 at starts.
            yaw: [B] float64 heading in radians.
            bda: [B, 4, 4] BEV augmentation.
        """
        shift = ego_shift(moved, yaw, self.extent, legacy_axes=self.legacy_shift_axes)
        return shift if self.legacy_shift_axes else shift * bda[:, [0, 1], [0, 1]]

    @full_precision
    def image_from_augmented(self, image_from_ego: Tensor, bda: Tensor) -> Tensor:
        """[B, N, 4, 4] ``image_from_augmented`` of :meth:`setup`, of that from the ego frame and the augmentation."""
        return image_from_ego @ (torch.linalg.inv(bda) if self.invert_bda else bda)[:, None]

    def _previous_map(self, volume: Tensor, flip: Tensor) -> Tensor:
        bev = height_mean(volume)
        if self.always_flip_previous:
            bev = bev.flip(2, 3)
        else:
            bev = torch.where(flip[:, 0, None, None, None], bev.flip(3), bev)
            bev = torch.where(flip[:, 1, None, None, None], bev.flip(2), bev)
        return bev.flatten(2).transpose(1, 2)
