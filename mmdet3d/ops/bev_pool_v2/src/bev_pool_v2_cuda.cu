// CUDA version of bev_pool_v2. Forward: a block pools a tile of voxels, a warp one voxel at a time, and writes the tile
// channel by channel. Backward: a block gathers for one pixel, its warps share out the depth bins. Nothing is added
// atomically, so every run gives the same bits.
#include <ATen/ATen.h>
#include <ATen/AccumulateType.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <type_traits>

#include "bev_pool_v2.h"

namespace mmdet3d::bev_pool_v2 {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kTile = 16;          // voxels of a forward block: whole 32-byte sectors are written from 8 floats on
constexpr int kForwardWarps = 8;
constexpr int kBackwardWarps = 4;
constexpr int kTransposeTile = 32;
constexpr int kTransposeRows = 8;

template <typename T>
struct ForwardArgs {
  const T* depth;
  const T* context;
  const int32_t* points;
  const int32_t* starts;
  T* volume;
  Sizes sizes;
};

// Adds the points of one voxel, in order. Lane i of the warp holds channels first_channel + i, + 32, ... (K of them).
template <typename T, typename Acc, int K>
__device__ __forceinline__ void pool_voxel(const ForwardArgs<T>& args, int64_t voxel, int64_t first_channel,
                                           Acc (&sum)[K]) {
  const int lane = threadIdx.x % kWarp;
  const auto num_points = static_cast<uint32_t>(args.sizes.points());
  const auto depths = static_cast<uint32_t>(args.sizes.depths), pixels = static_cast<uint32_t>(args.sizes.pixels);
  const int64_t channels = args.sizes.channels;
  const T* context = args.context + first_channel + lane;
  const uint32_t begin = args.starts[voxel], end = min(static_cast<uint32_t>(args.starts[voxel + 1]), num_points);
  for (uint32_t batch = begin; batch < end; batch += kWarp) {
    // Each lane looks one point up; then all lanes go through these points together.
    const uint32_t point = batch + lane < end ? static_cast<uint32_t>(args.points[batch + lane]) : num_points;
    // A point out of range (never in an order made by sort_by_cell) reads pixel 0 with weight 0.
    const bool valid = point < num_points;
    const Acc own_weight = valid ? static_cast<Acc>(args.depth[point]) : Acc(0);
    const uint32_t own_pixel = valid ? pixel_of_point(point, depths, pixels) : 0;
    const int count = min(static_cast<uint32_t>(kWarp), end - batch);
#pragma unroll 8
    for (int i = 0; i < count; ++i) {
      const Acc weight = __shfl_sync(kFullMask, own_weight, i);
      const int64_t row = static_cast<int64_t>(__shfl_sync(kFullMask, own_pixel, i)) * channels;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (first_channel + lane + k * kWarp < channels) {
          sum[k] += weight * static_cast<Acc>(context[row + k * kWarp]);
        }
      }
    }
  }
}

template <typename T, typename Acc, int K>
__global__ void __launch_bounds__(kForwardWarps* kWarp) forward_kernel(const ForwardArgs<T> args) {
  constexpr int kChannels = K * kWarp;
  __shared__ Acc tile[kTile][kChannels + 1];  // + 1: a column lies in different banks
  __shared__ int next_voxel;
  const int64_t channels = args.sizes.channels, cells = args.sizes.cells;
  const int64_t first_voxel = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * kChannels;
  const int voxels = static_cast<int>(min(static_cast<int64_t>(kTile), args.sizes.voxels() - first_voxel));
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) next_voxel = 0;
  __syncthreads();
  // Voxels hold from no to hundreds of points, so each warp takes the next one when it is free.
  while (true) {
    int voxel = lane == 0 ? atomicAdd(&next_voxel, 1) : 0;
    voxel = __shfl_sync(kFullMask, voxel, 0);
    if (voxel >= voxels) break;
    Acc sum[K] = {};
    pool_voxel<T, Acc, K>(args, first_voxel + voxel, first_channel, sum);
#pragma unroll
    for (int k = 0; k < K; ++k) tile[voxel][lane + k * kWarp] = sum[k];
  }
  __syncthreads();
  const int rows = static_cast<int>(min(static_cast<int64_t>(kChannels), channels - first_channel));
  for (int i = threadIdx.x; i < rows * kTile; i += kForwardWarps * kWarp) {
    const int row = i / kTile, column = i % kTile;
    if (column >= voxels) continue;
    const int64_t sample = (first_voxel + column) / cells, cell = (first_voxel + column) % cells;
    args.volume[(sample * channels + first_channel + row) * cells + cell] = static_cast<T>(tile[column][row]);
  }
}

