// CUDA version of class_guidance: scores are read once, the result is written once, and nothing in between is stored.
#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "class_guidance_warp.cuh"

namespace mmdet3d::class_guidance {
namespace {

constexpr int kWarps = 4;  // of a block
constexpr int kNoiseThreads = 256;

// What a kernel is compiled for: groups of eight classes, tiles of 16 hidden values or outputs, and blocks that a
// multiprocessor has registers for.
struct Shape {
  int groups, tiles, blocks;
  constexpr bool holds(int64_t classes, int64_t hidden, int64_t outputs) const {
    return classes <= 8 * groups && hidden <= 16 * tiles && outputs <= 16 * tiles;
  }
};
constexpr Shape kModel{3, 3, 8}, kLargest{4, 4, 5};

struct Arguments {
  const float* scores;   // (samples, rows, classes)
  const int32_t* seeds;  // (samples,), null for none
  void* out;             // (samples, rows, outputs)
  Parameters parameters;
  int64_t rows;
  bool softmax, paired;  // paired: two scores can be read at once
};

// A lane's scores of tile `tile`.
template <int kGroups>
__device__ __forceinline__ void load(const Arguments& args, const float* scores, int64_t tile, Lane lane,
                                     Values<kGroups>& value) {
  const int classes = args.parameters.classes;
  const float none = args.softmax ? -INFINITY : 0.f;
#pragma unroll
  for (int i = 0; i < 2 * kGroups; ++i) value.of[i % 2][i / 2][0] = value.of[i % 2][i / 2][1] = none;
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t at = tile * kRows + 8 * row + lane.row;
    if (at >= args.rows) continue;
    const float* from = scores + at * classes + 2 * lane.pair;
    const int left = classes - 2 * lane.pair;
    if (args.paired) {
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (8 * group >= left) continue;
        const float2 both = __ldg(reinterpret_cast<const float2*>(from + 8 * group));
        value.of[row][group][0] = both.x;
        value.of[row][group][1] = both.y;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 2 * kGroups; ++i) {
        if (8 * (i / 2) + i % 2 < left) value.of[row][i / 2][i % 2] = __ldg(from + 8 * (i / 2) + i % 2);
      }
    }
  }
}

// blockIdx.y is the sample. A warp takes tile after tile, and asks for the next one's scores before it works.
template <typename T, int kGroups, int kTiles, int kBlocks, bool kSeeded>
__global__ void __launch_bounds__(kWarps* kWarp, kBlocks) guidance_kernel(const Arguments args) {
  __shared__ Layers<kTiles> layers;
  arrange<T>(args.parameters, layers, threadIdx.x, blockDim.x);
  __syncthreads();
  const Lane lane(threadIdx.x % kWarp);
  const int classes = args.parameters.classes, outputs = args.parameters.outputs;
  const float* scores = args.scores + blockIdx.y * args.rows * classes;
  T* out = static_cast<T*>(args.out) + blockIdx.y * args.rows * outputs;
  const uint32_t seed = kSeeded ? static_cast<uint32_t>(args.seeds[blockIdx.y]) : 0;
  const int64_t tiles = (args.rows + kRows - 1) / kRows, stride = int64_t(gridDim.x) * kWarps;
  int64_t tile = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  Values<kGroups> next;
  if (tile < tiles) load(args, scores, tile, lane, next);
  for (; tile < tiles; tile += stride) {
    Values<kGroups> value = next;
    if (tile + stride < tiles) load(args, scores, tile + stride, lane, next);
    const int64_t at[2] = {tile * kRows + lane.row, tile * kRows + lane.row + 8};
    if (args.softmax) {
      const uint32_t start[2] = {static_cast<uint32_t>(at[0]) * classes + 2 * lane.pair,
                                 static_cast<uint32_t>(at[1]) * classes + 2 * lane.pair};
      softmax<kSeeded>(value, seed, start);
    }
    apply_layers<T>(layers, value, lane, [&](int column, int row, uint2 words) {
      if (at[row] < args.rows && column < outputs) {
        *reinterpret_cast<uint2*>(out + at[row] * outputs + column) = words;
      }
    });
  }
}

