"""Models: importing this package registers every part."""

from collections.abc import Mapping

from mmdet3d.interfaces import Detector, KeepsMemory
from mmdet3d.registry import MODELS, build, import_modules

from . import attention, backbones, detectors, heads, losses, necks, temporal, view_transforms

for _folder in (attention, backbones, detectors, heads, losses, necks, temporal, view_transforms):
    import_modules(_folder)


def build_model(cfg: Mapping):
    """Build the detector that ``cfg`` (the ``model`` entry of a config) describes; ``cfg`` stays as it is.

    Raises:
        mmdet3d.registry.ConfigError: the config names an unknown type or key, or a value does not fit.
    """
    return build(cfg, "model", Detector, KeepsMemory)


__all__ = ["MODELS", "attention", "backbones", "build_model", "detectors", "heads", "losses", "necks", "temporal",
           "view_transforms"]
