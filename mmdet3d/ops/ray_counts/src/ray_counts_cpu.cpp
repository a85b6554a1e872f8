// CPU version of ray_counts: threads over blocks of rays.
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <vector>

#include "ray_counts.h"

namespace mmdet3d::ray_counts {
namespace {

constexpr int64_t kGrain = 64;  // blocks; threads for less would cost more than they save

// Sum of the lanes; destroys them.
double halve(double* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// Counts the rays of block b into `values`, and its sums of flow errors into (classes, blocks) `sums`.
template <typename Flow>
void count_block(const Job<Flow>& job, int64_t b, int64_t blocks, int64_t* values, double* sums) {
  const Layout layout{job.rules.num_classes};
  double lanes[kMaxClasses][kLanes];
  uint64_t found = 0;
  const int64_t first = b * kBlock, last = std::min(first + kBlock, job.num_rays);
  for (int64_t i = first; i < last; ++i) {
    const Ray ray = job.ray(i);
    if (ray.gt < 0) continue;
    ++values[layout.cell(kGt, ray.gt)];
    ++values[layout.cell(kPred, ray.pred)];
    for (int t = 0; t < kThresholds; ++t) values[layout.cell(kTp + t, ray.gt)] += ray.within[t];
    if (!ray.has_flow) continue;
    ++values[layout.cell(kFlow, ray.gt)];
    values[layout.strange()] += ray.strange;
    if ((found >> ray.gt & 1u) == 0) std::fill_n(lanes[ray.gt], kLanes, 0.0);
    found |= uint64_t{1} << ray.gt;
    lanes[ray.gt][i % kLanes] += ray.flow_error;
  }
  for (int c = 0; c < job.rules.num_classes; ++c) {
    sums[c * blocks + b] = (found >> c & 1u) != 0 ? halve(lanes[c]) : 0.0;
  }
}

double sum_blocks(const double* items, int64_t count) {
  double lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i % kLanes] += items[i];
  return halve(lanes);
}

template <typename Flow>
void count_sample(const Job<Flow>& job, int64_t sample, int64_t* counts, double* flow_error, int64_t* problem) {
  const Layout layout{job.rules.num_classes};
  const int64_t blocks = num_blocks(job.num_rays);
  std::vector<int64_t> values(layout.size(), 0);
  std::vector<double> sums(layout.num_classes * blocks);
  std::mutex mutex;
  at::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(layout.size(), 0);
    for (int64_t b = begin; b < end; ++b) count_block(job, b, blocks, own.data(), sums.data());
    const std::lock_guard<std::mutex> lock(mutex);
    for (size_t v = 0; v < own.size(); ++v) values[v] += own[v];
  });
  for (int grid = 0; grid < 2; ++grid) {
    const uint8_t* labels = job.labels + grid * job.num_voxels;
    uint8_t largest = 0;
    for (int64_t i = 0; i < job.num_voxels; ++i) largest = std::max(largest, labels[i]);
    values[layout.largest(grid)] = largest;
  }
  if (!accept(values.data(), layout, sample, problem)) return;
  for (int v = 0; v < layout.strange(); ++v) counts[v] += values[v];
  for (int c = 0; c < layout.num_classes; ++c) flow_error[c] += sum_blocks(sums.data() + c * blocks, blocks);
}

void ray_counts_cpu(const at::Tensor& labels, const at::Tensor& voxel, const at::Tensor& distance,
                    const std::optional<at::Tensor>& pred_flow, const std::optional<at::Tensor>& gt_flow,
                    int64_t free_label, at::IntArrayRef flow_classes, at::ArrayRef<double> thresholds,
                    double flow_threshold, int64_t sample, at::Tensor& counts, at::Tensor& flow_error,
                    at::Tensor& problem) {
  const Rules rules = check_arguments(labels, voxel, distance, pred_flow, gt_flow, free_label, flow_classes, thresholds,
                                      flow_threshold, counts, flow_error, problem);
  const at::Tensor grids = labels.contiguous(), voxels = voxel.contiguous(), distances = distance.contiguous();
  const at::Tensor predicted = contiguous_or_none(pred_flow), truth = contiguous_or_none(gt_flow);
  const auto dtype = predicted.defined() ? predicted.scalar_type() : at::kFloat;
  AT_DISPATCH_FLOATING_TYPES_AND_HALF(dtype, "ray_counts", [&] {
    const auto job = make_job<scalar_t>(rules, grids, voxels, distances, predicted, truth);
    count_sample(job, sample, counts.mutable_data_ptr<int64_t>(), flow_error.mutable_data_ptr<double>(),
                 problem.mutable_data_ptr<int64_t>());
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(mmdet3d, CPU, m) { m.impl("ray_counts", &ray_counts_cpu); }

}  // namespace mmdet3d::ray_counts
