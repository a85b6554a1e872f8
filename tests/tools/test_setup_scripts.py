"""The set-up step, in a copy where Python is real and pip and the packages are not."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from bare_machine import FAKE_PYTHON, ROOT, Machine


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
