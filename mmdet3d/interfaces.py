"""Contracts of the parts that users replace: what each must offer, how it is called, and what for.

A part need not inherit from its contract. ``build(cfg, place, contract=...)`` checks it when a config is built: every
member must be there, and every method must accept the arguments that it is called with here. Arguments before ``/`` are
passed by position, so that their names are free. The first line of a member's docstring, or the text beside an
attribute's type, says what it is for.

Letters in shapes: B samples, N cameras, M = B N, C channels, K classes, Q = Y X queries of a stage, Z, Y, X its voxels,
D depth bins, h and w the size of the image features.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Annotated, Any, Protocol, get_type_hints

from torch import Tensor, nn

# ---- parts of a model ---------------------------------------------------------------------------------------------


class ImageBackbone(Protocol):
    """Image backbone of the forward projection, as those of mmdet are. See also :class:`StereoStages`."""

    def forward(self, images: Tensor, /) -> Sequence[Tensor]:
        """Feature maps of the images [M, 3, H, W]: of stride 4 for the stereo matching, then those of the neck."""


class StereoStages(Protocol):
    """Image backbone that can stop after its first output, which frames need that are only matched with.

    Of another backbone all outputs are computed for them too, which batch norms in training mode see: for one frame in
    three in training, for fewer in evaluation, where features of earlier frames serve again. What only makes the first
    output gets no gradient then, because the matching has none: several processes need ``find_unused_parameters=True``.
    """

    def first_stage(self, images: Tensor, /) -> Tensor:
        """Feature map of stride 4 alone, for the stereo matching."""

    def later_stages(self, stereo: Tensor, /) -> Sequence[Tensor]:
        """Feature maps of the neck, from that of :meth:`first_stage`."""


class TemporalAttention(Protocol):
    """First attention of an encoder layer: from the queries to the previous and the current map.

    Where it has ``num_points``, that must be the number of voxels along z of the stage.
    """

    def forward(self, query: Tensor, query_pos: Tensor, values: Tensor, reference_points: Tensor, visibility: Tensor,
                bev_size: tuple[int, int], cells: Tensor, /) -> Tensor:
        """Queries [B, Q, C] that have seen the previous map, residual included.

        Args:
            query: [B, Q, C] without positional encoding.
            query_pos: [B, Q, C] positional encoding.
            values: [2 B, Q, C], row 2 b the previous map and row 2 b + 1 the current one of sample b.
            reference_points: [2 B, Q, 2] normalised (x, y) of the queries in each row's map.
            visibility: [B, Q, Z] occupied probability above each query.
            bev_size: (Y, X).
            cells: [2] (X, Y) as float32 on the device.
        """


class SpatialAttention(Protocol):
    """Second attention of an encoder layer: from the queries into the images.

    Where it has ``depth_range``, ``num_cams`` or ``num_points``, these must be those of the rest of the model.
    """

    def consistency(self, anchors: Any, depth: Tensor, /) -> Tensor | None:
        """How well the anchors fit the depth [B, N, D, h, w], computed once for all layers; handed to forward."""

    def forward(self, query: Tensor, query_pos: Tensor, tokens: Tensor, image_size: tuple[int, int], anchors: Any,
                consistency: Tensor | None, visibility: Tensor, /) -> Tensor:
        """Queries [B, Q, C] that have seen the images, residual included.

        Args:
            query: [B, Q, C] without positional encoding.
            query_pos: [B, Q, C] positional encoding.
            tokens: [N, B, h * w, C] image features.
            image_size: (h, w).
            anchors: ``CameraAnchors``: where the Z voxels above each query lie in the cameras.
            consistency: What :meth:`consistency` gave.
            visibility: [B, Q, Z] occupied probability above each query.
        """


class TemporalFusion(Protocol):
    """Fusion of a stage's volume with its past. Where it has ``num_classes``, that must be the occupancy head's."""

    history_num: Annotated[int, "number of history slots T, which gives the memory its size"]
    channels: Annotated[int, "channels C of a slot, which give the memory its size"]

    def index_matrices(self, grids: Sequence, starts: Sequence[bool], bda: Tensor, previous_bda: Tensor | None,
                       previous_ego_from_ego: Tensor, /) -> Tensor:
        """Matrices [G, B, 4, 4] from a voxel index now to that in the previous frame, for each of G grids."""

    def prepare(self, history: Tensor | None, grid: Any, starts: Sequence[bool], index_matrix: Tensor,
                out: Tensor | None, /) -> Any:
        """Past for forward, not None: the part of the work that needs no features, such as warping the history.

        Args:
            history: [B, Z Y X, T C] that forward gave at the frame before, or None.
            grid: ``VoxelGrid`` of the stage.
            starts: Whether a sequence starts, for each of B samples.
            index_matrix: [B, 4, 4] of :meth:`index_matrices`.
            out: Tensor for the history of the next frame, or None.
        """

    def forward(self, volume: Tensor, logits: Tensor, occupied: Tensor, past: Any, grid: Any, /, *, top_k: int
                ) -> tuple[Tensor, Tensor]:
        """Fused volume [B, C, Z, Y, X] and the history [B, Z Y X, T C] for the next frame.

        Args:
            volume: [B, C, Z, Y, X] features of the frame.
            logits: [B, X, Y, Z, K] of the stage.
            occupied: [B, Z, Y, X] occupied probability.
            past: Of :meth:`prepare`.
            grid: ``VoxelGrid`` of the stage.
            top_k: Number of foreground voxels.
        """


class OccupancyHead(Protocol):
    """Head that classifies the voxels."""

    num_classes: Annotated[int, "classes K, free space last, which the rest of the model must have too"]

    def forward(self, volume: Tensor, coarse_logits: Tensor, /) -> Tensor:
        """Logits [B, 2 X, 2 Y, 2 Z, K] of the fused volume [B, C, Z, Y, X] and the last stage's [B, X, Y, Z, K]."""


