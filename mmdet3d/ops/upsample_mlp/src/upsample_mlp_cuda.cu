// CUDA version of upsample_mlp; upsample_mlp_mma.cu has a faster forward pass for float16 and bfloat16.
//
// Between 2 x 2 x 2 neighbouring coarse voxels lie 2 x 2 x 2 fine ones, which are interpolated from these eight alone:
// a "cell". Cell c of an axis with n coarse voxels (0 <= c <= n) lies between the coarse voxels c - 1 and c, held at the
// borders, and holds the fine voxels 2c - 1 and 2c as far as they exist. A warp takes the lower or the upper half of a
// cell, its lanes the hidden channels; the K sums of the four voxels are reduced over the lanes together.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "trilinear_x2.cuh"
#include "upsample_mlp.h"

namespace mmdet3d::upsample_mlp {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kWarps = 4;       // of a forward block
constexpr int kThreads = 256;   // of the other kernels
using trilinear_x2::kFar;
using trilinear_x2::kNear;
using trilinear_x2::Taps;

// The two coarse voxels and the two fine voxels of a cell along one axis.
struct Span {
  int low, high;  // coarse, held at the borders
  int first_fine, end_fine;
  __device__ Span(int cell, int count)
      : low(max(cell - 1, 0)), high(min(cell, count - 1)), first_fine(2 * cell - 1), end_fine(2 * count) {}
  // Fine voxel 0 or 1 of the cell, -1 where there is none.
  __device__ int fine(int which) const {
    const int at = first_fine + which;
    return at < end_fine ? at : -1;
  }
};

__host__ __device__ int64_t count_cells(const Sizes& size) {
  return int64_t(size.batch) * (size.z + 1) * (size.y + 1) * (size.x + 1);
}

struct Cell {
  int batch;
  Span z, y, x;
  __device__ static Cell at(int64_t index, const Sizes& size) {
    const int cx = index % (size.x + 1);
    index /= size.x + 1;
    const int cy = index % (size.y + 1);
    index /= size.y + 1;
    return {static_cast<int>(index / (size.z + 1)), Span(index % (size.z + 1), size.z), Span(cy, size.y),
            Span(cx, size.x)};
  }
};

// Eight coarse values, index 4 z + 2 y + x, to the four fine values of a half of the cell, index 2 y + x.
__device__ __forceinline__ void interpolate(const float (&coarse)[8], bool upper, float (&fine)[4]) {
  float v[8];
#pragma unroll
  for (int i = 0; i < 8; i += 2) {
    v[i] = kNear * coarse[i] + kFar * coarse[i + 1];
    v[i + 1] = kFar * coarse[i] + kNear * coarse[i + 1];
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (i & 2) continue;
    const float a = v[i], b = v[i + 2];
    v[i] = kNear * a + kFar * b;
    v[i + 2] = kFar * a + kNear * b;
  }
  const float low = upper ? kFar : kNear, high = upper ? kNear : kFar;
#pragma unroll
  for (int i = 0; i < 4; ++i) fine[i] = low * v[i] + high * v[i + 4];
}

// ln(1 + e^x) = max(x, 0) + ln(1 + e^-|x|) with the fast exponential and logarithm: absolute errors of some 1e-7.
__device__ __forceinline__ float softplus(float x) { return fmaxf(x, 0.f) + __logf(1.f + __expf(-fabsf(x))); }

// One halving of sum_over_lanes: lanes whose bit HALF is set keep the upper half of the values.
template <int HALF>
__device__ __forceinline__ void fold(float (&v)[kWarp]) {
  const bool upper = threadIdx.x & HALF;
#pragma unroll
  for (int i = 0; i < HALF; ++i) {
    const float give = upper ? v[i] : v[i + HALF];
    const float keep = upper ? v[i + HALF] : v[i];
    v[i] = keep + __shfl_xor_sync(kFullMask, give, HALF);
  }
  if constexpr (HALF > 1) fold<HALF / 2>(v);
}

// Sums of 32 values over the lanes of a warp; lane i gets the sum of value i.
__device__ __forceinline__ float sum_over_lanes(float (&v)[kWarp]) {
  fold<kWarp / 2>(v);
  return v[0];
}

// Offset of fine voxel v (index 2 y + x) of a half of a cell in (B, 2X, 2Y, 2Z), or -1.
__device__ __forceinline__ int64_t fine_offset(const Cell& cell, bool upper, int v, const Sizes& size) {
  const int z = cell.z.fine(upper), y = cell.y.fine(v >> 1), x = cell.x.fine(v & 1);
  if (z < 0 || y < 0 || x < 0) return -1;
  return ((int64_t(cell.batch) * 2 * size.x + x) * 2 * size.y + y) * 2 * size.z + z;
}

// Residual (B, X, Y, Z, K) at fine voxel v of a half of a cell.
__device__ float residual_at(const float* residual, const Cell& cell, bool upper, int v, int k, const Sizes& size) {
  float coarse[8], fine[4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int z = i & 4 ? cell.z.high : cell.z.low, y = i & 2 ? cell.y.high : cell.y.low;
    const int x = i & 1 ? cell.x.high : cell.x.low;
    coarse[i] = residual[(((int64_t(cell.batch) * size.x + x) * size.y + y) * size.z + z) * size.outputs + k];
  }
  interpolate(coarse, upper, fine);
  const float pair[2] = {v & 2 ? fine[2] : fine[0], v & 2 ? fine[3] : fine[1]};
  return v & 1 ? pair[1] : pair[0];
}

// Outputs first <= k < first + KB of every fine voxel. `weight` in shared memory is (KB, H), zero past K.
template <typename T, int KB>
__global__ void __launch_bounds__(kWarps* kWarp, 4) forward_kernel(const Args<T> args, int first) {
  extern __shared__ float weight[];
  const Sizes& size = args.size;
  for (int i = threadIdx.x; i < KB * size.hidden; i += blockDim.x) {
    const int k = first + i / size.hidden;
    weight[i] = k < size.outputs ? args.weight[int64_t(k) * size.hidden + i % size.hidden] : 0.f;
  }
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  const int64_t warps = int64_t(gridDim.x) * kWarps;
  for (int64_t half = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp; half < 2 * count_cells(size); half += warps) {
    const bool upper = half & 1;
    const Cell cell = Cell::at(half >> 1, size);
    if (cell.z.fine(upper) < 0) continue;
    const T* row[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int z = i & 4 ? cell.z.high : cell.z.low, y = i & 2 ? cell.y.high : cell.y.low;
      const int x = i & 1 ? cell.x.high : cell.x.low;
      row[i] = args.hidden + (((int64_t(cell.batch) * size.z + z) * size.y + y) * size.x + x) * size.hidden;
    }
    float sum[4][KB] = {};
    for (int channel = lane; channel < size.hidden; channel += kWarp) {
      float coarse[8], value[4];
#pragma unroll
      for (int i = 0; i < 8; ++i) coarse[i] = static_cast<float>(row[i][channel]);
      interpolate(coarse, upper, value);
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        if (args.fine != nullptr) {
          const int64_t offset = fine_offset(cell, upper, v, size);
          if (offset >= 0) value[v] += static_cast<float>(args.fine[offset * size.hidden + channel]);
        }
        value[v] = softplus(value[v]);
      }
#pragma unroll
      for (int k = 0; k < KB; ++k) {
        const float w = weight[k * size.hidden + channel];
#pragma unroll
        for (int v = 0; v < 4; ++v) sum[v][k] += value[v] * w;
      }
    }
#pragma unroll
    for (int group = 0; group < 4 * KB; group += kWarp) {
      float part[kWarp];
#pragma unroll
      for (int i = 0; i < kWarp; ++i) part[i] = group + i < 4 * KB ? sum[(group + i) / KB][(group + i) % KB] : 0.f;
      float total = sum_over_lanes(part);
      const int v = (group + lane) / KB, k = first + (group + lane) % KB;
      if (group + lane >= 4 * KB || k >= size.outputs) continue;
      const int64_t offset = fine_offset(cell, upper, v, size);
      if (offset < 0) continue;
      total += args.bias[k];
      if (args.residual != nullptr) {
        total += args.residual_weight * residual_at(args.residual, cell, upper, v, k, size);
      }
      args.out[offset * size.outputs + k] = total;
    }
  }
}

