// CUDA version of plane_sweep.
//
// One warp sweeps the depths of one pixel; its lanes share the channels. The features of the pixel stay in registers,
// and so do the four pixels of the reference map for as long as the next depth falls between the same four, which
// most depths of a real rig do: beyond some metres one step in depth moves the position by less than a pixel.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "plane_sweep.h"
#include "plane_sweep_half.cuh"
#include "plane_sweep_lanes.cuh"

namespace mmdet3d::plane_sweep {
namespace {

// Blocks for which a multiprocessor must have registers.
template <typename scalar_t>
constexpr int kBlocks = sizeof(scalar_t) == 8 ? 1 : sizeof(scalar_t) == 4 ? 3 : 4;

// Channels that one lane holds at a time, in the precision of the sums: 8, whatever the dtype. A warp holds 256.
template <typename scalar_t>
struct Held {
  using acc_t = at::opmath_type<scalar_t>;
  static constexpr int packs = 8 / Pack<scalar_t>::size;
  acc_t value[8];

  // `from` points at the first of `channels` channels; what lies beyond them, or is not `present`, reads as 0.
  __device__ void load(const scalar_t* from, bool present, int64_t first, int64_t channels, int lane) {
#pragma unroll
    for (int p = 0; p < packs; ++p) {
      const int64_t c = first + (p * kWarp + lane) * Pack<scalar_t>::size;
      const auto pack = present && c < channels ? *reinterpret_cast<const Pack<scalar_t>*>(from + c) : Pack<scalar_t>{};
#pragma unroll
      for (int i = 0; i < Pack<scalar_t>::size; ++i) {
        value[p * Pack<scalar_t>::size + i] = static_cast<acc_t>(pack.value[i]);
      }
    }
  }

  __device__ acc_t operator[](int i) const { return value[i]; }
};

// Sums over the warp of eight values per lane: lane i returns the sum of value i % 8. Halving the values with the
// lanes takes 9 exchanges, where eight separate sums would take 40.
template <typename acc_t>
__device__ acc_t sum_group(acc_t (&value)[kGroup], int lane) {
#pragma unroll
  for (int half = kGroup / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const acc_t give = upper ? value[i] : value[i + half];
      const acc_t keep = upper ? value[i + half] : value[i];
      value[i] = keep + __shfl_xor_sync(kAllLanes, give, half);
    }
  }
#pragma unroll
  for (int step = kGroup; step < kWarp; step *= 2) value[0] += __shfl_xor_sync(kAllLanes, value[0], step);
  return value[0];
}

// This lane's share of the cost at the depth of lane `from`. `taps` holds the four pixels around `held_index`, and is
// renewed when the position lies between others.
template <typename scalar_t, typename acc_t>
__device__ acc_t lane_cost(const Maps<scalar_t>& maps, const scalar_t* map, const Held<scalar_t>& features,
                           acc_t outside, const LanePosition<acc_t>& own, int from, int64_t first, int lane,
                           Held<scalar_t> (&taps)[4], int& held_index) {
  const int index = __shfl_sync(kAllLanes, own.index, from);  // the same for all lanes, so that branches are too
  if (index < 0) return outside;
  const acc_t right = __shfl_sync(kAllLanes, own.right, from), lower = __shfl_sync(kAllLanes, own.lower, from);
  if (index != held_index) {
    const int upper_left = __shfl_sync(kAllLanes, own.upper_left, from);
    const int present = __shfl_sync(kAllLanes, own.present, from);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      taps[i].load(corner_pixel(maps, map, upper_left, i), present >> i & 1, first, maps.channels, lane);
    }
    held_index = index;
  }
  const acc_t left = 1 - right, top = 1 - lower;
  const acc_t weight[4] = {left * top, right * top, left * lower, right * lower};
  acc_t sum = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    acc_t rest = features[i];
#pragma unroll
    for (int tap = 0; tap < 4; ++tap) rest -= weight[tap] * taps[tap][i];
    sum += ::fabs(rest);
  }
  return sum;
}

