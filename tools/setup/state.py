"""What the set-up step remembers: which packages an environment holds and what the operators were built from.

Run by ``tools/setup_env.sh`` with the Python of the environment; needs nothing but the standard library:

    python tools/setup/state.py status             two lines: ``ready`` or why packages, then operators, must be set up
    python tools/setup/state.py repair             make pip reinstall the packages that an interrupted run left torn
    python tools/setup/state.py build-operators    compile the operators, load them, remember what they were built from
    python tools/setup/state.py packages-done      remember that the packages are complete

Both stamps are written last and atomically, so an interrupted run is never taken for a complete one.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE_INPUTS = ("requirements.txt", "requirements-dev.txt", "tools/setup_env.sh", "tools/setup/mmcv.sh")
SOURCE_SUFFIXES = {".cpp", ".cu", ".cuh", ".h", ".hpp"}
BUILD_CHOICES = ("MMDET3D_CUDA", "FORCE_CUDA", "TORCH_CUDA_ARCH_LIST")
#: What a CUDA build prints when the toolkit, not the source, is at fault.
TOOLKIT_TROUBLE = ("The detected CUDA version", "unsupported GNU version", "nvcc fatal", "cusparse.h: No such",
                   "cublas_v2.h: No such", "cusolverDn.h: No such", "cuda_runtime.h: No such")
BUILT_WITHOUT_CUDA = 3


def packages_stamp() -> Path:
    """Stamp of the running environment."""
    return Path(sys.prefix) / ".stcocc-setup.json"


def operators_stamp() -> Path:
    """Stamp of this checkout's operators: they are built in place, whatever the environment."""
    return ROOT / "build" / "setup" / "operators.json"


def library() -> Path:
    """The compiled operators."""
    return ROOT / "mmdet3d" / "ops" / "_C.so"


def digest(paths: list[Path], *extra: str) -> str:
    """SHA-256 over names and contents of ``paths`` below the project's root, and ``extra``."""
    state = hashlib.sha256()
    for path in paths:
        state.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        state.update(path.read_bytes())
    state.update("\0".join(extra).encode())
    return state.hexdigest()


def python_version() -> str:
    """Version that decides which binary packages fit, such as 3.11."""
    return "{}.{}".format(*sys.version_info[:2])


