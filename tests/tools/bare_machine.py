"""A machine on which Python is real and pip, packages, compiler and tools are not, for tests of shell scripts."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("awk bash basename cat cp cut date df dirname env find flock grep head mkdir mv nproc rm sed sleep tail "
            "tar touch tr uname wc gzip").split()

# A Python that makes environments without pip (quick); everything else is the real one.
FAKE_PYTHON = """#!/bin/bash
if [[ "$1 $2" == "-m venv" ]]; then exec {python} -m venv --without-pip "$3"; fi
exec {python} "$@"
"""

# Stands in for pip: notes its arguments, and "installs" mmcv-full by leaving a mark that the mmcv package looks for.
FAKE_PIP = """
import os, pathlib, shutil, sys, time
home = pathlib.Path(os.environ["HOME"])
arguments = sys.argv[1:]
with open(home / "pip.log", "a") as log:
    log.write(" ".join(arguments) + "\\n")
if (home / "pip-waits").exists():
    (home / "pip-runs").write_text(str(os.getpid()))
    time.sleep(60)
if (home / "pip-fails").exists():
    sys.exit((home / "pip-fails").read_text())
if "show" in arguments:
    sys.exit(1)
if "download" in arguments:
    shutil.copy(home / "mmcv-full-1.7.2.tar.gz", arguments[arguments.index("-d") + 1])
elif "--only-binary" in arguments and not (home / "has-wheel").exists():
    sys.exit("ERROR: No matching distribution found for mmcv-full==1.7.2")
elif arguments[-1].startswith("mmcv-full==") or "mmcv_full-" in arguments[-1]:
    (home / "mmcv-installed").touch()
"""

FAKE_MMCV = """
import os, pathlib
if not (pathlib.Path(os.environ["HOME"]) / "mmcv-installed").exists():
    raise ImportError("mmcv")
__version__ = "1.7.2"
"""

# Stands in for the project's setup.py and for the one of mmcv-full.
FAKE_BUILD = """
import os, pathlib, sys
home = pathlib.Path(os.environ["HOME"])
names = ("MMDET3D_CUDA", "FORCE_CUDA", "CUDA_VISIBLE_DEVICES", "MMCV_WITH_OPS", "MAX_JOBS")
with open(home / "{log}", "a") as log:
    log.write(str({{name: os.environ[name] for name in names if name in os.environ}}) + "\\n")
if (home / "build-fails").exists() and os.environ.get("MMDET3D_CUDA") != "0":
    sys.exit((home / "build-fails").read_text())
pathlib.Path("{product}").parent.mkdir(parents=True, exist_ok=True)
pathlib.Path("{product}").write_text("built")
"""


# Stands in for a tool: tells its arguments, and leaves what it would write.
FAKE_TOOL = """
import pathlib, sys
print("{name}", *sys.argv[1:])
def result(option, name="", folder=False):
    path = pathlib.Path(sys.argv[sys.argv.index(option) + 1], name)
    (path if folder else path.parent).mkdir(parents=True, exist_ok=True)
    if not folder:
        path.touch()
if "{name}" == "create_synthetic":
    result("--out", "stcocc-nuscenes_infos_val.pkl")
elif "{name}" in ("baselines", "plot_log"):
    result("--out")
elif "{name}" == "visualize":
    result("--out", folder=True)
elif "{name}" == "test":
    result("--work-dir", "results.json")
elif "{name}" == "train":
    iterations = next(word for word in sys.argv if word.startswith("runner.max_iters=")).partition("=")[2]
    result("--work-dir", "iter_" + iterations + ".pth")
