// Schemas of upsample_mlp; the contract and the checks are in upsample_mlp.py. There are CUDA versions only: on CPUs
// slabs of the volume run through PyTorch's own kernels.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // hidden (B, Z, Y, X, H), weight (K, H), fine (B, 2X, 2Y, 2Z, H), residual (B, X, Y, Z, K) -> (B, 2X, 2Y, 2Z, K).
  m.def(
      "upsample_mlp_forward(Tensor hidden, Tensor weight, Tensor bias, Tensor? fine, Tensor? residual, "
      "float residual_weight) -> Tensor");
  // The fine rows first <= x < last of the x2 of hidden, in float32: (B, last - first, 2Y, 2Z, H).
  m.def("upsample_rows(Tensor hidden, SymInt first, SymInt last) -> Tensor");
  // Adds to grad_hidden (B, Z, Y, X, H) what the fine rows from x = first on, (B, n, 2Y, 2Z, H), pass back.
  m.def("upsample_rows_backward(Tensor grad, Tensor(a!) grad_hidden, SymInt first) -> ()");
}
