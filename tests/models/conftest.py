"""Model tests run on one thread: their tensors are tiny, and threads that wait for busy cores cost seconds each."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Restores the number of threads afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
