"""Records in shared memory: values, copies, and that sending them to a process does not copy them."""

import sys
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch  # noqa: F401 teaches ForkingPickler to share tensors

from mmdet3d.datasets.info_store import InfoStore, RecordWindow


def records(count):
    return [{"token": f"t{i}", "can_bus": np.arange(18.0) + i, "cams": {"A": {"path": "x" * 100}}}
            for i in range(count)]


def test_records_come_back_in_order_as_copies():
    given = records(5)
    store = InfoStore(given)
    assert len(store) == 5 and [info["token"] for info in store] == ["t0", "t1", "t2", "t3", "t4"]
    assert store[-1]["token"] == "t4" and store[np.int64(2)]["token"] == "t2"
    np.testing.assert_equal(store[3], given[3])
    store[3]["can_bus"][:] = 7
    store[3]["cams"].clear()
    np.testing.assert_equal(store[3], given[3])
    for index in (5, -6):
        with pytest.raises(IndexError, match=rf"record {index} is not in 0\.\.4"):
            store[index]
    assert len(InfoStore([])) == 0 and list(InfoStore([])) == []


def test_no_python_objects_per_record():
    """What a worker's reference counts could touch does not grow with the number of records."""
    small, large = InfoStore(records(3)), InfoStore(records(300))
    assert large.nbytes > 50 * small.nbytes
    for store in (small, large):
        assert all(isinstance(value, torch.Tensor) for value in vars(store).values())
    assert sys.getsizeof(small) == sys.getsizeof(large) and len(vars(small)) == len(vars(large))


def test_what_is_sent_to_a_worker_does_not_grow_with_the_records():
    small, large = (len(ForkingPickler.dumps(InfoStore(records(n)))) for n in (3, 300))
    assert abs(large - small) < 100 and large < 2000


def test_window_asks_the_store_once():
    asked = []

    class Store(InfoStore):
        def __getitem__(self, index):
            asked.append(index)
            return super().__getitem__(index)

    window = RecordWindow(Store(records(3)))
    assert window[1] is window[1] and window[2]["token"] == "t2" and asked == [1, 2]
