"""The random generators of a process as plain tensors and numbers: to save them, and to leave them undisturbed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


def capture_random_state(device: torch.device | str = "cpu") -> dict[str, Any]:
    """States of the global generators of Python, NumPy and PyTorch, and of the CUDA generator of ``device``.

    Returns:
        ``python``, ``numpy`` and ``torch``, and ``cuda`` for a CUDA device; tensors, numbers and strings only.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global generator is meant
    state = {
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {"kind": kind, "keys": torch.from_numpy(keys.astype(np.int64)), "position": int(position),
                  "has_gauss": int(has_gauss), "cached": float(cached)},
        "torch": torch.get_rng_state(),
    }
    if torch.device(device).type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: Mapping[str, Any], device: torch.device | str = "cpu") -> None:
    """Put the generators back to what :func:`capture_random_state` saw.

    The CUDA generator stays as it is where the state has none, or ``device`` is no CUDA device.

    Raises:
        ValueError: a state is missing or does not fit the generator.
    """
    try:
        python, arrays = state["python"], state["numpy"]
        random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
        np.random.set_state((arrays["kind"], arrays["keys"].numpy().astype(np.uint32), arrays["position"],  # noqa: NPY002
                             arrays["has_gauss"], arrays["cached"]))
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and torch.device(device).type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"states of random generators do not fit: {type(error).__name__}: {error}") from error


@contextlib.contextmanager
def preserved_random_state(device: torch.device | str = "cpu") -> Iterator[None]:
    """Whatever is drawn inside, the generators are afterwards as they were before."""
    state = capture_random_state(device)
    try:
        yield
    finally:
        restore_random_state(state, device)
