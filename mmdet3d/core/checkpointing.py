"""Checkpoints that a training run continues from as if nothing had happened.

A checkpoint is a main file in the format of the mmcv runner (``meta``, ``state_dict``, ``optimizer``) with one more
key, ``training_state``, and a folder of rank files; see :mod:`mmdet3d.core.checkpoint_files`. Everything is plain
tensors, numbers, strings and containers, so it is read without running code.

``meta.iter`` is the 0-based index of the last finished iteration. Gradients are not in a checkpoint: it is made
between two optimizer steps, never amid an accumulation of gradients (:func:`between_steps`).

Hooks that have to remember something define ``state_key`` (a name of their own) and
``training_state(runner, finished)`` (plain content after that many finished iterations; called in process 0), and
read what they gave from ``runner.resumed.hook_states`` in ``before_run``, after which it is emptied.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmcv.runner import Hook
from torch import Tensor
from torch import distributed as dist

import mmdet3d
from mmdet3d.core.checkpoint_files import (
    Resumed,
    find_latest,
    rank_file,
    rank_folder_name,
    remove_other_rank_files,
    set_latest,
    sync_folder,
)
from mmdet3d.core.parallel import unwrap
from mmdet3d.core.random_state import capture_random_state, restore_random_state
from mmdet3d.datasets.samplers.sequence import distributed_place
from mmdet3d.interfaces import EndsStep, KeepsMemory, TrainingState, offers
from mmdet3d.structures import TemporalMemory
from mmdet3d.utils.checkpoint import CheckpointError, load_weights, read_checkpoint, save_checkpoint

__all__ = ["CheckpointError", "between_steps", "find_latest", "resume_training_state",
           "save_training_state", "to_plain", "versions"]

logger = logging.getLogger(__name__)

FORMAT = 1


def versions() -> dict[str, str]:
    """Versions of what a training result depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()), "numpy": np.__version__, "mmcv": mmcv.__version__,
            "mmdet3d": mmdet3d.__version__}


def between_steps(runner: Any) -> bool:
    """Whether the current iteration ends with an optimizer step, in a hook after it; else gradients accumulate."""
    return all(hook.steps_after(runner) for hook in runner.hooks if offers(hook, EndsStep))