def torch_version() -> str:
    """Version of the installed PyTorch without importing it, or an empty text."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return ""


def packages_key() -> str:
    """Changes when the environment must be looked at again; moving the checkout or the environment counts too."""
    return digest([ROOT / name for name in PACKAGE_INPUTS], python_version(), sys.prefix, str(ROOT))


def operators_key() -> str:
    """Changes when the operators must be compiled again."""
    sources = [path for path in (ROOT / "mmdet3d" / "ops").rglob("*") if path.suffix in SOURCE_SUFFIXES]
    return digest([ROOT / "setup.py", *sorted(sources)], python_version(), torch_version())


def library_mark() -> list[int] | None:
    """Size and time of the compiled library: another one has taken its place when they differ."""
    if not library().is_file():
        return None
    stat = library().stat()
    return [stat.st_size, stat.st_mtime_ns]


def cuda_in_reach() -> bool:
    """Whether this machine has an NVIDIA GPU and a CUDA toolkit, seen without importing PyTorch."""
    gpu = any(os.path.exists(path) for path in ("/dev/nvidiactl", "/dev/dxg"))
    toolkit = shutil.which("nvcc") or any(
        path and os.path.exists(path)
        for path in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    )
    return bool(gpu and toolkit)


def chosen() -> dict[str, str]:
    """The build variables that are set now."""
    return {name: os.environ[name] for name in BUILD_CHOICES if os.environ.get(name)}


def read_stamp(path: Path) -> dict:
    """Content of a stamp; empty when it is missing or not what this program writes."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_stamp(path: Path, content: dict) -> None:
    """Writes a stamp so that it is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def packages_status() -> str:
    """``ready``, or why the packages must be installed."""
    stamp = read_stamp(packages_stamp())
    if not stamp:
        return "not installed yet"
    if stamp.get("packages") != packages_key():
        return "requirements, Python or the place of the environment changed"
    return "ready"


def operators_status() -> str:
    """``ready``, or why the operators must be compiled. A build with CUDA stays valid where no GPU is visible."""
    stamp, mark, choice = read_stamp(operators_stamp()), library_mark(), chosen()
    if mark is None or not stamp:
        return "not compiled yet"
    if stamp.get("operators") != operators_key():
        return "their sources, Python or PyTorch changed"
    if stamp.get("library") != mark:
        return "the library is not the one built here"
    if choice and stamp.get("choice") != choice:
        return f"other build variables: {choice}"
    if cuda_in_reach() and not stamp.get("cuda_in_reach"):
        return "a GPU and a CUDA toolkit are here now"
    return "ready"


def torn_packages() -> list[Path]:
    """Metadata folders of installed packages with files missing, cut short, or without a list of files."""
    folders = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    found = [path for folder in folders for path in folder.glob("*.dist-info")]
    return sorted(path for path in found if _is_torn(path))


def _is_torn(metadata: Path) -> bool:
    files = importlib.metadata.PathDistribution(metadata).files
    return files is None or any(_differs(file) for file in files if file.suffix != ".pyc")


def _differs(file: importlib.metadata.PackagePath) -> bool:
    path = Path(file.locate())
    return not path.exists() or (file.size is not None and path.stat().st_size != file.size)


def repair() -> None:
    """Forgets torn packages, so that pip installs them again over what is left of them."""
    for metadata in torn_packages():
        print(f"incomplete, will be installed again: {metadata.name}")
        shutil.rmtree(metadata)


def build_operators() -> int:
    """Compiles and loads the operators.

    Returns:
        0, or 3 when the CUDA toolkit failed and the operators were built for the CPU only, or the build's own code.
    """
    before, key = read_stamp(operators_stamp()), operators_key()
    choice = chosen() or before.get("choice", {})
    write_stamp(operators_stamp(), {"choice": choice, "torch": torch_version()})
    if before.get("torch") != torch_version():
        for objects in (ROOT / "build").glob("temp.*"):
            shutil.rmtree(objects)
    code, output = _compile({**os.environ, **choice})
    asked_for_cuda = choice.get("MMDET3D_CUDA") == "1" or choice.get("FORCE_CUDA") == "1"
    without_cuda = code != 0 and not asked_for_cuda and any(text in output for text in TOOLKIT_TROUBLE)
    if without_cuda:
        code, _ = _compile({**os.environ, **choice, "MMDET3D_CUDA": "0"})
    code = code or subprocess.run([sys.executable, "-c", "import torch, mmdet3d.ops._C"], cwd=ROOT).returncode
    if code:
        return code
    write_stamp(operators_stamp(), {
        "operators": key, "library": library_mark(), "torch": torch_version(),
        "choice": choice, "cuda_in_reach": cuda_in_reach(),
    })
    return BUILT_WITHOUT_CUDA if without_cuda else 0


def _compile(environment: dict[str, str]) -> tuple[int, str]:
    # --force: setuptools looks at the age of the sources only; ninja still compiles just what changed
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    lines = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, text=True, errors="replace",
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            sys.stdout.write(line)
            sys.stdout.flush()
            lines.append(line)
    return process.returncode, "".join(lines)


def main(arguments: list[str]) -> int:
    """Runs one of the commands above."""
    command = arguments[0] if len(arguments) == 1 else ""
    if command == "status":
        print(packages_status(), operators_status(), sep="\n")
    elif command == "repair":
        repair()
    elif command == "packages-done":
        write_stamp(packages_stamp(), {"packages": packages_key()})
    elif command == "build-operators":
        return build_operators()
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
