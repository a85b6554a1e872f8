"""The doctor: what this machine has, which operators are built for what, and what to do about each problem.

    python -m mmdet3d.utils.env [--json]

Packages are looked up, not imported, so that it also works where one of them is missing or broken; only PyTorch is
imported, and it may be missing too. The exit status is 0 without problems and 1 with some.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdet3d.utils.operators import operator_kernels

SETUP_COMMAND = "bash tools/setup_env.sh"
BUILD_COMMAND = "python setup.py build_ext --inplace"
CUDA_BUILD_COMMAND = f"MMDET3D_CUDA=1 {BUILD_COMMAND}"

#: Releases of Python that the project supports, first and last.
PYTHON_RANGE = ((3, 10), (3, 12))

#: Operators of the compiled library, and the devices that their sources have a kernel for.
OPERATORS = operator_kernels()

#: Distributions that provide a package, the preferred one first.
PACKAGES = {
    "torch": ("torch",),
    "torchvision": ("torchvision",),
    "numpy": ("numpy",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python"),
    "einops": ("einops",),
    "mmcv": ("mmcv-full", "mmcv"),
    "mmdet": ("mmdet",),
    "mmseg": ("mmsegmentation",),
    "nuscenes-devkit": ("nuscenes-devkit",),
}

#: Releases that the project works with: from the first, below the second.
ACCEPTED_VERSIONS = {
    "torch": ((2, 4), None),
    "torchvision": ((0, 19), None),
    "numpy": ((1, 23), (3,)),
    "mmcv": ((1, 7), (2,)),
    "mmdet": ((2, 28), (3,)),
    "mmseg": ((0, 30), (1,)),
}

#: OpenCV releases before this one were built for NumPy 1 alone.
FIRST_OPENCV_FOR_NUMPY_2 = (4, 10)


def collect_env() -> dict[str, Any]:
    """Looks at this machine.

    Returns:
        A dict that JSON can hold: ``python`` (version, executable), ``os``, ``compiler`` (path, version; None
        without one), ``packages`` (name to the list of its distributions that are installed, each with name and
        version), ``torch`` (version, cuda, cudnn, error), ``gpus`` (name, capability, memory_gb of each that
        PyTorch sees), ``driver`` (names and versions that nvidia-smi reports), ``cuda_toolkit`` (nvcc, version;
        None without one), ``operators`` (library, error, built_with_cuda, architectures, kernels) and ``problems``,
        see :func:`find_problems`.
    """
    env: dict[str, Any] = {
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "os": platform.platform(),
        "compiler": _compiler(),
        "packages": {name: _installed(distributions) for name, distributions in PACKAGES.items()},
        **_torch(),
        "driver": _command_lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "cuda_toolkit": _cuda_toolkit(),
        "operators": _operators(),
    }
    env["problems"] = find_problems(env)
    return env


def find_problems(env: dict[str, Any]) -> list[dict[str, str]]:
    """What is wrong in the result of :func:`collect_env`: a list of dicts with ``problem`` and ``remedy``."""
    checks = (_python_problems, _package_problems, _opencv_problems, _gpu_problems, _operator_problems)
    return [{"problem": problem, "remedy": remedy} for check in checks for problem, remedy in check(env)]


def format_env(env: dict[str, Any]) -> str:
    """The result of :func:`collect_env` as text, one fact a line, the problems last."""
    torch_info, toolkit, compiler = env["torch"], env["cuda_toolkit"], env["compiler"]
    rows = [
        ("Python", f"{env['python']['version']} ({env['python']['executable']})"),
        ("system", env["os"]),
        ("compiler", f"{compiler['version']} ({compiler['path']})" if compiler else "none found"),
        *((name, _format_package(found)) for name, found in env["packages"].items()),
        ("torch built for", f"CUDA {torch_info['cuda']}, cuDNN {torch_info['cudnn']}" if torch_info["cuda"] else "CPU"),
        ("CUDA toolkit", f"{toolkit['version']} ({toolkit['nvcc']})" if toolkit else "none found"),
        ("driver", "; ".join(env["driver"]) or "no NVIDIA driver found"),
    ]
    for index, gpu in enumerate(env["gpus"]):
        rows.append((f"GPU {index}", f"{gpu['name']}, {gpu['capability']}, {gpu['memory_gb']:.1f} GB"))
    if not env["gpus"]:
        rows.append(("GPU", "none that PyTorch can use"))
    rows += _operator_rows(env["operators"])
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += ["", f"problems: {len(env['problems']) or 'none'}"]
    for entry in env["problems"]:
        lines += [f"- {entry['problem']}", f"  remedy: {entry['remedy']}"]
    return "\n".join(lines) + "\n"


def architectures_cover(architectures: str, capability: str) -> bool | None:
    """Whether kernels built for ``architectures`` run on a GPU.

    Machine code runs on its own compute capability and later ones of the same major number, PTX on every later one,
    and code for an "a" architecture such as 9.0a on that one alone.

    Args:
        architectures: In the form of TORCH_CUDA_ARCH_LIST, such as ``"8.6;9.0+PTX"``.
        capability: Compute capability of the GPU, such as ``"8.9"``.

    Returns:
        The answer, or None if ``architectures`` holds a name this function does not know.
    """
    gpu = _version_tuple(capability)
    for name in re.split(r"[;,\s]+", architectures.strip()):
        match = re.fullmatch(r"(\d+\.\d+)(a?)(\+PTX)?", name)
        if match is None:
            return None
        built = _version_tuple(match[1])
        same_major = gpu[0] == built[0] and gpu >= built
        if gpu == built or (not match[2] and (same_major or (match[3] and gpu > built))):
            return True
    return False


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report to standard output and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mmdet3d.utils.env", description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="write JSON instead of text")
    options = parser.parse_args(arguments)
    env = collect_env()
    sys.stdout.write(json.dumps(env, indent=2) + "\n" if options.json else format_env(env))
    return 1 if env["problems"] else 0


# ---------------------------------------------------------------------------------------------------------- looking


def _command_lines(*command: str) -> list[str]:
    """Lines that a program writes to its standard output; none if it is missing, fails or hangs."""
    path = shutil.which(command[0])
    if path is None:
        return []
    try:
        done = subprocess.run([path, *command[1:]], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _compiler() -> dict[str, str] | None:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (lines := _command_lines(name, "--version")):
            return {"path": str(shutil.which(name)), "version": lines[0]}
    return None


def _cuda_toolkit() -> dict[str, str] | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [str(Path(home, "bin", "nvcc")) for home in homes if home] + ["nvcc"]
    for candidate in candidates:
        release = re.search(r"release ([\d.]+)", "\n".join(_command_lines(candidate, "--version")))
        if release:
            return {"nvcc": str(shutil.which(candidate)), "version": release[1]}
    return None


def _installed(distributions: Sequence[str]) -> list[dict[str, str]]:
    found = []
    for name in distributions:
        try:
            found.append({"name": name, "version": importlib.metadata.version(name)})
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _torch() -> dict[str, Any]:
    """The entries ``torch`` and ``gpus``."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        return {"torch": {"version": None, "cuda": None, "cudnn": None, "error": str(error)}, "gpus": []}
    info = {"version": torch.__version__, "cuda": torch.version.cuda, "cudnn": None, "error": None}
    if torch.version.cuda:
        info["cudnn"] = torch.backends.cudnn.version()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        gpus.append({"name": properties.name, "capability": capability, "memory_gb": properties.total_memory / 1e9})
    return {"torch": info, "gpus": gpus}


