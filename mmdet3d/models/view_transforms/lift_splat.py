"""Lift image features along depth and splat them into voxels (LSS, Philion and Fidler arXiv 2008.05711)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor

from mmdet3d.models.view_transforms.cost_volume import stereo_cost_volume
from mmdet3d.models.view_transforms.depth_net import DEPTHNET_KEYS, DepthNet
from mmdet3d.models.view_transforms.geometry import (
    CameraFrame,
    LiftGeometry,
    camera_vector,
    frustum_geometry,
    sweep_geometry,
)
from mmdet3d.ops import PoolOrder, bev_pool_v2, bev_pool_v2_stacked, frustum_cells, sort_by_cell
from mmdet3d.ops.plane_sweep import SweepGeometry
from mmdet3d.registry import NECKS, check_keys
from mmdet3d.structures import VoxelGrid, depth_bins
from mmdet3d.utils.beside import Beside
from mmdet3d.utils.precision import working_dtype


class PoolTargets(NamedTuple):
    """Voxel index [B, N, D, h, w] of every frustum point, and the points in the order of their voxels."""

    cells: Tensor
    order: PoolOrder


@NECKS.register_module()
class LSSForwardProjection(BaseModule):
    """Depth distribution and context of each pixel, lifted to a frustum and pooled into voxels.

    Args:
        grid_config: ``x``, ``y``, ``z`` as [low, high, cell] of the voxel grid and ``depth`` as [low, high, step] of
            the depth bins, metres.
        input_size: (H, W) of the network image.
        in_channels: Channels of the image feature.
        out_channels: Channels C of the context and of the volume.
        downsample: Stride of the image feature.
        depthnet_cfg: Options of :class:`DepthNet`.
        loss_depth_weight: Weight of the depth loss.
        truncate_toward_zero: See :func:`mmdet3d.ops.frustum_cells`.

    ``collapse_z``, ``accelerate``, ``sid``, ``with_cp``, ``with_depth_from_lidar`` are accepted with the values that
    the published configs use (False).
    """

    ignored_config_keys = frozenset({"return_context"})
    has_cost_volume = False

    def __init__(self, grid_config: Mapping, input_size: tuple[int, int], in_channels: int = 512,
                 out_channels: int = 64, downsample: int = 16, depthnet_cfg: Mapping | None = None,
                 loss_depth_weight: float = 3.0, collapse_z: bool = False, accelerate: bool = False, sid: bool = False,
                 with_cp: bool = False, with_depth_from_lidar: bool = False, truncate_toward_zero: bool = True,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        options = {"collapse_z": collapse_z, "accelerate": accelerate, "sid": sid,
                   "with_depth_from_lidar": with_depth_from_lidar}
        if wanted := [name for name, value in options.items() if value]:
            raise ValueError(f"{wanted} are not supported, set them to False")
        depthnet_cfg = depthnet_cfg or {}
        check_keys(depthnet_cfg, DEPTHNET_KEYS, "depthnet_cfg")
        check_keys(grid_config, ("x", "y", "z", "depth"), "grid_config")
        if depthnet_cfg.get("stereo", False) and not self.has_cost_volume:
            raise ValueError("depthnet_cfg.stereo=True needs the cost volume of LSSVStereoForwardProjection")
        num_bins = depth_bins(grid_config.get("depth"))
        self.grid = VoxelGrid.from_config(grid_config)
        self.input_size = tuple(input_size)
        self.in_channels, self.downsample = in_channels, downsample
        self.loss_depth_weight = loss_depth_weight
        self.truncate_toward_zero = truncate_toward_zero
        self.depth_range = tuple(float(v) for v in grid_config["depth"])
        # Rounding can give arange one value too many.
        self.register_buffer("depths", torch.arange(*self.depth_range, dtype=torch.float32)[:num_bins],
                             persistent=False)
        # Corner pixels of the feature map sit on the image's corner pixels.
        for name, length, count in zip(("rows", "columns"), self.input_size, self.feature_size, strict=True):
            self.register_buffer(name, torch.linspace(0, length - 1, count, dtype=torch.float32), persistent=False)
        self.depth_net = DepthNet(in_channels, in_channels, out_channels, num_bins, with_cp=with_cp, **depthnet_cfg)

    @property
    def feature_size(self) -> tuple[int, int]:
        """(h, w) of the feature map."""
        height, width = self.input_size
        return height // self.downsample, width // self.downsample

    def geometry(self, camera: CameraFrame, key_ego_from_camera: Tensor, bda: Tensor) -> LiftGeometry:
        """What :meth:`forward` needs of the cameras of a frame, on their device.

        Args:
            camera: Cameras of the frame.
            key_ego_from_camera: [B, N, 4, 4] camera poses for the camera vector.
            bda: [B, 4, 4] BEV augmentation.
        """
        return LiftGeometry(camera_vector(camera, key_ego_from_camera, bda), frustum_geometry(camera, bda),
                            sweep_geometry(camera, self.input_size) if self.has_cost_volume else None)

    def forward(self, feature: Tensor, geometry: LiftGeometry, stereo: Tensor | None = None,
                older_stereo: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Pool an image feature into the voxel grid.

        Args:
            feature: [B * N, in_channels, h, w].
            geometry: Cameras of the frame that ``feature`` was computed from.
            stereo, older_stereo: Not read: there for the stereo variant, which is called alike.

        Returns:
            volume [B, C, Z, Y, X]; depth probability [B * N, D, h, w]; context [B * N, C, h, w].
        """
        return self.lift_splat(feature, None, geometry, self.pool_targets(geometry))

    def lift_splat(self, feature: Tensor, matching: Tensor | None, geometry: LiftGeometry,
                   targets: Beside[PoolTargets], frames: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`forward`, with an optional stereo matching [B * N, D, h, w] for the depth.

        ``targets`` is :meth:`pool_targets` of the geometry. The samples are ``frames`` times B, frame after frame,
        whose volumes are joined to [B, frames * C, Z, Y, X]; more than one in the dtype of autocast.
        """
        logits, context = self.depth_net(feature, geometry.camera_vector.flatten(0, 1), matching)
        depth = logits.softmax(1)
        cells, order = targets.get()
        per_camera = cells.shape[:2]
        inputs = depth.unflatten(0, per_camera), context.unflatten(0, per_camera).permute(0, 1, 3, 4, 2), cells
        if frames == 1:
            volume = bev_pool_v2(*inputs, self.grid.size_zyx, order=order)
        else:
            volume = bev_pool_v2_stacked(*inputs, self.grid.size_zyx, frames, order=order, dtype=working_dtype(depth))
        return volume, depth, context

    def pool_targets(self, geometry: LiftGeometry) -> Beside[PoolTargets]:
        """Begin to find where the frustum points of a geometry are pooled, which needs no image."""
        def find() -> PoolTargets:
            cells = frustum_cells(geometry.frustum, self.columns, self.rows, self.depths, self.grid,
                                  truncate_toward_zero=self.truncate_toward_zero)
            return PoolTargets(cells, sort_by_cell(cells, self.grid.size_zyx))

        return Beside(find)


@NECKS.register_module()
@NECKS.register_module("LSSVStereoForwardPorjection")
class LSSVStereoForwardProjection(LSSForwardProjection):
    """Lift and splat whose depth also sees a plane-sweep cost volume between two frames (BEVDet-4D-Stereo).

    Args:
        cv_downsample: Stride of the stereo features; must be 4.
        one_channel_invalid_test: See :func:`stereo_cost_volume`.
        **kwargs: As :class:`LSSForwardProjection`.
    """

    has_cost_volume = True

    def __init__(self, *args, cv_downsample: int = 4, one_channel_invalid_test: bool = True, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if cv_downsample != 4:
            raise ValueError(f"cv_downsample must be 4, the stride of the stereo features, got {cv_downsample}")
        self.one_channel_invalid_test = one_channel_invalid_test

    def forward(self, feature: Tensor, geometry: LiftGeometry, stereo: Tensor, older_stereo: Tensor
                ) -> tuple[Tensor, Tensor, Tensor]:
        """As the parent's, with the stereo features [B * N, C4, H4, W4] of this frame and of the frame before."""
        return self.lift_splat(feature, self.matching(stereo, older_stereo, geometry.sweep), geometry,
                               self.pool_targets(geometry))

    def matching(self, stereo: Tensor, older_stereo: Tensor, geometry: SweepGeometry) -> Tensor:
        """[B * N, D, h, w] what the depth net sees of the stereo features of a frame and of the frame before."""
        volume = stereo_cost_volume(stereo, older_stereo, geometry, self.depths, invalid_penalty=self.depth_net.bias,
                                    one_channel_invalid_test=self.one_channel_invalid_test)
        return self.depth_net.cost_volumn_net(volume)
