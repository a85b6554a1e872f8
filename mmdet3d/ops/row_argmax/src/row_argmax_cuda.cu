// CUDA version of row_argmax.
//
// Neighbouring threads copy neighbouring bytes of a block's rows into shared memory; then every thread looks through a
// row of its own there. Reading short rows straight from global memory would ask for each cache line many times.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <cuda_pipeline.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>

namespace mmdet3d::row_argmax {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 256;
constexpr int kMaxColumns = 256;
constexpr int kShared = kWarp * kMaxColumns * sizeof(float);  // bytes of a block at most

// Copies `count` numbers; waits for them only afterwards.
template <typename T>
__device__ __forceinline__ void copy_rows(const T* from, T* to, int count) {
  constexpr int kPack = 16 / sizeof(T);
  const int whole = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? count / kPack * kPack : 0;
  for (int i = kPack * threadIdx.x; i < whole; i += kPack * blockDim.x) {
    __pipeline_memcpy_async(to + i, from + i, 16);
  }
  __pipeline_commit();
  for (int i = whole + threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
  __pipeline_wait_prior(0);
}

template <typename T>
__global__ void __launch_bounds__(kMaxThreads) argmax_kernel(const T* values, uint8_t* out, int64_t rows, int columns) {
  extern __shared__ int4 memory[];
  T* staged = reinterpret_cast<T*>(memory);
  const int64_t first = int64_t(blockIdx.x) * blockDim.x;
  const int count = static_cast<int>(min(rows - first, int64_t(blockDim.x)));
  copy_rows(values + first * columns, staged, count * columns);
  __syncthreads();
  if (static_cast<int>(threadIdx.x) >= count) return;
  const T* row = staged + threadIdx.x * columns;
  float best = static_cast<float>(row[0]);
  int index = 0;
#pragma unroll 6
  for (int i = 1; i < columns; ++i) {
    const float value = static_cast<float>(row[i]);
    // Not "value > best": a value that is not a number wins over those that are, and keeps its place.
    if (!(value <= best) && best == best) {
      best = value;
      index = i;
    }
  }
  out[first + threadIdx.x] = static_cast<uint8_t>(index);
}

at::Tensor row_argmax(const at::Tensor& values) {
  TORCH_CHECK(values.dim() >= 1 && 1 <= values.size(-1) && values.size(-1) <= kMaxColumns && values.is_contiguous(),
              "row_argmax: expected contiguous values (..., K) with 1 <= K <= 256");
  const c10::cuda::CUDAGuard guard(values.device());
  at::Tensor out = at::empty(values.sizes().slice(0, values.dim() - 1), values.options().dtype(at::kByte));
  const int64_t rows = out.numel();
  if (rows == 0) return out;
  const int columns = static_cast<int>(values.size(-1)), width = columns * static_cast<int>(values.element_size());
  const int threads = std::min(kMaxThreads, kShared / width / kWarp * kWarp);
  const int64_t blocks = (rows + threads - 1) / threads;
  TORCH_CHECK(blocks <= std::numeric_limits<int>::max(), "row_argmax: more rows than one launch can serve");
  const auto dtype = values.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kHalf || dtype == at::kBFloat16,
              "row_argmax: expected float32, float16 or bfloat16");
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "row_argmax", [&] {
    if constexpr (!std::is_same_v<scalar_t, double>) {
      argmax_kernel<scalar_t><<<static_cast<unsigned>(blocks), threads, threads * width,
                                at::cuda::getCurrentCUDAStream()>>>(
          values.const_data_ptr<scalar_t>(), out.mutable_data_ptr<uint8_t>(), rows, columns);
      C10_CUDA_KERNEL_LAUNCH_CHECK();
    }
  });
  return out;
}

}  // namespace
}  // namespace mmdet3d::row_argmax

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("row_argmax", &mmdet3d::row_argmax::row_argmax); }