class FlowHead(Protocol):
    """Head that gives each voxel a velocity. Where it has ``moving_classes``, these must be K flags."""

    def features(self, volume: Tensor, /) -> Any:
        """Part of the work that needs the fused volume [B, C, Z, Y, X] alone, begun beside the occupancy head."""

    def forward(self, volume: Tensor, semantic_logits: Tensor, noise_seeds: Tensor | None, features: Any, /) -> Tensor:
        """Flow [B, 2 X, 2 Y, 2 Z, 2] in m/s of the fused volume and the occupancy head's logits.

        Args:
            volume: [B, C, Z, Y, X].
            semantic_logits: [B, 2 X, 2 Y, 2 Z, K].
            noise_seeds: [B] int32 seeds for a head that draws random numbers, or None.
            features: Its ``get()`` waits for, and gives, what :meth:`features` gave.
        """

    def foreground(self, semantics: Tensor, /) -> Tensor:
        """Bool [...] of classes [...]: where the result keeps the flow."""


class AuxiliaryHead(Protocol):
    """Head that only adds losses to the training."""

    def loss(self, prediction: Any, targets: Mapping[str, Tensor], /) -> Mapping[str, Tensor]:
        """Losses by name; each whose name contains "loss" is part of the total.

        Args:
            prediction: ``Prediction``: the fused ``volume`` [B, C, Z, Y, X], ``semantic_logits``, ``stage_logits`` ...
            targets: ``gt_depth``, ``voxel_semantics``, ``voxel_flows``, ``voxel_semantics_1_2`` ... of the batch; other
                entries of the batch too, but for steps that replay CUDA graphs, which take these alone.
        """


class FoldsBatchNorm(Protocol):
    """Module that knows how its batch norms go into its convolutions, for evaluation."""

    def fold_batch_norm(self) -> nn.Module:
        """Module that takes its place: itself changed, or another one."""


class Detector(Protocol):
    """Whole model, as the training loop calls it; ``BaseDetector`` gives it to models with a ``forward_train``."""

    def train_step(self, data: Mapping[str, Any], optimizer: Any, /) -> Mapping[str, Any]:
        """Loss to minimise, ``log_vars`` and ``num_samples`` of a batch."""


class KeepsMemory(Protocol):
    """Detector that remembers the frame before between training steps."""

    memory: Annotated[Any, "TemporalMemory or None, saved with a checkpoint"]

    def reset_memory(self) -> None:
        """Forget the past, after an iteration that was skipped."""


# ---- data ---------------------------------------------------------------------------------------------------------


class PipelineStep(Protocol):
    """Step that makes a sample."""

    def __call__(self, results: MutableMapping[str, Any], /) -> Mapping[str, Any]:
        """Dict of the sample that the next step takes."""