def to_plain(value: Any, unknown: Callable[[Any], Any] | None = None) -> Any:
    """``value`` out of tensors on the CPU (without gradient or unused storage), numbers, strings and containers.

    Args:
        value: Containers of tensors, NumPy arrays and numbers, and plain Python values.
        unknown: Called for anything else, for example ``repr``.

    Raises:
        TypeError: there is anything else and ``unknown`` is None.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        whole = value.numel() * value.element_size() == value.untyped_storage().nbytes()
        return value if whole else value.clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {to_plain(key, unknown): to_plain(entry, unknown) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return (list if isinstance(value, list) else tuple)(to_plain(entry, unknown) for entry in value)
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):  # versions and enumerations are subclasses, which only their package can read
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    if unknown is None:
        raise TypeError(f"a checkpoint holds plain values only, got {type(value).__name__}: {value!r:.80}")
    return unknown(value)


# ---- saving ---------------------------------------------------------------------------------------------------------


def save_training_state(runner: Any, path: str | os.PathLike, *, finished: int | None = None, save_memory: bool = True,
                        save_optimizer: bool = True) -> Path:
    """Write a checkpoint; to be called by all processes at the same point between two optimizer steps.

    Each process writes its rank file first; when all are there, process 0 writes the main file, lets ``latest.pth``
    point to it and removes the rank files of older checkpoints. Whatever goes wrong, the previous checkpoint stays.

    Args:
        runner: A :class:`mmdet3d.core.runner.TrainRunner`.
        path: Main file, ``<work_dir>/iter_<n>.pth``.
        finished: Number of finished iterations. The default is ``runner.iter + 1``, right in hooks after an iteration.
        save_memory: Save the temporal memory. At full size it takes 0.5 GB per sample of the batch; without it the
            model resumes without a past.
        save_optimizer: Save the state of the optimizer; without it training cannot be continued exactly.

    Returns:
        ``path``.

    Raises:
        CheckpointError: a file of any process cannot be written; raised in all processes, naming the process.
    """
    path, rank = Path(path), distributed_place()[0]
    finished = runner.iter + 1 if finished is None else finished
    folder = _from_first_process(rank_folder_name(path))
    own = rank_file(path, folder, rank)
    try:
        _all_or_none(lambda: save_checkpoint(_rank_content(runner, save_memory), own))
        _all_or_none(lambda: rank == 0 and _save_main(runner, path, folder, finished, save_optimizer))
    except Exception:
        if rank == 0:
            shutil.rmtree(own.parent, ignore_errors=True)
        raise
    return path


def _from_first_process(value: Any) -> Any:
    values = [value]
    if distributed_place()[1] > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def _all_or_none(action: Callable[[], Any]) -> None:
    """Run ``action``; if it fails in any process, raise in all of them, so that none waits for the others."""
    rank, world_size = distributed_place()
    error = None
    try:
        action()
    except Exception as caught:
        if world_size == 1:
            raise
        error = caught
    if world_size == 1:
        return
    messages = [None] * world_size
    dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
    for other, message in enumerate(messages):
        if message is not None:
            raise CheckpointError(f"process {other}: {message}") from (error if other == rank else None)


def _rank_content(runner: Any, save_memory: bool) -> dict[str, Any]:
    """What a process has for itself. Processes other than the first have running statistics of their own, too."""
    rank, world_size = distributed_place()
    model = unwrap(runner.model)
    memory = model.memory if save_memory and offers(model, KeepsMemory) else None
    return {"format": FORMAT, "rank": rank, "world_size": world_size,
            "random": capture_random_state(_device(model)),
            "memory": None if memory is None else to_plain(memory.state_dict()), "has_memory": save_memory,
            "buffers": to_plain(_persistent_buffers(model)) if rank > 0 else {}}


def _save_main(runner: Any, path: Path, folder: str, finished: int, save_optimizer: bool) -> None:
    model = unwrap(runner.model)
    content = {"meta": _meta(runner, model, finished), "state_dict": to_plain(model.state_dict())}
    if save_optimizer:
        content["optimizer"] = to_plain(runner.optimizer.state_dict())
    content["training_state"] = _training_state(runner, folder, finished)
    save_checkpoint(content, path)
    sync_folder(path.parent)
    set_latest(path)
    remove_other_rank_files(path.parent, folder)


def _meta(runner: Any, model: Any, finished: int) -> dict[str, Any]:
    meta = {**(runner.meta or {}), "epoch": 1, "iter": finished - 1, "time": time.asctime(),
            "mmcv_version": mmcv.__version__, "versions": versions()}
    classes = {name: getattr(model, name) for name in ("CLASSES", "PALETTE") if getattr(model, name, None) is not None}
    return to_plain({**meta, **classes}, unknown=str)


def _training_state(runner: Any, folder: str, finished: int) -> dict[str, Any]:
    sampler = getattr(runner, "train_sampler", None)
    batches = finished + (runner.resumed.batches_ahead if runner.resumed else 0)
    hooks = {hook.state_key: to_plain(hook.training_state(runner, finished)) for hook in runner.hooks
             if offers(hook, TrainingState)}
    return {"format": FORMAT, "iteration": finished, "world_size": distributed_place()[1], "rank_folder": folder,
            "sampler": None if sampler is None else to_plain(sampler.state_dict(batches=batches)), "hooks": hooks}


def _device(model: Any) -> torch.device:
    return next(model.parameters()).device


def _persistent_buffers(model: Any) -> dict[str, Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in model.state_dict().items() if name not in parameters}


# ---- resuming -------------------------------------------------------------------------------------------------------


def resume_training_state(runner: Any, path: str | os.PathLike, *, content: dict[str, Any] | None = None,
                          allow_new_layout: bool = False, allow_unsafe: bool = False) -> None:
    """Let ``runner`` continue where a checkpoint was made; to be called by all processes before ``runner.run``.

    Of a checkpoint without ``training_state``, as the mmcv runner writes it, weights, optimizer and iteration are
    restored as that runner does: the iteration ``meta.iter`` is repeated. A warning says what starts anew.

    The random generators are put back just before the first iteration, because starting worker processes draws from
    them.

    Args:
        runner: As for :func:`save_training_state`, before its hooks' ``before_run``.
        path: Main file, or a link to it.
        content: What is in it, if it was read already.
        allow_new_layout: Continue although the number of processes, the batch size, the seed or the data set is not
            that of the checkpoint: weights, optimizer, averaged weights and iteration are restored; the order of
            samples begins anew, without a past in the temporal memory and with the random numbers of this run.
        allow_unsafe: Read a file that could run code; see :func:`mmdet3d.utils.checkpoint.read_checkpoint`.

    Raises:
        CheckpointError: a file cannot be read, does not fit model or optimizer, or belongs to another layout. The
            runner is then as it was.
    """
    path = Path(path).resolve()
    checkpoint = read_checkpoint(path, allow_unsafe) if content is None else content
    state = checkpoint.get("training_state")
    iteration = _iteration(path, checkpoint, state)
    _check_optimizer(path, checkpoint.get("optimizer"), runner.optimizer)
    same_layout = state is not None and _check_layout(runner, path, state, allow_new_layout)
    own = _read_rank_file(path, state) if same_layout else None
    load_weights(runner.model, checkpoint, path)
    if "optimizer" in checkpoint:
        runner.optimizer.load_state_dict(checkpoint["optimizer"])
    batches = _restore_sampler(runner, state) if same_layout else 0
    runner.resumed = Resumed(path, state["rank_folder"] if state else None, batches - iteration,
                             dict(state["hooks"]) if state else {})
    _restore_rank(runner, own)
    runner._epoch, runner._iter, runner._inner_iter = 0, iteration, iteration
    _report(path, _anew(checkpoint, state, same_layout and getattr(runner, "train_sampler", None) is not None, own),
            iteration)


def _iteration(path: Path, checkpoint: Mapping[str, Any], state: Any) -> int:
    """Index of the iteration to go on with."""
    if state is None:
        meta = checkpoint.get("meta")
        if not isinstance(meta, Mapping) or not isinstance(meta.get("iter"), int):
            raise CheckpointError(f"{path}: holds weights, but no meta.iter, so no training can be resumed from it; "
                                  "to start from its weights use load_from")
        return meta["iter"]
    needed = {"format", "iteration", "world_size", "rank_folder", "sampler", "hooks"}
    if not isinstance(state, Mapping) or not needed <= set(state):
        found = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise CheckpointError(f"{path}: its training_state needs {sorted(needed)}, found {found}")
    if state["format"] != FORMAT:
        raise CheckpointError(f"{path}: its training_state has format {state['format']}, this version reads {FORMAT}")
    return int(state["iteration"])


def _check_optimizer(path: Path, saved: Any, optimizer: torch.optim.Optimizer) -> None:
    if saved is None:
        return
    own = optimizer.state_dict()["param_groups"]
    counts = [[len(group["params"]) for group in groups] for groups in (saved["param_groups"], own)]
    if counts[0] != counts[1]:
        raise CheckpointError(f"{path}: its optimizer has groups of {counts[0]} parameters, that of this run of "
                              f"{counts[1]}; use the optimizer and paramwise_cfg that the file was trained with")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    indices = [index for group in saved["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for name, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.dim() > 0 and value.shape != parameter.shape:
                raise CheckpointError(f"{path}: the optimizer's {name} of parameter {index} has shape "
                                      f"{list(value.shape)}, the parameter {list(parameter.shape)}")


def _check_layout(runner: Any, path: Path, state: Mapping[str, Any], allow_new_layout: bool) -> bool:
    """Whether the checkpoint's order of samples and its rank files have a meaning for this run."""
    world_size = distributed_place()[1]
    problem = None
    if state["world_size"] != world_size:
        problem = f"it was made by {state['world_size']} processes, this run has {world_size}"
    sampler = getattr(runner, "train_sampler", None)
    if problem is None and sampler is not None and state["sampler"] is not None:
        before = sampler.state_dict()
        try:
            sampler.load_state_dict(state["sampler"])
            sampler.load_state_dict(before)
        except ValueError as error:
            problem = str(error)
    if problem is None:
        return True
    if not allow_new_layout:
        raise CheckpointError(
            f"{path}: {problem}. Continue with what it was made with; or allow a new layout (allow_new_layout=True): "
            "weights, optimizer, averaged weights and iteration go on, the order of samples begins anew")
    return False


