// Sizes and checks shared by the CPU and CUDA versions of ms_deform_attn.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace mmdet3d::ms_deform_attn {

struct Level {
  int64_t height, width;
  int64_t start;  // row of `value` where the map begins
};

struct Sizes {
  int64_t batch, pixels, heads, channels;  // of value (B, S, M, D)
  int64_t queries, levels, points;         // of sampling_locations (B, Q, M, L, P, 2)
};

// Checks dtypes, devices and shapes; the sizes.
Sizes check_inputs(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                   const at::Tensor& weights);

// Checks the gradient of the output (B, Q, M * D).
void check_grad(const at::Tensor& grad_out, const at::Tensor& value, const Sizes& sizes);

// Levels of the flat list (H_0, W_0, H_1, W_1, ...).
std::vector<Level> read_levels(at::IntArrayRef spatial_shapes);

}  // namespace mmdet3d::ms_deform_attn
