"""Batch norms folded into the convolutions before them, for evaluation: fewer passes over the features, same values."""

from __future__ import annotations

import copy
import logging

from mmcv.cnn import ConvModule
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdet3d.interfaces import FoldsBatchNorm, offers
from mmdet3d.utils.fused_conv import CannotFuseError, FusedBlock, FusedConv, ModuleType

logger = logging.getLogger(__name__)
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def fold_batch_norm(model: ModuleType, inplace: bool = False) -> ModuleType:
    """A model for evaluation whose batch norms are part of its convolutions.

    In evaluation a batch norm is a factor and an offset per channel. They go into weight and bias of the layer beside
    it, in float64, so results differ by rounding only. Residual blocks, and convolutions with a ReLU, become
    :class:`FusedBlock` and :class:`FusedConv`. The names of the state dict change: load weights before.

    A module of another kind takes part by the method of :class:`~mmdet3d.interfaces.FoldsBatchNorm`; the children of
    what it gives are looked at afterwards. A batch norm that belongs to no convolution in a way known here stays as it
    is, which costs a pass over the features and changes no value; one warning names them all.

    Args:
        model: Stays as it is unless ``inplace``.
        inplace: Change the model itself.

    Returns:
        The model in evaluation mode. If anything was folded, it refuses training mode.
    """
    model = _folded((model if inplace else copy.deepcopy(model)).eval())
    _fold_children(model)
    if left := [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]:
        logger.warning("not folded, because the convolution before them is not known: %s; to fold them, put "
                       "convolution and batch norm into an nn.Sequential or give the module that holds them a method "
                       "fold_batch_norm", ", ".join(left))
    return model


def is_folded(model: nn.Module) -> bool:
    """Whether :func:`fold_batch_norm` made this model."""
    return any(isinstance(module, FusedConv) for module in model.modules())


def _fold_children(module: nn.Module) -> None:
    if _is_plain(module, nn.Sequential):
        _fold_sequence(module)
    for name, child in list(module.named_children()):
        folded = _folded(child)
        if folded is not child:
            setattr(module, name, folded)
        _fold_children(folded)


def _folded(module: nn.Module) -> nn.Module:
    """Stand-in for a module; the module itself if it has no batch norm of its own, or one that cannot be folded."""
    try:
        return _stand_in(module)
    except CannotFuseError:
        return module


def _stand_in(module: nn.Module) -> nn.Module:
    if offers(module, FoldsBatchNorm):
        return module.fold_batch_norm().eval()
    if _is_plain(module, BasicBlock):
        return FusedBlock([(module.conv1, module.norm1), (module.conv2, module.norm2)],
                          _shortcut(module.downsample)).eval()
    if _is_plain(module, Bottleneck) and not module.with_plugins and not module.with_dcn:
        pairs = [(module.conv1, module.norm1), (module.conv2, module.norm2), (module.conv3, module.norm3)]
        return FusedBlock(pairs, _shortcut(module.downsample)).eval()
    if _is_plain(module, ConvModule) and module.with_norm and module.order == ("conv", "norm", "act"):
        foldable = not (module.with_spectral_norm or module.with_explicit_padding)
        if foldable and (not module.with_activation or isinstance(module.activate, nn.ReLU)):
            return FusedConv(module.conv, module.norm, relu=module.with_activation).eval()
    return module


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what ``kind`` does: not so a subclass with a forward pass of its own."""
    return isinstance(module, kind) and type(module).forward is kind.forward


def _shortcut(module: nn.Module | None) -> tuple[nn.Module, nn.Module | None] | None:
    """Convolution and batch norm of a residual block's shortcut."""
    if module is None or isinstance(module, _CONVOLUTIONS):
        return None if module is None else (module, None)
    if len(module) != 2:
        raise CannotFuseError(f"a shortcut of {len(module)} layers cannot be folded")
    return module[0], module[1]


def _fold_sequence(sequence: nn.Sequential) -> None:
    """Fold convolution, batch norm and, where there is one, ReLU; positions stay."""
    for i in range(len(sequence) - 1):
        conv, norm = sequence[i], sequence[i + 1]
        if not (isinstance(conv, _CONVOLUTIONS) and isinstance(norm, _BatchNorm)):
            continue
        relu = i + 2 < len(sequence) and isinstance(sequence[i + 2], nn.ReLU)
        try:
            sequence[i] = FusedConv(conv, norm, relu).eval()
        except CannotFuseError:
            continue
        for position in range(i + 1, i + 2 + relu):
            sequence[position] = nn.Identity().eval()
