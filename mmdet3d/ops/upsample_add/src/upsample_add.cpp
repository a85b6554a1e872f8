// Schema of upsample_add; the contract and the checks are in upsample_add.py. There is a CUDA version only: on CPUs
// PyTorch's own kernels run.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // fine (B, 2Z, 2Y, 2X, C), coarse (B, Z, Y, X, C) -> sum like fine, mean (B, 2Y, 2X, C) in float32.
  m.def("upsample_add(Tensor fine, Tensor coarse) -> (Tensor, Tensor)");
}
