"""Pickles from strangers: read without running code, because only what builds plain values is to be had."""

import codecs
import pickle
from typing import BinaryIO

import numpy as np


class ForbiddenGlobal(pickle.UnpicklingError):
    """A pickle asks for a class or function that plain values do not need."""


def numpy_globals() -> dict[tuple[str, str], object]:
    """Constructors of NumPy arrays and numbers, by module and name under which NumPy 1.x and 2.x pickle them."""
    found: dict[tuple[str, str], object] = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for package in ("numpy.core", "numpy._core"):  # asked of NumPy itself, whose modules moved between versions
        found[f"{package}.multiarray", "_reconstruct"] = np.zeros(1).__reduce__()[0]
        found[f"{package}.multiarray", "scalar"] = np.float64(0).__reduce__()[0]
        found[f"{package}.numeric", "_frombuffer"] = np.zeros(1).__reduce_ex__(5)[0]
    return found


def load_plain(file: BinaryIO) -> object:
    """Unpickle containers, numbers, strings and NumPy arrays.

    Raises:
        ForbiddenGlobal: the pickle asks for anything else; the message names it.
        Exception: damaged bytes make the pickle machine fail in nearly any way.
    """
    return _PlainUnpickler(file).load()


def _encode_latin1(text: str, encoding: str) -> bytes:
    """How pickle protocol 2 stores bytes; other codecs are not needed."""
    if encoding != "latin1":
        raise ForbiddenGlobal(f"_codecs.encode with {encoding!r}")
    return codecs.encode(text, "latin1")


_PLAIN_GLOBALS = {
    **numpy_globals(),
    ("_codecs", "encode"): _encode_latin1,
    **{(module, kind.__name__): kind
       for module in ("builtins", "__builtin__")
       for kind in (dict, list, tuple, set, frozenset, bytearray, complex)},
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        try:
            return _PLAIN_GLOBALS[module, name]
        except KeyError:
            raise ForbiddenGlobal(f"{module}.{name}") from None
