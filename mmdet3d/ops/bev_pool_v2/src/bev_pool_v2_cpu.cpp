// CPU version of bev_pool_v2: threads over voxels (forward) and pixels (backward), vectors over channels.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "bev_pool_v2.h"
#include "multiversion.h"

namespace mmdet3d::bev_pool_v2 {
namespace {

// Voxels pooled channel-last before they are written channel-first: the tile stays in the L1 cache and each channel
// is written in whole cache lines.
constexpr int64_t kTile = 32;

template <typename T>
struct ForwardArgs {
  const T* depth;
  const T* context;
  const int32_t* points;
  const int32_t* starts;
  T* volume;
  Sizes sizes;
};

template <typename T>
MMDET3D_INLINE void pool_voxel(const ForwardArgs<T>& args, int64_t voxel, T* sum) {
  const int64_t channels = args.sizes.channels;
  const auto num_points = static_cast<uint32_t>(args.sizes.points());
  const auto depths = static_cast<uint32_t>(args.sizes.depths);
  const auto pixels = static_cast<uint32_t>(args.sizes.pixels);
  std::fill(sum, sum + channels, T(0));
  const uint32_t end = std::min<uint32_t>(args.starts[voxel + 1], num_points);
  for (uint32_t i = args.starts[voxel]; i < end; ++i) {
    const uint32_t point = args.points[i];
    if (point >= num_points) continue;
    const T weight = args.depth[point];
    const T* feature = args.context + static_cast<int64_t>(pixel_of_point(point, depths, pixels)) * channels;
    for (int64_t c = 0; c < channels; ++c) sum[c] += weight * feature[c];
  }
}

template <typename T>
MMDET3D_INLINE void pool_voxels(const ForwardArgs<T>& args, int64_t begin, int64_t end, T* tile) {
  const int64_t channels = args.sizes.channels, cells = args.sizes.cells;
  for (int64_t first = begin; first < end;) {
    const int64_t sample = first / cells, cell = first % cells;
    const int64_t count = std::min({kTile, end - first, cells - cell});
    T* out = args.volume + sample * channels * cells + cell;
    if (args.starts[first] == args.starts[first + count]) {
      for (int64_t c = 0; c < channels; ++c) std::fill(out + c * cells, out + c * cells + count, T(0));
    } else {
      for (int64_t i = 0; i < count; ++i) pool_voxel(args, first + i, tile + i * channels);
      for (int64_t c = 0; c < channels; ++c) {
        for (int64_t i = 0; i < count; ++i) out[c * cells + i] = tile[i * channels + c];
      }
    }
    first += count;
  }
}

MMDET3D_MULTIVERSION void run_forward(const ForwardArgs<float>& args, int64_t begin, int64_t end, float* tile) {
  pool_voxels(args, begin, end, tile);
}
MMDET3D_MULTIVERSION void run_forward(const ForwardArgs<double>& args, int64_t begin, int64_t end, double* tile) {
  pool_voxels(args, begin, end, tile);
}

// First voxel of each of `chunks` ranges of equal cost, a voxel costing 1 and a point 1: the voxels near the cameras
// hold most points, so ranges of equal length would keep one thread busy and the others waiting.
std::vector<int64_t> balanced_ranges(const int32_t* starts, int64_t voxels, int64_t chunks) {
  std::vector<int64_t> bounds(chunks + 1, voxels);
  const int64_t total = starts[voxels] + voxels;
  for (int64_t k = 0; k < chunks; ++k) {
    int64_t low = 0, high = voxels;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts[middle] + middle < total * k / chunks) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    bounds[k] = low;
  }
  // Starts that do not ascend (not made by sort_by_cell) must still give ascending, complete ranges.
  bounds[0] = 0;
  for (int64_t k = 1; k <= chunks; ++k) bounds[k] = std::max(bounds[k], bounds[k - 1]);
  return bounds;
}

at::Tensor forward(const at::Tensor& depth, const at::Tensor& context, const at::Tensor& cell_index,
                   const at::Tensor& points, const at::Tensor& starts, at::IntArrayRef grid_size) {
  const Sizes sizes = check_inputs(depth, context, cell_index, count_cells(grid_size));
  check_order(points, starts, depth, sizes);
  at::Tensor volume =
      at::empty({sizes.batch, sizes.channels, grid_size[0], grid_size[1], grid_size[2]}, context.options());
  if (volume.numel() == 0) return volume;
  const auto depth_c = depth.contiguous(), context_c = context.contiguous();
  const auto points_c = points.contiguous(), starts_c = starts.contiguous();
  AT_DISPATCH_FLOATING_TYPES(depth.scalar_type(), "bev_pool_v2_forward", [&] {
    const ForwardArgs<scalar_t> args{depth_c.const_data_ptr<scalar_t>(),    context_c.const_data_ptr<scalar_t>(),
                                     points_c.const_data_ptr<int32_t>(),    starts_c.const_data_ptr<int32_t>(),
                                     volume.mutable_data_ptr<scalar_t>(), sizes};
    const int64_t chunks = at::get_num_threads();
    const auto bounds = balanced_ranges(args.starts, sizes.voxels(), chunks);
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<scalar_t> tile(kTile * sizes.channels);
      run_forward(args, bounds[begin], bounds[end], tile.data());
    });
  });
  return volume;
}

