"""Warp of a history of volumes: contract, checks and choice of implementation."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._checks import FLOAT_DTYPES, as_integer, check_dims, check_dtype, check_same_device, check_shape
from .._library import AVAILABLE, built_with_cuda
from .reference import history_warp_reference

#: False also for a library that was built before this operator was written.
_COMPILED = AVAILABLE and hasattr(torch.ops.mmdet3d, "history_warp")

#: Types of device that the compiled operator serves; asked once, since a tracer cannot ask the library.
_SERVED = (("cpu", "meta", "cuda") if built_with_cuda() else ("cpu", "meta")) if _COMPILED else ()


def history_warp(history: Tensor, matrix: Tensor, size_zyx: Sequence[int], *, oldest_at: Tensor | None = None,
                 out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The history of the next frame: every slot re-sampled into the current frame and moved on by one.

    Slot t of the result is slot t - 1 of ``history``, at the position that ``matrix`` gives for each voxel. Slot 0 is
    left as it is (without ``out`` it holds arbitrary numbers): it is the place of the new volume. What would be slot T
    falls out of the history; it is computed only where ``oldest_at`` asks for it.

    A voxel (x, y, z) reads the position ``matrix @ (x, y, z, 1)``, trilinearly from the eight voxels around it, those
    outside the volume being zero; integers are voxels, as with ``align_corners=True`` of ``grid_sample``. Positions and
    weights are float32 (float64 for a float64 history), each product and sum rounded in turn, see
    :func:`mmdet3d.ops.history_warp.trilinear_taps`; the eight terms are added in the order of that function. Nothing is
    read where the weight is 0.

    Args:
        history: [B, V, T, C] features of the V voxels (flat index ``(z * Y + y) * X + x``) in T frames, newest first;
            float32, float64, float16 or bfloat16. Any strides: one volume ``[B, V, 1, C].expand(...)`` can stand for
            T equal ones. A copy is made only where a voxel's C channels do not lie together.
        matrix: [B, 4, 4] voxel index (x, y, z) now -> voxel index in the volumes of ``history``; float32 or float64.
            The last row is not read.
        size_zyx: (Z, Y, X) of the volumes.
        oldest_at: [B, K] int64 flat indices of voxels. Not checked: an index outside 0 to V - 1 gives zeros.
        out: [B, V, T, C] of the dtype of ``history`` to write to, in memory of its own and with a voxel's C channels
            together; None for a new tensor.

    Returns:
        [B, V, T, C], which is ``out`` if given, and [B, K, C], the warped slot T - 1 at ``oldest_at``, or None.

    Raises:
        ValueError: shapes or devices disagree, there is no slot, or ``out`` shares memory with ``history``.
        TypeError: a dtype is not accepted.
        RuntimeError: an input requires a gradient while gradients are recorded.
    """
    size = [as_integer("size_zyx", length) for length in size_zyx]
    _check(history, matrix, size, oldest_at)
    if out is not None:
        _check_out(out, history)
    if torch.is_grad_enabled() and (history.requires_grad or matrix.requires_grad):
        raise RuntimeError("history_warp has no gradient; call it under torch.no_grad() or detach its inputs")
    if history.device.type not in _SERVED:
        new, oldest = history_warp_reference(history, matrix, size, oldest_at=oldest_at)
        if out is None:
            return new, oldest
        out[:, :, 1:] = new[:, :, 1:]
        return out, oldest
    B, V, T, C = history.shape
    new = history.new_empty(B, V, T, C) if out is None else out
    voxels = torch.empty(B, 0, dtype=torch.int64, device=history.device) if oldest_at is None else oldest_at
    oldest = history.new_empty(B, voxels.shape[1], C)
    torch.ops.mmdet3d.history_warp(history, matrix, size, voxels, new, oldest)
    return new, None if oldest_at is None else oldest


def _check(history: Tensor, matrix: Tensor, size: list[int], oldest_at: Tensor | None) -> None:
    check_dtype("history", history, FLOAT_DTYPES)
    check_dims("history", history, "B, V, T, C")
    B, V, T, _ = history.shape
    if len(size) != 3 or min(size) < 0 or size[0] * size[1] * size[2] != V:
        raise ValueError(f"size_zyx must be (Z, Y, X) with Z * Y * X = {V} voxels, got {tuple(size)}")
    if T < 1:
        raise ValueError(f"history must have at least one slot, got {tuple(history.shape)}")
    check_dtype("matrix", matrix, (torch.float32, torch.float64))
    check_shape("matrix", matrix, "B, 4, 4", (B, 4, 4))
    check_same_device("matrix", matrix, "history", history)
    if oldest_at is not None:
        check_dtype("oldest_at", oldest_at, (torch.int64,))
        check_dims("oldest_at", oldest_at, "B, K")
        check_shape("oldest_at", oldest_at, "B, K", (B, oldest_at.shape[1]))
        check_same_device("oldest_at", oldest_at, "history", history)


def _check_out(out: Tensor, history: Tensor) -> None:
    check_dtype("out", out, (history.dtype,))
    check_shape("out", out, "B, V, T, C", history.shape)
    check_same_device("out", out, "history", history)
    if out.numel() and out.stride(3) != 1:
        raise ValueError(f"out must have a voxel's channels together (stride 1), got strides {out.stride()}")
    if not torch.compiler.is_compiling() and out.device.type != "meta":
        if out.untyped_storage().data_ptr() == history.untyped_storage().data_ptr() and out.numel():
            raise ValueError("out must not share memory with history: voxels are read after others were written")


if _COMPILED:

    @torch.library.register_fake("mmdet3d::history_warp")
    def _(history, matrix, size_zyx, oldest_at, out, oldest):
        return None