"""


class Machine:
    """A bare machine: a checkout, a PATH with little on it, and a home folder in which the stand-ins leave notes."""

    def __init__(self, folder: Path):
        self.root, self.bin, self.home, self.stubs = (folder / name for name in ("project", "bin", "home", "stubs"))
        self.venv = self.root / ".venv"
        for path in (self.bin, self.home):
            path.mkdir()
        for name in PROGRAMS:
            if program := shutil.which(name):
                (self.bin / name).symlink_to(program)
        self.program("c++", "#!/bin/bash\ncat >/dev/null\n")
        self.program("python3", FAKE_PYTHON.format(python=sys.executable))
        self._lay_out_project()
        self._lay_out_packages()
        self.environment = {"PATH": str(self.bin), "HOME": str(self.home), "PYTHONPATH": str(self.stubs),
                            "PYTHONDONTWRITEBYTECODE": "1", "STCOCC_MIN_FREE_GB": "0", "TMPDIR": str(folder)}

    def _lay_out_project(self):
        for name in ("requirements.txt", "requirements-dev.txt", "tools/setup_env.sh", "tools/quickstart.sh",
                     "tools/run_tests.sh"):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / "tools/setup", self.root / "tools/setup", ignore=shutil.ignore_patterns("__pycache__"))
        (self.root / "setup.py").write_text(FAKE_BUILD.format(log="operators.log", product="mmdet3d/ops/_C.so"))
        # a package wins over the stand-in library of the same name, so that `import mmdet3d.ops._C` works
        for package in ("mmdet3d", "mmdet3d/ops", "mmdet3d/ops/_C"):
            (self.root / package).mkdir()
            (self.root / package / "__init__.py").touch()
        self.source = self.root / "mmdet3d/ops/lift/src/lift.cpp"
        self.source.parent.mkdir(parents=True)
        self.source.write_text("int lift();")
        for tool in ("infer", "create_synthetic", "visualize", "baselines", "train", "test", "plot_log",
                     "results_table"):
            (self.root / f"tools/{tool}.py").write_text(FAKE_TOOL.format(name=tool))

    def _lay_out_packages(self):
        for name in ("torch", "torchvision", "cv2", "einops", "matplotlib", "mmdet", "mmseg", "numpy", "nuscenes",
                     "PIL", "tqdm", "mmcv", "mmcv/_ext", "pip", "pytest"):
            (self.stubs / name).mkdir(parents=True)
            (self.stubs / name / "__init__.py").touch()
        (self.stubs / "mmcv/__init__.py").write_text(FAKE_MMCV)
        (self.stubs / "pip/__main__.py").write_text(FAKE_PIP)
        (self.stubs / "pytest/__main__.py").write_text("import os, sys\nprint('pytest', os.getcwd(), *sys.argv[1:])\n")
        self.torch("2.11.0")
        sdist = self.home / "mmcv-full-1.7.2"
        (sdist / "mmcv/ops/csrc/pytorch/cpu").mkdir(parents=True)
        wheel = "dist/mmcv_full-1.7.2-cp311-cp311-linux_x86_64.whl"
        (sdist / "setup.py").write_text(FAKE_BUILD.format(log="mmcv.log", product=wheel))
        with tarfile.open(self.home / "mmcv-full-1.7.2.tar.gz", "w:gz") as archive:
            archive.add(sdist, "mmcv-full-1.7.2")

    def program(self, name: str, text: str) -> None:
        (self.bin / name).unlink(missing_ok=True)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def torch(self, version: str) -> None:
        for old in self.stubs.glob("torch-*.dist-info"):
            shutil.rmtree(old)
        metadata = self.stubs / f"torch-{version}.dist-info/METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")

    def start(self, *arguments: str, script: str = "setup_env.sh", **environment: str) -> subprocess.Popen:
        return subprocess.Popen([shutil.which("bash"), str(self.root / "tools" / script), *arguments], text=True,
                                env={**self.environment, **environment}, cwd=self.home, stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *arguments: str, script: str = "setup_env.sh", **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*arguments, script=script, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def log(self, name: str) -> list[str]:
        """What a stand-in noted since the last call."""
        path = self.home / name
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return lines

    def note(self, name: str, text: str = "") -> Path:
        (self.home / name).write_text(text)
        return self.home / name