// As forward_kernel, but what `frames` samples pool is one volume, channels last: (B / frames, V, frames * C). A warp
// writes its voxel's channels itself, next to each other.
template <typename T, typename Out, typename Acc, int K>
__global__ void __launch_bounds__(kForwardWarps* kWarp)
    stacked_kernel(const ForwardArgs<T> args, Out* volume, int64_t frames) {
  __shared__ int next_voxel;
  const int64_t channels = args.sizes.channels, cells = args.sizes.cells, groups = args.sizes.batch / frames;
  const int64_t first_voxel = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_channel = static_cast<int64_t>(blockIdx.y) * K * kWarp;
  const int voxels = static_cast<int>(min(static_cast<int64_t>(kTile), args.sizes.voxels() - first_voxel));
  const int lane = threadIdx.x % kWarp;
  if (threadIdx.x == 0) next_voxel = 0;
  __syncthreads();
  while (true) {
    int next = lane == 0 ? atomicAdd(&next_voxel, 1) : 0;
    next = __shfl_sync(kFullMask, next, 0);
    if (next >= voxels) break;
    const int64_t voxel = first_voxel + next, sample = voxel / cells;
    Acc sum[K] = {};
    pool_voxel<T, Acc, K>(args, voxel, first_channel, sum);
    Out* row = volume + ((sample % groups * cells + voxel % cells) * frames + sample / groups) * channels;
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t channel = first_channel + lane + k * kWarp;
      if (channel < channels) row[channel] = static_cast<Out>(sum[k]);
    }
  }
}

// (B, C, V) -> (B, V, C), for the backward pass: it reads all channels of one voxel at once.
template <typename T>
__global__ void transpose_kernel(const T* __restrict__ volume, T* __restrict__ rows, int64_t channels, int64_t cells,
                                 int64_t channel_tiles, int64_t cell_tiles) {
  __shared__ T tile[kTransposeTile][kTransposeTile + 1];
  const int64_t block = blockIdx.x, sample = block / (channel_tiles * cell_tiles);
  const int64_t first_cell = block % cell_tiles * kTransposeTile;
  const int64_t first_channel = block / cell_tiles % channel_tiles * kTransposeTile;
  for (int i = threadIdx.y; i < kTransposeTile; i += kTransposeRows) {
    const int64_t channel = first_channel + i, cell = first_cell + threadIdx.x;
    if (channel < channels && cell < cells) {
      tile[i][threadIdx.x] = volume[(sample * channels + channel) * cells + cell];
    }
  }
  __syncthreads();
  for (int i = threadIdx.y; i < kTransposeTile; i += kTransposeRows) {
    const int64_t cell = first_cell + i, channel = first_channel + threadIdx.x;
    if (channel < channels && cell < cells) {
      rows[(sample * cells + cell) * channels + channel] = tile[threadIdx.x][i];
    }
  }
}

template <typename T, typename Cell>
struct BackwardArgs {
  const T* grad_volume;  // (B, Z * Y * X, C)
  const T* depth;
  const T* context;
  const Cell* cell_index;
  T* grad_depth;
  T* grad_context;
  Sizes sizes;
};

