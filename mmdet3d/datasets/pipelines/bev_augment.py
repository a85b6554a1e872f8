"""Augmentation of the ego frame: rotation, scale, flips and shift as a matrix, flips also of the labels."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mmdet3d.datasets.labels import IGNORE_LABEL
from mmdet3d.datasets.pipelines.compose import generator, require
from mmdet3d.registry import PIPELINES

BDA_KEYS = ("rot_lim", "scale_lim", "tran_lim", "flip_dx_ratio", "flip_dy_ratio")


@dataclass(frozen=True)
class BEVAugmentation:
    """One draw: points are rotated about z, scaled, flipped, then shifted.

    Attributes:
        rotate: Degrees, counter-clockwise seen from above.
        scale: Factor of all three axes.
        flip_dx: Mirror x.
        flip_dy: Mirror y.
        translation: Shift (x, y, z) in metres.
    """

    rotate: float = 0.0
    scale: float = 1.0
    flip_dx: bool = False
    flip_dy: bool = False
    translation: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def sample(cls, conf: Mapping, rng: np.random.RandomState) -> "BEVAugmentation":
        """A random augmentation; draws in the order rotation, scale, x flip, y flip, three normals.

        Args:
            conf: ``rot_lim`` (degrees), ``scale_lim``, ``flip_dx_ratio``, ``flip_dy_ratio`` (probabilities) and
                ``tran_lim`` (standard deviations of the shift in metres).
            rng: Where the draws come from.
        """
        rotate, scale = rng.uniform(*conf["rot_lim"]), rng.uniform(*conf["scale_lim"])
        flip_dx, flip_dy = rng.uniform() < conf["flip_dx_ratio"], rng.uniform() < conf["flip_dy_ratio"]
        shift = rng.normal(scale=conf.get("tran_lim", (0.0, 0.0, 0.0)), size=3)
        return cls(rotate, scale, flip_dx, flip_dy, tuple(shift.tolist()))

    @property
    def only_flips(self) -> bool:
        """Whether labels on the grid can follow: nothing but flips."""
        return self.rotate == 0 and self.scale == 1 and not any(self.translation)

    def matrix(self) -> Tensor:
        """[4, 4] float32 matrix from the ego frame to the augmented ego frame, multiplied in float32."""
        angle = torch.tensor(self.rotate / 180 * math.pi)
        sin, cos = torch.sin(angle), torch.cos(angle)
        rotation = torch.tensor([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
        flip = torch.diag(torch.tensor([-1.0 if self.flip_dx else 1.0, -1.0 if self.flip_dy else 1.0, 1.0]))
        matrix = torch.eye(4)
        matrix[:3, :3] = flip @ (torch.eye(3) * self.scale @ rotation)
        matrix[:3, 3] = torch.tensor(self.translation)
        return matrix

    def flip_grid(self, grid: np.ndarray) -> np.ndarray:
        """A grid (X, Y, ...) flipped, a contiguous copy; the same array where nothing flips."""
        if not (self.flip_dx or self.flip_dy):
            return grid
        return grid[:: -1 if self.flip_dx else 1, :: -1 if self.flip_dy else 1].copy()

    def flip_flow(self, flow: np.ndarray) -> np.ndarray:
        """A flow field (X, Y, Z, 2) flipped in place and in sign, a copy; 255, which stands for "unknown", stays."""
        flow = self.flip_grid(flow)
        for channel, flips in enumerate((self.flip_dx, self.flip_dy)):
            if flips:
                values = np.negative(flow[..., channel])
                values[values == -IGNORE_LABEL] = IGNORE_LABEL
                flow[..., channel] = values
        return flow


def _check_bda(conf: Mapping | None) -> None:
    if conf is None:
        raise ValueError("training needs bda_aug_conf")
    if unknown := sorted(set(conf) - set(BDA_KEYS)):
        raise ValueError(f"bda_aug_conf: unknown keys {unknown}; accepted: {list(BDA_KEYS)}")
    if missing := [key for key in BDA_KEYS if key not in conf and key != "tran_lim"]:
        raise ValueError(f"bda_aug_conf: keys {missing} are missing; found {sorted(conf)}")


@PIPELINES.register_module()
class BEVAug:
    """Pipeline step: the augmentation of the ego frame becomes the sixth entry of ``img_inputs``.

    Labels and masks on the grid follow flips. They cannot follow a rotation, a scale or a shift, so a sample with
    labels refuses them. ``results["bev_flip"]``, a pair (x, y), replaces the flips that are drawn.

    Args:
        bda_aug_conf: Limits, see :meth:`BEVAugmentation.sample`. Not read at test time.
        classes: Accepted as published configs have it; not read.
        is_train: Draw; otherwise the identity, without a draw.

    Raises:
        ValueError: ``bda_aug_conf`` does not fit.
    """

    def __init__(self, bda_aug_conf: Mapping | None, classes: Sequence[str] | None = None,
                 is_train: bool = True) -> None:
        if is_train or bda_aug_conf is not None:
            _check_bda(bda_aug_conf)
        self.bda_aug_conf = bda_aug_conf
        self.is_train = is_train

    def __call__(self, results: dict) -> dict:
        """Augment.

        Args:
            results: ``img_inputs`` with five entries; ``voxel_semantics`` and ``mask_camera`` with their coarser
                scales, ``voxel_flows`` where a step loaded them.

        Returns:
            ``results`` with six entries of ``img_inputs``, ``bev_augmentation`` and flipped labels, in new arrays.

        Raises:
            DataError: there are no ``img_inputs`` yet.
            ValueError: something other than a flip was drawn for a sample with labels.
        """
        require(self, results, "img_inputs")
        augmentation = BEVAugmentation()
        if self.is_train:
            augmentation = BEVAugmentation.sample(self.bda_aug_conf, generator(results))
            if (forced := results.get("bev_flip")) is not None:
                augmentation = replace(augmentation, flip_dx=bool(forced[0]), flip_dy=bool(forced[1]))
        results["bev_augmentation"] = augmentation
        results["img_inputs"] = (*results["img_inputs"][:5], augmentation.matrix())
        if "voxel_semantics" in results and not augmentation.only_flips:
            raise ValueError("BEVAug: labels follow flips only; rot_lim must be (0, 0), scale_lim (1, 1) and tran_lim "
                             f"zero, got {dict(self.bda_aug_conf)}")
        for key in results:
            if key.startswith(("voxel_semantics", "mask_camera")):
                results[key] = augmentation.flip_grid(results[key])
            elif key == "voxel_flows":
                results[key] = augmentation.flip_flow(results[key])
        return results
