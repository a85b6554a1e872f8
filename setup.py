"""Package and operator build of STCOcc.

``python setup.py build_ext --inplace`` (or ``pip install -e . --no-build-isolation``) compiles every operator under
``mmdet3d/ops/<op>/src`` into one library, ``mmdet3d/ops/_C*.so``. CPU operators are always built; CUDA ones when a
CUDA toolkit is found.

Environment:
    MMDET3D_CUDA: ``auto`` (default), ``1`` (fail if CUDA operators cannot be built) or ``0`` (CPU only).
    FORCE_CUDA: ``1`` builds CUDA operators even where no GPU is visible (for example inside ``docker build``).
    TORCH_CUDA_ARCH_LIST: compute capabilities to build for, such as ``8.6;9.0+PTX``. Default: the visible GPUs,
        with PTX of the newest so that a later GPU can still run it.
    MAX_JOBS: parallel compiler processes.
"""

import glob
import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


def cuda_architectures():
    """Compute capabilities of the visible GPUs in the form of TORCH_CUDA_ARCH_LIST, or None when none is visible."""
    import torch

    if not torch.cuda.is_available():
        return None
    capabilities = sorted({torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())})
    names = [f"{major}.{minor}" for major, minor in capabilities]
    names[-1] += "+PTX"
    return ";".join(names)


def wants_cuda():
    """Whether to build the CUDA operators, and why."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    mode = os.environ.get("MMDET3D_CUDA", "auto").lower()
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"MMDET3D_CUDA={mode!r} is not understood; use auto, 0 or 1")
    forced = mode == "1" or os.environ.get("FORCE_CUDA") == "1"
    if mode == "0":
        return False, "switched off by MMDET3D_CUDA=0"
    if torch.version.cuda is None:
        reason = "this PyTorch is a CPU build"
    elif CUDA_HOME is None:
        reason = "no CUDA toolkit (nvcc) found; set CUDA_HOME"
    elif not torch.cuda.is_available() and not forced:
        reason = "no GPU visible; set FORCE_CUDA=1 and TORCH_CUDA_ARCH_LIST to build anyway"
    else:
        return True, f"CUDA toolkit at {CUDA_HOME}"
    if forced:
        raise SystemExit(f"CUDA operators were asked for, but cannot be built: {reason}")
    return False, reason


def operator_extension():
    """The one extension module that holds all operators, and its build command."""
    # PyTorch compiles with c++ and setuptools links with g++ by default; where these are two different compilers, the
    # library would get the C++ runtime of the wrong one.
    os.environ.setdefault("CXX", "c++")
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    pattern = "mmdet3d/ops/*/src/*"
    sources = sorted(glob.glob(f"{pattern}.cpp", root_dir=ROOT)) + ["mmdet3d/ops/src/library.cpp"]
    with_cuda, reason = wants_cuda()
    print(f"operators: CPU, {'CUDA' if with_cuda else 'no CUDA'} ({reason})", file=sys.stderr)
    # Without OpenMP at::parallel_for of PyTorch's Linux builds runs on one thread.
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    flags = {"cxx": ["-O3", "-std=c++17", *openmp]}
    extension, macros = CppExtension, []
    if with_cuda:
        sources += sorted(glob.glob(f"{pattern}.cu", root_dir=ROOT))
        flags["nvcc"] = ["-O3", "-std=c++17", "--expt-relaxed-constexpr"]
        extension = CUDAExtension
        if not os.environ.get("TORCH_CUDA_ARCH_LIST") and (architectures := cuda_architectures()):
            os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
        # Without quotes, blanks, semicolons and commas, which shells and nvcc would read in their own way.
        architectures = re.sub(r"[;,\s]+", ":", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
        macros = [("MMDET3D_WITH_CUDA", None), ("MMDET3D_CUDA_ARCH", architectures)]
    module = extension(
        "mmdet3d.ops._C", sources, include_dirs=[str(ROOT / "mmdet3d/ops/src")],
        extra_compile_args=flags, extra_link_args=openmp,
        define_macros=macros,
    )
    return [module], {"build_ext": BuildExtension.with_options(use_ninja=True, no_python_abi_suffix=True)}


BUILD_COMMANDS = {"build_ext", "develop", "install", "bdist_wheel", "build", "editable_wheel", "bdist_egg"}
EXT_MODULES, COMMANDS = operator_extension() if BUILD_COMMANDS & set(sys.argv) else ([], {})

setup(
    name="stcocc",
    version="1.0.0",
    description="Camera-only 3D semantic occupancy and scene flow (STCOcc), an independent implementation",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["mmdet3d", "mmdet3d.*"]),
    install_requires=[
        "torch>=2.4",
        "torchvision>=0.19",
        "numpy>=1.23,<3",
        "pillow>=9.1",
        "einops>=0.6",
        "mmcv-full>=1.7.0,<2",
        "mmdet>=2.28,<3",
        "mmsegmentation>=0.30,<1",
        "nuscenes-devkit>=1.1.9",
        "matplotlib>=3.5",
        "tqdm",
    ],
    ext_modules=EXT_MODULES,
    cmdclass=COMMANDS,
    zip_safe=False,
)
