// CUDA version of ms_deform_attn. Forward: one thread for a few channels of one head of one query. Backward: one thread
// for one sampled location, which owns the gradients of that location and weight and adds to those of value.
#include <ATen/ATen.h>
#include <ATen/AccumulateType.h>
#include <ATen/Context.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "fixed_point.cuh"
#include "float_sums.cuh"
#include "ms_deform_attn.h"

namespace mmdet3d::ms_deform_attn {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxLevels = 16;  // _MAX_CUDA_LEVELS in ms_deform_attn.py
constexpr int kVector = 4;      // channels read at once where their number and address allow it

struct LevelTable {
  int height[kMaxLevels], width[kMaxLevels];
  int64_t start[kMaxLevels];
};

// As much as one load instruction takes (16 bytes), or the whole vector where that is less.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vector {
  T at[N];
};

template <typename T, int N>
__device__ __forceinline__ Vector<T, N> load(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

// The four pixels around a location, in the order (top left, top right, bottom left, bottom right).
template <typename Acc>
struct Taps {
  bool on_map[4];
  int64_t row[4];  // of value, counted from the first pixel of the sample
  Acc right, bottom;  // weights of the right and bottom pixels

  __device__ __forceinline__ Acc weight(int tap) const {
    return (tap & 1 ? right : 1 - right) * (tap & 2 ? bottom : 1 - bottom);
  }
  __device__ __forceinline__ Acc weight_by_x(int tap) const {
    const Acc vertical = tap & 2 ? bottom : 1 - bottom;
    return tap & 1 ? vertical : -vertical;
  }
  __device__ __forceinline__ Acc weight_by_y(int tap) const {
    const Acc horizontal = tap & 1 ? right : 1 - right;
    return tap & 2 ? horizontal : -horizontal;
  }
};

// False when all four taps are off the map. NaN fails the comparison and infinities are off the map, so the conversion
// to integers is always defined. The upper bounds are tested on integers too: a float cannot tell neighbouring sizes
// beyond 2^24 apart.
template <typename Acc>
__device__ __forceinline__ bool find_taps(const LevelTable& levels, int level, Acc location_x, Acc location_y,
                                          Taps<Acc>& taps) {
  const int height = levels.height[level], width = levels.width[level];
  const Acc x = location_x * width - Acc(0.5), y = location_y * height - Acc(0.5);
  if (!(x > -1 && y > -1 && x < width && y < height)) return false;
  const Acc left = floor(x), top = floor(y);
  const int column = static_cast<int>(left), row = static_cast<int>(top);
  taps.right = x - left;
  taps.bottom = y - top;
  const bool has_left = column >= 0 && column < width, has_right = column + 1 < width;
  const bool has_top = row >= 0 && row < height, has_bottom = row + 1 < height;
  const int64_t first = levels.start[level] + static_cast<int64_t>(row) * width + column;
  taps.on_map[0] = has_top && has_left;
  taps.on_map[1] = has_top && has_right;
  taps.on_map[2] = has_bottom && has_left;
  taps.on_map[3] = has_bottom && has_right;
  taps.row[0] = first;
  taps.row[1] = first + 1;
  taps.row[2] = first + width;
  taps.row[3] = first + width + 1;
  return true;
}

template <typename T>
struct Inputs {
  const T* value;
  const T* locations;
  const T* weights;
  LevelTable levels;
  Sizes sizes;
};

// `Index` counts threads: 32 bits where they suffice, because 64-bit divisions are slow. N channels per thread.
template <typename T, typename Acc, typename Index, int N>
__global__ void __launch_bounds__(kThreads) forward_kernel(const Inputs<T> in, T* __restrict__ out, Index threads) {
  constexpr int kLocation = N > 1 ? 2 : 1;  // x and y at once where addresses are known to be aligned
  const Index heads = in.sizes.heads, queries = in.sizes.queries, vectors = in.sizes.channels / N;
  const int64_t stride = in.sizes.heads * in.sizes.channels;
  for (Index i = blockIdx.x * static_cast<Index>(kThreads) + threadIdx.x; i < threads;
       i += static_cast<Index>(gridDim.x) * kThreads) {
    const Index channel = i % vectors * N, row = i / vectors;  // row of (B, Q, M)
    const Index head = row % heads, sample = row / (heads * queries);
    const T* value = in.value + sample * in.sizes.pixels * stride + head * in.sizes.channels + channel;
    const T* location = in.locations + row * in.sizes.levels * in.sizes.points * 2;
    const T* weight = in.weights + row * in.sizes.levels * in.sizes.points;
    Acc sum[N] = {};
    for (int level = 0; level < in.sizes.levels; ++level) {
      for (int point = 0; point < in.sizes.points; ++point, location += 2, ++weight) {
        const auto first = load<T, kLocation>(location);
        const Acc x = first.at[0], y = kLocation == 2 ? first.at[kLocation - 1] : location[1];
        Taps<Acc> taps;
        if (!find_taps<Acc>(in.levels, level, x, y, taps)) continue;
        const Acc point_weight = *weight;
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) {
          if (!taps.on_map[tap]) continue;
          const auto pixel = load<T, N>(value + taps.row[tap] * stride);
          const Acc tap_weight = point_weight * taps.weight(tap);
#pragma unroll
          for (int c = 0; c < N; ++c) sum[c] += tap_weight * static_cast<Acc>(pixel.at[c]);
        }
      }
    }
    Vector<T, N> result;
#pragma unroll
    for (int c = 0; c < N; ++c) result.at[c] = static_cast<T>(sum[c]);
    *reinterpret_cast<Vector<T, N>*>(out + static_cast<int64_t>(i) * N) = result;
  }
}