// Cost of one pixel at depth `first_depth + lane`, computed by the whole warp.
template <typename scalar_t, typename acc_t = at::opmath_type<scalar_t>>
__device__ acc_t warp_cost(const Maps<scalar_t>& maps, int64_t camera, int64_t pixel, int64_t first_depth, int lane) {
  const scalar_t* map = maps.reference + camera * maps.height * maps.width * maps.channels;
  const scalar_t* here = maps.current + (camera * maps.height * maps.width + pixel) * maps.channels;
  const int count = static_cast<int>(min(static_cast<int64_t>(kWarp), maps.num_depths - first_depth));
  const auto own = lane_position<scalar_t, acc_t>(maps, camera, pixel, first_depth, count, lane);
  acc_t total = lane_penalty<scalar_t, acc_t>(maps, map, own);
  for (int64_t first = 0; first < maps.channels; first += 8 * kWarp) {
    Held<scalar_t> features, taps[4];
    features.load(here, true, first, maps.channels, lane);
    acc_t outside = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) outside += ::fabs(features[i]);
    int held_index = -1;
    for (int group = 0; group * kGroup < count; ++group) {
      acc_t share[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) {
        share[i] = lane_cost(maps, map, features, outside, own, group * kGroup + i, first, lane, taps, held_index);
      }
      const acc_t sum = sum_group(share, lane);
      if (lane / kGroup == group) total += sum;
    }
  }
  return total;
}

template <typename scalar_t>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks<scalar_t>) plane_sweep_kernel(const Maps<scalar_t> maps) {
  using acc_t = at::opmath_type<scalar_t>;
  static_assert(kPixels == kWarp, "a warp writes one depth of all pixels of the block");
  __shared__ acc_t tile[kWarp][kPixels + 1];  // (depth, pixel); the extra column avoids bank conflicts
  const int64_t num_pixels = maps.height * maps.width;
  const int64_t blocks_per_camera = (num_pixels + kPixels - 1) / kPixels;
  const int64_t camera = blockIdx.x / blocks_per_camera;
  const int64_t first_pixel = blockIdx.x % blocks_per_camera * kPixels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int64_t first_depth = 0; first_depth < maps.num_depths; first_depth += kWarp) {
    for (int p = warp; p < kPixels && first_pixel + p < num_pixels; p += kWarps) {
      tile[lane][p] = warp_cost(maps, camera, first_pixel + p, first_depth, lane);
    }
    __syncthreads();
    for (int row = warp; row < kWarp && first_depth + row < maps.num_depths; row += kWarps) {
      const int64_t depth = first_depth + row, pixel = first_pixel + lane;
      if (pixel < num_pixels) maps.cost[(camera * maps.num_depths + depth) * num_pixels + pixel] = tile[row][lane];
    }
    __syncthreads();
  }
}

// The softmax over depth of the negated costs. A lane keeps the depths lane, lane + 32, ... of its warp's pixel.
template <typename scalar_t>
__global__ void __launch_bounds__(kWarp* kWarps, kBlocks<scalar_t>) probability_kernel(const Maps<scalar_t> maps) {
  using acc_t = at::opmath_type<scalar_t>;
  extern __shared__ __align__(16) unsigned char shared[];
  const int64_t num_pixels = maps.height * maps.width, depths = maps.num_depths;
  const int64_t blocks_per_camera = (num_pixels + kPixels - 1) / kPixels;
  const int64_t camera = blockIdx.x / blocks_per_camera;
  const int64_t first_pixel = blockIdx.x % blocks_per_camera * kPixels;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  acc_t* own = reinterpret_cast<acc_t*>(shared) + warp * depths;
  for (int p = warp; p < kPixels && first_pixel + p < num_pixels; p += kWarps) {
    acc_t least = std::numeric_limits<acc_t>::infinity(), sum = 0;
    for (int64_t first_depth = 0; first_depth < depths; first_depth += kWarp) {
      const acc_t cost = warp_cost(maps, camera, first_pixel + p, first_depth, lane);
      if (first_depth + lane < depths) {
        own[first_depth + lane] = cost;
        least = ::fmin(least, cost);
      }
    }
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) least = ::fmin(least, __shfl_xor_sync(kAllLanes, least, step));
    for (int64_t d = lane; d < depths; d += kWarp) sum += own[d] = ::exp(least - own[d]);
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    acc_t* row = maps.cost + (camera * num_pixels + first_pixel + p) * depths;
    for (int64_t d = lane; d < depths; d += kWarp) row[d] = own[d] / sum;
  }
}

// (N, H, W, C) of a map, C rounded up to a multiple of a pack; the map itself where it lies so in memory.
template <typename scalar_t>
at::Tensor as_rows(const at::Tensor& map) {
  const at::Tensor rows = map.permute({0, 2, 3, 1});
  const bool aligned = reinterpret_cast<uintptr_t>(rows.const_data_ptr<scalar_t>()) % sizeof(Pack<scalar_t>) == 0;
  if (rows.is_contiguous() && rows.size(3) % Pack<scalar_t>::size == 0 && aligned) return rows;
  return channels_last(map, 0, Pack<scalar_t>::size, map.scalar_type());
}

