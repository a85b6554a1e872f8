"""Each mended part of mmcv, beside what mmcv itself does."""

import logging
import re
import sys
from pathlib import Path

import mmcv.runner
import pytest
import torch
from mmcv.runner import BaseModule, LogBuffer, TensorboardLoggerHook
from torch import distributed

import mmdet3d
from mmdet3d.utils.compat import BoundedLogBuffer, peak_memory_mb, summary_writer, without_init_report


def test_log_buffer_keeps_the_latest_values_only():
    own, theirs = BoundedLogBuffer(keep=10), LogBuffer()
    for number in range(1000):
        for buffer in (own, theirs):
            buffer.update({"loss": float(number), **({"rare": 7.0} if number == 0 else {})}, count=1 + number % 2)
    assert len(theirs.val_history["loss"]) == 1000
    assert 10 <= len(own.val_history["loss"]) == len(own.n_history["loss"]) < 20
    for buffer in (own, theirs):
        buffer.average(10)
    assert own.output == theirs.output and own.ready


def without_tensorboard(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # importing it raises ImportError


def test_no_writer_without_the_package(monkeypatch, tmp_path):
    without_tensorboard(monkeypatch)
    assert summary_writer(str(tmp_path)) is None

    class Runner:
        hooks, work_dir = (), str(tmp_path)

    with pytest.raises(ImportError):
        TensorboardLoggerHook(by_epoch=False).before_run(Runner())


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_mmcv_cannot_start_process_groups_without_a_gpu(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mmcv.runner.dist_utils.mp, "get_start_method", lambda allow_none: "fork")
    with pytest.raises((ZeroDivisionError, RuntimeError)):
        mmcv.runner.init_dist("pytorch", backend="gloo")
    assert not distributed.is_initialized()


def test_no_memory_of_a_gpu_on_a_cpu():
    assert peak_memory_mb(torch.device("cpu")) is None


@pytest.mark.cuda
def test_memory_is_the_peak_of_the_device():
    torch.cuda.reset_peak_memory_stats()
    before = peak_memory_mb(torch.device("cuda:0"))
    block = torch.zeros(64 * 2**20, dtype=torch.uint8, device="cuda:0")
    assert peak_memory_mb(torch.device("cuda:0")) == before + 64
    del block
    assert peak_memory_mb(torch.device("cuda:0")) == before + 64


class Part(BaseModule):
    """Has a parameter and its initialisation."""

    def __init__(self):
        super().__init__(init_cfg={"type": "Constant", "val": 3.0, "layer": "Linear"})
        self.linear = torch.nn.Linear(2, 2)


@pytest.mark.parametrize("quiet", [True, False])
def test_init_weights_without_report(quiet, caplog):
    part = Part()
    logging.getLogger("mmcv").propagate = True
    with caplog.at_level(logging.INFO):
        if quiet:
            with without_init_report():
                part.init_weights()
        else:
            part.init_weights()
    assert bool(part.linear.weight.eq(3.0).all())
    assert bool(caplog.records) is not quiet
    caplog.clear()
    with caplog.at_level(logging.INFO):
        logging.getLogger("mmdet3d").info("heard again")
    assert [record.getMessage() for record in caplog.records] == ["heard again"]


def test_broken_parts_of_mmcv_are_not_used():
    """Scattering to a device by its number, wrappers around internals of DDP, and reading that runs code."""
    broken = re.compile(r"MMDataParallel|MMDistributedDataParallel|scatter_kwargs|cuda\.amp|init_dist\b|"
                        r"mmcv\.runner import .*\b(load_checkpoint|save_checkpoint|load_state_dict)\b")
    sources = Path(mmdet3d.__file__).parent.rglob("*.py")
    assert [str(path) for path in sources if broken.search(path.read_text())] == []