def _read_rank_file(path: Path, state: Mapping[str, Any]) -> dict[str, Any] | None:
    rank, world_size = distributed_place()
    own = rank_file(path, state["rank_folder"], rank)
    if not own.parent.is_dir():
        return None
    try:
        content = torch.load(own, map_location="cpu", weights_only=True)
        place = content["format"], content["rank"], content["world_size"]
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        raise CheckpointError(f"{own}: cannot be read ({type(error).__name__}: {error}); remove its folder to continue "
                              "without the random states and the temporal memory") from error
    if place != (FORMAT, rank, world_size):
        raise CheckpointError(f"{own}: format, rank and number of processes are {place}, expected "
                              f"{(FORMAT, rank, world_size)}")
    return content


def _restore_sampler(runner: Any, state: Mapping[str, Any]) -> int:
    """Batches that the sampler has given before the next one."""
    sampler = getattr(runner, "train_sampler", None)
    if sampler is None or state["sampler"] is None:
        return 0
    sampler.load_state_dict(state["sampler"])
    return int(state["sampler"]["batches"])


def _restore_rank(runner: Any, own: Mapping[str, Any] | None) -> None:
    model = unwrap(runner.model)
    if offers(model, KeepsMemory):
        saved = own["memory"] if own else None
        model.memory = None if saved is None else TemporalMemory.from_state_dict(saved).to(_device(model))
    if own is None:
        return
    if own["buffers"]:
        model.load_state_dict(own["buffers"], strict=False)
    runner.register_hook(_RandomStateHook(own["random"], _device(model)), priority="HIGHEST")