class SequenceDataset(Protocol):
    """Data set of sequences, to train on.

    To be evaluated it further has ``data_infos``, ``labels``, ``eval_metric`` and ``ground_truth``, see
    ``NuScenesOccupancyDataset``, from which other data sets may inherit.
    """

    flag: Annotated[Any, "sequence of every sample, (n,) ascending integers, by which samples are put into batches"]

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """Sample as its pipeline makes it."""


class SeededDataset(Protocol):
    """Data set whose random draws come from a generator of its own."""

    def seed(self, seed: int, /) -> None:
        """Seed the generator, in every worker and before every sample."""


class RemembersSamples(Protocol):
    """Data set or step that keeps what the next sample of a sequence takes again."""

    def remember_samples(self, samples_per_batch: int, /) -> None:
        """Size of what is kept: for as many sequences as a batch has."""


# ---- training -----------------------------------------------------------------------------------------------------


class TrainingHook(Protocol):
    """Hook of the training loop; ``mmcv.runner.Hook`` gives all of it, to be overridden."""

    def before_run(self, runner: Any, /) -> None:
        """Act once before the first iteration."""

    def before_train_iter(self, runner: Any, /) -> None:
        """Act before each iteration."""

    def after_train_iter(self, runner: Any, /) -> None:
        """Act after each iteration."""

    def after_run(self, runner: Any, /) -> None:
        """Act once after the last iteration."""


class TrainingState(Protocol):
    """Hook whose state is saved with a checkpoint; after a resume ``runner.resumed.hook_states`` gives it back."""

    state_key: Annotated[str, "name of the state in the checkpoint"]

    def training_state(self, runner: Any, finished: int, /) -> Any:
        """State after so many finished iterations, of tensors, numbers, strings and containers."""


class EndsStep(Protocol):
    """Hook that accumulates gradients."""

    def steps_after(self, runner: Any, /) -> bool:
        """Tell whether the current iteration ends with a step of the optimizer, where a checkpoint can be made."""


# ---- asking -------------------------------------------------------------------------------------------------------


@functools.cache
def members(contract: type) -> tuple[tuple[str, str, inspect.Signature | None], ...]:
    """Name, purpose and, for methods, the signature without ``self`` of what a contract asks for."""
    return tuple(_members(contract))


def _members(contract: type) -> Iterator[tuple[str, str, inspect.Signature | None]]:
    for name, kind in get_type_hints(contract, include_extras=True).items():
        yield name, kind.__metadata__[0], None
    for name, member in vars(contract).items():
        if inspect.isfunction(member) and member.__module__ == contract.__module__:
            signature, purpose = inspect.signature(member), member.__doc__.partition("\n")[0].rstrip(".")
            without_self = signature.replace(parameters=list(signature.parameters.values())[1:])
            yield name, purpose[0].lower() + purpose[1:], without_self


def offers(part: Any, contract: type) -> bool:
    """Whether a part fulfils a contract that is not asked of every part of its kind.

    Raises:
        TypeError: it has some members of it and lacks others; the message names them.
    """
    missing = [name for name, _, _ in members(contract) if not has_member(part, name)]
    if missing and len(missing) < len(members(contract)):
        raise TypeError(f"{type(part).__name__} has no {', '.join(missing)} ({contract.__name__} of "
                        "mmdet3d.interfaces)")
    return not missing


def has_member(part: Any, name: str) -> bool:
    """Whether a part has an attribute or method; the ``forward`` that every module inherits is none."""
    if name.startswith("__"):  # which Python looks for in the class, and type(part) would find in the class of that too
        return any(name in vars(base) for base in type(part).__mro__)
    missing = object()
    found = getattr(part, name, missing)
    return found is not missing and getattr(found, "__func__", found) is not nn.Module.forward


def accepts(method: Any, call: inspect.Signature) -> bool:
    """Whether a method can be called with the arguments of a signature; True where its own cannot be known."""
    kinds = inspect.Parameter
    positional = [p for p in call.parameters.values() if p.kind is kinds.POSITIONAL_ONLY]
    keywords = {p.name: None for p in call.parameters.values() if p.kind is kinds.KEYWORD_ONLY}
    try:
        signature = inspect.signature(method)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*positional, **keywords)
    except TypeError:
        return False
    return True
