"""Where the messages of the library go in a command: to the terminal, and of rank 0 to a file."""

from __future__ import annotations

import logging
import os
from pathlib import Path

NAME = "mmdet3d"
_FORMAT = "%(asctime)s - %(name)s - %(levelname)s - %(message)s"


def setup_logger(log_file: str | os.PathLike | None = None, level: int | str = logging.INFO, rank: int = 0
                 ) -> logging.Logger:
    """Let the loggers of all modules of this package write to standard error, and to a file.

    May be called again, for example when the file is known; then the new settings replace the old ones.

    Args:
        log_file: File that messages are added to, by rank 0 only.
        level: Least level of messages, as number or name. Other ranks write errors only, with their rank.
        rank: This process.

    Returns:
        The logger ``mmdet3d``.

    Raises:
        ValueError: there is no such level.
    """
    logger = logging.getLogger(NAME)
    for handler in [h for h in logger.handlers if getattr(h, "set_up_here", False)]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(level if rank == 0 else logging.ERROR)
    logger.propagate = False
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if log_file is not None and rank == 0:
        Path(log_file).parent.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(log_file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT if rank == 0 else f"[rank {rank}] {_FORMAT}"))
        handler.set_up_here = True
        logger.addHandler(handler)
    return logger