template <typename T, typename Acc, typename Index, int N, typename Sums>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const Inputs<T> in, const T* __restrict__ grad_out, const Sums grad_value,
                    T* __restrict__ grad_locations, T* __restrict__ grad_weights, Index threads) {
  const Index heads = in.sizes.heads, queries = in.sizes.queries, points = in.sizes.points;
  const Index samples_per_row = in.sizes.levels * in.sizes.points;
  const int64_t channels = in.sizes.channels, stride = in.sizes.heads * channels;
  for (Index i = blockIdx.x * static_cast<Index>(kThreads) + threadIdx.x; i < threads;
       i += static_cast<Index>(gridDim.x) * kThreads) {
    const Index row = i / samples_per_row;  // row of (B, Q, M)
    const int level = i % samples_per_row / points;
    const int64_t map = row / (heads * queries) * in.sizes.pixels * stride + row % heads * channels;
    const int64_t location = 2 * static_cast<int64_t>(i);
    const Acc point_weight = in.weights[i];
    Acc grad_x = 0, grad_y = 0, grad_weight = 0;
    Taps<Acc> taps;
    if (find_taps<Acc>(in.levels, level, in.locations[location], in.locations[location + 1], taps)) {
      Acc dot[4] = {};
      for (int64_t channel = 0; channel < channels; channel += N) {
        const auto grad = load<T, N>(grad_out + row * channels + channel);
#pragma unroll
        for (int tap = 0; tap < 4; ++tap) {
          if (!taps.on_map[tap]) continue;
          const int64_t offset = map + taps.row[tap] * stride + channel;
          const auto pixel = load<T, N>(in.value + offset);
          const Acc tap_weight = point_weight * taps.weight(tap);
          Acc terms[N];
#pragma unroll
          for (int c = 0; c < N; ++c) {
            dot[tap] += static_cast<Acc>(grad.at[c]) * static_cast<Acc>(pixel.at[c]);
            terms[c] = tap_weight * static_cast<Acc>(grad.at[c]);
          }
          grad_value.add(offset, terms);
        }
      }
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        grad_weight += dot[tap] * taps.weight(tap);
        grad_x += dot[tap] * taps.weight_by_x(tap);
        grad_y += dot[tap] * taps.weight_by_y(tap);
      }
    }
    grad_weights[i] = static_cast<T>(grad_weight);
    grad_locations[location] = static_cast<T>(grad_x * point_weight * in.levels.width[level]);
    grad_locations[location + 1] = static_cast<T>(grad_y * point_weight * in.levels.height[level]);
  }
}

LevelTable level_table(at::IntArrayRef spatial_shapes) {
  const auto levels = read_levels(spatial_shapes);
  TORCH_CHECK(levels.size() <= kMaxLevels, "ms_deform_attn: at most ", kMaxLevels, " levels on CUDA, got ",
              levels.size());
  LevelTable table{};
  for (size_t i = 0; i < levels.size(); ++i) {
    TORCH_CHECK(std::max(levels[i].height, levels[i].width) < std::numeric_limits<int>::max(),
                "ms_deform_attn: a level is larger than int32 can count: ", spatial_shapes);
    table.height[i] = static_cast<int>(levels[i].height);
    table.width[i] = static_cast<int>(levels[i].width);
    table.start[i] = levels[i].start;
  }
  return table;
}

// Whether vectors of kVector elements may be read from the tensor: its first element may lie anywhere in its storage.
bool aligned(const at::Tensor& tensor) {
  const size_t bytes = std::min<size_t>(16, kVector * tensor.element_size());
  return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % bytes == 0;
}

// Calls run(Index{}, std::integral_constant<int, N>{}, blocks) for `count` elements, N of which one thread handles.
template <typename Run>
void launch(int64_t count, bool vectors, const Run& run) {
  // The grid strides, so that a count beyond the largest grid is served too.
  const auto blocks = [](int64_t threads) {
    return static_cast<unsigned>(std::min<int64_t>((threads + kThreads - 1) / kThreads, 1 << 30));
  };
  // Half of what 32 bits count, so that the last stride cannot overflow.
  const bool small = count < (int64_t{1} << 30);
  if (small && vectors) {
    run(uint32_t{}, std::integral_constant<int, kVector>{}, blocks);
  } else if (small) {
    run(uint32_t{}, std::integral_constant<int, 1>{}, blocks);
  } else if (vectors) {
    run(int64_t{}, std::integral_constant<int, kVector>{}, blocks);
  } else {
    run(int64_t{}, std::integral_constant<int, 1>{}, blocks);
  }
}