class _RandomStateHook(Hook):
    """Puts the random generators back before the first iteration, after the loader has started its workers."""

    def __init__(self, state: Mapping[str, Any], device: torch.device) -> None:
        self.state: Mapping[str, Any] | None = state
        self.device = device

    def before_train_iter(self, runner: Any) -> None:
        if self.state is not None:
            restore_random_state(self.state, self.device)
            self.state = None


def _anew(checkpoint: Mapping[str, Any], state: Mapping[str, Any] | None, with_order: bool,
          own: Mapping[str, Any] | None) -> list[str]:
    """What does not go on where it was."""
    anew = [] if "optimizer" in checkpoint else ["the optimizer"]
    if state is None:
        anew.append("averaged weights")
    if not with_order:
        anew.append("the order of samples")
    if own is None:
        anew.append("random states")
    if own is None or not own["has_memory"]:
        anew.append("the temporal memory")
    if own is None and with_order:
        anew[-1] += " (only the newest checkpoint keeps its rank files)"
    return anew


def _report(path: Path, anew: Sequence[str], iteration: int) -> None:
    if distributed_place()[0] != 0:
        return
    if anew:
        logger.warning("resumed from %s at iteration %d; these start anew: %s", path, iteration, ", ".join(anew))
    else:
        logger.info("resumed from %s at iteration %d with everything", path, iteration)
