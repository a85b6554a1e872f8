// Schemas of class_guidance; the contracts and the checks are in class_guidance.py and noise.py. There are CUDA versions
// only: elsewhere PyTorch's own kernels run.
#include <torch/library.h>

TORCH_LIBRARY_FRAGMENT(mmdet3d, m) {
  // scores (B, ..., K), weights (H, K) and (D, H), biases (H,) and (D,), seeds (B,) -> (B, ..., D) of dtype.
  m.def(
      "class_guidance(Tensor scores, Tensor first_weight, Tensor first_bias, Tensor second_weight, "
      "Tensor second_bias, Tensor? noise_seeds, bool softmax, ScalarType dtype) -> Tensor");
  // seeds (B,) -> (B, count) of float32.
  m.def("gumbel_noise(Tensor seeds, SymInt count) -> Tensor");
}
