// Sizes and checks shared by the CPU and CUDA versions of bev_pool_v2.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

namespace mmdet3d::bev_pool_v2 {

struct Sizes {
  int64_t batch, cameras, depths, pixels;  // pixels = H * W of one camera
  int64_t channels;
  int64_t cells;  // Z * Y * X

  // constexpr, so that CUDA kernels may call them too.
  constexpr int64_t points() const { return batch * cameras * depths * pixels; }
  constexpr int64_t voxels() const { return batch * cells; }
};

// Checks dtypes, devices and shapes; the sizes.
Sizes check_inputs(const at::Tensor& depth, const at::Tensor& context, const at::Tensor& cell_index, int64_t cells);

// Z * Y * X, checked.
int64_t count_cells(at::IntArrayRef grid_size);

// Checks the sorted points and their starts against the sizes.
void check_order(const at::Tensor& points, const at::Tensor& starts, const at::Tensor& depth, const Sizes& sizes);

// Checks the gradient of the volume, whose grid is not known beforehand; Z * Y * X.
int64_t check_grad(const at::Tensor& grad_volume, const at::Tensor& context);

// Row of the context map, as (camera of the batch, pixel), that frustum point (camera of the batch, depth, pixel) sees.
template <typename Index>
constexpr Index pixel_of_point(Index point, Index depths, Index pixels) {
  return point / (depths * pixels) * pixels + point % pixels;
}

}  // namespace mmdet3d::bev_pool_v2
