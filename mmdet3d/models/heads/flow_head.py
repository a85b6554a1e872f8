"""Flow head: velocity of every voxel, guided by its class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from mmcv.runner import BaseModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mmdet3d.models.backbones.resnet3d import BasicBlock3D
from mmdet3d.models.heads.occupancy_head import voxel_rows
from mmdet3d.ops import class_guidance, upsample_mlp
from mmdet3d.ops.class_guidance import gumbel_noise, kernel_serves
from mmdet3d.registry import HEADS
from mmdet3d.utils.beside import Beside
from mmdet3d.utils.precision import Softplus, full_precision, working_dtype


@HEADS.register_module()
class OccFlowHead(BaseModule):
    """Velocity (vx, vy) in m/s along the grid's x and y axes.

    The class guidance is a Gumbel softmax of the occupancy logits, in evaluation too, as the published models do: the
    flow is random unless torch's generator is seeded. In evaluation each sample may bring a seed of its own; its noise
    then depends on nothing else.

    Args:
        num_classes: Classes K.
        foreground_idx: Classes that move.
        in_channels: Channels C of the fused volume.
        out_channels: Twice the hidden channels.
        up_sample: Must be True.
        gumbel_in_eval: Draw the Gumbel noise in evaluation too. False: a plain softmax there.
    """

    ignored_config_keys = frozenset({"bev_h", "bev_w", "bev_z", "grid_length_h", "grid_length_w"})

    def __init__(self, num_classes: int, foreground_idx: Sequence[int], in_channels: int = 96, out_channels: int = 96,
                 up_sample: bool = True, gumbel_in_eval: bool = True, init_cfg: Mapping | None = None) -> None:
        super().__init__(init_cfg)
        if not up_sample:
            raise ValueError("up_sample must be True")
        self.gumbel_in_eval = gumbel_in_eval
        hidden = out_channels // 2
        self.semantic_guidance = nn.Sequential(nn.Linear(num_classes, hidden), Softplus(), nn.Linear(hidden, hidden))
        self.voxel_conv = BasicBlock3D(in_channels, in_channels)
        self.predicter = nn.Sequential(nn.Linear(in_channels + hidden, hidden), nn.Softplus(), nn.Linear(hidden, 2))
        moving = torch.zeros(num_classes, dtype=torch.bool)
        moving[list(foreground_idx)] = True
        self.register_buffer("moving_classes", moving, persistent=False)

    def forward(self, volume: Tensor, semantic_logits: Tensor, noise_seeds: Tensor | None = None,
                features: Beside[Tensor] | None = None) -> Tensor:
        """[B, C, Z, Y, X] and logits [B, 2 X, 2 Y, 2 Z, K] -> flow [B, 2 X, 2 Y, 2 Z, 2].

        Args:
            volume: Fused volume of the finest stage.
            semantic_logits: Output of the occupancy head.
            noise_seeds: [B] int32 on the same device: seeds of the noise in evaluation, see
                :mod:`mmdet3d.models.heads.seeded_noise`. Default, and in training: torch's generator.
            features: :meth:`features` of ``volume``, if they were begun before.
        """
        if self._fused(semantic_logits):
            guidance = self._fused_guidance(semantic_logits, noise_seeds)
        else:
            classes = self._class_guidance(semantic_logits, noise_seeds)
            if classes.requires_grad:
                guidance = checkpoint(self._guidance, classes, use_reentrant=False, preserve_rng_state=False)
            else:
                guidance = self._guidance(classes)
        second = self.predicter[2]
        hidden = self.features(volume) if features is None else features.get()
        return upsample_mlp(hidden, second.weight, second.bias, fine=guidance)

    def features(self, volume: Tensor) -> Tensor:
        """[B, C, Z, Y, X] -> [B, Z, Y, X, hidden] what of the predictor's hidden values does not come from classes."""
        first = self.predicter[0]
        rows = voxel_rows(self.voxel_conv(volume))
        return F.linear(rows, first.weight[:, :rows.shape[-1]], first.bias)

    def _guidance(self, classes: Tensor) -> Tensor:
        """[..., K] class probabilities -> [..., hidden] what they add to the predictor's hidden values."""
        first, softplus, second = self.semantic_guidance
        # Two linear layers in a row, the second of the guidance and the predictor's columns for it, are one.
        weight = self.predicter[0].weight[:, -second.out_features:]
        return F.linear(softplus(first(classes)), weight @ second.weight, weight @ second.bias)

    def _fused(self, logits: Tensor) -> bool:
        """Whether one kernel makes the guidance: in evaluation in half precision on a GPU."""
        first, _, second = self.semantic_guidance
        return (not self.training and not torch.is_grad_enabled() and logits.dtype == torch.float32
                and kernel_serves(logits, first.weight, second.weight, working_dtype(logits)))

    def _fused_guidance(self, logits: Tensor, noise_seeds: Tensor | None) -> Tensor:
        """:meth:`_guidance` of :meth:`_class_guidance`, in the dtype of autocast."""
        first = self.semantic_guidance[0]
        drawn = self.gumbel_in_eval and noise_seeds is None
        return class_guidance(
            self._class_guidance(logits, None) if drawn else logits, first.weight, first.bias, *self._merged_layers(),
            noise_seeds=noise_seeds if self.gumbel_in_eval else None, softmax=not drawn, dtype=working_dtype(logits))

    @full_precision
    def _merged_layers(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the guidance's second layer and the predictor's columns for it, in float32."""
        second = self.semantic_guidance[2]
        weight = self.predicter[0].weight[:, -second.out_features:].float()
        return weight @ second.weight.float(), weight @ second.bias.float()

    def _class_guidance(self, logits: Tensor, noise_seeds: Tensor | None) -> Tensor:
        """[B, 2 X, 2 Y, 2 Z, K] class probabilities, with noise where it is wanted."""
        if not (self.training or self.gumbel_in_eval):
            return logits.softmax(-1)
        if self.training or noise_seeds is None:
            return F.gumbel_softmax(logits, tau=1, hard=False, dim=-1)
        noise = gumbel_noise(noise_seeds, logits.shape[1:])
        return (logits + noise.to(logits.dtype)).softmax(-1)

    def foreground(self, semantics: Tensor) -> Tensor:
        """Whether each voxel's class [...] (integer) is one that moves."""
        return self.moving_classes[semantics.long()]