template <typename T, int KB>
void launch_forward(const Args<T>& args, int first) {
  const int shared = KB * args.size.hidden * sizeof(float);
  const auto* properties = at::cuda::getCurrentDeviceProperties();
  TORCH_CHECK(shared <= static_cast<int>(properties->sharedMemPerBlock), "upsample_mlp: too many hidden channels: ",
              args.size.hidden);
  const int64_t wanted = (2 * count_cells(args.size) + kWarps - 1) / kWarps;
  const int blocks = std::min<int64_t>(wanted, int64_t(properties->multiProcessorCount) * 16);
  forward_kernel<T, KB><<<blocks, kWarps * kWarp, shared, at::cuda::getCurrentCUDAStream()>>>(args, first);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

at::Tensor forward(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& bias,
                   const std::optional<at::Tensor>& fine, const std::optional<at::Tensor>& residual,
                   double residual_weight) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const Sizes size{static_cast<int>(hidden.size(0)), static_cast<int>(hidden.size(1)), static_cast<int>(hidden.size(2)),
                   static_cast<int>(hidden.size(3)), static_cast<int>(hidden.size(4)), static_cast<int>(weight.size(0))};
  at::Tensor out = at::empty({size.batch, 2 * size.x, 2 * size.y, 2 * size.z, size.outputs},
                             hidden.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "upsample_mlp_forward", [&] {
    if constexpr (std::is_same_v<scalar_t, double>) {
      TORCH_CHECK(false, "upsample_mlp_forward: float64 has no CUDA kernel");
    } else {
      const Args<scalar_t> args{hidden.const_data_ptr<scalar_t>(),
                                fine ? fine->const_data_ptr<scalar_t>() : nullptr,
                                weight.const_data_ptr<float>(),
                                bias.const_data_ptr<float>(),
                                residual ? residual->const_data_ptr<float>() : nullptr,
                                static_cast<float>(residual_weight),
                                out.mutable_data_ptr<float>(),
                                size};
      if constexpr (sizeof(scalar_t) == 2) {
        if (forward_by_tensor_cores(args)) return;
      }
      if (size.outputs <= 2) {
        launch_forward<scalar_t, 2>(args, 0);
      } else {
        for (int first = 0; first < size.outputs; first += 18) launch_forward<scalar_t, 18>(args, first);
      }
    }
  });
  return out;
}

