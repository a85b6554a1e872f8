// Schema of frustum_cells. Contract: ../frustum_cells.py.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // (B, N, ...) cameras, (B, 4, 4) bda, (w,), (h,) and (D,) frustum -> (B, N, D, h, w) int32.
  m.def(
      "frustum_cells(Tensor pixel_from_augmented, Tensor offset, Tensor ego_from_pixel, Tensor translation, "
      "Tensor bda, Tensor columns, Tensor rows, Tensor depths, float[3] low, float[3] cell, int[3] size_xyz, "
      "bool truncate_toward_zero) -> Tensor");
}
