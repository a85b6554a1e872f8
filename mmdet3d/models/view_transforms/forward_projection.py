"""Images to multi-scale voxel features: the coarse encoder of STCOcc (BEVDet-4D-Stereo, arXiv 2203.17054)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn

from mmdet3d.interfaces import ImageBackbone, StereoStages, offers
from mmdet3d.models.view_transforms.feature_reuse import CACHED, NO_REUSE, FeatureReuse
from mmdet3d.models.view_transforms.geometry import CameraFrame, LiftGeometry, camera_frames
from mmdet3d.registry import NECKS, ConfigError, build
from mmdet3d.structures import CameraInputs, FrameCache
from mmdet3d.utils.normalise import normalise_images
from mmdet3d.utils.precision import full_precision

PLACE = "model.forward_projection"
STEREO_STRIDE = 4


class ForwardFeatures(NamedTuple):
    """What the forward projection hands to the voxel stages.

    Attributes:
        volumes: Voxel features, finest first, each [B, C, Z_s, Y_s, X_s].
        depth: [B * N, D, h, w] depth probability of the key frame.
        context: [B * N, C, h, w] image features of the key frame for the cross attention.
        key_features: What the next sample needs of this one's key frame, if it is to be remembered.
    """

    volumes: list[Tensor]
    depth: Tensor
    context: Tensor
    key_features: KeyFeatures | None = None


class KeyFeatures(NamedTuple):
    """Stereo and neck feature of the key frame, and its stereo matching; see :class:`FrameCache`."""

    stereo: Tensor
    neck: Tensor
    matching: Tensor | None


class FrameFeatures(NamedTuple):
    """Features of the pictures of one frame.

    Attributes:
        stereo: [B * N, C4, H4, W4] first output of the backbone.
        neck: [B * N, C, h, w] output of the neck; None for a frame that is only matched with.
    """

    stereo: Tensor
    neck: Tensor | None


@NECKS.register_module()
class BEVDetStereoForwardProjection(BaseModule):
    """Backbone, neck, stereo depth, lift-splat and 3D encoder over a key frame and the frame before it.

    A third, still older frame only serves as the stereo partner of the second. Everything but the key frame is
    computed without gradient (but, in training, with batch statistics, as in the reference implementation).

    Args:
        img_backbone: Config of the image backbone, see :class:`~mmdet3d.interfaces.ImageBackbone`, whose first output
            is the stereo feature.
        img_neck: Config of the image neck, which takes the other outputs.
        img_view_transformer: Config of the view transform.
        img_bev_encoder_backbone: Config of the 3D encoder.
        num_adj: Number of earlier frames that are lifted; 1 is supported.
        adjust_channel: Channels of the context for the cross attention; None keeps the view transform's.
        return_intermediate: Must be True: the stages need all volumes of the 3D encoder.
        stereo_feat_index: Residual stage whose output is the stereo feature; 0 is supported.
        with_prev: False feeds zeros for the earlier frame's volume.
        num_cams: Cameras N.
        legacy_adjacent_extrinsics: The camera vector of the earlier frame holds the key frame's extrinsics, as the
            released weights expect; False: its own.
        pre_process, img_bev_encoder_neck, use_grid_mask, cv_downsample: Must keep their defaults.
    """

    ignored_config_keys = frozenset({
        "align_after_view_transfromation", "img_context_idx", "pretrained", "train_cfg", "test_cfg"})

    def __init__(self, img_backbone: Mapping, img_neck: Mapping, img_view_transformer: Mapping,
                 img_bev_encoder_backbone: Mapping, num_adj: int = 1, adjust_channel: int | None = None,
                 return_intermediate: bool = True, stereo_feat_index: int = 0, with_prev: bool = True,
                 num_cams: int = 6, legacy_adjacent_extrinsics: bool = True, pre_process: Mapping | None = None,
                 img_bev_encoder_neck: Mapping | None = None, use_grid_mask: bool = False, cv_downsample: int = 4,
                 init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if cv_downsample != STEREO_STRIDE:
            raise ValueError("cv_downsample must be 4, the stride of the stereo features, got "
                             f"{cv_downsample}")
        if num_adj != 1 or stereo_feat_index != 0 or not return_intermediate:
            raise ValueError("supported are num_adj=1, stereo_feat_index=0, return_intermediate=True; got "
                             f"{num_adj}, {stereo_feat_index}, {return_intermediate}")
        if pre_process is not None or img_bev_encoder_neck is not None or use_grid_mask:
            raise ValueError("pre_process, img_bev_encoder_neck and use_grid_mask are not supported; the published "
                             "models do not set them")
        self.num_cams = num_cams
        self.num_frames = num_adj + 2
        self.with_prev = with_prev
        self.legacy_adjacent_extrinsics = legacy_adjacent_extrinsics
        self.img_backbone = build(img_backbone, "img_backbone", ImageBackbone, StereoStages)
        self.img_neck = build(img_neck, "img_neck")
        self.img_view_transformer = build(img_view_transformer, "img_view_transformer")
        self.img_bev_encoder_backbone = build(img_bev_encoder_backbone, "img_bev_encoder_backbone")
        if adjust_channel is not None:
            self.adjust_channel_conv = nn.Conv2d(img_view_transformer["out_channels"], adjust_channel, 1)

    @torch.no_grad()
    @full_precision
    def geometry(self, inputs: CameraInputs) -> LiftGeometry:
        """Geometry of the lifted frames, on the CPU.

        Returns:
            That of the L lifted frames one after the other, the key frame **last**, as L * B samples.
        """
        cameras = camera_frames(inputs)
        lifted = [cameras[1], cameras[0]] if self.with_prev else [cameras[0]]
        poses = [(cameras[0] if self.legacy_adjacent_extrinsics else camera).key_ego_from_camera for camera in lifted]
        return self.img_view_transformer.geometry(CameraFrame.stack(lifted), torch.cat(poses),
                                                  inputs.bda.repeat(len(lifted), 1, 1))

    def newest_alone(self, reuse: FeatureReuse) -> bool:
        """True if only the images of the newest frame need to go through the network."""
        return self._frames_to_compute(reuse, 2 if self.with_prev else 1) == ([0], [])

    def forward(self, images: Tensor, geometry: LiftGeometry, reuse: FeatureReuse = NO_REUSE,
                cache: FrameCache | None = None, newest: FrameFeatures | None = None) -> ForwardFeatures:
        """Voxel features, depth and context of one sample per batch slot.

        Args:
            images: [B, N, F, 3, H, W], F = 3 frames, newest first; see :class:`CameraInputs`.
            geometry: That of the lifted frames, see :meth:`geometry`, on the device of the images.
            reuse: In evaluation without gradient: which features are there already.
            cache: Where those of the sample before are.
            newest: :meth:`frame_features` of the images of the newest frame (with B and N as one axis), for evaluation,
                if they were computed before; only where :meth:`newest_alone` says so. The images are not read then.
        """
        frames = [frame.flatten(0, 1) for frame in images.unbind(2)]  # F x [B * N, 3, H, W]
        lift = self._lift_one_by_one if self.training or torch.is_grad_enabled() else self._lift_together
        volume, depth, context, features = lift(frames, geometry, reuse, cache, newest)
        volumes = self.img_bev_encoder_backbone(volume)
        if hasattr(self, "adjust_channel_conv"):
            context = self.adjust_channel_conv(context)
        return ForwardFeatures(volumes, depth, context, features)

    def _lift_one_by_one(self, images: list[Tensor], geometry: LiftGeometry, *_: Any
                         ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Frame after frame, the key frame with gradient; in training each with batch statistics of its own."""
        batch = len(images[0]) // self.num_cams
        with torch.no_grad():
            oldest_stereo = self._backbone_outputs(images[2], 0)[0] if self.with_prev else None
            earlier = self.frame_features(images[1])
            earlier_volume = None
            if self.with_prev:
                earlier_volume = self.img_view_transformer(earlier.neck, geometry.select(0, batch), earlier.stereo,
                                                           oldest_stereo)[0]
        key = self.frame_features(images[0])
        volume, depth, context = self.img_view_transformer(
            key.neck, geometry.select(len(geometry.camera_vector) - batch, batch), key.stereo, earlier.stereo)
        if earlier_volume is None:
            earlier_volume = torch.zeros_like(volume)
        return torch.cat([earlier_volume, volume], 1), depth, context, None

    def _lift_together(self, images: list[Tensor], geometry: LiftGeometry, reuse: FeatureReuse,
                       cache: FrameCache | None, newest: FrameFeatures | None
                       ) -> tuple[Tensor, Tensor, Tensor, KeyFeatures | None]:
        """Both frames in one pass through the depth net, with what is there already."""
        transform, entries = self.img_view_transformer, len(images[0])
        targets = transform.pool_targets(geometry)
        lifted = len(geometry.camera_vector) * self.num_cams // entries  # frames, the key frame last
        frames = self._features(images, reuse, cache, lifted, newest)
        matches = self._matches(frames, geometry, reuse, cache, lifted)
        neck = torch.cat([frames[f].neck for f in reversed(range(lifted))])
        matching = torch.cat(matches[::-1]) if matches else None
        volume, depth, context = transform.lift_splat(neck, matching, geometry, targets, lifted)
        if lifted == 1:
            volume = torch.cat([torch.zeros_like(volume), volume], 1)
        features = KeyFeatures(*frames[0], matches[0] if matches else None) if reuse.remember else None
        return volume, depth[-entries:], context[-entries:], features

    def _frames_to_compute(self, reuse: FeatureReuse, lifted: int) -> tuple[list[int], list[int]]:
        """Frames that need both features, and those that are only matched with, which need the stereo feature."""
        stereo = self.img_view_transformer.has_cost_volume
        return ([f for f in range(lifted) if reuse.frames[f] == f],
                [f for f in range(lifted, lifted + 1)
                 if stereo and reuse.frames[f] == f and reuse.pairs[f - 1] == f - 1])

    def _features(self, images: list[Tensor], reuse: FeatureReuse, cache: FrameCache | None, lifted: int,
                  newest: FrameFeatures | None) -> list[FrameFeatures]:
        """Features of the frames, newest first; of a frame that is only matched with, the stereo feature alone."""
        full, partial = self._frames_to_compute(reuse, lifted) if newest is None else ([], [])
        batches = [full + partial] if images[0].is_cuda else [[f] for f in full + partial]
        computed = {CACHED: None if cache is None else FrameFeatures(cache.stereo, cache.neck), 0: newest}
        for batch in filter(None, batches):
            features = self._batch_features([images[f] for f in batch], sum(f in full for f in batch))
            computed.update(zip(batch, features, strict=True))
        return [computed.get(source) for source in reuse.frames[: lifted + 1]]

    def _batch_features(self, images: list[Tensor], full: int) -> list[FrameFeatures]:
        """Features of frames in one pass, the neck for the first ``full`` ones."""
        entries = len(images[0])
        stereo, deep = self._backbone_outputs(torch.cat(images) if len(images) > 1 else images[0], full * entries)
        necks = self._neck_feature(deep).split(entries) if full else ()
        return [FrameFeatures(*features) for features in zip_longest(stereo.split(entries), necks)]

    def _matches(self, frames: list[FrameFeatures], geometry: LiftGeometry, reuse: FeatureReuse,
                 cache: FrameCache | None, lifted: int) -> list[Tensor]:
        """Stereo matching of each lifted frame, newest first; none without stereo."""
        if geometry.sweep is None:
            return []
        batch, matches = len(geometry.camera_vector) // lifted, []
        for f, source in enumerate(reuse.pairs[:lifted]):
            if source == CACHED:
                matches.append(cache.matching)
            elif source < f:
                matches.append(matches[source])
            else:
                sweep = geometry.select((lifted - 1 - f) * batch, batch).sweep
                matches.append(self.img_view_transformer.matching(frames[f].stereo, frames[f + 1].stereo, sweep))
        return matches

    def frame_features(self, images: Tensor) -> FrameFeatures:
        """Stereo feature (first backbone output) and neck feature of images [M, 3, H, W], pixels or normalised."""
        stereo, deep = self._backbone_outputs(images, len(images))
        return FrameFeatures(stereo, self._neck_feature(deep))

    def _backbone_outputs(self, images: Tensor, count: int) -> tuple[Tensor, Sequence[Tensor]]:
        """Stereo feature of images [M, 3, H, W], pixels or not, and the other outputs for the first ``count`` ones.

        Raises:
            ConfigError: the backbone gives something else than feature maps of which the first has stride 4.
        """
        images = normalise_images(images)
        name, partial = type(self.img_backbone).__name__, count < len(images)
        if offers(self.img_backbone, StereoStages):
            stereo = self.img_backbone.first_stage(images)
            deep = self.img_backbone.later_stages(stereo[:count] if partial else stereo) if count else ()
        else:
            outputs = self.img_backbone(images)
            if not isinstance(outputs, list | tuple) or len(outputs) < 2 or any(x.dim() != 4 for x in outputs):
                found = [tuple(x.shape) for x in outputs] if isinstance(outputs, list | tuple) else type(outputs)
                raise ConfigError(f"{PLACE}.img_backbone: {name} must give a tuple of feature maps [M, C, h, w], the "
                                  f"stereo feature and at least one for the neck, but gives {found}")
            stereo, deep = outputs[0], [x[:count] if partial else x for x in outputs[1:]]
        expected = tuple(side // STEREO_STRIDE for side in images.shape[-2:])
        if tuple(stereo.shape[-2:]) != expected:
            raise ConfigError(f"{PLACE}.img_backbone: the first output of {name}, the stereo feature, must have "
                              f"stride {STEREO_STRIDE}, (h, w) = {expected} here, but has "
                              f"{tuple(stereo.shape[-2:])}; see its out_indices")
        return stereo, deep

    def _neck_feature(self, deep: Sequence[Tensor]) -> Tensor:
        """[M, C, h, w] first output of the neck for the backbone's outputs but the first.

        Raises:
            ConfigError: the neck does not fit the backbone or the view transform.
        """
        found, taken = [x.shape[1] for x in deep], getattr(self.img_neck, "in_channels", None)
        if isinstance(taken, list | tuple) and list(taken) != found:
            raise ConfigError(f"{PLACE}.img_neck.in_channels is {list(taken)}, but the outputs of "
                              f"{type(self.img_backbone).__name__} after the first have the channels {found}")
        neck, transform = self.img_neck(deep), self.img_view_transformer
        neck = neck[0] if isinstance(neck, list | tuple) else neck
        expected = (transform.in_channels, *transform.feature_size)
        if tuple(neck.shape[1:]) != expected:
            raise ConfigError(f"{PLACE}.img_neck: the first output of {type(self.img_neck).__name__} must have the "
                              f"view transform's in_channels and (h, w), {expected}, but has {tuple(neck.shape[1:])}")
        return neck
