"""Batch norms folded into the convolutions before them, for evaluation: fewer passes over the features, same values."""

from __future__ import annotations

import copy

from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d.utils.fused_conv import FusedBlock, FusedConv, ModuleType

_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def fold_batch_norm(model: ModuleType, inplace: bool = False) -> ModuleType:
    """A model for evaluation whose batch norms are part of its convolutions.

    In evaluation a batch norm is a factor and an offset per channel. They go into weight and bias of the layer beside
    it, in float64, so results differ by rounding only. Residual blocks, and convolutions with a ReLU, become
    :class:`FusedBlock` and :class:`FusedConv`. The names of the state dict change: load weights before.

    A module of another kind takes part by a method ``fold_batch_norm() -> nn.Module`` that gives what shall be in its
    place (itself, say); its children are looked at afterwards.

    Args:
        model: Stays as it is unless ``inplace``.
        inplace: Change the model itself.

    Returns:
        The model in evaluation mode. It refuses training mode.

    Raises:
        ValueError: a batch norm is left that belongs to no convolution; the message names it.
    """
    model = _folded((model if inplace else copy.deepcopy(model)).eval())
    _fold_children(model)
    if left := [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]:
        raise ValueError(f"no convolution to fold these batch norms into: {left}")
    return model


def is_folded(model: nn.Module) -> bool:
    """Whether :func:`fold_batch_norm` made this model."""
    return any(isinstance(module, FusedConv) for module in model.modules())


def _fold_children(module: nn.Module) -> None:
    if isinstance(module, nn.Sequential):
        _fold_sequence(module)
    for name, child in list(module.named_children()):
        folded = _folded(child)
        if folded is not child:
            setattr(module, name, folded)
        _fold_children(folded)


def _folded(module: nn.Module) -> nn.Module:
    """What stands in the place of a module; the module itself if it has no batch norm of its own."""
    if hasattr(module, "fold_batch_norm"):
        return module.fold_batch_norm().eval()
    if isinstance(module, BasicBlock):
        return FusedBlock([(module.conv1, module.norm1), (module.conv2, module.norm2)],
                          _shortcut(module.downsample)).eval()
    if isinstance(module, Bottleneck) and not module.with_plugins and not module.with_dcn:
        pairs = [(module.conv1, module.norm1), (module.conv2, module.norm2), (module.conv3, module.norm3)]
        return FusedBlock(pairs, _shortcut(module.downsample)).eval()
    if isinstance(module, ConvModule) and module.with_norm and module.order == ("conv", "norm", "act"):
        if not module.with_activation or isinstance(module.activate, nn.ReLU):
            return FusedConv(module.conv, module.norm, relu=module.with_activation).eval()
    return module


def _shortcut(module: nn.Module | None) -> tuple[nn.Module, nn.Module | None] | None:
    """Convolution and batch norm of a residual block's shortcut."""
    if module is None or isinstance(module, _CONVOLUTIONS):
        return None if module is None else (module, None)
    conv, norm = module
    return conv, norm


def _fold_sequence(sequence: nn.Sequential) -> None:
    """Fold convolution, batch norm and, where there is one, ReLU; positions stay."""
    for i in range(len(sequence) - 1):
        conv, norm = sequence[i], sequence[i + 1]
        if not (isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _BatchNorm)):
            continue
        relu = i + 2 < len(sequence) and isinstance(sequence[i + 2], nn.ReLU)
        sequence[i] = FusedConv(conv, norm, relu).eval()
        for position in range(i + 1, i + 2 + relu):
            sequence[position] = nn.Identity().eval()
