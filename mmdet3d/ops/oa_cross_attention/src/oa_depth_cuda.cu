// CUDA version of oa_depth_consistency: one warp for one query in one camera, its lanes next to each other in the depth
// bins, which lie side by side in memory.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "oa_depth.h"

namespace mmdet3d::oa_depth {
namespace {

constexpr int kWarp = 32, kWarps = 8, kThreads = kWarp * kWarps;
constexpr int kMaxShare = 8;  // bins of one lane; 32 * kMaxShare is _MAX_CUDA_BINS in depth_consistency.py
constexpr unsigned kAll = 0xffffffffu;

// First bin of the largest, after a softmax if asked for, of a distribution whose bin lane + 32 * i the lanes hold in
// share[i]; it is minus infinity where there is no such bin.
template <typename T, int Share>
__device__ __forceinline__ int most_probable(const T (&share)[Share], int lane, int bins, bool softmax) {
  T most = share[0];
  int first = lane;
#pragma unroll
  for (int i = 1; i < Share; ++i) {
    if (share[i] > most) {
      most = share[i];
      first = lane + kWarp * i;
    }
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = __shfl_xor_sync(kAll, most, step);
    const int other_first = __shfl_xor_sync(kAll, first, step);
    if (other > most || (other == most && other_first < first)) {
      most = other;
      first = other_first;
    }
  }
  if (!softmax) return first;
  bool near = false;
#pragma unroll
  for (int i = 0; i < Share; ++i) near |= lane + kWarp * i < first && share[i] >= most - tie_margin<T>();
  if (!__any_sync(kAll, near)) return first;
  T sum = 0;
#pragma unroll
  for (int i = 0; i < Share; ++i) sum += lane + kWarp * i < bins ? std::exp(share[i] - most) : T(0);
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
  // Backwards, so that the smallest bin is left.
#pragma unroll
  for (int i = Share - 1; i >= 0; --i) {
    const int bin = lane + kWarp * i;
    if (bin < first && std::exp(share[i] - most) / sum >= 1 / sum) first = bin;
  }
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const int other_first = __shfl_xor_sync(kAll, first, step);
    first = other_first < first ? other_first : first;
  }
  return first;
}

// Share = ceil(D / 32). `rows` is N * B * Q.
template <typename T, int Share>
__global__ void __launch_bounds__(kThreads) fit_kernel(const Inputs<T> in, T* __restrict__ out, unsigned rows) {
  const unsigned row = blockIdx.x * kWarps + threadIdx.x / kWarp;
  const int lane = threadIdx.x % kWarp;
  if (row >= rows) return;  // the whole warp
  const Sizes& s = in.sizes;
  const int begin = row * s.points;
  bool valid = false;
  for (int point = lane; point < s.points; point += kWarp) valid |= in.valid[begin + point];
  if (!__any_sync(kAll, valid)) {
    for (int point = lane; point < s.points; point += kWarp) out[begin + point] = 0;
    return;
  }
  const T* map = in.depth + in.find_map(row) + lane;
  for (int i = begin; i < begin + s.points; ++i) {
    Taps<T> taps;
    int bin = 0;
    if (find_taps<T>(s.height, s.width, in.position[2 * i], in.position[2 * i + 1], taps)) {  // the same in all lanes
      T share[Share];
#pragma unroll
      for (int k = 0; k < Share; ++k) share[k] = lane + kWarp * k < s.bins ? T(0) : -std::numeric_limits<T>::infinity();
#pragma unroll
      for (int tap = 0; tap < 4; ++tap) {
        if (!taps.on_map[tap]) continue;
        const T* pixel = map + taps.pixel[tap] * s.bins;
        const T weight = taps.weight(tap);
#pragma unroll
        for (int k = 0; k < Share; ++k) {
          if (lane + kWarp * k < s.bins) share[k] += weight * pixel[kWarp * k];
        }
      }
      bin = most_probable<T, Share>(share, lane, s.bins, in.options.softmax_depth);
    }
    if (lane == 0) out[i] = fit<T>(in.options, bin, in.anchor_depth[i]);
  }
}

// Calls run(std::integral_constant<int, Share>{}) for the least Share that serves `bins`.
template <int Share = 1, typename Run>
void choose_share(int bins, const Run& run) {
  if constexpr (Share < kMaxShare) {
    if (bins > kWarp * Share) return choose_share<Share + 1>(bins, run);
  }
  run(std::integral_constant<int, Share>{});
}

at::Tensor depth_consistency(const at::Tensor& position, const at::Tensor& anchor_depth, const at::Tensor& valid,
                             const at::Tensor& depth, int64_t height, int64_t width, double first, double step,
                             double sigma, bool squared_sigma, bool distance_to_neighbours, bool softmax_depth) {
  const Sizes sizes = check_inputs(position, anchor_depth, valid, depth, height, width);
  TORCH_CHECK(sizes.bins <= kWarp * kMaxShare, "oa_depth_consistency: at most ", kWarp * kMaxShare,
              " depth bins on CUDA, got ", sizes.bins);
  const Options options{first, step, sigma, squared_sigma, distance_to_neighbours, softmax_depth};
  const c10::cuda::CUDAGuard guard(position.device());
  const at::Tensor out = at::empty(anchor_depth.sizes(), anchor_depth.options());
  if (out.numel() == 0) return out;
  const auto position_c = position.contiguous(), anchor_depth_c = anchor_depth.contiguous();
  const auto valid_c = valid.contiguous(), depth_c = depth.contiguous();
  const auto rows = static_cast<unsigned>(out.numel() / sizes.points);
  const auto stream = at::cuda::getCurrentCUDAStream();
  AT_DISPATCH_FLOATING_TYPES(position.scalar_type(), "oa_depth_consistency", [&] {
    const Inputs<scalar_t> in{position_c.const_data_ptr<scalar_t>(), anchor_depth_c.const_data_ptr<scalar_t>(),
                              valid_c.const_data_ptr<bool>(), depth_c.const_data_ptr<scalar_t>(), sizes, options};
    choose_share(sizes.bins, [&](auto share) {
      constexpr int Share = decltype(share)::value;
      fit_kernel<scalar_t, Share><<<(rows + kWarps - 1) / kWarps, kThreads, 0, stream>>>(
          in, out.mutable_data_ptr<scalar_t>(), rows);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    });
  });
  return out;
}

}  // namespace
}  // namespace mmdet3d::oa_depth

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("oa_depth_consistency", &mmdet3d::oa_depth::depth_consistency); }
