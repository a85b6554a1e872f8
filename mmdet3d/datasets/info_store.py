"""Info records in one block of memory that loader workers share."""

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch


class InfoStore(Sequence):
    """A sequence of records that hands out a fresh copy of a record at every access.

    The records are pickled, one after the other, into one tensor of bytes. A list of dicts would be copied page by page
    into every worker process, because merely looking at a Python object writes its reference count; nobody writes to
    these bytes. Workers that are started by ``fork`` share them as they are; for ``spawn`` and ``forkserver``
    PyTorch moves a tensor into shared memory when it is sent to a process.

    Args:
        records: What to store.
    """

    def __init__(self, records: Iterable[Mapping]) -> None:
        content, ends = bytearray(), [0]
        for record in records:
            content += pickle.dumps(record, pickle.HIGHEST_PROTOCOL)
            ends.append(len(content))
        self._content = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
        self._ends = torch.tensor(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> dict:
        """Copy of the record at ``index``, which may be negative.

        Raises:
            IndexError: there is no such record.
        """
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} is not in 0..{len(self) - 1}")
        start, end = self._ends[position : position + 2].tolist()
        return pickle.loads(memoryview(self._content.numpy())[start:end])  # bytes that this object wrote itself

    def __iter__(self) -> Iterator[dict]:
        return (self[index] for index in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return self._content.nbytes + self._ends.nbytes


class RecordWindow(dict):
    """The records of a store that were asked for, by index: each is unpickled once.

    Args:
        store: Where they come from.
    """

    def __init__(self, store: Sequence[Mapping]) -> None:
        super().__init__()
        self._store = store

    def __missing__(self, index: int | np.integer) -> Mapping:
        self[index] = self._store[index]
        return self[index]
