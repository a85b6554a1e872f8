"""The image backbone: mmdet's ResNet with activation checkpointing that current PyTorch accepts."""

from __future__ import annotations

from mmdet.models.backbones.resnet import ResNet as MMDetResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmdet3d.registry import BACKBONES
from mmdet3d.utils.fused_conv import FusedConv


@BACKBONES.register_module()
class ResNet(MMDetResNet):
    """ResNet (He et al. arXiv 1512.03385) with the parameter names of torchvision and mmdet.

    mmdet 2.28 checkpoints residual blocks without saying which of PyTorch's two ways it wants, which newer releases
    refuse. Here it is the re-entrant way, which, as in the published training, updates the running statistics of the
    batch norms a second time when a block is recomputed. All blocks of a stage are recomputed together, so that only
    the output of the stage is kept.

    Args:
        *args: As mmdet's ResNet.
        with_cp: Recompute the residual blocks in the backward pass to save memory.
        **kwargs: As mmdet's ResNet.
    """

    def __init__(self, *args, with_cp: bool = False, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.with_cp = with_cp

    def train(self, mode: bool = True) -> ResNet:
        """Switch to training or evaluation mode; mmdet's ResNet forgets to return itself."""
        super().train(mode)
        return self

    def fold_batch_norm(self) -> ResNet:
        """The backbone for evaluation: itself, with the stem changed; the residual blocks follow."""
        if not self.deep_stem:
            self.conv1 = FusedConv(self.conv1, self.norm1, relu=True)
            setattr(self, self.norm1_name, nn.Identity())
            self.relu = nn.Identity()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the stages ``out_indices`` for images [M, 3, H, W]."""
        x = self.first_stage(x)
        return (*((x,) if 0 in self.out_indices else ()), *self.later_stages(x))

    def first_stage(self, x: Tensor) -> Tensor:
        """Output of the first residual stage alone, [M, 3, H, W] -> [M, C, H / 4, W / 4]."""
        return self._stage(self._stem(x), 0)

    def later_stages(self, x: Tensor) -> tuple[Tensor, ...]:
        """Outputs of the stages ``out_indices`` but the first, from the output of the first stage."""
        outputs = []
        for index in range(1, len(self.res_layers)):
            x = self._stage(x, index)
            if index in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def _stem(self, x: Tensor) -> Tensor:
        x = self.stem(x) if self.deep_stem else self.relu(self.norm1(self.conv1(x)))
        return self.maxpool(x)

    def _stage(self, x: Tensor, index: int) -> Tensor:
        blocks = list(getattr(self, self.res_layers[index]))
        while blocks and not (self.with_cp and x.requires_grad):  # re-entrant: the input must ask for a gradient
            x = blocks.pop(0)(x)
        if not blocks:
            return x
        # The blocks draw no random numbers, whose state would have to be kept.
        return checkpoint(nn.Sequential(*blocks), x, use_reentrant=True, preserve_rng_state=False)
