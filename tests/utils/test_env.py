"""The doctor: every problem is found and comes with its remedy, and nothing has to be importable."""

import copy
import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
import torch

from mmdet3d.ops import _library
from mmdet3d.utils import env as doctor

HEALTHY = {
    "python": {"version": "3.11.7", "executable": "python3"},
    "os": "Linux",
    "compiler": {"path": "g++", "version": "g++ 12.2.0"},
    "packages": {
        name: [{"name": distributions[0], "version": version}]
        for (name, distributions), version in zip(
            doctor.PACKAGES.items(),
            ["2.11.0+cu130", "0.26.0", "1.26.4", "4.11.0.86", "0.8.2", "1.7.2", "2.28.2", "0.30.0", "1.2.0"],
            strict=True,
        )
    },
    "torch": {"version": "2.11.0+cu130", "cuda": "13.0", "cudnn": 91900, "error": None},
    "gpus": [{"name": "GPU", "capability": "8.9", "memory_gb": 24.0}],
    "driver": ["GPU, 580.10"],
    "cuda_toolkit": {"nvcc": "nvcc", "version": "13.0"},
    "operators": {
        "library": "_C.so", "error": None, "built_with_cuda": True, "architectures": "8.6;9.0+PTX",
        "kernels": {name: {"CPU": True, "CUDA": True} for name in doctor.OPERATORS},
    },
}


def version_of(name, version, distribution=None):
    return {"packages": {name: [{"name": distribution or doctor.PACKAGES[name][0], "version": version}]}}


def kernels(device, *missing):
    return {"operators": {"kernels": {name: {device: False} for name in missing or doctor.OPERATORS}}}


def merged(base, change):
    result = copy.deepcopy(base)
    for key, value in change.items():
        result[key] = merged(result[key], value) if isinstance(value, dict) and result[key] else value
    return result


def problems(*changes):
    env = HEALTHY
    for change in changes:
        env = merged(env, change)
    return doctor.find_problems(env)


def test_a_healthy_machine_has_no_problem():
    assert problems() == []
    no_gpu = {"gpus": [], "driver": [], "cuda_toolkit": None}
    assert problems(no_gpu, kernels("CUDA"), {"operators": {"built_with_cuda": False}}) == []


