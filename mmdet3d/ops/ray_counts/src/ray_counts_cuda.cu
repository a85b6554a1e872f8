// CUDA version of ray_counts: one thread per ray counts in shared memory, then one block adds the blocks up and decides
// whether the sample counts. Nothing is read back, and no sum depends on the order in which blocks run.
#include <ATen/Dispatch.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <torch/library.h>

#include <limits>

#include "ray_counts.h"

namespace mmdet3d::ray_counts {
namespace {

constexpr int kWarps = kBlock / kLanes;
constexpr int kSettleThreads = 1024;
constexpr unsigned kAllLanes = 0xffffffffu;

// Sum over the lanes of a warp, in lane 0.
template <typename T>
__device__ T halve(T value) {
  for (int half = kLanes / 2; half > 0; half /= 2) value += __shfl_down_sync(kAllLanes, value, half);
  return value;
}

// Largest value of the lanes of a warp, in lane 0.
__device__ int largest_of_warp(int value) {
  for (int half = kLanes / 2; half > 0; half /= 2) value = max(value, __shfl_down_sync(kAllLanes, value, half));
  return value;
}

// Adds one ray to the counters of its block.
__device__ void tally(const Ray& ray, Layout layout, int* values) {
  if (ray.gt < 0) return;
  atomicAdd(&values[layout.cell(kGt, ray.gt)], 1);
  atomicAdd(&values[layout.cell(kPred, ray.pred)], 1);
  for (int t = 0; t < kThresholds; ++t) {
    if (ray.within[t]) atomicAdd(&values[layout.cell(kTp + t, ray.gt)], 1);
  }
  if (ray.has_flow) atomicAdd(&values[layout.cell(kFlow, ray.gt)], 1);
  if (ray.strange) atomicAdd(&values[layout.strange()], 1);
}

// Largest labels of the voxels that this thread, of all threads of all blocks, looks at.
template <typename Flow>
__device__ void look_at_labels(const Job<Flow>& job, Layout layout, int* values) {
  int largest[2] = {0, 0};
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + threadIdx.x; i < job.num_voxels; i += threads) {
    largest[0] = max(largest[0], static_cast<int>(job.labels[i]));
    largest[1] = max(largest[1], static_cast<int>(job.labels[job.num_voxels + i]));
  }
  for (int grid = 0; grid < 2; ++grid) {
    const int found = largest_of_warp(largest[grid]);
    if (threadIdx.x % kLanes == 0) atomicMax(&values[layout.largest(grid)], found);
  }
}

// Writes (values, blocks) counters and (classes, blocks) sums of flow errors.
template <typename Flow>
__global__ void __launch_bounds__(kBlock) count_kernel(const Job<Flow> job, int* all_values, double* all_sums) {
  __shared__ int values[kMaxValues];
  __shared__ double errors[kBlock];
  __shared__ int8_t classes[kBlock];  // -1: no flow to compare
  const Layout layout{job.rules.num_classes};
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  for (int v = thread; v < layout.size(); v += kBlock) values[v] = 0;
  __syncthreads();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBlock + thread;
  Ray ray;
  if (i < job.num_rays) ray = job.ray(i);
  tally(ray, layout, values);
  errors[thread] = ray.flow_error;
  classes[thread] = ray.has_flow ? static_cast<int8_t>(ray.gt) : int8_t{-1};
  look_at_labels(job, layout, values);
  __syncthreads();
  for (int v = thread; v < layout.size(); v += kBlock) {
    all_values[static_cast<int64_t>(v) * gridDim.x + blockIdx.x] = values[v];
  }
  for (int c = thread / kLanes; c < layout.num_classes; c += kWarps) {
    double sum = 0.0;
    for (int j = lane; j < kBlock; j += kLanes) sum += classes[j] == c ? errors[j] : 0.0;
    sum = halve(sum);
    if (lane == 0) all_sums[static_cast<int64_t>(c) * gridDim.x + blockIdx.x] = sum;
  }
}

// Adds up the blocks of a sample, a warp for each value, and adds the sample to the totals if it may count.
__global__ void __launch_bounds__(kSettleThreads)
    settle_kernel(Layout layout, int64_t blocks, const int* all_values, const double* all_sums, int64_t sample,
                  int64_t* counts, double* flow_error, int64_t* problem) {
  __shared__ int64_t values[kMaxValues];
  __shared__ double sums[kMaxClasses];
  __shared__ bool accepted;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  for (int v = thread / kLanes; v < layout.size(); v += kSettleThreads / kLanes) {
    const bool is_largest = v > layout.strange();
    const int* items = all_values + v * blocks;
    int64_t sum = 0;
    int largest = 0;
    for (int64_t b = lane; b < blocks; b += kLanes) {
      sum += items[b];
      largest = max(largest, items[b]);
    }
    sum = halve(sum);
    largest = largest_of_warp(largest);
    if (lane == 0) values[v] = is_largest ? largest : sum;
  }
  for (int c = thread / kLanes; c < layout.num_classes; c += kSettleThreads / kLanes) {
    double sum = 0.0;
    for (int64_t b = lane; b < blocks; b += kLanes) sum += all_sums[c * blocks + b];
    sum = halve(sum);
    if (lane == 0) sums[c] = sum;
  }
  __syncthreads();
  if (thread == 0) accepted = accept(values, layout, sample, problem);
  __syncthreads();
  if (!accepted) return;
  for (int v = thread; v < layout.strange(); v += kSettleThreads) counts[v] += values[v];
  if (thread < layout.num_classes) flow_error[thread] += sums[thread];
}

void ray_counts_cuda(const at::Tensor& labels, const at::Tensor& voxel, const at::Tensor& distance,
                     const std::optional<at::Tensor>& pred_flow, const std::optional<at::Tensor>& gt_flow,
                     int64_t free_label, at::IntArrayRef flow_classes, at::ArrayRef<double> thresholds,
                     double flow_threshold, int64_t sample, at::Tensor& counts, at::Tensor& flow_error,
                     at::Tensor& problem) {
  const Rules rules = check_arguments(labels, voxel, distance, pred_flow, gt_flow, free_label, flow_classes, thresholds,
                                      flow_threshold, counts, flow_error, problem);
  const c10::cuda::CUDAGuard guard(labels.device());
  const at::Tensor grids = labels.contiguous(), voxels = voxel.contiguous(), distances = distance.contiguous();
  const at::Tensor predicted = contiguous_or_none(pred_flow), truth = contiguous_or_none(gt_flow);
  const Layout layout{rules.num_classes};
  const int64_t blocks = num_blocks(voxels.size(1));
  TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "ray_counts: too many rays, got ", voxels.size(1));
  const at::Tensor values = at::empty({layout.size(), blocks}, counts.options().dtype(at::kInt));
  const at::Tensor sums = at::empty({layout.num_classes, blocks}, flow_error.options());
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto dtype = predicted.defined() ? predicted.scalar_type() : at::kFloat;
  AT_DISPATCH_FLOATING_TYPES_AND_HALF(dtype, "ray_counts", [&] {
    const auto job = make_job<scalar_t>(rules, grids, voxels, distances, predicted, truth);
    count_kernel<scalar_t><<<static_cast<unsigned>(blocks), kBlock, 0, stream>>>(
        job, values.mutable_data_ptr<int>(), sums.mutable_data_ptr<double>());
    C10_CUDA_KERNEL_LAUNCH_CHECK();
  });
  settle_kernel<<<1, kSettleThreads, 0, stream>>>(layout, blocks, values.const_data_ptr<int>(),
                                                  sums.const_data_ptr<double>(), sample,
                                                  counts.mutable_data_ptr<int64_t>(),
                                                  flow_error.mutable_data_ptr<double>(),
                                                  problem.mutable_data_ptr<int64_t>());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CUDA, m) { m.impl("ray_counts", &ray_counts_cuda); }

}  // namespace mmdet3d::ray_counts
