"""Operators of the project, read from the sources in ``mmdet3d/ops/<op>/src``; nothing is compiled or imported."""

import re
from pathlib import Path

OPS = Path(__file__).resolve().parents[1] / "ops"
_KERNELS = re.compile(r"TORCH_LIBRARY_IMPL\(mmdet3d,\s*(CPU|CUDA),\s*m\)\s*\{(.*?)\}", re.DOTALL)
_NAMES = re.compile(r'm\.impl\(\s*"(\w+)"')


def operator_folders() -> list[str]:
    """Names of the folders that hold an operator, or several that belong together."""
    return sorted(path.parent.name for path in OPS.glob("*/src") if (path.parent / "__init__.py").is_file())


def operator_kernels() -> dict[str, list[str]]:
    """Names in ``torch.ops.mmdet3d``, and the devices, ``CPU`` and ``CUDA``, that the sources have a kernel for.

    Empty where the package was installed without its sources.
    """
    found: dict[str, list[str]] = {}
    for folder in operator_folders():
        for path in sorted((OPS / folder / "src").glob("*.c*")):
            for device, body in _KERNELS.findall(path.read_text(encoding="utf-8")):
                for name in _NAMES.findall(body):
                    found.setdefault(name, []).append(device)
    return {name: sorted(devices) for name, devices in sorted(found.items())}
