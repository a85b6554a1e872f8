"""STCOcc: sparse spatial-temporal cascade renovation for 3D occupancy and scene flow prediction.

Liao et al., CVPR 2025, arXiv 2504.19749.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d.interfaces import AuxiliaryHead, FlowHead, OccupancyHead, TemporalFusion
from mmdet3d.models.attention.backward_projection import height_mean
from mmdet3d.models.attention.occupancy_predictor import occupied_probability
from mmdet3d.models.detectors.base import BaseDetector
from mmdet3d.models.detectors.consistency import check_consistency
from mmdet3d.models.detectors.frame_plan import FramePlan, stage_geometry
from mmdet3d.models.detectors.memory_check import MemoryLayout, check_memory
from mmdet3d.models.detectors.prediction import Prediction, StagePrecompute, result_dict
from mmdet3d.models.detectors.stage_configs import stage_configs
from mmdet3d.models.losses import VoxelLosses, depth_loss, flow_loss
from mmdet3d.models.view_transforms import ForwardFeatures
from mmdet3d.models.view_transforms.forward_projection import FrameFeatures, KeyFeatures
from mmdet3d.models.view_transforms.geometry import LiftGeometry
from mmdet3d.ops import row_argmax, upsample_add
from mmdet3d.registry import DETECTORS, ConfigError, build
from mmdet3d.structures import CameraInputs, FrameCache, FrameMeta, TemporalMemory
from mmdet3d.utils.beside import Beside
from mmdet3d.utils.files import prediction_path, save_prediction
from mmdet3d.utils.memory_format import use_channels_last


@DETECTORS.register_module()
class STCOcc(BaseDetector):
    """Six cameras in, semantic occupancy and flow out.

    Args:
        forward_projection: Config of the coarse encoder.
        backward_projection: Config of the finest stage's backward projection; the coarser ones are derived.
        occupancy_head: Config of the occupancy head.
        temporal_fusion: Config of the temporal fusion, shared by the stages but for the sizes; None for no memory.
        flow_head: Config of the flow head, or None.
        auxiliary_heads: Configs of heads that add losses, see :class:`~mmdet3d.interfaces.AuxiliaryHead`.
        num_stage: Stages S.
        backward_num_layer: Transformer layers per stage, coarsest first.
        history_frame_num: History slots per stage, finest first.
        train_top_k: Foreground voxels per stage, finest first.
        val_top_k: Foreground voxels in evaluation; the reference never reads them when ``train_top_k`` is set.
        train_top_k_in_eval: Use ``train_top_k`` in evaluation too, as the reference does. False: ``val_top_k``.
        intermediate_pred_loss_weight: Loss weights of the S + 1 scales, full resolution first.
        class_weights: K weights of the focal loss.
        empty_idx: Index of the class "free".
        foreground_idx: Classes with flow.
        flow_loss_weight: Weight of the flow loss.
        save_results: Whether :meth:`simple_test` writes each sample to ``results/<scene>/<token>.npz``.
        channels_last: Keep convolution weights in PyTorch's channels-last memory format, and so the activations; shapes
            and values of the state dict are the same. Faster on CPUs.
    """

    ignored_config_keys = frozenset({
        "class_weights_group", "background_idx", "train_flow", "bev_w", "bev_h", "bev_z"})

    def __init__(self, forward_projection: Mapping, backward_projection: Mapping, occupancy_head: Mapping,
                 temporal_fusion: Mapping | None = None, flow_head: Mapping | None = None, num_stage: int = 2,
                 backward_num_layer: Sequence[int] = (1, 2), history_frame_num: Sequence[int] | None = None,
                 train_top_k: Sequence[int] | None = None, val_top_k: Sequence[int] | None = None,
                 train_top_k_in_eval: bool = True, intermediate_pred_loss_weight: Sequence[float] = (1.0, 0.5, 0.25),
                 class_weights: Sequence[float] | None = None, empty_idx: int = 17,
                 foreground_idx: Sequence[int] | None = None, flow_loss_weight: float = 0.8, save_results: bool = False,
                 channels_last: bool = True, auxiliary_heads: Sequence[Mapping] = (), use_ms_feats: bool = False,
                 pretrained: Any = None, train_cfg: Any = None, test_cfg: Any = None, init_cfg: Any = None) -> None:
        super().__init__(init_cfg)
        if pretrained is not None:
            raise ConfigError("model.pretrained is not supported; set load_from in the config")
        if use_ms_feats:
            raise ConfigError("model.use_ms_feats=True is not supported; the published models set it to False")
        self.num_stage = num_stage
        self.train_cfg, self.test_cfg, self.save_results = train_cfg, test_cfg, save_results
        self.forward_projection = build(forward_projection, "forward_projection")
        stages = stage_configs(backward_projection, num_stage, backward_num_layer)
        self.backward_projection_list = nn.ModuleList(
            build(cfg, f"backward_projection (stage {s})") for s, cfg in enumerate(stages))
        self._build_fusion(temporal_fusion, history_frame_num, train_top_k, val_top_k, train_top_k_in_eval)
        self.occupancy_head = build(occupancy_head, "occupancy_head", OccupancyHead)
        self.flow_head = None if flow_head is None else build(flow_head, "flow_head", FlowHead)
        self.auxiliary_heads = nn.ModuleList(
            build(cfg, f"auxiliary_heads[{i}]", AuxiliaryHead) for i, cfg in enumerate(auxiliary_heads))
        finest = self.forward_projection.img_view_transformer.grid
        self.grids = tuple(finest.coarsen(2**s) for s in range(num_stage))
        check_consistency(self, stages, {
            "empty_idx": empty_idx, "foreground_idx": foreground_idx, "class_weights": class_weights,
            "intermediate_pred_loss_weight": intermediate_pred_loss_weight,
            "flow_head.foreground_idx": None if flow_head is None else flow_head.get("foreground_idx")})
        size_x, size_y, _ = finest.size_xyz
        self.voxel_losses = VoxelLosses(bev_h=2 * size_y, bev_w=2 * size_x, empty_index=empty_idx,
                                        class_weights=class_weights, scale_weights=intermediate_pred_loss_weight)
        self.foreground_idx = tuple(foreground_idx or ())
        self.flow_loss_weight = flow_loss_weight
        self.memory: TemporalMemory | None = None
        if channels_last:
            use_channels_last(self)

    def _build_fusion(self, config: Mapping | None, frames: Sequence[int] | None, train_top_k: Sequence[int] | None,
                      val_top_k: Sequence[int] | None, train_top_k_in_eval: bool) -> None:
        self.top_k = {True: train_top_k or val_top_k, False: train_top_k if train_top_k_in_eval else val_top_k}
        self.top_k[False] = self.top_k[False] or self.top_k[True]
        self.temporal_fusion_list = nn.ModuleList()
        if config is None:
            return
        for name, values in (("history_frame_num", frames), ("train_top_k or val_top_k", self.top_k[True]),
                             ("train_top_k or val_top_k", self.top_k[False])):
            if values is None or len(values) != self.num_stage:
                raise ConfigError(f"model.{name} must have one entry per stage ({self.num_stage}), got {values}")
        for s in range(self.num_stage):
            cfg = {**config, "history_num": frames[s], "top_k": self.top_k[True][s]}
            self.temporal_fusion_list.append(build(cfg, f"temporal_fusion (stage {s})", TemporalFusion))

    # ---- forward passes -------------------------------------------------------------------------------------------

    def camera_inputs(self, img_inputs: Sequence[Tensor]) -> CameraInputs:
        """Check and name the six tensors of an mmdet-style batch.

        Args:
            img_inputs: Images [B, N * 3, 3, H, W] camera-major, normalised floats or uint8 pixels; sensor2ego,
                ego2global, intrinsics, post_aug [B, 3 * N, 4, 4] frame-major; bda [B, 4, 4]. The matrices may stay on
                the CPU, where they are read.

        Raises:
            ValueError: they have the wrong shapes.
        """
        network = self.forward_projection
        return CameraInputs.from_img_inputs(img_inputs, network.num_cams, network.num_frames,
                                            network.img_view_transformer.input_size)

    def frame_meta(self, img_metas: Sequence[Mapping]) -> FrameMeta:
        """Check and stack the meta data of an mmdet-style batch, see :meth:`FrameMeta.from_metas`."""
        return FrameMeta.from_metas(img_metas, num_cams=self.forward_projection.num_cams)

    def run(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping], memory: TemporalMemory | None = None
            ) -> tuple[Prediction, ForwardFeatures]:
        """Run the whole network on one frame: prediction, and the features of the coarse encoder.

        Args:
            img_inputs: See :meth:`camera_inputs`.
            img_metas: B dicts, see :class:`FrameMeta`.
            memory: Of the previous frame; None at first.

        Raises:
            ValueError: ``img_inputs`` or ``img_metas`` have the wrong shapes, or ``memory`` does not fit.
        """
        inputs = self.camera_inputs(img_inputs)
        plan = self.plan(inputs, self.frame_meta(img_metas), memory, inputs.images.device)
        return self.compute(inputs.images, plan.to(inputs.images.device), memory)

    def plan(self, inputs: CameraInputs, meta: FrameMeta, memory: TemporalMemory | None,
             device: torch.device | str = "cpu") -> FramePlan:
        """Do the host's part of a frame: checks, and all small-matrix work.

        Args:
            inputs: Its matrices are read; the images are not.
            meta: Of the same samples.
            memory: Of the previous frame; None at first.
            device: Where the plan will go.

        Returns:
            The plan on the CPU, in pinned memory if ``device`` is a GPU.

        Raises:
            ValueError: the numbers of samples differ, ``memory`` does not fit, or a sequence goes on that it does not
                follow.
        """
        if len(meta.starts) != len(inputs.bda):
            raise ValueError(f"expected one dict of img_metas per sample, got img_inputs of {len(inputs.bda)} samples "
                             f"and {len(meta.starts)} img_metas")
        return self.plan_stages(meta, inputs.bda, memory, device, self.forward_projection.geometry(inputs))

    def plan_stages(self, meta: FrameMeta, bda: Tensor, memory: TemporalMemory | None,
                    device: torch.device | str = "cpu", lifts: LiftGeometry | None = None) -> FramePlan:
        """Do the part of :meth:`plan` that :meth:`cascade` needs.

        Args:
            meta: See :meth:`plan`.
            bda: [B, 4, 4] BEV augmentation on the CPU.
            memory: See :meth:`plan`.
            device: See :meth:`plan`.
            lifts: Geometry of the lifted frames, to be packed with it.

        Raises:
            ValueError: see :meth:`plan`.
        """
        check_memory(memory, meta, self._memory_layout(), device)
        stages = stage_geometry(meta, bda, memory, self.backward_projection_list[0], self.temporal_fusion_list,
                                self.grids)
        return FramePlan.pack(lifts, stages, meta, None if memory is None else memory.features,
                              pinned=torch.device(device).type == "cuda")

    def compute(self, images: Tensor, plan: FramePlan, memory: TemporalMemory | None,
                histories_out: Sequence[Tensor] | None = None, newest: FrameFeatures | None = None
                ) -> tuple[Prediction, ForwardFeatures]:
        """Do the device's part of a frame.

        Args:
            images: [B, N, 3, 3, H, W], see :class:`CameraInputs`.
            plan: Of the frame, on the device of the images.
            memory: Of the previous frame; None at first.
            histories_out: Tensors that the new memory's histories are written to, in memory of their own. A backward
                pass reads them too. Default: new ones.
            newest: Features of the newest images, see ``forward`` of :class:`BEVDetStereoForwardProjection`.
        """
        stages = self.precompute(plan, memory, histories_out)
        features = self.forward_projection(images, plan.lifts, plan.reuse, None if memory is None else memory.features,
                                           newest)
        return self.cascade(features, plan, memory, stages), features

    def precompute(self, plan: FramePlan, memory: TemporalMemory | None, histories_out: Sequence[Tensor] | None = None
                   ) -> list[Beside[StagePrecompute]]:
        """Begin the part of the stages, finest first, that needs no features; arguments as for :meth:`compute`.

        Each stage's part runs when it is asked for, or beside the image network where a CUDA graph is captured.
        """
        # In a lane of their own, beside that of the points to pool.
        return [Beside(lambda s=s: self._precompute_stage(s, plan, memory, histories_out), lane=1)
                for s in range(self.num_stage)]

    def _precompute_stage(self, s: int, plan: FramePlan, memory: TemporalMemory | None,
                          histories_out: Sequence[Tensor] | None) -> StagePrecompute:
        geometry = plan.stages
        setup = self.backward_projection_list[s].setup(
            None if memory is None else memory.newest_volume(s), geometry.previous_flips, geometry.bda, geometry.shift,
            geometry.image_from_augmented)
        if not self.temporal_fusion_list:
            return StagePrecompute(setup, None)
        return StagePrecompute(setup, self.temporal_fusion_list[s].prepare(
            None if memory is None else memory.histories[s], self.grids[s], plan.meta.starts,
            geometry.index_matrices[s], None if histories_out is None else histories_out[s]))

    def cascade(self, features: ForwardFeatures, plan: FramePlan, memory: TemporalMemory | None,
                stages: Sequence[Beside[StagePrecompute]] | None = None) -> Prediction:
        """Run stages and heads, coarse to fine.

        Args:
            features: Volumes, depth [B * N, D, h, w] and context [B * N, C, h, w] of the coarse encoder.
            plan: The frame's plan, on the device of the features.
            memory: Of the previous frame, as it was when the plan was made.
            stages: Of :meth:`precompute`; default: begun here.
        """
        stages = self.precompute(plan, memory) if stages is None else stages
        geometry, batch = plan.stages, len(plan.bda)
        context, depth = (x.unflatten(0, (batch, -1)) for x in (features.context, features.depth))
        logits, coarser, stage_logits, histories = None, None, [], []
        for s in reversed(range(self.num_stage)):
            volume = features.volumes[s]
            volume, mean = (volume, height_mean(volume)) if coarser is None else upsample_add(volume, coarser)
            setup, past = stages[s].get()
            bev, stage = self.backward_projection_list[s](mean, context, depth, logits, geometry.start_mask, setup)
            logits = stage.detach()
            occupied = occupied_probability(logits).permute(0, 3, 2, 1)  # [B, Z, Y, X]
            # In the dtype of the volume, which under autocast is that of the convolutions.
            volume = torch.addcmul(volume, bev[:, :, None].to(volume.dtype), occupied[:, None].to(volume.dtype))
            if past is not None:
                volume, history = self.temporal_fusion_list[s](volume, logits, occupied, past, self.grids[s],
                                                               top_k=self.top_k[self.training][s])
                histories.append(history)
            stage_logits.append(stage)
            coarser = volume
        semantic_logits, flow = self._heads(volume, logits, geometry.noise_seeds)
        return Prediction(semantic_logits, flow, tuple(reversed(stage_logits)), volume,
                          self._remember(histories[::-1], plan, features.key_features))

    def _heads(self, volume: Tensor, logits: Tensor, noise_seeds: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Occupancy logits and flow, of the fused volume and the logits of the finest stage."""
        if self.flow_head is None:
            return self.occupancy_head(volume, logits), None
        features = Beside(lambda: self.flow_head.features(volume))
        semantic_logits = self.occupancy_head(volume, logits)
        return semantic_logits, self.flow_head(volume, semantic_logits, noise_seeds, features)

    def _memory_layout(self) -> MemoryLayout:
        fusions = self.temporal_fusion_list
        sizes = tuple(grid.size_zyx for grid in self.grids) if fusions else ()
        return MemoryLayout(sizes, tuple(fusion.history_num for fusion in fusions),
                            fusions[0].channels if fusions else 0)

    def _remember(self, histories: list[Tensor], plan: FramePlan, key: KeyFeatures | None) -> TemporalMemory | None:
        if not histories:
            return None
        features = None
        if key is not None:
            features = FrameCache(tuple(keys[:2] for keys in plan.meta.image_keys), *key, plan.key_sweep)
        return TemporalMemory(
            histories=tuple(histories), sizes=tuple(grid.size_zyx for grid in self.grids),
            channels=self.temporal_fusion_list[0].channels, bda=plan.bda,
            sequence_ids=plan.sequence_ids, ego_translation=plan.meta.ego_translation,
            features=features)

    # ---- training -------------------------------------------------------------------------------------------------

    def forward_train(self, img_metas: Sequence[Mapping], img_inputs: Sequence[Tensor], gt_depth: Tensor,
                      voxel_semantics: Tensor, voxel_flows: Tensor | None = None, **targets: Any) -> dict[str, Tensor]:
        """Losses of a batch; continues from, and replaces, ``self.memory``.

        Args:
            img_metas: B dicts, see :class:`FrameMeta`.
            img_inputs: The six input tensors, see :meth:`camera_inputs`.
            gt_depth: [B, N, H, W] depth of lidar points in metres, 0 where there is none.
            voxel_semantics: [B, X, Y, Z] class of each voxel, 255 to ignore.
            voxel_flows: [B, X, Y, Z, 2] m/s; needed with a flow head.
            **targets: ``voxel_semantics_1_2``, ``_1_4``, ... of the coarser scales, one per stage. Points, boxes and
                labels may be there and are ignored.

        Raises:
            ValueError: a target is missing or has another shape; the memory is as before then.
        """
        self.check_targets(len(img_metas), voxel_semantics, voxel_flows, **targets)
        prediction, features = self.run(img_inputs, img_metas, self.memory)
        self.memory = prediction.memory  # before the losses, which need the room that the former memory took
        return self.losses(prediction, features.depth, gt_depth, voxel_semantics, voxel_flows, **targets)

    def losses(self, prediction: Prediction, depth: Tensor, gt_depth: Tensor, voxel_semantics: Tensor,
               voxel_flows: Tensor | None = None, **targets: Any) -> dict[str, Tensor]:
        """Losses of a prediction with depth probability [B * N, D, h, w]; targets as :meth:`forward_train`."""
        coarser = self.check_targets(len(voxel_semantics), voxel_semantics, voxel_flows, **targets)
        transform = self.forward_projection.img_view_transformer
        losses = {"loss_depth": depth_loss(depth, gt_depth, transform.downsample, transform.depth_range,
                                           transform.loss_depth_weight)}
        losses.update(self.voxel_losses([prediction.semantic_logits, *prediction.stage_logits],
                                        [voxel_semantics, *coarser]))
        if prediction.flow is not None:
            losses["loss_flow"] = flow_loss(prediction.flow, voxel_flows, voxel_semantics, self.foreground_idx,
                                            self.flow_loss_weight)
        targets.update(gt_depth=gt_depth, voxel_semantics=voxel_semantics, voxel_flows=voxel_flows)
        for i, head in enumerate(self.auxiliary_heads):
            more = head.loss(prediction, targets)
            if doubled := sorted(losses.keys() & more):
                raise ValueError(f"model.auxiliary_heads[{i}]: {type(head).__name__} gives {doubled}, which are there")
            losses.update(more)
        return losses

    def check_targets(self, batch: int, voxel_semantics: Tensor, voxel_flows: Tensor | None = None, **targets: Any
                      ) -> list[Tensor]:
        """The coarser scales' targets, finest first. Arguments as for :meth:`forward_train`, of ``batch`` samples.

        Raises:
            ValueError: a target is missing or has another shape.
        """
        names = [f"voxel_semantics_1_{2 ** (s + 1)}" for s in range(self.num_stage)]
        if missing := [name for name in names if targets.get(name) is None]:
            raise ValueError(f"training needs {missing}; got {sorted(targets)}")
        if self.flow_head is not None and voxel_flows is None:
            raise ValueError("training needs voxel_flows, because the model has a flow head")
        coarser = [targets[name] for name in names]
        sizes = [tuple(2 * n for n in self.grids[0].size_xyz), *(grid.size_xyz for grid in self.grids)]
        for name, target, size in zip(["voxel_semantics", *names], [voxel_semantics, *coarser], sizes, strict=True):
            if tuple(target.shape) != (batch, *size):
                raise ValueError(f"{name} must have the shape {[batch, *size]} [B, X, Y, Z], got {list(target.shape)}")
        return coarser

    # ---- inference ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Turn logits into labels, on their device, which is not waited for.

        Returns:
            Classes uint8 [B, X, Y, Z]; flow float16 [B, X, Y, Z, 2] m/s where the class moves, 0 elsewhere.
        """
        # The class of the greatest logit, which is that of the greatest probability.
        semantics = row_argmax(prediction.semantic_logits)
        if prediction.flow is None:
            flow = torch.zeros((*semantics.shape, 2), dtype=torch.float16, device=semantics.device)
        else:
            flow = (prediction.flow * self.flow_head.foreground(semantics)[..., None]).half()
        return semantics, flow

    def forward_test(self, img_metas: Sequence, img_inputs: Sequence, points: Sequence | None = None, **options: Any
                     ) -> list[dict[str, Any]]:
        """As the test loop calls it: every argument wrapped in a list with one augmentation.

        Raises:
            ValueError: there is more than one test-time augmentation.
        """
        points = [None] if points is None else points
        if not len(img_metas) == len(img_inputs) == len(points) == 1:
            raise ValueError(f"exactly one test-time augmentation is supported, got {len(img_metas)} img_metas, "
                             f"{len(img_inputs)} img_inputs and {len(points)} points")
        return self.simple_test(points[0], img_metas[0], img_inputs=img_inputs, **options)

    def simple_test(self, points: Any, img_metas: Sequence[Mapping], img: Any = None,
                    img_inputs: Sequence | None = None, rescale: bool = False, **ignored: Any) -> list[dict[str, Any]]:
        """Result of a batch as a list with one dict; continues from, and replaces, ``self.memory``.

        Args:
            points: Not read.
            img_metas: B dicts, see :class:`FrameMeta`.
            img: Not read.
            img_inputs: The six input tensors, see :meth:`camera_inputs`, alone or as the only entry of a list.
            rescale: Not read, like any other keyword.

        Raises:
            ValueError: ``img_inputs`` is missing or does not fit.
        """
        if not img_inputs:
            raise ValueError("simple_test needs img_inputs, the six input tensors")
        if len(img_inputs) == 1:
            img_inputs = img_inputs[0]
        prediction, _ = self.run(img_inputs, img_metas, self.memory)
        self.memory = prediction.memory
        result = result_dict(*self.decode(prediction), [meta.get("index") for meta in img_metas])
        if self.save_results:
            for meta, semantics, flow in zip(img_metas, result["occ_results"], result["flow_results"], strict=True):
                save_prediction(prediction_path("results", meta["scene_name"], meta["sample_idx"]), semantics, flow)
        return [result]

    def reset_memory(self) -> None:
        """Forget the past, for example before another batch size."""
        self.memory = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> STCOcc:
        """What ``to()``, ``cuda()`` and their like end in: the memory goes where the parameters go, in its dtype."""
        super()._apply(fn, recurse)
        if self.memory is not None:
            self.memory = self.memory.to(fn(self.memory.histories[0].new_empty(0)).device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies (of a moving average, say) and pickles, which begin without a past."""
        return {**self.__dict__, "memory": None}
