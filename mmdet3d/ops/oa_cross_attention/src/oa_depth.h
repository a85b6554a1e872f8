// What the CPU and the CUDA version of oa_depth_consistency share. The contract is in ../depth_consistency.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>

#include "oa_cross_attention.h"

namespace mmdet3d::oa_depth {

using oa_cross_attention::find_taps;
using oa_cross_attention::Taps;

struct Options {
  double first, step, sigma;
  bool squared_sigma, distance_to_neighbours, softmax_depth;
};

// How well an anchor's depth fits the most probable bin. The order of the operations is that of the reference.
template <typename T>
MMDET3D_OA_INLINE T fit(const Options& options, int bin, T anchor_depth) {
  const T step = static_cast<T>(options.step), likely = step * bin + static_cast<T>(options.first);
  T distance = std::abs(anchor_depth - likely);
  if (options.distance_to_neighbours) {
    const T nearer = std::abs(anchor_depth - (likely - step)), farther = std::abs(anchor_depth - (likely + step));
    distance = nearer < farther ? nearer : farther;
  }
  const T square = distance * distance, sigma_square = static_cast<T>(options.sigma * options.sigma);
  return std::exp(options.squared_sigma ? -square / 2 * sigma_square : -square / (2 * sigma_square));
}

// After a softmax, numbers this much below the largest may have become equal to it: exp(x - largest) / sum is rounded
// twice, to half a unit in the last place (a factor of 1 +- epsilon / 2) each, on both sides of the comparison.
template <typename T>
MMDET3D_OA_INLINE T tie_margin() {
  return 4 * std::numeric_limits<T>::epsilon();
}

struct Sizes {
  int cameras, batch, queries, points, bins;  // N, B, Q, Z, D
  int height, width;
};

template <typename T>
struct Inputs {
  const T* position;      // (N, B, Q, Z, 2)
  const T* anchor_depth;  // (N, B, Q, Z)
  const bool* valid;      // (N, B, Q, Z)
  const T* depth;         // (B, N, height * width, D)
  Sizes sizes;
  Options options;

  // Offset in depth of the first pixel of the map that belongs to `row` of (N, B, Q).
  MMDET3D_OA_INLINE int find_map(int row) const {
    const int map = row / sizes.queries, camera = map / sizes.batch, sample = map % sizes.batch;
    return (sample * sizes.cameras + camera) * sizes.height * sizes.width * sizes.bins;
  }
};

inline Sizes check_inputs(const at::Tensor& position, const at::Tensor& anchor_depth, const at::Tensor& valid,
                          const at::Tensor& depth, int64_t height, int64_t width) {
  TORCH_CHECK(position.dim() == 5 && position.size(4) == 2,
              "oa_depth_consistency: position must have shape (N, B, Q, Z, 2), got ", position.sizes());
  const auto anchors = position.sizes().slice(0, 4);
  TORCH_CHECK(anchor_depth.sizes() == anchors && valid.sizes() == anchors,
              "oa_depth_consistency: anchor_depth and valid must have shape ", anchors, ", got ", anchor_depth.sizes(),
              " and ", valid.sizes());
  TORCH_CHECK(depth.dim() == 4 && depth.size(0) == anchors[1] && depth.size(1) == anchors[0] &&
                  height > 0 && width > 0 && depth.size(2) == height * width && depth.size(3) > 0,
              "oa_depth_consistency: depth must have shape (B, N, h * w, D) with (h, w) = (", height, ", ", width,
              ") and D > 0, got ", depth.sizes());
  for (const at::Tensor* tensor : {&anchor_depth, &depth}) {
    TORCH_CHECK(tensor->scalar_type() == position.scalar_type() && tensor->device() == position.device(),
                "oa_depth_consistency: anchor_depth and depth must be ", position.scalar_type(), " on ",
                position.device(), " like position, got ", tensor->scalar_type(), " on ", tensor->device());
  }
  TORCH_CHECK(valid.scalar_type() == at::kBool && valid.device() == position.device(),
              "oa_depth_consistency: valid must be bool on ", position.device(), ", got ", valid.scalar_type(), " on ",
              valid.device());
  TORCH_CHECK(position.numel() <= std::numeric_limits<int>::max() && depth.numel() <= std::numeric_limits<int>::max(),
              "oa_depth_consistency: position and depth must have fewer than 2^31 elements, got shapes ",
              position.sizes(), " and ", depth.sizes());
  const auto narrow = [](int64_t number) { return static_cast<int>(number); };
  return {narrow(anchors[0]),    narrow(anchors[1]), narrow(anchors[2]), narrow(anchors[3]),
          narrow(depth.size(3)), narrow(height),     narrow(width)};
}

}  // namespace mmdet3d::oa_depth