// Whether plane_sweep_half.cuh serves these features: it needs matrix products of GPUs from compute capability 7.5 on,
// and counts the packs of a map, its pixels' channels rounded up to 8, in 32 bits.
bool has_half_sums(const at::Tensor& features) {
  const cudaDeviceProp& gpu = *at::cuda::getCurrentDeviceProperties();
  const int64_t packs = features.size(2) * features.size(3) * ((features.size(1) + 7) / 8);
  return gpu.major * 10 + gpu.minor >= 75 && packs <= std::numeric_limits<int>::max();
}

at::Tensor sweep(const at::Tensor& current, const at::Tensor& reference, const Geometry& geometry,
                 const Options& options, double min_depth, bool probabilities) {
  const c10::cuda::CUDAGuard guard(current.device());
  if (current.scalar_type() == at::kBFloat16 || (current.scalar_type() == at::kHalf && !has_half_sums(current))) {
    // Converted once: in the loop over depths the conversions would cost more than the wider reads, and bfloat16 is too
    // coarse to interpolate in.
    return sweep(current.to(at::kFloat), reference.to(at::kFloat), geometry, options, min_depth, probabilities);
  }
  const int64_t cameras = current.size(0), height = current.size(2), width = current.size(3);
  const int64_t num_depths = geometry.depths.size(0);
  const at::ScalarType dtype = at::promote_types(current.scalar_type(), at::kFloat);
  const at::TensorOptions out = current.options().dtype(dtype);
  at::Tensor cost = probabilities ? at::empty({cameras, height, width, num_depths}, out).permute({0, 3, 1, 2})
                                  : at::empty({cameras, num_depths, height, width}, out);
  if (cost.numel() == 0) return cost;
  const int64_t blocks = cameras * ((height * width + kPixels - 1) / kPixels);
  constexpr int64_t kLimit = std::numeric_limits<int>::max();
  TORCH_CHECK((height + 2) * (width + 2) <= kLimit && blocks <= kLimit, "plane_sweep: ", height, " x ", width,
              " pixels of ", cameras, " cameras are more than one launch can serve");
  const Steps steps = prepare_steps(geometry, height, width, dtype, min_depth);
  AT_DISPATCH_FLOATING_TYPES_AND(at::kHalf, current.scalar_type(), "plane_sweep_cuda", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const at::Tensor now = as_rows<scalar_t>(current), before = as_rows<scalar_t>(reference);
    const Maps<scalar_t> maps{
        now.const_data_ptr<scalar_t>(), before.const_data_ptr<scalar_t>(), steps.lattice<acc_t>(),
        cost.mutable_data_ptr<acc_t>(), now.size(3), num_depths, height, width, options};
    const auto stream = at::cuda::getCurrentCUDAStream();
    if (probabilities) {
      const size_t shared_bytes = kWarps * num_depths * sizeof(acc_t);
      probability_kernel<scalar_t><<<static_cast<unsigned>(blocks), kWarp * kWarps, shared_bytes, stream>>>(maps);
    } else {
      plane_sweep_kernel<scalar_t><<<static_cast<unsigned>(blocks), kWarp * kWarps, 0, stream>>>(maps);
    }
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  return cost;
}

// Both operators; they take the same arguments.
template <bool probabilities>
at::Tensor plane_sweep_cuda(const at::Tensor& current, const at::Tensor& reference,
                            const at::Tensor& pixel_from_augmented, const at::Tensor& augmentation,
                            const at::Tensor& offset, const at::Tensor& older_from_pixel,
                            const at::Tensor& translation, const at::Tensor& intrinsics, at::IntArrayRef image_size,
                            const at::Tensor& depths, std::optional<int64_t> invalid_channel, bool invalid_by_position,
                            double invalid_penalty, double min_depth) {
  const Geometry geometry{pixel_from_augmented, augmentation, offset,     older_from_pixel,
                          translation,          intrinsics,   image_size, depths};
  const Options options = check_arguments(current, reference, geometry, invalid_channel, invalid_by_position,
                                          invalid_penalty, min_depth);
  if (probabilities && kWarps * depths.size(0) * sizeof(double) > kSharedBytes) {
    return sweep(current, reference, geometry, options, min_depth, false).neg().softmax(1);
  }
  return sweep(current, reference, geometry, options, min_depth, probabilities);
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) {
  m.impl("plane_sweep", &plane_sweep_cuda<false>);
  m.impl("plane_sweep_probability", &plane_sweep_cuda<true>);
}

}  // namespace mmdet3d::plane_sweep
