"""Checkpoints: read without running code, loaded all or nothing, written so that no crash leaves half a file.

Accepted are the checkpoints of this project and of the mmcv runner (a dict with ``meta``, ``state_dict`` and
``optimizer``), averaged weights (``state_dict``, ``updates`` and ``iter`` or ``epoch``) and bare state dicts.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmdet3d.utils.files import atomic_write
from mmdet3d.utils.safe_pickle import numpy_globals
from mmdet3d.utils.text import listing

logger = logging.getLogger(__name__)

_ZIP_START = b"PK\x03\x04"
# torch.save before 1.6 began every file with this number
_LEGACY_STARTS = tuple(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=p) for p in range(2, 6))
_NUMPY_TYPES = (np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64, np.float16,
                np.float32, np.float64, np.str_)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, does not fit the model, or cannot be written; the message names the file."""


@dataclass(frozen=True)
class LoadReport:
    """What :func:`load_checkpoint` did.

    Attributes:
        loaded: Keys copied into the model.
        missing: Keys of the model that the file lacks.
        unexpected: Keys of the file that the model lacks.
        mismatched: (key, shape in the file, shape in the model) of entries that differ in shape; None if not a tensor.
        path: The file.
        meta: The file's ``meta`` with its ``iter``, ``epoch`` and ``updates``, as far as it has them.
        nonfinite: Loaded keys that hold NaN or infinity.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: tuple[tuple[str, tuple[int, ...] | None, tuple[int, ...] | None], ...]
    path: Path
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False)
    nonfinite: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether file and model have the same keys and shapes."""
        return not (self.missing or self.unexpected or self.mismatched)

    def summary(self) -> str:
        """How much was loaded, and a line with count and first entries for each kind of difference."""
        total = len(self.loaded) + len(self.missing) + len(self.mismatched)
        lines = [f"{self.path}: loaded {len(self.loaded)} of the model's {total} entries", *self.differences()]
        if self.nonfinite:
            lines.append(f"{len(self.nonfinite)} loaded entries hold NaN or infinity: {listing(self.nonfinite)}")
        return "\n  ".join(lines)

    def differences(self, owner: str = "model") -> list[str]:
        """A line for each kind of difference, with its number and first entries; ``owner``: what has the entries."""
        shapes = [f"{key} ({_words(found)} in the file, {_words(expected)} in the {owner})"
                  for key, found, expected in self.mismatched]
        return [f"{len(entries)} {what}: {listing(entries)}"
                for what, entries in (("missing in the file", self.missing),
                                      (f"unknown to the {owner}", self.unexpected), ("of another shape", shapes))
                if entries]


def _words(shape: tuple[int, ...] | None) -> str:
    return "no tensor" if shape is None else str(list(shape))