template <typename Acc>
__device__ __forceinline__ Acc warp_sum(Acc value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// Depth bins [begin, end) of one pixel, for K * 32 channels from first_channel on: adds to their sums of depth * gradient
// and to dots[d], the part of <gradient, feature> in these channels. `point` is the pixel's first frustum point.
template <typename T, typename Acc, typename Cell, int K>
__device__ __forceinline__ void gather_bins(const BackwardArgs<T, Cell>& args, const T* grad_sample, int64_t point,
                                            int begin, int end, int64_t first_channel, const Acc (&feature)[K],
                                            Acc (&sum)[K], Acc* dots) {
  const int lane = threadIdx.x % kWarp;
  const int64_t channels = args.sizes.channels;
  for (int batch = begin; batch < end; batch += kWarp) {
    const bool has_bin = batch + lane < end;
    const int64_t own_point = point + (batch + lane) * args.sizes.pixels;
    const int64_t found = has_bin ? static_cast<int64_t>(args.cell_index[own_point]) : -1;
    const int own_cell = found >= 0 && found < args.sizes.cells ? static_cast<int>(found) : -1;
    const Acc own_weight = own_cell >= 0 ? static_cast<Acc>(args.depth[own_point]) : Acc(0);
    const int count = min(kWarp, end - batch);
    Acc own_dot = 0;
    if (__ballot_sync(kFullMask, own_cell >= 0) == 0) continue;
#pragma unroll 4
    for (int i = 0; i < count; ++i) {
      const int cell = __shfl_sync(kFullMask, own_cell, i);
      const Acc weight = __shfl_sync(kFullMask, own_weight, i);
      const T* row = grad_sample + static_cast<int64_t>(max(cell, 0)) * channels + first_channel + lane;
      Acc dot = 0;
      // No branch around the loads of a bin outside: several bins are then in flight at once.
#pragma unroll
      for (int k = 0; k < K; ++k) {
        const bool read = cell >= 0 && first_channel + lane + k * kWarp < channels;
        const Acc grad = read ? static_cast<Acc>(row[k * kWarp]) : Acc(0);
        sum[k] += weight * grad;
        dot += grad * feature[k];
      }
      dot = warp_sum(dot);
      if (lane == i) own_dot = dot;
    }
    if (has_bin) dots[batch + lane] += own_dot;
  }
}

template <typename T, typename Acc, typename Cell, int K>
__global__ void __launch_bounds__(kBackwardWarps* kWarp) backward_kernel(const BackwardArgs<T, Cell> args) {
  extern __shared__ __align__(16) unsigned char shared[];
  Acc* dots = reinterpret_cast<Acc*>(shared);  // one for each depth bin
  __shared__ Acc partial[kBackwardWarps][K * kWarp];
  const Sizes& s = args.sizes;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t pixel_row = blockIdx.x, camera = pixel_row / s.pixels;
  const T* grad_sample = args.grad_volume + camera / s.cameras * s.cells * s.channels;
  const int64_t point = camera * s.depths * s.pixels + pixel_row % s.pixels;
  const int depths = static_cast<int>(s.depths), share = (depths + kBackwardWarps - 1) / kBackwardWarps;
  const int begin = min(warp * share, depths), end = min(begin + share, depths);
  for (int d = begin + lane; d < end; d += kWarp) dots[d] = 0;  // each warp keeps to its own bins
  __syncwarp();
  for (int64_t first_channel = 0; first_channel < s.channels; first_channel += K * kWarp) {
    Acc feature[K], sum[K] = {};
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t channel = first_channel + lane + k * kWarp;
      feature[k] = channel < s.channels ? static_cast<Acc>(args.context[pixel_row * s.channels + channel]) : Acc(0);
    }
    gather_bins<T, Acc, Cell, K>(args, grad_sample, point, begin, end, first_channel, feature, sum, dots);
#pragma unroll
    for (int k = 0; k < K; ++k) partial[warp][lane + k * kWarp] = sum[k];
    __syncthreads();
    for (int i = threadIdx.x; i < K * kWarp && first_channel + i < s.channels; i += kBackwardWarps * kWarp) {
      Acc total = 0;
#pragma unroll
      for (int w = 0; w < kBackwardWarps; ++w) total += partial[w][i];
      args.grad_context[pixel_row * s.channels + first_channel + i] = static_cast<T>(total);
    }
    __syncthreads();
  }
  for (int d = begin + lane; d < end; d += kWarp) args.grad_depth[point + d * s.pixels] = static_cast<T>(dots[d]);
}

