// CUDA version of oa_assign_queries. One block lists the queries of one camera and sample, a tile of queries after the
// other; then one thread for each query of each camera looks its source up.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <cstdint>

#include "oa_assign.h"

namespace mmdet3d::oa_assign {
namespace {

constexpr int kThreads = 1024, kWarp = 32, kWarps = kThreads / kWarp;
static_assert(kWarps == kWarp, "one warp adds up the counts of all");

__global__ void __launch_bounds__(kThreads) list_kernel(const bool* __restrict__ seen, int32_t* __restrict__ position,
                                                        int32_t* __restrict__ query, int32_t* __restrict__ length,
                                                        int queries) {
  __shared__ int ends[kWarps];  // number of seen queries in a tile up to and with each warp
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * queries;
  int listed = 0;  // the same in all threads
  for (int start = 0; start < queries; start += kThreads) {
    const int q = start + static_cast<int>(threadIdx.x);
    const bool mine = q < queries && seen[first + q];
    const unsigned together = __ballot_sync(0xffffffffu, mine);
    if (lane == 0) ends[warp] = __popc(together);
    __syncthreads();
    if (warp == 0) {
      int sum = ends[lane];
      for (int step = 1; step < kWarp; step *= 2) {
        const int below = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += below;
      }
      ends[lane] = sum;
    }
    __syncthreads();
    const int before = listed + (warp == 0 ? 0 : ends[warp - 1]) + __popc(together & ((1u << lane) - 1));
    if (q < queries) position[first + q] = mine ? before : -1;
    if (mine) query[first + before] = q;
    listed += ends[kWarps - 1];
    __syncthreads();  // the next tile overwrites `ends`
  }
  if (threadIdx.x == 0) length[blockIdx.x] = listed;
}

__global__ void __launch_bounds__(kThreads) source_kernel(const Lists lists, int32_t* __restrict__ source,
                                                          unsigned threads) {
  const unsigned row = blockIdx.x * kThreads + threadIdx.x;
  if (row < threads) source[row] = lists.find_source(static_cast<int>(row));
}

at::Tensor assign_queries(const at::Tensor& seen) {
  check_inputs(seen);
  const c10::cuda::CUDAGuard guard(seen.device());
  const auto mask = seen.contiguous();
  const auto options = seen.options().dtype(at::kInt);
  const at::Tensor source = at::empty(seen.sizes(), options);
  if (seen.numel() == 0) return source;
  const at::Tensor position = at::empty(seen.sizes(), options), query = at::empty(seen.sizes(), options);
  const at::Tensor length = at::empty(seen.sizes().slice(0, 2), options);
  const int cameras = static_cast<int>(seen.size(0)), batch = static_cast<int>(seen.size(1));
  const int queries = static_cast<int>(seen.size(2));
  const auto stream = at::cuda::getCurrentCUDAStream();
  list_kernel<<<static_cast<unsigned>(cameras * batch), kThreads, 0, stream>>>(
      mask.const_data_ptr<bool>(), position.mutable_data_ptr<int32_t>(), query.mutable_data_ptr<int32_t>(),
      length.mutable_data_ptr<int32_t>(), queries);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  const auto threads = static_cast<unsigned>(seen.numel());
  const Lists lists{position.const_data_ptr<int32_t>(), query.const_data_ptr<int32_t>(),
                    length.const_data_ptr<int32_t>(), cameras, batch, queries};
  source_kernel<<<(threads + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
      lists, source.mutable_data_ptr<int32_t>(), threads);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return source;
}

}  // namespace
}  // namespace mmdet3d::oa_assign

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("oa_assign_queries", &mmdet3d::oa_assign::assign_queries); }