def _operators() -> dict[str, Any]:
    found: dict[str, Any] = {"library": None, "error": None, "built_with_cuda": False, "architectures": None,
                             "kernels": {name: dict.fromkeys(devices, False) for name, devices in OPERATORS.items()}}
    try:
        torch = importlib.import_module("torch")
        library = importlib.import_module("mmdet3d.ops._library")
    except (ImportError, OSError) as error:
        return {**found, "error": f"mmdet3d.ops cannot be imported: {error}"}
    found["error"] = library.load_error()
    if not library.AVAILABLE:
        return found
    found["library"] = sys.modules["mmdet3d.ops._C"].__file__
    found["built_with_cuda"] = library.built_with_cuda()
    if found["built_with_cuda"] and hasattr(torch.ops.mmdet3d, "cuda_architectures"):
        found["architectures"] = torch.ops.mmdet3d.cuda_architectures() or None
    for name, kernels in found["kernels"].items():
        for device in kernels:
            kernels[device] = _has_kernel(torch, f"mmdet3d::{name}", device)
    return found


def _has_kernel(torch: Any, operator: str, device: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(operator, device)
    except RuntimeError:  # no operator of this name is registered
        return False


# ---------------------------------------------------------------------------------------------------------- judging

Problems = list[tuple[str, str]]


def _version_tuple(version: str) -> tuple[int, ...]:
    """``"4.11.0.86"`` or ``"2.11.0+cu130"`` as numbers, as far as it is made of them."""
    return tuple(int(part) for part in re.match(r"[\d.]*", version)[0].split(".") if part)


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


def _python_problems(env: dict[str, Any]) -> Problems:
    version, (first, last) = env["python"]["version"], PYTHON_RANGE
    if first <= _version_tuple(version)[:2] <= last:
        return []
    accepted = f"{_dotted(first)} to {_dotted(last)}"
    return [(f"Python {version} is not supported; the project runs on {accepted}",
             f"PYTHON=python{_dotted(last)} {SETUP_COMMAND}")]


def _package_problems(env: dict[str, Any]) -> Problems:
    problems = []
    for name, found in env["packages"].items():
        if not found:
            problems.append((f"{name} is not installed", f"{SETUP_COMMAND} (installs {PACKAGES[name][0]})"))
        elif name in ACCEPTED_VERSIONS:
            first, below = ACCEPTED_VERSIONS[name]
            version = _version_tuple(found[0]["version"])
            if version < first or (below and version >= below):
                accepted = f">={_dotted(first)}" + (f",<{_dotted(below)}" if below else "")
                problems.append((f"{found[0]['name']} {found[0]['version']} is outside {accepted}", SETUP_COMMAND))
    if env["torch"]["error"] and env["packages"]["torch"]:
        problems.append((f"torch is installed but cannot be imported: {env['torch']['error']}", SETUP_COMMAND))
    return problems


def _opencv_problems(env: dict[str, Any]) -> Problems:
    opencv, numpy = env["packages"]["opencv"], env["packages"]["numpy"]
    problems = []
    if len(opencv) > 1:
        names = [entry["name"] for entry in opencv]
        problems.append((f"{' and '.join(names)} are installed over each other, in the same folder",
                         f"pip uninstall -y {' '.join(names)} && {SETUP_COMMAND}"))
    if opencv and numpy and _version_tuple(numpy[0]["version"]) >= (2,):
        old = [entry for entry in opencv if _version_tuple(entry["version"]) < FIRST_OPENCV_FOR_NUMPY_2]
        for entry in old:
            problems.append((f"{entry['name']} {entry['version']} was built for NumPy 1, but NumPy is "
                             f"{numpy[0]['version']}", f"pip install '{entry['name']}>=4.10' or 'numpy<2'"))
    return problems


def _gpu_problems(env: dict[str, Any]) -> Problems:
    if env["gpus"] or not env["driver"] or env["torch"]["error"]:
        return []
    seen = "; ".join(env["driver"])
    if not env["torch"]["cuda"]:
        return [(f"the machine has a GPU ({seen}), but this PyTorch is a CPU build",
                 "install CUDA builds of torch and torchvision, see docs/install.md")]
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return [(f"the machine has a GPU ({seen}), but CUDA_VISIBLE_DEVICES hides it", "unset CUDA_VISIBLE_DEVICES")]
    return [(f"the machine has a GPU ({seen}), but PyTorch for CUDA {env['torch']['cuda']} cannot use it",
             "update the NVIDIA driver, or install a PyTorch built for an older CUDA")]


def _operator_problems(env: dict[str, Any]) -> Problems:
    operators = env["operators"]
    if env["torch"]["error"]:
        return []
    if operators["library"] is None:
        reason = operators["error"] or "the operators are not compiled"
        slow = "without them every operator runs its plain PyTorch version, which is slow"
        remedy = BUILD_COMMAND if env["compiler"] else f"install a C++17 compiler such as g++, then {BUILD_COMMAND}"
        return [(f"{reason.partition(';')[0]}; {slow}", remedy)]
    missing = [name for name, kernels in operators["kernels"].items() if not kernels.get("CPU", True)]
    if missing:
        return [(f"the compiled library is older than the sources: it lacks {', '.join(missing)}", BUILD_COMMAND)]
    return _cuda_kernel_problems(env) if env["gpus"] else []


def _cuda_kernel_problems(env: dict[str, Any]) -> Problems:
    operators, toolkit = env["operators"], env["cuda_toolkit"]
    missing = [name for name, kernels in operators["kernels"].items() if not kernels.get("CUDA", True)]
    if missing:
        remedy = CUDA_BUILD_COMMAND
        wanted = env["torch"]["cuda"]
        if toolkit is None:
            remedy = f"install the CUDA {wanted} toolkit (nvcc), set CUDA_HOME, then {remedy}"
        elif _version_tuple(toolkit["version"])[0] != _version_tuple(wanted)[0]:
            remedy = f"set CUDA_HOME to a CUDA {wanted} toolkit (found {toolkit['version']}), then {remedy}"
        return [(f"a GPU is visible, but these operators have no CUDA kernel: {', '.join(missing)}", remedy)]
    if operators["architectures"] is None:
        return []
    capabilities = sorted({gpu["capability"] for gpu in env["gpus"]}, key=_version_tuple)
    lacking = [c for c in capabilities if architectures_cover(operators["architectures"], c) is False]
    if not lacking:
        return []
    return [(f"the CUDA kernels were built for {operators['architectures']}, which does not run on compute capability "
             f"{', '.join(lacking)}", f"TORCH_CUDA_ARCH_LIST='{';'.join(capabilities)}+PTX' {CUDA_BUILD_COMMAND}")]


# ---------------------------------------------------------------------------------------------------------- writing


def _format_package(found: Sequence[dict[str, str]]) -> str:
    return ", ".join(f"{entry['version']} ({entry['name']})" for entry in found) or "not installed"


def _operator_rows(operators: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [("operators", operators["library"] or "not compiled")]
    if operators["built_with_cuda"]:
        rows.append(("built for", operators["architectures"] or "not recorded"))
    for name, kernels in operators["kernels"].items():
        rows.append((f"  {name}", ", ".join(device for device, there in kernels.items() if there) or "reference only"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
