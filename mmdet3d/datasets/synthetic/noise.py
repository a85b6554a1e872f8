"""Repeatable noise for textures, from integer hashes: the same bits on every machine."""

import numpy as np


def hash_cells(i: np.ndarray, j: np.ndarray, seed: int = 0) -> np.ndarray:
    """Uniform float32 noise in [0, 1) of integer cells (i, j), any shape."""
    h = i.astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1)
    h ^= j.astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA77) + np.uint32(seed * 0x27D4EB2F & 0xFFFFFFFF)
    h ^= h >> np.uint32(15)
    h *= np.uint32(0x2C1B3C6D)
    h ^= h >> np.uint32(12)
    h *= np.uint32(0x297A2D39)
    h ^= h >> np.uint32(15)
    return (h >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def cell_noise(a: np.ndarray, b: np.ndarray, size: float, seed: int = 0) -> np.ndarray:
    """Noise in [-1, 1) that is constant within squares of edge ``size``."""
    scale = np.float32(1 / size)
    return 2 * hash_cells(np.floor(a * scale), np.floor(b * scale), seed) - 1


def smooth_noise(a: np.ndarray, b: np.ndarray, size: float, seed: int = 0) -> np.ndarray:
    """Noise in [-1, 1), interpolated between the corners of squares of edge ``size``."""
    a, b = a * np.float32(1 / size), b * np.float32(1 / size)
    i, j = np.floor(a), np.floor(b)
    u, v = a - i, b - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    low = hash_cells(i, j, seed) * (1 - u) + hash_cells(i + 1, j, seed) * u
    high = hash_cells(i, j + 1, seed) * (1 - u) + hash_cells(i + 1, j + 1, seed) * u
    return 2 * (low * (1 - v) + high * v) - 1
