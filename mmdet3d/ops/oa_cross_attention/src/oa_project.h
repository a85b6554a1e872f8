// What the CPU and the CUDA version of oa_project_points share. The contract is in ../projection.py.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <tuple>

#include "oa_cross_attention.h"

namespace mmdet3d::oa_project {

struct Sizes {
  int cameras, batch, points;  // N, B, Q * Z
};

template <typename T>
struct Job {
  const T* points;    // (Q * Z, 4)
  const T* matrices;  // (B, N, 4, 4)
  T* position;        // (N, B, Q * Z, 2)
  T* depth;           // (N, B, Q * Z)
  bool* valid;        // (N, B, Q * Z)
  Sizes sizes;
  T span_x, span_y, min_depth;

  // One point in one camera; `i` counts (N, B, Q * Z).
  MMDET3D_OA_INLINE void run(int i) const {
    const int view = i / sizes.points, camera = view / sizes.batch, sample = view % sizes.batch;
    const T* point = points + 4 * (i % sizes.points);
    const T* matrix = matrices + 16 * (sample * sizes.cameras + camera);
    T along[3];
    MMDET3D_OA_UNROLL
    for (int row = 0; row < 3; ++row) {
      const T* m = matrix + 4 * row;
      along[row] = m[0] * point[0] + m[1] * point[1] + m[2] * point[2] + m[3] * point[3];
    }
    const T divisor = along[2] < min_depth ? min_depth : along[2];
    const T x = along[0] / divisor / span_x, y = along[1] / divisor / span_y;
    position[2 * i] = x;
    position[2 * i + 1] = y;
    depth[i] = along[2];
    valid[i] = along[2] > min_depth && x > 0 && x < 1 && y > 0 && y < 1;
  }
};

using Outputs = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Calls run(job, count) for arguments of the scalar type T.
template <typename T, typename Run>
void with_job(const at::Tensor& points, const at::Tensor& matrices, double span_x, double span_y, double min_depth,
              const Outputs& outputs, const Run& run) {
  const auto points_c = points.contiguous(), matrices_c = matrices.contiguous();
  const auto& [position, depth, valid] = outputs;
  const Sizes sizes{static_cast<int>(depth.size(0)), static_cast<int>(depth.size(1)),
                    static_cast<int>(points.numel() / 4)};
  run(Job<T>{points_c.const_data_ptr<T>(), matrices_c.const_data_ptr<T>(), position.mutable_data_ptr<T>(),
             depth.mutable_data_ptr<T>(), valid.mutable_data_ptr<bool>(), sizes, static_cast<T>(span_x),
             static_cast<T>(span_y), static_cast<T>(min_depth)},
      depth.numel());
}

// Checks dtypes, devices and shapes; the outputs, not yet filled.
Outputs make_outputs(const at::Tensor& points, const at::Tensor& matrices);

}  // namespace mmdet3d::oa_project