// A warp takes a fine voxel, its lanes the channels.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const T* hidden, float* out, Sizes size, int first, int rows, uint32_t voxels) {
  const uint32_t voxel = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (voxel >= voxels) return;
  uint32_t rest = voxel;
  const Taps z(rest % (2 * size.z), size.z);
  rest /= 2 * size.z;
  const Taps y(rest % (2 * size.y), size.y);
  rest /= 2 * size.y;
  const Taps x(first + static_cast<int>(rest % rows), size.x);
  const T* volume = hidden + int64_t(rest / rows) * size.z * size.y * size.x * size.hidden;
  float* target = out + int64_t(voxel) * size.hidden;
  for (int channel = threadIdx.x % kWarp; channel < size.hidden; channel += kWarp) {
    auto at = [&](int iz, int iy, int ix) {
      return static_cast<float>(volume[int64_t((iz * size.y + iy) * size.x + ix) * size.hidden + channel]);
    };
    auto along_x = [&](int iz, int iy) {
      return x.low_weight * at(iz, iy, x.low) + (1 - x.low_weight) * at(iz, iy, x.high);
    };
    auto along_y = [&](int iz) {
      return y.low_weight * along_x(iz, y.low) + (1 - y.low_weight) * along_x(iz, y.high);
    };
    target[channel] = z.low_weight * along_y(z.low) + (1 - z.low_weight) * along_y(z.high);
  }
}

// Weight of coarse voxel `coarse` in fine voxel `fine`: 0 where it has none.
__device__ __forceinline__ float weight_in(int coarse, int fine, int count) {
  if (fine < 0 || fine >= 2 * count) return 0.f;
  const Taps taps(fine, count);
  return (taps.low == coarse ? taps.low_weight : 0.f) + (taps.high == coarse ? 1 - taps.low_weight : 0.f);
}

