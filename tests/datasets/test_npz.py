"""Reading .npz files that may hold anything."""

import contextlib

import numpy as np
import pytest

from mmdet3d.datasets.infos import DataError
from mmdet3d.datasets.npz import read_arrays, read_headers


def test_headers_and_arrays(tmp_path):
    arrays = {"a": np.zeros((3, 4, 5), np.uint8), "b": np.arange(6.0, dtype=">f4").reshape(2, 3).T}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "x.npz", **arrays)
        headers = read_headers(tmp_path / "x.npz")
        assert headers == {name: (array.shape, array.dtype) for name, array in arrays.items()}
    np.testing.assert_array_equal(read_arrays(tmp_path / "x.npz", "b")["b"], arrays["b"])
    with pytest.raises(DataError, match=r"x.npz: no \['c'\]; found \['a', 'b'\]"):
        read_arrays(tmp_path / "x.npz", "a", "c")
    assert set(read_arrays(tmp_path / "x.npz", "a", optional=("c", "b"))) == {"a", "b"}
    with pytest.raises(DataError, match="file not found: .*y.npz"):
        read_arrays(tmp_path / "y.npz", "a")
    np.save(tmp_path / "z.npy", arrays["a"])
    with pytest.raises(DataError, match="found a single array"):
        read_arrays(tmp_path / "z.npy", "a")


def test_random_bytes_never_crash_the_reader(tmp_path):
    np.savez_compressed(tmp_path / "good.npz", semantics=np.arange(60).reshape(5, 4, 3))
    good, rng = (tmp_path / "good.npz").read_bytes(), np.random.default_rng(1)
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        for position in rng.integers(0, len(good), 4):
            data[position] = rng.integers(0, 256)
        (tmp_path / "bad.npz").write_bytes(bytes(data[:rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data))
        with contextlib.suppress(DataError):
            read_headers(tmp_path / "bad.npz")
        try:
            read_arrays(tmp_path / "bad.npz", "semantics")
        except DataError as error:
            refused += 1
            assert "bad.npz" in str(error)
    assert refused > 150