template <typename T>
Inputs<T> make_inputs(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                      const at::Tensor& weights, const Sizes& sizes) {
  return {value.const_data_ptr<T>(), locations.const_data_ptr<T>(), weights.const_data_ptr<T>(),
          level_table(spatial_shapes), sizes};
}

at::Tensor forward(const at::Tensor& value, at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                   const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, locations, weights);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor out = at::empty({sizes.batch, sizes.queries, sizes.heads * sizes.channels}, value.options());
  if (out.numel() == 0) return out;
  const auto value_c = value.contiguous(), locations_c = locations.contiguous(), weights_c = weights.contiguous();
  const bool vectors = sizes.channels % kVector == 0 && aligned(value_c) && aligned(locations_c);
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_forward", [&] {
        using Acc = at::acc_type<scalar_t, true>;
        const auto inputs = make_inputs<scalar_t>(value_c, spatial_shapes, locations_c, weights_c, sizes);
        launch(out.numel(), vectors, [&](auto index, auto channels, const auto& blocks) {
          constexpr int N = decltype(channels)::value;
          const int64_t threads = out.numel() / N;
          forward_kernel<scalar_t, Acc, decltype(index), N><<<blocks(threads), kThreads, 0, stream>>>(
              inputs, out.mutable_data_ptr<scalar_t>(), static_cast<decltype(index)>(threads));
          C10_CUDA_KERNEL_LAUNCH_CHECK();
        });
      });
  return out;
}

// Everything of the backward pass but where the gradient of value is summed.
template <typename T>
struct BackwardPass {
  Inputs<T> inputs;
  const T* grad_out;
  T* grad_locations;
  T* grad_weights;
  int64_t threads, largest_count;
  bool vectors;

  template <typename Sums>
  void run(const Sums& grad_value) const {
    using Acc = at::acc_type<T, true>;
    launch(largest_count, vectors, [&](auto index, auto channels, const auto& blocks) {
      constexpr int N = decltype(channels)::value;
      backward_kernel<T, Acc, decltype(index), N, Sums>
          <<<blocks(threads), kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
              inputs, grad_out, grad_value, grad_locations, grad_weights, static_cast<decltype(index)>(threads));
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  }
};

std::tuple<at::Tensor, at::Tensor, at::Tensor> backward(const at::Tensor& grad_out, const at::Tensor& value,
                                                        at::IntArrayRef spatial_shapes, const at::Tensor& locations,
                                                        const at::Tensor& weights) {
  const Sizes sizes = check_inputs(value, spatial_shapes, locations, weights);
  check_grad(grad_out, value, sizes);
  const c10::cuda::CUDAGuard guard(value.device());
  at::Tensor grad_value, grad_locations = at::empty(locations.sizes(), locations.options());
  at::Tensor grad_weights = at::empty(weights.sizes(), weights.options());
  if (weights.numel() == 0) return {at::zeros(value.sizes(), value.options()), grad_locations, grad_weights};
  const auto value_c = value.contiguous(), locations_c = locations.contiguous(), weights_c = weights.contiguous();
  const auto grad_out_c = grad_out.contiguous();
  const bool vectors = sizes.channels % kVector == 0 && aligned(value_c) && aligned(grad_out_c);
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, value.scalar_type(), "ms_deform_attn_backward", [&] {
        using Acc = at::acc_type<scalar_t, true>;
        const BackwardPass<scalar_t> pass{
            make_inputs<scalar_t>(value_c, spatial_shapes, locations_c, weights_c, sizes),
            grad_out_c.const_data_ptr<scalar_t>(), grad_locations.mutable_data_ptr<scalar_t>(),
            grad_weights.mutable_data_ptr<scalar_t>(), weights.numel(), std::max(weights.numel(), grad_out.numel()),
            vectors};
        if (at::globalContext().deterministicAlgorithms()) {
          // A location adds at most once to an element, a product of a gradient, a weight and a share of at most 1.
          const auto bound = fixed_point::largest_magnitude(grad_out_c) * fixed_point::largest_magnitude(weights_c);
          fixed_point::Accumulator sums(value.sizes(), bound, sizes.queries * sizes.levels * sizes.points);
          pass.run(sums.sums());
          grad_value = sums.result(value.scalar_type());
        } else {
          // Sums of many terms: half precision adds them in float32.
          grad_value = at::zeros(value.sizes(), value.options().dtype(c10::CppTypeToScalarType<Acc>::value));
          pass.run(FloatSums<Acc>{grad_value.mutable_data_ptr<Acc>()});
          grad_value = grad_value.to(value.scalar_type());
        }
      });
  return {grad_value, grad_locations, grad_weights};
}

}  // namespace
}  // namespace mmdet3d::ms_deform_attn

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) {
  m.impl("ms_deform_attn_forward", &mmdet3d::ms_deform_attn::forward);
  m.impl("ms_deform_attn_backward", &mmdet3d::ms_deform_attn::backward);
}
