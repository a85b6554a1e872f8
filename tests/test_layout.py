"""Rules of the source tree: who imports whom, what may not appear, and how long things may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mmdet3d"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").rglob("*.py"))
KERNELS = sorted(path for suffix in ("*.cpp", "*.h", "*.cu", "*.cuh") for path in PACKAGE.rglob(suffix))
# A module may import from its own layer and from those with a lower number.
LAYERS = {"structures": 0, "interfaces": 0, "registry": 0, "utils": 1, "ops": 1, "models": 2, "datasets": 2, "core": 3,
          "apis": 4, "tools": 5}
# Of the same layer, but reading data must not need the network's modules, nor the other way round.
STRANGERS = {("models", "datasets"), ("datasets", "models")}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 80


def tree_of(path):
    return ast.parse(path.read_text())


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path):
    """Names of the modules of this project that a file imports, anywhere in it."""
    package = module_name(path).split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def layer_of(module):
    """Name of the layer of a module, None for the package itself and for other packages."""
    parts = module.split(".")
    if parts[0] == "tools":
        return "tools"
    return parts[1] if parts[0] == "mmdet3d" and len(parts) > 1 else None


def breaks_the_order(importer, imported):
    return LAYERS[importer] < LAYERS[imported] or (importer, imported) in STRANGERS


def places(paths, wanted):
    """file:line of every syntax node that ``wanted`` says yes to."""
    return [f"{path.relative_to(ROOT)}:{node.lineno}" for path in paths for node in ast.walk(tree_of(path))
            if wanted(node)]


def test_the_scan_sees_the_sources():
    assert len(SOURCES) > 40 and len(KERNELS) > 5 and TOOLS
    assert "mmdet3d.registry.HEADS" in imported_modules(PACKAGE / "models/heads/occupancy_head.py")
    assert "mmdet3d.models.heads" in imported_modules(PACKAGE / "models/__init__.py")


def test_every_module_belongs_to_a_layer():
    assert {layer_of(module_name(path)) for path in SOURCES} - {None} <= set(LAYERS)


def test_no_module_imports_from_a_layer_above():
    wrong = [f"{path.relative_to(ROOT)} imports {imported}" for path in (*SOURCES, *TOOLS)
             for imported in imported_modules(path)
             if (importer := layer_of(module_name(path))) and (layer := layer_of(imported)) in LAYERS
             and breaks_the_order(importer, layer)]
    assert wrong == []


def test_the_library_does_not_print():
    assert places(SOURCES, lambda node: isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print") == []


def names_a_device(node):
    if not isinstance(node, ast.Call):
        return False
    if isinstance(node.func, ast.Attribute) and node.func.attr == "cuda":
        return True
    moved = node.args if isinstance(node.func, ast.Attribute) and node.func.attr == "to" else []
    values = [*moved, *(keyword.value for keyword in node.keywords if keyword.arg == "device")]
    return any(isinstance(value, ast.Constant) and str(value.value).startswith("cuda") for value in values)


@pytest.mark.parametrize("code, wrong", [
    ("x.cuda()", True), ("torch.zeros(3, device='cuda:0')", True), ("x.to('cuda')", True), ("x.to(device)", False),
    ("torch.cuda.is_available()", False), ("torch.zeros(3, device=x.device)", False)])
def test_the_device_rule_recognises_devices(code, wrong):
    assert names_a_device(ast.parse(code).body[0].value) is wrong


def test_no_device_is_named_outside_the_operators():
    assert places([path for path in SOURCES if PACKAGE / "ops" not in path.parents], names_a_device) == []


def test_no_path_of_somebodys_machine():
    # Absolute paths of users' or mounted folders; the system's own folders (/usr, /proc ...) are the same everywhere.
    path = re.compile(r"(?<![\w.\-/*:~)\]}>])/(?!usr/|proc/|sys/|etc/|dev/|bin/)[a-zA-Z]\w*/\w")
    assert path.search('open("/home/somebody/data")') and not path.search("a/b/c, ./a/b or https://a.b/c/d")

    def wanted(node):
        return isinstance(node, ast.Constant) and isinstance(node.value, str) and path.match(node.value)

    configs = sorted((ROOT / "config").rglob("*.py"))
    assert places([*SOURCES, *TOOLS, *configs], wanted) == []
    users = re.compile(r"/(home|Users|root|mnt|media)/\w")
    assert [str(p) for p in (*SOURCES, *TOOLS, *configs, *KERNELS) if users.search(p.read_text())] == []


def test_every_module_has_a_docstring():
    assert [str(path) for path in (*SOURCES, *TOOLS) if not ast.get_docstring(tree_of(path))] == []


def test_files_and_functions_are_short():
    long_files = {str(path.relative_to(ROOT)): lines for path in (*SOURCES, *TOOLS, *KERNELS)
                  if (lines := len(path.read_text().splitlines())) > MAX_FILE_LINES}
    assert long_files == {}
    assert places((*SOURCES, *TOOLS), lambda node: isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
                  and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES) == []


WITHOUT_MMCV = """
import sys
for name in ("mmcv", "mmdet", "mmseg"):
    sys.modules[name] = None  # importing it raises ImportError
import mmdet3d.datasets.infos, mmdet3d.datasets.labels
assert "torch" not in sys.modules, "labels and info files need no torch"
import mmdet3d.ops, mmdet3d.structures
assert mmdet3d.datasets.labels.OPENOCC and mmdet3d.ops.bev_pool_v2 and mmdet3d.structures.VoxelGrid
print("done")
"""


def test_data_descriptions_and_operators_import_without_mmcv():
    finished = subprocess.run([sys.executable, "-c", WITHOUT_MMCV], cwd=ROOT, capture_output=True, text=True,
                              check=False)
    assert finished.returncode == 0 and finished.stdout.strip() == "done", finished.stderr
