"""The set-up step and its two callers, in a copy where Python is real and pip and the packages are not."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

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


@pytest.fixture
def machine(tmp_path):
    if not all(shutil.which(name) for name in ("bash", "awk", "tar")):
        pytest.skip("needs bash, awk and tar")
    return Machine(tmp_path)


def fake_python(machine: Machine, answer: str, name: str = "python3") -> None:
    machine.program(name, f'#!/bin/bash\n[[ "$*" == *ensurepip* ]] && echo "{answer}"\n')


def test_check_passes_and_changes_nothing(machine):
    result = machine.run("--check")
    assert result.returncode == 0, result.stderr
    assert "everything needed is here" in result.stderr
    assert not machine.venv.exists() and not machine.log("pip.log")


@pytest.mark.parametrize("answer, expected", [
    ("3.9 venv headers", ["no Python 3.10, 3.11 or 3.12 on PATH (python3 is 3.9)", "PYTHON=/path/to/python3.12"]),
    ("3.13 venv headers", ["no Python 3.10, 3.11 or 3.12 on PATH (python3 is 3.13)"]),
    ("3.12 no-venv headers", ["cannot make environments", "apt-get install python3.12-venv"]),
    ("3.10 venv no-headers", ["Python.h of Python 3.10", "apt-get install python3.10-dev"]),
])
def test_a_python_that_will_not_do_is_refused_with_a_remedy(machine, answer, expected):
    fake_python(machine, answer)
    result = machine.run()
    assert result.returncode == 1
    for text in ["nothing was changed", *expected]:
        assert text in result.stderr
    assert not machine.venv.exists()


def test_a_fitting_python_is_found_beside_a_wrong_one(machine):
    fake_python(machine, "3.9 venv headers")
    fake_python(machine, "3.12 no-venv headers", "python3.12")
    machine.program("python3.10", FAKE_PYTHON.format(python=sys.executable))
    result = machine.run("--check")
    assert result.returncode == 0, result.stderr
    assert "python3.10," in result.stderr


def test_a_wrong_PYTHON_is_named(machine):
    fake_python(machine, "3.9 venv headers", "python3.9")
    stderr = machine.run(PYTHON="python3.9").stderr
    assert "PYTHON=python3.9 is not a Python 3.10, 3.11 or 3.12 (python3.9 is 3.9)" in stderr
    assert "PYTHON=nowhere is not a Python" in machine.run(PYTHON="nowhere").stderr


def test_missing_compiler_and_full_disk_are_told_at_once(machine):
    (machine.bin / "c++").unlink()
    machine.program("df", "#!/bin/bash\nprintf 'Filesystem 1024-blocks Used Available\\n/dev/x 9 9 3145728\\n'\n")
    result = machine.run(STCOCC_MIN_FREE_GB="5")
    assert result.returncode == 1
    assert "no C++ compiler" in result.stderr and "apt-get install g++" in result.stderr
    assert "only 3 GB free" in result.stderr and "about 5 GB" in result.stderr
    assert not machine.venv.exists()


def test_a_compiler_without_cpp17_is_refused(machine):
    machine.program("c++", "#!/bin/bash\ncat >/dev/null\nexit 1\n")
    assert "cannot make a C++17 library with OpenMP" in machine.run("--check").stderr


def test_bad_options_are_refused(machine):
    assert "unknown option: --colour" in machine.run("--colour").stderr
    assert "--find-links needs a value" in machine.run("--find-links").stderr
    assert "folder of packages nowhere does not exist" in machine.run("--find-links", "nowhere").stderr
    assert "usage:" in machine.run("--help").stdout
    assert not machine.venv.exists()


def test_first_run_installs_and_the_next_does_nothing(machine):
    machine.note("has-wheel")
    first = machine.run("--find-links", str(machine.home))
    assert first.returncode == 0, first.stderr
    packages, wheel = (line for line in machine.log("pip.log") if "show" not in line)
    assert "requirements-dev.txt" in packages and f"--find-links {machine.home}" in packages
    assert "--only-binary mmcv-full mmcv-full==1.7.2" in wheel
    listed = (machine.root / "build/setup/requirements-without-mmcv.txt").read_text()
    assert "mmdet==" in listed and "\nmmcv-full" not in listed
    assert len(machine.log("operators.log")) == 1

    second = machine.run()
    assert (second.returncode, second.stderr) == (0, "")
    assert not machine.log("pip.log") and not machine.log("operators.log")


def test_mmcv_is_compiled_for_the_cpu_where_no_wheel_is(machine):
    result = machine.run(MAX_JOBS="3")
    assert result.returncode == 0, result.stderr
    assert "compiling mmcv-full==1.7.2, once" in result.stderr
    assert machine.log("mmcv.log") == [
        str({"FORCE_CUDA": "0", "CUDA_VISIBLE_DEVICES": "", "MMCV_WITH_OPS": "1", "MAX_JOBS": "3"})]
    machine.log("pip.log")
    # another environment takes the wheel that was kept
    shutil.rmtree(machine.venv)
    (machine.home / "mmcv-installed").unlink()
    assert machine.run().returncode == 0
    assert not machine.log("mmcv.log")
    assert "--no-index --no-deps" in machine.log("pip.log")[-1]


def test_only_what_changed_is_done_again(machine):
    machine.note("has-wheel")
    assert machine.run().returncode == 0
    machine.log("pip.log"), machine.log("operators.log")
    changes = {
        "requirements": (lambda: (machine.root / "requirements.txt").open("a").write("extra==1.0\n"), True, False),
        "operator source": (lambda: machine.source.write_text("long lift();"), False, True),
        "torch": (lambda: machine.torch("2.12.0"), False, True),
        "library gone": (lambda: (machine.root / "mmdet3d/ops/_C.so").unlink(), False, True),
        "unrelated": (lambda: (machine.root / "README.md").write_text("text"), False, False),
    }
    for name, (change, pip, build) in changes.items():
        change()
        assert machine.run().returncode == 0, name
        assert bool(machine.log("pip.log")) is pip, name
        assert bool(machine.log("operators.log")) is build, name


def test_a_pip_failure_is_shown_and_the_next_run_goes_on(machine):
    machine.note("has-wheel")
    failure = machine.note("pip-fails", "OSError: [Errno 28] No space left on device")
    result = machine.run()
    assert result.returncode == 1
    assert "[Errno 28]" in result.stderr and "remedy: the disk is full" in result.stderr
    assert f"log: {machine.root}/build/setup/packages.log" in result.stderr
    failure.unlink()
    assert machine.run().returncode == 0


@pytest.mark.parametrize("message, remedy", [
    ("NewConnectionError: [Errno -3] Temporary failure in name resolution", "cannot be reached"),
    ("ERROR: No matching distribution found for torch==2.11.0", "no such release for this Python"),
    ("SSLError: CERTIFICATE_VERIFY_FAILED", "PIP_CERT"),
    ("c++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS=1"),
    ("error: externally-managed-environment", "leave out --active"),
    ("lift.cpp:1: error: expected ';'", "the whole log tells more"),
])
def test_common_failures_have_their_own_remedy(tmp_path, message, remedy):
    log = tmp_path / "step.log"
    log.write_text(f"Collecting torch\n{message}\n")
    command = 'source "$0" && setup_explain "$1"'
    said = subprocess.run(["bash", "-c", command, ROOT / "tools/setup/messages.sh", log], capture_output=True,
                          text=True)
    assert remedy in said.stdout


def test_a_failing_build_is_shown_and_never_taken_for_a_complete_one(machine):
    machine.note("has-wheel")
    failure = machine.note("build-fails", "lift.cpp:1: error: expected ';'")
    for _ in range(2):
        result = machine.run()
        assert result.returncode == 1
        assert "the operators could not be compiled" in result.stderr and "expected ';'" in result.stderr
    failure.unlink()
    assert machine.run().returncode == 0


def test_trouble_of_the_cuda_toolkit_ends_in_a_cpu_build_with_a_warning(machine):
    machine.note("has-wheel")
    machine.note("build-fails", "RuntimeError: The detected CUDA version (11.8) mismatches the version that was used")
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert "WARNING: the CUDA toolkit could not compile the operators" in result.stderr
    assert machine.run().stderr == ""
    assert machine.run("--rebuild", MMDET3D_CUDA="1").returncode == 1


def test_an_interrupted_run_leaves_no_process_and_is_resumed(machine):
    machine.note("has-wheel")
    waits = machine.note("pip-waits")
    process = machine.start()
    running = machine.home / "pip-runs"
    wait_for(lambda: running.exists() and running.read_text())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted; run the same command again" in err
    wait_for(lambda: not is_alive(int(running.read_text())))
    waits.unlink()
    assert machine.run().returncode == 0


def test_a_second_run_waits_for_the_first(machine):
    if not shutil.which("flock"):
        pytest.skip("needs flock")
    machine.note("has-wheel")
    waits = machine.note("pip-waits")
    first = machine.start()
    running = machine.home / "pip-runs"
    wait_for(lambda: running.exists() and running.read_text())
    waits.unlink()
    second = machine.start()
    assert "waiting" in second.stderr.readline()
    os.kill(int(running.read_text()), signal.SIGTERM)  # pip of the first run ends: that run fails, the second goes on
    assert first.wait(timeout=30) == 1
    second.communicate(timeout=60)
    assert second.returncode == 0


@pytest.mark.parametrize("leftover", ["empty", "dangling"])
def test_a_half_made_environment_is_made_anew(machine, leftover):
    machine.note("has-wheel")
    (machine.venv / "bin").mkdir(parents=True)
    if leftover == "dangling":
        (machine.venv / "bin/python").symlink_to("/nowhere/python3.11")
    result = machine.run()
    assert result.returncode == 0, result.stderr
    assert "is incomplete or its Python is gone; making it anew" in result.stderr


def test_packages_torn_by_an_interrupt_are_installed_again(machine):
    machine.note("has-wheel")
    assert machine.run().returncode == 0
    site = next((machine.venv / "lib").glob("python3.*/site-packages"))
    for name, size in (("whole", 4), ("cut", 400)):
        (site / f"{name}.py").write_text("pass")
        (site / f"{name}-1.0.dist-info").mkdir()
        (site / f"{name}-1.0.dist-info/METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (site / f"{name}-1.0.dist-info/RECORD").write_text(f"{name}.py,,{size}\n{name}-1.0.dist-info/RECORD,,\n")
    (site / "nolist-1.0.dist-info").mkdir()
    (machine.venv / ".stcocc-setup.json").unlink()
    result = machine.run()
    assert "incomplete, will be installed again: cut-1.0.dist-info" in result.stderr
    assert sorted(path.name for path in site.glob("*.dist-info")) == ["whole-1.0.dist-info"]


def test_an_index_for_torch_is_used_for_torch_only_and_remembered(machine):
    machine.note("has-wheel")
    index = "file:///mirror/cpu"
    assert machine.run("--torch-index", index).returncode == 0
    calls = machine.log("pip.log")
    with_index = [line for line in calls if f"--index-url {index}" in line]
    assert len(with_index) == 1 and with_index[0].endswith("--no-deps torch==2.11.0 torchvision==0.26.0")
    assert machine.run("--torch-index", index).stderr == ""
    assert machine.run().stderr == ""
    (machine.root / "requirements.txt").open("a").write("extra==1.0\n")
    assert machine.run().returncode == 0
    assert sum(f"--index-url {index}" in line for line in machine.log("pip.log")) == 1


def test_the_active_environment_is_used_on_request(machine, tmp_path):
    machine.note("has-wheel")
    own = tmp_path / "own"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", own], check=True)
    path = f"{own}/bin:{machine.bin}"
    assert machine.run("--active", PATH=path).returncode == 0
    assert (own / ".stcocc-setup.json").exists() and not machine.venv.exists()
    assert machine.run(STCOCC_ACTIVE="1", PATH=path).stderr == ""


def test_callers_pass_on_what_is_not_for_the_set_up(machine):
    machine.note("has-wheel")
    result = machine.run("--infos", "my frames.pkl", "--find-links", str(machine.home), script="quickstart.sh")
    assert result.returncode == 0, result.stderr
    config = machine.root / "config/stcocc/stcocc-r50-16f-openocc-12e.py"
    assert result.stdout == f"infer {config} --out {machine.root}/outputs/quickstart --infos my frames.pkl\n"
    assert machine.run("-k", "a or b", script="run_tests.sh").stdout == f"pytest {machine.root} -k a or b\n"
    assert "usage:" in machine.run("--help", script="quickstart.sh").stdout


def test_quickstart_does_what_is_not_done(machine):
    machine.note("has-wheel")
    first = machine.run("--iterations", "50", "--out", "my pictures", script="quickstart.sh")
    assert first.returncode == 0, first.stderr
    config = machine.root / "config/stcocc/stcocc-tiny-synthetic.py"
    data = machine.root / "data/synthetic-quickstart"
    files = " ".join(f"data.{part}.ann_file={data}/stcocc-nuscenes_infos_{split}.pkl"
                     for part, split in (("train", "train"), ("val", "val"), ("test", "val")))
    run = "my pictures/50-iterations"
    table = ("results_table --names majority untrained trained -- my pictures/majority.json my pictures/untrained.json "
             f"{run}/trained/results.json")
    assert first.stdout.splitlines() == [
        f"create_synthetic --scenes 8 --frames 6 --image-size 400x225 --out {data}",
        f"baselines {config} --out my pictures/majority.json --cfg-options {files}",
        f"baselines {config} --predictor untrained --out my pictures/untrained.json --cfg-options {files}",
        f"train {config} --work-dir {run}/training --auto-resume --cfg-options {files} runner.max_iters=50 "
        "lr_config.step=[40]",
        f"test {config} {run}/training/iter_50.pth --work-dir {run}/trained --out {run}/predictions "
        f"--cfg-options {files}",
        f"visualize --infos {data}/stcocc-nuscenes_infos_val.pkl --index 2 --count 4 --pred {run}/predictions "
        f"--out {run}/pictures.part",
        f"plot_log {run}/training --out {run}/curve.png", table]
    assert (machine.home / run / "table.md").read_text() == table + "\n"
    assert (machine.home / run / "pictures").is_dir() and "these are no nuScenes scores" in first.stderr

    again = machine.run("--iterations=50", "--out=my pictures", script="quickstart.sh")
    assert again.stdout.splitlines() == [table] and again.stderr.count("already there:") == 7
    longer = machine.run("--iterations", "60", "--out", "my pictures", script="quickstart.sh")
    assert [line.split()[0] for line in longer.stdout.splitlines()] == [
        "train", "test", "visualize", "plot_log", "results_table"]


@pytest.mark.parametrize("arguments, message", [
    (["--iterations", "none"], "--iterations: expected a number from 1, got none"), (["--out"], "--out needs a value"),
    (["--seed", "3"], "unknown option: --seed (--help lists them)")])
def test_quickstart_refuses_what_it_does_not_know(machine, arguments, message):
    machine.note("has-wheel")
    result = machine.run(*arguments, script="quickstart.sh")
    assert result.returncode == 1 and message in result.stderr and not result.stdout


def test_a_failed_step_of_the_quickstart_ends_it(machine):
    machine.note("has-wheel")
    (machine.root / "tools/train.py").write_text("raise SystemExit(3)")
    result = machine.run("--iterations", "50", script="quickstart.sh")
    assert result.returncode == 3 and "scoring the trained model" not in result.stderr


def wait_for(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
