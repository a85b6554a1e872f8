// CUDA version of upsample_add.
//
// A thread takes the fine voxels of a column (all z at one y and x) for as many channels as it reads in 16 bytes. The
// coarse volume, an eighth of the fine one, is interpolated along y and x once for each of its levels; two neighbouring
// levels give the two fine ones between them. Neighbouring threads have neighbouring channels.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "trilinear_x2.cuh"

namespace mmdet3d::upsample_add {
namespace {

constexpr int kThreads = 256;
using trilinear_x2::kFar;
using trilinear_x2::kNear;
using trilinear_x2::Taps;

template <typename T, int N>
struct alignas(sizeof(T) * N) Pack {
  T value[N];
};

template <typename T>
struct Args {
  const T* fine;    // (B, 2Z, 2Y, 2X, C)
  const T* coarse;  // (B, Z, Y, X, C)
  T* total;         // like fine
  float* mean;      // (B, 2Y, 2X, C)
  int batch, z, y, x, channels;
};

// One level of the coarse volume, interpolated along y and x.
template <typename T, int N>
struct Level {
  float value[N];
  __device__ void load(const T* plane, const Taps& y, const Taps& x, int width, int64_t channels) {
    using Packed = Pack<T, N>;
    const auto at = [&](int row, int column) {
      return *reinterpret_cast<const Packed*>(plane + (int64_t(row) * width + column) * channels);
    };
    const Packed corner[4] = {at(y.low, x.low), at(y.low, x.high), at(y.high, x.low), at(y.high, x.high)};
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float upper = x.low_weight * static_cast<float>(corner[0].value[i]) +
                          (1 - x.low_weight) * static_cast<float>(corner[1].value[i]);
      const float lower = x.low_weight * static_cast<float>(corner[2].value[i]) +
                          (1 - x.low_weight) * static_cast<float>(corner[3].value[i]);
      value[i] = y.low_weight * upper + (1 - y.low_weight) * lower;
    }
  }
};

// One fine voxel: near and far are the coarse levels around it. Adds what is stored to `sum`.
template <typename T, int N>
__device__ __forceinline__ void store_voxel(const Args<T>& args, int64_t offset, const Level<T, N>& near,
                                            const Level<T, N>& far, float (&sum)[N]) {
  using Packed = Pack<T, N>;
  Packed voxel = *reinterpret_cast<const Packed*>(args.fine + offset);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float value = static_cast<float>(voxel.value[i]) + (kNear * near.value[i] + kFar * far.value[i]);
    voxel.value[i] = static_cast<T>(value);
    sum[i] += value;
  }
  *reinterpret_cast<Packed*>(args.total + offset) = voxel;
}

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) upsample_add_kernel(const Args<T> args, uint32_t threads) {
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  if (index >= threads) return;
  const uint32_t packs = args.channels / N;
  const int channel = index % packs * N;
  uint32_t rest = index / packs;
  const int fine_x = rest % (2 * args.x);
  rest /= 2 * args.x;
  const int fine_y = rest % (2 * args.y), batch = rest / (2 * args.y);
  const Taps y(fine_y, args.y), x(fine_x, args.x);
  const int64_t channels = args.channels;
  const T* plane = args.coarse + int64_t(batch) * args.z * args.y * args.x * channels + channel;
  const int64_t level_size = int64_t(args.y) * args.x * channels, fine_size = 4 * level_size;
  const int64_t column = (int64_t(fine_y) * 2 * args.x + fine_x) * channels + channel;
  int64_t offset = int64_t(batch) * 2 * args.z * fine_size + column;
  Level<T, N> before, here, after;
  here.load(plane, y, x, args.x, channels);
  before = here;
  float sum[N] = {};
  for (int z = 0; z < args.z; ++z) {
    after = here;
    if (z + 1 < args.z) after.load(plane + (z + 1) * level_size, y, x, args.x, channels);
    store_voxel<T, N>(args, offset, here, before, sum);
    store_voxel<T, N>(args, offset + fine_size, here, after, sum);
    offset += 2 * fine_size;
    before = here;
    here = after;
  }
  float* mean = args.mean + int64_t(batch) * fine_size + column;
  const float share = 1.f / (2 * args.z);
#pragma unroll
  for (int i = 0; i < N; ++i) mean[i] = sum[i] * share;
}

template <typename T, int N>
void launch(const Args<T>& args) {
  const int64_t threads = int64_t(args.batch) * 4 * args.y * args.x * (args.channels / N);
  TORCH_CHECK(threads <= std::numeric_limits<int>::max(), "upsample_add: more columns than one launch can serve");
  const auto blocks = static_cast<unsigned>((threads + kThreads - 1) / kThreads);
  upsample_add_kernel<T, N><<<blocks, kThreads, 0, at::cuda::getCurrentCUDAStream()>>>(args, threads);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void run(const at::Tensor& fine, const at::Tensor& coarse, const at::Tensor& total, const at::Tensor& mean) {
  constexpr int kPack = 16 / sizeof(T);
  const auto size = [&](int axis) { return static_cast<int>(coarse.size(axis)); };
  const Args<T> args{fine.const_data_ptr<T>(), coarse.const_data_ptr<T>(), total.mutable_data_ptr<T>(),
                     mean.mutable_data_ptr<float>(), size(0), size(1), size(2), size(3), size(4)};
  const auto addresses = reinterpret_cast<uintptr_t>(args.fine) | reinterpret_cast<uintptr_t>(args.coarse);
  if (addresses % 16 == 0 && args.channels % kPack == 0) {
    launch<T, kPack>(args);
  } else {
    launch<T, 1>(args);
  }
}

std::tuple<at::Tensor, at::Tensor> upsample_add(const at::Tensor& fine, const at::Tensor& coarse) {
  TORCH_CHECK(fine.dim() == 5 && coarse.dim() == 5 && fine.is_contiguous() && coarse.is_contiguous() &&
                  fine.scalar_type() == coarse.scalar_type() && fine.device() == coarse.device(),
              "upsample_add: expected two contiguous volumes of one dtype on one device");
  for (int axis = 0; axis < 5; ++axis) {
    const int64_t factor = axis == 0 || axis == 4 ? 1 : 2;
    TORCH_CHECK(fine.size(axis) == factor * coarse.size(axis),
                "upsample_add: fine must have twice the voxels of coarse along each axis");
  }
  const c10::cuda::CUDAGuard guard(fine.device());
  at::Tensor total = at::empty_like(fine);
  at::Tensor mean = at::empty({fine.size(0), fine.size(2), fine.size(3), fine.size(4)}, fine.options().dtype(at::kFloat));
  if (fine.numel() == 0) return {total, mean};
  AT_DISPATCH_SWITCH(fine.scalar_type(), "upsample_add",
                     AT_DISPATCH_CASE(at::kFloat, [&] { run<scalar_t>(fine, coarse, total, mean); })
                     AT_DISPATCH_CASE(at::kHalf, [&] { run<scalar_t>(fine, coarse, total, mean); })
                     AT_DISPATCH_CASE(at::kBFloat16, [&] { run<scalar_t>(fine, coarse, total, mean); }));
  return {total, mean};
}

}  // namespace
}  // namespace mmdet3d::upsample_add

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("upsample_add", &mmdet3d::upsample_add::upsample_add); }