template <typename T, int kGroups, int kTiles, int kBlocks>
void launch(const Arguments& args, int64_t samples) {
  const int64_t tiles = (args.rows + kRows - 1) / kRows;
  const int64_t resident = int64_t(at::cuda::getCurrentDeviceProperties()->multiProcessorCount) * kBlocks;
  const int64_t wanted = std::min((tiles + kWarps - 1) / kWarps, (resident + samples - 1) / samples);
  const dim3 grid(static_cast<unsigned>(wanted), static_cast<unsigned>(samples));
  const auto stream = at::cuda::getCurrentCUDAStream();
  if (args.seeds != nullptr) {
    guidance_kernel<T, kGroups, kTiles, kBlocks, true><<<grid, kWarps * kWarp, 0, stream>>>(args);
  } else {
    guidance_kernel<T, kGroups, kTiles, kBlocks, false><<<grid, kWarps * kWarp, 0, stream>>>(args);
  }
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename T>
void launch_sized(const Arguments& args, int64_t samples) {
  const Parameters& sizes = args.parameters;
  if (kModel.holds(sizes.classes, sizes.hidden, sizes.outputs)) {
    launch<T, kModel.groups, kModel.tiles, kModel.blocks>(args, samples);
  } else {
    launch<T, kLargest.groups, kLargest.tiles, kLargest.blocks>(args, samples);
  }
}

Numbers numbers(const at::Tensor& tensor, at::IntArrayRef shape, const at::Tensor& scores) {
  TORCH_CHECK(tensor.sizes() == shape && tensor.is_contiguous() && tensor.device() == scores.device(),
              "class_guidance: expected contiguous parameters of fitting shapes on the device of scores");
  switch (tensor.scalar_type()) {
    case at::kFloat: return {tensor.const_data_ptr(), Kind::kFloat};
    case at::kHalf: return {tensor.const_data_ptr(), Kind::kHalf};
    case at::kBFloat16: return {tensor.const_data_ptr(), Kind::kBFloat16};
    default: TORCH_CHECK(false, "class_guidance: parameters must be float32, float16 or bfloat16");
  }
}

at::Tensor class_guidance(const at::Tensor& scores, const at::Tensor& first_weight, const at::Tensor& first_bias,
                          const at::Tensor& second_weight, const at::Tensor& second_bias,
                          const std::optional<at::Tensor>& noise_seeds, bool softmax, at::ScalarType dtype) {
  TORCH_CHECK(scores.dim() >= 2 && scores.is_contiguous() && scores.scalar_type() == at::kFloat,
              "class_guidance: scores must be contiguous float32 (B, ..., K)");
  TORCH_CHECK(first_weight.dim() == 2 && second_weight.dim() == 2, "class_guidance: weights must be matrices");
  const int64_t samples = scores.size(0), classes = scores.size(-1);
  const int64_t hidden = first_weight.size(0), outputs = second_weight.size(0);
  TORCH_CHECK(kLargest.holds(classes, hidden, outputs) && classes >= 1 && outputs % 4 == 0 && samples <= 65535,
              "class_guidance: no kernel serves these numbers of samples, classes, hidden values and outputs");
  Arguments args{scores.const_data_ptr<float>(), nullptr, nullptr,
                 {numbers(first_weight, {hidden, classes}, scores), numbers(first_bias, {hidden}, scores),
                  numbers(second_weight, {outputs, hidden}, scores), numbers(second_bias, {outputs}, scores),
                  static_cast<int>(classes), static_cast<int>(hidden), static_cast<int>(outputs)},
                 samples == 0 ? 0 : scores.numel() / samples / classes, softmax, false};
  args.paired = classes % 2 == 0 && reinterpret_cast<uintptr_t>(args.scores) % sizeof(float2) == 0;
  if (noise_seeds) {
    TORCH_CHECK(softmax && noise_seeds->sizes() == at::IntArrayRef{samples} && noise_seeds->is_contiguous() &&
                    noise_seeds->scalar_type() == at::kInt && noise_seeds->device() == scores.device() &&
                    args.rows * classes <= std::numeric_limits<int32_t>::max(),
                "class_guidance: noise_seeds must be int32 (B,), for the softmax of less than 2^31 numbers a sample");
    args.seeds = noise_seeds->const_data_ptr<int32_t>();
  }
  const c10::cuda::CUDAGuard guard(scores.device());
  auto shape = scores.sizes().vec();
  shape.back() = outputs;
  at::Tensor out = at::empty(shape, scores.options().dtype(dtype));
  if (out.numel() == 0) return out;
  args.out = out.mutable_data_ptr();
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "class_guidance: dtype must be float16 or bfloat16");
  if (dtype == at::kHalf) {
    launch_sized<__half>(args, samples);
  } else {
    launch_sized<__nv_bfloat16>(args, samples);
  }
  return out;
}

// blockIdx.y is the sample. The logarithms are those of at::log, so that the noise is the same bit for bit.
__global__ void __launch_bounds__(kNoiseThreads) noise_kernel(const int32_t* seeds, float* out, uint32_t count) {
  const uint32_t index = blockIdx.x * kNoiseThreads + threadIdx.x;
  if (index >= count) return;
  out[int64_t(blockIdx.y) * count + index] = -logf(-logf(uniform(seeds[blockIdx.y], index)));
}

at::Tensor gumbel_noise(const at::Tensor& seeds, int64_t count) {
  TORCH_CHECK(seeds.dim() == 1 && seeds.is_contiguous() && seeds.scalar_type() == at::kInt && seeds.size(0) <= 65535 &&
                  0 <= count && count <= std::numeric_limits<int32_t>::max(),
              "gumbel_noise: expected at most 65535 int32 seeds and less than 2^31 numbers a sample");
  const c10::cuda::CUDAGuard guard(seeds.device());
  at::Tensor out = at::empty({seeds.size(0), count}, seeds.options().dtype(at::kFloat));
  if (out.numel() == 0) return out;
  const dim3 grid(static_cast<unsigned>((count + kNoiseThreads - 1) / kNoiseThreads),
                  static_cast<unsigned>(seeds.size(0)));
  noise_kernel<<<grid, kNoiseThreads, 0, at::cuda::getCurrentCUDAStream()>>>(
      seeds.const_data_ptr<int32_t>(), out.mutable_data_ptr<float>(), static_cast<uint32_t>(count));
  C10_CUDA_KERNEL_LAUNCH_CHECK();
  return out;
}

}  // namespace
}  // namespace mmdet3d::class_guidance

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) {
  m.impl("class_guidance", &mmdet3d::class_guidance::class_guidance);
  m.impl("gumbel_noise", &mmdet3d::class_guidance::gumbel_noise);
}