def read_checkpoint(path: str | os.PathLike, allow_unsafe: bool = False, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint file.

    Tensors, numbers, strings, containers and NumPy numbers and arrays are read. Anything else, which could run code
    while it is read, is refused unless ``allow_unsafe`` is set.

    Args:
        path: The file.
        allow_unsafe: Read a file that asks for other classes or functions too. Only for files whose author you trust.
        map_location: Where tensors go, as in ``torch.load``.

    Returns:
        The dict in the file; a bare state dict comes as ``{"state_dict": ...}``. ``["state_dict"]`` maps names to
        tensors, without the prefix ``module.`` of a parallel wrapper.

    Raises:
        CheckpointError: the file is missing, damaged, no checkpoint, or would run code.
    """
    path = Path(path)
    _check_file(path)
    content = _unpickle(path, allow_unsafe, map_location)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dict with a state_dict of tensors")
    content = dict(content)
    if "state_dict" not in content:
        if not content or not all(isinstance(value, Tensor) for value in content.values()):
            raise CheckpointError(f"{path}: a dict without the key 'state_dict' whose values are not all tensors; "
                                  f"found the keys {listing([repr(key) for key in content]) or '(none)'}")
        content = {"state_dict": content}
    content["state_dict"] = _clean_state_dict(path, content["state_dict"])
    return content


def _clean_state_dict(path: Path, state_dict: Any) -> dict[str, Any]:
    if not isinstance(state_dict, Mapping) or not any(isinstance(v, Tensor) for v in state_dict.values()):
        raise CheckpointError(f"{path}: its state_dict is a {type(state_dict).__name__} without any tensor")
    if wrong := [repr(key) for key in state_dict if not isinstance(key, str)]:
        raise CheckpointError(f"{path}: its state_dict has keys that are no names: {listing(wrong)}")
    if all(key.startswith("module.") for key in state_dict):
        return {key.removeprefix("module."): value for key, value in state_dict.items()}
    return dict(state_dict)


def _check_file(path: Path) -> None:
    """Find out by its outside, before anything is unpickled, that ``path`` is a file of ``torch.save``."""
    try:
        if path.is_dir():
            inside = sorted(p.name for p in path.glob("*.pth"))
            raise CheckpointError(f"{path}: is a folder, expected a file"
                                  + (f"; it holds {listing(inside)}" if inside else ""))
        if not path.exists():
            raise CheckpointError(f"{path}: no such file{_near_names(path)}")
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(_ZIP_START):
            _check_archive(path)
        elif not start.startswith(_LEGACY_STARTS):
            raise CheckpointError(f"{path}: not a checkpoint of torch.save, {_guess_kind(start)}")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_archive(path: Path) -> None:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: damaged or cut off after {path.stat().st_size} bytes (the end of the archive "
                              "is missing); copy or download it again")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{path}: damaged archive ({error}); copy or download it again") from error
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(f"{path}: a TorchScript model, expected a checkpoint of torch.save")
    if not any(name.endswith("/data.pkl") for name in names):
        raise CheckpointError(f"{path}: a zip archive, but not one of torch.save (it holds {listing(names)})")


def _guess_kind(start: bytes) -> str:
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of git-lfs (run: git lfs pull)"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page, so the download went wrong"
    if start[:1] == b"\x80":
        return "it is a plain pickle, such as an info file"
    return f"it starts with {start[:16]!r}"


def _near_names(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"; the folder {folder} does not exist either"
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5) or [n for n in names if n.endswith(".pth")]
    return f"; in the same folder: {listing(near)}" if near else f"; {folder} holds no .pth file"


def _unpickle(path: Path, allow_unsafe: bool, map_location: Any) -> Any:
    try:
        with _numpy_allowed():
            return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if not allow_unsafe:
            raise CheckpointError(_refusal(path, error)) from error
    except Exception as error:      # what a damaged file raises depends on where it is damaged
        raise CheckpointError(f"{path}: damaged or cut off: {_reason(error)}; copy or download it again") from error
    logger.warning("%s: read as a trusted file, which may run any code", path)
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error


def _refusal(path: Path, error: pickle.UnpicklingError) -> str:
    """Message for a file that the weights-only reader refuses, with the class or function that it asks for."""
    remedy = ("If you trust its author, allow it with allow_unsafe=True (on the command line "
              "--allow-unsafe-checkpoint)")
    if blocked := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (f"{path}: refused, because reading it would use {blocked.group(1)}, which weights do not need and "
                f"which may run any code. {remedy}")
    return f"{path}: damaged, or not readable without running code from it ({_reason(error)}). {remedy}"


def _reason(error: BaseException) -> str:
    """Type and first words of an error, without the advice that torch.load wraps around them."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _renamed(function: Callable, module: str, name: str) -> Callable:
    """``function`` under the name that a file knows it by; NumPy 1 and 2 write different ones for the same function."""
    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return function(*args)
    call.__module__, call.__name__, call.__qualname__ = module, name, name
    return call


@functools.lru_cache(maxsize=1)
def _safe_globals() -> tuple[Any, ...]:
    """What NumPy numbers and arrays of plain types need to be read: constructors only, none for objects."""
    named = [entry if isinstance(entry, type) else _renamed(entry, module, name)
             for (module, name), entry in numpy_globals().items()]
    return (*named, *{type(np.dtype(kind)) for kind in _NUMPY_TYPES})


@contextlib.contextmanager
def _numpy_allowed() -> Iterator[None]:
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([g for g in _safe_globals() if g not in before])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def load_checkpoint(model: nn.Module, path: str | os.PathLike, *, strict: bool = True, averaged: bool = False,
                    allow_unsafe: bool = False, map_location: Any = "cpu") -> LoadReport:
    """Load the weights of a file into a model. The model changes only after everything has been checked.

    Args:
        model: The model, also inside a parallel wrapper.
        path: The file, see :func:`read_checkpoint`.
        strict: Require the same keys and shapes. If False, entries that agree in key and shape are loaded and the
            report names the others; this is the way to start from pre-trained parts.
        averaged: Load the averaged weights that a checkpoint of a training holds besides those that it trains. In a
            file of averaged weights alone they are what is loaded anyway.
        allow_unsafe: Passed to :func:`read_checkpoint`.
        map_location: Passed to :func:`read_checkpoint`.

    Returns:
        What was loaded and what was not. The caller logs its ``summary()``.

    Raises:
        CheckpointError: the file cannot be read; it holds no averaged weights (``averaged``); it does not fit
            (``strict``); nothing in it fits; an entry's numbers cannot be kept in the model's data type; the model is
            on the meta device.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, allow_unsafe, map_location)
    if averaged and "updates" not in checkpoint:
        checkpoint = _averaged_weights(path, checkpoint)
    return load_weights(model, checkpoint, path, strict=strict)


def load_weights(model: nn.Module, checkpoint: Mapping[str, Any], path: Path, *, strict: bool = True) -> LoadReport:
    """Do as :func:`load_checkpoint` with what :func:`read_checkpoint` has read from ``path``."""
    while isinstance(getattr(model, "module", None), nn.Module) and all(
            key.startswith("module.") for key in model.state_dict()):
        model = model.module
    fitting, report = compare_weights(path, checkpoint, model.state_dict())
    if not report.loaded or (strict and not report.complete):
        raise CheckpointError(_misfit_message(report, type(model).__name__, strict))
    model.load_state_dict(fitting, strict=False)
    return report


def _averaged_weights(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What the hook that averages weights has saved in the checkpoint of a training."""
    state: Any = checkpoint
    for key in ("training_state", "hooks", "ema"):
        state = state.get(key) if isinstance(state, Mapping) else None
    if not isinstance(state, Mapping) or "state_dict" not in state:
        raise CheckpointError(f"{path}: holds no averaged weights; the checkpoints of a training with MEGVIIEMAHook do")
    return {**state, "state_dict": _clean_state_dict(path, state["state_dict"])}


def compare_weights(path: Path, checkpoint: Mapping[str, Any], own: Mapping[str, Any]
                    ) -> tuple[dict[str, Any], LoadReport]:
    """Entries of a checkpoint read from ``path`` that agree in key and shape with the state dict ``own``, and a report.

    Raises:
        CheckpointError: an entry's numbers cannot be kept in its data type in ``own``, or that is on the meta device.
    """
    entries = checkpoint["state_dict"]
    fitting, mismatched = {}, []
    for key in own:
        if key not in entries:
            continue
        found, expected = _shape(entries[key]), _shape(own[key])
        if found == expected:
            _check_type(path, key, entries[key], own[key])
            fitting[key] = entries[key]
        else:
            mismatched.append((key, found, expected))
    loaded = tuple(key for key in own if key in fitting)
    meta = checkpoint.get("meta")
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    meta.update({key: checkpoint[key] for key in ("iter", "epoch", "updates") if key in checkpoint})
    return fitting, LoadReport(
        loaded=loaded, missing=tuple(key for key in own if key not in entries),
        unexpected=tuple(key for key in entries if key not in own), mismatched=tuple(mismatched),
        path=path, meta=meta, nonfinite=tuple(key for key in loaded if _holds_nonfinite(fitting[key])))


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _holds_nonfinite(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())


def _check_type(path: Path, key: str, value: Any, own: Any) -> None:
    """Refuse copies that would change numbers beyond rounding, and models without storage."""
    if not isinstance(own, Tensor):
        return
    if own.is_meta:
        raise CheckpointError(f"{path}: the model's entry {key!r} is on the meta device; give the model storage first")
    keeps = value.layout == torch.strided and value.is_complex() == own.is_complex() and not value.is_quantized
    if keeps and value.is_floating_point() and not own.is_floating_point():
        keeps = torch.equal(value.to(own.dtype).to(value.dtype), value)
    if not keeps:
        raise CheckpointError(f"{path}: the entry {key!r} ({value.dtype}, {value.layout}) cannot be kept as the "
                              f"model's {own.dtype} without changing its values")


def _misfit_message(report: LoadReport, model: str, strict: bool) -> str:
    differences = "".join(f"\n  {line}" for line in report.differences())
    if not report.loaded:
        remedy = "nothing was loaded. Is it the checkpoint of another model?"
    else:
        remedy = (f"nothing was loaded. Use the config that the file was trained with, or strict=False to load the "
                  f"{len(report.loaded)} entries that fit")
    return f"{report.path}: does not fit {model} ({'strict' if strict else 'no entry fits'}):{differences}\n  {remedy}"


def save_checkpoint(state: Any, path: str | os.PathLike) -> Path:
    """Write ``state`` with ``torch.save`` so that ``path`` always holds either the old or the complete new file.

    The new file is written beside it under a temporary name, forced to disk and renamed. Missing folders are made.

    Args:
        state: What ``torch.save`` takes, usually a dict with ``meta``, ``state_dict`` and ``optimizer``.
        path: The file.

    Returns:
        ``path``.

    Raises:
        CheckpointError: the file cannot be written, for example because the disk is full; the old file is unchanged.
    """
    path = Path(path)
    try:
        with atomic_write(path, sync=True) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        reason = _system_error(error)
        raise CheckpointError(f"{path}: could not be written ({reason}); "
                              f"{'the old file is unchanged' if path.is_file() else 'no file was made'}") from error
    return path


def _system_error(error: BaseException) -> str:
    """The system's words for a failed write; torch.save may have wrapped them in an error of its own."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__context__
    return _reason(error)
