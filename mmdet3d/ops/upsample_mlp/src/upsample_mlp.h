// What the forward kernels of upsample_mlp share.
#pragma once

#include <cstdint>

namespace mmdet3d::upsample_mlp {

struct Sizes {
  int batch, z, y, x, hidden, outputs;
};

// Contiguous tensors; fine and residual may be null.
template <typename T>
struct Args {
  const T* hidden;
  const T* fine;
  const float* weight;
  const float* bias;
  const float* residual;
  float residual_weight;
  float* out;
  Sizes size;
};

// The forward pass by tensor cores, for at::Half and at::BFloat16: softplus and weights are rounded to T, sums are in
// float32. False, and nothing is done, where sizes, alignment or the GPU do not allow it.
template <typename T>
bool forward_by_tensor_cores(const Args<T>& args);

}  // namespace mmdet3d::upsample_mlp
