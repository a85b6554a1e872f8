"""Reading, loading and writing checkpoints: formats, refusals, messages, and that nothing is left half done."""

import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmdet3d.utils.checkpoint import CheckpointError, LoadReport, load_checkpoint, read_checkpoint, save_checkpoint


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.conv = nn.Conv2d(2, width, 1)
        self.norm = nn.BatchNorm2d(width)


class RunsCommand:
    """Unpickling this creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def weights():
    torch.manual_seed(1)
    model = Net()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randint(1, 9, value.shape))
    return model.state_dict()


def assert_holds(model, weights):
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def snapshot(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def write(path, content, **kwargs):
    torch.save(content, path, **kwargs)
    return path


FORMATS = {
    "runner": lambda w: dict(meta=dict(epoch=3, iter=np.int64(70), hook_msgs=dict(best=np.float64(0.5)), lr=np.ones(2)),
                             state_dict=w, optimizer=dict(state={0: dict(step=torch.tensor(3.0))}, param_groups=[])),
    "averaged": lambda w: dict(iter=12, state_dict=w, updates=400),
    "bare": lambda w: w,
    "parallel": lambda w: OrderedDict((f"module.{k}", v) for k, v in w.items()),
}


def test_averaged_weights_in_the_checkpoint_of_a_training(weights, tmp_path):
    trained = {key: torch.zeros_like(value) for key, value in weights.items()}
    saved = {"format": 1, "hooks": {"ema": {"state_dict": weights, "updates": 400}}}
    path = write(tmp_path / "x.pth", {"meta": {}, "state_dict": trained, "training_state": saved})
    model = Net()
    load_checkpoint(model, path)
    assert_holds(model, trained)
    report = load_checkpoint(model, path, averaged=True)
    assert_holds(model, weights)
    assert report.complete and report.meta == {"updates": 400}


@pytest.mark.parametrize("kind", FORMATS)
def test_averaged_weights_of_other_files(kind, weights, tmp_path):
    path = write(tmp_path / "x.pth", FORMATS[kind](weights))
    model = Net()
    if kind == "averaged":
        load_checkpoint(model, path, averaged=True)
        assert_holds(model, weights)
    else:
        before = snapshot(model)
        with pytest.raises(CheckpointError, match=r"x\.pth: holds no averaged weights; .* MEGVIIEMAHook"):
            load_checkpoint(model, path, averaged=True)
        assert_holds(model, before)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_formats(kind, zipped, weights, tmp_path):
    path = write(tmp_path / "x.pth", FORMATS[kind](weights), _use_new_zipfile_serialization=zipped)
    model = Net()
    report = load_checkpoint(model, path)
    assert_holds(model, weights)
    assert report.complete
    assert report.loaded == tuple(weights)
    assert report.path == path
    assert report.summary() == f"{path}: loaded 7 of the model's 7 entries"
    meta = {"runner": dict(epoch=3, iter=70, hook_msgs=dict(best=0.5)), "averaged": dict(iter=12, updates=400)}
    assert {k: v for k, v in report.meta.items() if k != "lr"} == meta.get(kind, {})


def test_a_wrapped_model_is_loaded(weights, tmp_path):
    model = nn.Module()
    model.module = Net()
    load_checkpoint(model, write(tmp_path / "x.pth", dict(state_dict=weights)))
    assert_holds(model.module, weights)


def test_read_returns_the_whole_dict(weights, tmp_path):
    content = read_checkpoint(write(tmp_path / "x.pth", FORMATS["runner"](weights)))
    assert set(content) == {"meta", "state_dict", "optimizer"}
    assert isinstance(content["meta"]["hook_msgs"]["best"], np.float64)
    assert np.array_equal(content["meta"]["lr"], np.ones(2))
    assert set(read_checkpoint(write(tmp_path / "y.pth", weights))) == {"state_dict"}


@pytest.mark.parametrize("package", ["numpy.core", "numpy._core"])
def test_numbers_written_by_another_numpy_are_read(package, weights, tmp_path):
    meta = dict(a=np.float32(2.5), b=np.arange(3), c=np.str_("d"))
    path = write(tmp_path / "x.pth", dict(state_dict=weights, meta=meta))
    renamed = tmp_path / "y.pth"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(renamed, "w", zipfile.ZIP_STORED) as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("data.pkl"):
                data, changed = re.subn(rb"cnumpy\._?core\.multiarray\n", f"c{package}.multiarray\n".encode(), data)
                assert changed >= 2
            target.writestr(name, data)
    meta = read_checkpoint(renamed)["meta"]
    assert (meta["a"], meta["b"].tolist(), meta["c"]) == (2.5, [0, 1, 2], "d")


def test_the_list_of_allowed_names_is_put_back(weights, tmp_path):
    before = torch.serialization.get_safe_globals()  # PyTorch keeps a set; the order of the list means nothing
    read_checkpoint(write(tmp_path / "x.pth", weights))
    after = torch.serialization.get_safe_globals()
    assert len(after) == len(before) and set(after) == set(before)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_does_not_run(zipped, weights, tmp_path):
    mark = tmp_path / "ran"
    path = write(tmp_path / "x.pth", dict(state_dict=weights, meta=dict(a=RunsCommand(mark))),
                 _use_new_zipfile_serialization=zipped)
    model = Net()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"x\.pth: refused, .* would use (posix|nt)\.system, .*allow_unsafe=True "
                                              r"\(on the command line --allow-unsafe-checkpoint\)"):
        load_checkpoint(model, path)
    assert not mark.exists()
    assert_holds(model, before)


@pytest.mark.parametrize("protocol", range(2, 6))
def test_code_in_a_plain_pickle_does_not_run(protocol, tmp_path):
    mark, path = tmp_path / "ran", tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(dict(infos=RunsCommand(mark)), protocol=protocol))
    for allow_unsafe in (False, True):
        with pytest.raises(CheckpointError, match="plain pickle, such as an info file"):
            read_checkpoint(path, allow_unsafe)
    assert not mark.exists()


def test_arrays_of_objects_are_refused(weights, tmp_path):
    path = write(tmp_path / "x.pth", dict(state_dict=weights, meta=dict(a=np.array([None, 1], dtype=object))))
    with pytest.raises(CheckpointError, match="allow_unsafe=True"):
        read_checkpoint(path)


def test_a_trusted_file_is_read_on_request(weights, tmp_path, caplog):
    path = write(tmp_path / "x.pth", dict(state_dict=weights, meta=dict(a=Path("some/folder"))))
    with pytest.raises(CheckpointError, match=r"would use pathlib\S*\.PosixPath|would use pathlib\S*\.WindowsPath"):
        load_checkpoint(Net(), path)
    model = Net()
    with caplog.at_level(logging.WARNING):
        report = load_checkpoint(model, path, allow_unsafe=True)
    assert_holds(model, weights)
    assert report.meta["a"] == Path("some/folder")
    assert f"{path}: read as a trusted file" in caplog.text


def test_a_safe_file_is_read_safely_even_if_trusted(weights, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        read_checkpoint(write(tmp_path / "x.pth", weights), allow_unsafe=True)
    assert not caplog.text


CONTENT = {
    "empty": (b"", "the file is empty"),
    "text": (b"hello world, this is no checkpoint", "starts with b'hello world"),
    "web page": (b"\n<!DOCTYPE html><html></html>", "web page, so the download went wrong"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "info pickle": (pickle.dumps(dict(infos=[1], metadata={})), "plain pickle, such as an info file"),
}


@pytest.mark.parametrize("kind", CONTENT)
def test_other_files_are_named(kind, tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(CONTENT[kind][0])
    with pytest.raises(CheckpointError, match=rf"x\.pth: .*{CONTENT[kind][1]}"):
        read_checkpoint(path)


def test_other_archives_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("notes.txt", "hello")
    with pytest.raises(CheckpointError, match=r"not one of torch\.save \(it holds notes\.txt\)"):
        read_checkpoint(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as archive:
        archive.writestr("y/data.pkl", b"")
        archive.writestr("y/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="a TorchScript model"):
        read_checkpoint(tmp_path / "y.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.99])
def test_cut_off_files(zipped, keep, weights, tmp_path):
    path = write(tmp_path / "x.pth", dict(state_dict=weights), _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[:max(20, int(keep * len(data)))])
    model = Net()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=r"x\.pth: damaged"):
        load_checkpoint(model, path)
    assert_holds(model, before)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_bytes_never_end_in_another_error(weights, tmp_path):
    path = write(tmp_path / "x.pth", dict(state_dict=weights))
    data, random = path.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        broken = bytearray(data)
        at = data.index(b"data.pkl") + 8 + int(random.integers(0, 900))
        broken[at:at + 8] = random.bytes(8)
        path.write_bytes(broken)
        try:
            load_checkpoint(Net(), path)
        except CheckpointError:
            refused += 1
    assert refused > 20


def test_missing_file_and_folder(tmp_path):
    (tmp_path / "stcocc_epoch_12.pth").touch()
    (tmp_path / "other.txt").touch()
    with pytest.raises(CheckpointError, match=r"no such file; in the same folder: stcocc_epoch_12\.pth$"):
        read_checkpoint(tmp_path / "stcocc_epoch_1.pth")
    with pytest.raises(CheckpointError, match=r"no such file; in the same folder: stcocc_epoch_12\.pth$"):
        read_checkpoint(tmp_path / "x")
    with pytest.raises(CheckpointError, match="the folder .*nowhere does not exist either"):
        read_checkpoint(tmp_path / "nowhere" / "x.pth")
    with pytest.raises(CheckpointError, match=r"is a folder, expected a file; it holds stcocc_epoch_12\.pth"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("content, message", [
    ([1, 2], "holds a list, expected a dict"),
    (dict(infos=[], metadata={}), "without the key 'state_dict' .* found the keys 'infos', 'metadata'"),
    ({}, r"found the keys \(none\)"),
    (dict(state_dict={}), "a dict without any tensor"),
    (dict(state_dict=[torch.ones(1)]), "a list without any tensor"),
    (dict(state_dict={3: torch.ones(1)}), "keys that are no names: 3"),
])
def test_files_without_weights(content, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(write(tmp_path / "x.pth", content))


def differing(weights):
    """One entry missing, one unknown, one of another shape."""
    changed = OrderedDict(weights)
    del changed["conv.bias"]
    changed["head.weight"] = torch.ones(5)
    changed["norm.weight"] = torch.ones(4)
    return changed


def test_strict_refuses_and_says_why(weights, tmp_path):
    path = write(tmp_path / "x.pth", dict(state_dict=differing(weights)))
    model = Net()
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    message = str(caught.value)
    for part in (str(path), "does not fit Net", "1 missing in the file: conv.bias",
                 "1 unknown to the model: head.weight", "strict=False", "5 entries that fit",
                 "1 of another shape: norm.weight ([4] in the file, [3] in the model)"):
        assert part in message
    assert_holds(model, before)


def test_long_lists_are_cut(weights, tmp_path):
    extra = {f"extra.{i}": torch.ones(1) for i in range(9)}
    with pytest.raises(CheckpointError, match=r"9 unknown to the model: extra\.0, .*extra\.4 and 4 more"):
        load_checkpoint(Net(), write(tmp_path / "x.pth", {**weights, **extra}))


def test_not_strict_loads_what_fits_and_reports_the_rest(weights, tmp_path):
    path = write(tmp_path / "x.pth", dict(state_dict=differing(weights)))
    model = Net()
    before = snapshot(model)
    report = load_checkpoint(model, path, strict=False)
    loaded = ("conv.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert report == LoadReport(loaded=loaded, missing=("conv.bias",), unexpected=("head.weight",),
                                mismatched=(("norm.weight", (4,), (3,)),), path=path)
    assert_holds(model, {**before, **{key: weights[key] for key in loaded}})
    assert report.summary().splitlines() == [
        f"{path}: loaded 5 of the model's 7 entries",
        "  1 missing in the file: conv.bias",
        "  1 unknown to the model: head.weight",
        "  1 of another shape: norm.weight ([4] in the file, [3] in the model)",
    ]


def test_not_strict_still_refuses_another_models_file(tmp_path):
    path = write(tmp_path / "x.pth", dict(a=torch.ones(1)))
    with pytest.raises(CheckpointError, match=r"does not fit Net \(no entry fits\)"):
        load_checkpoint(Net(), path, strict=False)


def test_data_types(weights, tmp_path):
    changed = {key: value.to(torch.float16 if value.is_floating_point() else torch.int32)
               for key, value in weights.items()}
    model = Net()
    load_checkpoint(model, write(tmp_path / "x.pth", changed))
    assert_holds(model, weights)
    assert model.norm.num_batches_tracked.dtype == torch.int64
    changed["norm.num_batches_tracked"] = torch.tensor(7.0)
    load_checkpoint(model, write(tmp_path / "x.pth", changed))
    assert model.norm.num_batches_tracked == 7
    before = snapshot(model)
    changed = {key: value + 1 for key, value in changed.items()}
    changed["norm.num_batches_tracked"] = torch.tensor(7.5)
    with pytest.raises(CheckpointError, match=r"'norm\.num_batches_tracked' \(torch\.float32.*int64 without changing"):
        load_checkpoint(model, write(tmp_path / "x.pth", changed), strict=False)
    assert_holds(model, before)


def test_entries_that_are_no_tensors(weights, tmp_path):
    changed = {**weights, "conv.bias": "hello", "extra": 3}
    with pytest.raises(CheckpointError, match=r"conv\.bias \(no tensor in the file, \[3\] in the model\)"):
        load_checkpoint(Net(), write(tmp_path / "x.pth", dict(state_dict=changed)))


def test_values_that_are_not_finite_are_reported(weights, tmp_path):
    weights["conv.bias"][1] = float("nan")
    weights["norm.weight"][0] = float("inf")
    report = load_checkpoint(Net(), write(tmp_path / "x.pth", weights))
    assert report.nonfinite == ("conv.bias", "norm.weight")
    assert "2 loaded entries hold NaN or infinity: conv.bias, norm.weight" in report.summary()


def test_a_model_without_storage_is_refused(weights, tmp_path):
    with pytest.raises(CheckpointError, match="'conv.weight' is on the meta device"):
        load_checkpoint(Net().to("meta"), write(tmp_path / "x.pth", weights))


def test_save_makes_folders_and_leaves_nothing_else(weights, tmp_path):
    path = tmp_path / "a" / "b" / "x.pth"
    assert save_checkpoint(dict(state_dict=weights, meta=dict(epoch=1)), path) == path
    save_checkpoint(dict(state_dict=weights, meta=dict(epoch=2)), path)
    assert [p.name for p in path.parent.iterdir()] == ["x.pth"]
    model = Net()
    assert load_checkpoint(model, path).meta == dict(epoch=2)
    assert_holds(model, weights)


def test_saved_files_have_the_usual_permissions(weights, tmp_path):
    (tmp_path / "other").touch()
    path = save_checkpoint(weights, tmp_path / "x.pth")
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_leaves_the_old_file(weights, tmp_path):
    resource = pytest.importorskip("resource")
    path = save_checkpoint(weights, tmp_path / "x.pth")
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"x\.pth: could not be written \(File too large\); the old file is"):
            save_checkpoint(dict(a=torch.ones(50_000)), path)
        with pytest.raises(CheckpointError, match=r"y\.pth: could not be written \(File too large\); no file was made"):
            save_checkpoint(dict(a=torch.ones(50_000)), tmp_path / "y.pth")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, pickle.PicklingError])
def test_an_interrupted_save_leaves_the_old_file(error, weights, tmp_path, monkeypatch):
    path = save_checkpoint(weights, tmp_path / "x.pth")
    before = path.read_bytes()

    def interrupted(_state, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(error):
        save_checkpoint(weights, path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
    assert path.read_bytes() == before


def test_saving_over_a_folder_names_it(weights, tmp_path):
    (tmp_path / "x.pth").mkdir()
    with pytest.raises(CheckpointError, match=r"x\.pth: could not be written \(Is a directory\); no file was made"):
        save_checkpoint(weights, tmp_path / "x.pth")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pth"]
