// Schema of row_argmax. Contract: ../row_argmax.py. There is a CUDA version only: CPUs have PyTorch's.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // (..., K) -> (...) uint8.
  m.def("row_argmax(Tensor values) -> Tensor");
}
