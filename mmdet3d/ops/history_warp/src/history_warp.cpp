// Schema of history_warp. Contract: ../history_warp.py; `oldest_at` may be empty.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  m.def(
      "history_warp(Tensor history, Tensor matrix, int[3] size_zyx, Tensor oldest_at, Tensor(a!) out, "
      "Tensor(b!) oldest) -> ()");
}
