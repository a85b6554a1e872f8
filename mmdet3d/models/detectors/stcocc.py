"""STCOcc: sparse spatial-temporal cascade renovation for 3D occupancy and scene flow prediction.

Liao et al., CVPR 2025, arXiv 2504.19749.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmdet3d.models.attention.occupancy_predictor import occupied_probability
from mmdet3d.models.detectors.base import BaseDetector
from mmdet3d.models.detectors.consistency import check_consistency
from mmdet3d.models.detectors.frame_meta import FrameMeta
from mmdet3d.models.detectors.frame_plan import FramePlan, matrices_on_host, stage_geometry
from mmdet3d.models.detectors.memory_check import MemoryLayout, check_memory
from mmdet3d.models.detectors.prediction import Prediction, Prepared
from mmdet3d.models.detectors.stage_configs import stage_configs
from mmdet3d.models.losses import VoxelLosses, depth_loss, flow_loss
from mmdet3d.models.view_transforms import ForwardFeatures
from mmdet3d.models.view_transforms.forward_projection import FrameFeatures, KeyFeatures
from mmdet3d.models.view_transforms.geometry import LiftGeometry
from mmdet3d.ops import row_argmax, upsample_add
from mmdet3d.registry import DETECTORS, ConfigError, build
from mmdet3d.structures import FrameCache, TemporalMemory
from mmdet3d.utils.beside import Beside
from mmdet3d.utils.files import prediction_path, save_prediction
from mmdet3d.utils.memory_format import use_channels_last
from mmdet3d.utils.transfer import to_numpy


@DETECTORS.register_module()
class STCOcc(BaseDetector):
    """Six cameras in, semantic occupancy and flow out.

    Args:
        forward_projection: Config of the coarse encoder.
        backward_projection: Config of the finest stage's backward projection; the coarser ones are derived.
        occupancy_head: Config of the occupancy head.
        temporal_fusion: Config of the temporal fusion, shared by the stages but for the sizes; None for no memory.
        flow_head: Config of the flow head, or None.
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
                 channels_last: bool = True, use_ms_feats: bool = False, pretrained: Any = None, train_cfg: Any = None,
                 test_cfg: Any = None, init_cfg: Any = None) -> None:
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
        self.occupancy_head = build(occupancy_head, "occupancy_head")
        self.flow_head = None if flow_head is None else build(flow_head, "flow_head")
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
            self.temporal_fusion_list.append(build(cfg, f"temporal_fusion (stage {s})"))

    # ---- forward passes -------------------------------------------------------------------------------------------

    def run(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping], memory: TemporalMemory | None = None
            ) -> tuple[Prediction, ForwardFeatures]:
        """The whole network on one frame: prediction, and the features of the coarse encoder.

        Args:
            img_inputs: Images [B, N * 3, 3, H, W] camera-major; sensor2ego, ego2global, intrinsics, post_aug
                [B, 3 * N, 4, 4] frame-major; bda [B, 4, 4]. The matrices may stay on the CPU, where they are read.
            img_metas: B dicts, see :class:`FrameMeta`.
            memory: What the previous frame returned; None at first.

        Raises:
            ValueError: ``img_inputs`` or ``img_metas`` have the wrong shapes, or ``memory`` does not fit.
        """
        plan = self.plan(img_inputs, img_metas, memory)
        return self.compute(img_inputs[0], plan.to(img_inputs[0].device), memory)

    def plan(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping], memory: TemporalMemory | None
             ) -> FramePlan:
        """The host's part of a frame: checks, and all small-matrix work. Arguments and errors as :meth:`run`.

        Returns:
            The plan on the CPU, in pinned memory if the images are on a GPU.
        """
        if len(img_inputs) != 6 or len(img_metas) != len(img_inputs[0]):
            raise ValueError("expected six img_inputs and one dict of img_metas per sample, got "
                             f"{len(img_inputs)} img_inputs{f' of {len(img_inputs[0])} samples' if img_inputs else ''} "
                             f"and {len(img_metas)} img_metas")
        matrices = matrices_on_host(img_inputs)
        lifts = self.forward_projection.geometry((img_inputs[0], *matrices))
        return self.plan_stages(img_metas, matrices[-1], memory, lifts, img_inputs[0].device)

    def plan_stages(self, img_metas: Sequence[Mapping], bda: Tensor, memory: TemporalMemory | None,
                    lifts: LiftGeometry | None = None, device: torch.device | str = "cpu") -> FramePlan:
        """The part of :meth:`plan` that :meth:`cascade` needs.

        Args:
            img_metas: B dicts, see :class:`FrameMeta`.
            bda: [B, 4, 4] BEV augmentation on the CPU.
            memory: What the previous frame returned; None at first.
            lifts: Geometry of the lifted frames, to be packed with it.
            device: Where the plan will go.

        Raises:
            ValueError: ``img_metas`` or ``memory`` do not fit, or a sequence goes on that the memory does not follow.
        """
        meta = FrameMeta.from_metas(img_metas, num_cams=self.forward_projection.num_cams)
        check_memory(memory, meta, self._memory_layout(), device)
        stages = stage_geometry(meta, bda, memory, self.backward_projection_list[0], self.temporal_fusion_list,
                                self.grids)
        return FramePlan.pack(lifts, stages, meta, None if memory is None else memory.features,
                              pinned=torch.device(device).type == "cuda")

    def compute(self, images: Tensor, plan: FramePlan, memory: TemporalMemory | None,
                histories_out: Sequence[Tensor] | None = None, newest: FrameFeatures | None = None
                ) -> tuple[Prediction, ForwardFeatures]:
        """The device's part of a frame.

        Args:
            images: See :meth:`run`.
            plan: Of the frame, on the device of the images.
            memory: What the previous frame returned; None at first.
            histories_out: Tensors that the new memory's histories are written to, in memory of their own. A backward
                pass reads them too. Default: new ones.
            newest: Features of the newest pictures, see ``forward`` of :class:`BEVDetStereoForwardProjection`.
        """
        cache = None if memory is None else memory.features
        targets, prepared = None, None
        if Beside.possible() and memory is not None and not any(plan.meta.starts):
            targets = Beside(lambda: self.forward_projection.img_view_transformer.pool_targets(plan.lifts))
            prepared = Beside(lambda: self._prepare(plan, memory, histories_out), lane=1)
        features = self.forward_projection(images, plan.lifts, plan.reuse, cache, newest, targets)
        return self.cascade(features, plan, memory, histories_out, prepared and prepared.get()), features

    def _prepare(self, plan: FramePlan, memory: TemporalMemory, histories_out: Sequence[Tensor] | None
                ) -> list[Prepared]:
        """What the stages, finest first, can do before the frame's features are there, where a sequence goes on."""
        geometry = plan.stages
        return [
            Prepared(projection.setup(memory.newest_volume(s), geometry.previous_flips, geometry.bda, geometry.shift,
                                      geometry.image_from_augmented),
                     fusion.warp_history(memory.histories[s], self.grids[s], geometry.index_matrices[s],
                                         None if histories_out is None else histories_out[s]))
            for s, (projection, fusion) in enumerate(
                zip(self.backward_projection_list, self.temporal_fusion_list, strict=True))]

    def cascade(self, features: ForwardFeatures, plan: FramePlan, memory: TemporalMemory | None,
                histories_out: Sequence[Tensor] | None = None, prepared: Sequence[Prepared] | None = None
                ) -> Prediction:
        """Stages and heads, coarse to fine.

        Args:
            features: Volumes, depth [B * N, D, h, w] and context [B * N, C, h, w] of the coarse encoder.
            plan: The frame's plan, on the device of the features.
            memory: What the previous frame returned, as it was when the plan was made.
            histories_out: See :meth:`compute`.
            prepared: For each stage, finest first, what was done before.
        """
        geometry, batch = plan.stages, len(plan.bda)
        context, depth = (x.unflatten(0, (batch, -1)) for x in (features.context, features.depth))
        logits, coarser, stage_logits, histories = None, None, [], []
        for s in reversed(range(self.num_stage)):
            volume, height_mean = features.volumes[s], None
            if coarser is not None:
                volume, height_mean = upsample_add(volume, coarser)
            previous = memory.newest_volume(s) if memory is not None else None
            early = Prepared() if prepared is None else prepared[s]
            bev, stage = self.backward_projection_list[s](
                volume, context, depth, logits, previous, geometry.previous_flips, geometry.bda, geometry.start_mask,
                geometry.shift, geometry.image_from_augmented, height_mean, early.setup)
            logits = stage.detach()
            occupied = occupied_probability(logits).permute(0, 3, 2, 1)  # [B, Z, Y, X]
            # In the dtype of the volume, which under autocast is that of the convolutions.
            volume = torch.addcmul(volume, bev[:, :, None].to(volume.dtype), occupied[:, None].to(volume.dtype))
            if self.temporal_fusion_list:
                volume, history = self._fuse(s, volume, logits, occupied, plan, memory,
                                             None if histories_out is None else histories_out[s], early.history)
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

    def _fuse(self, s: int, volume: Tensor, logits: Tensor, occupied: Tensor, plan: FramePlan,
              memory: TemporalMemory | None, history_out: Tensor | None, warped: Tensor | None
              ) -> tuple[Tensor, Tensor]:
        return self.temporal_fusion_list[s](
            volume, logits, occupied, None if memory is None else memory.histories[s], self.grids[s],
            plan.meta.starts, plan.stages.index_matrices[s], top_k=self.top_k[self.training][s],
            history_out=history_out, warped=warped)

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
            img_inputs: The six input tensors, see :meth:`run`.
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

    def predict(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping], memory: TemporalMemory | None = None
                ) -> tuple[dict[str, Any], TemporalMemory | None]:
        """As :meth:`predict_tensors`, on the host.

        Returns:
            ``occ_results`` uint8 [B, X, Y, Z] class of each voxel; ``flow_results`` float16 [B, X, Y, Z, 2] m/s where
            the class moves, 0 elsewhere; ``index`` list of B indices. Arrays are NumPy.
        """
        prediction, _ = self.run(img_inputs, img_metas, memory)
        return self.results(prediction, img_metas), prediction.memory

    def predict_tensors(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping],
                        memory: TemporalMemory | None = None) -> tuple[Tensor, Tensor, TemporalMemory | None]:
        """Occupancy and flow of one frame, and the memory for the next one. Does not touch ``self.memory``.

        Returns:
            Classes uint8 [B, X, Y, Z]; flow float16 [B, X, Y, Z, 2] m/s where the class moves, 0 elsewhere; both on the
            device of the images, which is not waited for. The memory for the next frame.
        """
        prediction, _ = self.run(img_inputs, img_metas, memory)
        return *self.outputs(prediction), prediction.memory

    @torch.no_grad()
    def outputs(self, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Classes and flow of :meth:`predict_tensors` for a prediction."""
        # The class of the greatest logit, which is that of the greatest probability.
        semantics = row_argmax(prediction.semantic_logits)
        if prediction.flow is None:
            flow = torch.zeros((*semantics.shape, 2), dtype=torch.float16, device=semantics.device)
        else:
            flow = (prediction.flow * self.flow_head.foreground(semantics)[..., None]).half()
        return semantics, flow

    def results(self, prediction: Prediction, img_metas: Sequence[Mapping]) -> dict[str, Any]:
        """The result dict of :meth:`predict` for a prediction."""
        return self.result_dict(*self.outputs(prediction), img_metas)

    @staticmethod
    def result_dict(semantics: Tensor, flow: Tensor, img_metas: Sequence[Mapping]) -> dict[str, Any]:
        """The result dict of :meth:`predict` for what :meth:`predict_tensors` gives."""
        semantics, flow = to_numpy(semantics, flow)
        return {"occ_results": semantics, "flow_results": flow, "index": [meta.get("index") for meta in img_metas]}

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
            img_inputs: The six input tensors, see :meth:`run`, alone or as the only entry of a list.
            rescale: Not read, like any other keyword.

        Raises:
            ValueError: ``img_inputs`` is missing or does not fit.
        """
        if not img_inputs:
            raise ValueError("simple_test needs img_inputs, the six input tensors")
        if len(img_inputs) == 1:
            img_inputs = img_inputs[0]
        result, self.memory = self.predict(img_inputs, img_metas, self.memory)
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