// A warp takes a coarse voxel and gathers from the fine ones around it, in a fixed order.
__global__ void __launch_bounds__(kThreads)
    rows_backward_kernel(const float* grad, float* grad_hidden, Sizes size, int first, int rows, int x_low, int x_count) {
  uint32_t rest = (blockIdx.x * kThreads + threadIdx.x) / kWarp;
  if (rest >= static_cast<uint32_t>(size.batch * size.z * size.y * x_count)) return;
  const int x = x_low + static_cast<int>(rest % x_count);
  rest /= x_count;
  const int y = rest % size.y;
  rest /= size.y;
  const int z = rest % size.z;
  const int batch = rest / size.z;
  const int64_t voxel = ((int64_t(batch) * size.z + z) * size.y + y) * size.x + x;
  for (int channel = threadIdx.x % kWarp; channel < size.hidden; channel += kWarp) {
    float sum = 0;
    for (int fx = max(2 * x - 1, first); fx <= min(2 * x + 2, first + rows - 1); ++fx) {
      const float wx = weight_in(x, fx, size.x);
      for (int fy = 2 * y - 1; fy <= 2 * y + 2; ++fy) {
        const float wy = wx * weight_in(y, fy, size.y);
        if (wy == 0.f) continue;
        const int64_t line = ((int64_t(batch) * rows + fx - first) * 2 * size.y + fy) * 2 * size.z;
        for (int fz = 2 * z - 1; fz <= 2 * z + 2; ++fz) {
          const float w = wy * weight_in(z, fz, size.z);
          if (w != 0.f) sum += w * grad[(line + fz) * size.hidden + channel];
        }
      }
    }
    grad_hidden[voxel * size.hidden + channel] += sum;
  }
}

Sizes rows_sizes(const at::Tensor& hidden) {
  return {static_cast<int>(hidden.size(0)), static_cast<int>(hidden.size(1)), static_cast<int>(hidden.size(2)),
          static_cast<int>(hidden.size(3)), static_cast<int>(hidden.size(4)), 0};
}

// Blocks for a warp per voxel; counts of voxels are kept in 32 bits.
unsigned blocks_for(int64_t voxels) {
  TORCH_CHECK(voxels < (int64_t(1) << 26), "upsample_mlp: more voxels in a slab than supported");
  return static_cast<unsigned>((voxels * kWarp + kThreads - 1) / kThreads);
}

at::Tensor rows(const at::Tensor& hidden, int64_t first, int64_t last) {
  const c10::cuda::CUDAGuard guard(hidden.device());
  const Sizes size = rows_sizes(hidden);
  TORCH_CHECK(0 <= first && first <= last && last <= 2 * size.x, "upsample_rows: rows out of range");
  at::Tensor out = at::empty({size.batch, last - first, 2 * size.y, 2 * size.z, size.hidden},
                             hidden.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, hidden.scalar_type(), "upsample_rows", [&] {
    const int64_t voxels = out.numel() / size.hidden;
    rows_kernel<scalar_t><<<blocks_for(voxels), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
        hidden.const_data_ptr<scalar_t>(), out.mutable_data_ptr<float>(), size, first, last - first, voxels);
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return out;
}

void rows_backward(const at::Tensor& grad, const at::Tensor& grad_hidden, int64_t first) {
  const c10::cuda::CUDAGuard guard(grad.device());
  const Sizes size = rows_sizes(grad_hidden);
  const int count = static_cast<int>(grad.size(1));
  TORCH_CHECK(grad.is_contiguous() && grad_hidden.is_contiguous() && grad.scalar_type() == at::kFloat &&
                  grad_hidden.scalar_type() == at::kFloat,
              "upsample_rows_backward: expected contiguous float32 tensors");
  if (grad.numel() == 0) return;
  // Coarse voxels that fine rows first .. first + count - 1 (even bounds) are interpolated from.
  const int x_low = std::max(static_cast<int>(first) / 2 - 1, 0);
  const int x_count = std::min((static_cast<int>(first) + count) / 2, size.x - 1) - x_low + 1;
  const int64_t voxels = int64_t(size.batch) * size.z * size.y * x_count;
  rows_backward_kernel<<<blocks_for(voxels), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
      grad.const_data_ptr<float>(), grad_hidden.mutable_data_ptr<float>(), size, first, count, x_low, x_count);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace
}  // namespace mmdet3d::upsample_mlp

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) {
  m.impl("upsample_mlp_forward", &mmdet3d::upsample_mlp::forward);
  m.impl("upsample_rows", &mmdet3d::upsample_mlp::rows);
  m.impl("upsample_rows_backward", &mmdet3d::upsample_mlp::rows_backward);
}