template <typename T, typename Index>
struct BackwardArgs {
  const T* grad_volume;  // (B, Z * Y * X, C)
  const T* depth;
  const T* context;
  const Index* cell_index;
  T* grad_depth;
  T* grad_context;
  Sizes sizes;
};

// Pixels [begin, end) of all cameras: each gathers the gradients of the voxels along its ray.
template <typename T, typename Index>
MMDET3D_INLINE void gather_pixels(const BackwardArgs<T, Index>& args, int64_t begin, int64_t end) {
  const Sizes& s = args.sizes;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t camera = row / s.pixels, pixel = row % s.pixels;
    const T* grad_sample = args.grad_volume + camera / s.cameras * s.cells * s.channels;
    const T* feature = args.context + row * s.channels;
    T* grad_feature = args.grad_context + row * s.channels;
    std::fill(grad_feature, grad_feature + s.channels, T(0));
    for (int64_t d = 0; d < s.depths; ++d) {
      const int64_t point = (camera * s.depths + d) * s.pixels + pixel;
      const int64_t cell = args.cell_index[point];
      T dot = 0;
      if (cell >= 0 && cell < s.cells) {
        const T weight = args.depth[point];
        const T* grad = grad_sample + cell * s.channels;
#pragma omp simd reduction(+ : dot)
        for (int64_t c = 0; c < s.channels; ++c) {
          dot += grad[c] * feature[c];
          grad_feature[c] += weight * grad[c];
        }
      }
      args.grad_depth[point] = dot;
    }
  }
}