@pytest.mark.parametrize(
    "changes, problem, remedy",
    [
        ([{"python": {"version": "3.9.2"}}], "Python 3.9.2 is not supported; .* 3.10 to 3.12", "tools/setup_env.sh"),
        ([{"python": {"version": "3.13.0"}}], "Python 3.13.0 is not supported", "PYTHON=python3.12"),
        ([{"packages": {"mmcv": []}}], "mmcv is not installed", "installs mmcv-full"),
        ([version_of("mmcv", "2.1.0", "mmcv")], r"mmcv 2.1.0 is outside >=1.7,<2", "tools/setup_env.sh"),
        ([version_of("torch", "2.3.1+cpu")], r"torch 2.3.1\+cpu is outside >=2.4", "tools/setup_env.sh"),
        ([version_of("numpy", "2.2.0"), version_of("opencv", "4.9.0.80")],
         "opencv-python-headless 4.9.0.80 was built for NumPy 1, but NumPy is 2.2.0", "opencv-python-headless>=4.10"),
        ([{"packages": {"opencv": [{"name": "opencv-python-headless", "version": "4.11.0"},
                                   {"name": "opencv-python", "version": "4.11.0"}]}}],
         "opencv-python-headless and opencv-python are installed over each other", "pip uninstall -y"),
        ([{"torch": {"error": "libc10.so is missing"}, "gpus": []}], "cannot be imported: libc10.so", "setup_env.sh"),
        ([{"operators": {"library": None, "error": "the operators are not compiled; build them"}}],
         "^the operators are not compiled; without them", "^python setup.py build_ext --inplace$"),
        ([{"operators": {"library": None, "error": None}, "compiler": None}], "not compiled", r"install .* g\+\+"),
        ([kernels("CPU", "plane_sweep")], "older than the sources: it lacks plane_sweep$", "build_ext"),
        ([kernels("CUDA", "plane_sweep")], "have no CUDA kernel: plane_sweep$", "^MMDET3D_CUDA=1 python setup.py"),
        ([kernels("CUDA"), {"cuda_toolkit": None}], "no CUDA kernel: bev_pool", "install the CUDA 13.0 toolkit"),
        ([kernels("CUDA"), {"cuda_toolkit": {"version": "12.4"}}], "no CUDA kernel", r"CUDA 13.0 .*found 12.4"),
        ([{"operators": {"architectures": "9.0;10.0+PTX"}}], "built for 9.0;10.0.PTX, .* capability 8.9$",
         r"^TORCH_CUDA_ARCH_LIST='8.9\+PTX' MMDET3D_CUDA=1"),
        ([{"gpus": [], "torch": {"cuda": None}}], "this PyTorch is a CPU build", "CUDA builds of torch"),
        ([{"gpus": []}], "PyTorch for CUDA 13.0 cannot use it", "update the NVIDIA driver"),
    ],
)  # fmt: skip
def test_each_problem_has_its_remedy(changes, problem, remedy, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = problems(*changes)
    assert len(found) == 1, found
    assert re.search(problem, found[0]["problem"]), found
    assert re.search(remedy, found[0]["remedy"]), found


def test_hidden_gpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert problems({"gpus": []})[0]["remedy"] == "unset CUDA_VISIBLE_DEVICES"


def test_unrecorded_architectures_are_no_problem():
    assert problems({"operators": {"architectures": None}}) == []
    assert problems({"operators": {"architectures": "Hopper"}}) == []


@pytest.mark.parametrize(
    "architectures, capability, expected",
    [
        ("8.6", "8.6", True), ("8.6", "8.9", True), ("8.9", "8.6", False), ("8.6", "9.0", False),
        ("8.6+PTX", "12.0", True), ("9.0+PTX", "8.6", False), ("7.5;8.0 9.0", "9.0", True),
        ("9.0a", "9.0", True), ("9.0a+PTX", "10.0", False), ("8.0", "10.0", False), ("Hopper", "9.0", None),
    ],
)  # fmt: skip
def test_architectures_cover(architectures, capability, expected):
    assert doctor.architectures_cover(architectures, capability) is expected


def test_collect_env_reports_this_process():
    env = doctor.collect_env()
    assert env["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert env["torch"] == {
        "version": torch.__version__, "cuda": torch.version.cuda, "error": None,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
    }  # fmt: skip
    assert len(env["gpus"]) == torch.cuda.device_count()
    operators = env["operators"]
    assert (operators["library"] is not None) == _library.AVAILABLE
    if _library.AVAILABLE and hasattr(torch.ops.mmdet3d, "plane_sweep"):
        assert operators["kernels"]["plane_sweep"] == {"CPU": True, "CUDA": _library.built_with_cuda()}
    assert json.loads(json.dumps(env)) == env


@pytest.mark.skipif(not _library.AVAILABLE, reason="the operators are not compiled")
def test_the_sources_name_the_kernels_of_the_library():
    def in_library(device):
        names = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
        return {name.removeprefix("mmdet3d::") for name in names
                if name.startswith("mmdet3d::") and doctor._has_kernel(torch, name, device)}

    devices = ("CPU", "CUDA") if _library.built_with_cuda() else ("CPU",)
    for device in devices:
        assert {name for name, kernels in doctor.OPERATORS.items() if device in kernels} == in_library(device)
    assert doctor.OPERATORS["upsample_add"] == ["CUDA"] and doctor.OPERATORS["resize_crop"] == ["CPU"]


def test_only_kernels_that_have_a_source_are_missed():
    env = copy.deepcopy(HEALTHY)
    env["operators"]["kernels"] = there = {
        name: dict.fromkeys(devices, True) for name, devices in doctor.OPERATORS.items()}
    assert doctor.find_problems(env) == []
    there["upsample_add"]["CUDA"] = there["ray_cast"]["CUDA"] = False
    assert "no CUDA kernel: ray_cast, upsample_add" in doctor.find_problems(env)[0]["problem"]
    there["resize_crop"]["CPU"] = False
    assert "it lacks resize_crop" in doctor.find_problems(env)[0]["problem"]


def test_an_operator_that_does_not_exist_has_no_kernel():
    assert doctor._has_kernel(torch, "mmdet3d::no_such_operator", "CPU") is False


def test_format_env_shows_facts_and_problems():
    env = merged(HEALTHY, {"packages": {"mmcv": []}})
    env["problems"] = doctor.find_problems(env)
    text = doctor.format_env(env)
    assert "GPU 0" in text and "GPU, 8.9, 24.0 GB" in text
    assert "plane_sweep" in text and "CPU, CUDA" in text and "8.6;9.0+PTX" in text
    assert text.endswith(f"problems: 1\n- mmcv is not installed\n  remedy: {env['problems'][0]['remedy']}\n")
    bare = {"compiler": None, "cuda_toolkit": None, "gpus": [], "driver": [], "problems": []}
    text = doctor.format_env(merged(merged(HEALTHY, bare), kernels("CPU", "plane_sweep")))
    assert "problems: none" in text and "none that PyTorch can use" in text


def test_main_writes_json_and_returns_a_status(monkeypatch, capsys):
    broken = {**HEALTHY, "problems": [{"problem": "p", "remedy": "r"}]}
    monkeypatch.setattr(doctor, "collect_env", lambda: broken)
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out) == broken
    monkeypatch.setattr(doctor, "collect_env", lambda: {**HEALTHY, "problems": []})
    assert doctor.main([]) == 0
    assert "problems: none" in capsys.readouterr().out


def test_missing_packages_are_reported(monkeypatch):
    version = importlib.metadata.version

    def without_mmcv(name):
        if name.startswith("mmcv"):
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_mmcv)
    assert "mmcv is not installed" in [entry["problem"] for entry in doctor.collect_env()["problems"]]


def test_runs_where_nothing_can_be_imported(tmp_path):
    """mmcv, numpy, cv2 and even torch may be broken; the report still comes."""
    for name in ("torch", "mmcv", "mmdet", "mmseg", "numpy", "cv2"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('broken on purpose')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from mmdet3d.utils.env import main\nsys.exit(main(['--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    env = json.loads(done.stdout)
    assert env["torch"]["error"] == "broken on purpose" and "broken on purpose" in env["operators"]["error"]
    assert any("broken on purpose" in entry["problem"] for entry in env["problems"])
