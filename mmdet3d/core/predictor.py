"""The one way from a stream of frames to predictions: every tool that predicts calls it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mmdet3d.core.cuda_graphs.frames import FrameResult, FrameRunner
from mmdet3d.models.detectors.fast_mode import fast_copy
from mmdet3d.models.heads.seeded_noise import sample_seed
from mmdet3d.structures import TemporalMemory, require_meta
from mmdet3d.utils.fold_batch_norm import fold_batch_norm, is_folded

MODES = ("exact", "fast")
"""Arithmetic: as the model was trained, or convolutions and linear layers in float16."""

SCENE_STARTS = ("none", "primed", "carried")
"""Memory at the first frame of a scene, see :class:`Predictor`; the first one is the default of every tool."""


def check_options(scene_start: str, mode: str, fold: bool) -> None:
    """Refuse options of :class:`Predictor` that are unknown or contradict each other.

    Raises:
        ValueError: they do; the message says what is accepted.
    """
    for name, value, known in (("scene_start", scene_start, SCENE_STARTS), ("mode", mode, MODES)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
    if mode == "fast" and not fold:
        raise ValueError("mode='fast' folds batch norms; it cannot be had with fold=False")


class Predictor:
    """Predicts frame after frame of one stream, or of B streams side by side.

    Scenes follow one another in a stream. The temporal attention of the released weights was trained with a previous
    map at every frame, also at the first one of a scene, where it was the last map of another scene. ``scene_start``
    says what stands there:

    - "none": no map (zeros in a batch in which another stream goes on). Depends on nothing else.
    - "primed": the map of the first frame itself, from a run of that frame without memory. Depends on nothing else.
    - "carried": the last map of the scene before in the stream, as the reference implementation has it.

    Args:
        model: The detector. It stays as it is, and the weights are those that it has now.
        scene_start: One of :data:`SCENE_STARTS`.
        noise_seed: Seed of the flow head's noise, which then depends on the sample only, unless the sample brings a
            ``noise_seed`` of its own. None: torch's generator, as the reference implementation.
        mode: One of :data:`MODES`, see :func:`~mmdet3d.models.detectors.fast_mode.fast_copy`.
        fold: Fold batch norms into the convolutions before them: faster, equal up to rounding.
        graphs: Replay CUDA graphs; the result is the same. Default: on a GPU.
        inplace: Work with ``model`` itself instead of a copy, folded and in half precision as asked.

    Attributes:
        model: What predicts, in evaluation mode.

    Raises:
        ValueError: an option is unknown, or options contradict each other.
    """

    def __init__(self, model: nn.Module, *, scene_start: str = SCENE_STARTS[0], noise_seed: int | None = 0,
                 mode: str = "exact", fold: bool = True, graphs: bool | None = None, inplace: bool = False) -> None:
        check_options(scene_start, mode, fold)
        self.scene_start, self.noise_seed = scene_start, noise_seed
        self.model = _prepared(model, mode, fold, inplace)
        self.runner = FrameRunner(self.model, graphs=graphs)

    @torch.no_grad()
    def __call__(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping],
                 memory: TemporalMemory | None = None) -> FrameResult:
        """Predict one frame of each stream.

        Args:
            img_inputs: As :meth:`STCOcc.run` takes them: images as normalised floats or as pixels, on any device;
                matrices best on the CPU.
            img_metas: B dicts, see :class:`~mmdet3d.structures.FrameMeta`; with ``sample_idx``, the name of the sample,
                unless ``noise_seed`` is None or the sample brings one.
            memory: What the call before returned, whatever scene that was of; None at first. It may have more slots
                than this batch: those at the end are dropped.

        Returns:
            Classes uint8 [B, X, Y, Z]; flow float16 [B, X, Y, Z, 2] in m/s, 0 where nothing can move; both on the
            model's device, which is not waited for. The memory for the next call; to come back to it later, or to
            switch between streams, keep ``memory.clone()``: on a GPU calls write to the memory of earlier ones.

        Raises:
            ValueError: inputs or memory do not fit, or the batch has more samples than the memory.
        """
        require_meta(img_metas, ("start_of_sequence",))
        starts = [bool(meta["start_of_sequence"]) for meta in img_metas]
        if self.noise_seed is not None:
            img_metas = self._seeded(img_metas)
        if all(starts) and self.scene_start != "carried":
            memory = None
        memory = _first_slots(memory, len(starts))
        if any(starts) and self.scene_start != "carried":
            if self.scene_start == "primed":
                memory = self._primed(img_inputs, img_metas, memory, starts)
            elif memory is not None:
                memory = forget_slots(memory, starts)
        return self.runner(img_inputs, img_metas, memory)

    def _seeded(self, img_metas: Sequence[Mapping]) -> list[Mapping]:
        """``img_metas`` with a noise seed for each sample that brings none."""
        require_meta(img_metas, ("sample_idx",), unless="noise_seed")
        return [meta if meta.get("noise_seed") is not None else
                {**meta, "noise_seed": sample_seed(meta["sample_idx"], self.noise_seed)} for meta in img_metas]

    def _primed(self, img_inputs: Sequence[Tensor], img_metas: Sequence[Mapping], memory: TemporalMemory | None,
                starts: Sequence[bool]) -> TemporalMemory | None:
        """``memory`` with that of a run of this frame alone in the slots that start."""
        *_, primed = self.runner(img_inputs, img_metas, None)
        if primed is None or memory is None:  # a model without memory; every slot starts
            return primed
        histories = zip(primed.histories, memory.histories, strict=True)
        return replace(memory, histories=tuple(_choose(starts, mine, theirs) for mine, theirs in histories),
                       bda=_choose(starts, primed.bda, memory.bda), features=primed.features)


def _prepared(model: nn.Module, mode: str, fold: bool, inplace: bool) -> nn.Module:
    if mode == "fast":
        return fast_copy(model, inplace=inplace).eval()
    if fold and not is_folded(model):
        return fold_batch_norm(model, inplace=inplace).eval()
    return (model if inplace else copy.deepcopy(model)).eval()


def _first_slots(memory: TemporalMemory | None, count: int) -> TemporalMemory | None:
    if memory is None or memory.batch_size == count:
        return memory
    if count > memory.batch_size:
        raise ValueError(f"a batch of {count} samples follows one of {memory.batch_size}; slots may only disappear")
    return memory.narrow(count)


def forget_slots(memory: TemporalMemory, starts: Sequence[bool]) -> TemporalMemory:
    """Make a memory whose histories are zero in the slots that start a sequence.

    Args:
        memory: Of B slots; stays as it is.
        starts: B times whether the slot starts a sequence.
    """
    return replace(memory, histories=tuple(_choose(starts, torch.tensor(0), history) for history in memory.histories))


def _choose(slots: Sequence[bool], chosen: Tensor, other: Tensor) -> Tensor:
    """[B, ...] ``chosen`` in the slots that are True, ``other`` in the rest."""
    mask = torch.tensor(slots, device=other.device).view(-1, *[1] * (other.dim() - 1))
    return torch.where(mask, chosen.to(other), other)