// Calls run(std::integral_constant<int, K>{}) for K * 32 channels handled at once, as few as hold `channels`.
template <typename Run>
void with_channels_per_lane(int64_t channels, const Run& run) {
  if (channels <= kWarp) {
    run(std::integral_constant<int, 1>{});
  } else if (channels <= 2 * kWarp) {
    run(std::integral_constant<int, 2>{});
  } else if (channels <= 3 * kWarp) {
    run(std::integral_constant<int, 3>{});
  } else {
    run(std::integral_constant<int, 4>{});
  }
}

at::Tensor forward(const at::Tensor& depth, const at::Tensor& context, const at::Tensor& cell_index,
                   const at::Tensor& points, const at::Tensor& starts, at::IntArrayRef grid_size) {
  const Sizes sizes = check_inputs(depth, context, cell_index, count_cells(grid_size));
  check_order(points, starts, depth, sizes);
  const c10::cuda::CUDAGuard guard(depth.device());
  at::Tensor volume =
      at::empty({sizes.batch, sizes.channels, grid_size[0], grid_size[1], grid_size[2]}, context.options());
  if (volume.numel() == 0) return volume;
  const auto depth_c = depth.contiguous(), context_c = context.contiguous();
  const auto points_c = points.contiguous(), starts_c = starts.contiguous();
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, depth.scalar_type(), "bev_pool_v2_forward", [&] {
        using Acc = at::acc_type<scalar_t, true>;
        const ForwardArgs<scalar_t> args{depth_c.const_data_ptr<scalar_t>(), context_c.const_data_ptr<scalar_t>(),
                                         points_c.const_data_ptr<int32_t>(), starts_c.const_data_ptr<int32_t>(),
                                         volume.mutable_data_ptr<scalar_t>(), sizes};
        with_channels_per_lane(sizes.channels, [&](auto per_lane) {
          constexpr int K = decltype(per_lane)::value;
          const dim3 blocks((sizes.voxels() + kTile - 1) / kTile, (sizes.channels + K * kWarp - 1) / (K * kWarp));
          forward_kernel<scalar_t, Acc, K><<<blocks, kForwardWarps * kWarp, 0, stream>>>(args);
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
  return volume;
}

at::Tensor stacked(const at::Tensor& depth, const at::Tensor& context, const at::Tensor& points,
                   const at::Tensor& starts, at::IntArrayRef grid_size, int64_t frames, at::ScalarType dtype) {
  const Sizes sizes = check_inputs(depth, context, depth, count_cells(grid_size));
  check_order(points, starts, depth, sizes);
  TORCH_CHECK(depth.scalar_type() == at::kFloat, "bev_pool_v2_stacked: depth must be float32, got ",
              depth.scalar_type());
  TORCH_CHECK(frames > 0 && sizes.batch % frames == 0, "bev_pool_v2_stacked: ", sizes.batch, " samples are not ", frames,
              " frames of the same number");
  const c10::cuda::CUDAGuard guard(depth.device());
  at::Tensor volume = at::empty({sizes.batch / frames, grid_size[0], grid_size[1], grid_size[2],
                                 frames * sizes.channels}, context.options().dtype(dtype));
  if (volume.numel() == 0) return volume;
  const auto depth_c = depth.contiguous(), context_c = context.contiguous();
  const auto points_c = points.contiguous(), starts_c = starts.contiguous();
  const ForwardArgs<float> args{depth_c.const_data_ptr<float>(), context_c.const_data_ptr<float>(),
                                points_c.const_data_ptr<int32_t>(), starts_c.const_data_ptr<int32_t>(), nullptr, sizes};
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto launch = [&](auto* out) {
    using Out = std::remove_pointer_t<decltype(out)>;
    with_channels_per_lane(sizes.channels, [&](auto per_lane) {
      constexpr int K = decltype(per_lane)::value;
      const dim3 blocks((sizes.voxels() + kTile - 1) / kTile, (sizes.channels + K * kWarp - 1) / (K * kWarp));
      stacked_kernel<float, Out, float, K><<<blocks, kForwardWarps * kWarp, 0, stream>>>(args, out, frames);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  };
  AT_DISPATCH_SWITCH(dtype, "bev_pool_v2_stacked",
                     AT_DISPATCH_CASE(at::kFloat, [&] { launch(volume.mutable_data_ptr<scalar_t>()); })
                     AT_DISPATCH_CASE(at::kHalf, [&] { launch(volume.mutable_data_ptr<scalar_t>()); })
                     AT_DISPATCH_CASE(at::kBFloat16, [&] { launch(volume.mutable_data_ptr<scalar_t>()); }));
  return volume;
}

template <typename T>
at::Tensor channels_last(const at::Tensor& volume, const Sizes& sizes) {
  at::Tensor rows = at::empty({sizes.batch, sizes.cells, sizes.channels}, volume.options());
  const int64_t channel_tiles = (sizes.channels + kTransposeTile - 1) / kTransposeTile;
  const int64_t cell_tiles = (sizes.cells + kTransposeTile - 1) / kTransposeTile;
  const int64_t blocks = sizes.batch * channel_tiles * cell_tiles;
  TORCH_CHECK(blocks < (int64_t{1} << 31), "bev_pool_v2: gradient too large to transpose: ", volume.sizes());
  transpose_kernel<T><<<static_cast<unsigned>(blocks), dim3(kTransposeTile, kTransposeRows), 0,
                        at::cuda::getCurrentCUDAStream()>>>(volume.const_data_ptr<T>(), rows.mutable_data_ptr<T>(),
                                                            sizes.channels, sizes.cells, channel_tiles, cell_tiles);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return rows;
}

template <typename T, typename Cell>
void launch_backward(const BackwardArgs<T, Cell>& args) {
  using Acc = at::acc_type<T, true>;
  const Sizes& sizes = args.sizes;
  const size_t shared_bytes = sizes.depths * sizeof(Acc);
  TORCH_CHECK(shared_bytes <= 32 * 1024, "bev_pool_v2: too many depth bins for the CUDA backward pass: ",
              sizes.depths);
  const auto blocks = static_cast<unsigned>(sizes.batch * sizes.cameras * sizes.pixels);
  with_channels_per_lane(sizes.channels, [&](auto per_lane) {
    constexpr int K = decltype(per_lane)::value;
    backward_kernel<T, Acc, Cell, K>
        <<<blocks, kBackwardWarps * kWarp, shared_bytes, at::cuda::getCurrentCUDAStream()>>>(args);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
}

std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad_volume, const at::Tensor& depth,
                                            const at::Tensor& context, const at::Tensor& cell_index) {
  const Sizes sizes = check_inputs(depth, context, cell_index, check_grad(grad_volume, context));
  const c10::cuda::CUDAGuard guard(depth.device());
  at::Tensor grad_depth = at::empty(depth.sizes(), depth.options());
  at::Tensor grad_context = at::empty(context.sizes(), context.options());
  if (depth.numel() == 0 || context.numel() == 0) return {grad_depth.zero_(), grad_context.zero_()};
  const auto depth_c = depth.contiguous(), context_c = context.contiguous(), cells_c = cell_index.contiguous();
  const auto grad_c = grad_volume.contiguous();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, depth.scalar_type(), "bev_pool_v2_backward", [&] {
        AT_DISPATCH_INDEX_TYPES(cell_index.scalar_type(), "bev_pool_v2_backward", [&] {
          const auto rows = channels_last<scalar_t>(grad_c, sizes);
          launch_backward(BackwardArgs<scalar_t, index_t>{
              rows.template const_data_ptr<scalar_t>(), depth_c.const_data_ptr<scalar_t>(),
              context_c.const_data_ptr<scalar_t>(), cells_c.const_data_ptr<index_t>(),
              grad_depth.mutable_data_ptr<scalar_t>(), grad_context.mutable_data_ptr<scalar_t>(), sizes});
        });
      });
  return {grad_depth, grad_context};
}

}  // namespace
}  // namespace mmdet3d::bev_pool_v2

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) {
  m.impl("bev_pool_v2_forward", &mmdet3d::bev_pool_v2::forward);
  m.impl("bev_pool_v2_stacked", &mmdet3d::bev_pool_v2::stacked);
  m.impl("bev_pool_v2_backward", &mmdet3d::bev_pool_v2::backward);
}
