"""torchrun with exit statuses and messages for people: what ``tools/dist_train.sh`` starts.

    python -m mmdet3d.utils.launch --nproc-per-node=2 tools/train.py CONFIG --launcher pytorch
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run torchrun with ``arguments``.

    A signal is passed on to all processes, which have half a minute to save and end. Where a process fails, torchrun
    ends the others.

    Returns:
        0; 1 where a process failed, after a line that says which and how; 128 + number of a signal that ended the
        job (130 after Ctrl-C, 143 after SIGTERM).
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing.errors.error_handler").setLevel(logging.CRITICAL)
    try:
        run.main(None if arguments is None else list(arguments))
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        how = signal.Signals(-first.exitcode).name if first.exitcode < 0 else f"exit status {first.exitcode}"
        sys.stderr.write(f"process {rank} failed first ({how}); all others were ended\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