MMDET3D_MULTIVERSION void run_backward(const BackwardArgs<float, int32_t>& args, int64_t begin, int64_t end) {
  gather_pixels(args, begin, end);
}
MMDET3D_MULTIVERSION void run_backward(const BackwardArgs<float, int64_t>& args, int64_t begin, int64_t end) {
  gather_pixels(args, begin, end);
}
MMDET3D_MULTIVERSION void run_backward(const BackwardArgs<double, int32_t>& args, int64_t begin, int64_t end) {
  gather_pixels(args, begin, end);
}
MMDET3D_MULTIVERSION void run_backward(const BackwardArgs<double, int64_t>& args, int64_t begin, int64_t end) {
  gather_pixels(args, begin, end);
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_volume, const at::Tensor& depth,
                                            const at::Tensor& context, const at::Tensor& cell_index) {
  const Sizes sizes = check_inputs(depth, context, cell_index, check_grad(grad_volume, context));
  const auto depth_c = depth.contiguous(), context_c = context.contiguous(), cells_c = cell_index.contiguous();
  const auto grad_rows = grad_volume.flatten(2).transpose(1, 2).contiguous();  // a voxel's channels side by side
  at::Tensor grad_depth = at::empty(depth.sizes(), depth.options());
  at::Tensor grad_context = at::empty(context.sizes(), context.options());
  AT_DISPATCH_FLOATING_TYPES(depth.scalar_type(), "bev_pool_v2_backward", [&] {
    AT_DISPATCH_INDEX_TYPES(cell_index.scalar_type(), "bev_pool_v2_backward", [&] {
      const BackwardArgs<scalar_t, index_t> args{grad_rows.const_data_ptr<scalar_t>(),
                                                 depth_c.const_data_ptr<scalar_t>(),
                                                 context_c.const_data_ptr<scalar_t>(),
                                                 cells_c.const_data_ptr<index_t>(),
                                                 grad_depth.mutable_data_ptr<scalar_t>(),
                                                 grad_context.mutable_data_ptr<scalar_t>(),
                                                 sizes};
      at::parallel_for(0, sizes.batch * sizes.cameras * sizes.pixels, 16,
                       [&](int64_t begin, int64_t end) { run_backward(args, begin, end); });
    });
  });
  return {grad_depth, grad_context};
}

template <typename Index>
void counting_sort(const Index* cell_index, int64_t batch, int64_t points_per_sample, int64_t cells, int32_t* points,
                   int32_t* starts) {
  const int64_t num_points = batch * points_per_sample, voxels = batch * cells;
  std::vector<int32_t> voxel_of(num_points);
  std::vector<int32_t> next(voxels + 1, 0);  // number of points, then position of the next point, per voxel
  for (int64_t point = 0; point < num_points; ++point) {
    const int64_t cell = cell_index[point];
    const bool inside = cell >= 0 && cell < cells;
    voxel_of[point] = static_cast<int32_t>(inside ? point / points_per_sample * cells + cell : voxels);
    ++next[voxel_of[point]];
  }
  int32_t start = 0;
  for (int64_t voxel = 0; voxel <= voxels; ++voxel) {
    const int32_t count = next[voxel];
    starts[voxel] = next[voxel] = start;
    start += count;
  }
  for (int64_t point = 0; point < num_points; ++point) points[next[voxel_of[point]]++] = static_cast<int32_t>(point);
}

std::tuple<at::Tensor, at::Tensor> sort(const at::Tensor& cell_index, int64_t num_cells) {
  TORCH_CHECK(cell_index.dim() == 5, "bev_pool_v2_sort: cell_index must have shape (B, N, D, H, W), got ",
              cell_index.sizes());
  const int64_t batch = cell_index.size(0), limit = std::numeric_limits<int32_t>::max();
  TORCH_CHECK(num_cells > 0 && cell_index.numel() < limit && batch * num_cells < limit,
              "bev_pool_v2_sort: number of cells must be positive, and points and voxels fewer than int32 can count");
  const auto options = cell_index.options().dtype(at::kInt);
  at::Tensor points = at::empty({cell_index.numel()}, options);
  at::Tensor starts = at::empty({batch * num_cells + 1}, options);
  const auto cells_c = cell_index.contiguous();
  AT_DISPATCH_INDEX_TYPES(cell_index.scalar_type(), "bev_pool_v2_sort", [&] {
    counting_sort(cells_c.const_data_ptr<index_t>(), batch, batch > 0 ? cell_index.numel() / batch : 0, num_cells,
                  points.mutable_data_ptr<int32_t>(), starts.mutable_data_ptr<int32_t>());
  });
  return {points, starts};
}

}  // namespace
}  // namespace mmdet3d::bev_pool_v2

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) {
  m.impl("bev_pool_v2_sort", &mmdet3d::bev_pool_v2::sort);
  m.impl("bev_pool_v2_forward", &mmdet3d::bev_pool_v2::forward);
  m.impl("bev_pool_v2_backward", &mmdet3d::bev_pool_v2::backward);
}
