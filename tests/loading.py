"""Modules from files that lie in no package: tools, and what makes data for tests."""

import importlib.util
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1] / "tools"


def load_module(path):
    """The Python module in the file ``path``: a new one at each call, which no import finds."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tool(name):
    """The module of ``tools/<name>.py``."""
    return load_module(TOOLS / f"{name}.py")
