"""Where a training run keeps its checkpoints, which of them is the newest, and what may go.

    <work_dir>/iter_<n>.pth                     main file: weights, optimizer, everything the processes share
    <work_dir>/state/iter_<n>-<id>/rank_<k>.pth what each process has for itself
    <work_dir>/latest.pth                       link to the newest main file

Every file and the link appear as a whole or not at all. A main file is written last and names its folder of rank
files, so whatever gets in the way, the previous checkpoint is complete. Processes on several machines need a common
folder.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdet3d.utils.checkpoint import CheckpointError, read_checkpoint

logger = logging.getLogger(__name__)

LATEST = "latest.pth"
STATE_FOLDER = "state"
_MAIN_NAME = re.compile(r"iter_(\d+)\.pth")
_TEMPORARY = ".*.tmp"


@dataclass
class Resumed:
    """What a training that goes on from a checkpoint still needs of it: ``runner.resumed``.

    Attributes:
        path: Main file, resolved.
        rank_folder: Name of its folder of rank files; None without one.
        batches_ahead: Batches that the sampler had given, less the finished iterations.
        hook_states: By ``state_key``; empty after the hooks' ``before_run``.
    """

    path: Path
    rank_folder: str | None
    batches_ahead: int
    hook_states: dict[str, Any]


def rank_folder_name(path: Path) -> str:
    """A new name for the folder of rank files of the main file ``path``."""
    return f"{path.stem}-{uuid.uuid4().hex[:8]}"


def rank_file(path: Path, folder: str, rank: int) -> Path:
    """File of process ``rank`` that belongs to the main file ``path`` with the folder of rank files ``folder``."""
    return path.parent / STATE_FOLDER / folder / f"rank_{rank}.pth"


def iteration_of(path: Path) -> int | None:
    """Number in the name of a main file; None for other files, such as averaged weights."""
    match = _MAIN_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(work_dir: str | os.PathLike) -> list[Path]:
    """Main files by ascending iteration."""
    found = (path for path in Path(work_dir).glob("iter_*.pth") if iteration_of(path) is not None and path.is_file())
    return sorted(found, key=iteration_of)


def find_latest(work_dir: str | os.PathLike) -> Path | None:
    """Newest checkpoint of a run that can be read; None without one. See :func:`read_latest`."""
    return read_latest(work_dir)[0]


def read_latest(work_dir: str | os.PathLike, known: Mapping[Path, dict[str, Any]] | None = None
                ) -> tuple[Path | None, dict[str, Any]]:
    """Newest checkpoint of a run that can be read, and its content; None and an empty dict without one.

    It is the one that ``latest.pth`` points to, or a later one that was completed after the link was set (the process
    ended between the two steps). A checkpoint that cannot be read is passed over with a warning, one that is ``known``
    (contents by resolved path) is not read again.

    Raises:
        CheckpointError: there are checkpoints, but none can be read; to begin anew would overwrite them.
    """
    problems = []
    for path in _by_preference(Path(work_dir)):
        try:
            return path, (known or {}).get(path.resolve()) or read_checkpoint(path)
        except CheckpointError as error:
            logger.warning("passed over: %s", error)
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"{work_dir}: none of its {len(problems)} checkpoints can be read; the newest: "
                              f"{problems[0]}")
    return None, {}


def _by_preference(work_dir: Path) -> Iterator[Path]:
    newest_first = list_checkpoints(work_dir)[::-1]
    link = work_dir / LATEST
    target = link.resolve() if link.is_file() else None
    if target is None:
        yield from newest_first
        return
    linked, since = iteration_of(target), link.lstat().st_mtime_ns
    # A folder may hold later iterations of an earlier attempt: then the link knows which attempt is the current one.
    later = [path for path in newest_first if linked is not None and iteration_of(path) > linked
             and path.stat().st_mtime_ns > since]
    yield from later
    yield target if target.parent != work_dir.resolve() else work_dir / target.name
    yield from (path for path in newest_first if path not in later and path.name != target.name)


def set_latest(path: Path) -> None:
    """Let ``latest.pth`` beside the main file ``path`` point to it; a warning where the file system has no links."""
    link = path.parent / LATEST
    temporary = link.with_name(f".{LATEST}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        temporary.symlink_to(path.name)
        os.replace(temporary, link)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        logger.warning("%s could not be set (%s); the newest checkpoint is %s", link, error.strerror or error, path)


def sync_folder(folder: Path) -> None:
    """Force the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_other_rank_files(work_dir: Path, keep: str | None) -> None:
    """Remove all folders of rank files but ``keep``: they are large, and only the newest checkpoint needs them."""
    with contextlib.suppress(OSError):
        for folder in (work_dir / STATE_FOLDER).iterdir():
            if folder.is_dir() and folder.name != keep:
                shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers(work_dir: str | os.PathLike, resumed: Resumed | None = None) -> None:
    """Remove what a process left behind that was killed while it wrote: temporary files, and rank files of no use.

    Not to be called while another process trains in the same folder. What the run goes on from is not read again.
    """
    work_dir = Path(work_dir)
    for folder in ("", f"{STATE_FOLDER}/*/", "nonfinite/"):
        for leftover in work_dir.glob(f"{folder}{_TEMPORARY}"):
            if leftover.is_symlink() or leftover.is_file():
                logger.info("removed %s, left behind by a process that did not finish writing it", leftover)
                leftover.unlink(missing_ok=True)
    if (work_dir / STATE_FOLDER).is_dir():
        known = {resumed.path: {"training_state": {"rank_folder": resumed.rank_folder}}} if resumed else {}
        try:
            state = read_latest(work_dir, known)[1].get("training_state", {})
        except CheckpointError:
            return  # somebody may want to repair them
        remove_other_rank_files(work_dir, state.get("rank_folder"))


def remove_old_checkpoints(path: Path, keep: int) -> None:
    """Keep the main file ``path`` and the ``keep`` - 1 before it; remove those of earlier iterations.

    Later iterations, which an earlier attempt may have left, and averaged weights stay.
    """
    earlier = [other for other in list_checkpoints(path.parent) if iteration_of(other) < iteration_of(path)]
    for other in earlier[: max(len(earlier) - keep + 1, 0)]:
        with contextlib.suppress(OSError):
            other.unlink()
