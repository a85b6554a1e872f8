"""Paths of labels, files of coarse labels, and work shared out to processes."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mmdet3d.datasets.converters.label_files import coarse_name, label_folder, write_coarse_labels
from mmdet3d.datasets.converters.parallel import map_unordered
from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.npz import read_headers


@pytest.mark.parametrize("path, openocc", [
    ("./data/nuscenes/gts/scene-0001/abc", "./data/nuscenes/openocc_v2/scene-0001/abc"),
    ("gts/scene-0001/abc", "openocc_v2/scene-0001/abc"),
    ("/gts/old_gts/gts/scene-0001/abc", "/gts/old_gts/openocc_v2/scene-0001/abc"),
    ("data/my_gts/x/scene/abc", "data/my_gts/x/scene/abc"),
    ("data/gts/gts/gts", "data/gts/gts/gts".replace("data/gts", "data/openocc_v2")),
    ("data\\gts\\scene\\abc", "data/openocc_v2/scene/abc"),
    ("/x/mygts/gts/scene/abc", "/x/mygts/openocc_v2/scene/abc"),
    ("gts/gts/s/t", "gts/openocc_v2/s/t"),
    ("a/b", "a/b"),
])
def test_only_the_folder_above_the_scene_is_renamed(path, openocc):
    assert label_folder(path, "openocc") == openocc
    assert label_folder(path, "occ3d") == path.replace("\\", "/")


def test_unknown_label_set():
    with pytest.raises(ValueError, match=r"one of \['occ3d', 'openocc'\], got 'kitti'"):
        label_folder("gts/a/b", "kitti")


def test_every_cut_of_a_file_is_noticed(tmp_path):
    write_coarse_labels(tmp_path, {2: np.arange(24, dtype=np.uint8).reshape(2, 3, 4)})
    path = tmp_path / coarse_name(2)
    content = path.read_bytes()
    assert list(read_headers(path)) == ["semantics", "flow"]
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match="labels_1_2.npz: not a readable .npz file"):
            read_headers(path)


def square_and_process(item, offset):
    if item == -1:
        raise RuntimeError("item -1")
    return item * item + offset, os.getpid()


@pytest.mark.parametrize("workers, chunk", [(0, 1), (1, 3), (2, 3)])
def test_every_item_once_whatever_the_workers(workers, chunk):
    results = list(map_unordered(partial(square_and_process, offset=1), list(range(20)), workers, chunk))
    assert sorted(value for value, _ in results) == [n * n + 1 for n in range(20)]
    assert (os.getpid() in {process for _, process in results}) == (workers < 2)


def test_an_error_of_a_worker_arrives():
    with pytest.raises(RuntimeError, match="item -1"):
        list(map_unordered(partial(square_and_process, offset=1), [1, 2, -1, 3], 2, 1))
    with pytest.raises(ValueError, match="workers"):
        list(map_unordered(abs, [1], -1))


ENDLESS = """
import os, sys, time
sys.path.insert(0, {root!r})
from mmdet3d.datasets.converters.parallel import map_unordered

def slow(item):
    print(os.getpid(), flush=True)
    time.sleep(0.2)

if __name__ == "__main__":
    list(map_unordered(slow, range(100000), 2, 1))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="process ids are looked up the POSIX way")
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS.format(root=str(Path(__file__).resolve().parents[3])))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              text=True)
    assert int(parent.stdout.readline()) != parent.pid
    parent.kill()
    # The workers hold the other end of the pipe: it is read to its end only if they end too.
    parent.communicate(timeout=60)
